//! Restart and shutdown.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, BrokerExt, GroupName, MemoryBroker, Subscribe, TopicFilter};
use broker_http::ServerOptions;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Running, soon};

#[tokio::test]
async fn subscriptions_outlive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let options = || ServerOptions::new().with_state(folder.path().join("state.json"));
    let running = Running::with(options()).await;
    running.put("a", r#"{"filter":"a","retry":{"max_attempts":3}}"#).await;
    running.put("b", r#"{"filter":"b","headers":{"x-key":"hunter2"}}"#).await;
    running.put("c", r#"{"filter":"c"}"#).await;
    running.post("/subscriptions/b/pause", "").await;
    running.delete("/subscriptions/c").await;
    let before = running.get("/subscriptions").await.json();
    running.server.drain(Duration::from_secs(10)).await;

    let running = Running::with(options()).await;
    let after = running.get("/subscriptions").await.json();
    assert_eq!(after, before);
    assert_eq!(after["subscriptions"][1]["status"]["state"], "paused");
    assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 1);
    let kept = std::fs::read_to_string(folder.path().join("state.json")).unwrap();
    assert!(kept.contains("hunter2"), "the state file keeps what pushes need");
}

/// It was not tried, and another member of the group waits for it.
#[tokio::test]
async fn a_batch_being_gathered_is_given_back_by_a_pause() {
    let running = Running::start().await;
    let batch = r#"{"filter":"a","group":"g","endpoint":"http://127.0.0.1:9/","mode":"batch","batch":{"wait":"1m"}}"#;
    assert_eq!(running.put("gathers", batch).await.status, 201);
    assert_eq!(running.put("pulls", r#"{"filter":"a","group":"g"}"#).await.status, 201);
    for number in 0..3 {
        running.post("/topics/a", &number.to_string()).await;
    }
    let status = async || running.get("/subscriptions/gathers").await.json()["status"].clone();
    soon(async {
        while status().await["in_flight"] != 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(running.post("/subscriptions/gathers/pause", "").await.status, 200);
    let mut pulled = Vec::new();
    while pulled.len() < 3 {
        let more = running.pull("pulls", "wait=20s").await;
        assert!(!more.is_empty(), "what was gathered does not come: {:?}", status().await);
        pulled.extend(more);
    }
    assert!(pulled.iter().all(|lease| lease.attempt == 1), "it was not tried: {pulled:?}");
    assert_eq!(status().await["in_flight"], 0);
}

#[tokio::test]
async fn a_broken_state_file_is_an_error_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.json");
    std::fs::write(&path, "{").unwrap();
    let server = broker_http::Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new().with_state(&path));
    let error = server.restore().await.unwrap_err();
    assert!(error.message().contains("state.json"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{");
}

#[tokio::test]
async fn a_drain_takes_settlements_and_nothing_new() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","timeout":"1h"}"#).await;
    running.post("/topics/a", "1").await;
    running.post("/topics/a", "2").await;
    let leases = running.pull("q", "max=1&wait=10s").await;
    let server = running.server.clone();
    let draining = tokio::spawn(async move { server.drain(Duration::from_secs(20)).await });
    soon(async {
        while running.get("/readyz").await.status != 503 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    running.post("/topics/a", "3").await.is_problem(503, "shutting down");
    running.put("r", r#"{"filter":"a"}"#).await.is_problem(503, "shutting down");
    running.get("/topics/a/stream").await.is_problem(503, "shutting down");
    assert!(running.pull("q", "wait=10s").await.is_empty());
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    let report = soon(draining).await.unwrap();
    assert!(report.complete, "{report:?}");
    assert_eq!((report.in_flight, report.undelivered), (0, 1), "{report:?}");
    // Nobody listens any more.
    assert!(tokio::net::TcpStream::connect(running.address).await.is_err());
}

#[tokio::test]
async fn a_publisher_who_waits_for_room_is_sent_away_by_a_drain_and_does_not_hold_it() {
    let running = Arc::new(Running::start().await);
    running.put("q", r#"{"filter":"*","backlog":{"max_messages":1,"overflow":"wait"}}"#).await;
    assert_eq!(running.post("/topics/a", "1").await.status, 202);
    let send = |topic: &'static str, headers: &'static [(&str, &str)], body: &'static str| {
        let running = Arc::clone(&running);
        tokio::spawn(async move { running.send(&format!("POST /topics/{topic}"), headers, body).await })
    };
    let batch = r#"[{"specversion":"1.0","id":"1","source":"/s","type":"t"}]"#;
    const STREAMED: &[(&str, &str)] = &[("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson")];
    let whole = [
        send("a", &[], "2"),
        send("b", &[("idempotency-key", "k")], "2"),
        send("c", &[("content-type", "application/cloudevents-batch+json")], batch),
        send("d", &[("content-type", "application/x-ndjson")], "{\"payload\":1}"),
    ];
    let streamed = send("e", STREAMED, "{\"payload\":1}\n{\"payload\":2}");
    // Each of them waits.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(whole.iter().chain([&streamed]).all(|publish| !publish.is_finished()));
    let report = soon(running.server.drain(Duration::from_secs(20))).await;
    assert!(report.complete, "{report:?}");
    assert_eq!((report.unconfirmed, report.undelivered), (0, 1), "{report:?}");
    for publish in whole {
        let reply = soon(publish).await.unwrap();
        reply.is_problem(503, "shutting down");
        assert!(reply.header("retry-after").is_some(), "{reply:?}");
    }
    let lines = soon(streamed).await.unwrap().text();
    assert!(lines.contains('{') && lines.lines().all(|line| line.contains("shutting down")), "{lines}");
}

#[tokio::test]
async fn a_drain_ends_streams_and_idle_connections() {
    let running = Running::start().await;
    let mut idle = running.connect().await;
    let mut stream = running.connect().await;
    stream.write_all(b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut stream, "connected").await;
    // One that a pause has sent out of its group, too.
    running.put("q", r#"{"filter":"a"}"#).await;
    let mut paused = running.connect().await;
    paused.write_all(b"GET /topics/a/stream?group=q HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut paused, "connected").await;
    assert_eq!(running.post("/subscriptions/q/pause", "").await.status, 200);
    let report = soon(running.server.drain(Duration::from_secs(20))).await;
    assert!(report.complete);
    for mut stream in [stream, paused] {
        let mut rest = Vec::new();
        soon(stream.read_to_end(&mut rest)).await.unwrap();
        let rest = String::from_utf8_lossy(&rest);
        assert!(rest.ends_with("0\r\n\r\n"), "cut: {rest:?}");
    }
    let mut rest = Vec::new();
    soon(idle.read_to_end(&mut rest)).await.unwrap();
}

#[tokio::test]
async fn a_drain_with_a_lease_nobody_settles_is_cut() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","timeout":"1h"}"#).await;
    running.post("/topics/a", "1").await;
    let _leases = running.pull("q", "wait=10s").await;
    let report = soon(running.server.drain(Duration::from_millis(100))).await;
    assert!(!report.complete);
    assert_eq!(report.in_flight, 1);
}

#[tokio::test]
async fn a_service_and_its_http_interface_share_one_broker() {
    let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
    let running = Running::over(Arc::clone(&broker), ServerOptions::new()).await;
    let group = Subscribe::group(GroupName::new("inside").unwrap());
    let mut inside = broker.subscribe(&TopicFilter::new("a").unwrap(), group).await.unwrap();
    running.put("outside", r#"{"filter":"a"}"#).await;
    broker.publish(&"a".parse().unwrap(), broker_core::Message::new("from inside")).await.unwrap();
    assert_eq!(running.post("/topics/a", "from outside").await.json()["matched"], 2);
    for expected in ["from inside", "from outside"] {
        let delivery = soon(inside.next()).await.unwrap().unwrap();
        assert_eq!(delivery.message().payload(), expected);
        delivery.ack().await.unwrap();
    }
    assert_eq!(running.pull("outside", "wait=10s").await.len(), 2);
}

/// A change that cannot be kept is told as what it is, and where the file is stays the operator's.
#[tokio::test]
async fn what_is_done_and_cannot_be_kept_is_told_and_written_when_it_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("there");
    std::fs::create_dir(&place).unwrap();
    let path = place.join("state.json");
    let running = Running::with(ServerOptions::new().with_state(&path)).await;
    std::fs::remove_dir_all(&place).unwrap();
    let reply = running.put("q", r#"{"filter":"a"}"#).await;
    reply.is_problem(503, "the change is made");
    assert!(!reply.text().contains("state.json") && reply.header("retry-after").is_some(), "{reply:?}");
    assert_eq!(running.get("/subscriptions/q").await.status, 200);
    std::fs::create_dir(&place).unwrap();
    assert_eq!(running.put("q", r#"{"filter":"a"}"#).await.status, 200);
    assert!(std::fs::read_to_string(&path).unwrap().contains("\"q\""));
}

/// What stood together stands together again, whichever of them comes first.
#[tokio::test]
async fn members_of_one_group_outlive_a_restart_whichever_said_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let options = || ServerOptions::new().with_state(folder.path().join("state.json"));
    let running = Running::with(options()).await;
    let retry = |attempts: u32| json!({"filter": "a", "group": "g", "retry": {"max_attempts": attempts}}).to_string();
    // The last in order says it first, and then the group changes under it.
    assert_eq!(running.put("z", &retry(3)).await.status, 201);
    assert_eq!(running.put("b", r#"{"filter":"a","group":"g"}"#).await.status, 201);
    drop(running);
    let running = Running::with(options()).await;
    assert_eq!(running.get("/subscriptions/z").await.json()["retry"]["max_attempts"], 3);
    assert_eq!(running.put("b", &retry(4)).await.status, 200);
    drop(running);
    let running = Running::with(options()).await;
    for name in ["b", "z"] {
        assert_eq!(running.get(&format!("/subscriptions/{name}")).await.status, 200, "{name}");
    }
}
