//! A hundred thousand messages through restarts and cut connections of a real RabbitMQ: none of those
//! confirmed is lost, and no more come twice than were in flight.

mod amqp_server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use amqp_server::{address, at, open_as_it_is, ours, script, server};
use broker_core::{Broker, Group, Message, PublisherOptions, Subscribe, Topic};
use broker_tests::Proxy;
use parking_lot::Mutex;

/// What happened to each message, in whatever order it was told.
#[derive(Debug, Default)]
struct History {
    confirmed: BTreeMap<u64, u64>,
    failed: BTreeMap<u64, u64>,
    received: BTreeMap<u64, u64>,
}

/// What is wrong with a history.
#[derive(Debug, PartialEq, Eq)]
enum Broken {
    /// Confirmed, and never received.
    Lost(u64),
    /// Received, and never published.
    Invented(u64),
    /// So many came more than once, where fewer can have been in flight.
    Duplicates(u64),
}

impl History {
    /// Checks it: `in_flight` is how many may come twice, all faults together.
    fn check(&self, in_flight: u64) -> Result<(), Broken> {
        if let Some(lost) = self.confirmed.keys().find(|number| !self.received.contains_key(number)) {
            return Err(Broken::Lost(*lost));
        }
        let published = |number: &&u64| self.confirmed.contains_key(number) || self.failed.contains_key(number);
        if let Some(invented) = self.received.keys().find(|number| !published(number)) {
            return Err(Broken::Invented(*invented));
        }
        // A publish that failed may have been taken all the same, as often as it was tried.
        let expected = |number: &u64| {
            let tries = self.confirmed.get(number).unwrap_or(&0) + self.failed.get(number).unwrap_or(&0);
            tries.max(1)
        };
        let twice = self.received.iter().map(|(number, times)| times.saturating_sub(expected(number))).sum();
        if twice > in_flight { Err(Broken::Duplicates(twice)) } else { Ok(()) }
    }
}

fn history(confirmed: &[u64], failed: &[u64], received: &[u64]) -> History {
    let count = |numbers: &[u64]| {
        let mut counts = BTreeMap::new();
        numbers.iter().for_each(|number| *counts.entry(*number).or_insert(0) += 1);
        counts
    };
    History { confirmed: count(confirmed), failed: count(failed), received: count(received) }
}

#[test]
fn the_checker_catches_broken_histories() {
    assert_eq!(history(&[1, 2, 3], &[], &[3, 1, 2]).check(0), Ok(()));
    assert_eq!(history(&[1, 2, 3], &[], &[3, 1]).check(9), Err(Broken::Lost(2)));
    assert_eq!(history(&[1], &[], &[1, 7]).check(9), Err(Broken::Invented(7)));
    assert_eq!(history(&[1, 2], &[], &[1, 2, 2, 2]).check(1), Err(Broken::Duplicates(2)));
    assert_eq!(history(&[1, 2], &[], &[1, 2, 2]).check(1), Ok(()));
    assert_eq!(history(&[1], &[2], &[1]).check(0), Ok(()), "a publish that failed may not have been taken");
    assert_eq!(history(&[1], &[1], &[1, 1]).check(0), Ok(()), "or may have been, and was published again");
}

const MESSAGES: u64 = 100_000;
const WINDOW: usize = 256;
const PREFETCH: usize = 256;
const CUTS: u64 = 10;
const RESTARTS: u64 = 2;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a hundred thousand messages, two restarts of the server, ten cut connections"]
async fn nothing_confirmed_is_lost() {
    let proxy = Proxy::start(address()).await.unwrap();
    let through = at(&proxy.address().to_string(), None);
    let broker = open_as_it_is(&format!("{through}?publish_timeout=60s&max_reconnect_wait=500ms")).unwrap();
    let topic: Topic = format!("suite.soak-{}", fastrand::u32(..)).parse().unwrap();
    let group = Group::new("soak".parse().unwrap(), (&topic).into());
    let options = Subscribe::group(group.name.clone()).with_max_in_flight(PREFETCH).unwrap();
    let mut member = broker.subscribe(&group.filter, options).await.unwrap();

    let history = Arc::new(Mutex::new(History::default()));
    let over = Arc::new(AtomicBool::new(false));
    let receiving = {
        let (history, over) = (Arc::clone(&history), Arc::clone(&over));
        tokio::spawn(async move {
            let mut batch = Vec::new();
            loop {
                let quiet = Duration::from_secs(if over.load(Ordering::SeqCst) { 5 } else { 3600 });
                match tokio::time::timeout(quiet.min(Duration::from_secs(5)), member.receive(&mut batch, 256)).await {
                    Ok(received) => assert!(received.unwrap() > 0, "the subscription ended"),
                    Err(_) if over.load(Ordering::SeqCst) => return,
                    Err(_) => continue,
                }
                for delivery in batch.drain(..) {
                    let number = u64::from_be_bytes(delivery.message().payload().as_ref().try_into().unwrap());
                    *history.lock().received.entry(number).or_insert(0) += 1;
                    // One that a lost connection swallows comes again.
                    let _ = delivery.ack().await;
                }
            }
        })
    };
    let published = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let publishing = {
        let (history, published) = (Arc::clone(&history), Arc::clone(&published));
        let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
        tokio::spawn(async move {
            let mut window = std::collections::VecDeque::new();
            let mut again = Vec::new();
            let mut next = 0;
            while next < MESSAGES || !window.is_empty() || !again.is_empty() {
                while window.len() < WINDOW {
                    let number = again.pop().or_else(|| (next < MESSAGES).then(|| (next, next += 1).0));
                    let Some(number) = number else { break };
                    window.push_back((number, publisher.publish(Message::new(number.to_be_bytes().to_vec()))));
                }
                let Some((number, publish)) = window.pop_front() else { continue };
                match publish.await {
                    Ok(_) => {
                        *history.lock().confirmed.entry(number).or_insert(0) += 1;
                        published.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(error) => {
                        assert!(error.is_retryable(), "{error}");
                        *history.lock().failed.entry(number).or_insert(0) += 1;
                        again.push(number);
                    }
                }
            }
        })
    };
    // Faults, spread over the run by how far it is.
    let faults = CUTS + RESTARTS;
    for fault in 1..=faults {
        while published.load(Ordering::SeqCst) < MESSAGES * fault / (faults + 1) && !publishing.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if fault % 5 == 0 && ours() {
            tokio::task::spawn_blocking(|| script(&["restart", server()])).await.unwrap().unwrap();
        } else {
            proxy.cut();
        }
    }
    publishing.await.unwrap();
    over.store(true, Ordering::SeqCst);
    receiving.await.unwrap();
    let history = std::mem::take(&mut *history.lock());
    let twice: u64 = history.received.values().map(|times| times - 1).sum();
    println!("{} confirmed, {} received more than once", history.confirmed.len(), twice);
    assert_eq!(history.confirmed.len() as u64, MESSAGES);
    // Each fault may repeat what was unconfirmed and what was unacked.
    history.check(faults * (WINDOW + PREFETCH) as u64).unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(Duration::from_secs(10)).await;
}
