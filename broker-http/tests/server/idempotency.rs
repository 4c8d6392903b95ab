//! `Idempotency-Key` while the first request is at work.

use std::sync::Arc;

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
