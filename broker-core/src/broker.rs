//! The contract.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{
    BoxFuture, Capabilities, DeadLetter, DrainReport, Group, GroupOptions, Publisher, PublisherOptions, Result, Status,
    Subscribe, Subscription, Topic, TopicFilter,
};

/// A message broker, the same whether it is this process, an HTTP daemon, Kafka or RabbitMQ.
///
/// A service holds an `Arc<dyn Broker>` opened from a URL by [`Connectors`](crate::Connectors), and
/// works through this trait and [`BrokerExt`](crate::BrokerExt). What every notion means on every
/// broker is tabled in the [crate documentation](crate#the-contract-on-every-broker).
///
/// *Dropping* the last handle of a broker ends it as [`close`](Self::close) with no deadline would:
/// nothing is waited for. Futures returned here may be dropped at any time; each method says what
/// that leaves behind.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use std::{sync::Arc, time::Duration};
/// use broker_core::{Broker, BrokerExt, Connectors, Message, Subscribe, Topic, TopicFilter};
///
/// let broker: Arc<dyn Broker> = Connectors::new().open("memory:")?;
/// broker.connect().await?;
/// let mut orders = broker.subscribe(&TopicFilter::new("orders.>")?, Subscribe::new()).await?;
/// broker.publish(&Topic::new("orders.created")?, Message::new("42")).await?;
/// orders.next().await?.expect("open").ack().await?;
/// assert!(broker.close(Duration::from_secs(10)).await.complete);
/// # Ok(()) }
/// ```
pub trait Broker: Any + fmt::Debug + Send + Sync {
    /// What it is called: its URL without credentials, as in `"memory:"`.
    fn name(&self) -> &str;

    /// What it can do; what it cannot, it refuses as
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    fn capabilities(&self) -> Capabilities;

    /// Connects, within the connect timeout. Making a broker does no I/O; this does. Publishing and
    /// subscribing connect by themselves, so that calling it is a choice: to fail early and with a
    /// clear error. Connected once, a broker connects again by itself. Twice is fine. Dropping the
    /// future leaves the broker as if it had not been called.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](crate::ErrorKind::Unavailable), [`Unauthorized`](crate::ErrorKind::Unauthorized),
    /// [`Timeout`](crate::ErrorKind::Timeout), [`Closed`](crate::ErrorKind::Closed).
    fn connect(&self) -> BoxFuture<'_, Result<()>>;

    /// A handle to publish to `topic`, resolved once. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if the topic is the broker's own,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for an option it cannot keep,
    /// [`Closed`](crate::ErrorKind::Closed).
    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher>;

    /// Subscribes: the group exists, and the subscription receives what is published from the
    /// moment the future is ready. Dropping the future first leaves no subscription behind; a group
    /// it created may stay.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) if the group has other settings than the options ask
    /// for, [`Unsupported`](crate::ErrorKind::Unsupported) for an option the broker cannot keep,
    /// [`NotFound`](crate::ErrorKind::NotFound) for a topic that must exist,
    /// [`Closed`](crate::ErrorKind::Closed).
    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>>;

    /// Creates a group ahead of its first member, so that it keeps what arrives from now on. True if
    /// it was created, false if it stood already with these settings.
    ///
    /// # Errors
    ///
    /// As [`subscribe`](Self::subscribe).
    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>>;

    /// Changes a group's settings; what is `None` stays. Messages keep their place.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound); [`Conflict`](crate::ErrorKind::Conflict) for
    /// `start`, which counted when the group was created; [`Unsupported`](crate::ErrorKind::Unsupported)
    /// for what this broker fixes at creation.
    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>>;

    /// Deletes a group and its backlog; its subscriptions end with
    /// [`NotFound`](crate::ErrorKind::NotFound), and settling what they hold has no effect. Its dead
    /// letters stay. False if there was none.
    ///
    /// # Errors
    ///
    /// [`Closed`](crate::ErrorKind::Closed) and what the connection says.
    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>>;

    /// Drops a group's undelivered messages, those due later included; tells how many. What is in
    /// flight stays.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound).
    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>>;

    /// The dead letters kept for a group, the oldest first, `max` at most; fewer, but one, where they are large and
    /// come from elsewhere.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound).
    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>>;

    /// Drops the dead letters kept for a group; tells how many.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound).
    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>>;

    /// Gives a group up to `max` of its dead letters again, the oldest first, attempts from 1, to
    /// that group alone; tells how many. Their delivery times and expiries are over: however long one was kept, it is
    /// delivered.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound).
    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>>;

    /// How the broker, its groups and its subscriptions are doing.
    ///
    /// # Errors
    ///
    /// What the connection says. After `close` it still answers.
    fn status(&self) -> BoxFuture<'_, Result<Status>>;

    /// Closes: from now on publishing and subscribing are [`Closed`](crate::ErrorKind::Closed). Until
    /// `deadline` has passed, what is in flight is finished and its settlements count, publishes are
    /// flushed, and a broker that forgets (in-process) delivers what can be delivered now; then it
    /// disconnects and reports what stayed. Not waited for: groups without members, retries due
    /// later. No healthy message is nacked by it. Twice is fine: both calls end with the same report.
    /// Dropping the future does not reopen the broker; calling again goes on waiting.
    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport>;
}

macro_rules! delegate {
    ($($pointer:ident),*) => {$(
        // No method adds a box: the pointee's future is handed on as it is.
        impl<B: Broker + ?Sized> Broker for $pointer<B> {
            fn name(&self) -> &str {
                (**self).name()
            }

            fn capabilities(&self) -> Capabilities {
                (**self).capabilities()
            }

            fn connect(&self) -> BoxFuture<'_, Result<()>> {
                (**self).connect()
            }

            fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
                (**self).publisher(topic, options)
            }

            fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
                (**self).subscribe(filter, options)
            }

            fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
                (**self).create_group(group, options)
            }

            fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
                (**self).alter_group(group, options)
            }

            fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
                (**self).delete_group(group)
            }

            fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
                (**self).purge_group(group)
            }

            fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
                (**self).dead_letters(group, max)
            }

            fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
                (**self).purge_dead_letters(group)
            }

            fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
                (**self).redrive(group, max)
            }

            fn status(&self) -> BoxFuture<'_, Result<Status>> {
                (**self).status()
            }

            fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
                (**self).close(deadline)
            }
        }
    )*};
}

delegate!(Box, Arc);
