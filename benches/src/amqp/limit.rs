//! What the server can do: the best of raw clients on one, two and four connections at once, each as spare as
//! a client can be. On this machine, whose processors they share with it, as every side does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use broker_amqp::lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use broker_amqp::lapin::types::{FieldTable, ShortString};
use broker_amqp::lapin::{Channel, Connection, Consumer};
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::scene::{PREFETCH, connect};
use super::{MANY, Scene, bounded, raw};
use crate::Result;
use crate::sample::Stopwatch;
use crate::statistics::median;

/// Connections at once.
const CONNECTIONS: [u64; 3] = [1, 2, 4];
/// Rounds of each, of which the median counts.
const ROUNDS: usize = 3;
/// Confirms outstanding on a connection, and messages handed to lapin at a time.
const WINDOW: usize = 1_000;
const JOINED: usize = 64;
/// Deliveries that one ack with `multiple` is for.
const ACKED: u64 = 64;

/// Messages of this scene that it takes and confirms a second.
pub(super) async fn publishing(scene: &Arc<Scene>) -> Result<f64> {
    best(|connections| publish(Arc::clone(scene), connections)).await
}

/// Messages of this scene that it delivers a second, and has acked.
pub(super) async fn consuming(scene: &Arc<Scene>) -> Result<f64> {
    best(|connections| consume(Arc::clone(scene), connections)).await
}

async fn best<F: Future<Output = Result<f64>>>(round: impl Fn(u64) -> F) -> Result<f64> {
    let mut best = 0.0_f64;
    for connections in CONNECTIONS {
        let mut rates = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            rates.push(round(connections).await?);
        }
        best = best.max(median(&rates));
    }
    Ok(best)
}

async fn publish(scene: Arc<Scene>, connections: u64) -> Result<f64> {
    let mut publishers = Vec::new();
    for _ in 0..connections {
        publishers.push(raw::Publisher::open(&scene).await?);
    }
    scene.purge().await?;
    let many = MANY / connections;
    let publishing = publishers.into_iter().map(|it| async move { it.publish_joined(many, WINDOW, JOINED).await });
    at_once(publishing).await
}

async fn consume(scene: Arc<Scene>, connections: u64) -> Result<f64> {
    scene.fill(MANY).await?;
    let mut members = Vec::new();
    for _ in 0..connections {
        members.push(Member::join(&scene).await?);
    }
    let (left, over) = (Arc::new(AtomicU64::new(MANY)), watch::Sender::new(false));
    at_once(members.into_iter().map(|member| member.consume(Arc::clone(&left), over.clone()))).await
}

/// Messages a second of all these together, a task each.
async fn at_once(clients: impl Iterator<Item = impl Future<Output = Result<()>> + Send + 'static>) -> Result<f64> {
    let watch = Stopwatch::start();
    let mut tasks: JoinSet<_> = clients.collect();
    let all = async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    };
    bounded("measuring what the server can do", all).await?;
    Ok(watch.per_message(MANY).value)
}

/// One of those who empty the queue together.
struct Member {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
}

impl Member {
    async fn join(scene: &Scene) -> Result<Self> {
        let (connection, channel) = connect(&scene.url).await?;
        channel.basic_qos(PREFETCH as u16, BasicQosOptions::default()).await?;
        let queue = ShortString::from(scene.queue());
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
        Ok(Self { connection, channel, consumer })
    }

    /// Until nothing is left.
    async fn consume(mut self, left: Arc<AtomicU64>, over: watch::Sender<bool>) -> Result<()> {
        let (mut ended, mut received) = (over.subscribe(), 0_u64);
        loop {
            let delivery = tokio::select! {
                next = self.consumer.next() => next.ok_or("the consumer ended")??,
                _ = ended.wait_for(|ended| *ended) => break,
            };
            received += 1;
            let is_last = left.fetch_sub(1, Ordering::AcqRel) == 1;
            if received.is_multiple_of(ACKED) || is_last {
                self.channel.basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: true }).await?;
            }
            if is_last {
                over.send_replace(true);
            }
        }
        self.connection.close(200, "OK".into()).await?;
        Ok(())
    }
}
