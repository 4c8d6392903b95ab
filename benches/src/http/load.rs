//! The load generator: requests written and answers read on bare sockets, so that most of what is
//! measured is the server.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

use super::bounded;
use crate::Result;

/// A kept connection of HTTP/1.1, one request at a time.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(16 << 10) })
    }

    /// Writes a request and reads its answer, which must be 202 and have a length; tells the body.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> Result<&[u8]> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err("the server closed the connection before its answer was complete".into());
            }
            if let Some((start, end)) = answer_body(&self.buffer)? {
                return self.buffer.get(start..end).ok_or_else(|| "the answer is longer than it says".into());
            }
        }
    }
}

/// Where the body of the answer lies, if all of it is there.
fn answer_body(buffer: &[u8]) -> Result<Option<(usize, usize)>> {
    let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(buffer.get(..head).unwrap_or_default())?;
    if !text.starts_with("HTTP/1.1 202 ") {
        return Err(format!("the server answered {text:?}").into());
    }
    let length = text.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let end = head + 4 + length.ok_or("the answer has no content-length")?;
    Ok((buffer.len() >= end).then_some((head + 4, end)))
}

/// A request that publishes `body` to `topic`.
pub(crate) fn publish_request(address: SocketAddr, topic: &str, content_type: &str, body: &[u8]) -> Bytes {
    let length = body.len();
    let head = format!(
        "POST /topics/{topic} HTTP/1.1\r\nhost: {address}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut request = head.into_bytes();
    request.extend_from_slice(body);
    request.into()
}

/// Sends the request so many times on each of so many connections, and tells the requests a second.
pub(crate) async fn closed_loop(address: SocketAddr, connections: usize, times: usize, request: Bytes) -> Result<f64> {
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        open.push(Connection::open(address).await?);
    }
    let began = Instant::now();
    let clients: Vec<_> = open
        .into_iter()
        .map(|mut connection| {
            let request = request.clone();
            tokio::spawn(async move {
                for _ in 0..times {
                    connection.exchange(&request).await?;
                }
                Result::Ok(())
            })
        })
        .collect();
    bounded("a load", async {
        for client in clients {
            client.await??;
        }
        Ok(())
    })
    .await?;
    Ok((connections * times) as f64 / began.elapsed().as_secs_f64())
}

/// Sends `count` requests at a fixed rate, whatever the answers do, over all the connections in turn;
/// `request` makes each when it is due. Ends when every answer has come.
pub(crate) async fn open_loop(
    address: SocketAddr,
    connections: usize,
    rate: f64,
    count: usize,
    request: impl Fn() -> Bytes,
) -> Result<()> {
    let (mut writers, mut readers) = (Vec::with_capacity(connections), Vec::with_capacity(connections));
    for number in 0..connections {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        let due = count / connections + usize::from(number < count % connections);
        readers.push(tokio::spawn(read_answers(reader, due)));
        writers.push(writer);
    }
    let began = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(1));
    let mut sent = 0;
    while sent < count {
        tick.tick().await;
        let due = ((began.elapsed().as_secs_f64() * rate) as usize).min(count);
        while sent < due {
            let turn = sent % connections;
            if let Some(writer) = writers.get_mut(turn) {
                writer.write_all(&request()).await?;
            }
            sent += 1;
        }
    }
    bounded("reading the answers", async {
        for reader in readers {
            reader.await??;
        }
        Ok(())
    })
    .await
}

async fn read_answers(mut reader: OwnedReadHalf, mut due: usize) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(16 << 10);
    while due > 0 {
        if reader.read_buf(&mut buffer).await? == 0 {
            return Err(format!("the server closed the connection with {due} answers due").into());
        }
        while let Some((_, end)) = answer_body(&buffer)? {
            buffer.advance(end);
            due -= 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_when_its_length_is_there() {
        let answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 4\r\n\r\nbody";
        assert_eq!(answer_body(&answer[..10]).unwrap(), None);
        assert_eq!(answer_body(&answer[..answer.len() - 1]).unwrap(), None);
        assert_eq!(answer_body(answer).unwrap(), Some((answer.len() - 4, answer.len())));
    }

    #[test]
    fn another_status_is_an_error_that_shows_it() {
        let error = answer_body(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").unwrap_err();
        assert!(error.to_string().contains("503"), "{error}");
        assert!(answer_body(b"HTTP/1.1 202 Accepted\r\n\r\n").is_err(), "without a length");
    }
}
