//! What takes a while or much memory: `./test long`, in release mode. A process of its own, so that
//! its resident memory says something.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker_core::*;

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Both tests look at the process's memory, so that they must not run at once.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const MILLION: u64 = 1_000_000;

/// A million messages that are due later cost what a million messages cost, and at most 100 bytes
/// each beside; and each comes, once, when it is due.
#[tokio::test]
#[ignore = "long: a million delays"]
async fn a_million_delays_cost_little_beside_their_messages() {
    let _alone = ALONE.lock().await;
    let broker = MemoryBroker::new();
    let topic = Topic::new("delays").unwrap();
    let options = || Subscribe::new().with_max_in_flight(1_000).unwrap();
    let mut subscription = broker.subscribe(&(&topic).into(), options()).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();

    let before = resident();
    let from = Instant::now();
    for number in 0..MILLION {
        let delay = Duration::from_millis(20_000 + number % 10_000);
        publisher.publish(Message::new(vec![0; 100]).with_delay(delay)).await.unwrap();
    }
    let published = resident();
    // Looking for a message moves what is due later into the timer.
    let nothing = tokio::time::timeout(Duration::from_secs(5), subscription.next()).await;
    assert!(nothing.is_err() || from.elapsed() > Duration::from_secs(20), "a message came before its time");
    let timed = resident();
    let beside = timed.saturating_sub(published) / MILLION;
    println!("published {} B a message, in the timer {beside} B more", (published - before) / MILLION);
    assert!(beside <= 100, "{beside} bytes beside a message");

    let mut batch = Vec::new();
    let mut received = 0;
    while received < MILLION {
        received += subscription.receive(&mut batch, 1_000).await.unwrap() as u64;
        for delivery in batch.drain(..) {
            let due = delivery.message().deliver_at().unwrap();
            assert!(Timestamp::now() >= due, "a delay is a floor");
            delivery.ack().await.unwrap();
        }
    }
    assert_eq!(broker.status().await.unwrap().subscriptions[0].lag, Some(0));
}

/// Subscribers that come, stall, fail and go, under publishers that never rest: nothing published to
/// a group is lost, and memory is flat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: a minute of mixed load"]
async fn a_minute_of_coming_stalling_and_going_leaves_memory_flat() {
    let _alone = ALONE.lock().await;
    let broker = Arc::new(MemoryBroker::new());
    let stop = Arc::new(AtomicBool::new(false));
    let backlog = Backlog::default().with_max_messages(2_000).unwrap();
    let retry = RetryPolicy::default().with_backoff(Duration::from_millis(1), Duration::from_millis(5), 2.0).unwrap();
    let settings = GroupOptions::new().with_backlog(backlog).with_retry(retry);
    let steady: Group = "steady@load.>".parse().unwrap();
    broker.create_group(&steady, settings.clone()).await.unwrap();

    let published = Arc::new(AtomicU64::new(0));
    let publishers: Vec<_> = (0..2)
        .map(|number| {
            let (broker, stop, published) = (Arc::clone(&broker), Arc::clone(&stop), Arc::clone(&published));
            tokio::spawn(async move {
                let topic = Topic::new(format!("load.{number}")).unwrap();
                let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let key = vec![fastrand::u8(0..16)];
                    publisher.publish(Message::new(vec![0; 200]).with_key(key)).await.unwrap();
                    published.fetch_add(1, Ordering::Relaxed);
                    tokio::task::consume_budget().await;
                }
            })
        })
        .collect();

    // The steady group acks nine of ten and retries the tenth.
    let acked = Arc::new(AtomicU64::new(0));
    let members: Vec<_> = (0..2)
        .map(|_| {
            let (broker, acked, settings) = (Arc::clone(&broker), Arc::clone(&acked), settings.clone());
            tokio::spawn(async move {
                let subscribe = Subscribe::group("steady".parse().unwrap()).with_options(settings);
                let mut subscription = broker.subscribe(&"load.>".parse().unwrap(), subscribe).await.unwrap();
                let mut batch = Vec::new();
                while subscription.receive(&mut batch, 100).await.unwrap() > 0 {
                    for delivery in batch.drain(..) {
                        if delivery.attempt() < 3 && fastrand::u8(0..10) == 0 {
                            drop(delivery);
                        } else {
                            delivery.ack().await.unwrap();
                            acked.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    tokio::task::consume_budget().await;
                }
            })
        })
        .collect();

    // Others come with a copy of their own, stall, and go with what they hold.
    let guests: Vec<_> = (0..4)
        .map(|_| {
            let (broker, stop) = (Arc::clone(&broker), Arc::clone(&stop));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let backlog =
                        Backlog::default().with_max_messages(500).unwrap().with_overflow(Overflow::DropOldest);
                    let options = GroupOptions::new().with_backlog(backlog).with_ordered(fastrand::bool());
                    let subscribe = Subscribe::new().with_options(options);
                    let mut guest = broker.subscribe(&"load.*".parse().unwrap(), subscribe).await.unwrap();
                    let mut held = Vec::new();
                    for _ in 0..fastrand::usize(0..50) {
                        let _ = tokio::time::timeout(Duration::from_millis(5), guest.receive(&mut held, 64)).await;
                        held.truncate(32);
                    }
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..20))).await;
                }
            })
        })
        .collect();

    tokio::time::sleep(Duration::from_secs(15)).await;
    let early = resident();
    tokio::time::sleep(Duration::from_secs(45)).await;
    stop.store(true, Ordering::Relaxed);
    for task in publishers.into_iter().chain(guests) {
        task.await.unwrap();
    }
    let report = broker.close(Duration::from_secs(60)).await;
    for member in members {
        member.await.unwrap();
    }
    let (published, acked) = (published.load(Ordering::Relaxed), acked.load(Ordering::Relaxed));
    println!(
        "published {published}, acked {acked}, left {report:?}; {} MiB, then {} MiB",
        early >> 20,
        resident() >> 20
    );
    // What was dropped just before the end waits for its retry, which a close does not.
    assert_eq!(acked + report.undelivered + report.in_flight, published);
    assert!(resident() < early + (32 << 20), "memory grew from {early} to {} bytes", resident());
}
