//! What has expired is gone, wherever it waits: it fills no backlog, keeps no publisher out and holds no
//! memory, whether or not anybody reads.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::time::Duration;

use broker_core::*;
use proptest::prelude::*;
use tokio::time::{sleep, timeout};

/// Longer than a busy machine stands still between two steps.
const TTL: Duration = Duration::from_millis(400);

fn topic() -> Topic {
    Topic::new("readings").expect("a topic")
}

fn lasting() -> Message {
    Message::new("lasting")
}

fn passing() -> Message {
    Message::new("passing").with_ttl(TTL)
}

/// A group without members, bounded to three messages, that has a lasting message at its head and two
/// behind it that expire.
async fn full(overflow: Overflow, last: impl Fn() -> Message) -> (MemoryBroker, Group) {
    let broker = MemoryBroker::new();
    let backlog = Backlog::default().with_max_messages(3).unwrap().with_overflow(overflow);
    let group: Group = "late@readings".parse().unwrap();
    broker.create_group(&group, GroupOptions::new().with_backlog(backlog)).await.unwrap();
    broker.publish(&topic(), lasting()).await.unwrap();
    for _ in 0..2 {
        broker.publish(&topic(), last()).await.unwrap();
    }
    (broker, group)
}

async fn status(broker: &MemoryBroker) -> (u64, u64, u64) {
    let status = broker.status().await.unwrap().groups.remove(0);
    (status.lag.unwrap(), status.counts.expired, status.counts.dropped)
}

#[tokio::test]
async fn a_publish_is_taken_once_something_behind_the_head_has_expired() {
    let (broker, _) = full(Overflow::Reject, passing).await;
    assert_eq!(broker.publish(&topic(), lasting()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    sleep(2 * TTL).await;
    broker.publish(&topic(), lasting()).await.unwrap();
    assert_eq!(status(&broker).await, (2, 2, 0));
}

#[tokio::test]
async fn a_publish_that_waits_sees_itself_what_expires() {
    let (broker, _) = full(Overflow::Wait, passing).await;
    let publish = broker.publish(&topic(), lasting());
    timeout(Duration::from_secs(10), publish).await.expect("room, though nobody reads").unwrap();
    assert_eq!(status(&broker).await, (2, 2, 0));
}

#[tokio::test]
async fn what_has_expired_is_not_counted_as_dropped() {
    let (broker, _) = full(Overflow::DropOldest, passing).await;
    sleep(2 * TTL).await;
    for _ in 0..2 {
        broker.publish(&topic(), lasting()).await.unwrap();
    }
    assert_eq!(status(&broker).await, (3, 2, 0));
    broker.publish(&topic(), lasting()).await.unwrap();
    assert_eq!(status(&broker).await, (3, 2, 1));
}

#[tokio::test]
async fn status_counts_no_message_that_has_expired() {
    let (broker, _) = full(Overflow::Reject, passing).await;
    sleep(2 * TTL).await;
    assert_eq!(status(&broker).await, (1, 2, 0));
}

/// Outside the log: what a member gave back, to come again when it will have expired.
#[tokio::test]
async fn what_is_to_be_retried_expires_in_the_timer() {
    let (broker, group) = full(Overflow::Reject, passing).await;
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    member.next().await.unwrap().unwrap().retry_after(Duration::from_secs(3_600)).await.unwrap();
    for _ in 0..2 {
        let passing = member.next().await.unwrap().unwrap();
        passing.retry_after(Duration::from_secs(3_600)).await.unwrap();
    }
    drop(member);
    assert_eq!(broker.publish(&topic(), lasting()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    sleep(2 * TTL).await;
    broker.publish(&topic(), lasting()).await.unwrap();
    broker.publish(&topic(), lasting()).await.unwrap();
    assert_eq!(status(&broker).await, (3, 2, 0));
}

/// A message of an ordered key that will never be delivered holds back nobody.
#[tokio::test]
async fn what_expires_lets_the_next_of_its_key_go() {
    let broker = MemoryBroker::new();
    let ordered = Subscribe::new().with_options(GroupOptions::new().with_ordered(true));
    let mut member = broker.subscribe(&(&topic()).into(), ordered).await.unwrap();
    let never = Message::new("never").with_delay(Duration::from_secs(3_600)).with_ttl(TTL);
    broker.publish(&topic(), never.with_key("k")).await.unwrap();
    broker.publish(&topic(), lasting().with_key("k")).await.unwrap();
    let next = timeout(Duration::from_secs(10), member.next()).await.expect("not behind an hour").unwrap().unwrap();
    assert_eq!(next.message().payload().as_ref(), b"lasting");
    next.ack().await.unwrap();
    // Of those that wait behind another, too: the one in hand stays.
    broker.publish(&topic(), lasting().with_key("k")).await.unwrap();
    broker.publish(&topic(), passing().with_key("k")).await.unwrap();
    let held = member.next().await.unwrap().unwrap();
    assert!(timeout(Duration::from_millis(1), member.next()).await.is_err());
    sleep(2 * TTL).await;
    let status = broker.status().await.unwrap().subscriptions.remove(0);
    assert_eq!((status.lag, status.in_flight, status.counts.expired), (Some(1), Some(1), 2));
    held.ack().await.unwrap();
}

/// One step of the test below.
#[derive(Clone, Debug)]
enum Step {
    Publish {
        messages: usize,
        ttl: Option<u64>,
    },
    Receive {
        group: usize,
        messages: usize,
    },
    /// Long enough for what has a time to live to expire; `look` has the broker take it out.
    Sleep {
        look: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1_usize..200, prop_oneof![Just(None), Just(Some(1)), Just(Some(4))])
            .prop_map(|(messages, ttl)| Step::Publish { messages, ttl }),
        3 => (0_usize..3, 1_usize..150).prop_map(|(group, messages)| Step::Receive { group, messages }),
        1 => any::<bool>().prop_map(|look| Step::Sleep { look }),
    ];
    proptest::collection::vec(step, 1..40)
}

/// Groups on two filters at different places of one log, with messages that expire anywhere between
/// them: each receives in order what lasts, and accounts for every other.
async fn run(steps: Vec<Step>) {
    let broker = MemoryBroker::new();
    let filters = ["readings", "readings", "*"];
    let mut groups = Vec::new();
    for (number, filter) in filters.iter().enumerate() {
        let name = format!("group-{number}").parse().unwrap();
        let subscription = broker.subscribe(&filter.parse().unwrap(), Subscribe::group(name)).await.unwrap();
        groups.push((subscription, VecDeque::<(usize, bool)>::new(), 0_u64));
    }
    let mut number = 0;
    for step in steps {
        match step {
            Step::Publish { messages, ttl } => {
                for _ in 0..messages {
                    let message = Message::new(number.to_string());
                    let message = match ttl {
                        Some(ttl) => message.with_ttl(Duration::from_millis(ttl)),
                        None => message,
                    };
                    broker.publish(&topic(), message).await.unwrap();
                    groups.iter_mut().for_each(|(_, expected, _)| expected.push_back((number, ttl.is_some())));
                    number += 1;
                }
            }
            Step::Receive { group, messages } => receive(&mut groups[group], messages).await,
            Step::Sleep { look } => {
                sleep(Duration::from_millis(6)).await;
                if look {
                    let lags: Vec<u64> = broker.status().await.unwrap().groups.iter().map(|g| g.lag.unwrap()).collect();
                    let last: Vec<u64> = groups
                        .iter()
                        .map(|(_, expected, _)| expected.iter().filter(|(_, passing)| !passing).count() as u64)
                        .collect();
                    assert_eq!(lags, last, "only what lasts is left");
                }
            }
        }
    }
    for group in &mut groups {
        receive(group, usize::MAX).await;
        assert!(group.1.iter().all(|(_, passing)| *passing), "lost: {:?}", group.1);
    }
    for (status, (_, _, acked)) in broker.status().await.unwrap().groups.iter().zip(&groups) {
        assert_eq!((status.lag, status.counts.expired + acked), (Some(0), number as u64));
    }
}

async fn receive((subscription, expected, acked): &mut (Subscription, VecDeque<(usize, bool)>, u64), messages: usize) {
    let mut batch = Vec::new();
    let mut left = messages;
    while left > 0 {
        match timeout(Duration::from_millis(1), subscription.receive(&mut batch, left)).await {
            Ok(received) => left -= received.unwrap(),
            Err(_) => return,
        }
        for delivery in batch.drain(..) {
            let payload = std::str::from_utf8(delivery.message().payload()).unwrap();
            let number: usize = payload.parse().unwrap();
            while let Some((next, passing)) = expected.pop_front().filter(|(next, _)| *next != number) {
                assert!(passing, "{next} lasts, and {number} came");
            }
            delivery.ack().await.unwrap();
            *acked += 1;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_lasts_is_lost_and_all_that_expires_is_counted(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}

/// Whoever redrives a dead letter wants it delivered, however long it was kept; as on a broker that keeps what
/// `DeadLetter::into_message` makes.
#[tokio::test]
async fn a_dead_letter_that_was_kept_beyond_its_ttl_is_given_again() {
    let broker = MemoryBroker::new();
    let mut member =
        broker.subscribe(&"readings".parse().unwrap(), Subscribe::group("g".parse().unwrap())).await.unwrap();
    let message = passing().with_dedup_key("once").unwrap().with_header("a", "b").unwrap();
    broker.publish(&topic(), message.clone()).await.unwrap();
    member.next().await.unwrap().unwrap().reject("not now").await.unwrap();
    sleep(2 * TTL).await;
    let group: Group = "g@readings".parse().unwrap();
    assert_eq!(broker.dead_letters(&group, 10).await.unwrap()[0].message.expires_at(), None);
    assert_eq!(broker.redrive(&group, 10).await.unwrap(), 1);
    let again = timeout(Duration::from_secs(10), member.next()).await.expect("what was redriven").unwrap().unwrap();
    assert_eq!((again.message().id(), again.attempt()), (message.id(), 1));
    assert_eq!(again.message().headers(), message.headers());
    again.ack().await.unwrap();
    assert_eq!(status(&broker).await, (0, 0, 0));
}
