//! A reader that drops its subscription and comes back after what it saw last, as the reader of an
//! HTTP stream does, misses nothing that is retained: the past is in the order in which it was live.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashSet;
use std::time::Duration;

use broker_core::*;
use tokio::time::{sleep, timeout};

const TOPICS: u64 = 4;
const PUBLISHERS: u64 = 3;
const MESSAGES: u64 = 300;

fn retaining() -> MemoryBroker {
    MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(100_000)))
}

fn from(start: StartAt) -> Subscribe {
    Subscribe::new().with_options(GroupOptions::new().with_start(start)).with_max_in_flight(100_000).expect("a bound")
}

#[tokio::test]
async fn what_the_past_of_a_pattern_lacks_is_told_where_it_lacks() {
    let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(2)));
    for (topic, id) in [("a.x", "1"), ("a.y", "2"), ("a.x", "3"), ("a.y", "4"), ("a.y", "5"), ("a.x", "6")] {
        let message = Message::new("").with_id(id.parse().unwrap());
        broker.publish(&topic.parse().unwrap(), message).await.unwrap();
    }
    // 1 and 2 are gone: before 3 nothing is left either.
    let mut whole = broker.subscribe(&"a.>".parse().unwrap(), from(StartAt::Earliest)).await.unwrap();
    let mut read = Vec::new();
    assert_eq!(whole.receive(&mut read, 100).await.unwrap(), 4);
    assert_eq!(whole.gap(), None);

    broker.publish(&"a.y".parse().unwrap(), Message::new("7")).await.unwrap();
    broker.publish(&"a.y".parse().unwrap(), Message::new("8")).await.unwrap();
    // 4 and 5 are gone, and 3 is left.
    let mut holed = broker.subscribe(&"a.>".parse().unwrap(), from(StartAt::Earliest)).await.unwrap();
    let mut read = Vec::new();
    assert_eq!(holed.receive(&mut read, 100).await.unwrap(), 1);
    assert_eq!((read.first().unwrap().message().id().to_string().as_str(), holed.gap()), ("3", Some(Gap::Unknown)));
    assert_eq!(holed.receive(&mut read, 100).await.unwrap(), 3);
    assert_eq!(holed.gap(), None);
    // A reader of one topic that it has whole hears of none.
    let mut one = broker.subscribe(&"a.x".parse().unwrap(), from(StartAt::Earliest)).await.unwrap();
    assert_eq!(one.receive(&mut read, 100).await.unwrap(), 2);
    assert_eq!(one.gap(), None);
}

/// Reads `filter` in many lives until everything `expected` was seen; returns what was not.
async fn read_in_many_lives(
    broker: &MemoryBroker,
    filter: &TopicFilter,
    mut reader: Subscription,
    mut expected: HashSet<MessageId>,
    mut random: fastrand::Rng,
) -> HashSet<MessageId> {
    while !expected.is_empty() {
        let Ok(delivery) = timeout(Duration::from_secs(2), reader.next()).await else { break };
        let delivery = delivery.unwrap().expect("open");
        let last = delivery.message().id().clone();
        expected.remove(&last);
        delivery.ack().await.unwrap();
        match random.u8(..100) {
            // Away for a while, or not at all.
            chance @ 0..8 => {
                drop(reader);
                if chance < 4 {
                    sleep(Duration::from_millis(random.u64(..8))).await;
                }
                reader = broker.subscribe(filter, from(StartAt::Earliest)).await.unwrap();
                loop {
                    let seen = reader.next().await.unwrap().expect("open");
                    let found = *seen.message().id() == last;
                    seen.ack().await.unwrap();
                    if found {
                        break;
                    }
                }
            }
            // Behind, so that what is delayed becomes due while older messages wait to be read.
            8..12 => sleep(Duration::from_millis(random.u64(..8))).await,
            _ => {}
        }
    }
    expected
}

/// Publishes from several tasks to several topics; `delayed` says which of 100 messages are.
async fn nothing_is_missed(seed: u64, delayed: u8) {
    let broker = retaining();
    let filter = TopicFilter::new("orders.>").unwrap();
    let reader = broker.subscribe(&filter, from(StartAt::New)).await.unwrap();
    let mut expected = HashSet::new();
    let mut publishers = Vec::new();
    for publisher in 0..PUBLISHERS {
        let ids: Vec<_> = (0..MESSAGES).map(|number| format!("{publisher}-{number}")).collect();
        expected.extend(ids.iter().map(|id| id.parse().unwrap()));
        let (broker, mut random) = (broker.clone(), fastrand::Rng::with_seed(seed * 10 + publisher));
        publishers.push(tokio::spawn(async move {
            for id in ids {
                let topic = Topic::new(format!("orders.{}", random.u64(..TOPICS))).unwrap();
                let mut message = Message::new("x").with_id(id.parse().unwrap());
                if random.u8(..100) < delayed {
                    message = message.with_delay(Duration::from_millis(random.u64(1..12)));
                }
                broker.publish(&topic, message).await.unwrap();
                if random.u8(..100) < 20 {
                    sleep(Duration::from_millis(random.u64(..3))).await;
                }
            }
        }));
    }
    let random = fastrand::Rng::with_seed(seed);
    let missed = read_in_many_lives(&broker, &filter, reader, expected, random).await;
    for publisher in publishers {
        publisher.await.unwrap();
    }
    assert!(missed.is_empty(), "seed {seed}: {} missed: {missed:?}", missed.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_of_several_topics_is_missed() {
    for seed in 0..5 {
        nothing_is_missed(seed, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_that_is_delayed_is_missed() {
    for seed in 100..105 {
        nothing_is_missed(seed, 30).await;
    }
}

/// The next message's payload.
async fn next(reader: &mut Subscription) -> String {
    let delivery = timeout(Duration::from_secs(10), reader.next()).await.expect("a message").unwrap().expect("open");
    let text = String::from_utf8(delivery.message().payload().to_vec()).unwrap();
    delivery.ack().await.unwrap();
    text
}

/// A message has its place in the past from when it is visible, for every start.
#[tokio::test]
async fn what_was_delayed_stands_where_it_became_visible() {
    let broker = retaining();
    let (topic, other) = (Topic::new("orders.a").unwrap(), Topic::new("orders.b").unwrap());
    let filter = TopicFilter::new("orders.*").unwrap();
    let mut live = broker.subscribe(&filter, from(StartAt::New)).await.unwrap();
    broker.publish(&topic, Message::new("late").with_delay(Duration::from_millis(150))).await.unwrap();
    broker.publish(&other, Message::new("before")).await.unwrap();
    sleep(Duration::from_millis(50)).await;
    let since = Timestamp::now();
    broker.publish(&topic, Message::new("between")).await.unwrap();

    // Not due yet, for who reads the past either.
    let mut early = broker.subscribe(&filter, from(StartAt::Earliest)).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    broker.publish(&other, Message::new("after")).await.unwrap();

    let all = ["before", "between", "late", "after"];
    for expected in all {
        assert_eq!(next(&mut live).await, expected);
        assert_eq!(next(&mut early).await, expected);
    }
    let mut earliest = broker.subscribe(&filter, from(StartAt::Earliest)).await.unwrap();
    for expected in all {
        assert_eq!(next(&mut earliest).await, expected);
    }
    // It was published before this time, and is visible since after it.
    let mut later = broker.subscribe(&filter, from(StartAt::Time(since))).await.unwrap();
    for expected in all.iter().skip(1) {
        assert_eq!(next(&mut later).await, *expected);
    }
}

/// One that fell due behind its key goes as soon as the key is free, to a member that waits already.
#[tokio::test]
async fn what_fell_due_behind_its_key_wakes_who_waits() {
    let broker = retaining();
    let topic = Topic::new("orders").unwrap();
    let ordered = Subscribe::new().with_options(GroupOptions::new().with_ordered(true));
    let mut reader = broker.subscribe(&(&topic).into(), ordered).await.unwrap();
    broker.publish(&topic, Message::new("first").with_key("k")).await.unwrap();
    let late = Message::new("late").with_key("k").with_delay(Duration::from_millis(20));
    broker.publish(&topic, late).await.unwrap();
    let first = reader.next().await.unwrap().expect("open");
    // No time limit in the task itself: looking again at its end would find what nobody told of.
    let waiting = tokio::spawn(async move { reader.next().await.unwrap().expect("open").message().payload().clone() });
    sleep(Duration::from_millis(60)).await;
    first.ack().await.unwrap();
    let late = timeout(Duration::from_secs(5), waiting).await.expect("it is woken").unwrap();
    assert_eq!(late.as_ref(), b"late");
}
