//! How a connection ends: who has said all still hears his answer, who is refused hears it before his body
//! is through, and who is gone is let go.

use std::sync::Arc;
use std::time::Duration;

use broker_core::MemoryBroker;
use broker_http::{Limits, Server, ServerOptions};
use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Reply, Running, read_until, soon};

async fn limited(change: impl FnOnce(&mut Limits)) -> Running {
    let mut limits = Limits::default();
    change(&mut limits);
    Running::with(ServerOptions::new().with_limits(limits)).await
}

/// Says it, closes the writing side at once, and hears all.
async fn said_and_closed(running: &Running, said: &str) -> Vec<u8> {
    let mut stream = running.connect().await;
    stream.write_all(said.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    heard(&mut stream).await
}

async fn heard(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    answer
}

fn request(line: &str, body: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_closes_his_side_behind_a_request_hears_the_answer() {
    let running = Running::start().await;
    for round in 0..100 {
        for (line, body, status) in [
            ("PUT /subscriptions/q", r#"{"filter":"a"}"#, if round == 0 { 201 } else { 200 }),
            ("POST /topics/a", "x", 202),
            ("POST /subscriptions/q/pull?max=1", "", 200),
            ("GET /readyz", "", 200),
            ("GET /openapi.json", "", 200),
            ("PUT /subscriptions/r", r#"{"filter":"a..b"}"#, 400),
        ] {
            let answer = said_and_closed(&running, &request(line, body)).await;
            assert!(!answer.is_empty(), "{line}, round {round}: closed without a word");
            let reply = Reply::parse(&answer);
            assert_eq!(reply.status, status, "{line}, round {round}");
            let length: usize = reply.header("content-length").unwrap().parse().unwrap();
            assert_eq!(reply.body.len(), length, "{line}, round {round}: it is cut");
        }
    }
    // Requests behind each other, and a body in chunks.
    let put = request("PUT /subscriptions/q", r#"{"filter":"a"}"#);
    let answers = said_and_closed(&running, &put.repeat(20)).await;
    assert_eq!(String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count(), 20);
    let chunked = "PUT /subscriptions/q HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n\
        e\r\n{\"filter\":\"a\"}\r\n0\r\n\r\n";
    assert_eq!(Reply::parse(&said_and_closed(&running, chunked).await).status, 200);
    // Lines, whose results are a stream that ends.
    let lines = "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
        accept: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\nd\r\n{\"payload\":1}\r\n0\r\n\r\n";
    let reply = Reply::parse(&said_and_closed(&running, lines).await);
    assert!(reply.status == 200 && reply.text().contains("matched"), "{reply:?}");
}

#[tokio::test]
async fn who_closes_his_side_and_is_owed_nothing_is_let_go() {
    let running = limited(|limits| (limits.streams, limits.body_timeout) = (1, Duration::from_millis(200))).await;
    // Idle, fresh and after an answer; with half a head, and with half a body.
    assert_eq!(said_and_closed(&running, "").await, b"");
    let mut stream = running.connect().await;
    stream.write_all(request("GET /healthz", "").as_bytes()).await.unwrap();
    read_until(&mut stream, "ok\n").await;
    stream.shutdown().await.unwrap();
    assert_eq!(heard(&mut stream).await, b"");
    said_and_closed(&running, "GET /healthz HTTP/1.1\r\nhos").await;
    said_and_closed(&running, "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf").await;
    // A stream's reader who says that he goes is gone: his place is free.
    let mut stream = running.connect().await;
    stream.write_all(request("GET /topics/a/stream", "").as_bytes()).await.unwrap();
    read_until(&mut stream, ": connected").await;
    running.get("/topics/a/stream").await.is_problem(429, "streams");
    stream.shutdown().await.unwrap();
    heard(&mut stream).await;
    let mut next = running.connect().await;
    next.write_all(request("GET /topics/a/stream", "").as_bytes()).await.unwrap();
    read_until(&mut next, ": connected").await;
    // A pull that waits takes nothing for who is gone.
    running.put("q", r#"{"filter":"b"}"#).await;
    said_and_closed(&running, &request("POST /subscriptions/q/pull?wait=5m", "")).await;
    running.post("/topics/b", "x").await;
    assert_eq!(running.pull("q", "wait=20s").await.len(), 1);
    // A publish that waits for room, and would for ever.
    running.put("full", r#"{"filter":"c","backlog":{"max_messages":1,"overflow":"wait"}}"#).await;
    assert_eq!(running.post("/topics/c", "x").await.status, 202);
    assert_eq!(said_and_closed(&running, &request("POST /topics/c", "x")).await, b"");
}

#[tokio::test]
async fn a_refusal_does_not_wait_for_the_body_and_the_connection_goes_on() {
    let running = limited(|limits| limits.json_body_bytes = 10).await;
    let mut stream = running.connect().await;
    for (line, status) in [
        ("PUT /subscriptions/q", 413),
        ("POST /topics/a..b", 400),
        ("POST /nothing", 404),
        ("POST /topics/a?unknown=1", 400),
        ("GET /healthz", 200),
    ] {
        let head = format!("{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&[b'x'; 400]).await.unwrap();
        let answer = read_until(&mut stream, if status == 200 { "ok\n" } else { "kind" }).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {answer}");
        assert!(!answer.contains("connection: close"), "{line}: {answer}");
        // Only now the rest comes, and after it the next request.
        stream.write_all(&[b'x'; 600]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_sender_of_much_is_told_before_he_is_cut() {
    let running = limited(|limits| limits.refused_body_bytes = 64 << 20).await;
    let much = vec![b'x'; 4 << 20];
    for round in 0..20 {
        for last in ["content-length: 999999999", "content-length: 60000000\r\nconnection: close"] {
            let mut stream = running.connect().await;
            let head = format!("POST /topics/a HTTP/1.1\r\nhost: localhost\r\n{last}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            // It writes on without looking, and then looks.
            soon(stream.write_all(&much)).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
            let reply = Reply::parse(&heard(&mut stream).await);
            reply.is_problem(413, "over the limit");
            assert_eq!(reply.header("connection"), Some("close"));
        }
    }
}

/// There are clients that take a reset for an error, and drop the answer.
#[tokio::test]
async fn over_http_2_a_refused_body_is_read_before_it_is_asked_to_stop() {
    let running = limited(|limits| limits.refused_body_bytes = 100).await;
    let (send, connection) = h2::client::handshake(running.connect().await).await.unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let request = Request::post("http://localhost/topics/a..b").body(()).unwrap();
    let (answer, mut body) = send.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(b"begun"), false).unwrap();
    let answer = soon(answer).await.unwrap();
    assert_eq!(answer.status(), 400);
    let mut told = answer.into_body();
    assert!(soon(told.data()).await.unwrap().unwrap().ends_with(b"}"));
    assert!(soon(told.data()).await.is_none(), "it has its end");
    body.send_data(Bytes::from_static(b"goes on"), false).unwrap();
    let reset = std::future::poll_fn(|cx| body.poll_reset(cx));
    let early = tokio::time::timeout(Duration::from_millis(200), reset).await;
    assert!(early.is_err(), "{early:?}");
    body.send_data(vec![0; 100].into(), false).unwrap();
    let reset = soon(std::future::poll_fn(|cx| body.poll_reset(cx))).await.unwrap();
    assert_eq!(reset, h2::Reason::NO_ERROR);
}

#[tokio::test]
async fn in_another_server_a_refusal_does_not_wait_either() {
    let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new().with_development(true));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().nest("/broker", server.router());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let mut stream = soon(TcpStream::connect(address)).await.unwrap();
    for _ in 0..2 {
        let head = "POST /broker/topics/a..b HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, "kind").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        stream.write_all(&[b'x'; 1000]).await.unwrap();
    }
}
