//! Memory of the in-process broker's hot path, counted: this test's allocator counts every
//! allocation of the thread that measures, and the broker runs on that thread alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    Backlog, Broker, BrokerExt, Connectors, Delivery, Failure, GroupOptions, Message, Publisher, PublisherOptions,
    Settlement, Subscribe, Subscription, Topic, TopicFilter,
};
use bytes::Bytes;
use tokio::time::timeout;

const BATCH: usize = 256;
/// Messages a round, as many as the backlog holds.
const BURST: usize = 1024;
const SUBSCRIBERS: usize = 10;
const ROUNDS: usize = 80;

/// After warm-up a publish makes one allocation at most (the entry that all subscribers share), and
/// a delivery fewer than one in a hundred, its ack included.
#[test]
fn a_publish_allocates_once_and_a_delivery_hardly_ever() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut scene = runtime.block_on(Scene::new());
    // Until buffers have grown to the size they keep.
    for _ in 0..ROUNDS {
        runtime.block_on(scene.publish());
        runtime.block_on(scene.receive());
    }

    let (mut publishing, mut delivering) = (0, 0);
    for _ in 0..ROUNDS {
        publishing += allocation_counter::measure(|| runtime.block_on(scene.publish())).count_total;
        delivering += allocation_counter::measure(|| runtime.block_on(scene.receive())).count_total;
    }
    let a_publish = publishing as f64 / (ROUNDS * BURST) as f64;
    let a_delivery = delivering as f64 / (ROUNDS * BURST * SUBSCRIBERS) as f64;
    println!("allocations: {a_publish:.4} a publish, {a_delivery:.5} a delivery");
    // What is not of the publish itself, such as a buffer that grows once more, is spread over many.
    assert!(a_publish <= 1.01, "{a_publish} allocations a publish");
    assert!(a_delivery < 0.01, "{a_delivery} allocations a delivery");
}

/// An idle subscription holds 4 KiB at most (its topic included), an idle topic 1 KiB.
#[test]
fn what_is_idle_holds_little_memory() {
    const COUNT: i64 = 5_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let broker = Connectors::new().open("memory:").unwrap();
    let mut kept = Vec::with_capacity(COUNT as usize);
    let mut publishers = Vec::with_capacity(COUNT as usize);

    let subscriptions = allocation_counter::measure(|| {
        runtime.block_on(async {
            for number in 0..COUNT {
                let filter = TopicFilter::new(format!("idle.subscription.{number}")).unwrap();
                kept.push(broker.subscribe(&filter, Subscribe::new()).await.unwrap());
            }
        });
    });
    let topics = allocation_counter::measure(|| {
        runtime.block_on(async {
            for number in 0..COUNT {
                let topic = Topic::new(format!("idle.topic.{number}")).unwrap();
                let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
                publisher.publish(Message::new("")).await.unwrap();
                publishers.push(publisher);
            }
        });
    });
    let (subscription, topic) = (subscriptions.bytes_current / COUNT, topics.bytes_current / COUNT);
    println!("bytes held: {subscription} an idle subscription, {topic} an idle topic");
    assert!(subscription > 0 && topic > 0, "nothing was counted: another thread did the work");
    assert!(subscription <= 4096, "an idle subscription holds {subscription} bytes");
    assert!(topic <= 1024, "an idle topic holds {topic} bytes");
}

/// A message that waits for its delivery time or for its retry costs 100 bytes at most beside what a
/// message costs that stands in a vector.
#[test]
fn what_waits_for_its_time_costs_little_beside_its_message() {
    const COUNT: usize = 50_000;
    const HOUR: Duration = Duration::from_secs(3_600);
    // Not all at one time, so that the timer spreads them.
    let wait = |number: usize| HOUR + Duration::from_millis(number as u64 * 7);
    let plain = |_| Message::new(vec![0; 100]);
    let delayed = move |number| plain(number).with_delay(wait(number));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let beside = |retain: bool, make: &dyn Fn(usize) -> Message, settlement: Option<Settlement>| {
        let (mut vector, mut waiting) = (None, None);
        let alone = allocation_counter::measure(|| vector = Some((0..COUNT).map(make).collect::<Vec<_>>()));
        let url = if retain { format!("memory:?retain={COUNT}&retain_bytes=1000000000") } else { "memory:".to_owned() };
        let within = allocation_counter::measure(|| {
            waiting = Some(runtime.block_on(wait_in(&url, COUNT, make, settlement)));
        });
        assert!(alone.bytes_current > 0 && within.bytes_current > 0, "nothing was counted");
        (within.bytes_current - alone.bytes_current) as f64 / COUNT as f64
    };
    let failure = |text| Some(Failure::new(text));
    let retry = |failure| Some(Settlement::Retry { after: Some(HOUR), failure });
    let cases = [
        ("delayed", beside(false, &delayed, None), 100.0),
        ("retried", beside(false, &plain, retry(None)), 100.0),
        ("retried for one reason", beside(false, &plain, retry(failure("the database is down"))), 100.0),
        // It stands in the topic's history besides.
        ("delayed and retained", beside(true, &delayed, None), 160.0),
    ];
    for (name, bytes, bound) in cases {
        println!("{name}: {bytes:.1} bytes beside its message");
        assert!(bytes <= bound, "{name}: {bytes} bytes beside its message");
    }
}

/// A key that is remembered for deduplication costs what its documentation says.
#[test]
fn a_deduplication_key_costs_a_few_hundred_bytes() {
    const COUNT: usize = 50_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let broker = Connectors::new().open("memory:").unwrap();
    let topic = Topic::new("bench.keys").unwrap();
    let remembered = allocation_counter::measure(|| {
        runtime.block_on(async {
            for number in 0..COUNT {
                let message = Message::new("").with_dedup_key(format!("{number:036}")).unwrap();
                broker.publish(&topic, message).await.unwrap();
            }
        });
    });
    let key = remembered.bytes_current as f64 / COUNT as f64;
    println!("{key:.0} bytes a key of 36");
    assert!(key > 36.0, "nothing was counted: another thread did the work");
    assert!(key <= 300.0, "{key} bytes a key of 36");
}

/// Publishes so many messages that are to wait, after the first delivery if it is settled so, and looks
/// for one that does not.
async fn wait_in(
    url: &str,
    count: usize,
    make: &dyn Fn(usize) -> Message,
    settlement: Option<Settlement>,
) -> (Arc<dyn Broker>, Subscription) {
    let broker = Connectors::new().open(url).unwrap();
    let topic = Topic::new("bench.waits").unwrap();
    let subscribe = Subscribe::new().with_max_in_flight(count).unwrap();
    let mut subscription = broker.subscribe(&TopicFilter::from(&topic), subscribe).await.unwrap();
    for number in 0..count {
        broker.publish(&topic, make(number)).await.unwrap();
    }
    let mut batch = Vec::new();
    while let Ok(received) = timeout(Duration::from_millis(10), subscription.receive(&mut batch, BATCH)).await {
        assert!(received.unwrap() > 0 && settlement.is_some(), "a message came before its time");
        for delivery in batch.drain(..) {
            delivery.settle(settlement.clone().unwrap()).await.unwrap();
        }
    }
    let status = broker.status().await.unwrap().subscriptions.remove(0);
    assert_eq!((status.lag, status.in_flight), (Some(count as u64), Some(0)));
    (broker, subscription)
}

struct Scene {
    /// Dropping the last handle of a broker closes it.
    _broker: Arc<dyn Broker>,
    publisher: Publisher,
    subscriptions: Vec<Subscription>,
    batch: Vec<Delivery>,
    payload: Bytes,
}

impl Scene {
    async fn new() -> Self {
        let broker = Connectors::new().open("memory:").unwrap();
        let topic = Topic::new("bench.load").unwrap();
        let mut subscriptions = Vec::new();
        for _ in 0..SUBSCRIBERS {
            let backlog = Backlog::default().with_max_messages(BURST as u64).unwrap();
            let options = Subscribe::new().with_options(GroupOptions::new().with_backlog(backlog));
            subscriptions.push(broker.subscribe(&TopicFilter::from(&topic), options).await.unwrap());
        }
        let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
        Self {
            _broker: broker,
            publisher,
            subscriptions,
            batch: Vec::with_capacity(BATCH),
            payload: Bytes::from_static(&[b'x'; 64]),
        }
    }

    async fn publish(&self) {
        for _ in 0..BURST {
            let receipt = self.publisher.publish(Message::new(Bytes::clone(&self.payload))).await.unwrap();
            assert_eq!(receipt.matched, Some(SUBSCRIBERS as u64));
        }
    }

    async fn receive(&mut self) {
        for subscription in &mut self.subscriptions {
            let mut received = 0;
            while received < BURST {
                received += subscription.receive(&mut self.batch, BATCH).await.unwrap();
                for delivery in self.batch.drain(..) {
                    delivery.ack().await.unwrap();
                }
            }
            assert_eq!(received, BURST);
        }
    }
}
