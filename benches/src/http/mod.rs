//! The HTTP server and push engine beside bare hyper and reqwest: one run, one machine, loopback,
//! receivers included.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, Connectors, Subscription};
use broker_http::{Server, ServerOptions};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method};
use tokio::net::TcpListener;

use crate::comparison::Comparison;
use crate::{Failure, Result};

mod bare;
mod embedded;
mod endpoint;
pub(crate) mod footprint;
mod isolation;
mod latency;
mod lines;
mod load;
mod publish;
mod push;
#[cfg(feature = "otlp")]
mod traced;

use bare::Client;
pub(crate) use endpoint::Endpoint;

/// Connections, on both sides.
const CONNECTIONS: usize = 32;

/// Bytes of a payload, unless the comparison says otherwise.
const PAYLOAD: usize = 512;

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

/// The comparisons of this group.
pub fn comparisons() -> Vec<Comparison> {
    [
        publish::comparisons(),
        lines::comparisons(),
        push::comparisons(),
        embedded::comparisons(),
        latency::comparisons(),
        isolation::comparisons(),
        footprint::comparisons(),
        #[cfg(feature = "otlp")]
        traced::comparisons(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A server as the daemon has it, over a broker in memory.
pub(crate) struct Ours {
    broker: Arc<dyn Broker>,
    _server: Server,
    pub(crate) address: SocketAddr,
}

impl Ours {
    pub(crate) async fn start() -> Result<Self> {
        Self::with(ServerOptions::new()).await
    }

    async fn with(options: ServerOptions) -> Result<Self> {
        let broker = Connectors::new().open("memory:")?;
        // Development mode allows endpoints on loopback, which is where all of them are.
        let server = Server::new(Arc::clone(&broker), options.with_development(true));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await });
        Ok(Self { broker, _server: server, address })
    }

    /// Creates a subscription, as a user does.
    async fn put(&self, name: &str, spec: serde_json::Value) -> Result<()> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut client = Client::connect(self.address).await?;
        let path = format!("/subscriptions/{name}");
        let (status, body) = client.request(Method::PUT, &path, headers, Bytes::from(spec.to_string())).await?;
        if !status.is_success() {
            return Err(format!("PUT {path} was answered {status}: {}", String::from_utf8_lossy(&body)).into());
        }
        Ok(())
    }
}

/// Receives and acks until the broker closes.
async fn drain(mut subscription: Subscription) -> broker_core::Result<()> {
    let mut batch = Vec::new();
    while subscription.receive(&mut batch, 256).await? > 0 {
        for delivery in batch.drain(..) {
            delivery.ack().await?;
        }
    }
    Ok(())
}

/// Waits for what a round waits for, and says that it hangs if it takes far too long.
async fn bounded<T>(what: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    let hangs = |_| Failure::from(format!("{what} was not over after {HANG:?}"));
    tokio::time::timeout(HANG, future).await.map_err(hangs)?
}
