//! Compressed request bodies: gzip and zstd, bounded by what they inflate to.

use std::io::Write;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use broker_core::ErrorKind;

use super::memory::Reservation;
use super::problem::{Answer, Problem};
use super::zstd::Unpacking;

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
            _ => {
                let mut problem = Problem::new(
                    StatusCode::UNSUPPORTED_MEDIA_TYPE,
                    ErrorKind::Invalid,
                    "content-encoding: a body is compressed once at most, by gzip or zstd",
                );
                // Tells this from a media type that is not taken (RFC 9110, section 15.5.16).
                problem.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, zstd"));
                Err(problem)
            }
        }
    }
}

/// Inflates a body to at most `limit` bytes; a large one off the threads that serve requests. The reservation, which
/// is for the body as it came, grows with what comes of it and is for that alone at the end.
pub(crate) async fn inflate(
    encoding: Encoding,
    body: Bytes,
    limit: usize,
    reservation: Reservation,
) -> Answer<(Bytes, Reservation)> {
    if body.len() <= INLINE_BYTES && limit <= 4 << 20 {
        return inflate_now(encoding, body, limit, reservation);
    }
    match tokio::task::spawn_blocking(move || inflate_now(encoding, body, limit, reservation)).await {
        Ok(inflated) => inflated,
        Err(_) => Err(Problem::draining()),
    }
}

fn inflate_now(
    encoding: Encoding,
    body: Bytes,
    limit: usize,
    mut reservation: Reservation,
) -> Answer<(Bytes, Reservation)> {
    let mut inflated = Vec::with_capacity(body.len().min(limit));
    let mut inflating = Inflating::new(encoding);
    inflating.feed(body);
    let mut take = |piece: Bytes, held: u64| {
        if inflated.len() + piece.len() > limit {
            return Err(too_large(limit));
        }
        reservation.reach((inflated.len() + piece.len()) as u64 + held)?;
        inflated.extend_from_slice(&piece);
        Ok(())
    };
    while let Some(piece) = inflating.next() {
        take(piece?, inflating.held())?;
    }
    take(inflating.finish()?, 0)?;
    drop(inflating);
    // What is kept of it keeps all of it.
    inflated.shrink_to_fit();
    reservation.shrink(inflated.len() as u64);
    Ok((inflated.into(), reservation))
}

/// A body inflated piece by piece: no piece is large, and of gzip what is flushed comes out at once.
pub(crate) enum Inflating {
    Gzip { decoder: Box<flate2::write::MultiGzDecoder<Vec<u8>>>, packed: Bytes },
    Zstd(Box<Unpacking>),
}

/// Compressed bytes inflated in one go: at most a mebibyte comes of them.
const PIECE_BYTES: usize = 1 << 10;

impl Inflating {
    pub(crate) fn new(encoding: Encoding) -> Self {
        match encoding {
            Encoding::Gzip => {
                Self::Gzip { decoder: Box::new(flate2::write::MultiGzDecoder::new(Vec::new())), packed: Bytes::new() }
            }
            Encoding::Zstd => Self::Zstd(Box::new(Unpacking::new())),
        }
    }

    /// Takes what has arrived; everything before has been inflated.
    pub(crate) fn feed(&mut self, arrived: Bytes) {
        match self {
            Self::Gzip { packed, .. } => *packed = arrived,
            Self::Zstd(unpacking) => unpacking.feed(&arrived),
        }
    }

    /// Bytes it holds of what has arrived, about.
    pub(crate) fn held(&self) -> u64 {
        match self {
            Self::Gzip { packed, .. } => packed.len() as u64,
            Self::Zstd(unpacking) => unpacking.held(),
        }
    }

    /// The next piece, or `None` if more must arrive first.
    pub(crate) fn next(&mut self) -> Option<Answer<Bytes>> {
        match self {
            Self::Gzip { packed, .. } if packed.is_empty() => None,
            Self::Gzip { decoder, packed } => {
                let piece = packed.split_to(packed.len().min(PIECE_BYTES));
                let inflated = decoder.write_all(&piece).and_then(|()| decoder.flush());
                Some(inflated.map(|()| std::mem::take(decoder.get_mut()).into()).map_err(no_gzip))
            }
            Self::Zstd(unpacking) => unpacking.next(),
        }
    }

    /// Nothing more arrives: what is left.
    pub(crate) fn finish(&mut self) -> Answer<Bytes> {
        match self {
            Self::Gzip { decoder, .. } => {
                decoder.try_finish().map_err(no_gzip)?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
            Self::Zstd(unpacking) => unpacking.finish().map(|()| Bytes::new()),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn no_gzip(error: std::io::Error) -> Problem {
    Problem::invalid(format!("the body is no valid gzip: {error}"))
}

fn too_large(limit: usize) -> Problem {
    Problem::too_large(format!("the body inflates to more than the limit of {limit} bytes"))
}

#[cfg(test)]
mod tests {
    use super::super::memory::Ledger;
    use super::*;

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    }

    /// Without a bound of memory.
    fn inflate_now(encoding: Encoding, packed: &[u8], limit: usize) -> Answer<Bytes> {
        let room = Ledger::new(u64::MAX, u64::MAX).room();
        Ok(super::inflate_now(encoding, Bytes::copy_from_slice(packed), limit, room)?.0)
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
    fn it_takes_as_much_memory_as_comes_of_it() {
        for (encoding, pack) in [(Encoding::Gzip, gzip as fn(&[u8]) -> Vec<u8>), (Encoding::Zstd, zstd)] {
            let packed = Bytes::from(pack(&vec![7; 300_000]));
            let inflate = |max| {
                let ledger = Ledger::new(max, max);
                let mut room = ledger.room();
                room.grow(packed.len() as u64).unwrap();
                let inflated = super::inflate_now(encoding, packed.clone(), 16 << 20, room);
                let status =
                    inflated.as_ref().map(|(bytes, room)| (bytes.len(), room.bytes())).map_err(Problem::status);
                let held = ledger.held();
                drop(inflated);
                assert_eq!(ledger.held(), 0);
                (status, held)
            };
            assert_eq!(inflate(1 << 20), (Ok((300_000, 300_000)), 300_000), "{encoding:?}");
            // It would never fit.
            assert_eq!(inflate(200_000), (Err(StatusCode::PAYLOAD_TOO_LARGE), 0), "{encoding:?}");
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
