//! The peers: other people's brokers, in `benches/peers`, a workspace of its own that is built when
//! one of its names is asked for.

use std::path::Path;
use std::process::Command;

use crate::cli::{Arguments, Outcome};

/// The peers' names and bars, told without building them; a test of theirs checks that it is these.
pub const NAMES: [(&str, f64); 8] = [
    ("peers/ruststream_10", 5.0),
    ("peers/ruststream_100", 5.0),
    ("peers/mq_bridge_10", 1.5),
    ("peers/mq_bridge_100", 1.5),
    ("peers/flume_10", 1.0),
    ("peers/flume_100", 1.0),
    ("peers/async_broadcast_10", 1.0),
    ("peers/async_broadcast_100", 1.0),
];

/// Whether a name asked for is the peers'.
pub fn is_peers(name: &str) -> bool {
    name == "peers" || name.starts_with("peers/")
}

/// Prints the names as `--list` does.
pub fn list() {
    for (name, bar) in NAMES {
        println!("{name:<42} bar {bar:6.3}  built on request");
    }
}

/// Builds the peers and has their own `ratios` run these names.
pub fn run(names: &[String], arguments: &Arguments) -> Outcome {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/Cargo.toml");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["run", "--release", "--quiet", "--bin", "ratios", "--manifest-path"]).arg(manifest).arg("--");
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
