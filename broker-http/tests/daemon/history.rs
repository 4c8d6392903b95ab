//! What topics of `memory:` retain keeps no publisher out: it yields, whatever the bounds are or become.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::{Daemon, run, soon};

/// Bytes of each message.
const SIZE: usize = 60 << 10;

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

impl Daemon {
    /// Publishes so many to a topic; tells how many were taken.
    async fn publish(&self, topic: &str, count: usize) -> usize {
        let body = "x".repeat(SIZE);
        let mut taken = 0;
        for number in 0..count {
            let (status, said) = self.send(&format!("POST /topics/{topic}?id={topic}-{number}"), &body).await;
            assert!([202, 429, 503].contains(&status), "{status} {said}");
            taken += usize::from(status == 202);
        }
        taken
    }

    async fn reload(&mut self) -> String {
        self.signal("-HUP");
        soon(async {
            loop {
                let mut line = String::new();
                assert!(self.stderr.read_line(&mut line).await.unwrap() > 0, "it ended");
                if line.contains("SIGHUP") || line.contains("reloaded") {
                    return line;
                }
            }
        })
        .await
    }

    /// Bytes that messages hold.
    async fn held(&self) -> usize {
        let (_, metrics) = self.send("GET /metrics", "").await;
        let line = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes "));
        line.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap()
    }

    /// What a reader is told first that comes back after event `id`: an event, or that there is a gap.
    async fn resumed(&self, topic: &str, id: &str) -> String {
        let mut stream = soon(TcpStream::connect(self.address)).await.unwrap();
        let request = format!("GET /topics/{topic}/stream HTTP/1.1\r\nhost: localhost\r\nlast-event-id: {id}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(stream).lines();
        loop {
            let line = soon(lines.next_line()).await.unwrap().expect("the stream goes on");
            if line.starts_with("id: ") || line.starts_with("event: ") {
                return line;
            }
        }
    }
}

#[tokio::test]
async fn lower_bounds_are_taken_up_by_what_is_retained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "limits = {memory_bytes = 8000000, topic_memory_bytes = 4000000}");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    for topic in ["a", "b", "c"] {
        assert_eq!(daemon.publish(topic, 20).await, 20);
    }
    assert!(daemon.held().await > 1_500_000);
    assert_eq!(daemon.resumed("a", "a-18").await, "id: a-19");
    for (text, most) in [
        // Everything together is over this bound already, and so is each topic over its own.
        ("limits = {memory_bytes = 1000000, topic_memory_bytes = 4000000}", 250_000),
        ("limits = {memory_bytes = 1000000, topic_memory_bytes = 500000}", 250_000),
        ("topics = [{filter = \"a\", memory_bytes = 200000}]\nlimits = {memory_bytes = 1000000}", 150_000),
        ("topics = [{filter = \"a\", memory_bytes = 100000}]\nlimits = {memory_bytes = 100000}", 25_000),
    ] {
        write(&path, text);
        let said = daemon.reload().await;
        assert!(said.contains("reloaded") && !said.contains("restart"), "nobody touched the broker: {said}");
        let held = daemon.held().await;
        assert!(held <= most, "{text}: {held}");
        for topic in ["a", "b", "c", "d"] {
            assert_eq!(daemon.publish(topic, 10).await, 10, "{text}: {topic}");
        }
    }
    // More is taken up as well.
    write(&path, "");
    daemon.reload().await;
    daemon.publish("a", 20).await;
    assert!(daemon.held().await > 20 * SIZE);
    // What the operator says of the broker himself does take a restart.
    write(&path, "broker = \"memory:?retain=5\"");
    let said = daemon.reload().await;
    assert!(said.contains("; broker changed, which takes a restart"), "{said}");
}

#[tokio::test]
async fn what_a_url_lets_topics_retain_beyond_a_bound_yields() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    for (broker, limits) in [
        ("retain_bytes=100000000", "limits = {memory_bytes = 100000000, topic_memory_bytes = 500000}"),
        ("retain_bytes=100000000&retain_total_bytes=100000000", "limits = {memory_bytes = 500000}"),
        // Each within its share, and too much together.
        ("retain=1000&retain_total_bytes=100000000", "limits = {memory_bytes = 500000, topic_memory_bytes = 400000}"),
    ] {
        let config = write(&path, &format!("broker = \"memory:?{broker}\"\n{limits}"));
        let (code, said) = run(&["check-config", "--config", &config]).await;
        assert_eq!(code, Some(0), "{said}");
        let mut daemon = Daemon::start(&["--config", &config]).await;
        let topics = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        for topic in topics.iter().cycle().take(30) {
            assert_eq!(daemon.publish(topic, 5).await, 5, "{broker}: {topic}");
        }
        // In batches, too, and line by line.
        let line = format!("{{\"payload\":\"{}\"}}\n", "x".repeat(SIZE));
        let head = "POST /topics/a HTTP/1.1\r\ncontent-type: application/x-ndjson";
        for head in [head.to_owned(), format!("{head}\r\naccept: application/x-ndjson")] {
            for _ in 0..5 {
                let (_, said) = daemon.raw(&head, &line.repeat(2)).await;
                assert!(!said.contains("error") && said.matches("\"id\"").count() == 2, "{broker}: {said}");
            }
        }
        let held = daemon.held().await;
        assert!(held <= 500_000 || broker == "retain_bytes=100000000", "{broker}: {held}");
        assert!(daemon.resumed("a", "a-0").await.contains("gap"), "{broker}");
        daemon.signal("-TERM");
        let mut line = String::new();
        while !line.contains("were forgotten") {
            line.clear();
            assert!(soon(daemon.stderr.read_line(&mut line)).await.unwrap() > 0, "{broker}: it was not said");
        }
    }
}

#[tokio::test]
async fn what_waits_to_be_taken_out_keeps_publishers_out_and_costs_nobody_his_history() {
    let folder = tempfile::tempdir().unwrap();
    let limits = "limits = {memory_bytes = 4000000, topic_memory_bytes = 500000}";
    let config =
        write(&folder.path().join("broker.toml"), &format!("broker = \"memory:?retain_bytes=100000000\"\n{limits}"));
    let daemon = Daemon::start(&["--config", &config]).await;
    assert_eq!(daemon.send("PUT /subscriptions/q", r#"{"filter":"a"}"#).await.0, 201);
    assert_eq!(daemon.publish("b", 3).await, 3);
    let taken = daemon.publish("a", 20).await;
    assert!((6..=8).contains(&taken), "{taken}");
    let (status, said) = daemon.send("POST /topics/a", &"x".repeat(SIZE)).await;
    assert!(status == 429 && said.contains("bound of 500000 bytes"), "{status} {said}");
    // None of it would have made room.
    assert_eq!(daemon.resumed("a", "a-0").await, "id: a-1");
    assert_eq!(daemon.resumed("b", "b-0").await, "id: b-1");
    let mut leases = BTreeSet::new();
    // One answer has as many as there is room for.
    while leases.len() < taken {
        let pulled = daemon.json("POST /subscriptions/q/pull?max=100&wait=10s", "").await;
        let deliveries = pulled["deliveries"].as_array().filter(|deliveries| !deliveries.is_empty());
        let deliveries = deliveries.unwrap_or_else(|| panic!("{pulled}")).iter();
        leases.extend(deliveries.map(|delivery| delivery["lease"].as_str().unwrap().to_owned()));
    }
    assert_eq!(leases.len(), taken);
    let settled = daemon.json("POST /subscriptions/q/settle", &serde_json::json!({ "ack": leases }).to_string()).await;
    assert_eq!(settled["gone"], Value::Array(Vec::new()), "{settled}");
    // It is history alone now, and yields; whoever was refused comes again when he was told to.
    soon(async {
        while daemon.publish("a", 1).await == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(daemon.resumed("b", "b-0").await, "id: b-1");
}

#[tokio::test]
async fn topics_that_only_retain_make_room_for_others() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), "limits = {topics = 4}");
    let daemon = Daemon::start(&["--config", &config]).await;
    assert_eq!(daemon.send("PUT /subscriptions/q", r#"{"filter":"held"}"#).await.0, 201);
    assert_eq!(daemon.publish("held", 1).await, 1);
    for topic in 0..20 {
        assert_eq!(daemon.publish(&format!("t{topic}"), 2).await, 2, "{topic}");
    }
    // The one published to the longest ago waits for somebody.
    let pulled = daemon.json("POST /subscriptions/q/pull?max=100&wait=10s", "").await;
    assert_eq!(pulled["deliveries"].as_array().map(Vec::len), Some(1), "{pulled}");
}

/// They share their payloads with the topic that they were published to, and are charged to it.
#[tokio::test]
async fn dead_letters_that_only_a_dead_letter_topic_retains_keep_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(
        &folder.path().join("broker.toml"),
        "broker = \"memory:?retain_bytes=100000000\"\nlimits = {topic_memory_bytes = 500000}",
    );
    let daemon = Daemon::start(&["--config", &config]).await;
    assert_eq!(daemon.send("PUT /subscriptions/q", r#"{"filter":"a","dead_letter":"dead"}"#).await.0, 201);
    let taken = daemon.publish("a", 20).await;
    let pulled = daemon.json("POST /subscriptions/q/pull?max=100&wait=10s", "").await;
    let leases = pulled["deliveries"].as_array().unwrap_or_else(|| panic!("{pulled}")).iter();
    let rejected: Vec<_> = leases.map(|delivery| serde_json::json!({ "lease": delivery["lease"] })).collect();
    assert_eq!(rejected.len(), taken);
    let settle = serde_json::json!({ "reject": rejected }).to_string();
    assert_eq!(daemon.json("POST /subscriptions/q/settle", &settle).await["gone"], Value::Array(Vec::new()));
    assert_eq!(daemon.resumed("dead", "a-0").await, "id: a-1", "they are retained");
    assert_eq!(daemon.json("DELETE /subscriptions/q/dead", "").await["purged"], taken);
    assert_eq!(daemon.send("DELETE /subscriptions/q", "").await.0, 204);
    soon(async {
        while daemon.publish("a", 1).await == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(daemon.publish("a", 20).await, 20);
}
