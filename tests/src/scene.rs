//! What every check works with: names of its own, waiting that cannot hang, short forms for
//! publishing and subscribing.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_core::{
    Broker, Group, GroupName, GroupOptions, Message, Publisher, PublisherOptions, Receipt, Result, RetryPolicy,
    Subscribe, Topic, TopicFilter,
};
use parking_lot::Mutex;

use crate::patience::within;
use crate::{Attempt, Failed, Harness, Inbox, Link, Place, Shown, Timing, Verdict};

/// Text that no other check, run or process uses: letters and digits.
pub(crate) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{:08x}{:x}", fastrand::u32(..), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The surroundings of one run of one check. Its topics and groups are nobody else's, so that checks
/// run side by side against a shared server; its groups are deleted after it.
#[derive(Debug)]
pub struct Scene {
    harness: Arc<dyn Harness>,
    timing: Timing,
    unique: String,
    groups: Mutex<Vec<Group>>,
}

impl Scene {
    /// For one run of one check.
    pub fn new(harness: Arc<dyn Harness>) -> Self {
        let timing = harness.timing();
        Self { harness, timing, unique: unique(), groups: Mutex::default() }
    }

    /// The harness.
    pub fn harness(&self) -> &dyn Harness {
        &*self.harness
    }

    /// How long to wait.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Whether `close` ends the broker itself.
    pub fn in_process(&self) -> bool {
        self.harness.place() == Place::InProcess
    }

    /// A topic nobody else uses, which exists.
    ///
    /// # Errors
    ///
    /// What making it says.
    pub async fn topic(&self, name: &str) -> Attempt<Topic> {
        let topic = Topic::new(format!("suite.{}.{name}", self.unique))?;
        self.done("preparing a topic", self.harness.prepare(&topic)).await?;
        Ok(topic)
    }

    /// A filter over this scene's topics: `pattern` below what [`topic`](Self::topic) puts before
    /// its names.
    ///
    /// # Errors
    ///
    /// If it does not parse.
    pub fn filter(&self, pattern: &str) -> Attempt<TopicFilter> {
        Ok(TopicFilter::new(format!("suite.{}.{pattern}", self.unique))?)
    }

    /// A group nobody else uses; deleted when the check is over.
    ///
    /// # Errors
    ///
    /// If the name does not parse.
    pub fn group(&self, name: &str, filter: impl Into<TopicFilter>) -> Attempt<Group> {
        let group = Group::new(GroupName::new(format!("{name}-{}", self.unique))?, filter.into());
        self.groups.lock().push(group.clone());
        Ok(group)
    }

    /// Has a group deleted when the check is over.
    pub fn adopt(&self, group: &Group) {
        self.groups.lock().push(group.clone());
    }

    /// Options with which a retry takes a moment.
    ///
    /// # Errors
    ///
    /// None; the numbers are right.
    pub fn quick(&self) -> Attempt<GroupOptions> {
        Ok(GroupOptions::new().with_retry(quick_retry(10)?))
    }

    /// Joins `group` with quick retries.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn join(&self, broker: &dyn Broker, group: &Group) -> Attempt<Inbox> {
        self.join_with(broker, group, self.quick()?, 256).await
    }

    /// Joins `group` with these options.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn join_with(
        &self,
        broker: &dyn Broker,
        group: &Group,
        options: GroupOptions,
        max_in_flight: usize,
    ) -> Attempt<Inbox> {
        let options = Subscribe::group(group.name.clone()).with_options(options).with_max_in_flight(max_in_flight)?;
        self.subscribe(broker, &group.filter, options).await
    }

    /// Subscribes without a group, with quick retries.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn listen(&self, broker: &dyn Broker, filter: impl Into<TopicFilter>) -> Attempt<Inbox> {
        self.subscribe(broker, &filter.into(), Subscribe::new().with_options(self.quick()?)).await
    }

    /// Subscribes.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn subscribe(&self, broker: &dyn Broker, filter: &TopicFilter, options: Subscribe) -> Attempt<Inbox> {
        let subscription = self.done("subscribing", broker.subscribe(filter, options)).await?;
        Ok(Inbox::new(subscription, self.timing))
    }

    /// Makes sure that `group` is there, with these options.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn create(&self, broker: &dyn Broker, group: &Group, options: GroupOptions) -> Attempt<bool> {
        self.done("creating a group", broker.create_group(group, options)).await
    }

    /// Publishes each after the one before was taken.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn publish(&self, broker: &dyn Broker, topic: &Topic, messages: &[Message]) -> Attempt<Vec<Receipt>> {
        let publisher = broker.publisher(topic, PublisherOptions::new())?;
        let mut receipts = Vec::with_capacity(messages.len());
        for message in messages {
            receipts.push(self.publish_one(&publisher, message.clone()).await?);
        }
        Ok(receipts)
    }

    /// Publishes one message.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub async fn publish_one(&self, publisher: &Publisher, message: Message) -> Attempt<Receipt> {
        self.done("publishing", publisher.publish(message)).await
    }

    /// A new handle onto the server, connected.
    ///
    /// # Errors
    ///
    /// What connecting says.
    pub async fn open(&self) -> Attempt<Arc<dyn Broker>> {
        let broker = self.harness.open()?;
        self.done("connecting", broker.connect()).await?;
        Ok(broker)
    }

    /// Closes a handle; the deadline is the patience.
    ///
    /// # Errors
    ///
    /// If it did not end.
    pub async fn close(&self, broker: &dyn Broker) -> Attempt<broker_core::DrainReport> {
        // The guard is beyond the deadline: ending late by a little is no fault.
        let guard = self.timing.patience * 2;
        let closing = within(guard, broker.close(self.timing.patience)).await;
        closing.ok_or_else(|| Failed(format!("close did not end within {guard:?}")))
    }

    /// A way to the server that can be cut; `Err` is the verdict where there is none.
    ///
    /// # Errors
    ///
    /// What the check should return.
    pub async fn link(&self, broker: &dyn Broker) -> Result<Arc<dyn Link>, Verdict> {
        match self.harness.link().await {
            Ok(Some(link)) => Ok(link),
            Ok(None) => Err(self.no_connection(broker)),
            Err(error) => Err(Err(error.into())),
        }
    }

    /// The verdict where no connection can be cut: declared, if the broker runs in this process and
    /// connects without waiting for anything.
    ///
    /// # Errors
    ///
    /// If it does wait.
    pub fn no_connection(&self, broker: &dyn Broker) -> Verdict {
        if !self.in_process() {
            return Ok(Shown::NoControl("nothing here can cut the connection".to_owned()));
        }
        match futures_util::FutureExt::now_or_never(broker.connect()) {
            Some(connected) => {
                connected?;
                Ok(Shown::Declared("in-process: there is no connection".to_owned()))
            }
            None => Err(Failed("an in-process broker has nothing to connect to, and waited for it".to_owned())),
        }
    }

    /// `future`, unless it takes longer than the patience.
    ///
    /// # Errors
    ///
    /// If it does.
    pub async fn within<T>(&self, what: &str, future: impl Future<Output = T>) -> Attempt<T> {
        let patience = self.timing.patience;
        within(patience, future).await.ok_or_else(|| Failed(format!("{what} did not end within {patience:?}")))
    }

    /// `future`, which waits for deliveries that a lost connection may have held.
    ///
    /// # Errors
    ///
    /// If it takes longer than those may.
    pub async fn arriving<T>(&self, what: &str, future: impl Future<Output = T>) -> Attempt<T> {
        let patience = self.timing.arrival();
        within(patience, future).await.ok_or_else(|| Failed(format!("{what} did not end within {patience:?}")))
    }

    /// `future`, which must succeed within the patience.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub async fn done<T>(&self, what: &str, future: impl Future<Output = Result<T>>) -> Attempt<T> {
        self.within(what, future).await?.map_err(|error| Failed(format!("{what} failed: {error}")))
    }

    /// `future`, which must not be ready within the quiet time.
    ///
    /// # Errors
    ///
    /// If it is.
    pub async fn pending<T>(&self, what: &str, future: impl Future<Output = T>) -> Attempt {
        match tokio::time::timeout(self.timing.quiet, future).await {
            Ok(_) => Err(Failed(format!("{what} ended, and should have waited"))),
            Err(_) => Ok(()),
        }
    }

    /// Asks until the answer is `Some`.
    ///
    /// # Errors
    ///
    /// If it never is, within the patience; or the first error.
    pub async fn eventually<T, F: Future<Output = Attempt<Option<T>>>>(
        &self,
        what: &str,
        mut ask: impl FnMut() -> F,
    ) -> Attempt<T> {
        let asking = async {
            loop {
                if let Some(answer) = ask().await? {
                    return Ok(answer);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        self.within(what, asking).await?
    }

    /// Waits the quiet time.
    pub async fn pause(&self) {
        tokio::time::sleep(self.timing.quiet).await;
    }

    /// Deletes the groups of the check, and says what could not be.
    ///
    /// # Errors
    ///
    /// The first error. A broker that is closed has no groups any more.
    pub async fn clean(&self) -> Attempt {
        let groups = std::mem::take(&mut *self.groups.lock());
        if groups.is_empty() || self.in_process() {
            return Ok(());
        }
        let broker = self.open().await?;
        for group in &groups {
            self.done("deleting a group", broker.delete_group(group)).await?;
            // The dead letters stay when a group goes; they would be litter on a shared server.
            let _ = self.within("purging dead letters", broker.purge_dead_letters(group)).await?;
        }
        self.close(&broker).await.map(drop)
    }
}

/// Retries that take a moment, `max_attempts` deliveries.
///
/// # Errors
///
/// If `max_attempts` is 0.
pub fn quick_retry(max_attempts: u32) -> Attempt<RetryPolicy> {
    let policy = RetryPolicy::default().with_max_attempts(max_attempts)?;
    Ok(policy.with_backoff(Duration::from_millis(1), Duration::from_millis(20), 2.0)?)
}
