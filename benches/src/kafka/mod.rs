//! The Kafka adapter beside raw rdkafka on one server: throughput, and client CPU a message.
//!
//! Both sides send and read the same records: a payload, no key, one header `broker-id` of 36 bytes, which
//! is what our messages have. Raw clients are idempotent with acks=all, as ours is; what else they set, each
//! comparison says.

use std::time::{Duration, Instant};

use broker_core::{BrokerExt, BrokerUrl, Message, Topic};
use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use broker_kafka::rdkafka::message::{Header, OwnedHeaders};
use broker_kafka::rdkafka::{ClientConfig, TopicPartitionList};
use broker_kafka::{KafkaBroker, KafkaConfig};
use bytes::Bytes;

use crate::comparison::Comparison;
use crate::{Result, server};

mod consume;
mod publish;

pub use consume::consume_versus;
pub use publish::publish_versus;

/// Where all topics of these comparisons are.
const PREFIX: &str = "bench-kafka";

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

/// How long the server may take to answer.
const ASKING: Duration = Duration::from_secs(30);

/// How long a consumer that is closing may take to its last commit.
const CLOSING: Duration = Duration::from_secs(10);

/// An id as our messages have one, for the records of raw clients.
const ID: &str = "0190a5e0-7a3b-7000-8000-000000000001";

/// The comparisons of this group.
pub fn comparisons() -> Vec<Comparison> {
    [100, 1024]
        .into_iter()
        .flat_map(|size| [publish::comparisons(size), consume::comparisons(size)])
        .flatten()
        .collect()
}

/// A server, our broker on it, and a topic of so many partitions.
#[derive(Debug)]
pub struct Scene {
    /// Addresses, as `bootstrap.servers` has them.
    pub servers: String,
    /// What is published to.
    pub topic: Topic,
    /// What is published.
    pub payload: Bytes,
    broker: KafkaBroker,
    config: KafkaConfig,
    partitions: i32,
}

impl Scene {
    async fn open(size: usize, partitions: usize) -> Result<Self> {
        let url = server::url("kafka").await?;
        let config = KafkaConfig::from_url(BrokerUrl::parse(&format!("{url}?partitions={partitions}"))?)?;
        let servers = config.bootstrap_servers();
        forget(&servers).await?;
        let broker = KafkaBroker::new(config.clone());
        // Names from this process's clock and id, so that no two runs share a topic.
        let unique = Message::new("").id().to_string();
        let topic = Topic::new(format!("{PREFIX}.{unique}"))?;
        let payload = Bytes::from(vec![b'x'; size]);
        // Makes the topic, and connects.
        broker.publish(&topic, Message::new(payload.clone())).await?;
        let partitions = i32::try_from(partitions)?;
        Ok(Self { servers, topic, payload, broker, config, partitions })
    }

    /// What raw clients have in common with ours.
    fn raw(&self) -> ClientConfig {
        let mut settings = ClientConfig::new();
        settings.set("bootstrap.servers", &self.servers).set("message.max.bytes", "2097152");
        settings
    }

    /// Records in the topic, by what its partitions tell.
    async fn records(&self) -> Result<u64> {
        let (settings, topic, partitions) = (self.raw(), self.topic.clone(), self.partitions);
        blocking(move || {
            let consumer: BaseConsumer = settings.create()?;
            let mut records = 0;
            for partition in 0..partitions {
                let (first, end) = consumer.fetch_watermarks(topic.as_str(), partition, ASKING)?;
                records += u64::try_from(end - first)?;
            }
            Ok(records)
        })
        .await
    }

    /// Checks that the commits of a group, by its id, come to so many records of the topic, also where its consumer is
    /// just closing.
    async fn check_committed(&self, group: &str, records: u64) -> Result<()> {
        let (mut settings, topic, partitions) = (self.raw(), self.topic.clone(), self.partitions);
        settings.set("group.id", group);
        let group = group.to_owned();
        blocking(move || {
            let consumer: BaseConsumer = settings.create()?;
            let mut list = TopicPartitionList::new();
            for partition in 0..partitions {
                list.add_partition(topic.as_str(), partition);
            }
            let since = Instant::now();
            loop {
                let committed = consumer.committed_offsets(list.clone(), ASKING)?;
                let offsets = committed.elements().into_iter().map(|it| it.offset().to_raw().unwrap_or(0).max(0));
                let committed = u64::try_from(offsets.sum::<i64>())?;
                if committed == records {
                    return Ok(());
                }
                if since.elapsed() > CLOSING {
                    return Err(format!("{group} has committed {committed} records, not {records}").into());
                }
                std::thread::park_timeout(Duration::from_millis(20));
            }
        })
        .await
    }

    fn raw_producer(&self) -> ClientConfig {
        let mut settings = self.raw();
        settings.set("enable.idempotence", "true").set("acks", "all");
        settings
    }
}

/// The headers of a raw client's record.
fn headers() -> OwnedHeaders {
    OwnedHeaders::new_with_capacity(1).insert(Header { key: "broker-id", value: Some(ID) })
}

/// Deletes the topics of comparisons before, so that the server's disk does not fill.
async fn forget(servers: &str) -> Result<()> {
    use broker_kafka::rdkafka::admin::{AdminClient, AdminOptions};
    use broker_kafka::rdkafka::client::DefaultClientContext;
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", servers);
    let consumer: BaseConsumer = settings.create()?;
    let asking = move || consumer.fetch_metadata(None, Duration::from_secs(30));
    let metadata = tokio::task::spawn_blocking(asking).await??;
    let names = metadata.topics().iter().map(|topic| topic.name()).filter(|name| name.starts_with(PREFIX));
    let names: Vec<&str> = names.collect();
    if !names.is_empty() {
        let admin: AdminClient<DefaultClientContext> = settings.create()?;
        admin.delete_topics(&names, &AdminOptions::new()).await?;
    }
    Ok(())
}

/// Waits for what a round waits for, and says that it hangs if it takes far too long.
///
/// # Errors
///
/// What the round says, and that it hangs.
pub async fn bounded<T>(round: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(HANG, round).await.map_err(|_| format!("the round was not over after {HANG:?}"))?
}

/// Runs a raw client's loop where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    bounded(async { tokio::task::spawn_blocking(work).await? }).await
}
