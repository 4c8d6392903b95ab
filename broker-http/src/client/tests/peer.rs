//! A peer that answers each request as a script says, and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// A request as it came in.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Method and path.
    pub(super) line: String,
    pub(super) head: String,
    pub(super) body: Vec<u8>,
    /// Which connection it came in on, from 0.
    pub(super) connection: usize,
}

impl Seen {
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What to do with a request.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// Answer with this status and body, and keep the connection.
    Answer(u16, String),
    /// Write these bytes and close.
    Raw(Vec<u8>),
    /// Close without a word.
    Close,
    /// Say nothing, and keep the connection open.
    Hang,
    /// Do this once the gate is opened.
    After(Arc<Notify>, Box<Then>),
    /// Answer once the gate is opened.
    Gated(Arc<Notify>, u16, String),
}

pub(super) fn answer(status: u16, body: &str) -> Then {
    Then::Answer(status, body.to_owned())
}

/// A published message's answer.
pub(super) fn accepted(id: &str) -> Then {
    answer(202, &format!(r#"{{"id":"{id}","topic":"t","matched":1}}"#))
}

pub(super) struct Peer {
    pub(super) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    more: Arc<Notify>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Peer {
    /// Starts a peer; `script` says what to do with each request.
    pub(super) async fn start(script: impl Fn(usize, &Seen) -> Then + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), script)
    }

    pub(super) fn on(listener: TcpListener, script: impl Fn(usize, &Seen) -> Then + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let (seen, more) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<Notify>::default());
        let script = Arc::new(script);
        let (all, told) = (Arc::clone(&seen), Arc::clone(&more));
        let accepting = tokio::spawn(async move {
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (seen, more, script) = (Arc::clone(&all), Arc::clone(&told), Arc::clone(&script));
                tokio::spawn(async move {
                    serve(stream, connection, |request| {
                        let index = {
                            let mut seen = seen.lock();
                            seen.push(request.clone());
                            seen.len() - 1
                        };
                        more.notify_waiters();
                        script(index, request)
                    })
                    .await;
                });
            }
        });
        Self { address, seen, more, accepting }
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }

    /// Listens no more; connections that are open stay so.
    pub(super) async fn stop(self) -> SocketAddr {
        self.accepting.abort();
        let _ = self.accepting.await;
        self.address
    }

    /// Waits until so many requests have come in.
    pub(super) async fn requests(&self, count: usize) -> Vec<Seen> {
        super::soon(async {
            loop {
                let more = self.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if self.seen().len() >= count {
                    return self.seen();
                }
                more.await;
            }
        })
        .await
    }
}

async fn serve(mut stream: TcpStream, connection: usize, mut then: impl FnMut(&Seen) -> Then) {
    let mut read = Vec::new();
    while let Some(request) = request(&mut stream, &mut read, connection).await {
        let mut next = then(&request);
        while let Then::After(gate, then) = next {
            gate.notified().await;
            next = *then;
        }
        match next {
            Then::After(..) => {}
            Then::Answer(status, body) => {
                if stream.write_all(&response(status, &body)).await.is_err() {
                    return;
                }
            }
            Then::Raw(bytes) => {
                let _ = stream.write_all(&bytes).await;
                return;
            }
            Then::Close => return,
            Then::Hang => {
                // Until the other side gives up.
                let _ = stream.read_to_end(&mut Vec::new()).await;
                return;
            }
            Then::Gated(gate, status, body) => {
                gate.notified().await;
                if stream.write_all(&response(status, &body)).await.is_err() {
                    return;
                }
            }
        }
    }
}

pub(super) fn response(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn request(stream: &mut TcpStream, read: &mut Vec<u8>, connection: usize) -> Option<Seen> {
    let end = loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(read).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(read[..end].to_vec()).unwrap();
    let length = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.trim().parse().unwrap());
    while read.len() < end + length {
        if stream.read_buf(read).await.ok()? == 0 {
            return None;
        }
    }
    let body = read[end..end + length].to_vec();
    read.drain(..end + length);
    let line = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1").to_owned();
    Some(Seen { line, head, body, connection })
}
