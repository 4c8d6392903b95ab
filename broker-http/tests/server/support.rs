//! A server on a port of its own, and a client that says exactly what it is told.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, MemoryBroker};
use broker_http::{Server, ServerOptions};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A guard against hanging, never a measure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Fails a test that hangs instead of letting it.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it took longer than any test may")
}

/// A server in this process, on a real socket.
pub(crate) struct Running {
    pub(crate) server: Server,
    pub(crate) address: SocketAddr,
}

impl Running {
    pub(crate) async fn start() -> Self {
        Self::with(ServerOptions::new()).await
    }

    pub(crate) async fn with(options: ServerOptions) -> Self {
        Self::over(Arc::new(MemoryBroker::new()), options).await
    }

    pub(crate) async fn over(broker: Arc<dyn Broker>, options: ServerOptions) -> Self {
        let server = Server::new(broker, options.with_development(true));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await.unwrap() });
        Self { server, address }
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        soon(TcpStream::connect(self.address)).await.unwrap()
    }

    /// One request on a connection of its own.
    pub(crate) async fn send(&self, request: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Reply {
        let body = body.as_ref();
        let mut head = format!("{request} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !headers.iter().any(|(name, _)| ["content-length", "transfer-encoding"].contains(name)) {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let mut stream = self.connect().await;
        let (mut read, mut write) = stream.split();
        let mut answer = Vec::new();
        let said = async {
            // A server that refuses may stop listening; its answer is what counts.
            let _ = write.write_all(head.as_bytes()).await;
            let _ = write.write_all(body).await;
        };
        let (_, heard) = soon(async { tokio::join!(said, read.read_to_end(&mut answer)) }).await;
        heard.expect("the connection was reset before the answer was read");
        Reply::parse(&answer)
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path}"), &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.send(&format!("POST {path}"), &[], body).await
    }

    pub(crate) async fn put(&self, name: &str, spec: &str) -> Reply {
        self.send(&format!("PUT /subscriptions/{name}"), &[], spec).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.send(&format!("DELETE {path}"), &[], "").await
    }

    /// Leases pulled: name, attempt and event of each.
    pub(crate) async fn pull(&self, name: &str, query: &str) -> Vec<Lease> {
        let reply = self.post(&format!("/subscriptions/{name}/pull?{query}"), "").await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let deliveries = reply.json()["deliveries"].as_array().unwrap().clone();
        deliveries
            .into_iter()
            .map(|delivery| Lease {
                lease: delivery["lease"].as_str().unwrap().to_owned(),
                attempt: delivery["attempt"].as_u64().unwrap(),
                event: delivery["event"].clone(),
            })
            .collect()
    }

    /// The leases that no longer held.
    pub(crate) async fn settle(&self, name: &str, body: Value) -> Vec<String> {
        let reply = self.post(&format!("/subscriptions/{name}/settle"), &body.to_string()).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        serde_json::from_value(reply.json()["gone"].clone()).unwrap()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) lease: String,
    pub(crate) attempt: u64,
    pub(crate) event: Value,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    /// The last answer of what was heard; an interim one (100) before it is passed over.
    pub(crate) fn parse(answer: &[u8]) -> Self {
        let text = String::from_utf8_lossy(answer).into_owned();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no answer: {text:?}"));
        let (head, rest) = answer.split_at(end + 4);
        let head = std::str::from_utf8(head).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        if status == 100 {
            return Self::parse(rest);
        }
        let headers: Vec<_> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let mut reply = Self { status, headers, body: rest.to_vec() };
        if reply.header("transfer-encoding") == Some("chunked") {
            reply.body = unchunk(rest);
        }
        reply
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts a problem with this status whose detail says this.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, detail: &str) {
        assert_eq!(self.status, status, "{detail}: {} {}", self.status, self.text());
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let json = self.json();
        assert_eq!(json["status"], status);
        assert!(json["title"].is_string() && json["kind"].is_string(), "{json}");
        let have = json["detail"].as_str().unwrap();
        assert!(have.contains(detail), "{detail:?} is not in {have:?}");
    }
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap().trim(), 16).unwrap();
        let start = line + 2;
        if size == 0 || start + size > rest.len() {
            break;
        }
        body.extend_from_slice(&rest[start..start + size]);
        rest = &rest[start + size + 2..];
    }
    body
}

/// Reads from a stream until what was heard contains `text`; returns all of it.
pub(crate) async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut heard = Vec::new();
    soon(async {
        let mut piece = [0; 4096];
        loop {
            let read = stream.read(&mut piece).await.unwrap();
            heard.extend_from_slice(&piece[..read]);
            let so_far = String::from_utf8_lossy(&heard).into_owned();
            if so_far.contains(text) {
                return so_far;
            }
            assert!(read > 0, "the stream ended without {text:?}: {so_far}");
        }
    })
    .await
}
