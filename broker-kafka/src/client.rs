//! What every client of librdkafka has in common: its settings, its log.

use std::sync::Arc;
use std::time::Duration;

use broker_core::Error;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::statistics::Statistics;

use crate::config::{Sasl, Security};
use crate::health::Health;
use crate::{KafkaConfig, error};

/// Bytes of a request or a record: a message of 1 MiB, what we add, and room for header lengths.
pub(crate) const MAX_RECORD_BYTES: &str = "2097152";

/// How long a producer takes it that a server which does not know a topic has not heard of it yet, from when it began to know
/// the topic: so long a publish to one that was deleted may wait for its error. Where topics are looked up before they are
/// published to, librdkafka's 30 s help nobody.
pub(crate) const PROPAGATION_MILLIS: &str = "5000";

/// The settings all clients share; those of the URL come last.
pub(crate) fn settings(config: &KafkaConfig, own: &[(&str, &str)]) -> ClientConfig {
    let mut settings = ClientConfig::new();
    settings
        .set("bootstrap.servers", config.bootstrap_servers())
        .set("client.id", &config.client_id)
        .set("security.protocol", protocol(config))
        .set("message.max.bytes", MAX_RECORD_BYTES)
        .set("topic.metadata.refresh.interval.ms", millis(config.metadata_refresh))
        // A server that was away is back within a second of its return.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "1000")
        .set_log_level(RDKafkaLogLevel::Warning);
    if let Some(ca) = &config.ca {
        settings.set("ssl.ca.location", ca.to_string_lossy());
    }
    if let (Some(sasl), Some(who)) = (config.sasl, &config.credentials) {
        let mechanism = match sasl {
            Sasl::Plain => "PLAIN",
            Sasl::ScramSha256 => "SCRAM-SHA-256",
            Sasl::ScramSha512 => "SCRAM-SHA-512",
        };
        settings
            .set("sasl.mechanism", mechanism)
            .set("sasl.username", who.username())
            .set("sasl.password", who.password());
    }
    for (name, value) in own {
        settings.set(*name, *value);
    }
    settings
}

fn protocol(config: &KafkaConfig) -> &'static str {
    match (config.security, config.sasl.is_some()) {
        (Security::Plaintext, false) => "plaintext",
        (Security::Plaintext, true) => "sasl_plaintext",
        (Security::Ssl, false) => "ssl",
        (Security::Ssl, true) => "sasl_ssl",
    }
}

/// A duration as librdkafka's settings want it, at least a millisecond.
pub(crate) fn millis(duration: Duration) -> String {
    duration.as_millis().clamp(1, i32::MAX as u128).to_string()
}

/// Waits, on a thread of our own: never called on a runtime's.
#[allow(clippy::disallowed_methods)]
pub(crate) fn rest(duration: Duration) {
    std::thread::sleep(duration);
}

/// Which settings of librdkafka a client takes from the URL: those it knows, by what it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Producer,
    Consumer,
    Admin,
}

/// Settings that mean something to one kind of client only; given to the other, librdkafka warns at
/// every start.
const PRODUCER_ONLY: [&str; 4] = ["queue.buffering.", "linger.", "batch.", "sticky.partitioning."];
const CONSUMER_ONLY: [&str; 6] = ["fetch.", "queued.", "session.", "heartbeat.", "max.poll.", "group."];

/// Adds the settings that the URL hands on.
pub(crate) fn hand_on(settings: &mut ClientConfig, config: &KafkaConfig, role: Role) {
    for (name, value) in config.librdkafka.iter() {
        let of = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let skip = match role {
            Role::Producer => of(&CONSUMER_ONLY),
            Role::Consumer => of(&PRODUCER_ONLY),
            Role::Admin => of(&CONSUMER_ONLY) || of(&PRODUCER_ONLY),
        };
        if !skip {
            settings.set(name, value);
        }
    }
}

/// A client that cannot be made: a setting of the URL is wrong. The value is not repeated, it may be
/// a password.
pub(crate) fn not_made(error: &KafkaError) -> Error {
    match error {
        KafkaError::ClientConfig(_, why, name, _) => {
            Error::invalid(format!("broker URL parameter \"librdkafka.{name}\": {why}"))
        }
        error => error::failed("make a client", error),
    }
}

/// The callbacks of a client that needs no others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Context {
    pub(crate) health: Arc<Health>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        if facility == "FAIL" && matches!(level, RDKafkaLogLevel::Warning | RDKafkaLogLevel::Info) {
            self.health.closed(line.split_once("]: ").map_or(line, |(_, line)| line));
        }
        log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.health.told(&error, reason);
    }

    fn stats(&self, _: Statistics) {}
}

impl ConsumerContext for Context {}

/// A line of librdkafka's log.
pub(crate) fn log(level: RDKafkaLogLevel, facility: &str, line: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
            // What fails is also told to whoever waits for it; a server away is no error of ours.
            tracing::warn!(target: "librdkafka", facility, "{line}");
        }
        RDKafkaLogLevel::Warning => tracing::info!(target: "librdkafka", facility, "{line}"),
        _ => tracing::debug!(target: "librdkafka", facility, "{line}"),
    }
}
