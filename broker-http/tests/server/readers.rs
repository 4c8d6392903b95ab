//! Readers that take the least they can: they keep their own answers waiting, and nobody else's.

use std::time::Duration;

use broker_http::{Limits, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Running, read_until, soon};

/// Readers that do not read, and what each asks for: more than fits between here and there.
const SLOW: usize = 14;
const EACH: usize = 3;
const BYTES: usize = 900_000;

async fn limited(change: impl FnOnce(&mut Limits)) -> Running {
    let mut limits = Limits::default();
    change(&mut limits);
    Running::with(ServerOptions::new().with_limits(limits)).await
}

/// A connection with hardly a buffer, from another address of this machine.
async fn elsewhere(running: &Running) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    soon(socket.connect(running.address)).await.unwrap()
}

/// Takes a byte at a time.
async fn trickle(mut stream: TcpStream) {
    while let Ok(1..) = stream.read(&mut [0]).await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn who_hardly_reads_keeps_nobody_else_waiting() {
    // An eighth of it is for answers.
    let running = limited(|limits| limits.memory_bytes = 256 << 20).await;
    running.put("big", r#"{"filter":"big","max_in_flight":100}"#).await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let body = "x".repeat(BYTES);
    for _ in 0..SLOW * EACH {
        assert_eq!(running.post("/topics/big", &body).await.status, 202);
    }
    let slow = futures_util::future::join_all((0..SLOW).map(|_| async {
        let mut stream = elsewhere(&running).await;
        let pull = format!("POST /subscriptions/big/pull?max={EACH} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        stream.write_all(pull.as_bytes()).await.unwrap();
        let mut first = [0; 12];
        soon(stream.read_exact(&mut first)).await.unwrap();
        tokio::spawn(trickle(stream));
        first.ends_with(b"200")
    }))
    .await;
    let told = slow.into_iter().filter(|told| *told).count();
    assert!(told >= 3, "{told} hold what is theirs");
    let mut events = running.connect().await;
    events.write_all(b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut events, ": connected").await;
    running.post("/topics/a?id=1", "x").await;
    read_until(&mut events, "id: 1\n").await;
    assert_eq!(running.pull("q", "wait=20s").await.len(), 1);
    assert_eq!(running.get("/subscriptions").await.status, 200);
}

/// A whole answer is as large as all there is room for, and one that is not read leaves half of it.
#[tokio::test]
async fn who_reads_none_of_a_large_answer_leaves_as_much_to_the_others() {
    // An eighth of it is for answers.
    let running = limited(|limits| limits.memory_bytes = 64 << 20).await;
    let body = "x".repeat(BYTES);
    for name in ["a", "b"] {
        running.put(name, r#"{"filter":"big"}"#).await;
    }
    for _ in 0..SLOW {
        assert_eq!(running.post("/topics/big", &body).await.status, 202);
    }
    let mut slow = Vec::new();
    for _ in 0..EACH {
        let mut stream = elsewhere(&running).await;
        stream.write_all(b"POST /subscriptions/a/pull HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        slow.push(stream);
    }
    soon(slow[0].read_exact(&mut [0; 12])).await.unwrap();
    let held = running.pull("b", "wait=20s").await;
    assert!((1..SLOW).contains(&held.len()), "{}", held.len());
    assert_eq!(running.get("/subscriptions").await.status, 200);
    // What there was no room for was not tried.
    let rest = running.pull("b", "").await;
    assert!(!rest.is_empty() && rest.iter().all(|delivery| delivery.attempt == 1));
    drop(slow);
}

/// Ten thousand lines of three bytes have 1.5 MB of answer, some of which the kernel holds.
#[tokio::test]
async fn who_publishes_and_reads_no_answer_keeps_nobody_else_waiting() {
    // An eighth of it is for answers.
    let running = limited(|limits| limits.memory_bytes = 128 << 20).await;
    let lines = "{}\n".repeat(10_000);
    let head = "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\ncontent-length";
    let request = format!("{head}: {}\r\n\r\n{lines}", lines.len());
    let slow = (0..SLOW).map(|_| async {
        let mut stream = elsewhere(&running).await;
        stream.write_all(request.repeat(6).as_bytes()).await.unwrap();
        stream
    });
    let held = futures_util::future::join_all(slow).await;
    let held_bytes = async || {
        let metrics = running.get("/metrics").await.text();
        let bytes = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes ")).unwrap();
        bytes.parse::<usize>().unwrap()
    };
    soon(async {
        while held_bytes().await < 4 << 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let headers = [("content-type", "application/x-ndjson")];
    let reply = running.send("POST /topics/a", &headers, lines).await;
    assert_eq!(reply.status, 207, "{}", reply.text());
    assert_eq!(reply.json()["results"].as_array().unwrap().len(), 10_000);
    // Who reads nothing holds no more than half of it, about.
    let bytes = held_bytes().await;
    assert!(bytes < 12 << 20, "{bytes}");
    drop(held);
}

/// Gets on again and again, and would hold its answer for as long as it likes.
#[tokio::test]
async fn an_answer_has_the_time_of_its_size_and_a_stream_has_any() {
    let running = limited(|limits| {
        (limits.body_timeout, limits.answer_bytes_per_second) = (Duration::from_secs(3), 8 << 20);
    })
    .await;
    running.put("big", r#"{"filter":"big"}"#).await;
    let mut events = elsewhere(&running).await;
    events.write_all(b"GET /topics/big/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut events, ": connected").await;
    let body = "x".repeat(BYTES);
    for _ in 0..MANY {
        assert_eq!(running.post("/topics/big", &body).await.status, 202);
    }
    // Four seconds for 8 MB, and it takes three times as long.
    let mut pulled = elsewhere(&running).await;
    pulled.write_all(b"POST /subscriptions/big/pull HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let (answer, stream) = tokio::join!(slowly(&mut pulled), slowly(&mut events));
    assert!(answer < MANY * BYTES, "it was not cut");
    assert!(stream >= MANY * BYTES, "the stream was cut after {stream} bytes");
    let metrics = running.get("/metrics").await.text();
    assert!(metrics.contains("broker_refused_total{reason=\"answer_timeout\"} 1\n"), "{metrics}");
}

/// Messages that one answer has.
const MANY: usize = 9;

/// Reads 0.7 MB a second until all is there or the end; how many bytes that was.
async fn slowly(stream: &mut TcpStream) -> usize {
    let mut piece = vec![0; 64 << 10];
    let mut read = 0;
    soon(async {
        while read < MANY * BYTES {
            let Ok(bytes @ 1..) = stream.read(&mut piece).await else { break };
            read += bytes;
            tokio::time::sleep(Duration::from_micros(bytes as u64 * 10 / 7)).await;
        }
    })
    .await;
    read
}
