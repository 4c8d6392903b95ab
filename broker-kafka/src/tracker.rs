//! Which records of one partition are settled: a pure state machine.
//!
//! Kafka remembers one offset for a group and partition: everything below it is done. Our acks are
//! exact and come in any order, so that beyond that *watermark* some records are done and some are
//! not. The tracker keeps both, and says what a commit must carry: the watermark, the ranges done
//! beyond it and the failed attempts of what is not ([`Progress`]). Confluent's Parallel Consumer
//! does the like.

use std::collections::VecDeque;

use crate::progress::{MAX_ATTEMPTS, Progress, entry_bytes};

/// The records of one partition in one generation, from the watermark on.
#[derive(Debug)]
pub(crate) struct Tracker {
    slots: VecDeque<Slot>,
    /// The sequence number of the first slot; a slot keeps its number while others go.
    first: u64,
    /// The offset after the last record admitted; `None` before the first one where the group had
    /// committed nothing.
    position: Option<i64>,
    /// What an earlier commit said about records not admitted yet.
    restored: Progress,
    /// Slots not settled.
    open: usize,
    /// Ranges of settled slots beyond the watermark.
    runs: usize,
    /// Open slots with failed attempts.
    failed: usize,
    /// Slots handed out that have not failed yet: each may become a run or a failed one.
    untried: usize,
    /// Bytes that a commit's progress may take.
    capacity: usize,
}

#[derive(Debug)]
struct Slot {
    offset: i64,
    state: State,
    /// Attempts that failed.
    failed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not handed out, or given back.
    Waiting,
    /// Handed out.
    Out,
    /// Settled for good.
    Done,
}

/// What to do with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It was settled before: the commit says so, or it came twice.
    Skip,
    /// It is to be delivered; it failed so often before.
    Take { seq: u64, failed: u32 },
}

impl Tracker {
    /// Goes on where a commit left off; `None` if nothing was ever committed.
    pub(crate) fn new(committed: Option<Progress>, capacity: usize) -> Self {
        let position = committed.as_ref().map(|progress| progress.watermark);
        let restored = committed.unwrap_or_default();
        let (first, open, runs, failed, untried) = (0, 0, 0, 0, 0);
        Self { slots: VecDeque::new(), first, position, restored, open, runs, failed, untried, capacity }
    }

    /// A record at `offset` has arrived; they arrive in order.
    pub(crate) fn admit(&mut self, offset: i64) -> Admission {
        if self.is_behind(offset) {
            return Admission::Skip;
        }
        let done = self.restored.take_done(offset);
        let failed = if done { 0 } else { self.restored.take_attempts(offset) };
        let seq = self.first + self.slots.len() as u64;
        self.slots.push_back(Slot { offset, state: State::Waiting, failed });
        self.position = Some(offset + 1);
        self.failed += usize::from(failed > 0);
        self.open += 1;
        if done {
            self.finish(seq);
            return Admission::Skip;
        }
        Admission::Take { seq, failed }
    }

    /// A record at `offset` has arrived that is for somebody else. Nothing is said of it: should it come again, it is as
    /// much for somebody else.
    pub(crate) fn pass_over(&mut self, offset: i64) {
        self.restored.take_done(offset);
        self.restored.take_attempts(offset);
        self.position = Some(self.position.map_or(offset + 1, |position| position.max(offset + 1)));
    }

    /// Hands a record out, unless a commit could then have more to say than it can carry.
    pub(crate) fn hand_out(&mut self, seq: u64) -> bool {
        let Some(index) = self.index(seq) else { return false };
        let Some(slot) = self.slots.get(index) else { return false };
        let untried = slot.failed == 0;
        if untried && !self.has_room(slot.offset) {
            return false;
        }
        self.untried += usize::from(untried);
        if let Some(slot) = self.slots.get_mut(index) {
            slot.state = State::Out;
        }
        true
    }

    fn has_room(&self, offset: i64) -> bool {
        let reach = self.position.unwrap_or(offset).max(offset).max(self.restored.end());
        let span = reach.saturating_sub(self.watermark().unwrap_or(offset));
        let entries = self.runs + self.failed + self.untried + self.restored.entries() + 1;
        entries.saturating_mul(entry_bytes(span)) <= self.capacity || self.watermark() == Some(offset)
    }

    /// Settled for good: it will not be delivered again.
    pub(crate) fn finish(&mut self, seq: u64) {
        let Some(index) = self.index(seq) else { return };
        let is_done = |index: Option<usize>| {
            index.and_then(|index| self.slots.get(index)).is_some_and(|slot| slot.state == State::Done)
        };
        let (left, right) = (is_done(index.checked_sub(1)), is_done(Some(index + 1)));
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.state != State::Done) else { return };
        let was_out = slot.state == State::Out;
        slot.state = State::Done;
        self.open -= 1;
        if slot.failed > 0 {
            self.failed -= 1;
        } else if was_out {
            self.untried -= 1;
        }
        self.runs = self.runs + 1 - usize::from(left) - usize::from(right);
        if index == 0 {
            self.runs -= 1;
            while self.slots.front().is_some_and(|slot| slot.state == State::Done) {
                self.slots.pop_front();
                self.first += 1;
            }
        }
    }

    /// Not settled: to be delivered again, as another attempt if this one `failed`.
    pub(crate) fn give_back(&mut self, seq: u64, failed: bool) {
        let Some(index) = self.index(seq) else { return };
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.state == State::Out) else { return };
        slot.state = State::Waiting;
        if slot.failed == 0 {
            self.untried -= 1;
            self.failed += usize::from(failed);
        }
        slot.failed = slot.failed.saturating_add(u32::from(failed));
    }

    /// The first offset not settled: what a commit says. `None` if it is not known yet.
    pub(crate) fn watermark(&self) -> Option<i64> {
        self.slots.front().map(|slot| slot.offset).or(self.position)
    }

    /// Whether `offset` lies before what was admitted already.
    pub(crate) fn is_behind(&self, offset: i64) -> bool {
        self.position.is_some_and(|position| offset < position)
    }

    /// Bytes that a commit's progress may take.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Records admitted and not settled.
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    /// What a commit must carry.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.progress_with(&[])
    }

    /// What it must carry when `settling` (sorted) are settled, too.
    pub(crate) fn progress_with(&self, settling: &[u64]) -> Option<Progress> {
        let is_done = |(seq, slot): &(u64, &Slot)| slot.state == State::Done || settling.binary_search(seq).is_ok();
        let mut slots = (self.first..).zip(&self.slots).skip_while(is_done).peekable();
        let watermark = slots.peek().map(|(_, slot)| slot.offset).or(self.position)?;
        let mut progress = Progress { watermark, ..Progress::default() };
        let mut after_done = false;
        for (seq, slot) in slots {
            let done = is_done(&(seq, slot));
            if !done && slot.failed > 0 {
                progress.attempts.push_back((slot.offset, slot.failed.min(MAX_ATTEMPTS)));
            }
            // Between slots that touch are only offsets that hold no record.
            match progress.done.back_mut().filter(|_| done && after_done) {
                Some(range) => range.end = slot.offset + 1,
                None if done => progress.done.push_back(slot.offset..slot.offset + 1),
                None => {}
            }
            after_done = done;
        }
        progress.append(&self.restored);
        Some(progress)
    }

    fn index(&self, seq: u64) -> Option<usize> {
        usize::try_from(seq.checked_sub(self.first)?).ok().filter(|index| *index < self.slots.len())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const CAPACITY: usize = 3000;

    fn taken(tracker: &mut Tracker, offset: i64) -> u64 {
        match tracker.admit(offset) {
            Admission::Take { seq, .. } => seq,
            Admission::Skip => panic!("{offset} was skipped"),
        }
    }

    #[test]
    fn acks_out_of_order_move_the_watermark_only_where_nothing_is_open_below() {
        let mut tracker = Tracker::new(None, CAPACITY);
        assert_eq!(tracker.watermark(), None);
        let seqs: Vec<_> = (10..15).map(|offset| taken(&mut tracker, offset)).collect();
        assert!(seqs.iter().all(|seq| tracker.hand_out(*seq)));
        for (acked, watermark) in [(3, 10), (1, 10), (0, 12), (2, 14), (4, 15)] {
            tracker.finish(seqs[acked]);
            assert_eq!(tracker.watermark(), Some(watermark), "after acking {acked}");
        }
        assert_eq!(tracker.progress(), Some(Progress { watermark: 15, ..Progress::default() }));
    }

    #[test]
    fn what_a_commit_cannot_carry_is_not_handed_out() {
        let mut tracker = Tracker::new(None, 64);
        let mut out = 0;
        for offset in 0..10_000 {
            let seq = taken(&mut tracker, offset);
            if tracker.hand_out(seq) {
                out += 1;
                // Every second one settled: the worst there is.
                if offset % 2 == 1 {
                    tracker.finish(seq);
                }
            }
        }
        assert!(out > 5, "{out}");
        assert!(tracker.progress().unwrap().encode().len() <= 64 * 4 / 3 + 1);
    }

    #[test]
    fn what_is_about_to_be_settled_is_told_without_settling_it() {
        let mut tracker = Tracker::new(None, CAPACITY);
        let seqs: Vec<_> = (10..15).map(|offset| taken(&mut tracker, offset)).collect();
        assert!(seqs.iter().all(|seq| tracker.hand_out(*seq)));
        tracker.finish(seqs[1]);
        let before = tracker.progress();
        let told = tracker.progress_with(&[seqs[0], seqs[3]]).unwrap();
        assert_eq!((told.watermark, told.done.len(), told.done.front()), (12, 1, Some(&(13..14))));
        assert_eq!(tracker.progress_with(&seqs).unwrap(), Progress { watermark: 15, ..Progress::default() });
        assert_eq!(tracker.progress(), before);
        tracker.finish(seqs[0]);
        tracker.finish(seqs[3]);
        assert_eq!(tracker.progress().unwrap().watermark, 12);
    }

    #[test]
    fn what_is_for_somebody_else_is_not_spoken_of() {
        let mut tracker = Tracker::new(Some(Progress::default()), CAPACITY);
        let mut held = Vec::new();
        for offset in 0..2_000 {
            match offset % 2 {
                0 => held.push(taken(&mut tracker, offset)),
                _ => tracker.pass_over(offset),
            }
        }
        assert_eq!(tracker.progress(), Some(Progress::default()));
        held.into_iter().for_each(|seq| tracker.finish(seq));
        assert_eq!(tracker.progress(), Some(Progress { watermark: 2_000, ..Progress::default() }));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Arrive {
            gap: i64,
        },
        HandOut(prop::sample::Index),
        Ack(prop::sample::Index),
        Fail(prop::sample::Index),
        Release(prop::sample::Index),
        /// The member goes, and another goes on from its last commit.
        Move,
        /// The member is gone without a commit.
        Crash,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0_i64..3).prop_map(|gap| Event::Arrive { gap }),
            4 => any::<prop::sample::Index>().prop_map(Event::HandOut),
            3 => any::<prop::sample::Index>().prop_map(Event::Ack),
            1 => any::<prop::sample::Index>().prop_map(Event::Fail),
            1 => any::<prop::sample::Index>().prop_map(Event::Release),
            1 => Just(Event::Move),
            1 => Just(Event::Crash),
        ]
    }

    fn pick<T: Clone>(index: &prop::sample::Index, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| index.get(from).clone())
    }

    /// The log as it is, and what a user has done with it: the oracle.
    #[derive(Default)]
    struct Oracle {
        log: Vec<i64>,
        acked: BTreeSet<i64>,
        failed: BTreeMap<i64, u32>,
        /// At the last commit.
        committed: (BTreeSet<i64>, BTreeMap<i64, u32>),
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_committed_comes_again(
            events in prop::collection::vec(event(), 1..200), capacity in 20_usize..400,
        ) {
            let mut oracle = Oracle::default();
            let mut tracker = Tracker::new(Some(Progress::default()), capacity);
            let (mut waiting, mut out): (BTreeMap<i64, u64>, BTreeMap<i64, u64>) = Default::default();
            let mut commit = Progress::default();
            let mut next = 0;
            for event in events {
                let handed: Vec<i64> = out.keys().copied().collect();
                match event {
                    Event::Arrive { gap } => {
                        next += 1 + gap;
                        oracle.log.push(next);
                        if let Admission::Take { seq, failed } = tracker.admit(next) {
                            prop_assert_eq!(failed, 0);
                            waiting.insert(next, seq);
                        }
                    }
                    Event::HandOut(index) => {
                        let offsets: Vec<i64> = waiting.keys().copied().collect();
                        if let Some(offset) = pick(&index, &offsets)
                            && tracker.hand_out(waiting[&offset])
                        {
                            out.insert(offset, waiting.remove(&offset).unwrap());
                        }
                    }
                    Event::Ack(index) => {
                        if let Some(offset) = pick(&index, &handed) {
                            tracker.finish(out.remove(&offset).unwrap());
                            oracle.acked.insert(offset);
                            oracle.failed.remove(&offset);
                        }
                    }
                    Event::Fail(index) => {
                        if let Some(offset) = pick(&index, &handed) {
                            let seq = out.remove(&offset).unwrap();
                            tracker.give_back(seq, true);
                            waiting.insert(offset, seq);
                            *oracle.failed.entry(offset).or_default() += 1;
                        }
                    }
                    Event::Release(index) => {
                        if let Some(offset) = pick(&index, &handed) {
                            let seq = out.remove(&offset).unwrap();
                            tracker.give_back(seq, false);
                            waiting.insert(offset, seq);
                        }
                    }
                    Event::Move | Event::Crash => {
                        if matches!(event, Event::Move) {
                            commit = tracker.progress().unwrap();
                            let text = commit.encode();
                            prop_assert!(text.len() <= capacity.max(12) * 4 / 3 + 2, "{} bytes of {capacity}", text.len());
                            commit = Progress::decode(commit.watermark, &text).unwrap();
                            oracle.committed = (oracle.acked.clone(), oracle.failed.clone());
                        } else {
                            (oracle.acked, oracle.failed) = oracle.committed.clone();
                        }
                        tracker = Tracker::new(Some(commit.clone()), capacity);
                        waiting.clear();
                        out.clear();
                        for offset in oracle.log.iter().filter(|offset| **offset >= commit.watermark) {
                            match tracker.admit(*offset) {
                                Admission::Skip => prop_assert!(oracle.acked.contains(offset), "{offset} is lost"),
                                Admission::Take { seq, failed } => {
                                    prop_assert!(!oracle.acked.contains(offset), "{offset} comes again");
                                    prop_assert_eq!(failed, oracle.failed.get(offset).copied().unwrap_or(0));
                                    waiting.insert(*offset, seq);
                                }
                            }
                        }
                        let below = oracle.log.iter().filter(|offset| **offset < commit.watermark);
                        prop_assert!(below.into_iter().all(|offset| oracle.acked.contains(offset)), "below the watermark");
                    }
                }
                prop_assert_eq!(tracker.open(), waiting.len() + out.len());
            }
        }
    }
}
