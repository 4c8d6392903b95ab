//! Where deliveries come out.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use crate::{Delivery, Result};

/// Messages this subscription will not see, between what it received before and what comes next.
///
/// ```
/// assert_eq!(broker_core::Gap::Lost(3).lost(), Some(3));
/// assert_eq!(broker_core::Gap::Unknown.lost(), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// So many were dropped because the backlog was full.
    Lost(u64),
    /// An unknown number: the connection was lost and with it a queue that only this subscription
    /// had (RabbitMQ, without group), or the past that a subscription to a pattern reads is retained from
    /// an earlier time on in one topic than in another (`memory:`; told with the last message before it is whole).
    Unknown,
}

impl Gap {
    /// How many, if it is known.
    pub fn lost(self) -> Option<u64> {
        match self {
            Self::Lost(count) => Some(count),
            Self::Unknown => None,
        }
    }

    /// This gap and another one seen as one.
    ///
    /// ```
    /// use broker_core::Gap;
    /// assert_eq!(Gap::Lost(1).and(Gap::Lost(2)), Gap::Lost(3));
    /// assert_eq!(Gap::Lost(1).and(Gap::Unknown), Gap::Unknown);
    /// ```
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Lost(one), Self::Lost(two)) => Self::Lost(one.saturating_add(two)),
            _ => Self::Unknown,
        }
    }
}

/// A member of a group, or a subscriber with a copy of its own; made by
/// [`Broker::subscribe`](crate::Broker::subscribe).
///
/// Receive in batches with [`receive`](Self::receive), one by one with [`next`](Self::next), or as
/// a [`Stream`]. All are cancel-safe: a future dropped before it is ready has taken nothing. A stream
/// that was polled counts as waiting until it is polled again or dropped.
///
/// *Dropping* a subscription ends it: a group goes on without this member, a copy of one's own is
/// gone. Deliveries already handed out stay valid. After the broker's
/// [`close`](crate::Broker::close) it delivers what can be delivered before the deadline and then
/// ends; no error is seen.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Subscribe, Topic};
///
/// let broker = MemoryBroker::new();
/// let topic = Topic::new("orders")?;
/// let mut subscription = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
/// for number in 0..10 {
///     broker.publish(&topic, Message::new(number.to_string())).await?;
/// }
/// let mut batch = Vec::new();
/// assert_eq!(subscription.receive(&mut batch, 256).await?, 10);
/// for delivery in batch.drain(..) {
///     delivery.ack().await?;
/// }
/// # Ok(()) }
/// ```
pub struct Subscription {
    consumer: Box<dyn Consumer>,
    /// Reused by `next` and the stream.
    one: Vec<Delivery>,
}

/// What an adapter puts behind a [`Subscription`]. Dropping it ends the subscription.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use std::task::{Context, Poll};
/// use broker_core::{Consumer, Delivery, Gap, Result, Subscription};
///
/// /// Has ended before it began.
/// struct Ended;
///
/// impl Consumer for Ended {
///     fn poll_receive(&mut self, _: &mut Context<'_>, _: &mut Vec<Delivery>, _: usize) -> Poll<Result<usize>> {
///         Poll::Ready(Ok(0))
///     }
///     fn gap(&mut self) -> Option<Gap> {
///         None
///     }
///     fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
///         Poll::Ready(Ok(()))
///     }
/// }
///
/// assert!(Subscription::new(Ended).next().await?.is_none());
/// # Ok(()) }
/// ```
pub trait Consumer: Send + 'static {
    /// Appends up to `limit` deliveries to `batch` and tells how many, at least one; zero says that
    /// the subscription has ended. Must not append and then return `Pending`.
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>>;

    /// What was lost since this was last asked.
    fn gap(&mut self) -> Option<Gap>;

    /// The future that polled was dropped before it was ready: a wake-up meant for it must go to
    /// another member of the group. Nothing to do where a member's messages are its own.
    fn stop_waiting(&mut self) {}

    /// Ends the subscription; ready when the broker knows.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;
}

impl Subscription {
    /// For adapters.
    pub fn new(consumer: impl Consumer) -> Self {
        Self { consumer: Box::new(consumer), one: Vec::new() }
    }

    /// Waits for deliveries and appends up to `limit` of them to `batch`; tells how many. Zero says
    /// that the subscription has ended: the broker closed.
    ///
    /// # Errors
    ///
    /// What went wrong for good, such as [`Unauthorized`](crate::ErrorKind::Unauthorized) or a group
    /// that was deleted ([`NotFound`](crate::ErrorKind::NotFound)). A lost connection is none: it is
    /// made again.
    pub async fn receive(&mut self, batch: &mut Vec<Delivery>, limit: usize) -> Result<usize> {
        let mut waiting = Waiting { consumer: &mut *self.consumer, ready: false };
        poll_fn(|cx| waiting.poll(|consumer| consumer.poll_receive(cx, batch, limit.max(1)))).await
    }

    /// [`receive`](Self::receive) for code that polls.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive).
    pub fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        batch: &mut Vec<Delivery>,
        limit: usize,
    ) -> Poll<Result<usize>> {
        self.consumer.poll_receive(cx, batch, limit.max(1))
    }

    /// For code that polls: says that it no longer waits, though its last
    /// [`poll_receive`](Self::poll_receive) was `Pending`; a message it would have been woken for
    /// goes to another member of the group. Polling again is waiting again. A
    /// [`receive`](Self::receive) that is dropped says so by itself.
    pub fn stop_waiting(&mut self) {
        self.consumer.stop_waiting();
    }

    /// The next delivery, or `None` when the subscription has ended.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive).
    pub async fn next(&mut self) -> Result<Option<Delivery>> {
        let Self { consumer, one } = self;
        let mut waiting = Waiting { consumer: &mut **consumer, ready: false };
        poll_fn(|cx| waiting.poll(|consumer| consumer.poll_receive(cx, one, 1))).await?;
        Ok(one.pop())
    }

    /// What was lost since this was last asked: ask after each batch where losing matters.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use broker_core::{Backlog, Broker, BrokerExt, Gap, GroupOptions, MemoryBroker, Message, Overflow, Subscribe, Topic};
    ///
    /// let broker = MemoryBroker::new();
    /// let topic = Topic::new("ticks")?;
    /// let backlog = Backlog::default().with_max_messages(2)?.with_overflow(Overflow::DropOldest);
    /// let options = Subscribe::new().with_options(GroupOptions::new().with_backlog(backlog));
    /// let mut ticks = broker.subscribe(&(&topic).into(), options).await?;
    /// for tick in 0..5 {
    ///     broker.publish(&topic, Message::new(tick.to_string())).await?;
    /// }
    /// let oldest = ticks.next().await?.expect("the subscription is open");
    /// assert_eq!(oldest.message().payload().as_ref(), b"3");
    /// assert_eq!(ticks.gap(), Some(Gap::Lost(3)));
    /// # Ok(()) }
    /// ```
    pub fn gap(&mut self) -> Option<Gap> {
        self.consumer.gap()
    }

    /// Ends the subscription as dropping it does, and waits until the broker knows.
    ///
    /// # Errors
    ///
    /// What the connection to the broker says; the subscription has ended all the same.
    pub async fn close(mut self) -> Result<()> {
        poll_fn(|cx| self.poll_close(cx)).await
    }

    /// [`close`](Self::close) for code that polls.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use broker_core::{Broker, MemoryBroker, Subscribe, TopicFilter};
    ///
    /// let broker = MemoryBroker::new();
    /// let mut subscription = broker.subscribe(&TopicFilter::new("orders.>")?, Subscribe::new()).await?;
    /// std::future::poll_fn(|cx| subscription.poll_close(cx)).await?;
    /// # Ok(()) }
    /// ```
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.consumer.poll_close(cx)
    }
}

impl Stream for Subscription {
    type Item = Result<Delivery>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { consumer, one } = &mut *self;
        consumer.poll_receive(cx, one, 1).map(|received| received.map(|_| one.pop()).transpose())
    }
}

/// A receive that is awaited: tells the consumer when it is not awaited any more.
struct Waiting<'a> {
    consumer: &'a mut dyn Consumer,
    ready: bool,
}

impl Waiting<'_> {
    fn poll<T>(&mut self, poll: impl FnOnce(&mut dyn Consumer) -> Poll<T>) -> Poll<T> {
        let polled = poll(self.consumer);
        self.ready = polled.is_ready();
        polled
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.ready {
            self.consumer.stop_waiting();
        }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Subscription")
    }
}
