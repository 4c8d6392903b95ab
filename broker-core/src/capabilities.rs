//! What a broker can do, said ahead.

use serde::Serialize;

/// How well something is kept.
///
/// ```
/// use broker_core::Support;
/// assert!(Support::Full.is_some() && !Support::None.is_some());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// Refused with [`Unsupported`](crate::ErrorKind::Unsupported).
    None,
    /// Done, within limits that the broker's documentation names.
    Limited,
    /// Done.
    Full,
}

impl Support {
    /// Whether it is done at all.
    pub fn is_some(self) -> bool {
        self != Self::None
    }
}

/// What a broker can do. What it cannot, it refuses with the typed error
/// [`Unsupported`](crate::ErrorKind::Unsupported); nothing is silently ignored.
///
/// ```
/// use broker_core::{Broker, MemoryBroker};
///
/// let can = MemoryBroker::new().capabilities();
/// assert!(can.delay.is_some() && !can.durable);
/// assert_eq!(can.max_message_bytes, 1 << 20);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// Bytes of payload, key and headers a message has at most.
    pub max_message_bytes: usize,
    /// [`max_in_flight`](crate::Subscribe::max_in_flight) at most.
    pub max_in_flight: usize,
    /// Whether messages outlive the broker's process.
    pub durable: bool,
    /// [`StartAt::Earliest`](crate::StartAt::Earliest).
    pub start_earliest: Support,
    /// [`StartAt::Time`](crate::StartAt::Time).
    pub start_time: Support,
    /// [`StartAt::Position`](crate::StartAt::Position).
    pub start_position: Support,
    /// Messages with a delivery time.
    pub delay: Support,
    /// Messages that expire.
    pub expiry: Support,
    /// Messages with a deduplication key.
    pub deduplication: Support,
    /// Payloads that are absent rather than empty.
    pub tombstones: Support,
    /// [`require_route`](crate::PublisherOptions::require_route).
    pub require_route: Support,
    /// Whether receipts tell how many copies were made.
    pub matched: bool,
    /// Order by key; limited where the members of an ordered group stand by for each other.
    pub ordered: Support,
    /// [`Overflow::Wait`](crate::Overflow::Wait).
    pub overflow_wait: Support,
    /// [`Overflow::Reject`](crate::Overflow::Reject).
    pub overflow_reject: Support,
    /// [`Overflow::DropOldest`](crate::Overflow::DropOldest).
    pub overflow_drop_oldest: Support,
    /// Listing, purging and redriving dead letters.
    pub dead_letters: Support,
    /// Whether a topic must exist before it is published to.
    pub topics_must_exist: bool,
    /// Members of a group that can receive at once; `None` if that has no limit of the broker's
    /// (Kafka: the partitions).
    pub max_active_members: Option<usize>,
}

impl Capabilities {
    /// A broker that can do everything, to take from: the in-process one.
    pub fn all() -> Self {
        Self {
            max_message_bytes: 1 << 20,
            max_in_flight: usize::MAX,
            durable: false,
            start_earliest: Support::Full,
            start_time: Support::Full,
            start_position: Support::Full,
            delay: Support::Full,
            expiry: Support::Full,
            deduplication: Support::Full,
            tombstones: Support::Full,
            require_route: Support::Full,
            matched: true,
            ordered: Support::Full,
            overflow_wait: Support::Full,
            overflow_reject: Support::Full,
            overflow_drop_oldest: Support::Full,
            dead_letters: Support::Full,
            topics_must_exist: false,
            max_active_members: None,
        }
    }
}
