//! The members of a group: they come, receive, wait and go.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Context;

use smallvec::SmallVec;

use crate::memory::batch::{Batch, Items, MAX_BATCH};
use crate::memory::entry::Queued;
use crate::memory::log::Parts;
use crate::memory::tally::Sum;
use crate::{Delivery, Error, Gap, Result, Timestamp};

use super::Group;
use super::state::{After, Change, Member, State};

/// Entries looked at in one go for one that may be delivered.
const MAX_INTAKE: usize = 4096;
/// Milliseconds after which another member looks at the timer, if the one that sleeps for it has not come.
const GRACE: u64 = 50;
/// Milliseconds such a member sleeps at most.
const MAX_SLEEP: u64 = 1_000;

/// Whether a member received something, and what it is to do.
pub(in crate::memory) enum Received {
    /// And whether this member, the only one, has emptied the group.
    Some {
        drained: bool,
    },
    /// Come back when woken, or at this tick.
    Wait(Option<u64>),
    /// Come back at once: there is more to look at.
    Again,
    Ended,
}

impl Group {
    pub(in crate::memory) fn join(&self, max_in_flight: usize) -> u64 {
        let mut state = self.state.lock();
        state.last_member += 1;
        let id = state.last_member;
        state.members.push(Member { id, max_in_flight, in_flight: 0, waker: None, full: false, woken: false });
        self.tell_crowd(&state);
        id
    }

    /// A member goes; what it holds can still be settled. Tells whether it was the last.
    pub(in crate::memory) fn leave(&self, id: u64) -> bool {
        let mut state = self.state.lock();
        let mut after = After::default();
        state.members.retain(|member| member.id != id);
        self.tell_crowd(&state);
        // It may have been woken for messages that nobody else knows of.
        state.wake_one(&mut after);
        state.timekeeper.take_if(|keeper| *keeper == id);
        state.keep_time(&mut after);
        let last = state.members.is_empty();
        self.finish(state, after);
        self.tell_drain();
        last
    }

    fn tell_crowd(&self, state: &State) {
        // The place of a deleted group in the log may be another's by now.
        if !state.deleted {
            self.log.lock().set_crowd(self.reader(), state.members.len() > 1);
        }
    }

    /// A member no longer waits: what it was woken for goes to another.
    pub(in crate::memory) fn stop_waiting(&self, id: u64) {
        let mut state = self.state.lock();
        let mut after = After::default();
        if let Some(member) = state.member(id) {
            member.waker = None;
            if std::mem::take(&mut member.woken) {
                state.wake_one(&mut after);
            }
        }
        state.timekeeper.take_if(|keeper| *keeper == id);
        state.keep_time(&mut after);
        self.finish(state, after);
    }

    /// There are entries in the log again.
    pub(in crate::memory) fn notify(&self) {
        let mut state = self.state.lock();
        let mut after = After::default();
        state.wake_one(&mut after);
        self.finish(state, after);
    }

    /// Hands out up to `limit` deliveries.
    pub(in crate::memory) fn receive(
        self: &Arc<Self>,
        id: u64,
        cx: &mut Context<'_>,
        deliveries: &mut Vec<Delivery>,
        limit: usize,
    ) -> Result<Received> {
        let mut batches = SmallVec::<[Arc<Batch>; 4]>::new();
        let mut after = After::default();
        let mut state = self.state.lock();
        let received = self.fill(&mut state, id, cx, limit, &mut batches, &mut after);
        self.finish(state, after);
        for batch in batches {
            for indices in batch.indices() {
                deliveries.extend(indices.map(|index| Delivery::new(Arc::<Batch>::clone(&batch), index)));
            }
        }
        received
    }

    pub(super) fn fill(
        self: &Arc<Self>,
        state: &mut State,
        id: u64,
        cx: &mut Context<'_>,
        limit: usize,
        batches: &mut SmallVec<[Arc<Batch>; 4]>,
        after: &mut After,
    ) -> Result<Received> {
        // Before the deletion: a broker that has gone has cleared its groups too, and that is an end.
        if self.is_closed() {
            return Ok(Received::Ended);
        }
        if state.deleted {
            return Err(Error::not_found(format!(
                "{} was deleted",
                self.id.as_ref().map_or_else(String::new, |id| format!("group {id}"))
            )));
        }
        if let Some(member) = state.member(id) {
            (member.woken, member.full, member.waker) = (false, false, None);
        }
        state.timekeeper.take_if(|keeper| *keeper == id);
        let window = self.window(state, id, limit, after);
        if window == 0 {
            if let Some(member) = state.member(id) {
                (member.full, member.waker) = (true, Some(cx.waker().clone()));
            }
            state.keep_time(after);
            return Ok(Received::Wait(None));
        }
        let now = self.shared.clock.tick();
        state.fire(now);
        let mut taken = 0;
        let mut looked_at = 0;
        while taken < window && looked_at < MAX_INTAKE {
            if !state.ready.is_empty() {
                taken += self.hand_out_ready(state, id, (window - taken).min(MAX_BATCH), batches, after);
                if state.reaches_gap() {
                    if taken > 0 {
                        // It comes after what was received when it is told.
                        break;
                    }
                    // Who has nothing from before begins after it.
                    state.gap = None;
                }
                continue;
            }
            let mut parts = Parts::new();
            let mut limit = (window - taken).min(MAX_BATCH);
            let mut log = self.log.lock();
            // What is delayed has its place among what the log holds.
            if let Some(place) = state.due.front().and_then(|queued| queued.entry.place()) {
                limit = log.older_than(self.reader(), place.tick, limit);
                if limit == 0 {
                    drop(log);
                    state.pass(place);
                    continue;
                }
            } else if state.timer.is_some() && self.shared.options.retention.is_some() {
                limit = log.older_than(self.reader(), now + 1, limit);
            }
            let found = log.take(self.reader(), limit, &mut parts);
            drop(log);
            let Some(first) = parts.first() else { break };
            looked_at += found;
            if self.ordered || first.scheduled {
                for part in parts {
                    for entry in (part.start..part.start + part.len).filter_map(|slot| part.segment.share(slot)) {
                        self.arrive(state, Queued::new(entry));
                    }
                }
            } else {
                taken += found;
                self.hand_out(state, id, Items::Parts(parts), batches);
            }
        }
        if taken > 0 {
            // The next member sees to the rest, or is told of what comes.
            if state.members.iter().any(Member::waits) && self.has_more(state) {
                state.wake_one(after);
            }
            state.keep_time(after);
            let drained = taken < window && state.members.len() == 1 && state.gap.is_none();
            return Ok(Received::Some { drained });
        }
        if self.has_more(state) {
            return Ok(Received::Again);
        }
        // Before this one waits: it knows.
        state.keep_time(after);
        if let Some(member) = state.member(id) {
            member.waker = Some(cx.waker().clone());
        }
        let Some(due) = state.timer.as_ref().and_then(|timer| timer.next()) else { return Ok(Received::Wait(None)) };
        if state.timekeeper.is_none() {
            state.timekeeper = Some(id);
            return Ok(Received::Wait(Some(due)));
        }
        // The other may be alive and not polled, and what comes sooner is told to it alone.
        Ok(Received::Wait(Some((due + GRACE).min(now + MAX_SLEEP))))
    }

    /// Whether there is more to look at; if not, the log will tell of the next entry.
    pub(super) fn has_more(&self, state: &State) -> bool {
        !state.ready.is_empty() || !state.due.is_empty() || !self.log.lock().wait(self.reader())
    }

    /// How many deliveries a member may be handed now.
    pub(super) fn window(&self, state: &mut State, id: u64, limit: usize, after: &mut After) -> usize {
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

    pub(super) fn hand_out_ready(
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
        let missing = state.missing;
        // Up to where the past has its gap, if it has one.
        let goes = |next: &mut Queued| missing.is_none() || next.entry.place() <= missing;
        while list.len() < limit
            && let Some(mut queued) = state.ready.pop_front_if(goes)
        {
            if queued.entry.is_expired(now) {
                state.counts.expired += 1;
                change.remove(Sum { messages: 1, bytes: queued.entry.size() });
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
        if state.ready.is_empty() && state.ready.capacity() > 1_024 {
            state.ready = VecDeque::new();
        }
        let taken = list.len();
        if taken > 0 {
            self.hand_out(state, id, Items::List(list), batches);
        }
        taken
    }

    pub(super) fn hand_out(
        self: &Arc<Self>,
        state: &mut State,
        id: u64,
        items: Items,
        batches: &mut SmallVec<[Arc<Batch>; 4]>,
    ) {
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
    pub(in crate::memory) fn gap(&self) -> Option<Gap> {
        let mut state = self.state.lock();
        if state.deleted {
            // Its place in the log may be another's by now.
            return None;
        }
        if let Some(gap) = state.gap.take() {
            return Some(gap);
        }
        let dropped = self.log.lock().dropped(self.reader());
        let lost = dropped.saturating_sub(std::mem::replace(&mut state.lost, dropped));
        (lost > 0).then_some(Gap::Lost(lost))
    }
}
