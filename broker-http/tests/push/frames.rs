//! An HTTP/2 endpoint by hand, frame by frame: what no server would do when it is asked to, and when.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// Of DATA and HEADERS.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// Of SETTINGS and PING.
const ACK: u8 = 1;

/// The last stream of a GOAWAY that only warns (RFC 9113, section 6.8).
pub(crate) const ANY: u32 = (1 << 31) - 1;

/// One connection, the endpoint's end.
pub(crate) struct Peer {
    stream: TcpStream,
}

impl Peer {
    /// The next connection, its preface exchanged.
    pub(crate) async fn accept(listener: &TcpListener) -> Self {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.read_exact(&mut [0; 24]).await.unwrap();
        let mut peer = Self { stream };
        peer.write(SETTINGS, 0, 0, &[]).await;
        // No test runs out of it.
        peer.write(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes()).await;
        peer
    }

    /// The stream of the next request that is there in full; none when the other side has closed.
    pub(crate) async fn request(&mut self) -> Option<u32> {
        loop {
            let (kind, flags, stream) = self.read().await?;
            if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
                return Some(stream);
            }
        }
    }

    /// Waits for the answer to a PING, with what comes before it: the streams of requests.
    pub(crate) async fn ping(&mut self) -> Vec<u32> {
        self.write(PING, 0, 0, &[7; 8]).await;
        let mut requests = Vec::new();
        while let Some((kind, flags, stream)) = self.read().await {
            match kind {
                PING if flags & ACK != 0 => break,
                DATA | HEADERS if flags & END_STREAM != 0 => requests.push(stream),
                _ => {}
            }
        }
        requests
    }

    /// Answers 200.
    pub(crate) async fn answer(&mut self, stream: u32) {
        // The 8th of the static table.
        self.write(HEADERS, END_STREAM | END_HEADERS, stream, &[0x88]).await;
    }

    /// No stream above `last` is processed.
    pub(crate) async fn goaway(&mut self, last: u32) {
        let payload = [last.to_be_bytes(), [0; 4]].concat();
        self.write(GOAWAY, 0, 0, &payload).await;
    }

    /// Gives a stream all the room there can be, by SETTINGS_INITIAL_WINDOW_SIZE.
    pub(crate) async fn widen(&mut self) {
        let size = [&4_u16.to_be_bytes()[..], &ANY.to_be_bytes()].concat();
        self.write(SETTINGS, 0, 0, &size).await;
    }

    /// Writes a frame that nobody minds, the answer to no PING; whether the connection stands.
    pub(crate) async fn nudge(&mut self) -> bool {
        let frame = [&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &[1; 8]].concat();
        self.stream.write_all(&frame).await.is_ok()
    }

    /// Kind, flags and stream of the next frame; what asks for an answer at once has got it.
    async fn read(&mut self) -> Option<(u8, u8, u32)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        match kind {
            SETTINGS if flags & ACK == 0 => self.write(SETTINGS, ACK, 0, &[]).await,
            PING if flags & ACK == 0 => self.write(PING, ACK, 0, &payload).await,
            _ => {}
        }
        Some((kind, flags, u32::from_be_bytes(stream)))
    }

    /// Whether it arrives is not known: the other side may have closed.
    async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        let frame = [&[a, b, c, kind, flags][..], &stream.to_be_bytes(), payload].concat();
        let _ = self.stream.write_all(&frame).await;
    }
}
