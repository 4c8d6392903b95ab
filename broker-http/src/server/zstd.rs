//! Zstandard (RFC 8878), inflated block by block as it arrives. The blocks themselves are ruzstd's work; here frames
//! are told apart, skipped, and kept within what a sender may make us hold.

use std::io::Read;

use bytes::{Buf, Bytes, BytesMut};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::problem::{Answer, Problem};

/// The largest window we hold for a sender: what RFC 9659 allows on the web.
const WINDOW_BYTES: u64 = 8 << 20;

/// The largest block, packed or not (RFC 8878, section 3.1.1.2.4).
const BLOCK_BYTES: usize = 128 << 10;

/// The most that is given in one go.
const PIECE_BYTES: usize = 64 << 10;

/// Inflates what is fed to it. A frame holds back as much as its window until it ends: later blocks may refer to it.
pub(super) struct Unpacking {
    decoder: FrameDecoder,
    packed: BytesMut,
    at: At,
    window: u64,
}

enum At {
    /// Between frames, or in the head of one.
    Head,
    /// In a frame that says nothing, with so many bytes to go.
    Skipping(u64),
    Blocks {
        checksum: bool,
    },
    /// All of a frame is inflated and not all is given.
    Giving,
}

impl Unpacking {
    pub(super) fn new() -> Self {
        Self { decoder: FrameDecoder::new(), packed: BytesMut::new(), at: At::Head, window: 0 }
    }

    pub(super) fn feed(&mut self, packed: &[u8]) {
        self.packed.extend_from_slice(packed);
    }

    /// Bytes it holds, about, however little has come of them yet.
    pub(super) fn held(&self) -> u64 {
        self.window + (self.packed.len() + BLOCK_BYTES) as u64
    }

    /// The next piece, or `None` if more must arrive first.
    ///
    /// # Errors
    ///
    /// 400 for what is no frame, is broken, or wants a window that is too large.
    pub(super) fn next(&mut self) -> Option<Answer<Bytes>> {
        loop {
            match self.at {
                At::Head => match self.head() {
                    Ok(true) => {}
                    Ok(false) => return None,
                    Err(problem) => return Some(Err(problem)),
                },
                At::Skipping(left) => {
                    let skipped = self.packed.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.packed.advance(skipped);
                    let left = left - skipped as u64;
                    self.at = if left == 0 { At::Head } else { At::Skipping(left) };
                    if left > 0 {
                        return None;
                    }
                }
                At::Blocks { checksum } => {
                    match self.block(checksum) {
                        Ok(true) => {}
                        Ok(false) => return None,
                        Err(problem) => return Some(Err(problem)),
                    }
                    if let Some(piece) = self.piece() {
                        return Some(piece);
                    }
                }
                At::Giving => match self.piece() {
                    Some(piece) => return Some(piece),
                    None => self.at = At::Head,
                },
            }
        }
    }

    /// Nothing more arrives.
    ///
    /// # Errors
    ///
    /// 400 where a frame has not ended.
    pub(super) fn finish(&self) -> Answer<()> {
        match self.at {
            At::Head if self.packed.is_empty() => Ok(()),
            _ => Err(broken("it ends within a frame")),
        }
    }

    /// Reads a frame's head; `false` if more must arrive first.
    fn head(&mut self) -> Answer<bool> {
        let Some((magic, rest)) = self.packed.split_first_chunk() else { return Ok(false) };
        let magic = u32::from_le_bytes(*magic);
        if magic & !0xf == 0x184d_2a50 {
            // Section 3.1.2.
            let Some((size, _)) = rest.split_first_chunk() else { return Ok(false) };
            self.at = At::Skipping(u32::from_le_bytes(*size).into());
            self.packed.advance(8);
            return Ok(true);
        }
        if magic != 0xfd2f_b528 {
            return Err(broken("there is no frame where one begins"));
        }
        // Section 3.1.1.1.
        let Some(descriptor) = rest.first() else { return Ok(false) };
        let single_segment = descriptor & 0b0010_0000 != 0;
        let dictionary = [0, 1, 2, 4].get(usize::from(descriptor & 0b11)).copied().unwrap_or(0);
        let size = match descriptor >> 6 {
            0 => usize::from(single_segment),
            power => 1 << power,
        };
        let window = usize::from(!single_segment);
        let length = 4 + 1 + window + dictionary + size;
        let Some(mut head) = self.packed.get(..length) else { return Ok(false) };
        let checksum = descriptor & 0b100 != 0;
        self.window = if let (false, Some(window)) = (single_segment, rest.get(1)) {
            let base = 1_u64 << (10 + (window >> 3));
            base + base / 8 * u64::from(window & 7)
        } else {
            // A single segment is as large as its content.
            let mut bytes = [0; 8];
            let at = length - size;
            bytes.iter_mut().zip(head.get(at..).unwrap_or_default()).for_each(|(to, from)| *to = *from);
            u64::from_le_bytes(bytes) + if size == 2 { 256 } else { 0 }
        };
        if self.window > WINDOW_BYTES {
            return Err(Problem::invalid(
                "the body is zstd with a window of more than 8 MiB; compress it with less, or as a stream",
            ));
        }
        self.decoder.reset(&mut head).map_err(broken)?;
        self.packed.advance(length);
        self.at = At::Blocks { checksum };
        Ok(true)
    }

    /// Inflates a block; `false` if more must arrive first.
    fn block(&mut self, checksum: bool) -> Answer<bool> {
        // Section 3.1.1.2.
        let [low, middle, high, ..] = *self.packed else { return Ok(false) };
        let head = u32::from_le_bytes([low, middle, high, 0]);
        let (last, kind, size) = (head & 1 == 1, head >> 1 & 0b11, (head >> 3) as usize);
        if size > BLOCK_BYTES {
            return Err(broken("a block is larger than 128 KiB"));
        }
        // One byte, so many times.
        let packed = if kind == 1 { 1 } else { size };
        let length = 3 + packed + if last && checksum { 4 } else { 0 };
        let Some(mut block) = self.packed.get(..length) else { return Ok(false) };
        let ended = self.decoder.decode_blocks(&mut block, BlockDecodingStrategy::UptoBlocks(1)).map_err(broken)?;
        self.packed.advance(length);
        if ended {
            self.at = At::Giving;
        }
        Ok(true)
    }

    /// What is inflated and no longer referred to.
    fn piece(&mut self) -> Option<Answer<Bytes>> {
        let mut piece = vec![0; self.decoder.can_collect().min(PIECE_BYTES)];
        let read = self.decoder.read(&mut piece).map_err(broken);
        piece.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => None,
            Ok(_) => Some(Ok(piece.into())),
            Err(problem) => Some(Err(problem)),
        }
    }
}

fn broken(why: impl std::fmt::Display) -> Problem {
    Problem::invalid(format!("the body is no valid zstd: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(body: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(body, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// What comes of a body that arrives in pieces of so many bytes.
    fn inflated(packed: &[u8], pieces: usize) -> Answer<Vec<u8>> {
        let mut unpacking = Unpacking::new();
        let mut inflated = Vec::new();
        for arrived in packed.chunks(pieces) {
            unpacking.feed(arrived);
            while let Some(piece) = unpacking.next() {
                let piece = piece?;
                assert!(!piece.is_empty() && piece.len() <= PIECE_BYTES);
                inflated.extend_from_slice(&piece);
            }
        }
        unpacking.finish().map(|()| inflated)
    }

    #[test]
    fn it_may_arrive_in_pieces_of_any_size() {
        let body: Vec<u8> = (0..300_000_u32).flat_map(|number| number.wrapping_mul(number).to_le_bytes()).collect();
        let skip = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], &[7; 3]].concat();
        let frames = [skip.clone(), packed(&body), packed(b""), skip, packed(b"end")].concat();
        for pieces in [1, 7, 1_000, 65_536, frames.len()] {
            let inflated = inflated(&frames, pieces).unwrap();
            assert!(inflated[..body.len()] == body && &inflated[body.len()..] == b"end", "in pieces of {pieces}");
        }
    }

    #[test]
    fn what_ends_early_is_refused_and_nothing_of_the_next_frame_is_needed() {
        let frame = packed(b"hello hello hello");
        for length in 1..frame.len() {
            assert_eq!(inflated(&frame[..length], 5).unwrap_err().status(), 400, "{length} bytes");
        }
        let mut unpacking = Unpacking::new();
        unpacking.feed(&frame);
        assert_eq!(unpacking.next().unwrap().unwrap(), "hello hello hello");
    }

    #[test]
    fn a_sender_cannot_make_us_hold_much() {
        let head = [0x28, 0xb5, 0x2f, 0xfd];
        // Windows of 1 GiB and of 8 MiB and an eighth; a segment of 16 MiB; a block of a run of 2 MiB.
        let windows = [[0, 20 << 3].to_vec(), [0, 13 << 3 | 1].to_vec(), [0b1010_0000, 0, 0, 0, 1].to_vec()];
        let block = [0, 10 << 3, 0b011, 0xff, 0xff, 0].to_vec();
        for bad in windows.iter().chain([&block]) {
            let bad = [&head[..], bad, &[0; 8]].concat();
            assert_eq!(inflated(&bad, 1).unwrap_err().status(), 400, "{bad:?}");
        }
        // A window of 8 MiB is told before a byte of it has come.
        let mut unpacking = Unpacking::new();
        unpacking.feed(&[&head[..], &[0, 13 << 3]].concat());
        assert!(unpacking.next().is_none());
        assert!(unpacking.held() >= 8 << 20);
    }
}
