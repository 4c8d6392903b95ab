//! Daemons over real RabbitMQ and Kafka, which `tests/servers` starts: several share the work of one
//! configuration, one may be killed, and one that is told to end loses nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod backlogs;
mod streams;
#[path = "../daemon/support.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use support::{Daemon, endpoint, header, soon};

/// The URL of a server of this kind.
fn server(kind: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers");
    let output = Command::new(script).args(["up", kind]).output().expect("tests/servers can be run");
    let printed = String::from_utf8_lossy(&output.stdout);
    let name = format!("{}_URL=", kind.to_uppercase());
    let url = printed.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_else(|| {
        panic!("tests/servers up {kind}: {}", String::from_utf8_lossy(&output.stderr));
    });
    // Topics made here have partitions for several members.
    if kind == "kafka" { format!("{url}?partitions=4") } else { url.to_owned() }
}

/// A topic that no other test has.
fn unique() -> String {
    let mut unique = [0; 8];
    getrandom::fill(&mut unique).unwrap();
    format!("daemons-{:x}", u64::from_ne_bytes(unique))
}

/// What an endpoint was pushed: how often each id came.
type Pushed = Arc<Mutex<BTreeMap<String, usize>>>;

/// A configuration with one push subscription, what it is pushed, and the topic it wants.
struct Stage {
    config: tempfile::NamedTempFile,
    pushed: Pushed,
    topic: String,
    broker: String,
}

impl Stage {
    async fn set(kind: &str) -> Self {
        let (hook, mut told) = endpoint(&[]).await;
        let pushed = Pushed::default();
        let counts = Arc::clone(&pushed);
        tokio::spawn(async move {
            while let Some(request) = told.recv().await {
                *counts.lock().entry(header(&request, "ce-id").unwrap().to_owned()).or_default() += 1;
            }
        });
        let topic = unique();
        let config = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            "broker = \"{broker}\"\n[subscriptions.{topic}]\nfilter = \"{topic}\"\nendpoint = \"http://{hook}/\"\nmax_in_flight = 8\nretry = {{ initial = \"10ms\", max = \"100ms\" }}\n",
            broker = server(kind)
        );
        std::fs::write(config.path(), text).unwrap();
        Self { config, pushed, topic, broker: kind.to_owned() }
    }

    async fn daemon(&self) -> Daemon {
        Daemon::start(&["--config", self.config.path().to_str().unwrap(), "--drain", "20s"]).await
    }

    /// Publishes these, by as many publishers as there are daemons; the ids that were acknowledged.
    async fn publish(&self, daemons: &[&Daemon], ids: std::ops::Range<usize>) -> BTreeSet<String> {
        let mut acknowledged = BTreeSet::new();
        for begin in ids.clone().step_by(16) {
            let publishing = (begin..(begin + 16).min(ids.end)).map(|index| async move {
                let (id, daemon) = (format!("m{index}"), daemons[index % daemons.len()]);
                let request = format!("POST /topics/{}?id={id}&key={index}", self.topic);
                match tokio::time::timeout(Duration::from_secs(30), daemon.try_send(&request, "x")).await {
                    Ok(Ok(202)) => Some(id),
                    _ => None,
                }
            });
            acknowledged.extend(futures_util::future::join_all(publishing).await.into_iter().flatten());
        }
        acknowledged
    }

    /// Waits until all of these were pushed.
    async fn all_pushed(&self, acknowledged: &BTreeSet<String>) {
        let waiting = async {
            while acknowledged.iter().any(|id| !self.pushed.lock().contains_key(id)) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(120), waiting).await.is_err() {
            let pushed = self.pushed.lock();
            let missing: Vec<_> = acknowledged.iter().filter(|id| !pushed.contains_key(*id)).collect();
            panic!(
                "{}: acknowledged and never pushed: {} of {}, {:?}",
                self.broker,
                missing.len(),
                acknowledged.len(),
                missing.iter().take(5).collect::<Vec<_>>()
            );
        }
    }

    /// How many pushes a daemon made.
    async fn attempts(&self, daemon: &Daemon) -> usize {
        let attempts = daemon.json(&format!("GET /subscriptions/{}/attempts", self.topic), "").await;
        attempts["attempts"].as_array().map_or(0, Vec::len)
    }
}

/// Two daemons with one configuration; one is killed in the middle of it.
async fn one_may_die(kind: &str) {
    let stage = Stage::set(kind).await;
    let (one, two) = (stage.daemon().await, stage.daemon().await);
    let mut acknowledged = BTreeSet::new();
    // Until both have work: members join a group one after the other.
    soon(async {
        for round in 0.. {
            acknowledged.extend(stage.publish(&[&one, &two], round * 32..(round + 1) * 32).await);
            if stage.attempts(&one).await > 0 && stage.attempts(&two).await > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let begin = 1_000_000;
    let killing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        one.signal("-KILL");
    };
    let both = [&one, &two];
    let (taken, ()) = tokio::join!(stage.publish(&both, begin..begin + 400), killing);
    acknowledged.extend(taken);
    acknowledged.extend(stage.publish(&[&two], begin + 400..begin + 500).await);
    assert!(acknowledged.len() >= 300, "{kind}: {} were acknowledged", acknowledged.len());
    stage.all_pushed(&acknowledged).await;
    // What the one that was killed had in flight comes again, and no more than that.
    let twice = stage.pushed.lock().values().filter(|count| **count > 1).count();
    let bound = if kind == "kafka" { acknowledged.len() } else { 64 };
    assert!(twice <= bound, "{kind}: {twice} of {} came more than once", acknowledged.len());
    println!("{kind}: {} acknowledged, none lost, {twice} pushed more than once", acknowledged.len());
}

/// One daemon is told to end while it is published to; the next finds what stayed.
async fn ending_loses_nothing(kind: &str) {
    let stage = Stage::set(kind).await;
    let mut one = stage.daemon().await;
    let ending = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        one.signal("-TERM");
    };
    let alone = [&one];
    let (mut acknowledged, ()) = tokio::join!(stage.publish(&alone, 0..2_000), ending);
    assert!(!acknowledged.is_empty() && acknowledged.len() < 2_000, "{kind}: {}", acknowledged.len());
    let status = soon(one.child.wait()).await.unwrap();
    assert!(matches!(status.code(), Some(0 | 3)), "{kind}: {status}");
    let pushed_before = stage.pushed.lock().len();
    let two = stage.daemon().await;
    acknowledged.extend(stage.publish(&[&two], 5_000..5_050).await);
    stage.all_pushed(&acknowledged).await;
    // What was settled before the end does not come again.
    let twice = stage.pushed.lock().values().filter(|count| **count > 1).count();
    assert!(twice <= 8, "{kind}: {twice} came more than once");
    println!(
        "{kind}: {} acknowledged, {pushed_before} pushed before the end, {twice} more than once",
        acknowledged.len()
    );
}

/// What waits in the server is none of the daemon's memory; what pushes have in hand is, and it is bounded.
async fn what_is_in_hand_is_bounded(kind: &str) {
    const MESSAGES: usize = 40;
    const BYTES: usize = 256 << 10;
    const BOUND: usize = 4 << 20;
    let (in_hand, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let hook = {
        let most = Arc::clone(&most);
        async move |body: axum::body::Bytes| {
            most.fetch_max(in_hand.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(50)).await;
            in_hand.fetch_sub(1, Ordering::SeqCst);
            let _ = tell.send(body.len());
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook_address = listener.local_addr().unwrap();
    let app = axum::Router::new().route("/", axum::routing::post(hook));
    tokio::spawn(async move { axum::serve(listener, app).await });

    let stage = Stage::set(kind).await;
    let text = std::fs::read_to_string(stage.config.path()).unwrap();
    std::fs::write(stage.config.path(), format!("{text}[limits]\nmemory_bytes = {BOUND}\n")).unwrap();
    let daemon = stage.daemon().await;
    let name = format!("{}-hand", stage.topic);
    let spec =
        serde_json::json!({"filter": stage.topic, "endpoint": format!("http://{hook_address}/"), "max_in_flight": 64});
    assert_eq!(daemon.send(&format!("PUT /subscriptions/{name}"), &spec.to_string()).await.0, 201);
    assert_eq!(daemon.send(&format!("POST /subscriptions/{name}/pause"), "").await.0, 200);
    let body = "x".repeat(BYTES);
    for key in 0..MESSAGES {
        let request = format!("POST /topics/{}?key={key}", stage.topic);
        // The other subscription takes its part of the memory meanwhile.
        soon(async {
            while daemon.send(&request, &body).await.0 != 202 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
    assert_eq!(daemon.send(&format!("POST /subscriptions/{name}/resume"), "").await.0, 200);
    for _ in 0..MESSAGES {
        assert_eq!(soon(told.recv()).await.unwrap(), BYTES);
    }
    let most = most.load(Ordering::SeqCst);
    println!("{kind}: {most} of {MESSAGES} messages in hand at a time, half of the bound is {}", BOUND / 2 / BYTES);
    assert!((2..=BOUND / 2 / BYTES).contains(&most), "{kind}: {most} in hand at a time");
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_what_is_in_hand_is_bounded() {
    what_is_in_hand_is_bounded("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_what_is_in_hand_is_bounded() {
    what_is_in_hand_is_bounded("kafka").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_one_of_two_may_die() {
    one_may_die("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_one_of_two_may_die() {
    one_may_die("kafka").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_ending_loses_nothing() {
    ending_loses_nothing("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_ending_loses_nothing() {
    ending_loses_nothing("kafka").await;
}
