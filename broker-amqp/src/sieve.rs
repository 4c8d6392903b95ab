//! What lapin cannot be given, made harmless before it reads it.
//!
//! RabbitMQ passes on what a publisher wrote as long as its frames are grammatical. lapin (amq-protocol-types
//! 10.6) reads tables by recursion, so that a header nested 4,000 deep overflows the stack of its thread and
//! ends the process; and a short string that is not UTF-8 (a header's name, a routing key, a content type) is
//! an error that ends the connection, each time the message comes again. Neither can be answered above
//! lapin, and both can be mended in place, since the replacement has the length of what it replaces: a table
//! or an array too deep becomes a string of its bytes, a byte that is not UTF-8 the control character
//! "substitute", which no name or topic of ours has in it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_io::{AsyncRead, AsyncWrite};

use crate::cancels::Cancels;

/// Tables and arrays within one another that are passed on; more than are read (see [`foreign`](crate::foreign)).
const MAX_DEPTH: usize = 32;

/// Unicode's own: it stands for what could not be read.
const SUBSTITUTE: u8 = 0x1A;

/// Read from the socket in one go, about.
const READ: usize = 128 << 10;

/// A frame of a method or of properties is this long at most. RabbitMQ's own bound (`frame_max`) is 128 KiB.
const MAX_FRAME: usize = 16 << 20;

/// Type, channel and size come before a frame's payload, an end mark after it (AMQP 0-9-1, 4.2.3).
const FRAME_HEAD: usize = 7;
const FRAME_END: usize = 1;
const METHOD: u8 = 1;
pub(crate) const HEADER: u8 = 2;
/// A server that speaks another protocol says so: `AMQP` and four bytes.
const PROTOCOL: u8 = b'A';

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
}

impl<S> Sieve<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            sifted: Sifted { bytes: vec![0; READ], start: 0, clean: 0, end: 0, skip: 0, cancels: Cancels::default() },
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sieve<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, sifted } = self.get_mut();
        loop {
            let count = sifted.pass_on(buffer);
            if count > 0 || buffer.is_empty() {
                return Poll::Ready(Ok(count));
            }
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, sifted.room()))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            sifted.came(read)?;
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
        let mut clean = self.bytes.get(self.start..self.clean).unwrap_or_default();
        let count = io::Read::read(&mut clean, buffer).unwrap_or_default();
        self.start += count;
        count
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

    /// So many bytes more are there: whole frames are sifted.
    fn came(&mut self, count: usize) -> io::Result<()> {
        self.end += count;
        loop {
            let skipped = self.skip.min(self.end - self.clean);
            self.clean += skipped;
            self.skip -= skipped;
            let frame = self.bytes.get_mut(self.clean..self.end).unwrap_or_default();
            match frame {
                [] => return Ok(()),
                [PROTOCOL, ..] => self.skip = 8,
                [kind, channel, of_channel, a, b, c, d, rest @ ..] => {
                    let size = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX);
                    if !matches!(*kind, METHOD | HEADER) {
                        self.skip = size.saturating_add(FRAME_HEAD + FRAME_END);
                        continue;
                    }
                    if size > MAX_FRAME {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of properties is too large"));
                    }
                    let Some((payload, [_, ..])) = rest.split_at_mut_checked(size) else { return Ok(()) };
                    sift(*kind, payload);
                    if *kind == METHOD {
                        self.cancels.sift([*channel, *of_channel], payload);
                    }
                    self.clean += FRAME_HEAD + size + FRAME_END;
                }
                _ => return Ok(()),
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
        _ => payload.method(),
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
    use super::*;
    use futures_util::{AsyncReadExt, TryStreamExt};
    use lapin::protocol::basic::parse_properties;
    use lapin::types::{AMQPValue, parsing::parse_field_table};
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
            pollster(Sieve::new(reader).read_to_end(&mut out));
            assert!(out == expected, "in pieces of {piece}");
        }
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

        #[test]
        fn nothing_panics(kind in 0_u8..5, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut payload = bytes.clone();
            sift(kind, &mut payload);
            prop_assert_eq!(payload.len(), bytes.len());
        }
    }
}
