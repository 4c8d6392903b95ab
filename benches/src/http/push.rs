//! Pushing: our engine beside loops that send the same bytes over as many connections, on hyper and
//! on reqwest; and the batch mode beside the single one. Publisher, engine and endpoint are one
//! process: the engine embedded in a service.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use broker_core::{Message, Publisher, PublisherOptions, Topic};
use bytes::Bytes;
use http::{HeaderMap, Method};
use serde_json::json;

use super::bare::Client;
use super::{CONNECTIONS, Endpoint, Ours, PAYLOAD, bounded};
use crate::comparison::{Comparison, Pair, Unit};
use crate::{Failure, Result};

/// Messages a round.
pub(super) const MESSAGES: usize = 16_000;

pub(super) const TOPIC: &str = "orders.created";

pub(super) fn comparisons() -> Vec<Comparison> {
    let hyper = Comparison::new("http/push/hyper", Unit::DeliveriesPerSecond, 0.8, async || {
        let (ours, theirs) = (Arc::new(Pushing::start("single", MESSAGES).await?), Arc::new(Bare::start().await?));
        Ok(Pair::new(rounds(ours), move || on_hyper(Arc::clone(&theirs))))
    });
    let reqwest = Comparison::new("http/push/reqwest", Unit::DeliveriesPerSecond, 1.25, async || {
        let (ours, theirs) = (Arc::new(Pushing::start("single", MESSAGES).await?), Arc::new(Bare::start().await?));
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(CONNECTIONS).build()?;
        Ok(Pair::new(rounds(ours), move || on_reqwest(client.clone(), Arc::clone(&theirs))))
    });
    let batch = Comparison::new("http/push/batch_to_single", Unit::DeliveriesPerSecond, 5.0, async || {
        let batch = Arc::new(Pushing::start("batch", MESSAGES * 5).await?);
        let single = Arc::new(Pushing::start("single", MESSAGES).await?);
        Ok(Pair::new(rounds(batch), rounds(single)))
    });
    vec![hyper, reqwest, batch]
}

/// Our engine, pushing to an endpoint.
pub(super) struct Pushing {
    pub(super) ours: Ours,
    publisher: Publisher,
    pub(super) endpoint: Endpoint,
    messages: usize,
}

impl Pushing {
    pub(super) async fn start(mode: &str, messages: usize) -> Result<Self> {
        let (ours, endpoint) = (Ours::start().await?, Endpoint::start().await?);
        let mode = if mode == "batch" { "batch" } else { "binary" };
        let spec = json!({
            "filter": "orders.>", "endpoint": endpoint.url(), "mode": mode, "max_in_flight": CONNECTIONS,
        });
        ours.put("push", spec).await?;
        let publisher = ours.broker.publisher(&Topic::new(TOPIC)?, PublisherOptions::new())?;
        Ok(Self { ours, publisher, endpoint, messages })
    }

    /// Publishes a round's messages and waits until the endpoint has them all.
    async fn round(&self) -> Result<f64> {
        let payload = Bytes::from(vec![b'x'; PAYLOAD]);
        let arrived = self.endpoint.expect(self.messages as u64);
        let began = Instant::now();
        for _ in 0..self.messages {
            let message = Message::new(payload.clone()).with_content_type("application/octet-stream")?;
            self.publisher.publish(message).await?;
        }
        arrived.await?;
        Ok(self.messages as f64 / began.elapsed().as_secs_f64())
    }
}

pub(super) fn rounds(
    pushing: Arc<Pushing>,
) -> impl FnMut() -> std::pin::Pin<Box<dyn Future<Output = Result<f64>> + Send>> {
    move || {
        let pushing = Arc::clone(&pushing);
        Box::pin(async move { pushing.round().await })
    }
}

/// An endpoint, and a request as our engine makes it.
struct Bare {
    endpoint: Endpoint,
    headers: HeaderMap,
    body: Bytes,
}

impl Bare {
    async fn start() -> Result<Self> {
        let ours = Pushing::start("single", 1).await?;
        ours.round().await?;
        let missing = || Failure::from("the push that was to be copied has not arrived");
        let (mut headers, body) = ours.endpoint.first().ok_or_else(missing)?.clone();
        // Of the other endpoint; the clients put their own.
        headers.remove(http::header::HOST);
        Ok(Self { endpoint: Endpoint::start().await?, headers, body })
    }

    /// Runs a client on each connection until all requests are sent, and waits until the endpoint
    /// has them.
    async fn round<F, Fut>(self: Arc<Self>, client: F) -> Result<f64>
    where
        F: Fn(Arc<Self>, Arc<AtomicUsize>) -> Fut,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let arrived = self.endpoint.expect(MESSAGES as u64);
        let left = Arc::new(AtomicUsize::new(MESSAGES));
        let began = Instant::now();
        let clients: Vec<_> =
            (0..CONNECTIONS).map(|_| tokio::spawn(client(Arc::clone(&self), Arc::clone(&left)))).collect();
        bounded("a bare loop", async {
            for client in clients {
                client.await??;
            }
            Ok(())
        })
        .await?;
        arrived.await?;
        Ok(MESSAGES as f64 / began.elapsed().as_secs_f64())
    }
}

/// Takes one of the messages that are left to send.
fn take(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok()
}

async fn on_hyper(bare: Arc<Bare>) -> Result<f64> {
    let client = |bare: Arc<Bare>, left: Arc<AtomicUsize>| async move {
        let mut connection = Client::connect(bare.endpoint.address).await?;
        while take(&left) {
            let (headers, body) = (bare.headers.clone(), bare.body.clone());
            let (status, _) = connection.request(Method::POST, "/", headers, body).await?;
            if !status.is_success() {
                return Err(format!("the endpoint answered {status}").into());
            }
        }
        Ok(())
    };
    bare.round(client).await
}

async fn on_reqwest(client: reqwest::Client, bare: Arc<Bare>) -> Result<f64> {
    let url: reqwest::Url = bare.endpoint.url().parse()?;
    let client = move |bare: Arc<Bare>, left: Arc<AtomicUsize>| {
        let (client, url) = (client.clone(), url.clone());
        async move {
            while take(&left) {
                let request = client.post(url.clone()).headers(bare.headers.clone()).body(bare.body.clone());
                request.send().await?.error_for_status()?.bytes().await?;
            }
            Ok(())
        }
    };
    bare.round(client).await
}
