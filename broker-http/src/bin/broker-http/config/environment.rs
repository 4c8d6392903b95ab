//! The environment's part of the configuration: which variables there are.

use clap::Args as _;

use super::suggest;
use crate::serve::Args;

/// Refuses a variable that looks like a setting and is none, and suggests the near one.
pub(super) fn check(names: impl Iterator<Item = String>) -> Result<(), String> {
    let command = Args::augment_args(clap::Command::new("serve"));
    let known: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_env()?.to_str()).collect();
    for name in names.filter(|name| name.starts_with("BROKER_HTTP_")) {
        // Kubernetes tells every pod of a Service called broker-http so.
        let of_a_service = ["BROKER_HTTP_PORT", "BROKER_HTTP_SERVICE_"].iter().any(|begin| name.starts_with(begin));
        if of_a_service || known.contains(&&*name) {
            continue;
        }
        let near = suggest::nearest(&name, known.iter().copied());
        let near = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
        return Err(format!("the environment variable {name} is no setting{near}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str) -> Result<(), String> {
        check(std::iter::once(name.to_owned()))
    }

    #[test]
    fn a_slip_is_told_with_the_near_one_and_what_is_not_ours_is_let_be() {
        for name in ["BROKER_HTTP_LISTEN", "BROKER_HTTP_TLS_KEY", "BROKER_URL", "PATH", "BROKER_HTTP_SERVICE_HOST"] {
            told(name).unwrap();
        }
        told("BROKER_HTTP_PORT_2757_TCP").unwrap();
        let error = told("BROKER_HTTP_LISEN").unwrap_err();
        assert!(error.contains("BROKER_HTTP_LISEN") && error.contains("did you mean BROKER_HTTP_LISTEN?"), "{error}");
        assert!(told("BROKER_HTTP_COLOUR").is_err());
    }
}
