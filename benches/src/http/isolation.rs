//! What one dead and one hanging endpoint among 100 cost the other 98: our engine with them beside
//! our engine without.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{Message, Publisher, PublisherOptions, Topic};
use serde_json::json;
use tokio::net::TcpListener;

use super::latency::{Arrivals, Clock, p99};
use super::{Ours, PAYLOAD};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

const HEALTHY: usize = 98;

/// Messages a round: each is pushed to every endpoint.
const MESSAGES: usize = 200;

/// How far apart they are published where latency is measured: about half of the load that two
/// cores can take, receivers included.
const PACE: Duration = Duration::from_millis(12);

/// Costing nothing measurable is a ratio that cannot be told from 1.
pub(super) fn comparisons() -> Vec<Comparison> {
    let throughput = Comparison::new("http/isolation/throughput", Unit::DeliveriesPerSecond, 1.0, async || {
        let (with, without) = (Arc::new(Scene::new(true).await?), Arc::new(Scene::new(false).await?));
        let side = |scene: Arc<Scene>| {
            move || {
                let scene = Arc::clone(&scene);
                async move { scene.throughput().await }
            }
        };
        Ok(Pair::new(side(with), side(without)))
    });
    let latency = Comparison::new("http/isolation/p99", Unit::P99Micros, 1.0, async || {
        let (with, without) = (Arc::new(Scene::new(true).await?), Arc::new(Scene::new(false).await?));
        let side = |scene: Arc<Scene>| {
            move || {
                let scene = Arc::clone(&scene);
                async move { scene.p99().await }
            }
        };
        Ok(Pair::new(side(with), side(without)))
    });
    vec![throughput, latency]
}

/// An engine that pushes every message to all endpoints.
struct Scene {
    _ours: Ours,
    publisher: Publisher,
    arrivals: Arrivals,
    clock: Clock,
    /// Accepts and never answers.
    _hanging: TcpListener,
}

impl Scene {
    async fn new(with_bad_ones: bool) -> Result<Self> {
        let (ours, clock) = (Ours::start().await?, Clock::start());
        let arrivals = Arrivals::start(HEALTHY, clock).await?;
        for (number, endpoint) in arrivals.urls().enumerate() {
            subscribe(&ours, &format!("healthy-{number}"), &endpoint).await?;
        }
        // A listener nobody accepts from: the system takes the connection, and no answer comes.
        let hanging = TcpListener::bind("127.0.0.1:0").await?;
        if with_bad_ones {
            subscribe(&ours, "hanging", &format!("http://{}/", hanging.local_addr()?)).await?;
            let gone = TcpListener::bind("127.0.0.1:0").await?;
            let dead = format!("http://{}/", gone.local_addr()?);
            drop(gone);
            subscribe(&ours, "dead", &dead).await?;
        }
        let publisher = ours.broker.publisher(&Topic::new("orders.created")?, PublisherOptions::new())?;
        Ok(Self { _ours: ours, publisher, arrivals, clock, _hanging: hanging })
    }

    async fn publish(&self) -> Result<()> {
        self.publisher.publish(Message::new(self.clock.stamped(PAYLOAD))).await?;
        Ok(())
    }

    async fn throughput(&self) -> Result<f64> {
        let arrived = self.arrivals.expect(MESSAGES * HEALTHY);
        let began = Instant::now();
        for _ in 0..MESSAGES {
            self.publish().await?;
        }
        arrived.await?;
        Ok((MESSAGES * HEALTHY) as f64 / began.elapsed().as_secs_f64())
    }

    async fn p99(&self) -> Result<f64> {
        let messages = MESSAGES / 2;
        let arrived = self.arrivals.expect(messages * HEALTHY);
        let mut tick = tokio::time::interval(PACE);
        for _ in 0..messages {
            tick.tick().await;
            self.publish().await?;
        }
        Ok(p99(arrived.await?))
    }
}

async fn subscribe(ours: &Ours, name: &str, endpoint: &str) -> Result<()> {
    ours.put(name, json!({"filter": "orders.>", "endpoint": endpoint, "max_in_flight": 4})).await
}
