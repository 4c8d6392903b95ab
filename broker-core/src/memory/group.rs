//! A group: its members, what it holds outside the log, and how deliveries are settled.
//!
//! A subscription without group is a group with one member and no name.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Waker};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use smallvec::SmallVec;

use super::Shared;
use super::batch::{Batch, Items};
use super::entry::{Entry, Queued, is_expired};
use super::lanes::Lanes;
use super::log::Log;
use super::tally::{Asked, Sum};
use super::topics::{TopicState, closed};
use super::wheel::Wheel;
use crate::{
    Counts, DeadLetter, Deliveries, Delivery, Error, Failure, Gap, Group as GroupId, GroupSettings, Message, Result,
    Settle, Settlement, Timestamp, TopicFilter,
};

/// Deliveries a batch has at most: what one counter speaks for.
const MAX_BATCH: usize = 256;
/// Entries looked at in one go for one that may be delivered.
const MAX_INTAKE: usize = 4096;

pub(super) struct Group {
    /// `None` for a subscription without group.
    pub(super) id: Option<GroupId>,
    /// Messages of one key one at a time; fixed, unlike the other settings.
    pub(super) ordered: bool,
    shared: Arc<Shared>,
    log: Arc<Log>,
    /// The group's place among the readers of the log; set right after it was made.
    reader: OnceLock<usize>,
    /// Whether somebody waits for settlements, so that a batch must tell each.
    asked: Asked,
    state: Mutex<State>,
}

struct State {
    settings: GroupSettings,
    /// Messages to deliver before those in the log: retries that are due, replays, redriven ones.
    ready: VecDeque<Queued>,
    /// Messages due later.
    timer: Option<Box<Wheel<Queued>>>,
    lanes: Lanes,
    members: Vec<Member>,
    last_member: u64,
    /// Batches with unsettled deliveries, and what was collected of each.
    open: Slab<(Arc<Batch>, Sum)>,
    in_flight: u64,
    counts: Counts,
    lost: u64,
    last_error: Option<Arc<str>>,
    deleted: bool,
}

struct Member {
    id: u64,
    max_in_flight: usize,
    in_flight: usize,
    waker: Option<Waker>,
    /// Whether it waits for its own settlements rather than for messages.
    full: bool,
    /// Whether it was woken for messages and has not come yet.
    woken: bool,
}

/// What a member that received nothing is to do.
pub(super) enum Received {
    Some,
    /// Come back when woken, or at this tick.
    Wait(Option<u64>),
    /// Come back at once: there is more to look at.
    Again,
    Ended,
}

/// What a group is doing, for its status.
pub(super) struct Snapshot {
    pub(super) lag: Sum,
    pub(super) in_flight: u64,
    pub(super) members: u64,
    pub(super) counts: Counts,
    pub(super) last_error: Option<Arc<str>>,
}

/// What is to be done once the group's lock is released.
#[derive(Default)]
struct After {
    wakers: SmallVec<[Waker; 2]>,
    resume: Vec<Arc<TopicState>>,
    dead: Vec<(Queued, Failure, Timestamp)>,
}

/// Change of what the group holds outside the log.
#[derive(Default)]
struct Change {
    messages: i64,
    bytes: i64,
}

impl Change {
    fn add(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes += bytes as i64;
    }

    fn remove(&mut self, sum: Sum) {
        self.messages -= sum.messages as i64;
        self.bytes -= sum.bytes as i64;
    }
}

/// Life.
impl Group {
    /// A group that reads `log` from its tail on, and `replay` before.
    pub(super) fn new(shared: &Arc<Shared>, id: Option<GroupId>, settings: GroupSettings, log: &Arc<Log>) -> Arc<Self> {
        let backlog = settings.backlog;
        let group = Arc::new(Self {
            id,
            ordered: settings.ordered,
            shared: Arc::clone(shared),
            log: Arc::clone(log),
            reader: OnceLock::new(),
            // An ordered group needs each settlement, to let the next of the key go.
            asked: Asked::new(settings.ordered),
            state: Mutex::new(State {
                settings,
                ready: VecDeque::new(),
                timer: None,
                lanes: Lanes::default(),
                members: Vec::new(),
                last_member: 0,
                open: Slab::new(),
                in_flight: 0,
                counts: Counts::default(),
                lost: 0,
                last_error: None,
                deleted: false,
            }),
        });
        let mut log = log.lock();
        let reader = log.add_reader(Arc::clone(&group), backlog);
        drop(log);
        let fresh = group.reader.set(reader).is_ok();
        debug_assert!(fresh);
        group
    }

    fn reader(&self) -> usize {
        // Between making the group and setting this, nobody else has the group but the log, which
        // asks for it by its own key.
        self.reader.get().copied().unwrap_or(usize::MAX)
    }

    pub(super) fn filter(&self) -> &TopicFilter {
        &self.log.filter
    }

    pub(super) fn settings(&self) -> GroupSettings {
        self.state.lock().settings.clone()
    }

    /// Puts what topics retain before what the log holds: `entries` may repeat what was appended
    /// since the group stands.
    pub(super) fn replay(&self, mut entries: Vec<Arc<Entry>>) {
        let mut state = self.state.lock();
        let mut change = Change::default();
        let appended = self.log.lock().identities(self.reader());
        if !appended.is_empty() {
            entries.retain(|entry| !appended.contains(&Arc::as_ptr(entry)));
        }
        for entry in entries {
            change.add(entry.size);
            self.arrive(&mut state, Queued::new(entry));
        }
        let mut after = After::default();
        self.apply(change, &mut after);
        self.finish(state, after);
    }

    /// Changes the settings, all but where it started.
    pub(super) fn alter(&self, settings: GroupSettings) {
        let mut state = self.state.lock();
        let resume = self.log.lock().set_backlog(self.reader(), settings.backlog);
        let after = After { resume, ..After::default() };
        state.settings = settings;
        self.finish(state, after);
    }

    /// Ends the group: its members end, what it holds is forgotten. Tells whether the log has no
    /// reader left.
    pub(super) fn delete(&self) -> bool {
        let mut state = self.state.lock();
        state.deleted = true;
        state.ready.clear();
        state.timer = None;
        state.lanes.purge();
        state.open.clear();
        let mut after = After::default();
        after.wakers.extend(state.members.iter_mut().filter_map(|member| member.waker.take()));
        let (last, resume) = self.log.lock().remove_reader(self.reader());
        after.resume = resume;
        self.finish(state, after);
        last
    }

    /// Drops what is not in flight; tells how many messages.
    pub(super) fn purge(&self) -> u64 {
        let mut state = self.state.lock();
        let mut after = After::default();
        self.collect_all(&mut state, &mut after);
        let mut log = self.log.lock();
        while log.take(self.reader(), usize::MAX).is_some() {}
        let held = log.held_by(self.reader());
        let kept: Sum = state.in_flight_sum();
        let purged = Sum { messages: held.messages - kept.messages, bytes: held.bytes - kept.bytes };
        drop(log);
        state.ready.clear();
        state.timer = None;
        state.lanes.purge();
        let mut change = Change::default();
        change.remove(purged);
        self.apply(change, &mut after);
        self.finish(state, after);
        purged.messages
    }

    /// Gives the group messages anew: its own dead letters.
    pub(super) fn redrive(&self, letters: impl Iterator<Item = DeadLetter>) {
        let mut state = self.state.lock();
        let mut change = Change::default();
        let mut after = After::default();
        for letter in letters {
            let entry = Entry::new(letter.topic, letter.message);
            change.add(entry.size);
            self.arrive(&mut state, Queued::new(entry));
        }
        self.apply(change, &mut after);
        state.wake_one(&mut after);
        self.finish(state, after);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut state = self.state.lock();
        let mut after = After::default();
        self.collect_all(&mut state, &mut after);
        let log = self.log.lock();
        let (unread, held, dropped) =
            (log.unread(self.reader()), log.held_by(self.reader()), log.dropped(self.reader()));
        drop(log);
        let counts = Counts { dropped, ..state.counts };
        let snapshot = Snapshot {
            lag: Sum { messages: unread.messages + held.messages, bytes: unread.bytes + held.bytes },
            in_flight: state.in_flight,
            members: state.members.len() as u64,
            counts,
            last_error: state.last_error.clone(),
        };
        self.finish(state, after);
        snapshot
    }

    /// Whether `close` need not wait for it: nothing in flight, and nothing a member could receive.
    pub(super) fn is_drained(&self) -> bool {
        let mut state = self.state.lock();
        let mut after = After::default();
        self.collect_all(&mut state, &mut after);
        state.fire(self.shared.clock.tick());
        let unread = self.log.lock().unread(self.reader()).messages;
        let deliverable = !state.members.is_empty() && (unread > 0 || !state.ready.is_empty());
        let drained = state.in_flight == 0 && !deliverable;
        self.finish(state, after);
        drained
    }

    /// The broker has closed: members end.
    pub(super) fn end(&self) {
        self.tell_settlements();
        let wakers: Vec<Waker> =
            self.state.lock().members.iter_mut().filter_map(|member| member.waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// What a publish at the bound answers.
    pub(super) fn full(&self) -> Error {
        let name =
            self.id.as_ref().map_or_else(|| format!("a subscription to {}", self.filter()), |id| format!("group {id}"));
        Error::unavailable(format!(
            "{name} is at its backlog's bound and rejects more: try again when it has caught up"
        ))
        .with_retry_after(Duration::from_secs(1))
    }
}

/// Members.
impl Group {
    pub(super) fn join(&self, max_in_flight: usize) -> u64 {
        let mut state = self.state.lock();
        state.last_member += 1;
        let id = state.last_member;
        state.members.push(Member { id, max_in_flight, in_flight: 0, waker: None, full: false, woken: false });
        id
    }

    /// A member goes; what it holds can still be settled. Tells whether it was the last.
    pub(super) fn leave(&self, id: u64) -> bool {
        let mut state = self.state.lock();
        let mut after = After::default();
        state.members.retain(|member| member.id != id);
        // It may have been woken for messages that nobody else knows of.
        state.wake_one(&mut after);
        let last = state.members.is_empty();
        self.finish(state, after);
        self.tell_drain();
        last
    }

    /// A member no longer waits: what it was woken for goes to another.
    pub(super) fn stop_waiting(&self, id: u64) {
        let mut state = self.state.lock();
        let mut after = After::default();
        if let Some(member) = state.member(id) {
            member.waker = None;
            if std::mem::take(&mut member.woken) {
                state.wake_one(&mut after);
            }
        }
        self.finish(state, after);
    }

    /// There are entries in the log again.
    pub(super) fn notify(&self) {
        let mut state = self.state.lock();
        let mut after = After::default();
        state.wake_one(&mut after);
        self.finish(state, after);
    }

    /// Hands out up to `limit` deliveries.
    pub(super) fn receive(
        self: &Arc<Self>,
        id: u64,
        cx: &mut Context<'_>,
        deliveries: &mut Vec<Delivery>,
        limit: usize,
    ) -> Result<Received> {
        if self.is_closed() {
            return Ok(Received::Ended);
        }
        let mut batches = SmallVec::<[Arc<Batch>; 4]>::new();
        let mut after = After::default();
        let mut state = self.state.lock();
        let received = self.fill(&mut state, id, cx, limit, &mut batches, &mut after);
        self.finish(state, after);
        for batch in batches {
            for index in 0..batch.len() as u32 {
                let batch: Arc<Batch> = Arc::clone(&batch);
                deliveries.push(Delivery::new(batch, index));
            }
        }
        received
    }

    fn fill(
        self: &Arc<Self>,
        state: &mut State,
        id: u64,
        cx: &mut Context<'_>,
        limit: usize,
        batches: &mut SmallVec<[Arc<Batch>; 4]>,
        after: &mut After,
    ) -> Result<Received> {
        if state.deleted {
            return Err(Error::not_found(format!(
                "{} was deleted",
                self.id.as_ref().map_or_else(String::new, |id| format!("group {id}"))
            )));
        }
        if let Some(member) = state.member(id) {
            (member.woken, member.full, member.waker) = (false, false, None);
        }
        let window = self.window(state, id, limit, after);
        if window == 0 {
            if let Some(member) = state.member(id) {
                (member.full, member.waker) = (true, Some(cx.waker().clone()));
            }
            return Ok(Received::Wait(None));
        }
        let now = self.shared.clock.tick();
        state.fire(now);
        let mut taken = 0;
        let mut looked_at = 0;
        while taken < window && looked_at < MAX_INTAKE {
            if !state.ready.is_empty() {
                taken += self.hand_out_ready(state, id, (window - taken).min(MAX_BATCH), batches, after);
                continue;
            }
            let Some(run) = self.log.lock().take(self.reader(), (window - taken).min(MAX_BATCH)) else { break };
            looked_at += run.len;
            if self.ordered || run.scheduled {
                for entry in (run.start..run.start + run.len).filter_map(|slot| run.segment.share(slot)) {
                    self.arrive(state, Queued::new(entry));
                }
            } else {
                taken += run.len;
                self.hand_out(state, id, Items::Run { segment: run.segment, start: run.start, len: run.len }, batches);
            }
        }
        if taken > 0 {
            // The next member sees to the rest, or is told of what comes.
            if state.members.iter().any(Member::waits) && self.has_more(state) {
                state.wake_one(after);
            }
            return Ok(Received::Some);
        }
        if self.has_more(state) {
            return Ok(Received::Again);
        }
        if let Some(member) = state.member(id) {
            member.waker = Some(cx.waker().clone());
        }
        Ok(Received::Wait(state.timer.as_ref().and_then(|timer| timer.next())))
    }

    /// Whether there is more to look at; if not, the log will tell of the next entry.
    fn has_more(&self, state: &State) -> bool {
        !state.ready.is_empty() || !self.log.lock().wait(self.reader())
    }

    /// How many deliveries a member may be handed now.
    fn window(&self, state: &mut State, id: u64, limit: usize, after: &mut After) -> usize {
        let left = |state: &mut State| match state.member(id) {
            Some(member) => limit.min(member.max_in_flight.saturating_sub(member.in_flight)),
            None => 0,
        };
        let mut collect = |state: &mut State| {
            let change = self.collect_open(state, after);
            self.apply(change, after);
        };
        if left(state) < limit {
            collect(state);
        }
        if left(state) == 0 {
            // From here on each settlement tells; those made before are seen by looking again.
            self.asked.set(true);
            collect(state);
        }
        left(state)
    }

    fn hand_out_ready(
        self: &Arc<Self>,
        state: &mut State,
        id: u64,
        limit: usize,
        batches: &mut SmallVec<[Arc<Batch>; 4]>,
        after: &mut After,
    ) -> usize {
        let now = Timestamp::now();
        let mut list = SmallVec::new();
        let mut change = Change::default();
        while list.len() < limit
            && let Some(mut queued) = state.ready.pop_front()
        {
            if queued.entry.is_expired(now) {
                state.counts.expired += 1;
                change.remove(Sum { messages: 1, bytes: queued.entry.size });
                self.depart(state, &queued.entry.message);
                continue;
            }
            queued.attempts += 1;
            if self.ordered {
                state.lanes.set_in_flight(&queued, true);
            }
            list.push(queued);
        }
        self.apply(change, after);
        let taken = list.len();
        if taken > 0 {
            self.hand_out(state, id, Items::List(list), batches);
        }
        taken
    }

    fn hand_out(self: &Arc<Self>, state: &mut State, id: u64, items: Items, batches: &mut SmallVec<[Arc<Batch>; 4]>) {
        let slot = state.open.vacant_key();
        let batch = Batch::new(Arc::clone(self), id, slot, Timestamp::now(), items);
        state.open.insert((Arc::clone(&batch), Sum::default()));
        let len = batch.len();
        state.in_flight += len as u64;
        state.counts.delivered += len as u64;
        if let Some(member) = state.member(id) {
            member.in_flight += len;
        }
        batches.push(batch);
    }

    /// What was lost since this was last asked.
    pub(super) fn gap(&self) -> Option<Gap> {
        let mut state = self.state.lock();
        let dropped = self.log.lock().dropped(self.reader());
        let lost = dropped - std::mem::replace(&mut state.lost, dropped);
        (lost > 0).then_some(Gap::Lost(lost))
    }
}

/// Settlement.
impl Group {
    /// Whether somebody waits for settlements.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.get()
    }

    /// From now on each settlement tells.
    pub(super) fn tell_settlements(&self) {
        self.asked.set(true);
    }

    /// A publish found the group at its bound: looks for settlements that were not told. True if
    /// that made room.
    ///
    /// Who is at work on a batch tells when it is done, or when it comes for the next: told one by
    /// one, each ack would wake a publisher for one message. Unless the publish `insists`; then, or
    /// if nobody is at work, each settlement tells from now on, if the publish will `wait`.
    pub(super) fn make_room(&self, wait: bool, insist: bool, resume: &mut Vec<Arc<TopicState>>) -> bool {
        let mut state = self.state.lock();
        let at_work = !state.members.is_empty() && state.members.iter().all(|member| member.waker.is_none());
        if wait && !insist && at_work {
            return false;
        }
        if wait {
            self.asked.set(true);
        }
        let mut after = After::default();
        let mut change = self.collect_open(&mut state, &mut after);
        self.drop_expired(&mut state, &mut change);
        let progress = change.messages < 0;
        self.apply(change, &mut after);
        resume.append(&mut after.resume);
        self.finish(state, after);
        progress
    }

    /// Discards what expired at the head of the log: at the bound, it must not keep others out.
    fn drop_expired(&self, state: &mut State, change: &mut Change) {
        let now = Timestamp::now();
        let mut log = self.log.lock();
        while log.next(self.reader()).is_some_and(|message| is_expired(message, now))
            && let Some(run) = log.take(self.reader(), 1)
        {
            state.counts.expired += 1;
            change.remove(Sum { messages: 1, bytes: run.segment.bytes(run.start, 1) });
        }
    }

    /// Settles one delivery in full view: all but an ack that nobody asks for, and the last of a
    /// batch. An ack has been counted by its batch already.
    pub(super) fn settle(&self, batch: &Batch, index: u32, settlement: Settlement) -> Settle {
        if self.is_closed() {
            return Settle::from(closed());
        }
        let mut after = After::default();
        let mut change = Change::default();
        let mut state = self.state.lock();
        if state.deleted {
            return Settle::done();
        }
        if settlement != Settlement::Ack {
            batch.count(index);
        }
        // Counted as acked, like everything the counter says; what else it is follows.
        state.collect(batch.slot, &mut change, &mut after);
        if settlement == Settlement::Ack {
            self.depart(&mut state, batch.message(index));
        } else {
            state.counts.acked -= 1;
            let mut queued = batch.again(index);
            match settlement {
                Settlement::Release => {
                    queued.attempts -= 1;
                    self.put_back(&mut state, queued, None, &mut change);
                }
                Settlement::Retry { after: wait, failure } => {
                    state.remember(failure, &mut queued);
                    let retry = state.settings.retry;
                    if retry.is_exhausted(queued.attempts) {
                        let failure = exhausted(&queued, retry.max_attempts());
                        self.give_up(&mut state, queued, failure, &mut after);
                    } else {
                        state.counts.retried += 1;
                        let wait = wait.unwrap_or_else(|| retry.backoff(queued.attempts));
                        self.put_back(&mut state, queued, Some(wait), &mut change);
                    }
                }
                Settlement::Reject(failure) => {
                    state.remember(Some(failure.clone()), &mut queued);
                    self.give_up(&mut state, queued, failure, &mut after);
                }
                Settlement::Ack => {}
            }
        }
        // A message may be ready now, or be due sooner than the members that wait think.
        if !state.ready.is_empty() || state.timer.is_some() {
            state.wake_one(&mut after);
        }
        self.apply(change, &mut after);
        self.rest(&state);
        self.finish(state, after);
        self.tell_drain();
        Settle::done()
    }

    fn put_back(&self, state: &mut State, mut queued: Queued, wait: Option<Duration>, change: &mut Change) {
        change.add(queued.entry.size);
        if self.ordered {
            state.lanes.set_in_flight(&queued, false);
        }
        match wait {
            Some(wait) if !wait.is_zero() => {
                queued.due = self.shared.clock.tick_after(wait);
                state.delay(self.shared.clock.tick(), queued);
            }
            _ => state.ready.push_front(queued),
        }
    }

    fn give_up(&self, state: &mut State, queued: Queued, failure: Failure, after: &mut After) {
        state.counts.dead_lettered += 1;
        self.depart(state, &queued.entry.message);
        after.dead.push((queued, failure, Timestamp::now()));
    }

    /// A message from the log, or anew: it is ready, waits for its time, or waits behind its key.
    fn arrive(&self, state: &mut State, queued: Queued) {
        let queued = if self.ordered { state.lanes.arrive(queued) } else { Some(queued) };
        if let Some(queued) = queued {
            self.dispatch(state, queued);
        }
    }

    fn dispatch(&self, state: &mut State, mut queued: Queued) {
        let wait = queued.entry.message.deliver_at().map(|time| time.since(Timestamp::now()));
        match wait.filter(|wait| !wait.is_zero()) {
            Some(wait) => {
                queued.due = self.shared.clock.tick_after(wait);
                state.delay(self.shared.clock.tick(), queued);
            }
            None => state.ready.push_back(queued),
        }
    }

    /// A message is done with: the next of its key may go.
    fn depart(&self, state: &mut State, message: &Message) {
        if self.ordered
            && let Some(next) = state.lanes.leave(message.key())
        {
            self.dispatch(state, next);
        }
    }

    fn collect_all(&self, state: &mut State, after: &mut After) {
        let change = self.collect_open(state, after);
        self.apply(change, after);
        self.rest(state);
    }

    fn collect_open(&self, state: &mut State, after: &mut After) -> Change {
        let mut change = Change::default();
        let mut slots = SmallVec::<[usize; 16]>::new();
        slots.extend(state.open.iter().map(|(slot, _)| slot));
        for slot in slots {
            state.collect(slot, &mut change, after);
        }
        change
    }

    /// Tells the log what the group holds no longer.
    fn apply(&self, change: Change, after: &mut After) {
        if change.messages != 0 || change.bytes != 0 {
            after.resume.append(&mut self.log.lock().held(self.reader(), change.messages, change.bytes));
        }
    }

    /// Nobody asks any more: batches may keep their acks to themselves again.
    fn rest(&self, state: &State) {
        if !self.is_asked() {
            return;
        }
        let needed = self.ordered
            || !self.shared.is_open()
            || state.members.iter().any(|member| member.full && member.waker.is_some())
            || self.log.lock().is_stalled_by(self.reader());
        self.asked.set(needed);
    }

    /// Releases the lock, then does what must not be done under it.
    fn finish(&self, state: MutexGuard<'_, State>, after: After) {
        let dead_letter = if after.dead.is_empty() { None } else { state.settings.dead_letter.clone() };
        drop(state);
        for (queued, failure, last) in after.dead {
            let first = queued.story.as_ref().map_or(last, |story| story.first);
            let letter = DeadLetter {
                message: queued.entry.message.clone(),
                topic: queued.entry.topic.clone(),
                group: self.id.clone(),
                failure,
                attempts: queued.attempts,
                first,
                last,
            };
            self.shared.bury(letter, dead_letter.as_ref());
        }
        after.wakers.into_iter().for_each(Waker::wake);
        after.resume.into_iter().for_each(|topic| topic.resume(&self.shared, false));
    }

    /// A drain may have waited for this.
    fn tell_drain(&self) {
        if self.shared.is_closing() {
            self.shared.progress.notify_waiters();
        }
    }
}

/// The reason of a message that ran out of attempts: the last failure's, if one was given.
fn exhausted(queued: &Queued, max_attempts: u32) -> Failure {
    let last = queued.story.as_ref().and_then(|story| story.failure.as_ref());
    let reason = match last {
        Some(failure) => format!("max_attempts ({max_attempts}): {}", failure.reason()),
        None => format!("max_attempts ({max_attempts})"),
    };
    let failure = Failure::new(reason);
    match last.and_then(Failure::status) {
        Some(status) => failure.with_status(status),
        None => failure,
    }
}

impl Member {
    fn waits(&self) -> bool {
        self.waker.is_some() && !self.full
    }
}

impl State {
    fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.id == id)
    }

    /// Wakes one member that waits for messages.
    fn wake_one(&mut self, after: &mut After) {
        if let Some(member) = self.members.iter_mut().find(|member| member.waits()) {
            member.woken = true;
            after.wakers.extend(member.waker.take());
        }
    }

    /// Moves what has become due to the messages that are ready.
    fn fire(&mut self, now: u64) {
        let Some(timer) = &mut self.timer else { return };
        let ready = &mut self.ready;
        timer.fire(now, |queued| ready.push_back(queued));
        if timer.is_empty() {
            self.timer = None;
        }
    }

    fn delay(&mut self, now: u64, queued: Queued) {
        self.timer.get_or_insert_with(|| Box::new(Wheel::new(now))).insert(queued.due, queued);
    }

    /// Takes over what a batch counted since the last time.
    fn collect(&mut self, slot: usize, change: &mut Change, after: &mut After) {
        let Some((batch, collected)) = self.open.get_mut(slot) else { return };
        let settled = batch.settled();
        let new = Sum { messages: settled.messages - collected.messages, bytes: settled.bytes - collected.bytes };
        if new == Sum::default() {
            return;
        }
        *collected = settled;
        let (id, done) = (batch.member, settled.messages == batch.len() as u64);
        if done {
            self.open.remove(slot);
        }
        change.remove(new);
        self.in_flight -= new.messages;
        self.counts.acked += new.messages;
        if let Some(member) = self.member(id) {
            member.in_flight -= new.messages as usize;
            if member.full {
                after.wakers.extend(member.waker.take());
            }
        }
    }

    fn in_flight_sum(&self) -> Sum {
        self.open.iter().fold(Sum::default(), |sum, (_, (batch, collected))| {
            let bytes: u64 = (0..batch.len() as u32).map(|index| batch.size(index)).sum();
            Sum {
                messages: sum.messages + batch.len() as u64 - collected.messages,
                bytes: sum.bytes + bytes - collected.bytes,
            }
        })
    }

    fn remember(&mut self, failure: Option<Failure>, queued: &mut Queued) {
        if let Some(failure) = failure {
            self.last_error = Some(failure.reason().into());
            if let Some(story) = &mut queued.story {
                story.failure = Some(failure);
            }
        }
    }
}
