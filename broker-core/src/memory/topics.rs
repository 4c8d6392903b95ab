//! A topic: where its messages are appended, and the publishes that wait for room.
//!
//! Locks are taken in the order topic, group, log; none is held while a task is woken.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;
use tokio::time::timeout;

use super::Shared;
use super::dedup::Window;
use super::entry::{Entry, Place};
use super::group::{Group, Roused};
use super::history::{Frees, History, Retention};
use super::log::{Log, LogState, Room, Wake};
use super::queue::Queue;
use super::run::MAX_SEGMENT;
use crate::{
    Confirm, Error, Message, Operation, Overflow, Producer, Publish, PublishBatch, PublisherOptions, Receipt, Result,
    Timestamp, Topic,
};

/// How long a publish waits before it asks for every single settlement.
const PATIENCE: Duration = Duration::from_millis(1);
/// How long it waits at most until it looks itself whether something expired.
const MAX_PATIENCE: Duration = Duration::from_secs(1);

pub(super) struct TopicState {
    pub(super) topic: Topic,
    /// The log of the filter that is this very topic, from the first subscription to it on.
    own: OnceLock<Arc<Log>>,
    state: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The logs of the patterns that match, as of `version`.
    patterns: SmallVec<[Arc<Log>; 1]>,
    version: u64,
    /// Publishes that wait for room.
    queue: Queue,
    history: Option<Box<History>>,
    dedup: Option<Box<Window>>,
}

/// What is to be done once the topic's lock is released.
#[derive(Default)]
struct After {
    wake: Wake,
    roused: Roused,
    /// Whether a full group is to tell each settlement.
    insist: bool,
    /// The group for which a publish waits.
    full: Option<Arc<Group>>,
    /// Whether all topics are to forget keys whose time is over.
    look: bool,
    /// Whether the publisher is to let others run now and then.
    cooperate: bool,
}

impl After {
    #[inline]
    fn run(self, shared: &Arc<Shared>) {
        if self.look {
            let now = shared.clock.tick();
            shared.all_topics().iter().for_each(|topic| topic.forget_keys(now));
        }
        if self.wake.is_empty() && self.roused.topics.is_empty() && self.roused.members.is_empty() {
            return;
        }
        self.wake.into_iter().for_each(|group| group.notify());
        self.roused.members.into_iter().for_each(Waker::wake);
        self.roused.topics.into_iter().for_each(|topic| drop(topic.resume(shared, false)));
    }
}

impl TopicState {
    pub(super) fn new(topic: Topic) -> Arc<Self> {
        Arc::new(Self { topic, own: OnceLock::new(), state: Mutex::default() })
    }

    /// The log of the filter that is this topic; `make` makes it.
    pub(super) fn own(&self, make: impl FnOnce() -> Arc<Log>) -> &Arc<Log> {
        self.own.get_or_init(make)
    }

    /// Links the patterns that match now, and shows `with` what the topic retains.
    pub(super) fn link(&self, shared: &Shared, with: impl FnOnce(&History)) {
        let mut inner = self.state.lock();
        inner.link(shared, &self.topic);
        if let Some(history) = &inner.history {
            with(history);
        }
    }

    /// The highest place of all that was ever retained.
    pub(super) fn highest_place(&self) -> Option<Place> {
        self.state.lock().history.as_ref().and_then(|history| history.highest())
    }

    /// The place of the oldest it retains, and bytes of all it retains.
    pub(super) fn oldest_retained(&self) -> Option<(Place, u64)> {
        self.state.lock().history.as_ref().and_then(|history| history.oldest())
    }

    /// Whether any of what it retains is a dead letter.
    pub(super) fn retains_letters(&self) -> bool {
        self.state.lock().history.as_ref().is_some_and(|history| history.has_letters())
    }

    /// Forgets the oldest it retains, as [`History::forget`] does; tells the bytes of what `frees` says.
    pub(super) fn forget(&self, bytes: u64, frees: Frees<'_>, looks: &mut usize) -> u64 {
        let forget = |history: &mut Box<History>| history.forget(bytes, frees, looks);
        let forgotten = self.state.lock().history.as_mut().map(forget);
        // What was forgotten goes now, with nothing locked.
        forgotten.map_or(0, |(freed, _)| freed)
    }

    /// Brings what it retains within its bounds.
    pub(super) fn trim(&self, retention: &Retention) {
        let gone = self.state.lock().history.as_mut().map(|history| history.trim(retention));
        drop(gone);
    }

    /// Whether nothing would be lost if the topic were forgotten until it is named again.
    pub(super) fn is_idle(&self, now: u64) -> bool {
        let inner = self.state.lock();
        self.own.get().is_none_or(|log| log.lock().readers() == 0)
            && inner.queue.is_idle()
            && inner.history.as_ref().is_none_or(|history| history.is_past())
            && inner.dedup.as_ref().is_none_or(|window| window.is_empty_at(now))
    }

    fn forget_keys(&self, now: u64) {
        if let Some(window) = &mut self.state.lock().dedup {
            window.forget_old(now);
        }
    }

    /// Publishes at once where there is room, and leaves a ticket in the queue where there is none.
    #[inline]
    fn publish(self: &Arc<Self>, shared: &Arc<Shared>, message: Message, require_route: bool) -> Publish {
        let mut message = Some(message);
        match self.publish_direct(shared, &mut message) {
            Some(publish) => publish,
            None => self.publish_in_turn(shared, message, require_route),
        }
    }

    /// The way of most messages, with one lock: see [`append_direct`](Self::append_direct).
    #[inline]
    fn publish_direct(&self, shared: &Shared, message: &mut Option<Message>) -> Option<Publish> {
        let mut wake = Wake::new();
        let publish = self.append_direct(shared, &mut self.own.get()?.lock(), message, &mut wake)?;
        // Mostly there is nobody to tell.
        if !wake.is_empty() {
            wake.into_iter().for_each(|group| group.notify());
        }
        Some(publish)
    }

    /// Appends a message that goes to the topic's own `log` and nowhere else, while nobody waits.
    /// `None` leaves the message where it was, for the way that sees to everything.
    #[inline]
    fn append_direct(
        &self,
        shared: &Shared,
        log: &mut LogState,
        message: &mut Option<Message>,
        wake: &mut Wake,
    ) -> Option<Publish> {
        let waiting = message.as_ref().filter(|message| message.dedup_key().is_none())?;
        let (id, size) = (waiting.id().clone(), waiting.size() as u64);
        // With the log locked: a drain looks into it after it has closed the broker.
        if !log.is_direct(shared.patterns_version.load(Ordering::Acquire)) || !shared.is_open() || !log.has_room(size) {
            return None;
        }
        log.append(&self.topic, message, size, wake);
        let receipt = Receipt::new(id).with_matched(log.readers() as u64);
        Some(if log.has_crowd() { Operation::cooperative(Ok(receipt)) } else { Operation::ready(Ok(receipt)) })
    }

    fn publish_in_turn(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut message: Option<Message>,
        require_route: bool,
    ) -> Publish {
        let mut after = After::default();
        let mut inner = self.state.lock();
        let publish = inner.publish(self, shared, &mut message, require_route, &mut after);
        drop(inner);
        after.run(shared);
        publish
    }

    /// The same for several, in order: those that go to one log a segment at a time, so that readers get
    /// their turn, the rest under one lock.
    fn publish_batch(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        messages: Vec<Message>,
        require_route: bool,
    ) -> Vec<Publish> {
        let mut publishes = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter().map(Some);
        let mut next = None;
        while let Some(log) = self.own.get()
            && next.is_none()
            && messages.len() > 0
        {
            let mut wake = Wake::new();
            let mut log = log.lock();
            for mut message in messages.by_ref().take(MAX_SEGMENT) {
                match self.append_direct(shared, &mut log, &mut message, &mut wake) {
                    Some(publish) => publishes.push(publish),
                    None => {
                        next = message;
                        break;
                    }
                }
            }
            drop(log);
            wake.into_iter().for_each(|group| group.notify());
        }
        if next.is_some() || messages.len() > 0 {
            let mut after = After::default();
            let mut inner = self.state.lock();
            let publish = |mut message| inner.publish(self, shared, &mut message, require_route, &mut after);
            publishes.extend(next.map(Some).into_iter().chain(messages).map(publish));
            drop(inner);
            after.run(shared);
        }
        publishes
    }

    /// A publish that waits for room: patiently at first, so that a batch of settlements makes room
    /// for a batch of publishes, then for each single settlement, and for what expires.
    fn waiting(self: &Arc<Self>, shared: &Arc<Shared>, ticket: u64) -> Publish {
        let by: Arc<dyn Confirm<Receipt>> = Arc::<Self>::clone(self);
        let mut publish = Operation::confirmed(by, ticket);
        let (topic, shared) = (Arc::clone(self), Arc::clone(shared));
        Operation::boxed(async move {
            let mut patience = PATIENCE;
            loop {
                if let Ok(result) = timeout(patience, &mut publish).await {
                    return result;
                }
                let expiry = topic.resume(&shared, true).and_then(|full| full.next_expiry());
                let wait = expiry.map_or(MAX_PATIENCE, |expiry| expiry.since(Timestamp::now()));
                patience = wait.clamp(PATIENCE, MAX_PATIENCE);
            }
        })
    }

    /// Appends a dead letter for whoever listens; nobody hears of its outcome.
    pub(super) fn append_unheard(self: &Arc<Self>, shared: &Arc<Shared>, message: Message) {
        let mut after = After::default();
        let mut message = Some(message);
        let mut inner = self.state.lock();
        if inner.queue.has_unheard() {
            drop(inner);
            self.resume(shared, false);
            inner = self.state.lock();
        }
        match inner.admit_in_turn(self, shared, &mut message, false, &mut after) {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::warn!(topic = %self.topic, %error, "a dead letter did not reach its subscribers; it is kept");
                inner.miss(self);
            }
            None if inner.queue.wait_unheard(message) => {}
            // It is no publisher that could be slowed down: whoever rejects goes on.
            None => {
                tracing::warn!(
                    topic = %self.topic,
                    "a dead letter did not reach its subscribers, of which one's backlog is full; it is kept"
                );
                inner.miss(self);
            }
        }
        drop(inner);
        after.run(shared);
    }

    /// A group may have room again: the first in the queue go on. Tells which group is full.
    pub(super) fn resume(self: &Arc<Self>, shared: &Arc<Shared>, insist: bool) -> Option<Arc<Group>> {
        let mut after = After { insist, ..After::default() };
        let mut wakers = SmallVec::<[Waker; 8]>::new();
        let mut inner = self.state.lock();
        while let Some((ticket, mut waiting)) = inner.queue.pop() {
            let Some(result) = inner.admit(self, shared, &mut waiting.message, waiting.require_route, &mut after)
            else {
                inner.queue.put_back(ticket, waiting);
                break;
            };
            if result.is_err() && !waiting.heard {
                inner.miss(self);
            }
            wakers.extend(inner.queue.done(ticket, waiting, result));
        }
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        let full = after.full.take();
        // It may be called with the registry locked.
        after.look = false;
        after.run(shared);
        full
    }

    /// The broker has closed: what still waits fails. Tells how many.
    pub(super) fn fail_waiting(&self) -> u64 {
        let (failed, wakers) = self.state.lock().queue.fail_all();
        wakers.into_iter().for_each(Waker::wake);
        failed
    }

    /// Whether publishes wait for room, of which somebody will hear. Dead letters are kept besides.
    pub(super) fn has_waiting(&self) -> bool {
        self.state.lock().queue.has_heard()
    }
}

pub(super) fn closed() -> Error {
    Error::closed("the broker is closed: open another")
}

/// Why an entry was not appended.
enum Full {
    Wait(Arc<Group>),
    /// Settlements that were not told may make room; if not, it drops its oldest.
    Drop(Arc<Group>),
    Reject(Arc<Group>),
}

impl Inner {
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

    fn publish(
        &mut self,
        topic: &Arc<TopicState>,
        shared: &Arc<Shared>,
        message: &mut Option<Message>,
        require_route: bool,
        after: &mut After,
    ) -> Publish {
        if !shared.is_open() {
            return Operation::from(closed());
        }
        if let Some(result) = self.admit_in_turn(topic, shared, message, require_route, after) {
            return if after.cooperate { Operation::cooperative(result) } else { Operation::ready(result) };
        }
        match message.take() {
            Some(message) => topic.waiting(shared, self.queue.wait(message, require_route)),
            None => Operation::from(closed()),
        }
    }

    /// A dead letter reaches nobody who reads the topic: it is taken by all groups or by none. They are told of a gap.
    fn miss(&self, topic: &TopicState) {
        topic.own.get().into_iter().chain(&self.patterns).for_each(|log| log.lock().miss());
    }

    /// Appends the message unless others wait already.
    #[inline]
    fn admit_in_turn(
        &mut self,
        topic: &Arc<TopicState>,
        shared: &Arc<Shared>,
        message: &mut Option<Message>,
        require_route: bool,
        after: &mut After,
    ) -> Option<Result<Receipt>> {
        if self.queue.is_empty() { self.admit(topic, shared, message, require_route, after) } else { None }
    }

    /// Appends the message to every matching log, or to none. `None` says that it must wait, and
    /// leaves it where it was.
    fn admit(
        &mut self,
        topic: &Arc<TopicState>,
        shared: &Arc<Shared>,
        message: &mut Option<Message>,
        require_route: bool,
        after: &mut After,
    ) -> Option<Result<Receipt>> {
        self.link(shared, &topic.topic);
        let waiting = message.as_ref()?;
        // What the receipt says, and what few messages have, is kept for after the message has gone.
        let id = waiting.id().clone();
        let dedup_key = waiting.dedup_key().map(Arc::<str>::from);
        if let Some(key) = &dedup_key
            && let Some(first) = self.dedup.as_mut().and_then(|window| window.seen(key, shared.clock.tick()))
        {
            return Some(Ok(first));
        }
        // Of groups that drop their oldest: they have told all they had.
        let mut asked = SmallVec::<[Arc<Group>; 2]>::new();
        let (matched, retained) = loop {
            match self.append(topic, shared, message, &asked, after) {
                Ok(appended) => break appended,
                // A batch tells its acks when it is done; at the bound they are asked for.
                Err(Full::Wait(group)) if !group.make_room(true, after.insist, &mut after.roused) => {
                    after.full = Some(group);
                    return None;
                }
                Err(Full::Drop(group)) => {
                    group.tell_all(&mut after.roused);
                    asked.push(group);
                }
                Err(Full::Reject(group)) if !group.make_room(false, true, &mut after.roused) => {
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
        let receipt = Receipt::new(id).with_matched(matched as u64);
        if let Some(key) = dedup_key {
            let until = shared.clock.tick_after(shared.options.dedup_window);
            let window = self.dedup.get_or_insert_with(|| Box::new(Window::new(&shared.keys)));
            window.remember(key, until, receipt.clone());
            after.look |= shared.keys.want_look(shared.clock.tick());
        }
        if let Some(entry) = retained
            && let Some(retention) = &*shared.retention.read()
        {
            self.history.get_or_insert_with(|| Box::new(History::new(&shared.retained))).push(
                entry,
                retention,
                shared.clock.tick(),
            );
        }
        Some(Ok(receipt))
    }

    /// Appends the message where there is room in every log for it, and then takes it. Tells how
    /// many groups have it, and, if the topic retains it, the shared entry.
    fn append(
        &self,
        topic: &Arc<TopicState>,
        shared: &Shared,
        message: &mut Option<Message>,
        asked: &[Arc<Group>],
        after: &mut After,
    ) -> Result<(usize, Option<Arc<Entry>>), Full> {
        let retains = shared.options.retention.is_some();
        let size = message.as_ref().map_or(0, Message::size) as u64;
        match (topic.own.get(), self.patterns.as_slice()) {
            (None, []) if !retains => Ok((0, None)),
            (Some(log), []) if !retains => {
                let mut log = log.lock();
                // Whoever must wait now is overtaken by nobody.
                log.set_direct(None);
                check(&mut log, topic, size, asked, &mut after.roused)?;
                log.set_direct(self.queue.is_empty().then_some(self.version));
                log.append(&topic.topic, message, size, &mut after.wake);
                after.cooperate |= log.has_crowd();
                Ok((log.readers(), None))
            }
            (own, patterns) => {
                let mut logs: SmallVec<[&Arc<Log>; 4]> = own.into_iter().chain(patterns).collect();
                logs.sort_unstable_by_key(|log| log.id);
                let mut logs: SmallVec<[MutexGuard<'_, LogState>; 4]> =
                    logs.into_iter().map(|log| log.lock()).collect();
                for log in &mut logs {
                    check(log, topic, size, asked, &mut after.roused)?;
                }
                let entry = message.take().map(|message| {
                    let place = retains.then(|| shared.place(&message));
                    Entry::placed(topic.topic.clone(), message, place)
                });
                if let Some(entry) = &entry {
                    logs.iter_mut().for_each(|log| log.append_shared(entry, &mut after.wake));
                }
                after.cooperate |= logs.iter().any(|log| log.has_crowd());
                Ok((logs.iter().map(|log| log.readers()).sum(), entry.filter(|_| retains)))
            }
        }
    }
}

fn check(
    log: &mut LogState,
    topic: &Arc<TopicState>,
    size: u64,
    asked: &[Arc<Group>],
    roused: &mut Roused,
) -> Result<(), Full> {
    let room = log.room(size, asked);
    roused.topics.append(&mut log.take_resumed());
    match room {
        Room::Free => Ok(()),
        Room::Full(group, Overflow::Reject) => Err(Full::Reject(group)),
        Room::Full(group, Overflow::DropOldest) => Err(Full::Drop(group)),
        Room::Full(group, Overflow::Wait) => {
            log.stall(topic);
            Err(Full::Wait(group))
        }
    }
}

/// The queue of waiting publishes confirms them itself: a ticket is a place in it.
impl Confirm<Receipt> for TopicState {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Receipt>> {
        self.state.lock().queue.poll(ticket, cx)
    }

    fn abandon(&self, ticket: u64) {
        let withdrawn = self.state.lock().queue.abandon(ticket);
        // With nothing locked.
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
        self.topic.publish(&self.shared, message, self.options.require_route)
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        let publishes = self.topic.publish_batch(&self.shared, messages, self.options.require_route);
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
