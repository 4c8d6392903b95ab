//! Compressed request bodies: gzip and zstd, bounded by what they inflate to.

use std::io::{Read, Write};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};

use broker_core::ErrorKind;

use super::problem::{Answer, Problem};

/// The largest zstd window we hold for a sender: what RFC 9659 allows on the web.
const ZSTD_WINDOW_BYTES: u64 = 8 << 20;

/// Bytes of a compressed body beyond which inflating it would hold up other requests.
const INLINE_BYTES: usize = 16 << 10;

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Gzip,
    Zstd,
}

impl Encoding {
    /// What `Content-Encoding` says.
    pub(crate) fn of(headers: &HeaderMap) -> Answer<Option<Self>> {
        let mut all = headers.get_all(header::CONTENT_ENCODING).iter();
        let Some(value) = all.next() else { return Ok(None) };
        match value.as_bytes().to_ascii_lowercase().as_slice() {
            b"" | b"identity" if all.next().is_none() => Ok(None),
            b"gzip" | b"x-gzip" if all.next().is_none() => Ok(Some(Self::Gzip)),
            b"zstd" if all.next().is_none() => Ok(Some(Self::Zstd)),
            _ => Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                ErrorKind::Invalid,
                "content-encoding: a body is compressed once at most, by gzip or zstd",
            )),
        }
    }
}

/// Inflates a body to at most `limit` bytes; a large one off the threads that serve requests.
pub(crate) async fn inflate(encoding: Encoding, body: Bytes, limit: usize) -> Answer<Bytes> {
    if body.len() <= INLINE_BYTES && limit <= 4 << 20 {
        return inflate_now(encoding, &body, limit);
    }
    match tokio::task::spawn_blocking(move || inflate_now(encoding, &body, limit)).await {
        Ok(inflated) => inflated,
        Err(_) => Err(Problem::draining()),
    }
}

fn inflate_now(encoding: Encoding, body: &[u8], limit: usize) -> Answer<Bytes> {
    let broken = |error: &dyn std::fmt::Display| {
        let name = if encoding == Encoding::Gzip { "gzip" } else { "zstd" };
        Problem::invalid(format!("the body is no valid {name}: {error}"))
    };
    let mut inflated = Vec::with_capacity(body.len().saturating_mul(3).min(limit));
    // One byte more than is allowed tells that there is more.
    let most = limit as u64 + 1;
    let read = match encoding {
        Encoding::Gzip => flate2::read::MultiGzDecoder::new(body).take(most).read_to_end(&mut inflated),
        Encoding::Zstd => {
            let mut rest = body;
            let mut read = Ok(0);
            while !rest.is_empty() && read.is_ok() && inflated.len() <= limit {
                if let Some(after) = after_skippable(rest) {
                    rest = after;
                    continue;
                }
                if zstd_window(rest).is_some_and(|window| window > ZSTD_WINDOW_BYTES) {
                    return Err(Problem::invalid(
                        "the body is zstd with a window of more than 8 MiB; compress it with less",
                    ));
                }
                let left = most - inflated.len() as u64;
                let decoder = ruzstd::decoding::StreamingDecoder::new(&mut rest).map_err(|error| broken(&error))?;
                read = decoder.take(left).read_to_end(&mut inflated);
            }
            read
        }
    };
    read.map_err(|error| broken(&error))?;
    if inflated.len() > limit { Err(too_large(limit)) } else { Ok(inflated.into()) }
}

/// What follows a frame of zstd that says nothing (RFC 8878, section 3.1.2).
fn after_skippable(frame: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = frame.split_first_chunk()?;
    if u32::from_le_bytes(*magic) & !0xf != 0x184d_2a50 {
        return None;
    }
    let (size, rest) = rest.split_first_chunk()?;
    rest.get(usize::try_from(u32::from_le_bytes(*size)).ok()?..)
}

/// A body of gzip, inflated piece by piece: what is flushed comes out at once, and no piece is large.
pub(crate) struct Inflating {
    decoder: flate2::write::MultiGzDecoder<Vec<u8>>,
    packed: Bytes,
}

/// Compressed bytes inflated in one go: at most a mebibyte comes of them.
const PIECE_BYTES: usize = 1 << 10;

impl Inflating {
    pub(crate) fn new() -> Self {
        Self { decoder: flate2::write::MultiGzDecoder::new(Vec::new()), packed: Bytes::new() }
    }

    /// Takes what has arrived; everything before has been inflated.
    pub(crate) fn feed(&mut self, packed: Bytes) {
        self.packed = packed;
    }

    /// The next piece, or `None` if more must arrive first.
    pub(crate) fn next(&mut self) -> Option<Answer<Vec<u8>>> {
        if self.packed.is_empty() {
            return None;
        }
        let piece = self.packed.split_to(self.packed.len().min(PIECE_BYTES));
        let inflated = self.decoder.write_all(&piece).and_then(|()| self.decoder.flush());
        Some(self.give(inflated))
    }

    /// Nothing more arrives: what is left.
    pub(crate) fn finish(&mut self) -> Answer<Vec<u8>> {
        let finished = self.decoder.try_finish();
        self.give(finished)
    }

    fn give(&mut self, inflated: std::io::Result<()>) -> Answer<Vec<u8>> {
        match inflated {
            Ok(()) => Ok(std::mem::take(self.decoder.get_mut())),
            Err(error) => Err(Problem::invalid(format!("the body is no valid gzip: {error}"))),
        }
    }
}

/// The window a zstd frame asks for (RFC 8878, section 3.1.1.1.2): the decoder holds so much back,
/// whatever the limit. A frame without one is a single segment, as large as its content.
fn zstd_window(frame: &[u8]) -> Option<u64> {
    let [_, _, _, _, descriptor, rest @ ..] = frame else { return None };
    let single_segment = descriptor & 0b0010_0000 != 0;
    if !single_segment {
        let window = rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    let dictionary = match descriptor & 0b11 {
        3 => 4,
        bytes => usize::from(bytes),
    };
    let size = rest.get(dictionary..)?;
    match descriptor >> 6 {
        0 => size.first().map(|byte| u64::from(*byte)),
        1 => size.first_chunk().map(|bytes| u64::from(u16::from_le_bytes(*bytes)) + 256),
        2 => size.first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes))),
        _ => size.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)),
    }
}

fn too_large(limit: usize) -> Problem {
    Problem::too_large(format!("the body inflates to more than the limit of {limit} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(body: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(body, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn what_was_compressed_comes_back_and_no_more_than_the_limit() {
        for size in [0, 1, 1_000, 100_000] {
            let body: Vec<u8> = (0..size).map(|byte| (byte % 251) as u8).collect();
            for (encoding, packed) in [(Encoding::Gzip, gzip(&body)), (Encoding::Zstd, zstd(&body))] {
                assert_eq!(inflate_now(encoding, &packed, size.max(1)).unwrap(), body, "{encoding:?} {size}");
                if size > 0 {
                    let problem = inflate_now(encoding, &packed, size - 1).unwrap_err();
                    assert_eq!(problem.status(), 413, "{encoding:?} {size}");
                }
            }
        }
    }

    #[test]
    fn two_frames_are_one_body() {
        let packed = [zstd(b"one"), zstd(b"two")].concat();
        assert_eq!(inflate_now(Encoding::Zstd, &packed, 100).unwrap(), "onetwo");
        let packed = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(inflate_now(Encoding::Gzip, &packed, 100).unwrap(), "onetwo");
    }

    #[test]
    fn frames_that_are_to_be_skipped_are_skipped() {
        let skip = |magic: u8, size: u8| [&[magic, 0x2a, 0x4d, 0x18, size, 0, 0, 0][..], &[7; 3]].concat();
        let packed = [skip(0x50, 3), zstd(b"one"), skip(0x5f, 3), zstd(b"two"), skip(0x53, 3)].concat();
        assert_eq!(inflate_now(Encoding::Zstd, &packed, 100).unwrap(), "onetwo");
        // One that ends early, and what only looks like one.
        for bad in [skip(0x50, 4), skip(0x60, 3)] {
            assert_eq!(inflate_now(Encoding::Zstd, &bad, 100).unwrap_err().status(), 400);
        }
    }

    #[test]
    fn what_is_broken_is_refused() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let good = if encoding == Encoding::Gzip { gzip(b"hello hello") } else { zstd(b"hello hello") };
            for bad in [&b"hello"[..], &good[..good.len() - 5], &[&good[..], b"garbage"].concat()] {
                assert_eq!(inflate_now(encoding, bad, 100).unwrap_err().status(), 400, "{encoding:?} {bad:?}");
            }
        }
        // A window of 1 GiB, asked for by a few bytes.
        let greedy = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 0, 0, 0];
        assert_eq!(inflate_now(Encoding::Zstd, &greedy, 100).unwrap_err().status(), 400);
    }
}
