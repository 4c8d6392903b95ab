//! What topics retain yields where its memory is needed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Duration;

use broker_core::*;
use bytes::Bytes;
use tokio::time::timeout;

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn retaining(retention: Retention) -> MemoryBroker {
    MemoryBroker::with_options(MemoryOptions::new().with_retention(retention))
}

/// A message, and what it takes: as much as any other, whatever its id.
fn message(id: &str) -> (Message, u64) {
    let message = Message::new(vec![0; 1_000 - id.len()]).with_id(id.parse().unwrap());
    let bytes = message.memory_size() as u64;
    (message, bytes)
}

/// Publishes so many to each topic; tells what one takes.
async fn publish(broker: &MemoryBroker, topics: &[&str], count: usize) -> u64 {
    let mut taken = 0;
    for number in 0..count {
        for name in topics {
            let (message, bytes) = message(&format!("{name}-{number}"));
            taken = bytes;
            broker.publish(&topic(name), message).await.unwrap();
        }
    }
    taken
}

/// What is retained, and whether something before it is missing.
async fn retained(broker: &MemoryBroker, filter: &str) -> (Vec<String>, Option<Gap>) {
    let earliest = GroupOptions::new().with_start(StartAt::Earliest);
    let options = Subscribe::new().with_options(earliest).with_max_in_flight(1_000).unwrap();
    let mut reader = broker.subscribe(&filter.parse().unwrap(), options).await.unwrap();
    let (mut read, mut gap) = (Vec::new(), None);
    // What is retained is there at once; nothing else comes.
    while let Ok(received) = timeout(Duration::from_millis(50), reader.receive(&mut read, 1_000)).await {
        received.unwrap();
        gap = gap.or_else(|| reader.gap());
    }
    (read.iter().map(|delivery| delivery.message().id().to_string()).collect(), gap)
}

#[tokio::test]
async fn a_topic_forgets_its_oldest_and_says_so() {
    let broker = retaining(Retention::messages(100));
    let taken = publish(&broker, &["a.x", "a.y"], 3).await;
    assert_eq!(broker.forget(Some(&topic("a.x")), taken + 1), 2 * taken);
    assert_eq!(broker.forget(Some(&topic("none")), taken), 0);
    let (ids, gap) = retained(&broker, "a.>").await;
    assert_eq!((ids, gap), (["a.y-0", "a.y-1", "a.x-2", "a.y-2"].map(str::to_owned).to_vec(), Some(Gap::Unknown)));
}

#[tokio::test]
async fn all_topics_forget_their_share() {
    let broker = retaining(Retention::messages(100));
    let taken = publish(&broker, &["a.x", "a.y"], 10).await;
    publish(&broker, &["b"], 20).await;
    assert_eq!(broker.forget(None, 20 * taken), 20 * taken);
    for (name, left) in [("a.x", 5), ("a.y", 5), ("b", 10)] {
        assert_eq!(retained(&broker, name).await.0.len(), left, "{name}");
    }
    // Fewer messages than topics: those with the oldest go, and not one of each.
    let broker = retaining(Retention::messages(100));
    publish(&broker, &["a", "b", "c", "d"], 1).await;
    assert_eq!(broker.forget(None, taken * 2), taken * 2);
    for (name, left) in [("a", 0), ("b", 0), ("c", 1), ("d", 1)] {
        assert_eq!(retained(&broker, name).await.0.len(), left, "{name}");
    }
}

#[tokio::test]
async fn what_is_in_a_backlog_frees_nothing_and_stays() {
    let broker = retaining(Retention::messages(100));
    let group = Subscribe::group(GroupName::new("g").unwrap());
    let mut reader = broker.subscribe(&"a".parse().unwrap(), group).await.unwrap();
    let taken = publish(&broker, &["a"], 10).await;
    assert_eq!((broker.forget(None, taken), broker.forget(Some(&topic("a")), taken)), (0, 0));
    assert_eq!(retained(&broker, "a").await.0.len(), 10);
    for _ in 0..10 {
        reader.next().await.unwrap().unwrap().ack().await.unwrap();
    }
    assert_eq!(broker.forget(None, u64::MAX), 10 * taken);
    assert_eq!(broker.forget(None, u64::MAX), 0);
}

#[tokio::test]
async fn other_bounds_hold_at_once() {
    let broker = retaining(Retention::messages(100));
    let taken = publish(&broker, &["a", "b", "c"], 8).await;
    broker.set_retention(Retention::messages(100).with_max_bytes(4 * taken)).unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(retained(&broker, name).await.0.len(), 4, "{name}");
    }
    let retention = broker.retention().unwrap().with_max_total_bytes(6 * taken);
    broker.set_retention(retention.clone()).unwrap();
    assert_eq!(broker.retention(), Some(retention));
    for name in ["a", "b", "c"] {
        let (ids, gap) = retained(&broker, name).await;
        assert!(ids.len() <= 2 && !ids.is_empty(), "{name}: {ids:?} {gap:?}");
    }
    publish(&broker, &["a"], 8).await;
    assert_eq!(retained(&broker, "a").await.0.len(), 2);
    let error = MemoryBroker::new().set_retention(Retention::messages(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// A payload that others can tell to be held.
struct Held {
    _count: Arc<()>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        b"x"
    }
}

#[tokio::test]
async fn dead_letters_of_a_topic_are_forgotten_with_it() {
    let broker = retaining(Retention::messages(100));
    let group = Subscribe::group(GroupName::new("g").unwrap())
        .with_options(GroupOptions::new().with_dead_letter(topic("dead")));
    let mut reader = broker.subscribe(&"a".parse().unwrap(), group).await.unwrap();
    let held = Arc::new(());
    let message = Message::new(Bytes::from_owner(Held { _count: Arc::clone(&held) }));
    broker.publish(&topic("a"), message).await.unwrap();
    reader.next().await.unwrap().unwrap().reject("no").await.unwrap();
    let group = Group::new(GroupName::new("g").unwrap(), "a".parse().unwrap());
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
    // It is retained where it was published, and among the dead.
    assert_eq!(retained(&broker, "dead").await.0.len(), 1);
    while broker.forget(Some(&topic("a")), u64::MAX) > 0 {}
    assert_eq!(Arc::strong_count(&held), 1);
    assert_eq!(retained(&broker, "dead").await.0.len(), 0);
    // Others' are not.
    publish(&broker, &["dead"], 1).await;
    assert_eq!(broker.forget(Some(&topic("a")), 1), 0);
    assert_eq!(retained(&broker, "dead").await.0.len(), 1);
}
