//! `MemoryBroker`: the contract over the parts.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use super::member::Member;
use super::topics::{TopicProducer, closed};
use super::{CLOSED, CLOSING, OPEN, Shared};
use crate::topic::check_segments;
use crate::{
    BoxFuture, Broker, BrokerUrl, Capabilities, DeadLetter, DrainReport, Error, Group, GroupOptions, GroupSettings,
    GroupStatus, MemoryOptions, Publisher, PublisherOptions, Result, State, Status, Subscribe, Subscription,
    SubscriptionStatus, Support, Topic, TopicFilter,
};

/// The broker in this process (`memory:`): fan-out, groups, patterns, retries, dead letters, bounded
/// backlogs, delays, expiry, deduplication. It keeps nothing over the end of the process.
///
/// What waits for a time (a publish at a full group, a receive beside a pending delay or retry, a close) needs
/// a tokio runtime with its timer enabled, and panics without one.
///
/// Clones are handles on the same broker; dropping the last one ends it, and with it what it holds.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Subscribe, Topic, TopicFilter};
///
/// let broker = MemoryBroker::new();
/// let mut all = broker.subscribe(&TopicFilter::new(">")?, Subscribe::new()).await?;
/// let receipt = broker.publish(&Topic::new("orders.created")?, Message::new("42")).await?;
/// assert_eq!(receipt.matched, Some(1));
/// all.next().await?.expect("open").ack().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemoryBroker(Arc<Handle>);

/// The handles of one broker; the last one ends it.
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.end(false);
        self.shared.clear();
    }
}

/// `memory:NAME`: one a process.
static NAMED: Mutex<Option<HashMap<String, Weak<Handle>>>> = Mutex::new(None);

impl MemoryBroker {
    /// A new broker with the default options.
    pub fn new() -> Self {
        Self::with_options(MemoryOptions::new())
    }

    /// A new broker.
    pub fn with_options(options: MemoryOptions) -> Self {
        Self::make("memory:".to_owned(), options)
    }

    fn make(name: String, options: MemoryOptions) -> Self {
        Self(Arc::new(Handle { shared: Shared::new(name, options) }))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryBroker").field(&self.shared().name).finish()
    }
}

/// Opens `memory:` or `memory:NAME`.
pub(crate) fn open(mut url: BrokerUrl) -> Result<Arc<dyn Broker>> {
    let options = MemoryOptions::from_url(&mut url)?;
    let name = url.path().to_owned();
    if !url.authority().is_empty() || url.username().is_some() {
        return Err(Error::invalid("broker URL: memory: has no host; write memory: or memory:NAME"));
    }
    url.finish()?;
    if name.is_empty() {
        return Ok(Arc::new(MemoryBroker::with_options(options)));
    }
    check_segments("broker URL memory:NAME: name", &name, 128)?;
    let mut named = NAMED.lock();
    let named = named.get_or_insert_default();
    named.retain(|_, handle| handle.strong_count() > 0);
    if let Some(handle) = named.get(&name).and_then(Weak::upgrade).filter(|handle| !handle.shared.is_closed()) {
        if handle.shared.options != options {
            return Err(Error::conflict(format!("memory:{name} is open in this process with other parameters")));
        }
        return Ok(Arc::new(MemoryBroker(handle)));
    }
    let broker = MemoryBroker::make(format!("memory:{name}"), options);
    named.insert(name, Arc::downgrade(&broker.0));
    Ok(Arc::new(broker))
}

fn done<'a, T: Send + 'a>(result: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(result))
}

impl Broker for MemoryBroker {
    fn name(&self) -> &str {
        &self.shared().name
    }

    fn capabilities(&self) -> Capabilities {
        let options = &self.shared().options;
        let history = if options.retention.is_some() { Support::Limited } else { Support::None };
        Capabilities {
            max_message_bytes: options.max_message_bytes,
            start_earliest: history,
            start_time: history,
            start_position: Support::None,
            ..Capabilities::all()
        }
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        done(if self.shared().is_open() { Ok(()) } else { Err(closed()) })
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        let shared = self.shared();
        if !shared.is_open() {
            return Err(closed());
        }
        let producer = TopicProducer { topic: shared.topic(topic), shared: Arc::clone(shared), options };
        Publisher::new(topic.clone(), shared.options.max_message_bytes, Arc::new(producer))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let shared = self.shared();
        done(
            shared
                .group(options.group_name(), filter, options.options())
                .map(|(group, _)| Subscription::new(Member::new(Arc::clone(shared), group, options.max_in_flight()))),
        )
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        done(self.shared().group(Some(&group.name), &group.filter, &options).map(|(_, created)| created))
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        done(self.shared().open_group(group).and_then(|found| {
            let now = found.settings();
            if options.start.as_ref().is_some_and(|start| *start != now.start) {
                return Err(Error::conflict(format!(
                    "group {group}: start counted when it was created; delete it first"
                )));
            }
            if options.ordered.is_some_and(|ordered| ordered != now.ordered) {
                return Err(Error::unsupported(format!(
                    "group {group}: ordered is fixed when it is created; delete it first"
                )));
            }
            let asked = GroupOptions { start: None, ..options };
            let resolved = asked.resolve(Some(&group.name))?;
            found.alter(GroupSettings {
                backlog: asked.backlog.unwrap_or(now.backlog),
                retry: asked.retry.unwrap_or(now.retry),
                dead_letter: if asked.dead_letter.is_some() { resolved.dead_letter } else { now.dead_letter.clone() },
                ..now
            });
            Ok(())
        }))
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        done(if self.shared().is_open() { Ok(self.shared().remove_group(group)) } else { Err(closed()) })
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        done(self.shared().open_group(group).map(|group| group.purge()))
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        done(self.shared().check_keep(group).map(|()| self.shared().keeps.list(group, max)))
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        done(self.shared().check_keep(group).map(|()| self.shared().keeps.take(group, u64::MAX).len() as u64))
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        let shared = self.shared();
        done(shared.open_group(group).map(|found| {
            let letters = shared.keeps.take(group, max);
            let count = letters.len() as u64;
            found.redrive(letters.into_iter());
            count
        }))
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        done(Ok(self.shared().status()))
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        Box::pin(self.shared().drain(deadline))
    }
}

impl Shared {
    /// Dead letters outlive their group.
    fn check_keep(&self, group: &Group) -> Result<()> {
        if self.keeps.count(group) > 0 { Ok(()) } else { self.find_group(group).map(drop) }
    }

    fn state(&self) -> State {
        match self.life() {
            OPEN => State::Active,
            CLOSING => State::Closing,
            _ => State::Closed,
        }
    }

    fn status(&self) -> Status {
        let mut status = Status::new(self.name.clone(), self.state());
        for group in self.all_groups() {
            let seen = group.snapshot();
            let last_error = seen.last_error.map(|error| error.to_string());
            match &group.id {
                Some(id) => status.groups.push(GroupStatus {
                    lag: Some(seen.lag.messages),
                    lag_bytes: Some(seen.lag.bytes),
                    in_flight: Some(seen.in_flight),
                    members: Some(seen.members),
                    dead_letters: Some(self.keeps.count(id)),
                    counts: seen.counts,
                    last_error,
                    ..GroupStatus::new(id.clone(), status.state)
                }),
                None => status.subscriptions.push(SubscriptionStatus {
                    lag: Some(seen.lag.messages),
                    in_flight: Some(seen.in_flight),
                    counts: seen.counts,
                    last_error,
                    ..SubscriptionStatus::new(group.filter().clone(), status.state)
                }),
            }
        }
        status.groups.sort_by(|one, two| one.group.cmp(&two.group));
        status
    }

    async fn drain(&self, deadline: Duration) -> DrainReport {
        // Under the registry's lock: whoever makes a group sees it before or after.
        let groups = {
            let registry = self.registry.lock();
            let _ = self.life.compare_exchange(OPEN, CLOSING, Ordering::AcqRel, Ordering::Acquire);
            drop(registry);
            self.all_groups()
        };
        groups.iter().for_each(|group| group.tell_settlements());
        let deadline = Instant::now() + deadline.min(Duration::from_secs(365 * 24 * 3600));
        let complete = loop {
            let progress = self.progress.notified();
            if self.is_closed() || self.is_drained() {
                break true;
            }
            if Instant::now() >= deadline {
                break false;
            }
            // What expires meanwhile is told by nobody, so that it is looked for now and then.
            let look = Instant::now() + Duration::from_millis(50);
            if timeout_at(deadline.min(look), progress).await.is_ok() {
                // One look for many settlements.
                sleep(Duration::from_millis(1)).await;
            }
        };
        self.end(complete)
    }

    fn is_drained(&self) -> bool {
        self.all_topics().iter().all(|topic| !topic.has_waiting())
            && self.all_groups().iter().all(|group| group.is_drained())
    }

    /// Ends the broker now, and reports what stays; the first report is the one that counts.
    fn end(&self, complete: bool) -> DrainReport {
        let report = self.report.get_or_init(|| {
            self.life.store(CLOSED, Ordering::Release);
            let mut report = DrainReport::new(false);
            report.complete = complete;
            report.unconfirmed = self.all_topics().iter().map(|topic| topic.fail_waiting()).sum();
            for group in self.all_groups() {
                let seen = group.snapshot();
                report.in_flight += seen.in_flight;
                report.undelivered += seen.lag.messages - seen.in_flight;
                group.end();
            }
            report.dead_letters = self.keeps.total();
            report
        });
        report.clone()
    }
}
