//! The contract, method by method.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{
    BoxFuture, Broker, Capabilities, DeadLetter, DrainReport, Error, Group, GroupOptions, GroupStatus, Publisher,
    PublisherOptions, Result, State, Status, Subscribe, Subscription, SubscriptionStatus, Support, Topic, TopicFilter,
};
use parking_lot::Mutex;

use super::publisher::ToyProducer;
use super::queues::{Life, Queues};
use super::subscription::ToyConsumer;

/// A handle; clones are the same broker.
#[derive(Clone)]
pub(crate) struct Toy {
    queues: Arc<Mutex<Queues>>,
    report: Arc<Mutex<Option<DrainReport>>>,
}

impl Toy {
    pub(crate) fn new() -> Self {
        Self { queues: Arc::new(Mutex::new(Queues::new())), report: Arc::default() }
    }

    fn state(life: Life) -> State {
        match life {
            Life::Open => State::Active,
            Life::Closing => State::Closing,
            Life::Closed => State::Closed,
        }
    }

    /// What was asked for is kept, or refused.
    fn check(options: &GroupOptions) -> Result<()> {
        let what = if options.start.as_ref().is_some_and(|start| *start != broker_core::StartAt::New) {
            "a start in the past"
        } else if options.ordered == Some(true) {
            "order by key"
        } else if options.backlog.is_some() {
            "a bounded backlog"
        } else {
            return Ok(());
        };
        Err(Error::unsupported(format!("this broker cannot keep {what}")))
    }

    fn no_letters<T: Send + 'static>() -> BoxFuture<'static, Result<T>> {
        now(Err(Error::unsupported("this broker lists no dead letters: subscribe to the dead-letter topic")))
    }

    /// Ends it, and tells what stayed.
    fn end(&self, complete: bool) -> DrainReport {
        let mut queues = self.queues.lock();
        let report = self
            .report
            .lock()
            .get_or_insert_with(|| {
                let mut report = DrainReport::new(false);
                report.complete = complete;
                report.in_flight = queues.queues.values().map(|queue| queue.unsettled() as u64).sum();
                report.undelivered = queues.queues.values().map(|queue| queue.waiting.len() as u64).sum();
                report
            })
            .clone();
        queues.life = Life::Closed;
        queues.wake_all();
        report
    }
}

impl fmt::Debug for Toy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Toy")
    }
}

fn now<T: Send + 'static>(result: T) -> BoxFuture<'static, T> {
    Box::pin(std::future::ready(result))
}

impl Broker for Toy {
    fn name(&self) -> &str {
        "toy:"
    }

    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::all();
        can.start_earliest = Support::None;
        can.start_time = Support::None;
        can.start_position = Support::None;
        can.delay = Support::None;
        can.expiry = Support::None;
        can.deduplication = Support::None;
        can.ordered = Support::None;
        can.overflow_wait = Support::None;
        can.overflow_reject = Support::None;
        can.overflow_drop_oldest = Support::None;
        can.dead_letters = Support::None;
        can
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        now(self.queues.lock().check_open())
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.queues.lock().check_open()?;
        let producer = ToyProducer { queues: Arc::clone(&self.queues), topic: topic.clone(), options };
        Publisher::new(topic.clone(), self.capabilities().max_message_bytes, Arc::new(producer))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let filter = filter.clone();
        // Nothing before the first poll: a future dropped unpolled has subscribed nobody.
        Box::pin(async move {
            Self::check(options.options())?;
            let group = options.group_name().map(|name| Group::new(name.clone(), filter.clone()));
            let mut queues = self.queues.lock();
            let (queue, _) = queues.join(group, &filter, options.options())?;
            let member = queues.next_id();
            if let Some(queue) = queues.queues.get_mut(&queue) {
                queue.members.push(member);
            }
            drop(queues);
            Ok(Subscription::new(ToyConsumer::new(Arc::clone(&self.queues), queue, member, options.max_in_flight())))
        })
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        let create = || {
            Self::check(&options)?;
            let (_, made) = self.queues.lock().join(Some(group.clone()), &group.filter, &options)?;
            Ok(made)
        };
        now(create())
    }

    fn alter_group(&self, group: &Group, _: GroupOptions) -> BoxFuture<'_, Result<()>> {
        let found = self.queues.lock().find(group);
        now(Err(match found {
            None => Error::not_found(format!("group {group} does not exist")),
            Some(_) => Error::unsupported("this broker fixes a group's settings when it is created"),
        }))
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        let mut queues = self.queues.lock();
        let deleted =
            queues.check_open().map(|()| queues.find(group).and_then(|id| queues.queues.remove(&id)).is_some());
        queues.wake_all();
        now(deleted)
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let mut queues = self.queues.lock();
        let id = queues.find(group);
        let purged = id.and_then(|id| queues.queues.get_mut(&id)).map(|queue| queue.waiting.drain(..).count() as u64);
        now(purged.ok_or_else(|| Error::not_found(format!("group {group} does not exist"))))
    }

    fn dead_letters(&self, _: &Group, _: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        Self::no_letters()
    }

    fn purge_dead_letters(&self, _: &Group) -> BoxFuture<'_, Result<u64>> {
        Self::no_letters()
    }

    fn redrive(&self, _: &Group, _: u64) -> BoxFuture<'_, Result<u64>> {
        Self::no_letters()
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        let queues = self.queues.lock();
        let state = Self::state(queues.life);
        let mut status = Status::new(self.name(), state);
        for queue in queues.queues.values() {
            let in_flight = queue.unsettled() as u64;
            let lag = Some(queue.waiting.len() as u64 + in_flight);
            match &queue.group {
                Some(group) => {
                    let mut one = GroupStatus::new(group.clone(), state);
                    one.lag = lag;
                    one.in_flight = Some(in_flight);
                    one.members = Some(queue.members.len() as u64);
                    one.counts = queue.counts;
                    status.groups.push(one);
                }
                None => {
                    let mut one = SubscriptionStatus::new(queue.filter.clone(), state);
                    one.lag = lag;
                    one.in_flight = Some(in_flight);
                    one.counts = queue.counts;
                    status.subscriptions.push(one);
                }
            }
        }
        now(Ok(status))
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        Box::pin(async move {
            {
                let mut queues = self.queues.lock();
                if queues.life == Life::Open {
                    queues.life = Life::Closing;
                }
            }
            let end = Instant::now() + deadline;
            let complete = loop {
                let drained = self.queues.lock().is_drained();
                if drained || Instant::now() >= end {
                    break drained;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            self.end(complete)
        })
    }
}
