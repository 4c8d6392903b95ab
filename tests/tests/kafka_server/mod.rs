//! The Kafka that the tests run on: the one that KAFKA_URL names, or one of our own.
// Each test binary uses a part of this.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use parking_lot::Mutex;

/// What `tests/servers up kafka` printed.
pub struct Server {
    pub url: String,
    /// Where a listener tells its clients to come back to, and where it listens; free ones.
    pub links: Mutex<Vec<(String, String)>>,
    /// Every NAME=VALUE that was printed.
    pub values: BTreeMap<String, String>,
    /// Whether it is ours to restart.
    pub ours: bool,
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("servers")
}

pub fn run(arguments: &[&str]) -> std::result::Result<String, String> {
    let output = Command::new(script()).args(arguments).output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let printed = run(&["up", "kafka"]).unwrap_or_else(|error| panic!("tests/servers up kafka: {error}"));
        let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let values: BTreeMap<_, _> = printed.lines().filter_map(pair).collect();
        let value = |name: &str| values.get(name).cloned();
        let link = |pair: &str| {
            let (told, listening) = pair.split_once(':')?;
            Some((format!("127.0.0.1:{told}"), format!("127.0.0.1:{listening}")))
        };
        let links = value("KAFKA_LINKS");
        Server {
            url: value("KAFKA_URL").unwrap_or_else(|| panic!("no KAFKA_URL in {printed:?}")),
            ours: links.is_some(),
            values: values.clone(),
            links: Mutex::new(links.iter().flat_map(|links| links.split(',')).filter_map(link).collect()),
        }
    })
}
