//! Publishing in transactions, where a `transactional_id` asks for it.
//!
//! One thread has the transactional producer, which can be in one transaction at a time ([`session`]). Publishes that
//! wait share the next one; a batch, and a [`Transaction`], has one of its own ([`worker`]). So the order of the calls
//! stays, and the cost of a commit is shared where nothing asks for its own.

mod outcome;
mod session;
mod worker;

use broker_core::{Delivery, Message, Topic};
use rdkafka::TopicPartitionList;
use rdkafka::consumer::ConsumerGroupMetadata;

pub(crate) use outcome::with_others;
pub(crate) use worker::{Outgoing, Transactions};

/// What is to happen wholly or not at all: messages published, deliveries acked. For
/// [`KafkaBroker::transact`](crate::KafkaBroker::transact).
///
/// ```
/// use broker_core::{Message, Topic};
/// use broker_kafka::Transaction;
///
/// let invoice = Topic::new("invoices.written")?;
/// let transaction = Transaction::new().publish(invoice, Message::new("42"));
/// assert_eq!(transaction.messages().len(), 1);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Debug, Default)]
#[must_use = "hand it to KafkaBroker::transact"]
pub struct Transaction {
    messages: Vec<(Topic, Message)>,
    deliveries: Vec<Delivery>,
}

impl Transaction {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Publishes `message` to `topic`.
    pub fn publish(mut self, topic: Topic, message: Message) -> Self {
        self.messages.push((topic, message));
        self
    }

    /// Acks `delivery`, which came to a group's member of the same broker. If the transaction fails it is
    /// given back untried, and comes again.
    pub fn ack(mut self, delivery: Delivery) -> Self {
        self.deliveries.push(delivery);
        self
    }

    /// The messages to be published.
    pub fn messages(&self) -> &[(Topic, Message)] {
        &self.messages
    }

    pub(crate) fn into_parts(self) -> (Vec<(Topic, Message)>, Vec<Delivery>) {
        (self.messages, self.deliveries)
    }
}

/// What a transaction says of a group: offsets, and who says so.
pub(crate) type Offsets = (TopicPartitionList, ConsumerGroupMetadata);
