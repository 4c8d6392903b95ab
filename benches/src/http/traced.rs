//! What traces cost a publisher: our server with a collector of OpenTelemetry's, beside the same server
//! without; and a collector that is away, or takes and never answers, beside one that is there. The
//! collector is in this process and answers without reading spans, so that what is measured is ours.

use std::net::SocketAddr;
use std::sync::Arc;

use broker_core::{Subscribe, TopicFilter};
use broker_http::{OtlpOptions, ServerOptions, Traces};
use bytes::Bytes;
use http::StatusCode;
use tokio::net::TcpListener;

use super::load::{closed_loop, publish_request};
use super::{CONNECTIONS, Ours, PAYLOAD, bare, drain};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

const TOPIC: &str = "orders.created";

/// Requests a round on each connection.
const TIMES: usize = 500;

#[derive(Clone, Copy)]
enum Collector {
    There,
    /// Nobody listens.
    Away,
    /// It accepts, and that is all.
    Hanging,
}

/// A server's traces: the share that is kept, and where they go.
type Traced = Option<(f64, Collector)>;

pub(super) fn comparisons() -> Vec<Comparison> {
    let all = |collector| Some((1.0, collector));
    [
        ("all", 0.0, all(Collector::There), None),
        ("tenth", 0.0, Some((0.1, Collector::There)), None),
        ("none", 0.0, Some((0.0, Collector::There)), None),
        ("away", 1.0, all(Collector::Away), all(Collector::There)),
        ("hanging", 1.0, all(Collector::Hanging), all(Collector::There)),
    ]
    .map(|(name, bar, ours, theirs)| {
        Comparison::new(format!("http/traced/{name}"), Unit::MessagesPerSecond, bar, async move || {
            let (ours, theirs) = (Arc::new(server(ours).await?), Arc::new(server(theirs).await?));
            Ok(Pair::new(move || round(Arc::clone(&ours)), move || round(Arc::clone(&theirs))))
        })
    })
    .into()
}

async fn round(server: Arc<Ours>) -> Result<f64> {
    let request = publish_request(server.address, TOPIC, "application/octet-stream", &[b'x'; PAYLOAD]);
    closed_loop(server.address, CONNECTIONS, TIMES, request).await
}

async fn server(traced: Traced) -> Result<Ours> {
    let mut options = ServerOptions::new();
    if let Some((share, collector)) = traced {
        let url = format!("http://{}", collector.start().await?);
        options = options.with_traces(Traces::otlp(OtlpOptions::new(&url)?.with_sample(share)?)?);
    }
    let server = Ours::with(options).await?;
    tokio::spawn(drain(server.broker.subscribe(&TopicFilter::new(TOPIC)?, Subscribe::new()).await?));
    Ok(server)
}

impl Collector {
    async fn start(self) -> Result<SocketAddr> {
        if let Self::There = self {
            return bare::serve(|_, _| bare::answer(StatusCode::OK, None, Bytes::new())).await;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        if let Self::Hanging = self {
            tokio::spawn(async move {
                let mut kept = Vec::new();
                while let Ok(connection) = listener.accept().await {
                    kept.push(connection);
                }
            });
        }
        Ok(address)
    }
}
