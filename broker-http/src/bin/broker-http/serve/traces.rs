//! Where the daemon's traces go.

use std::time::Duration;

use broker_http::ServerOptions;

use crate::config::Otlp;

/// How long a shutdown waits for the last spans to be sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// Traces at work; the default are none.
#[derive(Clone, Debug, Default)]
pub(super) struct Traces {
    #[cfg(feature = "otlp")]
    traces: broker_http::Traces,
}

/// Whether these settings can be used.
#[cfg(feature = "otlp")]
pub(super) fn check(otlp: &Otlp) -> Result<(), String> {
    options(otlp).map(drop)
}

#[cfg(feature = "otlp")]
fn options(otlp: &Otlp) -> Result<broker_http::OtlpOptions, String> {
    broker_http::OtlpOptions::new(&otlp.endpoint)
        .and_then(|options| options.with_sample(otlp.sample))
        .map_err(|error| format!("otlp: {}", error.message()))
}

/// What cannot be done is refused where it was asked of this daemon. A variable that is set for
/// everything on a machine must not keep it from starting, and is said.
#[cfg(not(feature = "otlp"))]
pub(super) fn check(otlp: &Otlp) -> Result<(), String> {
    const MISSING: &str = "this broker-http was built without otlp, so that it sends no traces: build it with `cargo build --release -p broker-http --features otlp`, or `full` for everything";
    if otlp.from_environment {
        crate::output::say!("broker-http: OTEL_EXPORTER_OTLP_ENDPOINT is set, but {MISSING}");
        return Ok(());
    }
    Err(format!("otlp.endpoint: {MISSING}"))
}

impl Traces {
    pub(super) fn start(otlp: Option<&Otlp>) -> Result<Self, String> {
        let Some(otlp) = otlp else { return Ok(Self::default()) };
        check(otlp)?;
        Ok(Self {
            #[cfg(feature = "otlp")]
            traces: broker_http::Traces::otlp(options(otlp)?).map_err(|error| error.message().to_owned())?,
        })
    }

    /// The server tells of what it does.
    pub(super) fn of(&self, options: ServerOptions) -> ServerOptions {
        #[cfg(feature = "otlp")]
        let options = options.with_traces(self.traces.clone());
        options
    }

    /// Sends what is left.
    pub(super) async fn end(self) {
        #[cfg(feature = "otlp")]
        match tokio::task::spawn_blocking(move || self.traces.shutdown(PATIENCE)).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(why)) => tracing::warn!(why, "the last traces were not sent"),
        }
        #[cfg(not(feature = "otlp"))]
        let _ = PATIENCE;
    }
}
