//! `broker-http subscription settle`: what becomes of what was pulled.

use std::path::PathBuf;

use broker_core::{Error, Result};
use serde_json::{Map, Value};

use super::subscription::{MAX_FILE, Named};
use crate::output::read_file;

/// Settles what was pulled, by the leases that `pull` told
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Settle {
    #[command(flatten)]
    pub(super) named: Named,
    /// Done: it never comes back; as the others, may be repeated
    #[arg(long, value_name = "LEASE", allow_hyphen_values = true)]
    ack: Vec<String>,
    /// Failed: deliver it again later, or bury it after its last attempt
    #[arg(long, value_name = "LEASE", allow_hyphen_values = true)]
    retry: Vec<String>,
    /// Never to be done: it is a dead letter at once
    #[arg(long, value_name = "LEASE", allow_hyphen_values = true)]
    reject: Vec<String>,
    /// Not tried: deliver it again at once, to anybody, without counting an attempt
    #[arg(long, value_name = "LEASE", allow_hyphen_values = true)]
    release: Vec<String>,
    /// Still at work on it: hold it for as long as --for says, from now
    #[arg(long, value_name = "LEASE", allow_hyphen_values = true, requires = "hold")]
    extend: Vec<String>,
    /// How long what is extended is held from now, as in 30s
    #[arg(long = "for", value_name = "DURATION", requires = "extend")]
    hold: Option<String>,
    /// When to deliver again what is retried, as in 5s; by default after the group's backoff
    #[arg(long, value_name = "DURATION", requires = "retry")]
    delay: Option<String>,
    /// Why what is retried or rejected failed; a dead letter tells it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// A code of yours for that failure, as in 503 or E42
    #[arg(long, value_name = "CODE")]
    status: Option<String>,
    /// All of it as JSON, where each lease has its own delay or reason; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "ack", "retry", "reject", "release", "extend", "hold", "delay", "reason", "status",
    ])]
    file: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Each lease is settled once; the answer names those that no longer held as \"gone\": their messages
come back, or were settled before. What is not settled within the subscription's timeout is retried.

Examples:
  broker-http subscription pull billing --max 2 --wait 5s
  broker-http subscription settle billing --ack LEASE --ack LEASE
  broker-http subscription settle billing --retry LEASE --delay 1m --reason 'the bank is closed'
  broker-http subscription settle billing --reject LEASE --reason 'no such account' --status E42
  broker-http subscription settle billing --extend LEASE --for 10m
  echo '{\"ack\": [\"LEASE\"], \"release\": [\"LEASE\"]}' | broker-http subscription settle billing --file -";

impl Settle {
    /// What is asked of `/settle`.
    ///
    /// # Errors
    ///
    /// That the file cannot be read, or that there is a reason or a status and nothing that failed.
    pub(super) async fn body(&self) -> Result<String> {
        if let Some(file) = &self.file {
            let text = read_file(file, MAX_FILE).await?;
            return String::from_utf8(text).map_err(|_| Error::invalid(format!("{}: it is not UTF-8", file.display())));
        }
        let failed = !self.retry.is_empty() || !self.reject.is_empty();
        if !failed && (self.reason.is_some() || self.status.is_some()) {
            return Err(Error::invalid("--reason, --status: they are for what failed, by --retry or --reject"));
        }
        let (reason, status) = (("reason", &self.reason), ("status", &self.status));
        let each = |leases: &[String], said: &[(&str, &Option<String>)]| -> Value {
            leases.iter().map(|lease| entry(lease, said)).collect()
        };
        let said = [
            ("ack", Value::from(self.ack.clone())),
            ("retry", each(&self.retry, &[("delay", &self.delay), reason, status])),
            ("reject", each(&self.reject, &[reason, status])),
            ("release", Value::from(self.release.clone())),
            ("extend", each(&self.extend, &[("for", &self.hold)])),
        ];
        let said: Map<_, _> = said.into_iter().map(|(how, leases)| (how.to_owned(), leases)).collect();
        Ok(Value::from(said).to_string())
    }
}

/// A lease and what is said of it.
fn entry(lease: &str, said: &[(&str, &Option<String>)]) -> Value {
    let mut entry = Map::from_iter([("lease".to_owned(), Value::from(lease))]);
    let said = said.iter().filter_map(|(field, value)| Some(((*field).to_owned(), Value::from(value.as_deref()?))));
    entry.extend(said);
    Value::from(entry)
}
