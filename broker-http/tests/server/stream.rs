//! Server-sent events.

use std::sync::Arc;

use broker_core::{MemoryBroker, MemoryOptions, Retention};
use broker_http::{Limits, ServerOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Reply, Running, read_until, soon};

async fn open(running: &Running, path: &str, header: &str) -> (TcpStream, String) {
    let mut stream = running.connect().await;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n").as_bytes()).await.unwrap();
    let head = read_until(&mut stream, "connected").await;
    (stream, head)
}

fn data(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|json| serde_json::from_str(json).unwrap())
        .collect()
}

#[tokio::test]
async fn messages_show_as_they_come() {
    let running = Running::start().await;
    let (mut stream, head) = open(&running, "/topics/orders.%3E/stream", "").await;
    assert!(head.contains("200 OK") && head.contains("content-type: text/event-stream"), "{head}");
    // The headers came once the subscription stood: nothing published from now on is missed.
    let reply = running
        .send("POST /topics/orders.created?id=1", &[("content-type", "application/json")], "{\"a\":\"x\\ny\"}")
        .await;
    assert_eq!(reply.json()["matched"], 1);
    let text = read_until(&mut stream, "\n\n").await;
    assert!(text.contains("id: 1\n"), "{text}");
    let event = &data(&text)[0];
    assert_eq!((&event["brokertopic"], &event["data"]), (&json!("orders.created"), &json!({"a": "x\ny"})));
    // JSON that was laid out in lines is as many lines of data.
    running.send("POST /topics/orders.created?id=2", &[("content-type", "application/json")], "{\n\"a\":\n1}").await;
    let text = read_until(&mut stream, "\n\n").await;
    let json: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert!(json.len() > 1 && text.contains("\ndata: \"a\""), "{text}");
    assert_eq!(serde_json::from_str::<Value>(&json.join("\n")).unwrap()["data"], json!({"a": 1}));
    assert_eq!(running.post("/topics/elsewhere", "x").await.json()["matched"], 0);
    // Closing it ends the subscription.
    drop(stream);
    crate::support::soon(async {
        while running.post("/topics/orders.created", "x").await.json()["matched"] != 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_was_written_to_a_group_is_acked() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    running.post("/topics/a?id=1", "x").await;
    let (mut stream, head) = open(&running, "/topics/a/stream?group=q", "").await;
    let text = if head.contains("id: 1") { head } else { read_until(&mut stream, "id: 1").await };
    assert!(text.contains("id: 1"));
    crate::support::soon(async {
        loop {
            let status = running.get("/subscriptions/q").await.json()["status"].clone();
            if status["lag"] == 0 && status["in_flight"] == 0 && status["last_success"].is_string() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_group_that_a_stream_makes_is_a_subscription() {
    let running = Running::start().await;
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (name, header) in [("events", ""), ("socket", upgrade)] {
        let path = format!("/topics/a/stream?group={name}");
        let mut stream = running.connect().await;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n").as_bytes()).await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        drop(stream);
        let subscription = format!("/subscriptions/{name}");
        let listed = running.get("/subscriptions").await.json();
        assert_eq!(
            (&listed["subscriptions"][0]["name"], &listed["subscriptions"][0]["filter"]),
            (&json!(name), &json!("a"))
        );
        // It keeps what comes while nobody reads, as any does.
        crate::support::soon(async {
            while running.get(&subscription).await.json()["status"]["members"] != 0 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
        running.post("/topics/a", "x").await;
        assert_eq!(running.delete(&format!("{subscription}/backlog")).await.json()["purged"], 1);
        // Another stream joins it; another filter is another group, and the name is taken.
        drop(open(&running, &path, "").await);
        running.get(&format!("/topics/b/stream?group={name}")).await.is_problem(409, name);
        assert_eq!(running.delete(&subscription).await.status, 204);
        assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 0);
    }
}

#[tokio::test]
async fn a_reader_that_comes_back_is_told_of_the_gap() {
    let running = Running::start().await;
    let (mut stream, head) = open(&running, "/topics/a/stream", "last-event-id: 7\r\n").await;
    if !head.contains("event: gap") {
        read_until(&mut stream, "event: gap").await;
    }
}

#[tokio::test]
async fn a_reader_that_comes_back_goes_on_where_it_was() {
    let options = MemoryOptions::new().with_retention(Retention::messages(5));
    let broker = Arc::new(MemoryBroker::with_options(options));
    let running = Running::over(broker, ServerOptions::new()).await;
    for id in 1..=6 {
        running.post(&format!("/topics/a.b?id={id}"), "x").await;
    }
    let ids = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.strip_prefix("id: ")).map(str::to_owned).collect()
    };
    // Retained: 2 to 6.
    let (mut stream, mut text) = open(&running, "/topics/a.%3E/stream", "last-event-id: 4\r\n").await;
    running.post("/topics/a.b?id=7", "x").await;
    while !text.contains("id: 7") {
        text.push_str(&read_until(&mut stream, "\n\n").await);
    }
    assert_eq!(ids(&text), ["5", "6", "7"]);
    assert!(!text.contains("gap"), "{text}");

    // Forgotten: the gap first, then what is left.
    let (mut stream, mut text) = open(&running, "/topics/a.%3E/stream", "last-event-id: 1\r\n").await;
    while !text.contains("id: 7") {
        text.push_str(&read_until(&mut stream, "\n\n").await);
    }
    assert_eq!(ids(&text), ["3", "4", "5", "6", "7"]);
    assert!(text.find("event: gap").unwrap() < text.find("id: 3").unwrap(), "{text}");
}

#[tokio::test]
async fn an_id_that_is_not_ascii_is_one_to_come_back_with() {
    let options = MemoryOptions::new().with_retention(Retention::messages(5));
    let running = Running::over(Arc::new(MemoryBroker::with_options(options)), ServerOptions::new()).await;
    running.post("/topics/a?id=k%C3%A4se", "x").await;
    running.post("/topics/a?id=2", "x").await;
    let (mut stream, mut text) = open(&running, "/topics/a/stream", "last-event-id: k\u{e4}se\r\n").await;
    while !text.contains("id: 2") {
        text.push_str(&read_until(&mut stream, "\n\n").await);
    }
    assert!(!text.contains("gap") && !text.contains("id: k"), "{text}");
}

#[tokio::test]
async fn an_empty_id_is_none_to_come_back_with() {
    let options = MemoryOptions::new().with_retention(Retention::messages(5));
    let running = Running::over(Arc::new(MemoryBroker::with_options(options)), ServerOptions::new()).await;
    running.post("/topics/a?id=1", "x").await;
    for header in ["last-event-id:\r\n", "last-event-id: \r\n"] {
        let (mut stream, mut text) = open(&running, "/topics/a/stream", header).await;
        running.post("/topics/a?id=2", "x").await;
        while !text.contains("id: 2") {
            text.push_str(&read_until(&mut stream, "\n\n").await);
        }
        assert!(!text.contains("gap") && !text.contains("id: 1"), "{text}");
    }
}

#[tokio::test]
async fn every_id_is_one_to_come_back_with() {
    let options = MemoryOptions::new().with_retention(Retention::messages(20));
    let running = Running::over(Arc::new(MemoryBroker::with_options(options)), ServerOptions::new()).await;
    let (mut stream, mut text) = open(&running, "/topics/a/stream", "").await;
    for id in ["+a", "a+", "++", "+", "100%25", "%2520a", "a+b", "%22q%22"] {
        running.post(&format!("/topics/a?id={id}"), "x").await;
    }
    running.post("/topics/a?id=last", "x").await;
    while !text.contains("id: last\n") {
        text.push_str(&read_until(&mut stream, "\n\n").await);
    }
    let shown: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
    let events: Vec<Value> = data(&text).into_iter().map(|event| event["id"].clone()).collect();
    assert_eq!(events, [" a", "a ", "  ", " ", "100%", "%20a", "a b", "\"q\"", "last"]);
    for (index, last) in shown.iter().enumerate().take(shown.len() - 1) {
        let (mut stream, mut text) = open(&running, "/topics/a/stream", &format!("last-event-id: {last}\r\n")).await;
        while !text.contains("id: last\n") {
            text.push_str(&read_until(&mut stream, "\n\n").await);
        }
        let seen: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
        assert_eq!((&*seen, text.contains("gap")), (&shown[index + 1..], false), "after {:?}", events[index]);
    }
    // What an id itself says is taken too, where it cannot be meant for another.
    let (_stream, text) = open(&running, "/topics/a/stream", "last-event-id: 100%\r\n").await;
    assert!(!text.contains("gap"), "{text}");
}

#[tokio::test]
async fn who_refuses_events_is_given_none() {
    let running = Running::start().await;
    for accept in ["text/event-stream;q=0", "*/*, text/event-stream; q=0.0", "*/*;q=0", "text/*;q=0, */*"] {
        let reply = running.send("GET /topics/a/stream", &[("accept", accept)], "").await;
        reply.is_problem(406, "text/event-stream");
    }
    for accept in ["text/event-stream", "*/*;q=0, text/event-stream;q=0.1", "application/json", ""] {
        open(&running, "/topics/a/stream", &format!("accept: {accept}\r\n")).await;
    }
}

#[tokio::test]
async fn an_upgrade_that_is_none_says_what_to_send() {
    let running = Running::start().await;
    let key = "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==";
    let ask = async |method: &str, headers: &str| {
        let mut stream = running.connect().await;
        let head =
            format!("{method} /topics/a/stream HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n{headers}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        Reply::parse(&answer)
    };
    let connection = "connection: upgrade, close";
    let reply = ask("GET", &format!("{connection}\r\nsec-websocket-version: 13")).await;
    reply.is_problem(400, "sec-websocket-key");
    for keys in ["sec-websocket-key: AAAA".to_owned(), format!("{key}\r\n{key}"), format!("{key}A")] {
        let reply = ask("GET", &format!("{connection}\r\nsec-websocket-version: 13\r\n{keys}")).await;
        reply.is_problem(400, "16 random bytes");
    }
    let reply = ask("GET", &format!("{connection}\r\nsec-websocket-version: 8\r\n{key}")).await;
    reply.is_problem(400, "sec-websocket-version: 13");
    assert_eq!(reply.header("sec-websocket-version"), Some("13"));
    let reply = ask("GET", &format!("connection: close\r\nsec-websocket-version: 13\r\n{key}")).await;
    reply.is_problem(400, "connection: upgrade");
    ask("POST", connection).await.is_problem(405, "POST");
    // curl offers HTTP/2 so, and takes the events without.
    let offer = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n";
    let (_stream, head) = open(&running, "/topics/a/stream", offer).await;
    assert!(head.contains("text/event-stream"), "{head}");
}

#[tokio::test]
async fn a_reader_of_many_topics_is_told_what_a_busy_one_has_dropped() {
    let options = MemoryOptions::new().with_retention(Retention::messages(3));
    let running = Running::over(Arc::new(MemoryBroker::with_options(options)), ServerOptions::new()).await;
    for id in ["a.quiet?id=q1", "a.busy?id=b1", "a.busy?id=b2", "a.quiet?id=q2", "a.busy?id=b3", "a.busy?id=b4"] {
        running.post(&format!("/topics/{id}"), "x").await;
    }
    running.post("/topics/a.busy?id=b5", "x").await;
    // b1 and b2 are gone.
    for (last, gap, ids) in [
        ("q1", true, ["q2", "b3", "b4", "b5"].as_slice()),
        ("q2", false, &["b3", "b4", "b5"]),
        ("b3", false, &["b4", "b5"]),
        ("b2", true, &["q1", "q2", "b3", "b4", "b5"]),
    ] {
        let (mut stream, mut text) =
            open(&running, "/topics/a.%3E/stream", &format!("last-event-id: {last}\r\n")).await;
        while !text.contains("id: b5") {
            text.push_str(&read_until(&mut stream, "\n\n").await);
        }
        let seen: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
        assert_eq!((&*seen, text.contains("event: gap")), (ids, gap), "after {last}: {text}");
        assert!(!gap || text.find("event: gap") < text.find("id: "), "{text}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let mut limits = Limits::default();
    limits.streams = 1;
    let running = Running::with(ServerOptions::new().with_limits(limits)).await;
    running.get("/topics/a.%3E.b/stream").await.is_problem(400, "filter");
    running.get("/topics/a/stream?colour=red").await.is_problem(400, "group");
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
        running.get(&format!("{path}?colour=red")).await.is_problem(400, "colour");
    }
    running.get("/topics/a/stream?group=a@b").await.is_problem(400, "group");
    running.post("/topics/a/stream", "").await.is_problem(405, "POST");
    let (_stream, _) = open(&running, "/topics/a/stream", "").await;
    running.get("/topics/a/stream").await.is_problem(429, "1 streams");
}
