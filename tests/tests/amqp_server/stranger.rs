//! A client of nobody's making: it writes frames byte by byte, so that what no library would send is sent.

use std::io::{Error, Read, Result, Write};
use std::net::TcpStream;

/// Frame types (AMQP 0-9-1, 4.2.3).
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// Property flags, from the highest bit down: content type, content encoding, headers.
const CONTENT_TYPE: u16 = 1 << 15;
const HEADERS: u16 = 1 << 13;

pub(crate) struct Stranger {
    socket: TcpStream,
}

impl Stranger {
    /// Logs in at `address` as guest, and opens the channel 1 of the virtual host `/`.
    pub(crate) fn connect(address: &str) -> Result<Self> {
        let mut one = Self { socket: TcpStream::connect(address)? };
        one.socket.write_all(b"AMQP\x00\x00\x09\x01")?;
        one.expect(10, 10)?;
        let login = [table(&[]), short(b"PLAIN"), long(b"\0guest\0guest"), short(b"en_US")];
        one.method(0, 10, 11, &login.concat())?;
        one.expect(10, 30)?;
        // As many channels and as large frames as the server takes, no heartbeats.
        one.method(0, 10, 31, &[[0, 16].as_slice(), &131_072_u32.to_be_bytes(), &[0, 0]].concat())?;
        one.method(0, 10, 40, &[short(b"/"), short(b""), vec![0]].concat())?;
        one.expect(10, 41)?;
        one.method(1, 20, 10, &short(b""))?;
        one.expect(20, 11)?;
        Ok(one)
    }

    /// Publishes to an exchange; the body is one frame at most.
    pub(crate) fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        content_type: &[u8],
        headers: &[u8],
        body: &[u8],
    ) -> Result<()> {
        self.method(1, 60, 40, &[vec![0, 0], short(exchange.as_bytes()), short(key), vec![0]].concat())?;
        let properties = [short(content_type), headers.to_vec()].concat();
        let head = [60, 0].map(u16::to_be_bytes).concat();
        let (size, flags) = ((body.len() as u64).to_be_bytes(), (CONTENT_TYPE | HEADERS).to_be_bytes());
        self.frame(HEADER, 1, &[&head, size.as_slice(), &flags, &properties].concat())?;
        self.frame(BODY, 1, body)
    }

    /// Closes the channel: what was published before has been taken, or an error says why not.
    pub(crate) fn close(mut self) -> Result<()> {
        self.method(1, 20, 40, &[vec![0, 200], short(b"OK"), vec![0; 4]].concat())?;
        self.expect(20, 41)
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) -> Result<()> {
        let name = [class, method].map(u16::to_be_bytes).concat();
        self.frame(METHOD, channel, &[&name, arguments].concat())
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) -> Result<()> {
        let size = (payload.len() as u32).to_be_bytes();
        self.socket.write_all(&[&[kind], channel.to_be_bytes().as_slice(), &size, payload, &[0xCE]].concat())
    }

    fn expect(&mut self, class: u16, method: u16) -> Result<()> {
        let mut head = [0; 7];
        self.socket.read_exact(&mut head)?;
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let mut payload = vec![0; size as usize + 1];
        self.socket.read_exact(&mut payload)?;
        if payload.starts_with(&[class, method].map(u16::to_be_bytes).concat()) {
            return Ok(());
        }
        Err(Error::other(format!("not {class}.{method}: {}", String::from_utf8_lossy(&payload))))
    }
}

pub(crate) fn short(text: &[u8]) -> Vec<u8> {
    [&[text.len() as u8], text].concat()
}

fn long(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// A table of fields: names, and values with their types before them.
pub(crate) fn table(fields: &[(&[u8], Vec<u8>)]) -> Vec<u8> {
    long(&fields.iter().flat_map(|(name, value)| [short(name), value.clone()].concat()).collect::<Vec<_>>())
}

/// A string, as the value of a field.
pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [b"S".as_slice(), &long(text)].concat()
}

/// `depth` arrays in one another, as the value of a field.
pub(crate) fn nested(depth: u32) -> Vec<u8> {
    (0..depth).rev().flat_map(|inner| [b"A".as_slice(), &(5 * inner).to_be_bytes()].concat()).collect()
}
