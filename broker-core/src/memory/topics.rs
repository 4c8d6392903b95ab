//! A topic: where its messages are appended, and the publishes that wait for room.
//!
//! Locks are taken in the order topic, group, log; none is held while a task is woken.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::Shared;
use super::dedup::Window;
use super::entry::Entry;
use super::group::Group;
use super::history::History;
use super::log::{Log, LogState, Room, Wake};
use crate::{
    Confirm, Error, Message, Operation, Overflow, Producer, Publish, PublishBatch, PublisherOptions, Receipt, Result,
    Topic,
};

pub(super) struct TopicState {
    pub(super) topic: Topic,
    state: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The log of the filter that is this very topic.
    own: Option<Arc<Log>>,
    /// The logs of the patterns that match, as of `version`.
    patterns: SmallVec<[Arc<Log>; 1]>,
    version: u64,
    /// Publishes that wait for room, in the order of their calls.
    waiting: BTreeMap<u64, Waiting>,
    last_ticket: u64,
    /// Outcomes of those that waited, not heard yet.
    done: FxHashMap<u64, Result<Receipt>>,
    history: Option<Box<History>>,
    dedup: Option<Box<Window>>,
}

struct Waiting {
    entry: Arc<Entry>,
    require_route: bool,
    waker: Option<Waker>,
    /// Whether somebody will ask for the outcome.
    heard: bool,
}

/// What is to be done once the topic's lock is released.
#[derive(Default)]
struct After {
    wake: Wake,
    resume: Vec<Arc<TopicState>>,
}

impl After {
    fn run(self, shared: &Arc<Shared>) {
        self.wake.into_iter().for_each(|group| group.notify());
        self.resume.into_iter().for_each(|topic| topic.resume(shared));
    }
}

impl TopicState {
    pub(super) fn new(topic: Topic) -> Arc<Self> {
        Arc::new(Self { topic, state: Mutex::default() })
    }

    /// Sets or removes the log of the filter that is this topic.
    pub(super) fn set_own(&self, log: Option<Arc<Log>>) {
        self.state.lock().own = log;
    }

    /// Links the patterns that match now, and shows `with` what the topic retains.
    pub(super) fn link(&self, shared: &Shared, with: impl FnOnce(&History)) {
        let mut inner = self.state.lock();
        inner.link(shared, &self.topic);
        if let Some(history) = &inner.history {
            with(history);
        }
    }

    /// Whether nothing would be lost if the topic were forgotten until it is named again.
    pub(super) fn is_idle(&self, now: u64) -> bool {
        let inner = self.state.lock();
        inner.own.is_none()
            && inner.waiting.is_empty()
            && inner.done.is_empty()
            && inner.history.as_ref().is_none_or(|history| history.is_empty())
            && inner.dedup.as_ref().is_none_or(|window| window.is_empty_at(now))
    }

    /// Publishes at once where there is room, and leaves a ticket in the queue where there is none.
    fn publish(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        messages: impl Iterator<Item = Message>,
        require_route: bool,
        mut each: impl FnMut(Publish),
    ) {
        let mut after = After::default();
        let mut inner = None;
        for message in messages {
            if !shared.is_open() {
                each(Operation::from(closed()));
                continue;
            }
            // Made before the lock is taken, where there is one message only.
            let entry = Entry::new(self.topic.clone(), message);
            let inner = inner.get_or_insert_with(|| self.state.lock());
            each(match inner.admit_in_turn(self, shared, &entry, require_route, &mut after) {
                Some(result) => Operation::ready(result),
                None => {
                    let ticket = inner.wait(Waiting { entry, require_route, waker: None, heard: true });
                    let by: Arc<dyn Confirm<Receipt>> = Arc::<Self>::clone(self);
                    Operation::confirmed(by, ticket)
                }
            });
        }
        drop(inner);
        after.run(shared);
    }

    /// Appends a dead letter for whoever listens; nobody hears of its outcome.
    pub(super) fn append_unheard(self: &Arc<Self>, shared: &Arc<Shared>, message: Message) {
        let mut after = After::default();
        let entry = Entry::new(self.topic.clone(), message);
        let mut inner = self.state.lock();
        match inner.admit_in_turn(self, shared, &entry, false, &mut after) {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::warn!(topic = %self.topic, %error, "a dead letter did not reach a subscriber; it is kept")
            }
            None => drop(inner.wait(Waiting { entry, require_route: false, waker: None, heard: false })),
        }
        drop(inner);
        after.run(shared);
    }

    /// A group has room again: the first in the queue go on.
    pub(super) fn resume(self: &Arc<Self>, shared: &Arc<Shared>) {
        let mut after = After::default();
        let mut wakers = SmallVec::<[Waker; 8]>::new();
        let mut inner = self.state.lock();
        while let Some((ticket, waiting)) = inner.waiting.pop_first() {
            match inner.admit(self, shared, &waiting.entry, waiting.require_route, &mut after) {
                Some(result) => wakers.extend(inner.finish(ticket, waiting, result)),
                None => {
                    inner.waiting.insert(ticket, waiting);
                    break;
                }
            }
        }
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        after.run(shared);
    }

    /// The broker has closed: what still waits fails. Tells how many.
    pub(super) fn fail_waiting(&self) -> u64 {
        let mut inner = self.state.lock();
        let waiting = std::mem::take(&mut inner.waiting);
        let failed = waiting.len() as u64;
        let wakers: Vec<Waker> =
            waiting.into_iter().filter_map(|(ticket, waiting)| inner.finish(ticket, waiting, Err(closed()))).collect();
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        failed
    }

    /// Whether publishes wait for room.
    pub(super) fn has_waiting(&self) -> bool {
        !self.state.lock().waiting.is_empty()
    }
}

pub(super) fn closed() -> Error {
    Error::closed("the broker is closed: open another")
}

/// Why an entry was not appended.
enum Full {
    Wait(Arc<Group>),
    Reject(Arc<Group>),
}

impl Inner {
    fn wait(&mut self, waiting: Waiting) -> u64 {
        self.last_ticket += 1;
        self.waiting.insert(self.last_ticket, waiting);
        self.last_ticket
    }

    fn finish(&mut self, ticket: u64, waiting: Waiting, result: Result<Receipt>) -> Option<Waker> {
        if waiting.heard {
            self.done.insert(ticket, result);
        }
        waiting.waker
    }

    /// Brings the patterns that match up to date, if any was added or removed since.
    fn link(&mut self, shared: &Shared, topic: &Topic) {
        let version = shared.patterns_version.load(Ordering::Acquire);
        if version != self.version {
            self.patterns.clear();
            let patterns = &mut self.patterns;
            shared.patterns.read().matches(topic, &mut |log: &Arc<Log>| patterns.push(Arc::clone(log)));
            self.version = version;
        }
    }

    /// Appends the entry unless others wait already.
    fn admit_in_turn(
        &mut self,
        topic: &Arc<TopicState>,
        shared: &Arc<Shared>,
        entry: &Arc<Entry>,
        require_route: bool,
        after: &mut After,
    ) -> Option<Result<Receipt>> {
        if self.waiting.is_empty() { self.admit(topic, shared, entry, require_route, after) } else { None }
    }

    /// Appends the entry to every matching log, or to none; `None` says that it must wait.
    fn admit(
        &mut self,
        topic: &Arc<TopicState>,
        shared: &Arc<Shared>,
        entry: &Arc<Entry>,
        require_route: bool,
        after: &mut After,
    ) -> Option<Result<Receipt>> {
        self.link(shared, &topic.topic);
        let dedup_key = entry.message.dedup_key();
        if let Some(key) = dedup_key
            && let Some(first) = self.dedup.as_mut().and_then(|window| window.seen(key, shared.clock.tick()))
        {
            return Some(Ok(first));
        }
        let matched = loop {
            match self.append(topic, entry, &mut after.wake) {
                Ok(matched) => break matched,
                // A batch tells its acks when it is done; at the bound they are asked for.
                Err(Full::Wait(group)) if !group.ask_for_settlements(true, &mut after.resume) => return None,
                Err(Full::Reject(group)) if !group.ask_for_settlements(false, &mut after.resume) => {
                    return Some(Err(group.full()));
                }
                Err(_) => {}
            }
        };
        if matched == 0 && require_route {
            return Some(Err(Error::unroutable(format!(
                "nobody subscribes to {}: create the group first, or publish without require_route",
                topic.topic
            ))));
        }
        if let Some(retention) = &shared.options.retention {
            self.history.get_or_insert_default().push(Arc::clone(entry), retention);
        }
        let receipt = Receipt::new(entry.message.id().clone()).with_matched(matched as u64);
        if let Some(key) = dedup_key {
            let until = shared.clock.tick_after(shared.options.dedup_window);
            self.dedup.get_or_insert_default().remember(key, until, receipt.clone());
        }
        Some(Ok(receipt))
    }

    fn append(&self, topic: &Arc<TopicState>, entry: &Arc<Entry>, wake: &mut Wake) -> Result<usize, Full> {
        match (&self.own, self.patterns.as_slice()) {
            (None, []) => Ok(0),
            (Some(log), []) | (None, [log]) => {
                let mut log = log.lock();
                check(&mut log, topic, entry)?;
                log.append(entry, wake);
                Ok(log.readers())
            }
            _ => {
                let mut logs: SmallVec<[&Arc<Log>; 4]> = self.own.iter().chain(&self.patterns).collect();
                logs.sort_unstable_by_key(|log| log.id);
                let mut logs: SmallVec<[MutexGuard<'_, LogState>; 4]> =
                    logs.into_iter().map(|log| log.lock()).collect();
                for log in &mut logs {
                    check(log, topic, entry)?;
                }
                for log in &mut logs {
                    log.append(entry, wake);
                }
                Ok(logs.iter().map(|log| log.readers()).sum())
            }
        }
    }
}

fn check(log: &mut LogState, topic: &Arc<TopicState>, entry: &Entry) -> Result<(), Full> {
    match log.room(entry.size) {
        Room::Free => Ok(()),
        Room::Full(group, Overflow::Reject) => Err(Full::Reject(group)),
        Room::Full(group, _) => {
            log.stall(topic);
            Err(Full::Wait(group))
        }
    }
}

/// The queue of waiting publishes confirms them itself: a ticket is a place in it.
impl Confirm<Receipt> for TopicState {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Receipt>> {
        let mut inner = self.state.lock();
        if let Some(waiting) = inner.waiting.get_mut(&ticket) {
            waiting.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(inner.done.remove(&ticket).unwrap_or_else(|| Err(closed())))
    }

    fn abandon(&self, ticket: u64) {
        let mut inner = self.state.lock();
        let withdrawn = inner.waiting.remove(&ticket);
        inner.done.remove(&ticket);
        drop(inner);
        drop(withdrawn);
    }
}

/// What stands behind a `Publisher` of the in-process broker.
pub(super) struct TopicProducer {
    pub(super) topic: Arc<TopicState>,
    pub(super) shared: Arc<Shared>,
    pub(super) options: PublisherOptions,
}

impl Producer for TopicProducer {
    fn publish(&self, message: Message) -> Publish {
        let mut publish = None;
        self.topic
            .publish(&self.shared, std::iter::once(message), self.options.require_route, |one| publish = Some(one));
        publish.unwrap_or_else(|| Operation::from(closed()))
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        let mut publishes = Vec::with_capacity(messages.len());
        self.topic.publish(&self.shared, messages.into_iter(), self.options.require_route, |one| publishes.push(one));
        if publishes.iter().all(Operation::is_ready) {
            return Operation::ready(Ok(publishes.into_iter().filter_map(Operation::into_ready).collect()));
        }
        Operation::boxed(async move {
            let mut results = Vec::with_capacity(publishes.len());
            for publish in publishes {
                results.push(publish.await);
            }
            Ok(results)
        })
    }
}
