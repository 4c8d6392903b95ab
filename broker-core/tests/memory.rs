//! What the in-process broker does that a suite for all brokers cannot see.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use broker_core::*;
use futures_util::FutureExt;

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

/// A fast reader cuts the log into pieces of many sizes; a slow one finds each message once, in order,
/// and what it settles counts.
#[tokio::test]
async fn pieces_that_a_fast_reader_cuts_are_whole_for_a_slow_one() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders").unwrap();
    let options = Subscribe::new().with_max_in_flight(10_000).unwrap();
    let mut fast = broker.subscribe(&(&topic).into(), options.clone()).await.unwrap();
    let mut slow = broker.subscribe(&(&topic).into(), options).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
    let mut batch = Vec::new();
    let mut published = 0_u32;
    for burst in (1..40).chain([255, 256, 257, 1_000, 1]) {
        for _ in 0..burst {
            publisher.publish(Message::new(published.to_string())).await.unwrap();
            published += 1;
        }
        // One in three bursts stays for the next time.
        if burst % 3 != 0 {
            fast.receive(&mut batch, 10_000).await.unwrap();
        }
    }
    batch.drain(..).for_each(|delivery| drop(delivery.ack()));

    let mut expected = 0..published;
    while !expected.is_empty() {
        assert!(slow.receive(&mut batch, 300).await.unwrap() <= 300);
        // Settled from the back: the broker finds each by its place.
        let texts: Vec<_> = batch.iter().map(|it| it.message().payload().clone()).collect();
        for text in texts {
            assert_eq!(text.as_ref(), expected.next().unwrap().to_string().as_bytes());
        }
        for delivery in batch.drain(..).rev() {
            let retried = delivery.message().payload().ends_with(b"7");
            if retried { delivery.retry_after(Duration::from_secs(60)).await } else { delivery.ack().await }.unwrap();
        }
    }
    let sevens = (0..published).filter(|number| number % 10 == 7).count() as u64;
    let status = broker.status().await.unwrap();
    let lag: u64 = status.subscriptions.iter().filter_map(|it| it.lag).sum();
    assert_eq!(lag, sevens, "what was put back, and nothing else");
}

/// A publisher whose messages have gone to one log all the time finds who came and went since.
#[tokio::test]
async fn a_publisher_finds_who_came_and_went() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders.created").unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new().with_require_route(true)).unwrap();
    let publish = async |matched| {
        for _ in 0..3 {
            assert_eq!(publisher.publish(Message::new("42")).await.unwrap().matched, Some(matched));
        }
    };
    let exact = broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    publish(1).await;
    let pattern = broker.subscribe(&TopicFilter::new("orders.>").unwrap(), Subscribe::new()).await.unwrap();
    publish(2).await;
    drop(exact);
    publish(1).await;
    drop(pattern);
    assert_eq!(publisher.publish(Message::new("42")).await.unwrap_err().kind(), ErrorKind::Unroutable);
    let mut again = broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    publish(1).await;
    for _ in 0..3 {
        again.next().await.unwrap().expect("open").ack().await.unwrap();
    }
}

/// What was confirmed while the broker closed stands in its report.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_beside_publishers_reports_all_they_were_confirmed() {
    let topic = Topic::new("orders").unwrap();
    let group = Group::new(GroupName::new("billing").unwrap(), (&topic).into());
    for round in 0..500 {
        let broker = MemoryBroker::new();
        broker.create_group(&group, GroupOptions::new()).await.unwrap();
        let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
        publisher.publish(Message::new("first")).await.unwrap();
        // More than there are cores: some are stopped between looking and publishing.
        let publishing = [(); 4].map(|()| {
            let publisher = publisher.clone();
            tokio::task::spawn_blocking(move || {
                let mut confirmed = 0;
                while matches!(publisher.publish(Message::new("42")).now_or_never(), Some(Ok(_))) {
                    confirmed += 1;
                }
                confirmed
            })
        });
        tokio::time::sleep(Duration::from_micros(200)).await;
        let report = broker.close(Duration::from_secs(1)).await;
        let mut confirmed = 1;
        for publisher in publishing {
            confirmed += publisher.await.unwrap();
        }
        assert_eq!(report.undelivered, confirmed, "round {round}");
    }
}
