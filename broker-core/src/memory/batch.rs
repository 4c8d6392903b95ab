//! Deliveries handed out together.
//!
//! An ack is one atomic addition to the batch's own counter; the group is told when the batch is
//! done, or when somebody waits for it (`Group::asked`). The two sides meet as in Dekker's
//! algorithm: an ack adds and then looks whether it was asked, whoever asks sets the flag and then
//! looks at the counters, all sequentially consistent, so that one of them sees the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use super::entry::{Entry, Queued, Segment, Story};
use super::group::Group;
use super::topics::closed;
use crate::{Deliveries, Message, Settle, Settlement, Timestamp, Topic};

/// Bits of the counter for bytes; those above count deliveries.
const BYTES_BITS: u32 = 44;

pub(super) struct Batch {
    group: Arc<Group>,
    /// The member it was handed to, and its place among the group's open batches.
    pub(super) member: u64,
    pub(super) slot: usize,
    /// When it was handed out.
    pub(super) at: Timestamp,
    items: Items,
    /// How many were settled, and their bytes: `count << BYTES_BITS | bytes`.
    settled: AtomicU64,
}

pub(super) enum Items {
    /// Straight from the log: each the first attempt.
    Run { segment: Arc<Segment>, start: usize, len: usize },
    /// Messages with a history of their own.
    List(SmallVec<[Queued; 2]>),
}

/// Deliveries and their bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

impl Batch {
    pub(super) fn new(group: Arc<Group>, member: u64, slot: usize, at: Timestamp, items: Items) -> Arc<Self> {
        Arc::new(Self { group, member, slot, at, items, settled: AtomicU64::new(0) })
    }

    pub(super) fn len(&self) -> usize {
        match &self.items {
            Items::Run { len, .. } => *len,
            Items::List(list) => list.len(),
        }
    }

    /// What has been settled so far.
    pub(super) fn settled(&self) -> Sum {
        unpack(self.settled.load(Ordering::SeqCst))
    }

    /// Counts delivery `index` as settled; tells what has been settled with it.
    pub(super) fn count(&self, index: u32) -> Sum {
        let one = 1 << BYTES_BITS | self.size(index);
        unpack(self.settled.fetch_add(one, Ordering::SeqCst) + one)
    }

    pub(super) fn size(&self, index: u32) -> u64 {
        match &self.items {
            Items::Run { segment, start, .. } => segment.bytes(start + index as usize, 1),
            Items::List(list) => list.get(index as usize).map_or(0, |queued| queued.entry.size),
        }
    }

    /// Delivery `index`, to be queued again after this attempt.
    pub(super) fn again(&self, index: u32) -> Queued {
        let (attempts, first, failure) = match self.queued(index) {
            Some(Queued { attempts, story: Some(story), .. }) => (*attempts, story.first, story.failure.clone()),
            Some(Queued { attempts, .. }) => (*attempts, self.at, None),
            None => (1, self.at, None),
        };
        Queued {
            entry: Arc::clone(self.entry(index)),
            due: 0,
            attempts,
            story: Some(Box::new(Story { first, failure })),
        }
    }

    fn queued(&self, index: u32) -> Option<&Queued> {
        match &self.items {
            Items::Run { .. } => None,
            Items::List(list) => list.get(index as usize),
        }
    }

    pub(super) fn entry(&self, index: u32) -> &Arc<Entry> {
        let entry = match &self.items {
            Items::Run { segment, start, .. } => segment.entry(start + index as usize),
            Items::List(list) => list.get(index as usize).map(|queued| &queued.entry),
        };
        #[expect(
            clippy::expect_used,
            reason = "a delivery is made with an index of its batch, and a run with written slots"
        )]
        entry.expect("a delivery of this batch")
    }
}

fn unpack(packed: u64) -> Sum {
    Sum { messages: packed >> BYTES_BITS, bytes: packed & ((1 << BYTES_BITS) - 1) }
}

impl Deliveries for Batch {
    fn message(&self, index: u32) -> &Message {
        &self.entry(index).message
    }

    fn topic(&self, index: u32) -> &Topic {
        &self.entry(index).topic
    }

    fn attempt(&self, index: u32) -> u32 {
        self.queued(index).map_or(1, |queued| queued.attempts)
    }

    fn settle(&self, index: u32, settlement: Settlement) -> Settle {
        if self.group.is_closed() {
            return Settle::from(closed());
        }
        if settlement == Settlement::Ack && !self.group.ordered {
            let settled = self.count(index);
            if settled.messages == self.len() as u64 || self.group.is_asked() {
                self.group.collect(self);
            }
        } else {
            self.group.settle(self, index, settlement);
        }
        Settle::done()
    }

    fn abandon(&self, index: u32) {
        if !self.group.is_closed() {
            self.group.settle(self, index, Settlement::Retry { after: None, failure: None });
        }
    }
}
