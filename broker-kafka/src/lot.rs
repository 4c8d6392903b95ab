//! One partition in one generation, as a member has it: what is ready, what waits for its key, what
//! is settled.

use std::collections::VecDeque;

use broker_core::{DeadLetter, Message, Timestamp, Topic};
use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::admin::Partition;
use crate::progress::Progress;
use crate::ready::Ready;
use crate::record::Retried;
use crate::tracker::{Admission, Tracker};

/// A record to be delivered.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Its number in the tracker.
    pub(crate) seq: u64,
    pub(crate) message: Message,
    /// Attempts that failed.
    pub(crate) failed: u32,
    /// When it was first handed out, as far as is known.
    pub(crate) first: Option<Timestamp>,
    /// Where it was published, of a record in a retry topic.
    pub(crate) origin: Option<Topic>,
}

#[derive(Debug)]
pub(crate) struct Lot {
    /// Nobody else's, ever: a partition that comes back is another lot.
    pub(crate) id: u64,
    pub(crate) partition: Partition,
    pub(crate) tracker: Tracker,
    /// May be handed out now.
    pub(crate) ready: Ready,
    /// Ordered: what waits behind the one of its key that is ready, out or due later. A key is here
    /// while it is busy.
    lanes: Option<FxHashMap<Bytes, VecDeque<Entry>>>,
    /// What cannot be delivered, until it is on the way to the dead letters' topic.
    unreadable: VecDeque<(u64, DeadLetter)>,
    /// Handed out and not settled.
    pub(crate) out: usize,
    /// On the way to another topic: the dead letters', a retry topic.
    pub(crate) moving: usize,
    /// Transactions under way that settle some of it: until they end no other commit speaks of it, which
    /// would count over what they say.
    pub(crate) transactions: usize,
    /// Bytes of messages held.
    pub(crate) bytes: usize,
    /// It goes to another member: nothing is handed out any more.
    pub(crate) leaving: bool,
    /// Something was settled since the last commit.
    pub(crate) dirty: bool,
    /// A commit was sent.
    pub(crate) sent: bool,
    /// Commits in the background that are not answered. While there is one no other is sent, nor a transaction begun: what the
    /// server could not take at once is sent again, and would come after what is sent now.
    pub(crate) unanswered: usize,
    /// Its last commit is made: what is settled now would be in none, and is refused.
    pub(crate) sealed: bool,
}

impl Lot {
    pub(crate) fn new(
        id: u64,
        partition: Partition,
        committed: Option<Progress>,
        capacity: usize,
        ordered: bool,
    ) -> Self {
        Self {
            id,
            partition,
            tracker: Tracker::new(committed, capacity),
            ready: Ready::default(),
            lanes: ordered.then(FxHashMap::default),
            unreadable: VecDeque::new(),
            out: 0,
            moving: 0,
            transactions: 0,
            bytes: 0,
            leaving: false,
            dirty: false,
            sent: false,
            unanswered: 0,
            sealed: false,
        }
    }

    /// The partition anew, whose log ends at `end` now and goes on from there: what is settled below stays so, and is to be
    /// said at once. Its id is still to be given.
    pub(crate) fn cut(&self, end: i64) -> Self {
        let progress = self.tracker.progress().map(|progress| progress.cut(end));
        let (partition, ordered) = (self.partition.clone(), self.lanes.is_some());
        Self { dirty: true, ..Self::new(0, partition, progress, self.tracker.capacity(), ordered) }
    }

    /// A record has arrived. `None` if it was settled before.
    pub(crate) fn admit(&mut self, offset: i64, message: Message) -> Option<u64> {
        let Admission::Take { seq, failed } = self.tracker.admit(offset) else {
            self.dirty = true;
            return None;
        };
        self.bytes += message.size();
        let entry = Entry { seq, message, failed, first: None, origin: None };
        let lane = self.lanes.as_mut().zip(entry.message.key());
        match lane.map(|(lanes, key)| (lanes.get_mut(key), key.clone())) {
            Some((Some(waiting), _)) => waiting.push_back(entry),
            Some((None, key)) => {
                if let Some(lanes) = &mut self.lanes {
                    lanes.insert(key, VecDeque::new());
                }
                self.ready.arrive(entry);
            }
            None => self.ready.arrive(entry),
        }
        Some(seq)
    }

    /// A record of a retry topic has arrived. `None` if it was settled before; otherwise it is for the caller
    /// to make it ready when it is due.
    pub(crate) fn admit_retried(&mut self, offset: i64, message: Message, retried: Retried) -> Option<Entry> {
        let Admission::Take { seq, failed } = self.tracker.admit(offset) else {
            self.dirty = true;
            return None;
        };
        self.bytes += message.size();
        let failed = retried.failed.saturating_add(failed);
        Some(Entry { seq, message, failed, first: Some(retried.first), origin: Some(retried.topic) })
    }

    /// Whether the order of its key depends on this message.
    pub(crate) fn keeps_order(&self, message: &Message) -> bool {
        self.lanes.is_some() && message.key().is_some()
    }

    /// A record is settled for good; the next of its key is ready.
    pub(crate) fn finish(&mut self, seq: u64, message: &Message) {
        self.tracker.finish(seq);
        self.dirty = true;
        self.bytes = self.bytes.saturating_sub(message.size());
        // What came through a retry topic has no lane here: it has no key, or its group no order.
        let Some((lanes, key)) = self.lanes.as_mut().zip(message.key()) else { return };
        match lanes.get_mut(key).map(VecDeque::pop_front) {
            Some(Some(next)) => self.ready.come_back(next),
            Some(None) => drop(lanes.remove(key)),
            None => {}
        }
    }

    /// A record has arrived that is for another group.
    pub(crate) fn pass_over(&mut self, offset: i64) {
        self.tracker.pass_over(offset);
        self.dirty = true;
    }

    /// A record has arrived that cannot be delivered: it is nobody's, and waits for no key. `letter` is what it becomes,
    /// made of the attempts that failed.
    pub(crate) fn admit_apart(&mut self, offset: i64, letter: impl FnOnce(u32) -> DeadLetter) {
        match self.tracker.admit(offset) {
            Admission::Take { seq, failed } => {
                let letter = letter(failed);
                self.bytes += letter.message.size();
                self.unreadable.push_back((seq, letter));
            }
            Admission::Skip => self.dirty = true,
        }
    }

    /// The oldest of them that is to be sent away, where a commit has room to say so.
    pub(crate) fn next_unreadable(&mut self) -> Option<(u64, DeadLetter)> {
        let (seq, _) = self.unreadable.front()?;
        if !self.tracker.hand_out(*seq) {
            return None;
        }
        self.unreadable.pop_front()
    }

    /// Such a record is settled.
    pub(crate) fn finish_apart(&mut self, seq: u64, message: &Message) {
        self.tracker.finish(seq);
        self.dirty = true;
        self.bytes = self.bytes.saturating_sub(message.size());
    }

    /// It goes to another member.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
        self.ready.clear();
        self.unreadable.clear();
    }

    /// What a commit is to say, which is sent now.
    pub(crate) fn commit(&mut self) -> Option<(Partition, Progress)> {
        let progress = self.tracker.progress()?;
        self.dirty = false;
        self.sent = true;
        Some((self.partition.clone(), progress))
    }

    /// Whether it can be let go: nothing of it is anywhere else.
    pub(crate) fn is_quiet(&self) -> bool {
        self.out == 0 && self.moving == 0
    }
}
