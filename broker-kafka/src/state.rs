//! What a member holds: its partitions, its retries, its letters, and how it ends. No I/O, no lock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use broker_core::{DeadLetter, Error, Message, Result, Timestamp, Topic};
use slab::Slab;
use tokio::sync::oneshot;

use crate::admin::Partition;
use crate::lot::{Entry, Lot};
use crate::progress::Progress;
use crate::record::Retried;
use crate::registry::Entry as GroupEntry;

#[derive(Default)]
pub(crate) struct State {
    lots: Slab<Lot>,
    /// The lot to begin with.
    rotation: usize,
    /// Handed out and not settled.
    pub(crate) out: usize,
    /// Messages on their way to other topics, of lots that are here or gone.
    pub(crate) moving: usize,
    pub(crate) timers: BinaryHeap<Reverse<Timer>>,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) ending: Option<Ending>,
    /// The polling thread is gone, and has committed what was settled.
    pub(crate) finished: bool,
    /// The broker was closed: settling is `Closed`.
    pub(crate) closed: bool,
    /// It was given a partition once.
    pub(crate) takes_part: bool,
    pub(crate) reader: Option<Waker>,
    pub(crate) closers: Vec<Waker>,
    /// The polling thread stopped reading because too much was held.
    pub(crate) starved: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Ending {
    /// Until when deliveries in flight are waited for.
    pub(crate) deadline: Instant,
    /// What the reader is told; `None` is a quiet end.
    pub(crate) error: Option<Error>,
    /// Its group is gone, and nobody will be given what is settled late.
    pub(crate) deleted: bool,
}

/// So long from now, or as far off as a clock is sure to go: a wait is anybody's to choose.
pub(crate) fn instant_after(wait: Duration) -> Instant {
    Instant::now() + wait.min(Duration::from_secs(100 * 365 * 24 * 3600))
}

/// A retry that is due later.
pub(crate) struct Timer {
    pub(crate) due: Instant,
    pub(crate) lot: Place,
    pub(crate) entry: Entry,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

/// Where a lot is, and which it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    index: usize,
    id: u64,
}

/// A message on its way to another topic: its record is settled when it has arrived.
pub(crate) struct Transfer {
    pub(crate) place: Place,
    pub(crate) seq: u64,
    /// The original.
    pub(crate) message: Message,
    /// It was one that could not be delivered.
    pub(crate) unreadable: bool,
    pub(crate) topic: Topic,
    /// What arrives there.
    pub(crate) copy: Message,
    /// The one reader that it is for there.
    pub(crate) kept_for: Option<String>,
    pub(crate) kind: TransferKind,
}

pub(crate) enum TransferKind {
    /// To the dead-letter topic; whoever settled it may wait to hear.
    Dead(Option<oneshot::Sender<Result<()>>>),
    /// To a retry topic.
    Retry(Box<Retried>),
}

/// A delivery handed out.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) place: Place,
    pub(crate) topic: Topic,
    pub(crate) entry: Entry,
}

impl Item {
    pub(crate) fn attempt(&self) -> u32 {
        self.entry.failed.saturating_add(1)
    }
}

/// Messages and bytes of one partition that are held at most.
const MAX_HELD: usize = 4096;
const MAX_HELD_BYTES: usize = 8 << 20;

impl State {
    pub(crate) fn lot(&mut self, place: Place) -> Option<&mut Lot> {
        self.lots.get_mut(place.index).filter(|lot| lot.id == place.id)
    }

    /// The lot, if it still takes settlements.
    pub(crate) fn open_lot(&mut self, place: Place) -> Option<&mut Lot> {
        self.lot(place).filter(|lot| !lot.sealed)
    }

    pub(crate) fn has_ready(&self) -> bool {
        self.lots.iter().any(|(_, lot)| !lot.leaving && !lot.ready.is_empty())
    }

    /// Up to `room` deliveries, the partitions taking turns at being first.
    pub(crate) fn hand_out(&mut self, room: usize, entry: &GroupEntry) -> Vec<Item> {
        let ready: usize = self.lots.iter().map(|(_, lot)| lot.ready.len()).sum();
        let mut items = Vec::with_capacity(room.min(ready));
        let now = Timestamp::now();
        let places: Vec<usize> = self.lots.iter().map(|(index, _)| index).collect();
        self.rotation = self.rotation.wrapping_add(1);
        let turn = self.rotation.checked_rem(places.len()).unwrap_or(0);
        for index in places.iter().skip(turn).chain(places.iter().take(turn)) {
            let Some(lot) = self.lots.get_mut(*index).filter(|lot| !lot.leaving) else { continue };
            while items.len() < room
                && let Some(oldest) = lot.ready.oldest()
                // What has expired, too: a commit has to say that it is settled.
                && lot.tracker.hand_out(oldest)
                && let Some(mut next) = lot.ready.pop()
            {
                if next.message.expires_at().is_some_and(|time| time <= now) {
                    entry.counts.expired.fetch_add(1, Ordering::Relaxed);
                    lot.finish(next.seq, &next.message);
                    continue;
                }
                lot.out += 1;
                next.first.get_or_insert(now);
                let place = Place { index: *index, id: lot.id };
                let topic = next.origin.as_ref().unwrap_or(&lot.partition.0).clone();
                items.push(Item { place, topic, entry: next });
            }
        }
        self.out += items.len();
        items
    }

    /// A partition is this member's.
    pub(crate) fn add(&mut self, lot: impl FnOnce(u64) -> Lot) -> Place {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let index = self.lots.insert(lot(id));
        self.takes_part = true;
        Place { index, id }
    }

    /// It is not any more.
    pub(crate) fn remove(&mut self, place: Place) {
        if let Some(lot) = self.lot(place) {
            let out = lot.out;
            self.lots.remove(place.index);
            self.out -= out;
            self.timers.retain(|Reverse(timer)| timer.lot != place);
        }
    }

    /// All partitions are somebody else's.
    pub(crate) fn lose(&mut self) {
        let places: Vec<Place> = self.lots.iter().map(|(index, lot)| Place { index, id: lot.id }).collect();
        places.into_iter().for_each(|place| self.remove(place));
    }

    /// Its log was cut: the partition as it is from now on, and where to read on.
    pub(crate) fn cut(&mut self, place: Place, end: i64) -> Option<(Place, Partition, i64)> {
        let mut anew = self.lot(place)?.cut(end);
        let (partition, from) = (anew.partition.clone(), anew.tracker.watermark()?);
        self.remove(place);
        let place = self.add(|id| {
            anew.id = id;
            anew
        });
        Some((place, partition, from))
    }

    /// It is to go: nothing of it is handed out any more.
    pub(crate) fn let_go(&mut self, place: Place) {
        if let Some(lot) = self.lot(place) {
            lot.leave();
        }
    }

    pub(crate) fn is_quiet(&mut self, place: Place) -> bool {
        self.lot(place).is_none_or(|lot| lot.is_quiet())
    }

    /// What cannot be delivered and may be sent to the dead letters' topic now.
    pub(crate) fn next_unreadable(&mut self) -> Option<(Place, u64, DeadLetter)> {
        self.lots.iter_mut().find_map(|(index, lot)| {
            let (seq, letter) = lot.next_unreadable()?;
            Some((Place { index, id: lot.id }, seq, letter))
        })
    }

    /// Whether more of it may be read.
    pub(crate) fn has_room(&mut self, place: Place) -> bool {
        let room = self
            .lot(place)
            .is_some_and(|lot| !lot.leaving && lot.tracker.open() < MAX_HELD + lot.out && lot.bytes < MAX_HELD_BYTES);
        self.starved |= !room;
        room
    }

    /// What is to be committed: what changed since the last commit, of all partitions.
    pub(crate) fn commits(&mut self) -> Vec<(Partition, Progress)> {
        let free = |lot: &Lot| lot.dirty && lot.transactions == 0 && lot.unanswered == 0;
        let changed = self.lots.iter_mut().filter(|(_, lot)| free(lot));
        changed
            .filter_map(|(_, lot)| {
                let commit = lot.commit()?;
                lot.unanswered += 1;
                Some(commit)
            })
            .collect()
    }

    /// Whether there is something to commit that waits for the answer to a commit before.
    pub(crate) fn is_held_back(&self) -> bool {
        self.lots.iter().any(|(_, lot)| lot.dirty && lot.unanswered > 0)
    }

    /// Whether a commit of `places`, or of any, is not answered.
    pub(crate) fn is_committing(&self, places: Option<&[Place]>) -> bool {
        self.lots.iter().any(|(index, lot)| lot.unanswered > 0 && is_among(places, Place { index, id: lot.id }))
    }

    /// A commit of these partitions was answered.
    pub(crate) fn answered(&mut self, partitions: &[Partition]) {
        let carried = self.lots.iter_mut().filter(|(_, lot)| partitions.contains(&lot.partition));
        carried.for_each(|(_, lot)| lot.unanswered = lot.unanswered.saturating_sub(1));
    }

    /// What is to be committed for the last time, of `places` or of all: also what was sent before,
    /// because whether the server took it is not known yet. What is settled from then on would be in no commit, and is
    /// refused. What changed elsewhere goes along: in the rebalance that follows the server takes no commit.
    pub(crate) fn last_commits(&mut self, places: Option<&[Place]>) -> Vec<(Partition, Progress)> {
        let free = self.lots.iter_mut().filter(|(_, lot)| lot.transactions == 0);
        free.filter_map(|(index, lot)| {
            let last = is_among(places, Place { index, id: lot.id });
            lot.sealed |= last;
            if (lot.dirty && lot.unanswered == 0) || (last && (lot.dirty || lot.sent)) { lot.commit() } else { None }
        })
        .collect()
    }

    /// The last commit of `places`, or of all, is to be made again: until then they take settlements.
    pub(crate) fn unseal(&mut self, places: Option<&[Place]>) {
        let again = self.lots.iter_mut().filter(|(index, lot)| is_among(places, Place { index: *index, id: lot.id }));
        again.for_each(|(_, lot)| lot.sealed = false);
    }

    /// A commit of these partitions was not taken: what it said of them is to be said again. Nothing is unsealed by
    /// that: the server may have taken a later commit, the last one.
    pub(crate) fn not_committed(&mut self, partitions: &[Partition]) {
        let carried = self.lots.iter_mut().filter(|(_, lot)| partitions.contains(&lot.partition));
        carried.for_each(|(_, lot)| lot.dirty = true);
    }

    /// All is to be committed, also what is as it was: the group's settings travel with it.
    pub(crate) fn commit_all(&mut self) {
        self.lots.iter_mut().for_each(|(_, lot)| lot.dirty = true);
    }

    pub(crate) fn take_transfers(&mut self) -> Vec<Transfer> {
        std::mem::take(&mut self.transfers)
    }

    /// The partitions that are here.
    pub(crate) fn partitions(&self) -> impl Iterator<Item = &Partition> {
        self.lots.iter().map(|(_, lot)| &lot.partition)
    }

    /// How far each of them is.
    pub(crate) fn progress(&self) -> Vec<(Partition, Progress)> {
        let progress = |lot: &Lot| Some((lot.partition.clone(), lot.tracker.progress()?));
        self.lots.iter().filter_map(|(_, lot)| progress(lot)).collect()
    }

    /// Until when deliveries are waited for, if it ends.
    pub(crate) fn ending(&self) -> Option<Instant> {
        self.ending.as_ref().map(|ending| ending.deadline)
    }

    /// Whether a partition is to go, and can.
    pub(crate) fn can_let_go(&self) -> bool {
        self.lots.iter().any(|(_, lot)| lot.leaving && lot.is_quiet())
    }

    /// Nothing is held any more.
    pub(crate) fn clear(&mut self) {
        self.lots.clear();
        self.timers.clear();
    }

    /// Whether it was given a partition, or will be given none.
    pub(crate) fn takes_part(&self) -> bool {
        self.takes_part || self.ending.is_some() || self.finished
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_settled(&self) -> bool {
        self.out == 0 && self.moving == 0
    }
}

fn is_among(places: Option<&[Place]>, place: Place) -> bool {
    places.is_none_or(|places| places.contains(&place))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A partition of which one record is acked.
    fn acked(state: &mut State, number: i32) -> (Place, Partition) {
        let partition = (Topic::new("orders").unwrap(), number);
        let place = state.add(|id| Lot::new(id, partition.clone(), Some(Progress::default()), 1000, false));
        ack_another(state, place);
        (place, partition)
    }

    fn ack_another(state: &mut State, place: Place) {
        let lot = state.open_lot(place).unwrap();
        let (offset, message) = (lot.tracker.watermark().unwrap(), Message::new("1"));
        let seq = lot.admit(offset, message.clone()).unwrap();
        assert!(lot.tracker.hand_out(seq));
        lot.finish(seq, &message);
    }

    fn offsets(commits: Vec<(Partition, Progress)>) -> Vec<(i32, i64)> {
        commits.into_iter().map(|((_, number), progress)| (number, progress.watermark)).collect()
    }

    fn refused(state: &mut State, partitions: &[Partition]) {
        state.answered(partitions);
        state.not_committed(partitions);
    }

    #[test]
    fn a_commit_that_failed_says_its_own_again_and_unseals_nothing() {
        let mut state = State::default();
        let ((going, first), (staying, second)) = (acked(&mut state, 0), acked(&mut state, 1));
        // In the background, of both; its failure is heard of after the last commit of one was taken.
        assert_eq!(offsets(state.commits()), [(0, 1), (1, 1)]);
        assert_eq!(offsets(state.last_commits(Some(&[going]))), [(0, 1)]);
        refused(&mut state, &[first.clone(), second.clone()]);
        assert!(state.open_lot(going).is_none(), "its last commit is made");
        assert!(state.open_lot(staying).is_some());
        assert_eq!(offsets(state.commits()), [(0, 1), (1, 1)]);
        // Of one only. While a commit is not answered none follows it.
        state.commit_all();
        assert_eq!(offsets(state.commits()), []);
        assert!(state.is_held_back());
        refused(&mut state, std::slice::from_ref(&second));
        assert_eq!(offsets(state.commits()), [(1, 1)]);
        state.answered(&[first, second]);
        state.commit_all();
        assert!(state.open_lot(going).is_none());
        assert_eq!(offsets(state.commits()), [(0, 1), (1, 1)]);
    }

    /// A partition of an ordered group, with 200 bytes of room in its commits.
    fn ordered() -> (State, GroupEntry, Place) {
        let mut state = State::default();
        let entry = GroupEntry::new(broker_core::GroupOptions::new().with_ordered(true).resolve(None).unwrap());
        let partition = (Topic::new("orders").unwrap(), 0);
        let place = state.add(|id| Lot::new(id, partition, Some(Progress::default()), 200, true));
        (state, entry, place)
    }

    /// Takes what is ready and acks it, until nothing is.
    fn ack_all(state: &mut State, place: Place, entry: &GroupEntry) -> Vec<u64> {
        let mut acked = Vec::new();
        loop {
            let items = state.hand_out(usize::MAX, entry);
            if items.is_empty() {
                return acked;
            }
            for item in items {
                let lot = state.open_lot(place).unwrap();
                lot.out -= 1;
                lot.finish(item.entry.seq, &item.entry.message);
                state.out -= 1;
                acked.push(item.entry.seq);
            }
        }
    }

    /// Every second record has the key of one that is slow. Its settlement leaves the next of its key as the oldest, with no
    /// room to hand out any other.
    #[test]
    fn the_next_of_a_slow_key_is_handed_out_where_there_is_room_for_no_other() {
        let (mut state, entry, place) = ordered();
        let lot = state.lot(place).unwrap();
        for offset in 0..500 {
            let key = if offset % 2 == 0 { "slow".to_owned() } else { offset.to_string() };
            lot.admit(offset, Message::new("1").with_key(key));
        }
        let slow = state.hand_out(1, &entry).remove(0);
        ack_all(&mut state, place, &entry);
        assert!(state.has_ready(), "no room is left");
        state.out -= 1;
        let lot = state.lot(place).unwrap();
        lot.out -= 1;
        lot.finish(slow.entry.seq, &slow.entry.message);
        ack_all(&mut state, place, &entry);
        assert_eq!(
            state.lot(place).unwrap().tracker.progress(),
            Some(Progress { watermark: 500, ..Progress::default() })
        );
    }

    /// What has expired is settled as all else: only where a commit has room to say so.
    #[test]
    fn what_has_expired_takes_no_room_that_a_commit_has_not() {
        let (mut state, entry, place) = ordered();
        let lot = state.lot(place).unwrap();
        for offset in 0..1_000 {
            let message = match offset % 2 {
                0 => Message::new("1").with_key("slow"),
                _ => Message::new("1").with_expires_at(Timestamp::from_millis(1)),
            };
            lot.admit(offset, message);
        }
        assert_eq!(state.hand_out(usize::MAX, &entry).len(), 1);
        let said = state.lot(place).unwrap().tracker.progress().unwrap().encode();
        assert!(said.len() <= 200 * 4 / 3 + 2, "{} bytes", said.len());
    }

    /// What cannot be read is settled as all else: only where a commit has room to say so, and all of it in the end.
    #[test]
    fn what_cannot_be_read_takes_no_room_that_a_commit_has_not() {
        let (mut state, entry, place) = ordered();
        let lot = state.lot(place).unwrap();
        let garbage = Message::new("1");
        for offset in 0..1_000 {
            if offset % 2 == 0 {
                lot.admit(offset, Message::new("1").with_key("slow"));
            } else {
                lot.admit_apart(offset, |attempts| DeadLetter {
                    message: garbage.clone(),
                    topic: Topic::new("orders").unwrap(),
                    group: None,
                    failure: broker_core::Failure::new("it could not be decoded"),
                    attempts,
                    first: Timestamp::now(),
                    last: Timestamp::now(),
                });
            }
        }
        let bury = |state: &mut State| {
            let mut buried = 0;
            while let Some((place, seq, _)) = state.next_unreadable() {
                state.lot(place).unwrap().finish_apart(seq, &garbage);
                buried += 1;
            }
            buried
        };
        let mut buried = bury(&mut state);
        let said = state.lot(place).unwrap().tracker.progress().unwrap().encode();
        assert!(buried > 0 && said.len() <= 200 * 4 / 3 + 2, "{buried} buried, {} bytes", said.len());
        for _ in 0..500 {
            let next = state.hand_out(1, &entry).remove(0);
            let lot = state.lot(place).unwrap();
            lot.out -= 1;
            lot.finish(next.entry.seq, &next.entry.message);
            state.out -= 1;
            buried += bury(&mut state);
        }
        let lot = state.lot(place).unwrap();
        assert_eq!((buried, lot.bytes), (500, 0));
        assert_eq!(lot.tracker.progress().unwrap().watermark, 1_000);
    }

    #[test]
    fn a_last_commit_that_is_made_again_has_what_was_acked_between() {
        let mut state = State::default();
        let ((one, first), (other, _)) = (acked(&mut state, 0), acked(&mut state, 1));
        let sealed = |state: &mut State| [one, other].map(|place| state.open_lot(place).is_none());
        // What stays goes along, and is not sealed.
        assert_eq!(offsets(state.last_commits(Some(&[one]))), [(0, 1), (1, 1)]);
        assert_eq!(sealed(&mut state), [true, false]);
        assert_eq!(offsets(state.last_commits(Some(&[other]))), [(1, 1)], "it was sent, and may have been lost");
        assert_eq!(sealed(&mut state), [true, true]);
        state.not_committed(&[first]);
        state.unseal(Some(&[one]));
        assert_eq!(sealed(&mut state), [false, true], "the other's last commit is made");
        ack_another(&mut state, one);
        assert_eq!(offsets(state.last_commits(Some(&[one]))), [(0, 2)]);
    }
}
