//! What of a partition may be handed out now, the oldest first.
//!
//! Records arrive in order. What comes back (released, due again, the next of its key) comes in any, and goes before what
//! is younger: where a commit has no room to say more, the oldest record of all is the one that may still be handed out,
//! and behind another that may not, it would wait for ever.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::lot::Entry;

#[derive(Debug, Default)]
pub(crate) struct Ready {
    /// In the order of arrival.
    arrived: VecDeque<Entry>,
    back: BinaryHeap<Reverse<BySeq>>,
}

impl Ready {
    /// A record has arrived: it is the youngest.
    pub(crate) fn arrive(&mut self, entry: Entry) {
        self.arrived.push_back(entry);
    }

    /// One that was here, or behind another of its key.
    pub(crate) fn come_back(&mut self, entry: Entry) {
        self.back.push(Reverse(BySeq(entry)));
    }

    /// The number of the oldest.
    pub(crate) fn oldest(&self) -> Option<u64> {
        let back = self.back.peek().map(|Reverse(entry)| entry.0.seq);
        let arrived = self.arrived.front().map(|entry| entry.seq);
        back.into_iter().chain(arrived).min()
    }

    /// The oldest.
    pub(crate) fn pop(&mut self) -> Option<Entry> {
        let first = self.arrived.front().map(|entry| entry.seq);
        match self.back.peek() {
            Some(Reverse(entry)) if first.is_none_or(|first| entry.0.seq < first) => {
                self.back.pop().map(|Reverse(entry)| entry.0)
            }
            _ => self.arrived.pop_front(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.arrived.is_empty() && self.back.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.arrived.len() + self.back.len()
    }

    pub(crate) fn clear(&mut self) {
        self.arrived.clear();
        self.back.clear();
    }
}

/// Ordered by its number.
#[derive(Debug)]
struct BySeq(Entry);

impl PartialEq for BySeq {
    fn eq(&self, other: &Self) -> bool {
        self.0.seq == other.0.seq
    }
}

impl Eq for BySeq {}

impl PartialOrd for BySeq {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for BySeq {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.seq.cmp(&other.0.seq)
    }
}
