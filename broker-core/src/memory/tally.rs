//! What was settled of a batch, counted without a lock, and the flag that asks to be told.
//!
//! An ack is one addition to its batch's tally; the group learns of it when the batch is done, or
//! when somebody waits for it. The two sides meet as in Dekker's algorithm: an ack adds and then
//! looks at the flag, whoever waits sets the flag and then looks at the tallies, all sequentially
//! consistent, so that at least one of them sees the other. `tests/shuttle.rs` checks every order.

use super::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bits of a tally for bytes; those above count deliveries. A batch has 256 deliveries of at most
/// a gibibyte, so that neither runs over.
const BYTES_BITS: u32 = 44;

/// Deliveries and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

/// What was settled of a batch.
pub(super) struct Tally(AtomicU64);

impl Tally {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one delivery of `size` bytes; tells what has been settled with it.
    #[inline]
    pub(super) fn add(&self, size: u64) -> Sum {
        let one = (1 << BYTES_BITS) | size;
        unpack(self.0.fetch_add(one, Ordering::SeqCst) + one)
    }

    /// What has been settled so far.
    pub(super) fn sum(&self) -> Sum {
        unpack(self.0.load(Ordering::SeqCst))
    }
}

fn unpack(packed: u64) -> Sum {
    Sum { messages: packed >> BYTES_BITS, bytes: packed & ((1 << BYTES_BITS) - 1) }
}

/// Whether somebody waits for settlements, so that each must be told.
pub(super) struct Asked(AtomicBool);

impl Asked {
    pub(super) fn new(asked: bool) -> Self {
        Self(AtomicBool::new(asked))
    }

    /// Asks, or asks no longer. Who asks looks at the tallies afterwards.
    pub(super) fn set(&self, asked: bool) {
        self.0.store(asked, Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
