//! Deliveries handed out together; their acks are tallied (`tally`) and told together too.

use std::iter;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::entry::{Entry, Queued, Segment};
use super::group::Group;
use super::log::{Parts, Taken};
use super::tally::{Sum, Tally};
use crate::{Deliveries, Message, Settle, Settlement, Timestamp, Topic};

pub(super) struct Batch {
    group: Arc<Group>,
    /// The member it was handed to, and its place among the group's open batches.
    pub(super) member: u64,
    pub(super) slot: usize,
    /// When it was handed out.
    pub(super) at: Timestamp,
    items: Items,
    len: u64,
    settled: Tally,
}

pub(super) enum Items {
    /// Straight from the log: each the first attempt. Delivery *i* of part *p* has the index
    /// `p × MAX_BATCH + i`, so that finding it takes no search.
    Parts(Parts),
    /// Messages with a history of their own.
    List(SmallVec<[Queued; 2]>),
}

/// Deliveries a batch has at most: what one tally speaks for. A part has no more either.
pub(super) const MAX_BATCH: usize = 256;

impl Batch {
    pub(super) fn new(group: Arc<Group>, member: u64, slot: usize, at: Timestamp, items: Items) -> Arc<Self> {
        let len = match &items {
            Items::Parts(parts) => parts.iter().map(|part| part.len).sum(),
            Items::List(list) => list.len(),
        } as u64;
        Arc::new(Self { group, member, slot, at, items, len, settled: Tally::new() })
    }

    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// The indices of all deliveries, in order.
    pub(super) fn indices(&self) -> impl Iterator<Item = Range<u32>> {
        let (parts, list) = match &self.items {
            Items::Parts(parts) => (parts.as_slice(), 0),
            Items::List(list) => (&[] as &[Taken], list.len() as u32),
        };
        let of_part = |(number, part): (usize, &Taken)| {
            let first = (number * MAX_BATCH) as u32;
            first..first + part.len as u32
        };
        parts.iter().enumerate().map(of_part).chain(iter::once(0..list))
    }

    /// What has been settled so far.
    pub(super) fn settled(&self) -> Sum {
        self.settled.sum()
    }

    /// Counts delivery `index` as settled; tells what has been settled with it.
    pub(super) fn count(&self, index: u32) -> Sum {
        self.settled.add(self.size(index))
    }

    pub(super) fn size(&self, index: u32) -> u64 {
        match &self.items {
            Items::Parts(parts) => in_part(parts, index).map_or(0, |(segment, slot)| segment.bytes(slot, 1)),
            Items::List(list) => list.get(index as usize).map_or(0, |queued| queued.entry.size()),
        }
    }

    /// Delivery `index`, to be queued again after this attempt.
    pub(super) fn again(&self, index: u32) -> Queued {
        let (attempts, story) = match self.queued(index) {
            Some(queued) => (queued.attempts, queued.story.clone()),
            None => (1, None),
        };
        Queued { entry: self.share(index), due: 0, attempts, story }
    }

    fn queued(&self, index: u32) -> Option<&Queued> {
        match &self.items {
            Items::Parts(_) => None,
            Items::List(list) => list.get(index as usize),
        }
    }

    /// The message of delivery `index`, to be held beside the batch.
    fn share(&self, index: u32) -> Arc<Entry> {
        self.of(index, |segment, slot| segment.share(slot), |queued| Arc::clone(&queued.entry))
    }

    fn of<'a, T>(
        &'a self,
        index: u32,
        run: impl FnOnce(&'a Segment, usize) -> Option<T>,
        list: impl FnOnce(&'a Queued) -> T,
    ) -> T {
        let found = match &self.items {
            Items::Parts(parts) => in_part(parts, index).and_then(|(segment, slot)| run(segment, slot)),
            Items::List(queued) => queued.get(index as usize).map(list),
        };
        #[expect(
            clippy::expect_used,
            reason = "a delivery is made with an index of its batch, and a run of written slots"
        )]
        found.expect("a delivery of this batch")
    }
}

#[inline]
fn in_part(parts: &Parts, index: u32) -> Option<(&Segment, usize)> {
    let index = index as usize;
    parts.get(index / MAX_BATCH).map(|part| (&*part.segment, part.start + index % MAX_BATCH))
}

impl Deliveries for Batch {
    fn message(&self, index: u32) -> &Message {
        self.of(index, Segment::message, |queued| &queued.entry.message)
    }

    fn topic(&self, index: u32) -> &Topic {
        self.of(index, Segment::topic, |queued| &queued.entry.topic)
    }

    fn attempt(&self, index: u32) -> u32 {
        self.queued(index).map_or(1, |queued| queued.attempts)
    }

    fn settle(&self, index: u32, settlement: Settlement) -> Settle {
        // A group that is ordered, or closed, always asks.
        if matches!(settlement, Settlement::Ack) {
            let settled = self.count(index);
            let told = settled.messages == self.len || self.group.is_asked();
            if !told {
                return Settle::done();
            }
        }
        self.group.settle(self, index, settlement)
    }

    fn abandon(&self, index: u32) {
        // Once the broker has closed this has no effect, as it should: that is no failure of the message.
        drop(self.group.settle(self, index, Settlement::Retry { after: None, failure: None }));
    }
}
