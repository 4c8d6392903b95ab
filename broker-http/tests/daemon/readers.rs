//! Readers that do not read, and endpoints that do not answer: what is encoded for them is bounded, and the others are
//! served.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::lines::peak;
use crate::{Daemon, soon};

const EACH: usize = 40;
const MESSAGES: usize = 16;
const BYTES: usize = 700_000;
const BOUND: u64 = 128 << 20;

/// What asks for a WebSocket, but for its host.
const SOCKET: &str = "GET /topics/big/stream HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n";

/// A reader with hardly a buffer of its own.
async fn small(address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    soon(socket.connect(address)).await.unwrap()
}

async fn open(mut stream: TcpStream, head: &str) -> TcpStream {
    stream.write_all(format!("{head}host: localhost\r\n\r\n").as_bytes()).await.unwrap();
    let mut first = [0; 12];
    soon(stream.read_exact(&mut first)).await.unwrap();
    assert!(first.ends_with(b"200") || first.ends_with(b"101"), "{}", String::from_utf8_lossy(&first));
    stream
}

#[tokio::test]
async fn what_is_encoded_for_those_who_do_not_read_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("broker.toml");
    std::fs::write(&config, format!("[limits]\nmemory_bytes = {BOUND}\nbody_timeout = \"3s\"\n")).unwrap();
    let daemon = Daemon::start(&["--dev", "--config", config.to_str().unwrap(), "--broker", "memory:readers"]).await;
    // Connections are made to it, and nobody takes them.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}/", silent.local_addr().unwrap());
    for number in 0..EACH {
        let spec =
            json!({"filter": "big", "endpoint": endpoint, "mode": "structured", "max_in_flight": 16, "timeout": "1s"});
        assert_eq!(daemon.send(&format!("PUT /subscriptions/push-{number}"), &spec.to_string()).await.0, 201);
    }
    let mut readers = Vec::new();
    for _ in 0..EACH {
        readers.push(open(small(daemon.address).await, "GET /topics/big/stream HTTP/1.1\r\n").await);
        let mut socket = open(small(daemon.address).await, SOCKET).await;
        // A masked frame, by zeros: {"credit":99}.
        socket.write_all(b"\x81\x8d\0\0\0\0{\"credit\":99}").await.unwrap();
        readers.push(socket);
    }
    let good = soon(TcpStream::connect(daemon.address)).await.unwrap();
    let mut good = open(good, "GET /topics/big/stream HTTP/1.1\r\n").await;
    let before = peak(&daemon);
    // All of that encoded would be 1.8 GB, and one frame for each 220 MB. Who reads gets all, once those are cut who do not.
    let reading = tokio::spawn(async move {
        let (mut heard, mut buffer) = (Vec::new(), vec![0; 1 << 20]);
        while memchr::memmem::find_iter(&heard, b"\nid: ").count() < MESSAGES || !heard.ends_with(b"\n\n\r\n") {
            let count = good.read(&mut buffer).await.unwrap();
            assert!(count > 0, "the stream ended after {} bytes", heard.len());
            heard.extend_from_slice(&buffer[..count]);
        }
        heard
    });
    let body = "x".repeat(BYTES);
    for number in 0..MESSAGES {
        let (status, answer) = daemon.send(&format!("POST /topics/big?id={number}"), &body).await;
        assert_eq!(status, 202, "{answer}");
    }
    let heard = soon(reading).await.unwrap();
    assert!(!heard.windows(10).any(|at| at == b"event: gap"));
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < BOUND, "{growth} bytes, of {BOUND} that messages may take");
    drop(readers);
    // What pushes wait with goes on.
    for number in 0..EACH {
        daemon.send(&format!("DELETE /subscriptions/push-{number}"), "").await;
    }
    until_nothing_is_held(&daemon).await;
}

/// What the metrics say of `name`.
async fn metric(daemon: &Daemon, name: &str) -> u64 {
    let metrics = daemon.send("GET /metrics", "").await.1;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name}: {metrics}")).parse().unwrap()
}

async fn until_nothing_is_held(daemon: &Daemon) {
    soon(async {
        while metric(daemon, "broker_memory_bytes").await > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// Leases that nobody has, named in one message of 750 KB; each is told to be gone.
const LEASES: usize = 30_000;

/// What a socket is told counts and waits as what it is lent does, and so does the message that it is said to.
#[tokio::test]
async fn what_is_said_to_those_who_do_not_read_is_bounded() {
    const SOCKETS: u64 = 90;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("broker.toml");
    std::fs::write(&config, format!("[limits]\nmemory_bytes = {}\n", BOUND / 2)).unwrap();
    let daemon = Daemon::start(&["--dev", "--config", config.to_str().unwrap(), "--broker", "memory:said"]).await;
    let leases = vec!["A".repeat(22); LEASES];
    let text = json!({ "ack": leases }).to_string();
    // Masked by zeros.
    let message = [&b"\x81\xff"[..], &(text.len() as u64).to_be_bytes(), &[0; 4], text.as_bytes()].concat();
    let before = peak(&daemon);
    let mut sockets = Vec::new();
    for _ in 0..SOCKETS {
        let mut socket = open(small(daemon.address).await, SOCKET).await;
        let say = async { while socket.write_all(&message).await.is_ok() {} };
        // It is no longer read, or was ended for others.
        let _ = tokio::time::timeout(Duration::from_millis(100), say).await;
        sockets.push(socket);
    }
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < BOUND, "{growth} bytes, of {} that messages may take", BOUND / 2);
    // Who is ended for what others have begun has ended.
    soon(async {
        loop {
            let (streams, ended) = (
                metric(&daemon, "broker_streams").await,
                metric(&daemon, "broker_refused_total{reason=\"heads\"}").await,
            );
            if streams + ended <= SOCKETS && ended > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    drop(sockets);
    until_nothing_is_held(&daemon).await;
    // Who reads is told all, in parts, and then counts for nothing, however much it says.
    let mut socket = soon(TcpStream::connect(daemon.address)).await.unwrap();
    socket.write_all(format!("{SOCKET}host: localhost\r\n\r\n").as_bytes()).await.unwrap();
    for _ in 0..3 {
        socket.write_all(&message).await.unwrap();
        let (mut heard, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        let told =
            |heard: &[u8]| heard.len() > LEASES * 24 && memchr::memmem::find_iter(heard, &leases[0]).count() == LEASES;
        soon(async {
            while !told(&heard) {
                let count = socket.read(&mut buffer).await.unwrap();
                assert!(count > 0, "it ended after {} bytes", heard.len());
                heard.extend_from_slice(&buffer[..count]);
            }
        })
        .await;
        assert!(memchr::memmem::find_iter(&heard, b"{\"gone\":[").count() > 10);
    }
    until_nothing_is_held(&daemon).await;
}
