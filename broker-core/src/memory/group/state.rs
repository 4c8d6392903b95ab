//! What stands under a group's lock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

use slab::Slab;
use smallvec::SmallVec;

use crate::memory::batch::Batch;
use crate::memory::entry::{Place, Queued, Story};
use crate::memory::lanes::Lanes;
use crate::memory::tally::Sum;
use crate::memory::topics::TopicState;
use crate::memory::wheel::Wheel;
use crate::{Counts, Failure, Gap, GroupSettings, Timestamp};

pub(super) struct State {
    pub(super) settings: GroupSettings,
    /// Messages to deliver before those in the log: retries that are due, replays, redriven ones.
    pub(super) ready: VecDeque<Queued>,
    /// Retained messages that were delayed and are due, in the order of their places: each comes after
    /// what the log has from before it was due, as it does for who reads them again.
    pub(super) due: VecDeque<Queued>,
    /// Messages due later.
    pub(super) timer: Option<Box<Wheel<Queued>>>,
    /// The waiting member that sleeps until the timer's next tick.
    pub(super) timekeeper: Option<u64>,
    /// Whether members wait that know of no timer.
    pub(super) untold: bool,
    pub(super) lanes: Lanes,
    /// When it is worth looking for what has expired of all these: when the first does, and not too soon after
    /// the last look.
    pub(super) expiry: Option<Timestamp>,
    pub(super) look_from: Option<Timestamp>,
    /// The last that was told of a failure: the next may be the same.
    pub(super) story: Option<Arc<Story>>,
    pub(super) members: Vec<Member>,
    pub(super) last_member: u64,
    /// Batches with unsettled deliveries, and what was collected of each.
    pub(super) open: Slab<(Arc<Batch>, Sum)>,
    pub(super) in_flight: u64,
    pub(super) counts: Counts,
    pub(super) lost: u64,
    /// The place up to which the past lacks messages, until it has been handed out so far.
    pub(super) missing: Option<Place>,
    /// A gap in the past that nobody was told of.
    pub(super) gap: Option<Gap>,
    pub(super) last_error: Option<Arc<str>>,
    pub(super) deleted: bool,
}

pub(super) struct Member {
    pub(super) id: u64,
    pub(super) max_in_flight: usize,
    pub(super) in_flight: usize,
    pub(super) waker: Option<Waker>,
    /// Whether it waits for its own settlements rather than for messages.
    pub(super) full: bool,
    /// Whether it was woken for messages and has not come yet.
    pub(super) woken: bool,
}

/// What is to be done once the group's lock is released.
#[derive(Default)]
pub(super) struct After {
    pub(super) wakers: SmallVec<[Waker; 2]>,
    pub(super) resume: Vec<Arc<TopicState>>,
    pub(super) dead: Vec<(Queued, Failure, Timestamp)>,
}

/// Change of what the group holds outside the log.
#[derive(Default)]
pub(super) struct Change {
    pub(super) messages: i64,
    pub(super) bytes: i64,
}

impl Change {
    pub(super) fn add(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes += bytes as i64;
    }

    pub(super) fn remove(&mut self, sum: Sum) {
        self.messages -= sum.messages as i64;
        self.bytes -= sum.bytes as i64;
    }
}

/// Mostly the last: what is due comes in order.
fn insert(due: &mut VecDeque<Queued>, place: Place, queued: Queued) {
    let at = due.partition_point(|other| other.entry.place() < Some(place));
    due.insert(at, queued);
}

impl Member {
    pub(super) fn waits(&self) -> bool {
        self.waker.is_some() && !self.full
    }
}

impl State {
    pub(super) fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.id == id)
    }

    /// Wakes one member that waits for messages.
    pub(super) fn wake_one(&mut self, after: &mut After) {
        if let Some(member) = self.members.iter_mut().find(|member| member.waits()) {
            member.woken = true;
            after.wakers.extend(member.waker.take());
            self.timekeeper.take_if(|keeper| *keeper == member.id);
        }
    }

    /// Messages may be ready now, or due sooner than the members that wait think.
    pub(super) fn wake_for_ready(&mut self, after: &mut After) {
        if !self.ready.is_empty() || !self.due.is_empty() {
            self.wake_one(after);
        }
        self.keep_time(after);
    }

    /// Wakes a member that waits if none of them sleeps until the timer's next tick: it will. Of a timer
    /// that is new all are told, so that others look after it should that member not be polled.
    pub(super) fn keep_time(&mut self, after: &mut After) {
        if self.timer.is_some() && std::mem::take(&mut self.untold) {
            self.timekeeper = None;
            after.wakers.extend(self.members.iter_mut().filter(|member| !member.full).filter_map(|m| m.waker.take()));
        } else if self.timer.is_some() && self.timekeeper.is_none() {
            self.wake_one(after);
        }
    }

    /// Moves what has become due to the messages that are ready.
    pub(super) fn fire(&mut self, now: u64) {
        let Some(timer) = &mut self.timer else { return };
        let (ready, due) = (&mut self.ready, &mut self.due);
        timer.fire(now, |queued| match queued.place_of_first() {
            Some(place) => insert(due, place, queued),
            None => ready.push_back(queued),
        });
        if timer.is_empty() {
            self.timer = None;
        }
    }

    /// A message that was delayed is due already.
    pub(super) fn is_due(&mut self, place: Place, queued: Queued) {
        insert(&mut self.due, place, queued);
    }

    /// A message is about to be ready: what became due before it goes before it.
    pub(super) fn pass(&mut self, place: Place) {
        self.fire(place.tick);
        while let Some(queued) = self.due.pop_front_if(|queued| queued.entry.place() <= Some(place)) {
            self.ready.push_back(queued);
        }
    }

    /// Whether the past was handed out just now up to where it has its gap.
    pub(super) fn reaches_gap(&mut self) -> bool {
        let next = self.ready.front().and_then(|queued| queued.entry.place());
        match self.missing {
            Some(missing) if next.is_none_or(|next| next > missing) => {
                (self.missing, self.gap) = (None, Some(Gap::Unknown));
                true
            }
            _ => false,
        }
    }

    pub(super) fn delay(&mut self, now: u64, queued: Queued) {
        self.untold |= self.timer.is_none();
        let timer = self.timer.get_or_insert_with(|| Box::new(Wheel::new(now)));
        if timer.next().is_none_or(|next| queued.due < next) {
            self.timekeeper = None;
        }
        timer.insert(queued);
    }

    /// Takes over what a batch counted since the last time.
    pub(super) fn collect(&mut self, slot: usize, change: &mut Change, after: &mut After) {
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

    pub(super) fn in_flight_sum(&self) -> Sum {
        self.open.iter().fold(Sum::default(), |sum, (_, (batch, collected))| {
            let bytes: u64 = batch.indices().flatten().map(|index| batch.size(index)).sum();
            Sum {
                messages: sum.messages + batch.len() as u64 - collected.messages,
                bytes: sum.bytes + bytes - collected.bytes,
            }
        })
    }

    /// Remembers of a message that comes back when it was `first` delivered, and its last failure.
    pub(super) fn remember(&mut self, first: Timestamp, failure: Option<Failure>, queued: &mut Queued) {
        if let Some(failure) = &failure
            && self.last_error.as_deref() != Some(failure.reason())
        {
            self.last_error = Some(failure.reason().into());
        }
        let story = match &queued.story {
            Some(story) if failure.is_none() || story.failure == failure => return,
            Some(story) => Story { first: story.first, failure },
            None => Story { first, failure },
        };
        if self.story.as_deref() != Some(&story) {
            self.story = Some(Arc::new(story));
        }
        queued.story.clone_from(&self.story);
    }
}
