//! A scripted endpoint on a real socket, and a push to it over the in-process broker.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, BrokerExt, Group, GroupOptions, MemoryBroker, Message, Topic};
use broker_http::SubscriptionSpec;
use broker_http::push::{Guard, Push, PushClient, PushOptions};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// Guards a test against hanging; no test asserts a time below it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the endpoint does with a request.
#[derive(Clone)]
pub(crate) enum Reaction {
    /// Answers this status, these headers and this body, and keeps the connection.
    Answer(u16, &'static str, String),
    /// Writes these bytes and closes.
    Write(&'static str),
    /// Writes these bytes and never anything more.
    Hang(&'static str),
    /// Answers 200 once told to.
    Hold(Arc<Notify>),
}

pub(crate) fn status(status: u16) -> Reaction {
    Reaction::Answer(status, "", String::new())
}

pub(crate) fn answer(body: impl Into<String>) -> Reaction {
    Reaction::Answer(200, "content-type: application/json\r\n", body.into())
}

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// The number of the connection, from 1, and of the request on it.
    pub(crate) connection: usize,
    pub(crate) on_connection: usize,
    pub(crate) at: Instant,
}

impl Request {
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name} in {self:?}"))
    }

    pub(crate) fn attempt(&self) -> u32 {
        self.header("broker-attempt").parse().unwrap()
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

type Script = Arc<dyn Fn(&Request) -> Reaction + Send + Sync>;

/// An endpoint that does what its script says.
pub(crate) struct Endpoint {
    address: SocketAddr,
    requests: mpsc::UnboundedReceiver<Request>,
    script: Arc<Mutex<Script>>,
    task: tokio::task::JoinHandle<()>,
}

impl Endpoint {
    pub(crate) async fn new(script: impl Fn(&Request) -> Reaction + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::unbounded_channel();
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Arc::new(script)));
        let task = tokio::spawn({
            let script = Arc::clone(&script);
            async move {
                let mut connections = tokio::task::JoinSet::new();
                for connection in 1.. {
                    let (stream, _) = listener.accept().await.unwrap();
                    connections.spawn(serve(stream, connection, Arc::clone(&script), sender.clone()));
                }
            }
        });
        Self { address, requests, script, task }
    }

    /// Always the same.
    pub(crate) async fn always(reaction: Reaction) -> Self {
        Self::new(move |_| reaction.clone()).await
    }

    /// One after the other, the last for ever.
    pub(crate) async fn script(reactions: impl IntoIterator<Item = Reaction>) -> Self {
        let mut left: Vec<_> = reactions.into_iter().collect();
        left.reverse();
        let left = Mutex::new(left);
        Self::new(move |_| {
            let mut left = left.lock();
            if left.len() > 1 { left.pop().unwrap() } else { left[0].clone() }
        })
        .await
    }

    pub(crate) fn change(&self, reaction: Reaction) {
        *self.script.lock() = Arc::new(move |_: &Request| reaction.clone());
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook?a=b", self.address)
    }

    pub(crate) async fn next(&mut self) -> Request {
        within(self.requests.recv()).await.expect("a request")
    }

    /// What has come by now.
    pub(crate) fn so_far(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.requests.try_recv().ok()).collect()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    connection: usize,
    script: Arc<Mutex<Script>>,
    requests: mpsc::UnboundedSender<Request>,
) {
    let mut buffer = Vec::new();
    for on_connection in 1.. {
        let Some(request) = read(&mut stream, &mut buffer, connection, on_connection).await else { return };
        let script = Arc::clone(&script.lock());
        let reaction = script(&request);
        let _ = requests.send(request);
        let reply = match reaction {
            Reaction::Answer(status, headers, body) => {
                format!("HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
            }
            Reaction::Write(bytes) => {
                let _ = stream.write_all(bytes.as_bytes()).await;
                let _ = stream.shutdown().await;
                return;
            }
            Reaction::Hang(bytes) => {
                let _ = stream.write_all(bytes.as_bytes()).await;
                // Until the other side gives up.
                let _ = stream.read(&mut [0]).await;
                return;
            }
            Reaction::Hold(until) => {
                until.notified().await;
                "HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n".to_owned()
            }
        };
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read(
    stream: &mut TcpStream,
    buffer: &mut Vec<u8>,
    connection: usize,
    on_connection: usize,
) -> Option<Request> {
    let head = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break buffer.drain(..end + 4).collect::<Vec<_>>();
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let line = lines.next()?.to_owned();
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer.drain(..length).collect();
    Some(Request { line, headers, body, connection, on_connection, at: Instant::now() })
}

/// A push over the in-process broker.
pub(crate) struct Rig {
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) push: Push,
    pub(crate) group: Group,
}

pub(crate) fn client() -> PushClient {
    PushClient::new(Guard::new().with_development(true))
}

/// Short retries, so that no test waits for nothing.
pub(crate) const QUICK: &str = r#""retry":{"max_attempts":3,"initial":"1ms","max":"5ms"}"#;

impl Rig {
    /// A push to `url` of the subscription `billing` on `orders.>`, with these fields besides.
    pub(crate) async fn new(url: &str, fields: &str) -> Self {
        Self::with(url, fields, &client()).await
    }

    pub(crate) async fn with(url: &str, fields: &str, client: &PushClient) -> Self {
        let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
        let options = PushOptions::new("billing".parse().unwrap(), spec(url, fields));
        let mut group = GroupOptions::new();
        group.retry = options.spec.retry;
        group.ordered = options.spec.ordered;
        broker.create_group(&options.group, group).await.unwrap();
        let group = options.group.clone();
        let push = Push::start(Arc::clone(&broker), options, client).unwrap();
        Self { broker, push, group }
    }

    pub(crate) async fn publish(&self, messages: impl IntoIterator<Item = Message>) {
        let messages = messages.into_iter().collect();
        let results = self.broker.publish_batch(&topic(), messages).await.unwrap();
        results.into_iter().for_each(|result| assert!(result.is_ok()));
    }

    pub(crate) async fn publish_text(&self, text: &str) {
        self.publish([Message::new(text.to_owned())]).await;
    }

    /// Waits until `done` holds.
    pub(crate) async fn until(&self, done: impl AsyncFn() -> bool) {
        within(async {
            while !done().await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    pub(crate) async fn lag(&self) -> u64 {
        self.broker.status().await.unwrap().group(&self.group).unwrap().lag.unwrap()
    }

    /// Waits until the group has nothing left.
    pub(crate) async fn drained(&self) {
        self.until(async || self.lag().await == 0).await;
    }

    /// Waits for so many dead letters.
    pub(crate) async fn dead(&self, count: usize) -> Vec<broker_core::DeadLetter> {
        self.until(async || self.broker.dead_letters(&self.group, 1000).await.unwrap().len() >= count).await;
        let letters = self.broker.dead_letters(&self.group, 1000).await.unwrap();
        assert_eq!(letters.len(), count);
        letters
    }
}

pub(crate) fn spec(url: &str, fields: &str) -> SubscriptionSpec {
    let comma = if fields.is_empty() { "" } else { "," };
    let json = format!(r#"{{"filter":"orders.>","endpoint":"{url}"{comma}{fields}}}"#);
    SubscriptionSpec::from_json(json.as_bytes()).unwrap()
}

pub(crate) fn topic() -> Topic {
    Topic::new("orders.created").unwrap()
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

/// A port nobody listens on.
pub(crate) async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}/", listener.local_addr().unwrap())
}
