//! The environment's part of the configuration: which variables there are.

use std::ffi::OsString;

use clap::Args as _;
use clap::error::{ContextKind, ContextValue};

use super::{suggest, table};
use crate::serve::Args;

const PREFIX: &str = "BROKER_HTTP_";

/// Refuses a variable that looks like a setting and is none, and suggests the near one.
pub(super) fn check(names: impl Iterator<Item = String>) -> Result<(), String> {
    let command = Args::augment_args(clap::Command::new("serve"));
    let known: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_env()?.to_str()).collect();
    for name in names {
        let Some(meant) = name.strip_prefix(PREFIX) else { continue };
        // Kubernetes tells every pod of a Service called broker-http so.
        let of_a_service = ["PORT", "SERVICE_"].iter().any(|begin| meant.starts_with(begin));
        if of_a_service || known.contains(&&*name) {
            continue;
        }
        return Err(format!("the environment variable {name} is no setting{}", hint(meant, &known)));
    }
    Ok(())
}

/// What is meant. The prefix, which all have, makes none of them alike.
fn hint(meant: &str, known: &[&str]) -> String {
    let in_file = table::file_keys().find(|key| key.replace('.', "_").eq_ignore_ascii_case(meant));
    if let Some(key) = in_file {
        return format!("; {key} is set in the configuration file");
    }
    let near = suggest::nearest(meant, known.iter().filter_map(|name| name.strip_prefix(PREFIX)));
    near.map_or_else(String::new, |near| format!("; did you mean {PREFIX}{near}?"))
}

/// The variable that gave the value clap complains of, by the name of the flag which nobody typed.
pub(crate) fn at_fault(error: &clap::Error, typed: &[OsString]) -> Option<String> {
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return None };
    let flag = shown.split([' ', '=', '[']).next()?;
    let is_flag = |typed: &OsString| typed.to_str().and_then(|typed| typed.split('=').next()) == Some(flag);
    let command = Args::augment_args(clap::Command::new("serve"));
    let arg = command.get_arguments().find(|arg| arg.get_long() == flag.strip_prefix("--"))?;
    let name = arg.get_env()?;
    let value = std::env::var_os(name).filter(|_| !typed.iter().any(is_flag))?;
    let how = if value.is_empty() { ", which is empty: unset it, or give it a value" } else { "" };
    Some(format!("it comes from the environment variable {}{how}", name.display()))
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
        // One that stands in the file alone is named, and none is that is far.
        let error = told("BROKER_HTTP_LIMITS_MEMORY_BYTES").unwrap_err();
        assert!(error.ends_with("; limits.memory_bytes is set in the configuration file"), "{error}");
        for far in ["BROKER_HTTP_COLOUR", "BROKER_HTTP_LIMITS_MEMORY", "BROKER_HTTP_IDENTITIES"] {
            assert_eq!(told(far), Err(format!("the environment variable {far} is no setting")));
        }
    }
}
