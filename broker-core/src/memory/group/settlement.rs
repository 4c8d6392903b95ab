//! How deliveries are settled, and what follows: room, retries, dead letters, the next of a key.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::MutexGuard;
use smallvec::SmallVec;

use crate::memory::batch::Batch;
use crate::memory::entry::{Place, Queued, is_scheduled};
use crate::memory::topics::{TopicState, closed};
use crate::{DeadLetter, Deliveries, Failure, Message, Settle, Settlement, Timestamp};

use super::Group;
use super::state::{After, Change, State};

/// Who is to be told that a group has room or messages, once no lock is held.
#[derive(Default)]
pub(in crate::memory) struct Roused {
    pub(in crate::memory) topics: Vec<Arc<TopicState>>,
    pub(in crate::memory) members: SmallVec<[Waker; 2]>,
}

impl Group {
    /// Whether somebody waits for settlements.
    pub(in crate::memory) fn is_asked(&self) -> bool {
        self.asked.get()
    }

    /// From now on each settlement tells.
    pub(in crate::memory) fn tell_settlements(&self) {
        self.asked.set(true);
    }

    /// A publish found the group at its bound: looks for settlements that were not told. True if
    /// that made room.
    ///
    /// Who is at work on a batch tells when it is done, or when it comes for the next: told one by
    /// one, each ack would wake a publisher for one message. Unless the publish `insists`; then, or
    /// if nobody is at work, each settlement tells from now on, if the publish will `wait`.
    pub(in crate::memory) fn make_room(&self, wait: bool, insist: bool, roused: &mut Roused) -> bool {
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
        self.expire(&mut state, Timestamp::now(), &mut change);
        let progress = change.messages < 0;
        self.apply(change, &mut after);
        if progress {
            state.wake_for_ready(&mut after);
        }
        // The publish holds its topic: nobody is woken before it lets go of it.
        roused.topics.append(&mut after.resume);
        roused.members.append(&mut after.wakers);
        progress
    }

    /// A publish is about to have the group drop its oldest: looks for settlements that were not told. Where
    /// each tells there are none, so that a reader that stands still is looked through once.
    pub(in crate::memory) fn tell_all(&self, roused: &mut Roused) {
        if !self.is_asked() {
            self.make_room(true, true, roused);
        }
    }

    /// Settles one delivery in full view: all but an ack that nobody asks for, and the last of a
    /// batch. An ack has been counted by its batch already.
    pub(in crate::memory) fn settle(&self, batch: &Batch, index: u32, settlement: Settlement) -> Settle {
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
            state.remember(batch.at, failure_of(&settlement), &mut queued);
            match settlement {
                Settlement::Release => {
                    queued.attempts -= 1;
                    self.put_back(&mut state, queued, None, &mut change);
                }
                Settlement::Retry { after: wait, .. } => {
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
                    self.give_up(&mut state, queued, failure, &mut after);
                }
                Settlement::Ack => {}
            }
        }
        state.wake_for_ready(&mut after);
        self.apply(change, &mut after);
        self.rest(&state);
        self.finish(state, after);
        self.tell_drain();
        Settle::done()
    }

    pub(super) fn put_back(&self, state: &mut State, mut queued: Queued, wait: Option<Duration>, change: &mut Change) {
        change.add(queued.entry.size());
        state.note_expiry(&queued);
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

    pub(super) fn give_up(&self, state: &mut State, queued: Queued, failure: Failure, after: &mut After) {
        state.counts.dead_lettered += 1;
        self.depart(state, &queued.entry.message);
        after.dead.push((queued, failure, Timestamp::now()));
    }

    /// A message from the log, or anew: it is ready, waits for its time, or waits behind its key.
    pub(super) fn arrive(&self, state: &mut State, queued: Queued) {
        if let Some(queued) = self.in_turn(state, queued) {
            self.dispatch(state, queued);
        }
    }

    /// The message, unless it waits behind its key.
    pub(super) fn in_turn(&self, state: &mut State, queued: Queued) -> Option<Queued> {
        state.note_expiry(&queued);
        if self.ordered { state.lanes.arrive(queued) } else { Some(queued) }
    }

    pub(super) fn dispatch(&self, state: &mut State, mut queued: Queued) {
        if is_scheduled(&queued.entry.message) && queued.entry.is_expired(Timestamp::now()) {
            // Whoever comes next discards it: it waits for nothing.
            return state.ready.push_back(queued);
        }
        if let Some(place) = queued.entry.place() {
            return self.dispatch_placed(state, place, queued);
        }
        let wait = queued.entry.message.deliver_at().map(|time| time.since(Timestamp::now()));
        match wait.filter(|wait| !wait.is_zero()) {
            Some(wait) => {
                queued.due = self.shared.clock.tick_after(wait);
                state.delay(self.shared.clock.tick(), queued);
            }
            None => state.ready.push_back(queued),
        }
    }

    fn dispatch_placed(&self, state: &mut State, place: Place, mut queued: Queued) {
        let now = self.shared.clock.tick();
        if queued.place_of_first().is_none() {
            state.pass(place);
            state.ready.push_back(queued);
        } else if place.tick > now {
            queued.due = place.tick;
            state.delay(now, queued);
        } else {
            state.is_due(place, queued);
        }
    }

    /// A message is done with: the next of its key may go.
    pub(super) fn depart(&self, state: &mut State, message: &Message) {
        if self.ordered
            && let Some(next) = state.lanes.leave(message.key())
        {
            self.dispatch(state, next);
        }
    }

    pub(super) fn collect_all(&self, state: &mut State, after: &mut After) {
        let change = self.collect_open(state, after);
        self.apply(change, after);
        self.rest(state);
    }

    pub(super) fn collect_open(&self, state: &mut State, after: &mut After) -> Change {
        let mut change = Change::default();
        let mut slots = SmallVec::<[usize; 16]>::new();
        slots.extend(state.open.iter().map(|(slot, _)| slot));
        for slot in slots {
            state.collect(slot, &mut change, after);
        }
        change
    }

    /// Tells the log what the group holds no longer.
    pub(super) fn apply(&self, change: Change, after: &mut After) {
        if change.messages != 0 || change.bytes != 0 {
            after.resume.append(&mut self.log.lock().held(self.reader(), change.messages, change.bytes));
        }
    }

    /// Nobody asks any more: batches may keep their acks to themselves again.
    pub(super) fn rest(&self, state: &State) {
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
    pub(super) fn finish(&self, state: MutexGuard<'_, State>, after: After) {
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
        after.resume.into_iter().for_each(|topic| drop(topic.resume(&self.shared, false)));
    }

    /// A drain may have waited for this.
    pub(super) fn tell_drain(&self) {
        if self.shared.is_closing() {
            self.shared.progress.notify_waiters();
        }
    }
}

fn failure_of(settlement: &Settlement) -> Option<Failure> {
    match settlement {
        Settlement::Retry { failure, .. } => failure.clone(),
        Settlement::Reject(failure) => Some(failure.clone()),
        Settlement::Ack | Settlement::Release => None,
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
