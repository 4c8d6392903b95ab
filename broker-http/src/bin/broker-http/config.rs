//! The daemon's configuration: flags and environment over a TOML file over the defaults.

use std::path::{Path, PathBuf};
use std::time::Duration;

use broker_core::{format_duration, parse_duration};
use broker_http::push::Guard;
use broker_http::{Limits, ServerOptions};
use serde::Deserialize;

use crate::serve::Args;

/// What the daemon runs with.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) listen: String,
    pub(crate) broker: String,
    pub(crate) dev: bool,
    pub(crate) drain: Duration,
    state: Option<PathBuf>,
    allow: Vec<String>,
    allowed_origins: Vec<String>,
    webhook_origin: Option<String>,
    limits: Limits,
}

/// The file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    listen: Option<String>,
    broker: Option<String>,
    state: Option<PathBuf>,
    dev: Option<bool>,
    allow: Vec<String>,
    allowed_origins: Vec<String>,
    webhook_origin: Option<String>,
    drain: Option<String>,
    limits: FileLimits,
}

macro_rules! limits {
    ($($name:ident: $kind:ty,)*) => {
        /// The limits a file may set, by the names of [`Limits`].
        #[derive(Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        struct FileLimits {
            $($name: Option<$kind>,)*
            header_timeout: Option<String>,
            body_timeout: Option<String>,
        }

        impl FileLimits {
            fn apply(self, limits: &mut Limits) -> Result<(), String> {
                $(if let Some(value) = self.$name {
                    if value == 0 {
                        return Err(format!("limits.{}: 0 would refuse everything; give 1 or more", stringify!($name)));
                    }
                    limits.$name = value;
                })*
                if let Some(text) = self.header_timeout {
                    limits.header_timeout = positive("limits.header_timeout", &text)?;
                }
                if let Some(text) = self.body_timeout {
                    limits.body_timeout = positive("limits.body_timeout", &text)?;
                }
                Ok(())
            }
        }
    };
}

limits! {
    connections: usize,
    streams_per_connection: u32,
    headers: usize,
    header_bytes: usize,
    message_body_bytes: usize,
    batch_body_bytes: usize,
    batch_messages: usize,
    json_body_bytes: usize,
    refused_body_bytes: u64,
    subscriptions: usize,
    topics: usize,
    leases: usize,
    streams: usize,
    idempotency_bytes: usize,
}

fn positive(key: &str, text: &str) -> Result<Duration, String> {
    let duration = parse_duration(text).map_err(|error| format!("{key}: {}", error.message()))?;
    if duration.is_zero() { Err(format!("{key}: it is longer than zero")) } else { Ok(duration) }
}

/// The broker unless another is asked for: every topic retains enough for a reader of a stream that
/// comes back (`Last-Event-ID`), and for no longer than that takes.
const MEMORY: &str = "memory:?retain=10000&retain_bytes=16777216&retain_age=10m";

/// How long a shutdown may be told to wait.
const MAX_DRAIN: Duration = Duration::from_secs(24 * 3600);

impl Config {
    /// Puts the sources together.
    pub(crate) fn merge(args: Args) -> Result<Self, String> {
        let file = args.config.as_deref().map(read).transpose()?.unwrap_or_default();
        let drain = match (args.drain, file.drain) {
            (Some(drain), _) => drain,
            (None, Some(text)) => parse_duration(&text).map_err(|error| format!("drain: {}", error.message()))?,
            (None, None) => Duration::from_secs(20),
        };
        if drain > MAX_DRAIN {
            return Err(format!("drain {}: it is 1d at most", format_duration(drain)));
        }
        let mut limits = Limits::default();
        file.limits.apply(&mut limits)?;
        Ok(Self {
            listen: args.listen.or(file.listen).unwrap_or_else(|| "127.0.0.1:2757".to_owned()),
            broker: args
                .broker
                .or(file.broker)
                .map_or_else(|| MEMORY.to_owned(), |url| if url == "memory:" { MEMORY.to_owned() } else { url }),
            dev: args.dev || file.dev.unwrap_or(false),
            drain,
            state: args.state.or(file.state),
            allow: if args.allow.is_empty() { file.allow } else { args.allow },
            allowed_origins: file.allowed_origins,
            webhook_origin: args.webhook_origin.or(file.webhook_origin),
            limits,
        })
    }

    /// The server's part of it.
    pub(crate) fn options(&self) -> Result<ServerOptions, String> {
        let mut guard = Guard::new();
        for allowed in &self.allow {
            guard = guard.allowing(allowed.parse().map_err(|error: broker_core::Error| error.message().to_owned())?);
        }
        let mut options = ServerOptions::new()
            .with_guard(guard)
            .with_limits(self.limits.clone())
            .with_allowed_origins(self.allowed_origins.iter().cloned());
        if let Some(origin) = &self.webhook_origin {
            options = options.with_webhook_origin(origin).map_err(|error| error.message().to_owned())?;
        }
        if let Some(state) = &self.state {
            options = options.with_state(state);
        }
        Ok(options)
    }
}

fn read(path: &Path) -> Result<File, String> {
    let named = |why: &dyn std::fmt::Display| format!("configuration file {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    toml::from_str(&text).map_err(|error| named(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<File, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.toml");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn a_bad_key_is_named_and_the_known_ones_are_told() {
        let error = read_text("lisen = \"127.0.0.1:0\"").unwrap_err();
        assert!(error.contains("lisen") && error.contains("`listen`") && error.contains("broker.toml"), "{error}");
        let error = read_text("[limits]\nconections = 1").unwrap_err();
        assert!(error.contains("conections") && error.contains("connections"), "{error}");
        let error = read_text("dev = 1").unwrap_err();
        assert!(error.contains("dev"), "{error}");
    }

    #[test]
    fn limits_are_taken_and_checked() {
        let mut limits = Limits::default();
        let file = read_text("[limits]\nconnections = 7\nbody_timeout = \"5s\"").unwrap();
        file.limits.apply(&mut limits).unwrap();
        assert_eq!((limits.connections, limits.body_timeout), (7, Duration::from_secs(5)));
        for (bad, named) in
            [("connections = 0", "limits.connections"), ("header_timeout = \"0s\"", "limits.header_timeout")]
        {
            let file = read_text(&format!("[limits]\n{bad}")).unwrap();
            assert!(file.limits.apply(&mut limits).unwrap_err().contains(named), "{bad}");
        }
    }
}
