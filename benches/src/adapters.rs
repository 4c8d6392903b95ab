//! All four brokers side by side: the same code against an `Arc<dyn Broker>`, opened by URL. What each step
//! up costs; every broker on this machine, over loopback where it has a server.
//!
//! `memory:` is this process, and so is the server behind `http:`, as the daemon has it, over `memory:`; their
//! processor time is the server's, too. Kafka and RabbitMQ are one node each, with their defaults.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker_core::{Broker, BrokerExt, Connectors, Group, GroupOptions, Message, PublisherOptions, Subscribe, Topic};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;

use crate::comparison::{Comparison, Pair, Unit};
use crate::http::Ours as Daemon;
use crate::sample::{Sample, Stopwatch};
use crate::{Result, server};

/// Bytes of a payload.
pub const PAYLOAD: usize = 100;

/// Publishes outstanding at most where they are pipelined.
const WINDOW: usize = 1_000;

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

/// A broker to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adapter {
    /// `memory:`
    Memory,
    /// `http://`, the daemon
    Http,
    /// `kafka://`
    Kafka,
    /// `amqp://`
    Amqp,
}

impl Adapter {
    /// All of them, each a step up from the one before.
    pub const ALL: [Self; 4] = [Self::Memory, Self::Http, Self::Kafka, Self::Amqp];

    /// As names of comparisons and benches have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Http => "http",
            Self::Kafka => "kafka",
            Self::Amqp => "amqp",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// One publish awaited after another.
    PublishAwaited,
    /// Publishes in a window, a future each.
    PublishPipelined,
    /// A backlog received and acked.
    Consume,
    /// From a publish to the handler that receives it, one message at a time.
    Latency,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PublishAwaited, Self::PublishPipelined, Self::Consume, Self::Latency];

    /// As names of comparisons and benches have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PublishAwaited => "publish_awaited",
            Self::PublishPipelined => "publish_pipelined",
            Self::Consume => "consume",
            Self::Latency => "latency",
        }
    }

    /// Messages of a round of `ratios`.
    fn messages(self) -> u64 {
        match self {
            Self::PublishAwaited => 2_000,
            Self::PublishPipelined | Self::Consume => 20_000,
            Self::Latency => 500,
        }
    }

    fn unit(self) -> Unit {
        match self {
            Self::Consume => Unit::DeliveriesPerSecond,
            Self::Latency => Unit::P99Micros,
            _ => Unit::MessagesPerSecond,
        }
    }
}

/// Each adapter beside the in-process broker. For the reader: they have no bar to reach.
pub fn comparisons() -> Vec<Comparison> {
    let beside_memory = Adapter::ALL.into_iter().filter(|adapter| *adapter != Adapter::Memory);
    let pairs =
        Workload::ALL.into_iter().flat_map(|workload| beside_memory.clone().map(move |adapter| (workload, adapter)));
    pairs.map(|(workload, adapter)| versus(workload, adapter)).collect()
}

fn versus(workload: Workload, adapter: Adapter) -> Comparison {
    let name = format!("adapters/{}/{}", workload.name(), adapter.name());
    Comparison::new(name, workload.unit(), 0.0, async move || {
        let (ours, theirs) = (Scene::open(adapter).await?, Scene::open(Adapter::Memory).await?);
        let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
        let round = move |scene: &Arc<Scene>| {
            let scene = Arc::clone(scene);
            async move { scene.run(workload, workload.messages()).await }
        };
        Ok(Pair::new(move || round(&ours), move || round(&theirs)))
    })
}

/// A broker that is ready, and what it needs to be there.
pub struct Scene {
    broker: Arc<dyn Broker>,
    rounds: AtomicU64,
    unique: String,
    /// Ends with this.
    _daemon: Option<Daemon>,
}

impl std::fmt::Debug for Scene {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Scene").field(&self.broker.name()).finish()
    }
}

impl Scene {
    /// Connects.
    ///
    /// # Errors
    ///
    /// What starting the server or connecting says.
    pub async fn open(adapter: Adapter) -> Result<Self> {
        let mut connectors = Connectors::new();
        connectors.add(["http"], broker_http::client::connector());
        connectors.add(["kafka"], broker_kafka::connector());
        connectors.add(["amqp"], broker_amqp::connector());
        let (url, daemon) = match adapter {
            Adapter::Memory => ("memory:".to_owned(), None),
            Adapter::Http => {
                let daemon = Daemon::start().await?;
                (format!("http://{}", daemon.address), Some(daemon))
            }
            Adapter::Kafka => (server::url("kafka").await?, None),
            Adapter::Amqp => (server::url("amqp").await?, None),
        };
        let broker = connectors.open(&url)?;
        broker.connect().await?;
        let unique = Message::new("").id().to_string();
        Ok(Self { broker, rounds: AtomicU64::new(0), unique, _daemon: daemon })
    }

    /// One round of so many messages: messages a second, or of [`Workload::Latency`] the microseconds that 99 of
    /// 100 took at most.
    ///
    /// # Errors
    ///
    /// What the broker says, and that it hangs.
    pub async fn run(&self, workload: Workload, messages: u64) -> Result<Sample> {
        let round = self.rounds.fetch_add(1, Ordering::Relaxed);
        let topic = Topic::new(format!("bench.{}.{round}", self.unique))?;
        let group: Group = format!("bench@{topic}").parse()?;
        self.broker.create_group(&group, GroupOptions::new()).await?;
        let work = async {
            match workload {
                Workload::PublishAwaited => self.publish_awaited(&topic, messages).await,
                Workload::PublishPipelined => self.publish_pipelined(&topic, messages).await,
                Workload::Consume => self.consume(&topic, &group, messages).await,
                Workload::Latency => self.latency(&topic, &group, messages).await,
            }
        };
        let sample = tokio::time::timeout(HANG, work).await;
        let sample = sample.map_err(|_| format!("the round was not over after {HANG:?}"))??;
        self.broker.delete_group(&group).await?;
        Ok(sample)
    }

    async fn publish_awaited(&self, topic: &Topic, messages: u64) -> Result<Sample> {
        let publisher = self.broker.publisher(topic, PublisherOptions::new())?;
        publisher.publish(message()).await?;
        let watch = Stopwatch::start();
        for _ in 0..messages {
            publisher.publish(message()).await?;
        }
        Ok(watch.per_message(messages))
    }

    async fn publish_pipelined(&self, topic: &Topic, messages: u64) -> Result<Sample> {
        let publisher = self.broker.publisher(topic, PublisherOptions::new())?;
        publisher.publish(message()).await?;
        let mut window = FuturesOrdered::new();
        let watch = Stopwatch::start();
        for _ in 0..messages {
            if window.len() >= WINDOW {
                window.next().await.transpose()?;
            }
            window.push_back(publisher.publish(message()));
        }
        while let Some(result) = window.next().await {
            result?;
        }
        Ok(watch.per_message(messages))
    }

    async fn consume(&self, topic: &Topic, group: &Group, messages: u64) -> Result<Sample> {
        let publisher = self.broker.publisher(topic, PublisherOptions::new())?;
        for from in (0..messages).step_by(500) {
            let batch = (from..messages.min(from + 500)).map(|_| message()).collect();
            publisher.publish_batch(batch).await?.into_iter().try_for_each(|result| result.map(drop))?;
        }
        let mut subscription = self.broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await?;
        let (mut batch, mut received, mut watch) = (Vec::new(), 0, None);
        while received < messages {
            received += subscription.receive(&mut batch, 256).await? as u64;
            watch.get_or_insert_with(Stopwatch::start);
            let settling: Vec<_> = batch
                .drain(..)
                .map(|delivery| {
                    black_box(delivery.message().payload().len());
                    delivery.ack()
                })
                .collect();
            for ack in settling {
                ack.await?;
            }
        }
        let sample = watch.map(|watch| watch.per_message(messages)).ok_or("nothing was received")?;
        subscription.close().await?;
        Ok(sample)
    }

    async fn latency(&self, topic: &Topic, group: &Group, messages: u64) -> Result<Sample> {
        let (seen, mut arrivals) = mpsc::unbounded_channel();
        let options = Subscribe::group(group.name.clone());
        let handler = self
            .broker
            .handle(&group.filter, options, move |_| {
                let sent = seen.send(Instant::now());
                async move { sent.map_err(|_| broker_core::Error::closed("the round is over")) }
            })
            .await?;
        let publisher = self.broker.publisher(topic, PublisherOptions::new())?;
        let mut micros = Vec::new();
        for number in 0..messages + 20 {
            let published = Instant::now();
            publisher.publish(message()).await?;
            let arrived = arrivals.recv().await.ok_or("the handler is gone")?;
            // The first few make connections.
            if number >= 20 {
                micros.push(arrived.saturating_duration_since(published).as_secs_f64() * 1e6);
            }
        }
        drop(handler);
        micros.sort_by(f64::total_cmp);
        let rank = (micros.len() * 99).div_ceil(100).saturating_sub(1);
        Ok(micros.get(rank).copied().unwrap_or(f64::NAN).into())
    }
}

fn message() -> Message {
    static PAYLOAD_BYTES: [u8; PAYLOAD] = [b'x'; PAYLOAD];
    Message::new(Bytes::from_static(&PAYLOAD_BYTES))
}
