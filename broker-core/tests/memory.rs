//! What the in-process broker does that a suite for all brokers cannot see.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use broker_core::*;

/// History that is too old neither comes back nor keeps its topic alive.
#[tokio::test]
async fn what_is_retained_grows_too_old() {
    let retention = Retention::messages(10).with_max_age(Duration::from_millis(50));
    let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(retention));
    let topic = Topic::new("orders").unwrap();
    broker.publish(&topic, Message::new("old")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    broker.publish(&topic, Message::new("new")).await.unwrap();

    let earliest = Subscribe::new().with_options(GroupOptions::new().with_start(StartAt::Earliest));
    let mut late = broker.subscribe(&(&topic).into(), earliest).await.unwrap();
    let delivery = late.next().await.unwrap().expect("open");
    assert_eq!(delivery.message().payload().as_ref(), b"new");
    delivery.ack().await.unwrap();
    assert_eq!(broker.status().await.unwrap().subscriptions.first().unwrap().lag, Some(0));
}

/// A full group that waits lets its publishers go on in the order of their calls, and one that is
/// dropped leaves the queue.
#[tokio::test]
async fn publishes_that_wait_keep_their_order_and_can_be_withdrawn() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders").unwrap();
    let backlog = Backlog::default().with_max_messages(2).unwrap();
    let options = Subscribe::new().with_options(GroupOptions::new().with_backlog(backlog));
    let mut orders = broker.subscribe(&(&topic).into(), options).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();

    let mut publishes: Vec<Publish> =
        (0..5).map(|number| publisher.publish(Message::new(number.to_string()))).collect();
    assert_eq!(publishes.iter().map(Operation::is_ready).collect::<Vec<_>>(), [true, true, false, false, false]);
    drop(publishes.remove(3));
    for expected in ["0", "1", "2", "4"] {
        let delivery = orders.next().await.unwrap().expect("open");
        assert_eq!(delivery.message().payload().as_ref(), expected.as_bytes());
        delivery.ack().await.unwrap();
    }
    for publish in publishes {
        publish.await.unwrap();
    }
}
