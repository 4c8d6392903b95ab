//! A published message as the logs share it.

use std::sync::{Arc, OnceLock};

use crate::{Failure, Message, Timestamp, Topic};

/// One message, written once however many groups receive it.
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

    /// Whether the time decides about its delivery.
    pub(super) fn is_scheduled(&self) -> bool {
        self.message.deliver_at().is_some() || self.message.expires_at().is_some()
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        self.message.expires_at().is_some_and(|expiry| expiry <= now)
    }
}

/// A run of entries that readers share without touching each entry's reference count: a batch
/// holds the segment, not its entries.
///
/// Each slot is written once, under the log's lock, and read without it.
pub(super) struct Segment {
    slots: Box<[OnceLock<Slot>]>,
}

struct Slot {
    entry: Arc<Entry>,
    /// Bytes of this entry and all before it in the segment: sizes are told without a visit to the
    /// entry.
    bytes: u64,
}

impl Segment {
    pub(super) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { slots: (0..capacity).map(|_| OnceLock::new()).collect() })
    }

    pub(super) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn entry(&self, index: usize) -> Option<&Arc<Entry>> {
        Some(&self.slots.get(index)?.get()?.entry)
    }

    /// Bytes of the entries in a range of slots.
    pub(super) fn bytes(&self, start: usize, len: usize) -> u64 {
        let before = |slot: usize| match slot.checked_sub(1) {
            Some(last) => self.slots.get(last).and_then(OnceLock::get).map_or(0, |slot| slot.bytes),
            None => 0,
        };
        before(start + len) - before(start)
    }

    /// Writes the next slot.
    pub(super) fn push(&self, index: usize, entry: Arc<Entry>) {
        let bytes = self.bytes(0, index) + entry.size;
        if let Some(slot) = self.slots.get(index) {
            let fresh = slot.set(Slot { entry, bytes }).is_ok();
            debug_assert!(fresh, "a slot is written once");
        }
    }

    /// Forgets all entries; possible only while no batch shares the segment.
    pub(super) fn clear(&mut self) {
        for slot in &mut self.slots {
            if slot.take().is_none() {
                break;
            }
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

impl Queued {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self { entry, due: 0, attempts: 0, story: None }
    }
}
