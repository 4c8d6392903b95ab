//! The server, and what stands on it for one comparison.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_amqp::lapin::options::{BasicGetOptions, QueueDeclareOptions, QueuePurgeOptions};
use broker_amqp::lapin::types::{FieldTable, ShortString};
use broker_amqp::lapin::{Channel, Connection, ConnectionProperties};
use broker_core::{Broker, Connectors, Group, GroupOptions, Message, PublisherOptions, Subscribe, Subscription, Topic};
use bytes::Bytes;

use super::raw;
use crate::{Result, server};

/// Deliveries unacked at most, on every side.
pub const PREFETCH: usize = 256;

/// How long a consumer that has ended may still be the queue's.
const GONE: Duration = Duration::from_secs(5);

/// What the queue is, and whether messages outlive the server's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A classic queue, transient messages.
    Classic,
    /// A classic queue, persistent messages.
    Persistent,
    /// A quorum queue, which keeps every message on disk.
    Quorum,
}

/// What is sent to what.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The queue.
    pub kind: Kind,
    /// Bytes of a payload.
    pub payload: usize,
}

impl Load {
    /// The name of a comparison of this load.
    pub fn name(self, what: &str) -> String {
        let size = if self.payload == 1024 { "1KiB".to_owned() } else { format!("{}B", self.payload) };
        format!("amqp/{}/{size}/{what}", self.kind.as_str())
    }

    /// Whether messages are persistent.
    pub fn is_persistent(self) -> bool {
        self.kind != Kind::Classic
    }

    /// A payload.
    pub fn body(self) -> Bytes {
        Bytes::from(vec![b'x'; self.payload])
    }
}

impl Kind {
    /// As it stands in names.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Persistent => "persistent",
            Self::Quorum => "quorum",
        }
    }

    fn queue_type(self) -> &'static str {
        match self {
            Self::Classic | Self::Persistent => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// A group's queue behind a topic exchange, our broker on it, and a raw channel beside it.
pub struct Scene {
    /// What is sent.
    pub load: Load,
    /// The server, without a virtual host.
    pub url: String,
    pub(super) broker: Arc<dyn Broker>,
    /// What is published to, which is the routing key.
    pub topic: Topic,
    group: Group,
    _connection: Connection,
    channel: Channel,
}

impl fmt::Debug for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the URL, which has a password.
        f.debug_struct("Scene").field("load", &self.load).field("topic", &self.topic).finish_non_exhaustive()
    }
}

impl Scene {
    pub(super) async fn open(load: Load) -> Result<Self> {
        let url = server::url("amqp").await?;
        let (queue_type, persistent) = (load.kind.queue_type(), load.is_persistent());
        let mut connectors = Connectors::new();
        connectors.add(["amqp"], broker_amqp::connector());
        let broker =
            connectors.open(&format!("{url}?exchange=bench&queue_type={queue_type}&persistent={persistent}"))?;
        let topic = Topic::new(format!("bench.{queue_type}"))?;
        let group = Group::new("bench".parse()?, (&topic).into());
        broker.create_group(&group, GroupOptions::new()).await?;
        let (connection, channel) = connect(&url).await?;
        let scene = Self { load, url, broker, topic, group, _connection: connection, channel };
        scene.purge().await?;
        Ok(scene)
    }

    /// The topic exchange.
    pub fn exchange(&self) -> &'static str {
        "bench"
    }

    /// The group's queue, which the exchange routes the topic to.
    pub fn queue(&self) -> String {
        self.group.to_string()
    }

    /// Empties the queue, so that every round begins alike.
    pub(super) async fn purge(&self) -> Result<()> {
        self.broker.purge_group(&self.group).await?;
        Ok(())
    }

    /// Puts so many messages into the queue.
    pub(super) async fn fill(&self, messages: u64) -> Result<()> {
        self.purge().await?;
        super::publish::publish(self, messages, 1_000).await
    }

    /// Declares a durable queue without arguments, and puts so many messages into it, the same as into ours.
    pub(super) async fn fill_plain(&self, name: &str, messages: u64) -> Result<()> {
        let queue = ShortString::from(name);
        self.channel.queue_declare(queue.clone(), QueueDeclareOptions::durable(), FieldTable::default()).await?;
        self.channel.queue_purge(queue, QueuePurgeOptions::default()).await?;
        raw::Publisher::open_to(self, "", name).await?.publish_joined(messages, 1_000, 64).await
    }

    /// Checks that a queue holds so many messages, once nobody consumes it anymore: what was delivered and never
    /// acked is in it again by then.
    pub(super) async fn check_left(&self, queue: &str, messages: u64) -> Result<()> {
        let since = Instant::now();
        loop {
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let state = self.channel.queue_declare(queue.into(), passive, FieldTable::default()).await?;
            if state.consumer_count() > 0 && since.elapsed() < GONE {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            let (left, consumers) = (u64::from(state.message_count()), state.consumer_count());
            return match (left, consumers) == (messages, 0) {
                true => Ok(()),
                false => Err(format!("{queue} holds {left} messages ({consumers} consumers), not {messages}").into()),
            };
        }
    }

    pub(super) async fn join(&self) -> Result<Subscription> {
        let options = Subscribe::group(self.group.name.clone()).with_max_in_flight(PREFETCH)?;
        Ok(self.broker.subscribe(&self.group.filter, options).await?)
    }

    /// Checks that a message of ours and one of the raw client are the same on the wire: the same
    /// properties, of the same length, and the same body.
    pub(super) async fn check_alike(&self, raw: &raw::Publisher) -> Result<()> {
        let publisher = self.broker.publisher(&self.topic, PublisherOptions::new())?;
        publisher.publish(Message::new(self.load.body())).await?;
        raw.publish_one().await?;
        let (ours, theirs) = (self.taken().await?, self.taken().await?);
        if ours != theirs {
            return Err(format!("messages differ on the wire: ours is {ours}, theirs is {theirs}").into());
        }
        Ok(())
    }

    /// The next message of the queue, in words; of an id and a time only the length.
    async fn taken(&self) -> Result<String> {
        let queue = ShortString::from(self.queue());
        let got = self.channel.basic_get(queue, BasicGetOptions { no_ack: true }).await?.ok_or("the queue is empty")?;
        let properties = got.delivery.properties.clone();
        let id = properties.message_id().as_ref().map_or(0, |id| id.as_str().len());
        let headers = properties.headers().clone().unwrap_or_default();
        let headers: Vec<_> =
            headers.inner().iter().map(|(name, value)| format!("{name}: {:?}", value.get_type())).collect();
        Ok(format!(
            "id of {id} bytes, timestamp {}, mode {:?}, type {:?}, expiration {:?}, headers {headers:?}, body of {} bytes",
            properties.timestamp().is_some(),
            properties.delivery_mode(),
            properties.content_type(),
            properties.expiration(),
            got.delivery.data.len(),
        ))
    }
}

/// A raw connection and a channel on it.
pub(super) async fn connect(url: &str) -> Result<(Connection, Channel)> {
    let connection = Connection::connect(&format!("{url}/%2f"), ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}
