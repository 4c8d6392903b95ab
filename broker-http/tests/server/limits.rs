//! What comes from outside is bounded in bytes, time and number.

use std::time::Duration;

use broker_http::{Limits, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Reply, Running, read_until, soon};

async fn limited(change: impl FnOnce(&mut Limits)) -> Running {
    let mut limits = Limits::default();
    change(&mut limits);
    Running::with(ServerOptions::new().with_limits(limits)).await
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_and_its_sender_sees_it() {
    let running = Running::start().await;
    assert_eq!(running.send("POST /topics/a", &[], vec![b'x'; 1 << 20]).await.status, 202);
    running.send("POST /topics/a", &[], vec![b'x'; (1 << 20) + 1]).await.is_problem(413, "1048576");
    // Far over it: read and dropped for a while.
    running.send("POST /topics/a", &[], vec![b'x'; 20 << 20]).await.is_problem(413, "over the limit");
    // The same without a length said ahead.
    let chunks = b"10000\r\n".iter().chain(&[b'x'; 0x10000]).chain(b"\r\n").copied().collect::<Vec<u8>>();
    let body = [chunks.repeat(100), b"0\r\n\r\n".to_vec()].concat();
    running.send("POST /topics/a", &[("transfer-encoding", "chunked")], body).await.is_problem(413, "over the limit");
    running.put("a", &format!(r#"{{"filter":"a","x":"{}"}}"#, "x".repeat(2 << 20))).await.is_problem(413, "1048576");
}

#[tokio::test]
async fn a_sender_that_asks_first_is_not_made_to_send() {
    let running = Running::start().await;
    let mut stream = running.connect().await;
    let head =
        b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 100"));
    Reply::parse(&answer).is_problem(413, "99999999");

    let mut stream = running.connect().await;
    let head = b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 2\r\nconnection: close\r\n\r\n";
    stream.write_all(head).await.unwrap();
    read_until(&mut stream, "100 Continue").await;
    stream.write_all(b"hi").await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(Reply::parse(&answer).status, 202);
}

#[tokio::test]
async fn headers_that_come_slowly_are_not_waited_for() {
    let running = limited(|limits| limits.header_timeout = Duration::from_millis(200)).await;
    for said in ["", "P", "POST /topics/a HTTP/1.1\r\nhost: loc"] {
        let mut stream = running.connect().await;
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // Closed or answered 408: not kept.
        soon(stream.read_to_end(&mut answer)).await.unwrap_or_default();
    }
    assert_eq!(running.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_body_that_stands_still_is_not_waited_for() {
    let running = limited(|limits| limits.body_timeout = Duration::from_millis(200)).await;
    let mut stream = running.connect().await;
    stream.write_all(b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(408, "in time");
}

#[tokio::test]
async fn too_many_or_too_large_headers_are_the_parsers_431() {
    let running = Running::start().await;
    let many: Vec<_> = (0..200).map(|index| (format!("x-{index}"), "v".to_owned())).collect();
    let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(running.send("POST /topics/a", &many, "").await.status, 431);
    let large = "v".repeat(100 << 10);
    assert_eq!(running.send("POST /topics/a", &[("x-large", &large)], "").await.status, 431);
}

#[tokio::test]
async fn what_is_no_http_is_the_parsers_400() {
    let running = Running::start().await;
    for said in ["nonsense\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\r\nbad header\r\n\r\n"] {
        let mut stream = running.connect().await;
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 400"), "{said:?}: {}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(running.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let running = limited(|limits| limits.connections = 2).await;
    let _one = running.connect().await;
    let _two = running.connect().await;
    let mut third = running.connect().await;
    let mut answer = Vec::new();
    soon(third.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(503, "too many connections");
    drop(_one);
    soon(async {
        loop {
            let mut next = running.connect().await;
            next.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                .await
                .unwrap_or_default();
            let mut answer = Vec::new();
            if next.read_to_end(&mut answer).await.is_ok() && answer.starts_with(b"HTTP/1.1 200") {
                let text = String::from_utf8_lossy(&answer).into_owned();
                assert!(
                    text.lines().any(|line| line == "broker_connections_refused_total 1")
                        || text.contains("refused_total"),
                    "{text}"
                );
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn subscriptions_are_bounded() {
    let running = limited(|limits| limits.subscriptions = 1).await;
    assert_eq!(running.put("a", r#"{"filter":"a"}"#).await.status, 201);
    running.put("b", r#"{"filter":"a"}"#).await.is_problem(429, "1 subscriptions");
    assert_eq!(running.put("a", r#"{"filter":"a"}"#).await.status, 200);
    running.delete("/subscriptions/a").await;
    assert_eq!(running.put("b", r#"{"filter":"a"}"#).await.status, 201);
}

#[tokio::test]
async fn what_a_subscription_says_is_bounded_and_counts() {
    let running = Running::start().await;
    let saying = |bytes: usize| {
        let kinds = vec![format!(r#"{{"exact":{{"kind":"{}"}}}}"#, "x".repeat(1_000)); bytes / 1_000].join(",");
        format!(r#"{{"filter":"a","filters":[{kinds}]}}"#)
    };
    let held = async || {
        let metrics = running.get("/metrics").await.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes "));
        line.unwrap().parse::<u64>().unwrap()
    };
    running.put("a", &saying(64 << 10)).await.is_problem(413, "65536");
    assert_eq!((running.put("a", &saying(50_000)).await.status, held().await >= 50_000), (201, true));
    running.put("a", &saying(1_000)).await;
    assert!((1_000..10_000).contains(&held().await));
    running.delete("/subscriptions/a").await;
    assert_eq!(held().await, 0);
}

#[tokio::test]
async fn topics_that_hold_nothing_make_room_for_others() {
    let running = limited(|limits| limits.topics = 4).await;
    for topic in 0..40 {
        assert_eq!(running.post(&format!("/topics/t{topic}"), "x").await.status, 202);
    }
    assert!(running.get("/topics").await.json()["topics"].as_array().unwrap().len() <= 4);
}

#[tokio::test]
async fn requests_can_be_pipelined() {
    let running = Running::start().await;
    let mut stream = running.connect().await;
    let one = "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx";
    let last = "GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(format!("{}{last}", one.repeat(50)).as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer.matches("HTTP/1.1 202").count(), 50);
    assert!(answer.ends_with("ok\n"));
}

#[tokio::test]
async fn web_pages_and_other_hosts_are_refused_in_development() {
    let running = Running::start().await;
    for (header, value) in [("origin", "http://evil.example"), ("origin", "null")] {
        running.send("POST /topics/a", &[(header, value)], "x").await.is_problem(403, "development mode");
    }
    let page = [("origin", "http://localhost:3000")];
    let reply = running.send("POST /topics/a", &page, "x").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (202, Some("http://localhost:3000")));
    let asks = [page[0], ("access-control-request-method", "PUT"), ("access-control-request-headers", "x-a")];
    let reply = running.send("OPTIONS /subscriptions/a", &asks, "").await;
    assert_eq!((reply.status, reply.header("access-control-allow-headers")), (204, Some("x-a")));
    assert!(reply.header("access-control-allow-methods").unwrap().contains("PUT"));
    for head in ["/healthz HTTP/1.1\r\nhost: evil.example", "http://evil.example/healthz HTTP/1.1\r\nhost: localhost"] {
        raw(&running, head).await.is_problem(403, "host");
    }
}

async fn raw(running: &Running, head: &str) -> Reply {
    let mut stream = running.connect().await;
    stream.write_all(format!("GET {head}\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer)
}

#[tokio::test]
async fn who_is_asked_is_said_once() {
    let running = Running::start().await;
    for head in ["HTTP/1.1", "HTTP/1.1\r\nhost: localhost\r\nhost: localhost", "HTTP/1.1\r\nhost: a\r\nHost: b"] {
        raw(&running, &format!("/healthz {head}")).await.is_problem(400, "host");
    }
    assert_eq!(raw(&running, "/healthz HTTP/1.0").await.status, 200);
    assert_eq!(raw(&running, "/healthz HTTP/1.1\r\nHost: localhost:1").await.status, 200);
}
