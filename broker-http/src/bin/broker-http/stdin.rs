//! Lines of standard input, bounded and cancel-safe.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};

/// Reads lines of at most `max` bytes.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    max: usize,
    too_long: bool,
}

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Text(Vec<u8>),
    /// It was read to its end and dropped.
    TooLong,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: R, max: usize) -> Self {
        Self { reader: BufReader::with_capacity(64 << 10, reader), line: Vec::new(), max, too_long: false }
    }

    /// The next line; `None` at the end. A future dropped before it is ready has lost nothing.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            let read = self.reader.fill_buf().await?;
            if read.is_empty() {
                let last = self.too_long || !self.line.is_empty();
                return Ok(last.then(|| self.take()));
            }
            let end = read.iter().position(|byte| *byte == b'\n');
            let part = read.get(..end.unwrap_or(read.len())).unwrap_or_default();
            // One more may be the carriage return.
            self.too_long |= self.line.len() + part.len() > self.max + 1;
            if !self.too_long {
                self.line.extend_from_slice(part);
            }
            let consumed = part.len() + usize::from(end.is_some());
            std::pin::Pin::new(&mut self.reader).consume(consumed);
            if end.is_some() {
                return Ok(Some(self.take()));
            }
        }
    }

    fn take(&mut self) -> Line {
        let mut line = std::mem::take(&mut self.line);
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        if std::mem::take(&mut self.too_long) || line.len() > self.max { Line::TooLong } else { Line::Text(line) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_end_as_people_end_them() {
        let mut lines = Lines::new(&b"a\r\n\nlong line\nb\xff\nlast"[..], 5);
        let mut read = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            read.push(line);
        }
        let text = |text: &[u8]| Line::Text(text.to_vec());
        assert_eq!(read, [text(b"a"), text(b""), Line::TooLong, text(b"b\xff"), text(b"last")]);
    }

    #[tokio::test]
    async fn a_line_as_long_as_allowed_is_taken_whatever_its_end() {
        let mut lines = Lines::new(&b"12345\r\n12345\n123456"[..], 5);
        assert_eq!(lines.next().await.unwrap(), Some(Line::Text(b"12345".to_vec())));
        assert_eq!(lines.next().await.unwrap(), Some(Line::Text(b"12345".to_vec())));
        assert_eq!(lines.next().await.unwrap(), Some(Line::TooLong));
        assert_eq!(lines.next().await.unwrap(), None);
    }
}
