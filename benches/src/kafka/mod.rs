//! The Kafka adapter beside raw rdkafka on one server: throughput, and client CPU a message.
//!
//! Both sides send and read the same records: a payload, no key, one header `broker-id` of 36 bytes, which
//! is what our messages have. Raw clients are idempotent with acks=all, as ours is; what else they set, each
//! comparison says.

use std::time::Duration;

use broker_core::{BrokerExt, BrokerUrl, Message, Topic};
use broker_kafka::rdkafka::ClientConfig;
use broker_kafka::rdkafka::message::{Header, OwnedHeaders};
use broker_kafka::{KafkaBroker, KafkaConfig};
use bytes::Bytes;

use crate::comparison::Comparison;
use crate::{Result, server};

mod consume;
mod publish;

/// Where all topics of these comparisons are.
const PREFIX: &str = "bench-kafka";

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

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
struct Scene {
    servers: String,
    broker: KafkaBroker,
    topic: Topic,
    payload: Bytes,
}

impl Scene {
    async fn open(size: usize, partitions: usize) -> Result<Self> {
        let url = server::url("kafka").await?;
        let config = KafkaConfig::from_url(BrokerUrl::parse(&format!("{url}?partitions={partitions}"))?)?;
        let servers = config.bootstrap_servers();
        forget(&servers).await?;
        let broker = KafkaBroker::new(config);
        // Names from this process's clock and id, so that no two runs share a topic.
        let unique = Message::new("").id().to_string();
        let topic = Topic::new(format!("{PREFIX}.{unique}"))?;
        let payload = Bytes::from(vec![b'x'; size]);
        // Makes the topic, and connects.
        broker.publish(&topic, Message::new(payload.clone())).await?;
        Ok(Self { servers, broker, topic, payload })
    }

    /// What raw clients have in common with ours.
    fn raw(&self) -> ClientConfig {
        let mut settings = ClientConfig::new();
        settings.set("bootstrap.servers", &self.servers).set("message.max.bytes", "2097152");
        settings
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
    use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
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
async fn bounded<T>(round: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(HANG, round).await.map_err(|_| format!("the round was not over after {HANG:?}"))?
}

/// Runs a raw client's loop where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    bounded(async { tokio::task::spawn_blocking(work).await? }).await
}
