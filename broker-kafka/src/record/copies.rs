//! Copies of what librdkafka lends: many small ones share a piece of memory.
//!
//! A copy is made on the polling thread and freed wherever its message is settled, and an allocator pays for
//! every piece that one thread frees of another's. So a piece is small enough that one message kept for
//! long keeps little else.

use bytes::{Bytes, BytesMut};

/// Bytes of a piece.
const PIECE: usize = 4096;

/// What is longer has memory of its own.
const SMALL: usize = 512;

#[derive(Debug, Default)]
pub(crate) struct Copies(BytesMut);

impl Copies {
    pub(crate) fn copy(&mut self, bytes: &[u8]) -> Bytes {
        if bytes.len() > SMALL {
            return Bytes::copy_from_slice(bytes);
        }
        if self.0.capacity() < bytes.len() {
            self.0 = BytesMut::with_capacity(PIECE);
        }
        self.0.extend_from_slice(bytes);
        self.0.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_is_what_it_was_copied_from() {
        let mut copies = Copies::default();
        let originals: Vec<Vec<u8>> = (0..2_000_u32).map(|n| vec![n as u8; (n % 700) as usize]).collect();
        let copied: Vec<Bytes> = originals.iter().map(|bytes| copies.copy(bytes)).collect();
        assert!(copied.iter().zip(&originals).all(|(copy, bytes)| copy == bytes));
    }
}
