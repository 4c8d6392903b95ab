//! A message on its way to a subscriber, to be settled once.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::one_line;
use crate::{Message, Operation, Settle, Topic};

/// Why a delivery failed: kept with the message, and written to its dead letter.
///
/// ```
/// use broker_core::Failure;
///
/// let failure = Failure::new("the endpoint answered 500").with_status("500");
/// assert_eq!(failure.status(), Some("500"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    reason: Arc<str>,
    status: Option<Arc<str>>,
}

impl Failure {
    /// A failure for this reason; cut at 1 KiB, control characters become spaces.
    pub fn new(reason: impl AsRef<str>) -> Self {
        Self { reason: one_line(reason.as_ref().into()).into(), status: None }
    }

    /// Adds a status: what an endpoint answered, or a code of the application's.
    #[must_use]
    pub fn with_status(mut self, status: impl AsRef<str>) -> Self {
        self.status = Some(one_line(status.as_ref().into()).into());
        self
    }

    /// Why.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The status, if there was one.
    pub fn status(&self) -> Option<&str> {
        self.status.as_deref()
    }
}

/// What becomes of a delivery.
///
/// ```
/// use broker_core::{Failure, Settlement};
///
/// let settlement = Settlement::Retry { after: None, failure: Some(Failure::new("the database is down")) };
/// assert_ne!(settlement, Settlement::Ack);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done: it never comes back.
    Ack,
    /// Deliver it again: after a wait drawn from the group's [`RetryPolicy`](crate::RetryPolicy),
    /// or no sooner than `after`. Past the policy's last attempt it is dead-lettered.
    Retry {
        /// The least wait; `None` leaves it to the policy.
        after: Option<Duration>,
        /// What went wrong, for the dead letter it may become.
        failure: Option<Failure>,
    },
    /// Dead-letter it at once.
    Reject(Failure),
    /// Give it back untried: it is delivered again, to any member, and this delivery was no
    /// attempt. For a pause, an open breaker, a caller who went away; never for a failure.
    Release,
}

/// A message delivered to one subscriber: the message, its topic, its attempt, and one settlement.
///
/// Settling takes the delivery by value, so that it cannot be settled twice. A delivery *dropped*
/// unsettled is retried, as if by [`retry`](Self::retry). It may outlive its subscription and
/// still be settled. After [`close`](crate::Broker::close) has ended, dropping it does nothing (the
/// shutdown is no failure of the message) and settling it is [`Closed`](crate::ErrorKind::Closed).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, GroupName, MemoryBroker, Message, Subscribe, Topic, TopicFilter};
///
/// let broker = MemoryBroker::new();
/// let billing = Subscribe::group(GroupName::new("billing")?);
/// let mut subscription = broker.subscribe(&TopicFilter::new("orders.>")?, billing).await?;
/// broker.publish(&Topic::new("orders.created")?, Message::new("42")).await?;
///
/// let delivery = subscription.next().await?.expect("the subscription is open");
/// assert_eq!((delivery.topic().as_str(), delivery.attempt()), ("orders.created", 1));
/// assert_eq!(delivery.message().payload().as_ref(), b"42");
/// delivery.ack().await?;
/// # Ok(()) }
/// ```
#[must_use = "a delivery dropped unsettled is retried"]
pub struct Delivery {
    received: Received,
    settled: bool,
}

impl Delivery {
    /// For adapters: delivery `index` of `batch`.
    #[inline]
    pub fn new(batch: Arc<dyn Deliveries>, index: u32) -> Self {
        Self { received: Received { batch, index }, settled: false }
    }

    /// The message.
    #[inline]
    pub fn message(&self) -> &Message {
        self.received.message()
    }

    /// The topic it was published to.
    #[inline]
    pub fn topic(&self) -> &Topic {
        self.received.topic()
    }

    /// How often it has been delivered, this time included: 1 is the first.
    #[inline]
    pub fn attempt(&self) -> u32 {
        self.received.attempt()
    }

    /// For adapters: the batch it came in, and its index there, if that batch is a `B`: for what only the
    /// adapter can do with deliveries of its own.
    pub fn batch<B: Deliveries>(&self) -> Option<(&B, u32)> {
        let batch: &dyn Any = &*self.received.batch;
        Some((batch.downcast_ref()?, self.received.index))
    }

    /// What was received, without the right to settle it; cheap to clone and to send on.
    pub fn received(&self) -> &Received {
        &self.received
    }

    /// Done: it never comes back. Exact: no other delivery is settled with it.
    ///
    /// # Errors
    ///
    /// [`Closed`](crate::ErrorKind::Closed) after the broker closed, and what the connection to
    /// the broker says; the message then comes back.
    #[inline]
    pub fn ack(self) -> Settle {
        self.settle(Settlement::Ack)
    }

    /// Deliver it again after a backoff.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    pub fn retry(self) -> Settle {
        self.settle(Settlement::Retry { after: None, failure: None })
    }

    /// Deliver it again, no sooner than `after`.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    pub fn retry_after(self, after: Duration) -> Settle {
        self.settle(Settlement::Retry { after: Some(after), failure: None })
    }

    /// Dead-letter it at once, for this reason.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    pub fn reject(self, reason: impl AsRef<str>) -> Settle {
        self.settle(Settlement::Reject(Failure::new(reason)))
    }

    /// Give it back untried: it is delivered again and this delivery was no attempt.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// # use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Subscribe, Topic};
    /// # let (broker, topic) = (MemoryBroker::new(), Topic::new("orders")?);
    /// # let mut subscription = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    /// # broker.publish(&topic, Message::new("42")).await?;
    /// subscription.next().await?.expect("open").release().await?;
    /// assert_eq!(subscription.next().await?.expect("open").attempt(), 1);
    /// # Ok(()) }
    /// ```
    pub fn release(self) -> Settle {
        self.settle(Settlement::Release)
    }

    /// Settles it; the other methods are short for this. It begins at once; awaiting it tells
    /// whether the broker took it.
    ///
    /// # Errors
    ///
    /// As [`ack`](Self::ack).
    #[inline]
    pub fn settle(mut self, settlement: Settlement) -> Settle {
        self.settled = true;
        self.received.batch.settle(self.received.index, settlement)
    }
}

impl Drop for Delivery {
    #[inline]
    fn drop(&mut self) {
        if !self.settled {
            self.received.batch.abandon(self.received.index);
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Delivery").field(&self.received).finish()
    }
}

/// What was received: the message, its topic, its attempt. A handler gets this; settling is up to
/// whoever holds the [`Delivery`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// # use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Subscribe, Topic};
/// # let (broker, topic) = (MemoryBroker::new(), Topic::new("orders")?);
/// # let mut subscription = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
/// # broker.publish(&topic, Message::new("42")).await?;
/// let delivery = subscription.next().await?.expect("the subscription is open");
/// let received = delivery.received().clone();
/// delivery.ack().await?;
/// assert_eq!(received.message().payload().as_ref(), b"42");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Received {
    batch: Arc<dyn Deliveries>,
    index: u32,
}

impl Received {
    /// The message.
    #[inline]
    pub fn message(&self) -> &Message {
        self.batch.message(self.index)
    }

    /// The topic it was published to.
    #[inline]
    pub fn topic(&self) -> &Topic {
        self.batch.topic(self.index)
    }

    /// How often it has been delivered, this time included: 1 is the first.
    #[inline]
    pub fn attempt(&self) -> u32 {
        self.batch.attempt(self.index)
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("topic", self.topic())
            .field("attempt", &self.attempt())
            .field("message", self.message())
            .finish()
    }
}

/// For adapters: deliveries handed over in one go, so that a delivery is a pointer and a number
/// and the cost of sharing is paid once a batch.
///
/// `index` is always one that was given to [`Delivery::new`]; each is settled or abandoned once.
///
/// ```
/// use std::sync::Arc;
/// use broker_core::{Deliveries, Delivery, Message, Settle, Settlement, Topic};
///
/// struct One(Topic, Message);
///
/// impl Deliveries for One {
///     fn message(&self, _: u32) -> &Message {
///         &self.1
///     }
///     fn topic(&self, _: u32) -> &Topic {
///         &self.0
///     }
///     fn attempt(&self, _: u32) -> u32 {
///         1
///     }
///     fn settle(&self, index: u32, settlement: Settlement) -> Settle {
///         println!("delivery {index}: {settlement:?}");
///         Settle::done()
///     }
///     fn abandon(&self, index: u32) {
///         println!("delivery {index} comes back");
///     }
/// }
///
/// let batch = Arc::new(One(Topic::new("orders")?, Message::new("42")));
/// let delivery = Delivery::new(batch, 0);
/// assert_eq!(delivery.message().payload().as_ref(), b"42");
/// drop(delivery); // comes back
/// # Ok::<(), broker_core::Error>(())
/// ```
pub trait Deliveries: Any + Send + Sync {
    /// The message of delivery `index`.
    fn message(&self, index: u32) -> &Message;

    /// The topic of delivery `index`.
    fn topic(&self, index: u32) -> &Topic;

    /// The attempt of delivery `index`, from 1.
    fn attempt(&self, index: u32) -> u32;

    /// Settles delivery `index`; begins at once.
    fn settle(&self, index: u32, settlement: Settlement) -> Settle;

    /// Delivery `index` was dropped unsettled: retry it, unless the broker has closed.
    fn abandon(&self, index: u32);
}

/// For adapters whose settlements cannot fail: nothing to await.
impl Settle {
    /// A settlement the broker has taken.
    ///
    /// ```
    /// assert!(broker_core::Settle::done().is_ready());
    /// ```
    #[inline]
    pub fn done() -> Self {
        Operation::ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::MAX_LINE;

    #[test]
    fn a_reason_from_outside_is_bounded_and_one_line() {
        let failure = Failure::new(format!("a\r\nb{}", "ä".repeat(2_000)));
        assert!(failure.reason().len() <= MAX_LINE);
        assert!(failure.reason().starts_with("a  b"));
    }
}
