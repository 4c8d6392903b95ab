//! The shared log of one filter: a message is appended once, and every group on the filter reads
//! with a cursor of its own.
//!
//! One short mutex around plain data. Publishers append under it, readers take whole runs, and
//! what is paid per reader is paid when that reader moves, never per message: appending spends
//! `room`, which is worked out anew over the readers only when it is used up; readers that wait
//! for an entry are listed, so that waking costs what is woken; a run of entries counts the readers
//! inside it, so that it goes when the slowest has left.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use smallvec::SmallVec;

use super::entry::{Entry, Segment, is_scheduled};
use super::group::Group;
use super::tally::Sum;
use super::topics::TopicState;
use crate::{Backlog, Message, Overflow, Topic, TopicFilter};

const MIN_SEGMENT: usize = 4;
const MAX_SEGMENT: usize = 256;
/// The largest segment an idle log keeps.
const KEPT_SEGMENT: usize = 8;
/// Bytes after which a run is full: about what one unsettled delivery keeps alive beside itself.
const MAX_RUN_BYTES: u64 = 64 << 10;

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
    readers: Slab<Reader>,
    /// Readers whose cursor is the tail; they are in no run.
    caught_up: usize,
    /// Entries and bytes that can be appended before any reader could reach its bound.
    room: u64,
    room_bytes: u64,
    /// The reader that was found at its bound last.
    blocker: usize,
    /// Readers at their bound for whom the next entry is the oldest they can drop.
    skipping: SmallVec<[usize; 2]>,
    /// Readers to be told of the next entry.
    waiting: SmallVec<[usize; 2]>,
    /// Topics with publishes that wait for room, and the reader they found at its bound.
    stalled: Vec<(usize, Arc<TopicState>)>,
}

/// A segment in its place.
struct Run {
    base: u64,
    len: usize,
    bytes: u64,
    /// Whether an entry has a delivery time or an expiry.
    scheduled: bool,
    /// Readers whose cursor is inside.
    readers: usize,
    segment: Arc<Segment>,
}

impl Run {
    fn end(&self) -> u64 {
        self.base + self.len as u64
    }

    fn is_full(&self) -> bool {
        self.len == self.segment.capacity() || self.bytes >= MAX_RUN_BYTES
    }
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
    /// Entries dropped because the group was at its bound.
    dropped: u64,
    /// Whether it is listed in `waiting`.
    waits: bool,
}

/// What a publish finds.
pub(super) enum Room {
    Free,
    /// This group is at its bound.
    Full(Arc<Group>, Overflow),
}

/// Entries taken from the log: part of one segment.
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

    /// Whether an entry of `size` bytes can be appended. Where a group drops its oldest, it does so
    /// now.
    pub(super) fn room(&mut self, size: u64) -> Room {
        if self.room > 0 && self.room_bytes >= size {
            return Room::Free;
        }
        let (mut room, mut room_bytes) = (u64::MAX, u64::MAX);
        self.skipping.clear();
        // Whoever was at its bound last is the likeliest to be still.
        let keys = self.readers.capacity();
        for key in (self.blocker..keys).chain(0..self.blocker.min(keys)) {
            let Some((left, left_bytes)) = self.left(key, size) else { continue };
            if left > 0 && left_bytes >= size {
                (room, room_bytes) = (room.min(left), room_bytes.min(left_bytes));
            } else if let Some((group, overflow)) = self.at_bound(key) {
                self.blocker = key;
                return Room::Full(group, overflow);
            } else {
                self.drop_oldest(key, size);
                // After this entry its room is worked out anew.
                (room, room_bytes) = (room.min(1), room_bytes.min(size));
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

    fn at_bound(&self, key: usize) -> Option<(Arc<Group>, Overflow)> {
        let reader = self.readers.get(key)?;
        let overflow = reader.backlog.overflow();
        (overflow != Overflow::DropOldest).then(|| (Arc::clone(&reader.group), overflow))
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

    fn count_dropped(&mut self, key: usize) {
        if let Some(reader) = self.readers.get_mut(key) {
            reader.dropped += 1;
        }
    }

    /// Appends a message of a topic that has no other log, for which there is [`room`](Self::room);
    /// adds the groups to be told to `wake`.
    pub(super) fn append(&mut self, topic: &Topic, message: Message, size: u64, wake: &mut Wake) {
        if self.readers.is_empty() {
            return;
        }
        let scheduled = is_scheduled(&message);
        if self.runs.back().is_none_or(Run::is_full) {
            let segment = Segment::own(topic, self.next_capacity());
            self.add_run(segment);
        }
        if let Some(run) = self.runs.back_mut() {
            if run.segment.is_own() {
                run.segment.push_own(run.len, message, size);
            } else {
                run.segment.push_shared(run.len, Entry::new(topic.clone(), message));
            }
        }
        self.appended(size, scheduled, wake);
    }

    /// [`append`](Self::append) for a message that is held elsewhere too.
    pub(super) fn append_shared(&mut self, entry: &Arc<Entry>, wake: &mut Wake) {
        if self.readers.is_empty() {
            return;
        }
        if self.runs.back().is_none_or(|run| run.is_full() || run.segment.is_own()) {
            let segment = Segment::shared(self.next_capacity());
            self.add_run(segment);
        }
        if let Some(run) = self.runs.back_mut() {
            run.segment.push_shared(run.len, Arc::clone(entry));
        }
        self.appended(entry.size, is_scheduled(&entry.message), wake);
    }

    fn next_capacity(&self) -> usize {
        self.burst.max(self.last_burst).next_power_of_two().clamp(MIN_SEGMENT, MAX_SEGMENT)
    }

    fn add_run(&mut self, segment: Arc<Segment>) {
        self.runs.push_back(Run { base: self.tail, len: 0, bytes: 0, scheduled: false, readers: 0, segment });
    }

    fn appended(&mut self, size: u64, scheduled: bool, wake: &mut Wake) {
        if let Some(run) = self.runs.back_mut() {
            run.len += 1;
            run.bytes += size;
            run.scheduled |= scheduled;
            run.readers += std::mem::take(&mut self.caught_up);
        }
        self.tail += 1;
        self.tail_bytes += size;
        self.burst += 1;
        self.room = self.room.saturating_sub(1);
        self.room_bytes = self.room_bytes.saturating_sub(size);
        for key in self.waiting.drain(..) {
            if let Some(reader) = self.readers.get_mut(key) {
                reader.waits = false;
                wake.push(Arc::clone(&reader.group));
            }
        }
        while let Some(key) = self.skipping.pop() {
            self.advance(key, 1);
            self.count_dropped(key);
        }
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
            dropped: 0,
            waits: false,
        })
    }

    /// Removes a reader; tells whether it was the last, and which topics may go on.
    pub(super) fn remove_reader(&mut self, key: usize) -> (bool, Vec<Arc<TopicState>>) {
        if let Some(reader) = self.readers.try_remove(key) {
            self.waiting.retain(|have| *have != key);
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

    /// Takes up to `limit` entries of one segment for a reader, which now holds them.
    pub(super) fn take(&mut self, key: usize, limit: usize) -> Option<Taken> {
        let taken = self.advance(key, limit)?;
        if let Some(reader) = self.readers.get_mut(key) {
            reader.held += taken.len as u64;
            reader.held_bytes += taken.segment.bytes(taken.start, taken.len);
        }
        Some(taken)
    }

    /// The run that holds the entry at `position`, or will.
    fn run_of(&self, position: u64) -> usize {
        self.runs.partition_point(|run| run.end() <= position)
    }

    /// Moves a reader's cursor over up to `limit` entries of one segment.
    fn advance(&mut self, key: usize, limit: usize) -> Option<Taken> {
        let cursor = self.readers.get(key)?.cursor;
        let index = self.run_of(cursor);
        let (reader, run) = (self.readers.get_mut(key)?, self.runs.get_mut(index)?);
        let start = (cursor - run.base) as usize;
        let len = limit.min(run.len - start);
        let taken = Taken { segment: Arc::clone(&run.segment), start, len, scheduled: run.scheduled };
        reader.cursor += len as u64;
        reader.cursor_bytes += run.segment.bytes(start, len);
        if reader.cursor == run.end() {
            run.readers -= 1;
            if reader.cursor == self.tail {
                self.caught_up += 1;
            } else if let Some(next) = self.runs.get_mut(index + 1) {
                next.readers += 1;
            }
            self.trim();
        }
        Some(taken)
    }

    /// Drops the runs that every reader has left.
    fn trim(&mut self) {
        while self.runs.front().is_some_and(|run| run.readers == 0) {
            let small = self.runs.front().is_some_and(|run| run.segment.capacity() <= KEPT_SEGMENT);
            if self.runs.len() == 1
                && small
                && let Some(run) = self.runs.front_mut()
                && let Some(segment) = Arc::get_mut(&mut run.segment)
            {
                // The last one, and no batch shares it: a slow trickle needs no new segment each time.
                segment.clear();
                (run.base, run.len, run.bytes, run.scheduled) = (self.tail, 0, 0, false);
                break;
            }
            self.runs.pop_front();
        }
        if self.caught_up == self.readers.len() {
            self.last_burst = std::mem::take(&mut self.burst);
        }
    }

    /// Lists a reader to be told of the next entry; false if there is one already.
    pub(super) fn wait(&mut self, key: usize) -> bool {
        let Some(reader) = self.readers.get_mut(key).filter(|reader| reader.cursor == self.tail) else { return false };
        if !std::mem::replace(&mut reader.waits, true) {
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
            (start..run.len).map(|slot| (&*run.segment, slot))
        })
    }

    /// The next message before a reader.
    pub(super) fn next(&self, key: usize) -> Option<&Message> {
        self.before(key).next().and_then(|(segment, slot)| segment.message(slot))
    }

    /// The shared entries before a reader, to tell them from others.
    pub(super) fn identities(&self, key: usize) -> Vec<*const Entry> {
        self.before(key).filter_map(|(segment, slot)| segment.identity(slot)).collect()
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
        if self.stalled.is_empty() {
            return Vec::new();
        }
        self.stalled.extract_if(.., |(blocker, _)| *blocker == key).map(|(_, topic)| topic).collect()
    }
}
