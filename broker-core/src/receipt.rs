//! What a broker says when it has taken a message.

use crate::MessageId;

/// The broker has taken responsibility for a message: kept for every matching group (in-process),
/// 2xx (HTTP), acks=all (Kafka), confirmed (RabbitMQ). What is not known is `None`.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Subscribe, Topic};
///
/// let broker = MemoryBroker::new();
/// let topic = Topic::new("orders")?;
/// let _subscription = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
/// let receipt = broker.publish(&topic, Message::new("1")).await?;
/// assert_eq!((receipt.matched, receipt.duplicate), (Some(1), false));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Receipt {
    /// The message's id; of a duplicate, the id of the message first published.
    pub id: MessageId,
    /// Copies made: one a matching group and one a subscription without group.
    pub matched: Option<u64>,
    /// Whether a message with this deduplication key was published before, within the window.
    pub duplicate: bool,
    /// Whether at least one group or subscription matched.
    pub routed: Option<bool>,
    /// The partition it was written to.
    pub partition: Option<i32>,
    /// Its position in that partition.
    pub offset: Option<i64>,
}

impl Receipt {
    /// A receipt that knows the id alone.
    pub fn new(id: MessageId) -> Self {
        Self { id, matched: None, duplicate: false, routed: None, partition: None, offset: None }
    }

    /// Adds how many copies were made, and with it whether any was.
    #[must_use]
    pub fn with_matched(mut self, matched: u64) -> Self {
        self.matched = Some(matched);
        self.routed = Some(matched > 0);
        self
    }
}
