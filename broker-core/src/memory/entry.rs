//! A published message as the logs share it.

use std::sync::Arc;

use super::wheel::Due;
use crate::{Failure, Message, Timestamp, Topic};

/// A message that more than one place holds: the logs of several filters, a topic's history, a group
/// that retries it.
///
/// 40 bytes beside the message, its counts included, so that a million that wait cost little.
pub(super) struct Entry {
    pub(super) message: Message,
    pub(super) topic: Topic,
    /// Its place, if its topic retains it, which few do.
    place: Option<Box<Place>>,
}

/// Where a retained message stands among those of all topics: the order in which one reader receives
/// them live is the order in which another finds them retained, so that whoever comes back may go on
/// after the last it saw.
///
/// A message stands where it becomes visible: when it was published, or, delayed, when it is due.
/// The sequence number tells apart what one tick does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) tick: u64,
    pub(super) sequence: u64,
}

impl Entry {
    pub(super) fn new(topic: Topic, message: Message) -> Arc<Self> {
        Self::placed(topic, message, None)
    }

    pub(super) fn placed(topic: Topic, message: Message, place: Option<Place>) -> Arc<Self> {
        Arc::new(Self { message, topic, place: place.map(Box::new) })
    }

    /// Its place, if its topic retains it.
    pub(super) fn place(&self) -> Option<Place> {
        self.place.as_deref().copied()
    }

    /// What every bound asks for.
    pub(super) fn size(&self) -> u64 {
        self.message.size() as u64
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        is_expired(&self.message, now)
    }
}

/// Whether it is not to be delivered any more: one that expires before its delivery time never is.
pub(super) fn is_expired(message: &Message, now: Timestamp) -> bool {
    message.expires_at().is_some_and(|expiry| expiry <= now || message.deliver_at().is_some_and(|due| expiry <= due))
}

/// The earlier of two times, where there are any.
pub(super) fn earlier(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    one.into_iter().chain(other).min()
}

/// Whether the time decides about its delivery.
pub(super) fn is_scheduled(message: &Message) -> bool {
    message.deliver_at().is_some() || message.expires_at().is_some()
}

/// A run of messages that readers share without touching each message's reference count: a batch
/// holds the segment, not its messages.
///
/// The log fills it while it has it alone, and shares it, never to change again, when a reader takes
/// from it.
pub(super) struct Segment(Slots);

enum Slots {
    /// Messages of one topic that no other log has: they lie in the segment itself, so that
    /// publishing allocates nothing for them and touches no count that a reader touches too.
    Own(Own),
    Shared(Vec<Slot<Arc<Entry>>>),
}

/// Slots made ahead and filled in place: of a message, which is large, every move on its way counts.
struct Own {
    topic: Topic,
    slots: Vec<Slot<Option<Message>>>,
    /// How many are filled.
    len: usize,
}

struct Slot<T> {
    message: T,
    /// Bytes of this message and all before it in the segment.
    bytes: u64,
}

impl Own {
    fn new(topic: &Topic, capacity: usize) -> Self {
        let mut slots = Vec::new();
        slots.resize_with(capacity, Slot::empty);
        Self { topic: topic.clone(), slots, len: 0 }
    }

    #[inline]
    fn push(&mut self, message: &mut Option<Message>, bytes: u64) {
        if self.len == self.slots.len() {
            self.slots.push(Slot::empty());
        }
        if let Some(slot) = self.slots.get_mut(self.len) {
            std::mem::swap(&mut slot.message, message);
            slot.bytes = bytes;
            self.len += 1;
        }
    }

    fn message(&self, index: usize) -> Option<&Message> {
        self.slots.get(index)?.message.as_ref()
    }
}

impl Slot<Option<Message>> {
    fn empty() -> Self {
        Self { message: None, bytes: 0 }
    }
}

/// Writing.
impl Segment {
    pub(super) fn own(topic: &Topic, capacity: usize) -> Self {
        Self(Slots::Own(Own::new(topic, capacity)))
    }

    pub(super) fn shared(capacity: usize) -> Self {
        Self(Slots::Shared(Vec::with_capacity(capacity)))
    }

    pub(super) fn is_own(&self) -> bool {
        matches!(self.0, Slots::Own(_))
    }

    /// Takes a message that no other log has; `topic` is that of the log it stands in.
    #[inline]
    pub(super) fn push(&mut self, topic: &Topic, message: &mut Option<Message>, size: u64) {
        let bytes = self.size() + size;
        match &mut self.0 {
            Slots::Own(own) => own.push(message, bytes),
            Slots::Shared(slots) => {
                let entry = message.take().map(|message| Entry::new(topic.clone(), message));
                slots.extend(entry.map(|message| Slot { message, bytes }));
            }
        }
    }

    /// Adds a message that is held elsewhere too.
    pub(super) fn push_shared(&mut self, entry: &Arc<Entry>) {
        let bytes = self.size() + entry.size();
        match &mut self.0 {
            // The log begins a shared segment for it; here it would lose its identity, no more.
            Slots::Own(own) => own.push(&mut Some(entry.message.clone()), bytes),
            Slots::Shared(slots) => slots.push(Slot { message: Arc::clone(entry), bytes }),
        }
    }
}

/// Reading.
impl Segment {
    pub(super) fn len(&self) -> usize {
        match &self.0 {
            Slots::Own(own) => own.len,
            Slots::Shared(slots) => slots.len(),
        }
    }

    /// Whether another message would need more memory than was set aside.
    pub(super) fn is_full(&self) -> bool {
        match &self.0 {
            Slots::Own(own) => own.len == own.slots.len(),
            Slots::Shared(slots) => slots.len() == slots.capacity(),
        }
    }

    pub(super) fn message(&self, index: usize) -> Option<&Message> {
        match &self.0 {
            Slots::Own(own) => own.message(index),
            Slots::Shared(slots) => slots.get(index).map(|slot| &slot.message.message),
        }
    }

    pub(super) fn topic(&self, index: usize) -> Option<&Topic> {
        match &self.0 {
            Slots::Own(own) => Some(&own.topic),
            Slots::Shared(slots) => slots.get(index).map(|slot| &slot.message.topic),
        }
    }

    /// The message, to be held beside the segment.
    pub(super) fn share(&self, index: usize) -> Option<Arc<Entry>> {
        match &self.0 {
            Slots::Own(own) => own.message(index).map(|message| Entry::new(own.topic.clone(), message.clone())),
            Slots::Shared(slots) => slots.get(index).map(|slot| Arc::clone(&slot.message)),
        }
    }

    /// The tick at which the message at `index` was published, if it is retained and was not delayed.
    pub(super) fn published(&self, index: usize) -> Option<u64> {
        match &self.0 {
            Slots::Own(_) => None,
            Slots::Shared(slots) => {
                let entry = &slots.get(index)?.message;
                entry.place().filter(|_| entry.message.deliver_at().is_none()).map(|place| place.tick)
            }
        }
    }

    /// Bytes of all messages.
    pub(super) fn size(&self) -> u64 {
        self.bytes_before(self.len())
    }

    /// Bytes of the messages in a range of slots.
    pub(super) fn bytes(&self, start: usize, len: usize) -> u64 {
        self.bytes_before(start + len) - self.bytes_before(start)
    }

    fn bytes_before(&self, index: usize) -> u64 {
        let Some(last) = index.checked_sub(1) else { return 0 };
        match &self.0 {
            Slots::Own(own) => own.slots.get(last).map_or(0, |slot| slot.bytes),
            Slots::Shared(slots) => slots.get(last).map_or(0, |slot| slot.bytes),
        }
    }
}

/// A message of one group that left the log: waiting its turn, due later, or in flight again.
///
/// 32 bytes beside the shared entry.
pub(super) struct Queued {
    pub(super) entry: Arc<Entry>,
    /// The tick before which it is not delivered; zero for at once.
    pub(super) due: u64,
    /// Deliveries so far.
    pub(super) attempts: u32,
    /// Shared by messages that were first delivered at one time and failed for one reason, as those of
    /// an endpoint that is down do.
    pub(super) story: Option<Arc<Story>>,
}

/// What is remembered of a message's failures.
#[derive(Clone, PartialEq)]
pub(super) struct Story {
    /// When it was first delivered.
    pub(super) first: Timestamp,
    pub(super) failure: Option<Failure>,
}

impl Due for Queued {
    fn due(&mut self) -> &mut u64 {
        &mut self.due
    }
}

impl Queued {
    /// The place of a delayed message that was not delivered yet, if it is retained.
    pub(super) fn place_of_first(&self) -> Option<Place> {
        self.entry.place().filter(|_| self.attempts == 0 && self.entry.message.deliver_at().is_some())
    }

    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self { entry, due: 0, attempts: 0, story: None }
    }
}
