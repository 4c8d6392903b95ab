//! The way of spans to a collector: OTLP, protobuf over HTTP.
//!
//! Spans wait in a bounded queue, in whose place at most so many are sent at a time by a thread of
//! their own; what does not fit is dropped, counted and said in the log, so that a collector that is
//! away costs publishers nothing. The connection is that of our own client: it has deadlines and
//! bounds, and asks no proxy that the environment names.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use broker_core::{Error, Result};
use bytes::Bytes;
use http::{Request, Response};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::runtime::Handle;

use super::Traces;
use crate::client::{Call, Http, HttpOptions};

const PATH: &str = "/v1/traces";
/// How long one export may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a collector's answer that are read.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Which collector traces are sent to by OTLP, and how many of them.
///
/// The queue has room for 2,048 spans, of which 512 are sent at a time, every 5 seconds at the latest;
/// `OTEL_BSP_MAX_QUEUE_SIZE`, `OTEL_BSP_MAX_EXPORT_BATCH_SIZE` and `OTEL_BSP_SCHEDULE_DELAY` change
/// that, `OTEL_EXPORTER_OTLP_HEADERS` is sent along, `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`
/// say who it is.
#[derive(Clone)]
pub struct OtlpOptions {
    collector: HttpOptions,
    sample: f64,
}

impl OtlpOptions {
    /// The collector at `url`, as in `http://127.0.0.1:4318`: spans are sent to `/v1/traces` below it.
    /// A private authority of an `https` collector is `?ca=FILE`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming what is wrong, for what is no such URL.
    ///
    /// ```
    /// use broker_http::OtlpOptions;
    ///
    /// let options = OtlpOptions::new("http://127.0.0.1:4318")?.with_sample(0.1)?;
    /// assert!(OtlpOptions::new("grpc://127.0.0.1:4317").is_err());
    /// # let _ = options;
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn new(url: &str) -> Result<Self> {
        let collector = HttpOptions::from_url(url)
            .map_err(|error| Error::invalid(error.message().replace("broker URL", "collector URL")))?;
        Ok(Self { collector, sample: 1.0 })
    }

    /// Keeps this share of the traces that begin here, from 0 to 1; those that come with a
    /// `traceparent` are kept as it says.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for what is not from 0 to 1.
    pub fn with_sample(mut self, share: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::invalid("sample: it is a share of the traces, from 0 to 1"));
        }
        self.sample = share;
        Ok(self)
    }
}

impl fmt::Debug for OtlpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OtlpOptions").field("collector", &self.collector).field("sample", &self.sample).finish()
    }
}

impl Traces {
    /// Sends spans to a collector. To be called within a tokio runtime; connects when there is
    /// something to send. Call [`shutdown`](Self::shutdown) at the end, or the last spans are lost.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for settings of the environment that cannot be used.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    /// use broker_http::{OtlpOptions, Traces};
    ///
    /// let traces = Traces::otlp(OtlpOptions::new("http://127.0.0.1:4318")?.with_sample(0.1)?)?;
    /// // At the end; it blocks.
    /// let ended = tokio::task::spawn_blocking(move || traces.shutdown(Duration::from_secs(5))).await?;
    /// # let _ = ended; Ok(()) }
    /// ```
    pub fn otlp(options: OtlpOptions) -> Result<Self> {
        let url = format!("{}{PATH}", options.collector.name());
        let client = Collector { http: Arc::new(Http::new(options.collector)), runtime: Handle::current() };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(url)
            .build()
            .map_err(|error| Error::invalid(format!("OTLP: {error}")))?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(env!("CARGO_PKG_NAME"));
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.sample))))
            .with_resource(resource.build())
            .build();
        Ok(Self::new(provider))
    }
}

/// The exporter's thread knows no runtime: requests run on that of the server.
#[derive(Debug)]
struct Collector {
    http: Arc<Http>,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> std::result::Result<Response<Bytes>, HttpError> {
        let http = Arc::clone(&self.http);
        let sent = self.runtime.spawn(async move {
            let (parts, body) = request.into_parts();
            let mut call = Call::new(parts.method, PATH, PATIENCE);
            call.headers = parts.headers;
            call.body = body;
            call.limit = MAX_ANSWER_BYTES;
            http.call(call).await
        });
        let answer = sent.await?.map_err(Error::from)?;
        let mut response = Response::new(answer.body);
        *response.status_mut() = answer.status;
        *response.headers_mut() = answer.headers;
        Ok(response)
    }
}
