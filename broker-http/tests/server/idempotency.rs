//! `Idempotency-Key`: whose it is, what it stands for, and what becomes of it while the first request
//! is at work.

use std::sync::Arc;

use broker_http::{Access, Action, Identity, Limits, ServerOptions, TokenHash};
use serde_json::json;

use crate::support::Running;

#[tokio::test]
async fn the_same_key_is_a_conflict_while_the_first_request_is_at_work() {
    let running = Arc::new(Running::start().await);
    // A full backlog that keeps its publishers waiting.
    running.put("q", r#"{"filter":"a","backlog":{"max_messages":1,"overflow":"wait"}}"#).await;
    assert_eq!(running.post("/topics/a", "1").await.status, 202);
    let key = [("idempotency-key", "\"k\"")];
    let send = || {
        let running = Arc::clone(&running);
        tokio::spawn(async move { running.send("POST /topics/a", &key, "2").await })
    };
    // Whichever of the two comes first waits at the backlog, and the other is told.
    let (mut one, mut other) = (send(), send());
    let (conflict, first) = tokio::select! {
        reply = &mut one => (reply.unwrap(), other),
        reply = &mut other => (reply.unwrap(), one),
    };
    conflict.is_problem(409, "still at work");
    running.send("POST /topics/a", &key, "other").await.is_problem(422, "another request");
    assert!(conflict.header("retry-after").is_some());
    let leases = running.pull("q", "max=1").await;
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    let first = first.await.unwrap();
    assert_eq!(first.status, 202);
    assert_eq!(running.send("POST /topics/a", &key, "2").await.body, first.body);
    assert_eq!(running.pull("q", "max=10").await.len(), 1, "published once");
}

#[tokio::test]
async fn the_answer_outlives_a_sender_that_goes_away() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","backlog":{"max_messages":1,"overflow":"wait"}}"#).await;
    assert_eq!(running.post("/topics/a", "1").await.status, 202);
    let mut stream = running.connect().await;
    let request = b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\nidempotency-key: k\r\ncontent-length: 1\r\n\r\n2";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.unwrap();
    let key = [("idempotency-key", "k")];
    while running.send("POST /topics/a", &key, "2").await.status != 409 {}
    drop(stream);
    let leases = running.pull("q", "max=1").await;
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    let leases = running.pull("q", "max=1&wait=20s").await;
    let reply = loop {
        let reply = running.send("POST /topics/a", &key, "2").await;
        if reply.status != 409 {
            break reply;
        }
    };
    assert_eq!((reply.status, &reply.json()["id"]), (202, &leases[0].event["id"]));
    assert!(running.pull("q", "max=10").await.is_empty(), "published once");
}

#[tokio::test]
async fn a_key_is_its_identitys_own() {
    let identity = |name: &str| {
        let identity = Identity::new(name).unwrap().with_token(TokenHash::of(name));
        identity.allowing([Action::Publish], [">".parse().unwrap()])
    };
    let access = Access::new([identity("shop"), identity("other")]).unwrap();
    let running = Running::with(ServerOptions::new().with_access(access)).await;
    let send = async |who: &str, body: &str| {
        let bearer = format!("Bearer {who}");
        running.send("POST /topics/a", &[("authorization", &bearer), ("idempotency-key", "k")], body).await
    };
    let first = send("shop", "x").await;
    let other = send("other", "x").await;
    assert_eq!((first.status, other.status), (202, 202));
    assert_ne!(first.body, other.body, "somebody else's answer");
    assert_eq!(send("shop", "x").await.body, first.body);
    send("other", "y").await.is_problem(422, "another request");
    assert_eq!(send("shop", "x").await.body, first.body);
}

#[tokio::test]
async fn options_belong_to_the_request() {
    let running = Running::start().await;
    let send = async |path: &str| running.send(&format!("POST {path}"), &[("idempotency-key", "k")], "x").await;
    let first = send("/topics/a?key=c&ttl=1h").await;
    assert_eq!(first.status, 202);
    for other in ["/topics/a", "/topics/a?key=c", "/topics/a?key=d&ttl=1h"] {
        send(other).await.is_problem(422, "another request");
    }
    // However it is written.
    for same in ["/topics/a?ttl=1h&key=c", "/topics/%61?key=%63&ttl=1h"] {
        assert_eq!(send(same).await.body, first.body, "{same}");
    }
}

#[tokio::test]
async fn an_answer_that_another_try_may_better_is_not_kept() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","backlog":{"max_messages":2}}"#).await;
    let lines = "{\"payload\":1,\"dedup\":\"1\"}\n{\"payload\":2}\n{\"payload\":3}";
    let headers = [("idempotency-key", "k"), ("content-type", "application/x-ndjson")];
    let reply = running.send("POST /topics/a", &headers, lines).await;
    assert_eq!((reply.status, &reply.json()["results"][2]["error"]["status"]), (207, &json!(503)));
    assert_eq!(running.delete("/subscriptions/q/backlog").await.status, 200);
    let again = running.send("POST /topics/a", &headers, lines).await;
    assert!(again.json()["results"][2]["error"].is_null(), "{}", again.text());
    // What no other try betters is kept.
    let (bad, headers) = ("{\"payload\":1}\nnope", [("idempotency-key", "bad"), headers[1]]);
    let first = running.send("POST /topics/b", &headers, bad).await;
    assert_eq!((first.status, running.send("POST /topics/b", &headers, bad).await.body), (207, first.body));
}

#[tokio::test]
async fn a_key_is_a_string_of_structured_fields_or_the_same_without_quotes() {
    let running = Running::start().await;
    let send = async |key: &str| running.send("POST /topics/a", &[("idempotency-key", key)], "x").await;
    let first = send("\"k\"").await;
    assert_eq!(first.status, 202);
    for same in ["k", "\"k\";v=1", "\"k\" ; sent=\"a;b\"; again"] {
        assert_eq!(send(same).await.body, first.body, "{same}");
    }
    // Another one, whatever is in it: the same would be taken for published.
    for other in ["k;v=1", "k;v=2", "\"k;v=3\"", r#""k\"2""#] {
        let reply = send(other).await;
        assert_eq!((reply.status, reply.body == first.body), (202, false), "{other}");
    }
    for bad in
        [r#"k"2"#, r#""k"#, r#"k""#, r#""k"2"#, r#""k\2""#, r#""k", "k""#, "\"k\";", "\"k\";=1", "k k", "", "\"\""]
    {
        send(bad).await.is_problem(400, "in double quotes");
    }
    let long = "k".repeat(256);
    send(&long).await.is_problem(400, "1 to 255");
    assert_eq!(send(&format!("\"{}\"", &long[1..])).await.status, 202);
    let two = [("idempotency-key", "k"), ("idempotency-key", "k")];
    running.send("POST /topics/a", &two, "x").await.is_problem(400, "one value");
}

#[tokio::test]
async fn without_room_a_new_key_is_told_503_and_counted_and_the_old_ones_hold() {
    let mut limits = Limits::default();
    limits.idempotency_bytes = 2_000;
    let running = Running::with(ServerOptions::new().with_limits(limits)).await;
    let send = async |key: &str| running.send("POST /topics/a", &[("idempotency-key", key)], "x").await;
    let mut kept = Vec::new();
    let full = loop {
        let reply = send(&kept.len().to_string()).await;
        if reply.status != 202 {
            break reply;
        }
        kept.push(reply.body);
    };
    full.is_problem(503, "no room");
    let wait: u64 = full.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=600).contains(&wait) && kept.len() > 2, "{wait} {}", kept.len());
    for (key, body) in kept.iter().enumerate() {
        assert_eq!(&send(&key.to_string()).await.body, body);
    }
    let metrics = running.get("/metrics").await.text();
    assert!(metrics.lines().any(|line| line == "broker_refused_total{reason=\"idempotency\"} 1"), "{metrics}");
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
}
