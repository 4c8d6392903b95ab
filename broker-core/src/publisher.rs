//! A handle that has resolved its topic.

use std::fmt;
use std::sync::Arc;

use crate::{Error, Message, Operation, Publish, PublishBatch, Result, Topic};

/// How a [`Publisher`] publishes.
///
/// ```
/// use broker_core::PublisherOptions;
/// assert!(PublisherOptions::new().with_require_route(true).require_route);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherOptions {
    /// Whether a message that no group and no subscription matches is an
    /// [`Unroutable`](crate::ErrorKind::Unroutable) error (default: it is fine).
    pub require_route: bool,
}

impl PublisherOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`require_route`](Self::require_route).
    #[must_use]
    pub fn with_require_route(mut self, require_route: bool) -> Self {
        self.require_route = require_route;
        self
    }
}

/// Publishes to one topic, which it has looked up once; made by
/// [`Broker::publisher`](crate::Broker::publisher).
///
/// The order of calls on one `Publisher` is the order of its messages per key. Clones share that
/// order only as far as their calls are ordered. Dropping it loses nothing: what was published
/// goes on. After [`close`](crate::Broker::close) every call is
/// [`Closed`](crate::ErrorKind::Closed).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, MemoryBroker, Message, PublisherOptions, Topic};
///
/// let broker = MemoryBroker::new();
/// let orders = broker.publisher(&Topic::new("orders")?, PublisherOptions::new())?;
/// orders.publish(Message::new("1")).await?;
/// for result in orders.publish_batch(vec![Message::new("2"), Message::new("3")]).await? {
///     result?;
/// }
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Publisher {
    topic: Topic,
    max_message_bytes: usize,
    producer: Arc<dyn Producer>,
}

/// What an adapter puts behind a [`Publisher`]: the topic is resolved, the size is checked.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use std::sync::Arc;
/// use broker_core::{Message, Operation, Producer, Publish, PublishBatch, Publisher, Receipt, Topic};
///
/// /// Takes everything and keeps nothing.
/// struct Discard;
///
/// impl Producer for Discard {
///     fn publish(&self, message: Message) -> Publish {
///         Operation::ready(Ok(Receipt::new(message.id().clone())))
///     }
///     fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
///         Operation::ready(Ok(messages.iter().map(|message| Ok(Receipt::new(message.id().clone()))).collect()))
///     }
/// }
///
/// let publisher = Publisher::new(Topic::new("orders")?, 1 << 20, Arc::new(Discard))?;
/// publisher.publish(Message::new("42")).await?;
/// # Ok(()) }
/// ```
pub trait Producer: Send + Sync + 'static {
    /// Publishes one message; begins at once, in the order of the calls.
    fn publish(&self, message: Message) -> Publish;

    /// Publishes several in order; one result per message.
    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch;
}

impl Publisher {
    /// For adapters: a handle on `topic` that refuses messages over `max_message_bytes`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if the topic is the broker's own.
    pub fn new(topic: Topic, max_message_bytes: usize, producer: Arc<dyn Producer>) -> Result<Self> {
        if topic.is_reserved() {
            return Err(Error::invalid(format!(
                "topic {topic}: topics whose first segment begins with 'broker-' are the broker's own; publish to another"
            )));
        }
        Ok(Self { topic, max_message_bytes, producer })
    }

    /// The topic it publishes to.
    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Publishes a message. The returned [`Operation`] is under way already; it ends when the
    /// broker has taken responsibility.
    ///
    /// # Errors
    ///
    /// [`TooLarge`](crate::ErrorKind::TooLarge), [`Unavailable`](crate::ErrorKind::Unavailable)
    /// (a full group that rejects), [`Unroutable`](crate::ErrorKind::Unroutable),
    /// [`Unsupported`](crate::ErrorKind::Unsupported) (a tombstone, a delay where there is none),
    /// [`Closed`](crate::ErrorKind::Closed), [`Timeout`](crate::ErrorKind::Timeout).
    #[inline]
    pub fn publish(&self, message: Message) -> Publish {
        match self.check(&message) {
            Ok(()) => self.producer.publish(message),
            Err(error) => Operation::ready(Err(error)),
        }
    }

    /// Publishes messages in order; the result has one entry per message, in order, so that a
    /// partial failure names its messages.
    ///
    /// # Errors
    ///
    /// An error for the whole only where no message was tried (the broker is closed).
    pub fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        if messages.iter().all(|message| self.check(message).is_ok()) {
            return self.producer.publish_batch(messages);
        }
        // Rare: the refused keep their place among the results of the others.
        let mut results = Vec::with_capacity(messages.len());
        let mut good = Vec::with_capacity(messages.len());
        for message in messages {
            match self.check(&message) {
                Ok(()) => {
                    good.push(message);
                    results.push(None);
                }
                Err(error) => results.push(Some(Err(error))),
            }
        }
        let batch = self.producer.publish_batch(good);
        Operation::boxed(async move {
            let mut done = batch.await?.into_iter();
            let missing = || Err(Error::backend("the broker answered fewer results than messages"));
            Ok(results.into_iter().map(|refused| refused.or_else(|| done.next()).unwrap_or_else(missing)).collect())
        })
    }

    #[inline]
    fn check(&self, message: &Message) -> Result<()> {
        if message.size() > self.max_message_bytes { Err(self.too_large(message)) } else { Ok(()) }
    }

    #[cold]
    fn too_large(&self, message: &Message) -> Error {
        Error::too_large(format!(
            "message {} has {} bytes of payload, key and headers; this broker takes {} at most",
            message.id(),
            message.size(),
            self.max_message_bytes
        ))
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").field("topic", &self.topic).finish_non_exhaustive()
    }
}
