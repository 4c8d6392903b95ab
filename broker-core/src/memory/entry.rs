//! A published message as the logs share it.

use std::sync::{Arc, OnceLock};

use super::wheel::Due;
use crate::{Failure, Message, Timestamp, Topic};

/// A message that more than one place holds: the logs of several filters, a topic's history, a group
/// that retries it.
pub(super) struct Entry {
    pub(super) message: Message,
    pub(super) topic: Topic,
    /// `Message::size`, which every bound asks for.
    pub(super) size: u64,
}

impl Entry {
    pub(super) fn new(topic: Topic, message: Message) -> Arc<Self> {
        let size = message.size() as u64;
        Arc::new(Self { message, topic, size })
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        is_expired(&self.message, now)
    }
}

pub(super) fn is_expired(message: &Message, now: Timestamp) -> bool {
    message.expires_at().is_some_and(|expiry| expiry <= now)
}

/// Whether the time decides about its delivery.
pub(super) fn is_scheduled(message: &Message) -> bool {
    message.deliver_at().is_some() || message.expires_at().is_some()
}

/// A run of messages that readers share without touching each message's reference count: a batch
/// holds the segment, not its messages.
///
/// Each slot is written once, under the log's lock, and read without it.
pub(super) struct Segment(Slots);

enum Slots {
    /// Messages of one topic that no other log has: they lie in the segment itself, so that
    /// publishing allocates nothing for them and touches no count that a reader touches too.
    Own(Topic, Box<[OnceLock<Slot<Message>>]>),
    Shared(Box<[OnceLock<Slot<Arc<Entry>>>]>),
}

struct Slot<T> {
    message: T,
    /// Bytes of this message and all before it in the segment.
    bytes: u64,
}

fn slots<T>(capacity: usize) -> Box<[OnceLock<Slot<T>>]> {
    (0..capacity).map(|_| OnceLock::new()).collect()
}

fn at<T>(slots: &[OnceLock<Slot<T>>], index: usize) -> Option<&Slot<T>> {
    slots.get(index)?.get()
}

impl Segment {
    pub(super) fn own(topic: &Topic, capacity: usize) -> Arc<Self> {
        Arc::new(Self(Slots::Own(topic.clone(), slots(capacity))))
    }

    pub(super) fn shared(capacity: usize) -> Arc<Self> {
        Arc::new(Self(Slots::Shared(slots(capacity))))
    }

    pub(super) fn is_own(&self) -> bool {
        matches!(self.0, Slots::Own(..))
    }

    pub(super) fn capacity(&self) -> usize {
        match &self.0 {
            Slots::Own(_, slots) => slots.len(),
            Slots::Shared(slots) => slots.len(),
        }
    }

    pub(super) fn message(&self, index: usize) -> Option<&Message> {
        match &self.0 {
            Slots::Own(_, slots) => at(slots, index).map(|slot| &slot.message),
            Slots::Shared(slots) => at(slots, index).map(|slot| &slot.message.message),
        }
    }

    pub(super) fn topic(&self, index: usize) -> Option<&Topic> {
        match &self.0 {
            Slots::Own(topic, _) => Some(topic),
            Slots::Shared(slots) => at(slots, index).map(|slot| &slot.message.topic),
        }
    }

    /// The message, to be held beside the segment.
    pub(super) fn share(&self, index: usize) -> Option<Arc<Entry>> {
        match &self.0 {
            Slots::Own(topic, slots) => at(slots, index).map(|slot| Entry::new(topic.clone(), slot.message.clone())),
            Slots::Shared(slots) => at(slots, index).map(|slot| Arc::clone(&slot.message)),
        }
    }

    /// The shared entry at `index`, to tell it from others.
    pub(super) fn identity(&self, index: usize) -> Option<*const Entry> {
        match &self.0 {
            Slots::Own(..) => None,
            Slots::Shared(slots) => at(slots, index).map(|slot| Arc::as_ptr(&slot.message)),
        }
    }

    /// Bytes of the messages in a range of slots.
    pub(super) fn bytes(&self, start: usize, len: usize) -> u64 {
        self.bytes_before(start + len) - self.bytes_before(start)
    }

    fn bytes_before(&self, index: usize) -> u64 {
        let Some(last) = index.checked_sub(1) else { return 0 };
        match &self.0 {
            Slots::Own(_, slots) => at(slots, last).map_or(0, |slot| slot.bytes),
            Slots::Shared(slots) => at(slots, last).map_or(0, |slot| slot.bytes),
        }
    }

    /// Writes the next slot of a segment with messages of its own.
    pub(super) fn push_own(&self, index: usize, message: Message, size: u64) {
        let bytes = self.bytes_before(index) + size;
        if let Slots::Own(_, slots) = &self.0
            && let Some(slot) = slots.get(index)
        {
            slot.get_or_init(|| Slot { message, bytes });
        }
    }

    /// Writes the next slot of a segment with shared messages.
    pub(super) fn push_shared(&self, index: usize, entry: Arc<Entry>) {
        let bytes = self.bytes_before(index) + entry.size;
        if let Slots::Shared(slots) = &self.0
            && let Some(slot) = slots.get(index)
        {
            slot.get_or_init(|| Slot { message: entry, bytes });
        }
    }

    /// Forgets all messages; possible only while no batch shares the segment.
    pub(super) fn clear(&mut self) {
        fn clear<T>(slots: &mut [OnceLock<Slot<T>>]) {
            for slot in slots {
                if slot.take().is_none() {
                    break;
                }
            }
        }
        match &mut self.0 {
            Slots::Own(_, slots) => clear(slots),
            Slots::Shared(slots) => clear(slots),
        }
    }
}

/// A message of one group that left the log: waiting its turn, due later, or in flight again.
///
/// 32 bytes beside the shared entry, so that a million delayed messages cost little.
pub(super) struct Queued {
    pub(super) entry: Arc<Entry>,
    /// The tick before which it is not delivered; zero for at once.
    pub(super) due: u64,
    /// Deliveries so far.
    pub(super) attempts: u32,
    pub(super) story: Option<Box<Story>>,
}

/// What is remembered of a message's failures.
#[derive(Clone)]
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
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self { entry, due: 0, attempts: 0, story: None }
    }
}
