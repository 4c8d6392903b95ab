//! The peers: other people's brokers, in `benches/peers`, a workspace of its own that is built when
//! one of its names is asked for.

use std::path::Path;
use std::process::Command;

use crate::cli::{Arguments, Outcome};
use crate::comparison::{Bar, is_selected};

/// Groups whose clients are built only where one of their names is asked for: features of the peers' package.
const FEATURES: [&str; 2] = ["amqp", "kafka"];

/// The peers' names and bars (0 is none), told without building them; a test of theirs checks that it is these.
pub const NAMES: [(&str, f64); 19] = [
    ("peers/ruststream_10", 5.0),
    ("peers/ruststream_100", 5.0),
    ("peers/mq_bridge_10", 1.5),
    ("peers/mq_bridge_100", 1.5),
    ("peers/flume_10", 1.0),
    ("peers/flume_100", 1.0),
    ("peers/async_broadcast_10", 1.0),
    ("peers/async_broadcast_100", 1.0),
    ("peers/amqp/ruststream_publish_64", 0.0),
    ("peers/amqp/ruststream_consume", 0.0),
    ("peers/amqp/mq_bridge_publish_64", 0.0),
    ("peers/amqp/mq_bridge_batch_64", 0.0),
    ("peers/amqp/mq_bridge_consume", 0.0),
    ("peers/kafka/ruststream_publish", 0.0),
    ("peers/kafka/mq_bridge_publish", 0.0),
    ("peers/kafka/sea_streamer_publish", 0.0),
    ("peers/kafka/ruststream_consume", 0.0),
    ("peers/kafka/mq_bridge_consume", 0.0),
    ("peers/kafka/sea_streamer_consume", 0.0),
];

/// Whether a name asked for is the peers'.
pub fn is_peers(name: &str) -> bool {
    name == "peers" || name.starts_with("peers/")
}

/// Prints the names as `--list` does.
pub fn list() {
    for (name, bar) in NAMES {
        let bar = Bar { ratio: bar, cpu_at_most: None };
        println!("{name:<42} {bar}  built on request");
    }
}

/// The features that these names need. A name that is nobody's has those of its group, so that the peers can say
/// which names there are.
fn features(names: &[String]) -> Vec<&'static str> {
    let needs = |feature: &str, name: &String| {
        let group = format!("peers/{feature}");
        is_selected(&group, name) || is_selected(name, &group)
    };
    FEATURES.into_iter().filter(|feature| names.iter().any(|name| needs(feature, name))).collect()
}

/// Builds the peers and has their own `ratios` run these names.
pub fn run(names: &[String], arguments: &Arguments) -> Outcome {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/Cargo.toml");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["run", "--release", "--quiet", "--bin", "ratios", "--manifest-path"]).arg(manifest);
    cargo.args(["--features", &features(names).join(",")]).arg("--");
    cargo.args(names).args(arguments.json.then_some("--json")).args(["--seconds", &arguments.seconds.to_string()]);
    match cargo.status().map(|status| status.code()) {
        Ok(Some(0)) => Outcome::Holds,
        Ok(Some(1)) => Outcome::Falls,
        Ok(_) => Outcome::Failed,
        Err(error) => {
            eprintln!("ratios: running cargo for the peers: {error}");
            Outcome::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heavy_client_is_built_only_for_its_own_names() {
        let features = |name: &str| features(&[name.to_owned()]);
        assert_eq!(features("peers"), ["amqp", "kafka"]);
        assert_eq!(features("peers/"), ["amqp", "kafka"]);
        assert_eq!(features("peers/flume_10"), [""; 0]);
        assert_eq!(features("peers/amqp"), ["amqp"]);
        assert_eq!(features("peers/amqp/mq_bridge_consume"), ["amqp"]);
        assert_eq!(features("peers/kafka/nobodys"), ["kafka"]);
    }
}
