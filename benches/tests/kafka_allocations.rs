//! What a publish to Kafka allocates on the thread that publishes: this test's allocator counts. librdkafka's
//! own, in C, is not seen; the server is librdkafka's mock cluster, in this process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use broker_core::{Broker, BrokerUrl, Message, Publish, PublisherOptions, Topic};
use broker_kafka::rdkafka::mocking::MockCluster;
use broker_kafka::{KafkaBroker, KafkaConfig};
use bytes::Bytes;

const MESSAGES: usize = 5_000;
const ROUNDS: usize = 20;

/// One allocation a publish, future and receipt included: rdkafka's copy of the topic's name, with the zero
/// that C wants at its end. None is ours.
#[test]
fn a_publish_to_kafka_allocates_once_and_not_for_us() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders", 1, 1).unwrap();
    let url = format!("kafka://{}", cluster.bootstrap_servers());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let broker = KafkaBroker::new(KafkaConfig::from_url(BrokerUrl::parse(&url).unwrap()).unwrap());
    let publisher = broker.publisher(&Topic::new("orders").unwrap(), PublisherOptions::new()).unwrap();
    let payload = Bytes::from_static(&[b'x'; 100]);
    let mut window: Vec<Publish> = Vec::with_capacity(MESSAGES);
    let mut round = || {
        runtime.block_on(async {
            window.extend((0..MESSAGES).map(|_| publisher.publish(Message::new(Bytes::clone(&payload)))));
            for publish in window.drain(..) {
                assert!(publish.await.unwrap().offset.is_some());
            }
        });
    };
    // Until the table of publishes under way has grown to the size it keeps.
    (0..3).for_each(|_| round());
    let counted: u64 = (0..ROUNDS).map(|_| allocation_counter::measure(&mut round).count_total).sum();
    let a_publish = counted as f64 / (ROUNDS * MESSAGES) as f64;
    println!("allocations: {a_publish:.4} a publish");
    assert!(a_publish <= 1.01, "{a_publish} allocations a publish");
}
