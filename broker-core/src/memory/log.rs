//! The shared log of one filter: a message is appended once, and every group on the filter reads
//! with a cursor of its own.
//!
//! One short mutex around plain data. Publishers append under it, readers take whole runs, and
//! what is paid per reader is paid when that reader moves, never per message: appending spends
//! `room`, which is worked out anew over the readers only when it is used up; readers that wait
//! for an entry are listed, so that waking costs what is woken; a run of entries counts the readers
//! inside it, so that it goes when the slowest has left. A run is plain memory that the publisher
//! writes until a reader takes from it, and shared and unchangeable from then on (`run`).

mod expiry;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use smallvec::SmallVec;

use super::entry::{Entry, Segment, earlier, is_scheduled};
use super::group::Group;
use super::run::{MAX_SEGMENT, Run};
use super::tally::Sum;
use super::topics::TopicState;
use crate::{Backlog, Message, Overflow, Timestamp, Topic, TopicFilter};

/// How long a member that was told may take to come before another is.
const MOMENT: Duration = Duration::from_millis(1);

/// Groups to be told, once no lock is held.
pub(super) type Wake = SmallVec<[Arc<Group>; 4]>;

pub(super) struct Log {
    /// The order in which several logs are locked.
    pub(super) id: u64,
    pub(super) filter: TopicFilter,
    state: Mutex<LogState>,
}

impl Log {
    pub(super) fn new(id: u64, filter: TopicFilter) -> Arc<Self> {
        Arc::new(Self { id, filter, state: Mutex::default() })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, LogState> {
        self.state.lock()
    }
}

#[derive(Default)]
pub(super) struct LogState {
    runs: VecDeque<Run>,
    /// Position of the next entry, and the bytes appended before it.
    tail: u64,
    tail_bytes: u64,
    /// Entries appended since the log was last empty, and in the burst before: how large a segment
    /// is worth making.
    burst: usize,
    last_burst: usize,
    /// When it is worth looking for what has expired: when the first does, and not too soon after the last look.
    expiry: Option<Timestamp>,
    look_from: Option<Timestamp>,
    /// Topics whose publishes may go on because something expired.
    resumed: Vec<Arc<TopicState>>,
    readers: Slab<Reader>,
    /// Readers whose group has several members.
    crowds: usize,
    /// Readers whose cursor is the tail; they are in no run.
    caught_up: usize,
    /// Entries and bytes that can be appended before any reader could reach its bound.
    room: u64,
    room_bytes: u64,
    /// The reader that was found at its bound last.
    blocker: usize,
    /// Readers at their bound that drop their oldest for the next entry, and those for whom it is itself
    /// the oldest they can drop.
    dropping: SmallVec<[usize; 2]>,
    skipping: SmallVec<[usize; 2]>,
    /// Readers to be told of the next entry.
    waiting: SmallVec<[usize; 2]>,
    /// While this is the version of the patterns, the log is the only one that takes the messages of
    /// its topic, and no publish waits: a publish need look nowhere else.
    direct: Option<u64>,
    /// Topics with publishes that wait for room, and the reader they found at its bound.
    stalled: Vec<(usize, Arc<TopicState>)>,
}

struct Reader {
    group: Arc<Group>,
    cursor: u64,
    /// Bytes appended before the cursor.
    cursor_bytes: u64,
    /// What the group holds outside the log: in flight, to be retried, due later.
    held: u64,
    held_bytes: u64,
    backlog: Backlog,
    /// Whether the group has several members.
    crowd: bool,
    /// Entries dropped because the group was at its bound.
    dropped: u64,
    /// Entries that expired before it came to them.
    expired: u64,
    /// Its place in `waiting`, if it is listed there.
    place: Option<usize>,
    /// Where the tail is to come to for it to be told, or for a look at when it was told last.
    tell_at: u64,
    told: Option<Instant>,
}

/// What a publish finds.
pub(super) enum Room {
    Free,
    /// This group is at its bound.
    Full(Arc<Group>, Overflow),
}

/// Entries taken from the log together, segment by segment.
pub(super) type Parts = SmallVec<[Taken; 1]>;

/// Entries of one segment.
pub(super) struct Taken {
    pub(super) segment: Arc<Segment>,
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) scheduled: bool,
}

/// Publishing.
impl LogState {
    /// Groups that receive an entry appended now.
    pub(super) fn readers(&self) -> usize {
        self.readers.len()
    }

    /// Whether a group of several members receives an entry appended now. Members that race a publisher
    /// on other cores for the log take a few entries at a time, each for the price of a batch; one that
    /// lets them run now and then finds them taking many.
    pub(super) fn has_crowd(&self) -> bool {
        self.crowds > 0
    }

    /// Says since which version of the patterns a publish need look nowhere else, if that is so.
    pub(super) fn set_direct(&mut self, version: Option<u64>) {
        self.direct = version;
    }

    /// Whether a publish need look nowhere else, and somebody receives it.
    pub(super) fn is_direct(&self, version: u64) -> bool {
        self.direct == Some(version) && !self.readers.is_empty()
    }

    pub(super) fn has_room(&mut self, size: u64) -> bool {
        matches!(self.room(size, &[]), Room::Free)
    }

    /// Whether an entry of `size` bytes can be appended. Where a group drops its oldest it does so then,
    /// and not for an entry that another refuses; if it holds anything, it is among the `asked`, which had
    /// no settlements to tell.
    pub(super) fn room(&mut self, size: u64, asked: &[Arc<Group>]) -> Room {
        if self.room > 0 && self.room_bytes >= size {
            return Room::Free;
        }
        let (mut room, mut room_bytes) = (u64::MAX, u64::MAX);
        self.dropping.clear();
        // Whoever was at its bound last is the likeliest to be still.
        let keys = self.readers.capacity();
        for key in (self.blocker..keys).chain(0..self.blocker.min(keys)) {
            let Some((left, left_bytes)) = self.left(key, size) else { continue };
            if left > 0 && left_bytes >= size {
                (room, room_bytes) = (room.min(left), room_bytes.min(left_bytes));
            } else if self.expiry.is_some() && self.expire(Timestamp::now()) {
                return self.room(size, asked);
            } else if let Some((group, overflow)) = self.at_bound(key, asked) {
                self.blocker = key;
                return Room::Full(group, overflow);
            } else {
                self.dropping.push(key);
                // Worked out anew for each entry.
                (room, room_bytes) = (0, 0);
            }
        }
        (self.room, self.room_bytes) = (room, room_bytes);
        Room::Free
    }

    fn left(&self, key: usize, size: u64) -> Option<(u64, u64)> {
        let reader = self.readers.get(key)?;
        let messages = self.tail - reader.cursor + reader.held;
        let bytes = self.tail_bytes - reader.cursor_bytes + reader.held_bytes;
        // A group with nothing in it takes one message of any size.
        let max_bytes = if messages == 0 { size.max(reader.backlog.max_bytes()) } else { reader.backlog.max_bytes() };
        Some((reader.backlog.max_messages().saturating_sub(messages), max_bytes.saturating_sub(bytes)))
    }

    /// The group of a reader that is at its bound, unless it is to drop what is before it.
    fn at_bound(&self, key: usize, asked: &[Arc<Group>]) -> Option<(Arc<Group>, Overflow)> {
        let reader = self.readers.get(key)?;
        let overflow = reader.backlog.overflow();
        // What it holds may have been settled without a word.
        let was_asked = || asked.iter().any(|group| Arc::ptr_eq(group, &reader.group));
        let drops = overflow == Overflow::DropOldest && (reader.held == 0 || was_asked());
        (!drops).then(|| (Arc::clone(&reader.group), overflow))
    }

    fn make_way(&mut self, size: u64) {
        while let Some(key) = self.dropping.pop() {
            self.drop_oldest(key, size);
        }
    }

    /// Moves a reader's cursor until an entry of `size` bytes fits behind it. If nothing is left to
    /// drop (the whole bound is in hand), the entry itself is the oldest undelivered one.
    fn drop_oldest(&mut self, key: usize, size: u64) {
        while let Some((left, left_bytes)) = self.left(key, size) {
            if left > 0 && left_bytes >= size {
                return;
            }
            if self.advance(key, 1).is_none() {
                self.skipping.push(key);
                return;
            }
            self.count_dropped(key);
        }
    }

    /// All readers miss a message: whoever published it cannot wait until there is room.
    pub(super) fn miss(&mut self) {
        self.readers.iter_mut().for_each(|(_, reader)| reader.dropped += 1);
    }

    fn count_dropped(&mut self, key: usize) {
        if let Some(reader) = self.readers.get_mut(key) {
            reader.dropped += 1;
        }
    }

    /// Takes a message of a topic that has no other log, for which there is [`room`](Self::room); adds
    /// the groups to be told to `wake`.
    #[inline]
    pub(super) fn append(&mut self, topic: &Topic, message: &mut Option<Message>, size: u64, wake: &mut Wake) {
        if self.readers.is_empty() {
            return drop(message.take());
        }
        self.make_way(size);
        if let Some(scheduled) = message.take_if(|message| is_scheduled(message)) {
            // Each group moves it to its timer: shared from the start, it goes there without being copied.
            return self.append_shared(&Entry::new(topic.clone(), scheduled), wake);
        }
        match self.runs.back_mut().and_then(Run::filling) {
            Some(segment) => segment.push(topic, message, size),
            None => {
                let mut segment = Segment::own(topic, self.next_capacity());
                segment.push(topic, message, size);
                self.add_run(segment);
            }
        }
        self.appended(size, wake);
    }

    /// [`append`](Self::append) for a message that is held elsewhere too.
    pub(super) fn append_shared(&mut self, entry: &Arc<Entry>, wake: &mut Wake) {
        if self.readers.is_empty() {
            return;
        }
        self.make_way(entry.size());
        if !self.runs.back_mut().is_some_and(Run::takes_shared) {
            self.add_run(Segment::shared(self.next_capacity()));
        }
        if let Some(run) = self.runs.back_mut() {
            self.expiry = earlier(self.expiry, run.push_shared(entry));
        }
        self.appended(entry.size(), wake);
    }

    fn next_capacity(&self) -> usize {
        (self.burst + 1).max(self.last_burst).next_power_of_two().min(MAX_SEGMENT)
    }

    fn add_run(&mut self, segment: Segment) {
        self.runs.push_back(Run::new(self.tail, segment));
    }

    #[inline]
    fn appended(&mut self, size: u64, wake: &mut Wake) {
        if let Some(run) = self.runs.back_mut() {
            run.readers += std::mem::take(&mut self.caught_up);
        }
        self.tail += 1;
        self.tail_bytes += size;
        self.burst += 1;
        self.room = self.room.saturating_sub(1);
        self.room_bytes = self.room_bytes.saturating_sub(size);
        if !self.waiting.is_empty() {
            self.tell_waiting(wake);
        }
        while let Some(key) = self.skipping.pop() {
            self.advance(key, 1);
            self.count_dropped(key);
        }
    }

    /// Tells the readers that wait for the tail to come here. One member of a group is told of the first
    /// entry. If it has not come a moment later, being alive but not polled, the next entries tell others:
    /// nobody starves for one that is busy elsewhere, and in a burst few are told in vain.
    fn tell_waiting(&mut self, wake: &mut Wake) {
        let (tail, readers) = (self.tail, &mut self.readers);
        let mut kept = 0;
        self.waiting.retain(|key| {
            let Some(reader) = readers.get_mut(*key) else { return false };
            if reader.tell_at <= tail {
                if !reader.crowd {
                    wake.push(Arc::clone(&reader.group));
                    reader.place = None;
                    return false;
                }
                if reader.told.is_none_or(|told| told.elapsed() >= MOMENT) {
                    wake.push(Arc::clone(&reader.group));
                    reader.told = Some(Instant::now());
                }
                reader.tell_at = tail + ((tail - reader.cursor) / 2).max(1);
            }
            reader.place = Some(kept);
            kept += 1;
            true
        });
    }

    /// Has `topic` told when the reader that was found at its bound has room again.
    pub(super) fn stall(&mut self, topic: &Arc<TopicState>) {
        if !self.stalled.iter().any(|(key, have)| *key == self.blocker && Arc::ptr_eq(have, topic)) {
            self.stalled.push((self.blocker, Arc::clone(topic)));
        }
    }
}

/// Reading.
impl LogState {
    /// Adds a reader at the tail.
    pub(super) fn add_reader(&mut self, group: Arc<Group>, backlog: Backlog) -> usize {
        self.caught_up += 1;
        self.room = 0;
        let (cursor, cursor_bytes) = (self.tail, self.tail_bytes);
        self.readers.insert(Reader {
            group,
            cursor,
            cursor_bytes,
            held: 0,
            held_bytes: 0,
            backlog,
            crowd: false,
            dropped: 0,
            expired: 0,
            place: None,
            tell_at: 0,
            told: None,
        })
    }

    /// Removes a reader; tells whether it was the last, and which topics may go on.
    pub(super) fn remove_reader(&mut self, key: usize) -> (bool, Vec<Arc<TopicState>>) {
        if let Some(reader) = self.readers.try_remove(key) {
            self.crowds -= usize::from(reader.crowd);
            if let Some(place) = reader.place {
                self.waiting.swap_remove(place);
                let moved = self.waiting.get(place).and_then(|key| self.readers.get_mut(*key));
                if let Some(moved) = moved {
                    moved.place = Some(place);
                }
            }
            if reader.cursor == self.tail {
                self.caught_up -= 1;
            } else {
                let index = self.run_of(reader.cursor);
                if let Some(run) = self.runs.get_mut(index) {
                    run.readers -= 1;
                }
            }
            self.trim();
            self.room = 0;
        }
        (self.readers.is_empty(), self.stalled.drain(..).map(|(_, topic)| topic).collect())
    }

    /// Notes whether a reader's group has several members.
    pub(super) fn set_crowd(&mut self, key: usize, crowd: bool) {
        if let Some(reader) = self.readers.get_mut(key) {
            let before = std::mem::replace(&mut reader.crowd, crowd);
            self.crowds = self.crowds - usize::from(before) + usize::from(crowd);
        }
    }

    /// Takes up to `limit` entries for a reader, which now holds them, and adds them to `taken`; tells
    /// how many. All of them have a time to be looked at, or none.
    ///
    /// What the log still fills is taken only if there is nothing before it: the fastest reader
    /// decides how the log is cut up, the others find what it cut.
    pub(super) fn take(&mut self, key: usize, limit: usize, taken: &mut Parts) -> usize {
        let mut count = 0;
        while count < limit
            && let Some(cursor) = self.readers.get(key).map(|reader| reader.cursor)
            && let index = self.run_of(cursor)
            && let Some(run) = self.runs.get_mut(index)
            && taken.last().is_none_or(|last| run.is_shared() && run.scheduled == last.scheduled)
        {
            let start = (cursor - run.base) as usize;
            let len = (limit - count).min(run.segment().len() - start);
            taken.push(Taken { segment: run.share(), start, len, scheduled: run.scheduled });
            self.pass(key, len);
            count += len;
        }
        count
    }

    /// Moves up to `limit` entries from before a reader to what its group holds; tells what that was.
    pub(super) fn pass(&mut self, key: usize, limit: usize) -> Option<Sum> {
        let passed = self.advance(key, limit)?;
        if let Some(reader) = self.readers.get_mut(key) {
            reader.held += passed.messages;
            reader.held_bytes += passed.bytes;
        }
        Some(passed)
    }

    /// The run that holds the entry at `position`, or will.
    fn run_of(&self, position: u64) -> usize {
        // Most readers are at one end or the other.
        match self.runs.front() {
            Some(first) if position < first.end() => 0,
            _ => self.runs.partition_point(|run| run.end() <= position),
        }
    }

    /// Moves a reader's cursor over up to `limit` entries of one segment; tells their bytes.
    fn advance(&mut self, key: usize, limit: usize) -> Option<Sum> {
        let cursor = self.readers.get(key)?.cursor;
        let index = self.run_of(cursor);
        let (reader, run) = (self.readers.get_mut(key)?, self.runs.get_mut(index)?);
        let start = (cursor - run.base) as usize;
        let len = limit.min(run.segment().len() - start);
        let bytes = run.segment().bytes(start, len);
        reader.cursor += len as u64;
        reader.cursor_bytes += bytes;
        if reader.cursor == run.end() {
            run.readers -= 1;
            if reader.cursor == self.tail {
                self.caught_up += 1;
            } else if let Some(next) = self.runs.get_mut(index + 1) {
                next.readers += 1;
            }
            self.trim();
        }
        Some(Sum { messages: len as u64, bytes })
    }

    /// Drops the runs that every reader has left.
    fn trim(&mut self) {
        while self.runs.front().is_some_and(|run| run.readers == 0) {
            self.runs.pop_front();
        }
        if self.caught_up == self.readers.len() {
            self.last_burst = std::mem::take(&mut self.burst);
        }
    }

    /// Lists a reader to be told of the next entry; false if there is one already.
    pub(super) fn wait(&mut self, key: usize) -> bool {
        let Some(reader) = self.readers.get_mut(key).filter(|reader| reader.cursor == self.tail) else { return false };
        (reader.tell_at, reader.told) = (self.tail + 1, None);
        if reader.place.is_none() {
            reader.place = Some(self.waiting.len());
            self.waiting.push(key);
        }
        true
    }

    /// What is before a reader.
    pub(super) fn unread(&self, key: usize) -> Sum {
        self.readers.get(key).map_or(Sum::default(), |reader| Sum {
            messages: self.tail - reader.cursor,
            bytes: self.tail_bytes - reader.cursor_bytes,
        })
    }

    /// What a reader's group holds outside the log.
    pub(super) fn held_by(&self, key: usize) -> Sum {
        let held = |reader: &Reader| Sum { messages: reader.held, bytes: reader.held_bytes };
        self.readers.get(key).map_or(Sum::default(), held)
    }

    /// What is before a reader, and stays there: segments and slots.
    fn before(&self, key: usize) -> impl Iterator<Item = (&Segment, usize)> {
        let cursor = self.readers.get(key).map_or(self.tail, |reader| reader.cursor);
        self.runs.iter().skip(self.run_of(cursor)).flat_map(move |run| {
            let start = cursor.saturating_sub(run.base) as usize;
            (start..run.segment().len()).map(|slot| (run.segment(), slot))
        })
    }

    /// How many entries before a reader, up to `limit`, come before the first that was published at
    /// `tick` or later.
    pub(super) fn older_than(&self, key: usize, tick: u64, limit: usize) -> usize {
        let older = |(segment, slot): &(&Segment, usize)| segment.published(*slot).is_none_or(|at| at < tick);
        self.before(key).take(limit).take_while(older).count()
    }

    /// How many entries a reader lost because its group was at its bound.
    pub(super) fn dropped(&self, key: usize) -> u64 {
        self.readers.get(key).map_or(0, |reader| reader.dropped)
    }

    /// Whether a publish waits for this reader's group.
    pub(super) fn is_stalled_by(&self, key: usize) -> bool {
        self.stalled.iter().any(|(blocker, _)| *blocker == key)
    }

    /// A group holds so much less, or more, outside the log than it did. Tells the topics that may
    /// go on.
    pub(super) fn held(&mut self, key: usize, messages: i64, bytes: i64) -> Vec<Arc<TopicState>> {
        if let Some(reader) = self.readers.get_mut(key) {
            reader.held = reader.held.saturating_add_signed(messages);
            reader.held_bytes = reader.held_bytes.saturating_add_signed(bytes);
        }
        if messages > 0 || bytes > 0 {
            self.room = 0;
        }
        self.freed(key)
    }

    /// Changes a reader's bound. Tells the topics that may go on.
    pub(super) fn set_backlog(&mut self, key: usize, backlog: Backlog) -> Vec<Arc<TopicState>> {
        self.room = 0;
        if let Some(reader) = self.readers.get_mut(key) {
            reader.backlog = backlog;
        }
        self.freed(key)
    }

    fn freed(&mut self, key: usize) -> Vec<Arc<TopicState>> {
        let mut topics = self.take_resumed();
        topics.extend(self.stalled.extract_if(.., |(blocker, _)| *blocker == key).map(|(_, topic)| topic));
        topics
    }
}
