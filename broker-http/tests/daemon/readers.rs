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
        let head = "GET /topics/big/stream HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
            sec-websocket-version: 13\r\nsec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n";
        let mut socket = open(small(daemon.address).await, head).await;
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
    let held = async || {
        let metrics = daemon.send("GET /metrics", "").await.1;
        let held = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes ")).unwrap();
        held.parse::<u64>().unwrap()
    };
    // What pushes wait with goes on.
    for number in 0..EACH {
        daemon.send(&format!("DELETE /subscriptions/push-{number}"), "").await;
    }
    soon(async {
        while held().await > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}
