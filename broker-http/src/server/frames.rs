//! What a connection of HTTP/2 refuses by itself, told by the frames it writes (RFC 9113, 4.1): h2 answers 431 to a
//! head that is too large, resets streams that are too many, and ends connections, without telling anybody who could count.

use h2::Reason;

use super::metrics::Refusal;

/// Bytes of a frame's head.
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// The flag of an answer to a ping.
const ACK: u8 = 1;

/// Bytes of data after which it may be told how much more may be sent.
const UPDATED: usize = 512;

/// Follows the frames that are written, however they are cut.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// The head of the frame being written; behind it what ends a stream or the connection says of the reason.
    begun: [u8; HEAD + 8],
    have: usize,
    /// Bytes of a payload that nobody looks at.
    skip: usize,
    /// Whether one was written: the first says how the connection is meant.
    any: bool,
    /// Answers begun.
    answers: usize,
    /// Those of them that are h2's own.
    own: usize,
    /// The stream of the last of these, which a reset follows.
    refused: u32,
    asked: Asked,
}

/// What was written that the other side says something to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Asked {
    /// Frames that tell how much of the data may be sent on: two for each frame of it, and many for a large one.
    pub(crate) updates: usize,
    pub(crate) pings: usize,
}

impl Frames {
    /// These bytes were written, and `given` answers were given by now; tells what was refused.
    ///
    /// An answer that nobody gave is a 431: h2 has no other. Answers given and not written, since their stream was
    /// reset before, may hide some.
    pub(crate) fn written(&mut self, mut bytes: &[u8], given: usize, mut refused: impl FnMut(Refusal)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            let looked_at = self.looked_at();
            for byte in self.begun.iter_mut().take(looked_at).skip(self.have) {
                let Some((first, rest)) = bytes.split_first() else { return };
                (*byte, bytes) = (*first, rest);
                self.have += 1;
            }
            // With the head it is known what to look at behind it.
            if self.have == self.looked_at() {
                self.end(given, &mut refused);
            }
        }
    }

    /// Whether another frame may begin: none is half written.
    pub(crate) fn is_between(&self) -> bool {
        self.have == 0 && self.skip == 0 && self.any
    }

    /// What was written since this was last asked.
    pub(crate) fn asked(&mut self) -> Asked {
        std::mem::take(&mut self.asked)
    }

    /// Bytes of the frame that say something.
    fn looked_at(&self) -> usize {
        match self.begun {
            [_, _, _, RST_STREAM, ..] if self.have >= HEAD => HEAD + 4,
            [_, _, _, GOAWAY, ..] if self.have >= HEAD => HEAD + 8,
            _ => HEAD,
        }
    }

    fn end(&mut self, given: usize, refused: &mut impl FnMut(Refusal)) {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3, reset @ .., c0, c1, c2, c3] = self.begun;
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        // It has three bytes.
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        self.skip = length.saturating_sub(self.have - HEAD);
        (self.have, self.any) = (0, true);
        match kind {
            DATA => self.asked.updates += 2 + length / UPDATED,
            PING if flags & ACK == 0 => self.asked.pings += 1,
            HEADERS => {
                self.answers += 1;
                if self.answers > given + self.own {
                    self.own += 1;
                    self.refused = stream;
                    refused(Refusal::HeadTooLarge);
                }
            }
            RST_STREAM => match Reason::from(u32::from_be_bytes(reset)) {
                Reason::REFUSED_STREAM => refused(Refusal::ConnectionStreams),
                Reason::PROTOCOL_ERROR if stream != self.refused => refused(Refusal::Malformed),
                _ => {}
            },
            GOAWAY => match Reason::from(u32::from_be_bytes([c0, c1, c2, c3])) {
                Reason::NO_ERROR | Reason::INTERNAL_ERROR => {}
                Reason::ENHANCE_YOUR_CALM => refused(Refusal::Flood),
                // So ends a head that goes on beyond what could be skipped.
                Reason::COMPRESSION_ERROR => refused(Refusal::HeadTooLarge),
                _ => refused(Refusal::Malformed),
            },
            _ => {}
        }
    }
}

/// Bytes that a connection of HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: usize = 24;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Follows the frames that are read, to tell whether one has begun and is not whole, or a head goes on in the next.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Bytes of the preface.
    preface: usize,
    /// As much of a frame's head as there is.
    head: [u8; HEAD],
    have: usize,
    /// Bytes of a payload to come.
    rest: usize,
    /// A head without an end.
    open: bool,
    /// The last stream that was begun.
    last: u32,
    said: Said,
}

/// Frames by what they say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Said {
    pub(crate) requests: usize,
    /// Answers to pings.
    pub(crate) pongs: usize,
    /// All others but data and what goes on of a head.
    pub(crate) others: usize,
}

impl Heard {
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        let preface = bytes.len().min(PREFACE - self.preface);
        self.preface += preface;
        bytes = bytes.get(preface..).unwrap_or_default();
        while !bytes.is_empty() {
            let rest = self.rest.min(bytes.len());
            self.rest -= rest;
            bytes = bytes.get(rest..).unwrap_or_default();
            for byte in self.head.iter_mut().skip(self.have) {
                let Some((first, rest)) = bytes.split_first() else { return };
                (*byte, bytes) = (*first, rest);
                self.have += 1;
            }
            let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = self.head;
            self.rest = u32::from_be_bytes([0, l0, l1, l2]) as usize;
            self.have = 0;
            if kind == HEADERS || kind == CONTINUATION {
                self.open = flags & END_HEADERS == 0;
            }
            match kind {
                HEADERS => {
                    self.said.requests += 1;
                    self.last = self.last.max(u32::from_be_bytes([s0, s1, s2, s3]) & (u32::MAX >> 1));
                }
                PING if flags & ACK != 0 => self.said.pongs += 1,
                DATA | CONTINUATION => {}
                _ => self.said.others += 1,
            }
        }
    }

    /// What tells the other side that it floods, and which of its streams was the last (RFC 9113, 6.8).
    pub(crate) fn calm(&self) -> [u8; HEAD + 8] {
        let mut frame = [0; HEAD + 8];
        let [.., length, kind, _flags, _, _, _, _, l0, l1, l2, l3, c0, c1, c2, c3] = &mut frame;
        (*length, *kind) = (8, GOAWAY);
        [*l0, *l1, *l2, *l3] = self.last.to_be_bytes();
        [*c0, *c1, *c2, *c3] = u32::from(Reason::ENHANCE_YOUR_CALM).to_be_bytes();
        frame
    }

    /// What was read since this was last asked.
    pub(crate) fn said(&mut self) -> Said {
        std::mem::take(&mut self.said)
    }

    pub(crate) fn has_begun(&self) -> bool {
        let preface = (1..PREFACE).contains(&self.preface);
        preface || self.have > 0 || self.rest > 0 || self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    #[test]
    fn what_is_begun_is_known_however_the_bytes_are_cut() {
        let mut end = frame(CONTINUATION, 1, &[0x82; 300]);
        end[4] = END_HEADERS;
        let all = [
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), false),
            (frame(4, 0, &[]), false),
            (frame(6, 0, &[HEADERS; 8]), false),
            (frame(HEADERS, 1, &[0x82; 20]), true),
            (end, false),
        ];
        for size in 1..=64 {
            let mut heard = Heard::default();
            for (bytes, open) in &all {
                let (last, most) = bytes.split_last().unwrap();
                most.chunks(size).for_each(|piece| heard.read(piece));
                assert!(heard.has_begun(), "{size} bytes at a time: {bytes:?}");
                heard.read(&[*last]);
                assert_eq!(heard.has_begun(), *open, "{size} bytes at a time: {bytes:?}");
            }
        }
    }

    #[test]
    fn what_is_refused_is_seen_however_the_bytes_are_cut() {
        let reset = |stream: u32, code: Reason| frame(RST_STREAM, stream, &u32::from(code).to_be_bytes());
        let end = |code: Reason| frame(GOAWAY, 0, &[&[0; 4][..], &u32::from(code).to_be_bytes(), b"why"].concat());
        let bytes = [
            frame(4, 0, &[]),
            frame(HEADERS, 1, &[0x88; 40]),
            frame(0, 1, &[RST_STREAM; 100]),
            reset(3, Reason::REFUSED_STREAM),
            frame(HEADERS, 5, &[0x88]),
            reset(5, Reason::PROTOCOL_ERROR),
            reset(7, Reason::PROTOCOL_ERROR),
            reset(9, Reason::NO_ERROR),
            end(Reason::NO_ERROR),
            reset(11, Reason::REFUSED_STREAM),
            end(Reason::ENHANCE_YOUR_CALM),
            end(Reason::COMPRESSION_ERROR),
        ]
        .concat();
        for size in 1..=bytes.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            bytes.chunks(size).for_each(|piece| frames.written(piece, 1, |refusal| seen.push(refusal)));
            let expected = [
                Refusal::ConnectionStreams,
                Refusal::HeadTooLarge,
                Refusal::Malformed,
                Refusal::ConnectionStreams,
                Refusal::Flood,
                Refusal::HeadTooLarge,
            ];
            assert_eq!(seen, expected, "{size} bytes at a time");
        }
    }
}
