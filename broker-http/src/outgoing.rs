//! What is encoded and not sent yet: answers with messages in them, and the bodies of pushes.
//!
//! Encoding copies. A message is held once, however many it is for; encoded for a thousand readers that do not read, it
//! would be there a thousand times more. So whoever encodes waits for a turn while what others encoded holds as much as
//! it may. None is refused: it is what takes messages out.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

/// Shared by all that encode; a clone is the same.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing(Arc<Held>);

#[derive(Debug)]
struct Held {
    bytes: AtomicU64,
    max: AtomicU64,
    room: Notify,
}

impl Outgoing {
    /// Nobody encodes more while there are `max` bytes.
    pub(crate) fn new(max: u64) -> Self {
        Self(Arc::new(Held { bytes: AtomicU64::new(0), max: AtomicU64::new(max), room: Notify::new() }))
    }

    /// From now on this bound.
    pub(crate) fn set_max(&self, max: u64) {
        self.0.max.store(max, Ordering::Release);
        self.0.room.notify_waiters();
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn has_room(&self) -> bool {
        self.0.bytes.load(Ordering::Acquire) < self.0.max.load(Ordering::Acquire)
    }

    /// Waits until one may encode. What then is encoded may pass the bound, once for each that has its turn just then.
    pub(crate) async fn turn(&self) {
        while !self.has_room() {
            let mut room = pin!(self.0.room.notified());
            // Room made before this is seen here, room made after it wakes us.
            room.as_mut().enable();
            if !self.has_room() {
                room.await;
            }
        }
    }

    /// Counts what was encoded until it is sent, or dropped.
    pub(crate) fn carry(&self, encoded: Vec<u8>) -> Bytes {
        let bytes = encoded.capacity() as u64;
        self.0.bytes.fetch_add(bytes, Ordering::AcqRel);
        Bytes::from_owner(Carried { encoded, bytes, held: Arc::clone(&self.0) })
    }
}

struct Carried {
    encoded: Vec<u8>,
    bytes: u64,
    held: Arc<Held>,
}

impl AsRef<[u8]> for Carried {
    fn as_ref(&self) -> &[u8] {
        &self.encoded
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        // Below the bound nobody waits.
        if self.held.bytes.fetch_sub(self.bytes, Ordering::AcqRel) >= self.held.max.load(Ordering::Acquire) {
            self.held.room.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn what_is_carried_counts_until_its_last_part_is_gone() {
        let outgoing = Outgoing::new(1_000);
        let mut whole = outgoing.carry(vec![1; 100]);
        let part = whole.split_to(10);
        drop(whole);
        assert_eq!((outgoing.bytes(), part.len()), (100, 10));
        drop(part);
        assert_eq!(outgoing.bytes(), 0);
    }

    #[tokio::test]
    async fn whoever_encodes_waits_for_room() {
        let outgoing = Outgoing::new(100);
        outgoing.turn().await;
        let (first, second) = (outgoing.carry(vec![0; 99]), outgoing.carry(vec![0; 99]));
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let outgoing = outgoing.clone();
                tokio::spawn(async move { outgoing.turn().await })
            })
            .collect();
        tokio::task::yield_now().await;
        drop(first);
        assert!(outgoing.has_room());
        for turn in waiting {
            turn.await.unwrap();
        }
        let third = outgoing.carry(vec![0; 1]);
        let mut turn = pin!(outgoing.turn());
        assert!(turn.as_mut().now_or_never().is_none());
        outgoing.set_max(101);
        turn.await;
        drop((second, third));
    }
}
