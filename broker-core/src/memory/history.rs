//! What a topic retains for who comes later.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::entry::Entry;
use crate::Timestamp;

/// How much of its past every topic retains, so that a group can start earlier than now. The first
/// bound that is reached counts. By default a broker retains nothing.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, GroupOptions, MemoryBroker, MemoryOptions, Message, Retention, StartAt, Subscribe, Topic};
///
/// let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(100)));
/// let topic = Topic::new("orders")?;
/// broker.publish(&topic, Message::new("before anybody came")).await?;
///
/// let earliest = GroupOptions::new().with_start(StartAt::Earliest);
/// let mut late = broker.subscribe(&(&topic).into(), Subscribe::new().with_options(earliest)).await?;
/// let delivery = late.next().await?.expect("open");
/// assert_eq!(delivery.message().payload().as_ref(), b"before anybody came");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retention {
    /// Messages a topic retains at most.
    pub max_messages: usize,
    /// Bytes of messages a topic retains at most.
    pub max_bytes: u64,
    /// How long a message is retained at most.
    pub max_age: Duration,
}

impl Retention {
    /// So many messages a topic, 16 MiB and any age at most.
    pub fn messages(max_messages: usize) -> Self {
        Self { max_messages, max_bytes: 16 << 20, max_age: Duration::MAX }
    }

    /// Sets how many bytes a topic retains at most.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// Sets how long a message is retained at most.
    #[must_use]
    pub fn with_max_age(mut self, max_age: Duration) -> Self {
        self.max_age = max_age;
        self
    }
}

/// One topic's past, oldest first, with the time each message was published.
#[derive(Default)]
pub(super) struct History {
    entries: VecDeque<(Timestamp, Arc<Entry>)>,
    bytes: u64,
    max_age: Duration,
}

impl History {
    pub(super) fn push(&mut self, entry: Arc<Entry>, retention: &Retention) {
        let now = Timestamp::now();
        self.bytes += entry.size;
        self.max_age = retention.max_age;
        self.entries.push_back((now, entry));
        while self.entries.len() > retention.max_messages
            || self.bytes > retention.max_bytes
            || self.entries.front().is_some_and(|(time, _)| now.since(*time) > retention.max_age)
        {
            match self.entries.pop_front() {
                Some((_, oldest)) => self.bytes -= oldest.size,
                None => return,
            }
        }
    }

    /// What was published at `time` or later and is not too old.
    pub(super) fn since(&self, time: Timestamp) -> impl Iterator<Item = &(Timestamp, Arc<Entry>)> {
        let now = Timestamp::now();
        self.entries.iter().filter(move |(published, _)| *published >= time && now.since(*published) <= self.max_age)
    }

    /// Whether everything in it is too old by now: age is looked at when a message comes.
    pub(super) fn is_past(&self) -> bool {
        let now = Timestamp::now();
        self.entries.back().is_none_or(|(newest, _)| now.since(*newest) > self.max_age)
    }
}
