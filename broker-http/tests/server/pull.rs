//! Pull and settle by lease.

use std::time::Duration;

use broker_http::{Limits, ServerOptions};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::support::{Running, read_until, soon};

async fn with(spec: &str) -> Running {
    let running = Running::start().await;
    assert_eq!(running.put("q", spec).await.status, 201);
    running
}

#[tokio::test]
async fn what_is_acked_never_comes_back() {
    let running = with(r#"{"filter":"a","timeout":"200ms","retry":{"initial":"1ms","max":"1ms"}}"#).await;
    running.post("/topics/a", "1").await;
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!((leases.len(), leases[0].attempt), (1, 1));
    assert_eq!(running.get("/subscriptions/q").await.json()["status"]["in_flight"], 1);
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    assert!(running.pull("q", "wait=500ms").await.is_empty());
    let status = running.get("/subscriptions/q").await.json()["status"].clone();
    assert_eq!((&status["lag"], &status["in_flight"]), (&json!(0), &json!(0)));
    assert!(status["last_success"].is_string());
    // Settling twice, and settling what never was.
    let gone = running.settle("q", json!({"ack": [leases[0].lease, "nonsense"]})).await;
    assert_eq!(gone, [leases[0].lease.as_str(), "nonsense"]);
}

#[tokio::test]
async fn a_lease_that_expires_is_a_retry() {
    let running =
        with(r#"{"filter":"a","timeout":"100ms","retry":{"max_attempts":2,"initial":"1ms","max":"1ms"}}"#).await;
    running.post("/topics/a?id=1", "1").await;
    let first = running.pull("q", "wait=10s").await;
    let second = running.pull("q", "wait=10s").await;
    assert_eq!((second[0].attempt, &second[0].event["id"]), (2, &first[0].event["id"]));
    assert_eq!(running.settle("q", json!({"ack": [first[0].lease]})).await, [first[0].lease.as_str()]);
    // The second was the last: it becomes a dead letter that says why.
    soon(async {
        loop {
            let dead = running.get("/subscriptions/q/dead").await.json()["dead"].clone();
            if dead[0]["reason"].as_str().is_some_and(|reason| reason.contains("lease expired")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_lease_can_be_extended() {
    let running = with(r#"{"filter":"a","timeout":"300ms"}"#).await;
    running.post("/topics/a", "1").await;
    let leases = running.pull("q", "wait=10s").await;
    let extend = json!({"extend": [{"lease": leases[0].lease, "for": "1m"}, {"lease": "none", "for": "1s"}]});
    assert_eq!(running.settle("q", extend).await, ["none"]);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
}

#[tokio::test]
async fn retry_waits_at_least_as_long_as_it_says() {
    let running = with(r#"{"filter":"a","retry":{"initial":"1ms","max":"1ms"}}"#).await;
    running.post("/topics/a", "1").await;
    let leases = running.pull("q", "wait=10s").await;
    let begun = std::time::Instant::now();
    running.settle("q", json!({"retry": [{"lease": leases[0].lease, "delay": "300ms"}]})).await;
    let again = running.pull("q", "wait=20s").await;
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(again[0].attempt, 2);
}

#[tokio::test]
async fn no_more_is_lent_than_may_be_in_flight() {
    let running = with(r#"{"filter":"a","max_in_flight":3}"#).await;
    for _ in 0..5 {
        running.post("/topics/a", "x").await;
    }
    let leases = running.pull("q", "max=100").await;
    assert_eq!(leases.len(), 3);
    assert!(running.pull("q", "wait=50ms").await.is_empty());
    // A pull that waits for room gets it when a lease ends.
    let settle = running.settle("q", json!({"ack": [leases[0].lease, leases[1].lease, leases[2].lease]}));
    let (more, gone) = tokio::join!(running.pull("q", "wait=20s"), settle);
    assert!(gone.is_empty());
    let rest = if more.len() < 2 { running.pull("q", "wait=10s").await.len() } else { 0 };
    assert_eq!(more.len() + rest, 2);
}

#[tokio::test]
async fn leases_are_bounded_over_all_subscriptions() {
    let mut limits = Limits::default();
    limits.leases = 2;
    let running = Running::with(ServerOptions::new().with_limits(limits)).await;
    running.put("q", r#"{"filter":"a"}"#).await;
    for _ in 0..3 {
        running.post("/topics/a", "x").await;
    }
    let leases = running.pull("q", "").await;
    assert_eq!(leases.len(), 2);
    let reply = running.post("/subscriptions/q/pull", "").await;
    reply.is_problem(429, "leases");
    assert!(reply.header("retry-after").is_some());
    running.settle("q", json!({"ack": [leases[0].lease]})).await;
    assert_eq!(running.pull("q", "").await.len(), 1);
}

#[tokio::test]
async fn a_puller_that_goes_away_while_it_waits_loses_nothing() {
    let running = with(r#"{"filter":"a"}"#).await;
    for _ in 0..20 {
        let mut stream = running.connect().await;
        stream.write_all(b"POST /subscriptions/q/pull?wait=60s HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        drop(stream);
    }
    running.post("/topics/a?id=1", "x").await;
    // Never handed to one of those: it is the first attempt, and at once.
    let leases = running.pull("q", "wait=5s").await;
    assert_eq!((leases.len(), leases[0].attempt), (1, 1));
}

/// The end is behind the next request, which nobody reads before the pull is answered.
#[tokio::test]
async fn a_puller_that_leaves_behind_a_pipelined_request_loses_nothing() {
    let running = with(r#"{"filter":"a","timeout":"30s"}"#).await;
    let mut stream = running.connect().await;
    let pull = "POST /subscriptions/q/pull?wait=30s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    let next = format!("GET /healthz?{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(700));
    for said in [pull, &next] {
        stream.write_all(said.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(stream);
    soon(async {
        while !running.get("/metrics").await.text().contains("broker_connections 1\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    running.post("/topics/a?id=1", "x").await;
    assert_eq!(running.pull("q", "wait=20s").await[0].attempt, 1);
}

#[tokio::test]
async fn several_pullers_split_the_messages() {
    let running = with(r#"{"filter":"a","max_in_flight":1000}"#).await;
    for id in 0..100 {
        running.post(&format!("/topics/a?id={id}"), "x").await;
    }
    let pulls = (0..10).map(|_| running.pull("q", "max=10&wait=10s"));
    let mut ids: Vec<_> = futures_util::future::join_all(pulls)
        .await
        .into_iter()
        .flatten()
        .map(|lease| lease.event["id"].as_str().unwrap().parse::<u32>().unwrap())
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn nobody_settles_what_was_lent_to_others() {
    let running = with(r#"{"filter":"a"}"#).await;
    running.put("other", r#"{"filter":"b"}"#).await;
    running.post("/topics/a", "x").await;
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!(running.settle("other", json!({"ack": [leases[0].lease]})).await, [leases[0].lease.as_str()]);
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
}

#[tokio::test]
async fn a_subscription_nobody_pulls_expires() {
    let running = with(r#"{"filter":"a","expires":"300ms"}"#).await;
    soon(async {
        while running.get("/subscriptions/q").await.status != 404 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 0);
}

#[tokio::test]
async fn a_subscription_somebody_pulls_does_not_expire() {
    let running = with(r#"{"filter":"a","expires":"400ms"}"#).await;
    assert!(running.pull("q", "wait=1200ms").await.is_empty());
    assert_eq!(running.get("/subscriptions/q").await.status, 200);
}

#[tokio::test]
async fn a_subscription_whose_lease_is_held_does_not_expire() {
    let running = with(r#"{"filter":"a","expires":"2s","timeout":"1h"}"#).await;
    for id in 1..=2 {
        running.post(&format!("/topics/a?id={id}"), "x").await;
    }
    let leases = running.pull("q", "max=1&wait=10s").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(running.get("/subscriptions/q").await.status, 200);
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    // And then it does.
    soon(async {
        while running.get("/subscriptions/q").await.status != 404 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Those who read its group by a stream need not pull.
#[tokio::test]
async fn a_subscription_whose_group_is_read_by_a_stream_does_not_expire() {
    const SOCKET: &str = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
        sec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n";
    for (headers, greeting) in [("", "connected"), (SOCKET, "101 Switching")] {
        let running = with(r#"{"filter":"a","expires":"2s"}"#).await;
        let mut reader = running.connect().await;
        let opening = format!("GET /topics/a/stream?group=q HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
        reader.write_all(opening.as_bytes()).await.unwrap();
        read_until(&mut reader, greeting).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(running.get("/subscriptions/q").await.status, 200, "{greeting}");
        assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 1, "{greeting}");
        drop(reader);
        soon(async {
            while running.get("/subscriptions/q").await.status != 404 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

/// A pause is for all who take from the subscription.
#[tokio::test]
async fn a_paused_subscription_gives_nothing_to_streams_of_its_group() {
    let running = with(r#"{"filter":"a"}"#).await;
    let mut reader = running.connect().await;
    reader.write_all(b"GET /topics/a/stream?group=q HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut reader, "connected").await;
    running.post("/topics/a?id=before", "x").await;
    read_until(&mut reader, "id: before").await;
    for _ in 0..2 {
        assert_eq!(running.post("/subscriptions/q/pause", "").await.status, 200);
        running.post("/topics/a?id=during", "x").await;
        let heard = tokio::time::timeout(Duration::from_millis(500), read_until(&mut reader, "id:")).await;
        assert!(heard.is_err(), "{heard:?}");
        assert_eq!(running.get("/subscriptions/q").await.json()["status"]["lag"], 1);
        assert_eq!(running.post("/subscriptions/q/resume", "").await.status, 200);
        read_until(&mut reader, "id: during").await;
    }
    // What is deleted while it is paused ends its streams, and is not made again by them.
    running.post("/subscriptions/q/pause", "").await;
    assert_eq!(running.delete("/subscriptions/q").await.status, 204);
    read_until(&mut reader, "0\r\n\r\n").await;
    assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 0);

    // One that comes during a pause is no other.
    let running = with(r#"{"filter":"a"}"#).await;
    running.post("/subscriptions/q/pause", "").await;
    running.post("/topics/a?id=1", "x").await;
    let mut reader = running.connect().await;
    reader.write_all(b"GET /topics/a/stream?group=q HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut reader, "connected").await;
    let heard = tokio::time::timeout(Duration::from_millis(500), read_until(&mut reader, "id:")).await;
    assert!(heard.is_err(), "{heard:?}");
    running.post("/subscriptions/q/resume", "").await;
    read_until(&mut reader, "id: 1").await;
}

#[tokio::test]
async fn leases_of_a_replaced_subscription_come_back_at_once() {
    let running = with(r#"{"filter":"a","timeout":"1h"}"#).await;
    running.post("/topics/a", "x").await;
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!(running.put("q", r#"{"filter":"a","timeout":"2h"}"#).await.status, 200);
    let again = running.pull("q", "wait=10s").await;
    assert_eq!(again.len(), 1);
    assert_eq!(running.settle("q", json!({"ack": [leases[0].lease]})).await, [leases[0].lease.as_str()]);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let running = with(r#"{"filter":"a"}"#).await;
    for (query, detail) in [
        ("max=0", "max"),
        ("max=10001", "10000"),
        ("max=x", "max"),
        ("wait=1", "wait"),
        ("wait=1h", "5m"),
        ("x=1", "max, wait"),
    ] {
        running.post(&format!("/subscriptions/q/pull?{query}"), "").await.is_problem(400, detail);
    }
    for (body, detail) in [
        ("", "body"),
        ("[]", "object"),
        (r#"{"acks":[]}"#, "acks"),
        (r#"{"ack":[1]}"#, "ack[0]"),
        (r#"{"retry":[{"lease":"x","delay":"1"}]}"#, "retry[0].delay"),
        (r#"{"retry":["x"]}"#, "retry[0]"),
        (r#"{"extend":[{"lease":"x"}]}"#, "for"),
        (r#"{"extend":[{"lease":"x","for":"0s"}]}"#, "extend[0].for"),
        (r#"{"extend":[{"lease":"x","for":"13h"}]}"#, "12h"),
    ] {
        running.post("/subscriptions/q/settle", body).await.is_problem(400, detail);
    }
}

#[tokio::test]
async fn a_payload_nested_deep_leaves_the_answer_readable() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let json = [("content-type", "application/json")];
    assert_eq!(running.send("POST /topics/a", &json, &deep).await.status, 202);
    assert_eq!(running.send("POST /topics/a", &json, "[1]").await.status, 202);
    let leases = running.pull("q", "max=2&wait=10s").await;
    assert!(leases[0].event["data_base64"].is_string() && leases[0].event.get("data").is_none());
    assert_eq!(leases[1].event["data"], json!([1]));
}
