//! The log: on standard error, with a level for each module, as text or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use super::LogFormat;

/// The log at work; its levels can change.
#[derive(Debug)]
pub(super) struct Logging(Option<reload::Handle<EnvFilter, Registry>>);

/// Whether these levels can be read.
pub(super) fn check(levels: &str) -> Result<(), String> {
    filter(levels).map(drop)
}

fn filter(levels: &str) -> Result<EnvFilter, String> {
    const USAGE: &str = "it is a level (error, warn, info, debug, trace, off), or MODULE=LEVEL, with commas between";
    // A word alone would be taken for a module, and the log of all others would be off.
    let mistyped = levels
        .split(',')
        .map(str::trim)
        .find(|word| !word.is_empty() && !word.contains(['=', '[']) && word.parse::<LevelFilter>().is_err());
    if let Some(word) = mistyped {
        return Err(format!("log {levels:?}: {word:?} is no level; {USAGE}"));
    }
    // What RabbitMQ's client calls an error is often an answer that our adapter asked for: a queue
    // that is not there yet. What matters of it, the adapter says.
    let quiet = if levels.contains("lapin") { "" } else { ",lapin=off" };
    EnvFilter::builder().parse(format!("{levels}{quiet}")).map_err(|error| format!("log {levels:?}: {error}; {USAGE}"))
}

impl Logging {
    pub(super) fn start(levels: &str, format: LogFormat) -> Result<Self, String> {
        let (filter, handle) = reload::Layer::new(filter(levels)?);
        let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
        let layer = match format {
            LogFormat::Text => layer.boxed(),
            LogFormat::Json => layer.json().flatten_event(true).boxed(),
        };
        let started = tracing_subscriber::registry().with(filter).with(layer).try_init();
        // A process has one log; where there is one already, its levels are its own.
        Ok(Self(started.is_ok().then_some(handle)))
    }

    pub(super) fn set(&self, levels: &str) -> Result<(), String> {
        let filter = filter(levels)?;
        self.0.as_ref().map_or(Ok(()), |handle| handle.reload(filter).map_err(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_by_module_and_what_is_none_is_named() {
        check("warn").unwrap();
        check("warn,broker_http::push=debug").unwrap();
        let error = check("broker_http=loud").unwrap_err();
        assert!(error.contains("loud"), "{error}");
        for bad in ["wran", "warn,broker_http:debug", "info,broker_http"] {
            assert!(check(bad).unwrap_err().contains("is no level"), "{bad}");
        }
    }
}
