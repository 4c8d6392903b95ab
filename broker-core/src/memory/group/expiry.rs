//! What a group holds outside the log expires where it waits.

use std::collections::VecDeque;
use std::time::Duration;

use super::Group;
use super::state::{After, Change, State};
use crate::Timestamp;
use crate::memory::entry::{Queued, earlier};
use crate::memory::tally::Sum;

/// Messages gone through for each millisecond until the next look.
const MESSAGES_A_MILLI: usize = 4_096;

impl Group {
    /// When something the group has is known to expire, if anything: its publishers look again then.
    pub(in crate::memory) fn next_expiry(&self) -> Option<Timestamp> {
        let held = self.state.lock().next_expiry();
        earlier(held, self.log.lock().next_expiry())
    }

    /// [`expire`](Self::expire) on its own: tells the log, and whoever may go on.
    pub(super) fn expire_all(&self, state: &mut State, now: Timestamp, after: &mut After) {
        let mut change = Change::default();
        self.expire(state, now, &mut change);
        if change.messages == 0 {
            return;
        }
        self.apply(change, after);
        state.wake_for_ready(after);
    }

    /// Discards what has expired of what is ready, due later, or waits behind its key; what is in flight
    /// is its member's. Does nothing if the last look was too recent for its cost.
    pub(super) fn expire(&self, state: &mut State, now: Timestamp, change: &mut Change) {
        if state.next_expiry().is_none_or(|look| look > now) {
            return;
        }
        let behind = state.lanes.take_expired(now);
        let out = state.take_expired(now);
        for queued in behind.iter().chain(&out) {
            state.counts.expired += 1;
            change.remove(Sum { messages: 1, bytes: queued.entry.size() });
        }
        for queued in out {
            self.depart(state, &queued.entry.message);
        }
    }
}

impl State {
    /// Notes when a message that the group is about to hold expires.
    pub(super) fn note_expiry(&mut self, queued: &Queued) {
        self.expiry = earlier(self.expiry, queued.entry.message.expires_at());
    }

    fn next_expiry(&self) -> Option<Timestamp> {
        self.expiry.max(self.look_from.filter(|_| self.expiry.is_some()))
    }

    /// Takes what has expired of what is not behind another message, and finds when to look again.
    fn take_expired(&mut self, now: Timestamp) -> VecDeque<Queued> {
        let mut taken = take_expired(&mut self.ready, now);
        taken.extend(take_expired(&mut self.due, now));
        if let Some(timer) = &mut self.timer {
            taken.extend(timer.take_if(|queued| queued.entry.is_expired(now)));
            if timer.is_empty() {
                self.timer = None;
            }
        }
        let timed = self.timer.iter().flat_map(|timer| timer.items());
        let held = self.ready.iter().chain(&self.due).chain(timed).chain(self.lanes.behind());
        let mut count = 0;
        let first = held.inspect(|_| count += 1).filter_map(|queued| queued.entry.message.expires_at()).min();
        let pause = Duration::from_millis((count / MESSAGES_A_MILLI) as u64);
        (self.expiry, self.look_from) = (first, Some(now.after(pause)));
        taken
    }
}

/// Takes what has expired out of a queue.
pub(in crate::memory) fn take_expired(queue: &mut VecDeque<Queued>, now: Timestamp) -> VecDeque<Queued> {
    if !queue.iter().any(|queued| queued.entry.is_expired(now)) {
        return VecDeque::new();
    }
    let (expired, rest) = std::mem::take(queue).into_iter().partition(|queued| queued.entry.is_expired(now));
    *queue = rest;
    expired
}
