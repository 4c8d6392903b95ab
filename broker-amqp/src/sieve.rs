//! What lapin cannot be given, made harmless before it reads it.
//!
//! RabbitMQ passes on what a publisher wrote as long as its frames are grammatical. lapin (amq-protocol-types
//! 10.6) reads tables by recursion, so that a header nested 4,000 deep overflows the stack of its thread and
//! ends the process; and a short string that is not UTF-8 (a header's name, a routing key, a content type) is
//! an error that ends the connection, each time the message comes again. Neither can be answered above
//! lapin, and both can be mended in place, since the replacement has the length of what it replaces: a table
//! or an array too deep becomes a string of its bytes, a byte that is not UTF-8 the control character
//! "substitute", which no name or topic of ours has in it.
//!
//! Deliveries do not come to lapin at all where somebody takes them (see [`intake`](crate::intake)).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_io::{AsyncRead, AsyncWrite};

use crate::cancels::Cancels;
use crate::intake::{Intake, Intakes, violation};

/// Tables and arrays within one another that are passed on; more than are read (see [`foreign`](crate::foreign)).
const MAX_DEPTH: usize = 32;

/// Unicode's own: it stands for what could not be read.
const SUBSTITUTE: u8 = 0x1A;

/// Read from the socket in one go, about.
const READ: usize = 128 << 10;

/// A frame that is read as a whole is this long at most. RabbitMQ's own bound (`frame_max`) is 128 KiB.
const MAX_FRAME: usize = 16 << 20;

/// Type, channel and size come before a frame's payload, an end mark after it (AMQP 0-9-1, 4.2.3).
const FRAME_HEAD: usize = 7;
const FRAME_END: usize = 1;
const END_MARK: u8 = 0xCE;
const METHOD: u8 = 1;
pub(crate) const HEADER: u8 = 2;
const BODY: u8 = 3;
/// A server that speaks another protocol says so: `AMQP` and four bytes.
const PROTOCOL: u8 = b'A';

/// A sign of life (4.2.7). lapin gives a connection up on which it reads nothing for twice the heartbeat, which is a
/// second at least.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];
/// How often it is given one where it is left nothing else to read.
const BEAT: Duration = Duration::from_millis(250);

/// So many bytes of deliveries are taken before lapin has a turn, which may have to write.
const TURN: usize = 1 << 20;

/// A connection's stream, sifted as it is read.
#[derive(Debug)]
pub(crate) struct Sieve<S> {
    stream: S,
    sifted: Sifted,
}

/// What was read, in `bytes[start..end]`.
#[derive(Debug)]
struct Sifted {
    bytes: Vec<u8>,
    start: usize,
    /// Up to here it may be passed on.
    clean: usize,
    end: usize,
    /// What is left of a frame that is passed on as it is.
    skip: usize,
    cancels: Cancels,
    intake: Intake,
    /// What is left of a heartbeat of ours, and when the last was due.
    heartbeat: &'static [u8],
    beaten: Instant,
}

impl<S> Sieve<S> {
    pub(crate) fn new(stream: S, intakes: Intakes) -> Self {
        let sifted = Sifted {
            bytes: vec![0; READ],
            start: 0,
            clean: 0,
            end: 0,
            skip: 0,
            cancels: Cancels::default(),
            intake: Intake::new(intakes),
            heartbeat: &[],
            beaten: Instant::now(),
        };
        Self { stream, sifted }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sieve<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, sifted } = self.get_mut();
        let mut taken = 0;
        loop {
            let sift = sifted.sift();
            // What came before a mistake counts.
            sifted.intake.hand_over();
            sift?;
            let count = sifted.pass_on(buffer);
            if count > 0 || buffer.is_empty() {
                return Poll::Ready(Ok(count));
            }
            if taken >= TURN {
                if sifted.beat() {
                    continue;
                }
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match Pin::new(&mut *stream).poll_read(cx, sifted.room()) {
                Poll::Ready(Ok(read)) if read > 0 => {
                    sifted.end += read;
                    taken += read;
                }
                Poll::Pending if taken > 0 && sifted.beat() => {}
                over => return over,
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sieve<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

impl Sifted {
    fn pass_on(&mut self, buffer: &mut [u8]) -> usize {
        if !self.heartbeat.is_empty() {
            return io::Read::read(&mut self.heartbeat, buffer).unwrap_or_default();
        }
        let mut clean = self.bytes.get(self.start..self.clean).unwrap_or_default();
        let count = io::Read::read(&mut clean, buffer).unwrap_or_default();
        self.start += count;
        count
    }

    /// Has a heartbeat passed on, if it is time for one and no frame is under way.
    fn beat(&mut self) -> bool {
        let now = Instant::now();
        let due = self.skip == 0 && now.duration_since(self.beaten) >= BEAT;
        if due {
            (self.heartbeat, self.beaten) = (&HEARTBEAT, now);
        }
        due
    }

    /// Where more can be read to; never empty.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.clean, self.end, self.start) = (self.clean - self.start, self.end - self.start, 0);
        }
        if self.end == self.bytes.len() {
            // A frame larger than all of it, as far as it has come.
            self.bytes.resize(2 * self.end, 0);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Sifts what has come in whole frames, up to a delivery before which there is something to pass on.
    fn sift(&mut self) -> io::Result<()> {
        loop {
            let skipped = self.skip.min(self.end - self.clean);
            self.clean += skipped;
            self.skip -= skipped;
            let frame = self.bytes.get_mut(self.clean..self.end).unwrap_or_default();
            let (kind, channel, size, rest) = match frame {
                [] => return Ok(()),
                [PROTOCOL, ..] => {
                    self.skip = 8;
                    continue;
                }
                [kind, c, d, s, i, z, e, rest @ ..] => {
                    (*kind, u16::from_be_bytes([*c, *d]), u32::from_be_bytes([*s, *i, *z, *e]) as usize, rest)
                }
                _ => return Ok(()),
            };
            let of_delivery = matches!(kind, HEADER | BODY) && self.intake.has_begun(channel);
            if !of_delivery && !matches!(kind, METHOD | HEADER) {
                self.skip = size.saturating_add(FRAME_HEAD + FRAME_END);
                continue;
            }
            if size > MAX_FRAME {
                return Err(violation("a frame that is too large"));
            }
            let Some((payload, [end, ..])) = rest.split_at_mut_checked(size) else { return Ok(()) };
            let is_taken = of_delivery || kind == METHOD && self.intake.takes(channel, payload);
            if is_taken && self.start < self.clean {
                return Ok(());
            }
            if is_taken && *end != END_MARK {
                return Err(violation("a frame that does not end where it should"));
            }
            sift(kind, payload);
            match kind {
                METHOD if is_taken => self.intake.begin(channel, payload)?,
                HEADER if is_taken => self.intake.header(channel, payload)?,
                BODY => self.intake.body(channel, payload)?,
                METHOD => {
                    self.cancels.sift(channel.to_be_bytes(), payload);
                    self.intake.watch(channel, payload);
                }
                _ => {}
            }
            self.clean += FRAME_HEAD + size + FRAME_END;
            if is_taken {
                self.start = self.clean;
            }
        }
    }
}

/// Makes a frame's payload harmless. What is no grammar is left as it is: lapin then says so, and reads no
/// further than this did.
pub(crate) fn sift(kind: u8, payload: &mut [u8]) {
    let mut payload = Payload { bytes: payload, at: 0 };
    let _ = match kind {
        HEADER => payload.properties(),
        METHOD => payload.method(),
        _ => None,
    };
}

struct Payload<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Payload<'_> {
    /// A content header: class, weight, size of the body, and the properties that its flags tell of.
    fn properties(&mut self) -> Option<()> {
        self.skip(12)?;
        let flags = self.number(2)?;
        for property in (2..16).rev() {
            if flags & (1 << property) == 0 {
                continue;
            }
            match property {
                13 => self.table()?,
                // Delivery mode and priority.
                12 | 11 => self.skip(1)?,
                // The timestamp.
                6 => self.skip(8)?,
                _ => self.short_string()?,
            }
        }
        Some(())
    }

    /// Of the methods that a server sends, those with what others have chosen.
    fn method(&mut self) -> Option<()> {
        match (self.number(2)?, self.number(2)?) {
            // connection.start: version, and the server's properties.
            (10, 10) => {
                self.skip(2)?;
                self.table()
            }
            // basic.return: code and text, exchange and routing key.
            (60, 50) => {
                self.skip(2)?;
                (0..3).try_for_each(|_| self.short_string())
            }
            // basic.deliver: consumer, tag and whether it came before, exchange and routing key.
            (60, 60) => {
                self.short_string()?;
                self.skip(9)?;
                (0..2).try_for_each(|_| self.short_string())
            }
            // basic.get-ok, the same.
            (60, 71) => {
                self.skip(9)?;
                (0..2).try_for_each(|_| self.short_string())
            }
            _ => Some(()),
        }
    }

    /// A table and all that is in it, without recursion.
    fn table(&mut self) -> Option<()> {
        let mut open = Vec::with_capacity(MAX_DEPTH);
        open.push((self.end_of_block()?, true));
        while let Some(&(end, named)) = open.last() {
            if self.at == end {
                open.pop();
                continue;
            }
            if self.at > end {
                return None;
            }
            if named {
                self.short_string()?;
            }
            let kind = self.bytes.get_mut(self.at)?;
            self.at += 1;
            match *kind {
                b'F' | b'A' if open.len() < MAX_DEPTH => {
                    let named = *kind == b'F';
                    open.push((self.end_of_block()?, named));
                }
                b'F' | b'A' => {
                    *kind = b'x';
                    self.at = self.end_of_block()?;
                }
                b'S' | b'x' => self.at = self.end_of_block()?,
                b'V' => {}
                b't' | b'b' | b'B' => self.skip(1)?,
                b's' | b'U' | b'u' => self.skip(2)?,
                b'I' | b'i' | b'f' => self.skip(4)?,
                b'D' => self.skip(5)?,
                b'L' | b'l' | b'd' | b'T' => self.skip(8)?,
                _ => return None,
            }
        }
        Some(())
    }

    /// Where that ends which has its length, of four bytes, before it.
    fn end_of_block(&mut self) -> Option<usize> {
        let length = self.number(4)?;
        self.at.checked_add(length).filter(|end| *end <= self.bytes.len())
    }

    fn short_string(&mut self) -> Option<()> {
        let length = self.number(1)?;
        let end = self.at.checked_add(length)?;
        let mut text = self.bytes.get_mut(self.at..end)?;
        while let Err(error) = std::str::from_utf8(text) {
            let (_, bad) = std::mem::take(&mut text).split_at_mut(error.valid_up_to());
            let (bad, rest) = bad.split_at_mut(error.error_len().unwrap_or(bad.len()));
            bad.fill(SUBSTITUTE);
            text = rest;
        }
        self.at = end;
        Some(())
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        let read = self.bytes.get(self.at..self.at + bytes)?;
        self.at += bytes;
        Some(read.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.at = self.at.checked_add(bytes).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::intake::Delivered;
    use futures_util::{AsyncReadExt, TryStreamExt};
    use lapin::protocol::basic::parse_properties;
    use lapin::types::{AMQPValue, parsing::parse_field_table};
    use parking_lot::Mutex;
    use proptest::prelude::*;

    fn block(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
    }

    /// Arrays within one another, the first with its type before it.
    fn nested(depth: usize) -> Vec<u8> {
        (0..depth).fold(Vec::new(), |inner, _| [b"A".to_vec(), block(&inner)].concat())
    }

    /// The payload of a content header with these properties.
    fn header(flags: u16, properties: &[u8]) -> Vec<u8> {
        [&[0; 12], flags.to_be_bytes().as_slice(), properties].concat()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 1], block(payload).as_slice(), &[0xCE]].concat()
    }

    fn depth(value: &AMQPValue) -> usize {
        match value {
            AMQPValue::FieldArray(array) => 1 + array.as_slice().iter().map(depth).max().unwrap_or(0),
            AMQPValue::FieldTable(table) => 1 + table.inner().values().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }

    fn headers(payload: &[u8]) -> lapin::types::FieldTable {
        let (_, properties) = parse_properties(&payload[12..]).unwrap();
        properties.headers().clone().unwrap()
    }

    #[test]
    fn a_table_is_as_deep_as_can_be_read_and_no_deeper() {
        for deep in [1, MAX_DEPTH - 1, MAX_DEPTH, 50_000] {
            let table = [b"\x04deep".to_vec(), nested(deep), b"\x04flatI\0\0\0\x07".to_vec()].concat();
            let mut payload = header(1 << 13, &block(&table));
            sift(HEADER, &mut payload);
            let table = headers(&payload);
            assert_eq!(depth(&table.inner()["deep"]), deep.min(MAX_DEPTH - 1));
            assert_eq!(table.inner()["flat"], AMQPValue::LongInt(7));
        }
    }

    #[test]
    fn short_strings_are_text() {
        let table = block(b"\x03a\xFFbV\x02\xC3\xBCV\x02\xE2\x82V");
        let mut payload = header(1 << 15 | 1 << 13 | 1 << 7, &[b"\x02\xF0t".as_slice(), &table, b"\x01\x80"].concat());
        sift(HEADER, &mut payload);
        let names: Vec<_> = headers(&payload).inner().keys().map(|name| name.as_str().to_owned()).collect();
        assert_eq!(names, ["\x1a\x1a", "a\x1ab", "\u{fc}"]);
        let (_, properties) = parse_properties(&payload[12..]).unwrap();
        assert_eq!(properties.content_type().clone().unwrap().as_str(), "\x1at");
        let mut deliver = [b"\0\x3c\0\x3c\x01c".as_slice(), &[0; 9], b"\x01e\x03k\xFFy"].concat();
        sift(METHOD, &mut deliver);
        assert!(deliver.ends_with(b"\x03k\x1ay"), "{deliver:?}");
    }

    #[test]
    fn frames_pass_in_whatever_pieces_they_come() {
        let deep = header(1 << 13, &block(&[b"\x01d".to_vec(), nested(100)].concat()));
        let large = header(1 << 13, &block(&[b"\x01sS".to_vec(), block(&vec![b'.'; 3 * READ])].concat()));
        let body = frame(3, &[0xFF; 1000]);
        let stream = [frame(HEADER, &deep), body.clone(), frame(8, &[]), frame(HEADER, &large), body.clone()].concat();
        let mut sifted_deep = deep;
        sift(HEADER, &mut sifted_deep);
        let expected = [frame(HEADER, &sifted_deep), body.clone(), frame(8, &[]), frame(HEADER, &large), body].concat();
        for piece in [1, 7, 100, 65_536, usize::MAX] {
            let pieces = stream.chunks(piece.min(stream.len())).map(Ok::<_, io::Error>);
            let reader = futures_util::stream::iter(pieces).into_async_read();
            let mut out = Vec::new();
            pollster(Sieve::new(reader, Intakes::default()).read_to_end(&mut out));
            assert!(out == expected, "in pieces of {piece}");
        }
    }

    /// A delivery of `tag` on a channel: its method, its header, and its body in frames.
    fn delivery(channel: u8, tag: u8, body: &[&[u8]]) -> Vec<Vec<u8>> {
        let on = |kind, payload: &[u8]| [&[kind, 0, channel], block(payload).as_slice(), &[END_MARK]].concat();
        let size: usize = body.iter().map(|part| part.len()).sum();
        let method = [b"\0\x3c\0\x3c\x01c\0\0\0\0\0\0\0".as_slice(), &[tag, 1], b"\x01e\x03a.b"].concat();
        let header = [b"\0\x3c\0\0".as_slice(), &(size as u64).to_be_bytes(), b"\x80\0\x04text"].concat();
        let body = body.iter().map(|part| on(BODY, part));
        [on(METHOD, &method), on(HEADER, &header)].into_iter().chain(body).collect()
    }

    /// What is passed on of a stream that comes in such pieces, and what of its channels 1 and 2 is delivered.
    fn read(stream: &[u8], piece: usize) -> (io::Result<Vec<u8>>, Vec<(u16, Delivered)>) {
        let intakes = Intakes::default();
        let taken = Arc::new(Mutex::new(Vec::new()));
        for channel in [1, 2] {
            let taken = Arc::clone(&taken);
            let take = move |batch: Vec<Delivered>| taken.lock().extend(batch.into_iter().map(|one| (channel, one)));
            intakes.add(channel, Arc::new(take));
        }
        let pieces = stream.chunks(piece.clamp(1, stream.len().max(1))).map(Ok::<_, io::Error>);
        let mut sieve = Sieve::new(futures_util::stream::iter(pieces).into_async_read(), intakes);
        let mut out = Vec::new();
        let read = pollster(async { Ok(sieve.read_to_end(&mut out).await) });
        drop(sieve);
        (read.map(|_| out), Arc::into_inner(taken).unwrap().into_inner())
    }

    #[test]
    fn deliveries_are_taken_in_whatever_pieces_they_come() {
        let heartbeat = HEARTBEAT.to_vec();
        let long = vec![b'l'; 2 * READ];
        let (first, second) = (delivery(1, 1, &[b"one", &long]), delivery(2, 1, &[b"other"]));
        let (empty, left) = (delivery(1, 2, &[]), delivery(3, 1, &[b"nobody takes it"]).concat());
        // Two channels' frames alternate.
        let stream = [
            &heartbeat,
            &first[0],
            &second[0],
            &first[1],
            &left,
            &first[2],
            &second[1],
            &second[2],
            &heartbeat,
            &first[3],
            &empty.concat(),
        ];
        let stream: Vec<u8> = stream.into_iter().flatten().copied().collect();
        for piece in [1, 7, 100, 65_536, usize::MAX] {
            let (passed_on, taken) = read(&stream, piece);
            assert_eq!(passed_on.unwrap(), [heartbeat.as_slice(), &left, &heartbeat].concat(), "in pieces of {piece}");
            let told: Vec<_> = taken.iter().map(|(channel, one)| (*channel, one.tag, one.body.len())).collect();
            assert_eq!(told, [(2, 1, 5), (1, 1, 3 + long.len()), (1, 2, 0)], "in pieces of {piece}");
            for (_, one) in taken {
                assert!(one.redelivered && one.routing_key == "a.b", "{one:?}");
                assert_eq!(one.properties.unwrap().content_type().as_ref().unwrap().as_str(), "text");
            }
        }
    }

    #[test]
    fn what_is_no_grammar_is_delivered_without_properties_and_ends_nothing() {
        let mut broken = delivery(1, 1, &[b"body"]);
        let at = broken[1].len() - 1 - b"\x04text".len();
        broken[1][at] = 200;
        let (passed_on, taken) = read(&[broken.concat(), HEARTBEAT.to_vec()].concat(), usize::MAX);
        assert_eq!(passed_on.unwrap(), HEARTBEAT);
        assert_eq!(taken.len(), 1);
        assert_eq!((&taken[0].1.properties, taken[0].1.body.as_ref()), (&None, b"body".as_slice()));
    }

    #[test]
    fn what_no_server_sends_ends_the_connection_after_what_came_before() {
        let (good, [method, header, body]) =
            (delivery(1, 1, &[b"x"]).concat(), { <[Vec<u8>; 3]>::try_from(delivery(1, 2, &[b"xyz"])).unwrap() });
        let open_ended = [&body[..body.len() - 1], b"?"].concat();
        for (what, wrong) in [
            ("a delivery within another", vec![&method, &method]),
            ("a second header", vec![&method, &header, &header]),
            ("a body before its header", vec![&method, &body]),
            ("too much of a body", vec![&method, &header, &body, &body, &method, &header, &body]),
            ("a frame without end", vec![&method, &header, &open_ended]),
        ] {
            let wrong: Vec<u8> = wrong.into_iter().flatten().copied().collect();
            let (passed_on, taken) = read(&[good.clone(), wrong].concat(), usize::MAX);
            match what {
                // It is whole before: what comes then belongs to no delivery here, and is lapin's to refuse.
                "too much of a body" => assert_eq!((passed_on.unwrap(), taken.len()), (body.clone(), 3), "{what}"),
                _ => {
                    assert_eq!((passed_on.unwrap_err().kind(), taken.len()), (io::ErrorKind::InvalidData, 1), "{what}")
                }
            }
        }
    }

    #[test]
    fn a_channel_that_is_closed_is_delivered_nothing() {
        for closed in [b"\0\x14\0\x0b".as_slice(), b"\0\x14\0\x28", b"\0\x14\0\x29"] {
            let after = [frame(METHOD, closed), delivery(1, 2, &[b"late"]).concat()].concat();
            let stream = [delivery(1, 1, &[b"x"]).concat(), after.clone(), delivery(2, 1, &[b"x"]).concat()].concat();
            let (passed_on, taken) = read(&stream, usize::MAX);
            assert_eq!(passed_on.unwrap(), after);
            assert_eq!(taken.iter().map(|(channel, _)| *channel).collect::<Vec<_>>(), [1, 2]);
        }
    }

    /// A stream that has so much and then no more, as a socket.
    struct Once(Vec<u8>);

    impl AsyncRead for Once {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
            let count = self.0.len().min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0.drain(..count);
            if count == 0 { Poll::Pending } else { Poll::Ready(Ok(count)) }
        }
    }

    #[test]
    fn where_only_deliveries_come_lapin_has_its_turn_and_hears_a_heartbeat() {
        let intakes = Intakes::default();
        intakes.add(1, Arc::new(drop));
        let many = TURN / delivery(1, 1, &[&[0; 1000]]).concat().len() + 1;
        let mut sieve = Sieve::new(Once(delivery(1, 1, &[&[0; 1000]]).concat().repeat(many)), intakes);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut read = |sieve: &mut Sieve<Once>, room| {
            let mut buffer = vec![0; room];
            match Pin::new(sieve).poll_read(&mut cx, &mut buffer) {
                Poll::Ready(count) => Some(buffer[..count.unwrap()].to_vec()),
                Poll::Pending => None,
            }
        };
        assert_eq!(read(&mut sieve, 100), None);
        assert_eq!(sieve.stream.0, b"", "it has had a turn, and all was taken");
        sieve.stream.0 = delivery(1, 1, &[b"x"]).concat();
        sieve.sifted.beaten = Instant::now().checked_sub(BEAT).unwrap();
        assert_eq!(read(&mut sieve, 5).unwrap(), HEARTBEAT[..5]);
        assert_eq!(read(&mut sieve, 100).unwrap(), HEARTBEAT[5..]);
        sieve.stream.0 = delivery(1, 1, &[b"x"]).concat();
        assert_eq!(read(&mut sieve, 100), None, "one is enough for a while");
        // It has its turn with one, too, where there is always more.
        sieve.stream.0 = delivery(1, 1, &[&[0; 1000]]).concat().repeat(many);
        sieve.sifted.beaten = Instant::now().checked_sub(BEAT).unwrap();
        assert_eq!(read(&mut sieve, 100).unwrap(), HEARTBEAT);
    }

    fn pollster<T>(future: impl Future<Output = io::Result<T>>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future).unwrap()
    }

    proptest! {
        /// What is read the same by us and by lapin cannot be used to get past us.
        #[test]
        fn no_bytes_become_a_deep_table(
            deep in 30_usize..60,
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = [b"\x01d".to_vec(), nested(deep), b"\x01eF\0\0\0\x03\x01fV".to_vec()].concat();
            for (index, byte) in changes {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            let mut payload = header(1 << 13, &block(&bytes));
            sift(HEADER, &mut payload);
            if let Ok((_, table)) = parse_field_table(&payload[14..]) {
                let depth = table.inner().values().map(depth).max().unwrap_or(0);
                prop_assert!(depth < MAX_DEPTH);
            }
        }

        /// What no server sends too; `piece` cuts nothing else.
        #[test]
        fn whatever_comes_is_the_same_in_pieces(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            piece in 1_usize..50,
        ) {
            let streams = [delivery(1, 1, &[b"one", b"two"]), vec![HEARTBEAT.to_vec()], delivery(2, 1, &[b"x"]), delivery(3, 1, &[b"y"])];
            let mut stream = streams.concat().concat();
            for (index, byte) in changes {
                let at = index.index(stream.len());
                stream[at] = byte;
            }
            let ((whole, taken), (pieces, taken_too)) = (read(&stream, usize::MAX), read(&stream, piece));
            prop_assert_eq!(taken, taken_too);
            prop_assert_eq!(whole.map_err(|error| error.to_string()), pieces.map_err(|error| error.to_string()));
        }

        #[test]
        fn nothing_panics(kind in 0_u8..5, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut payload = bytes.clone();
            sift(kind, &mut payload);
            prop_assert_eq!(payload.len(), bytes.len());
        }
    }
}
