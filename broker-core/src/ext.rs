//! What everybody needs and nobody implements.

use crate::handler::{Handling, IntoSettlement};
use crate::{
    BoxFuture, Broker, Message, Operation, Publish, PublishBatch, PublisherOptions, Received, Result, Subscribe, Topic,
    TopicFilter,
};

/// Short forms over [`Broker`], for every broker alike.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{BrokerExt, MemoryBroker, Message, Topic};
///
/// let broker = MemoryBroker::new();
/// broker.publish(&Topic::new("orders")?, Message::new("42")).await?;
/// # Ok(()) }
/// ```
pub trait BrokerExt: Broker {
    /// Publishes one message. Who publishes often keeps a [`Publisher`](crate::Publisher), which
    /// looks the topic up once and keeps the order of its calls; calls of this keep it only where
    /// each is awaited before the next.
    ///
    /// # Errors
    ///
    /// As [`Broker::publisher`] and [`Publisher::publish`](crate::Publisher::publish).
    fn publish(&self, topic: &Topic, message: Message) -> Publish {
        match self.publisher(topic, PublisherOptions::new()) {
            Ok(publisher) => publisher.publish(message),
            Err(error) => Operation::from(error),
        }
    }

    /// Publishes messages in order; one result per message.
    ///
    /// # Errors
    ///
    /// As [`Broker::publisher`] and [`Publisher::publish_batch`](crate::Publisher::publish_batch).
    fn publish_batch(&self, topic: &Topic, messages: Vec<Message>) -> PublishBatch {
        match self.publisher(topic, PublisherOptions::new()) {
            Ok(publisher) => publisher.publish_batch(messages),
            Err(error) => Operation::from(error),
        }
    }

    /// Subscribes, and runs `handler` for every delivery, up to
    /// [`max_in_flight`](Subscribe::max_in_flight) at a time, each in a task of its own. The
    /// handler's result settles the delivery (see [`IntoSettlement`]): `Ok` acks, an error or a
    /// panic retries, and neither ends the subscription.
    ///
    /// On [`close`](Broker::close) the handlers that run are finished and their settlements count;
    /// one cut short by the deadline settles nothing. Dropping the returned [`Handling`] lets the
    /// handler go on; [`Handling::stop`] ends it alone.
    ///
    /// # Errors
    ///
    /// As [`Broker::subscribe`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use std::time::Duration;
    /// use broker_core::{Broker, BrokerExt, GroupName, MemoryBroker, Message, Subscribe, Topic, TopicFilter};
    ///
    /// let broker = MemoryBroker::new();
    /// let billing = Subscribe::group(GroupName::new("billing")?);
    /// broker.handle(&TopicFilter::new("orders.>")?, billing, async |order| {
    ///     println!("{} on {}", order.message().payload().len(), order.topic());
    ///     Ok::<(), std::io::Error>(())
    /// }).await?;
    /// broker.publish(&Topic::new("orders.created")?, Message::new("42")).await?;
    /// assert_eq!(broker.close(Duration::from_secs(10)).await.undelivered, 0);
    /// # Ok(()) }
    /// ```
    fn handle<F, Fut>(&self, filter: &TopicFilter, options: Subscribe, handler: F) -> BoxFuture<'_, Result<Handling>>
    where
        F: Fn(Received) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: IntoSettlement> + Send + 'static,
    {
        let filter = filter.clone();
        Box::pin(async move { Ok(Handling::start(self.subscribe(&filter, options).await?, handler)) })
    }
}

impl<B: Broker + ?Sized> BrokerExt for B {}
