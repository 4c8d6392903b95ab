//! Messages that nobody writes by accident, on a real RabbitMQ, which passes on whatever its grammar of frames
//! allows: they end no process and no connection, and wedge no member of a group.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

mod amqp_server;

use std::time::Duration;

use amqp_server::slow::Slow;
use amqp_server::stranger::{Stranger, nested, string, table};
use amqp_server::{TURN, address, at, open, server};
use broker_core::{Broker, BrokerExt, ErrorKind, Group, GroupOptions, Message, Subscribe, Subscription, Topic};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

/// Publishes to the exchange `broker`, then a good message after it: the group's member gets to the good one.
/// Tells the first message, or its dead letter, and whether it was dead.
async fn survives(name: &str, key: &[u8], content_type: &'static [u8], headers: Vec<u8>) -> (Message, bool) {
    let root = format!("suite.{name}-{:08x}", fastrand::u32(..));
    let key = [root.as_bytes(), key].concat();
    let good = Topic::new(format!("{root}.good")).unwrap();
    let group: Group = format!("{name}@{root}.>").parse().unwrap();
    let broker = open(server()).unwrap();
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    let publish = move || {
        let mut stranger = Stranger::connect(address())?;
        stranger.publish("broker", &key, content_type, &headers, b"strange")?;
        stranger.close()
    };
    tokio::task::spawn_blocking(publish).await.unwrap().unwrap();
    broker.publish(&good, Message::new("good")).await.unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    let mut strange = None;
    loop {
        let message = receive(&mut member).await;
        if message.payload() == "good" {
            break;
        }
        assert!(strange.replace(message).is_none(), "delivered twice");
    }
    let told = match strange {
        Some(message) => (message, false),
        None => (dead(broker.as_ref(), &group).await, true),
    };
    assert!(broker.delete_group(&group).await.unwrap());
    if told.1 {
        // With the group gone, what keeps them goes too.
        broker.purge_dead_letters(&group).await.unwrap();
    }
    broker.close(PATIENCE).await;
    told
}

async fn receive(member: &mut Subscription) -> Message {
    let delivery = timeout(PATIENCE, member.next()).await.expect("the member is wedged").unwrap().unwrap();
    let message = delivery.message().clone();
    delivery.ack().await.unwrap();
    message
}

/// The first dead letter, as soon as it is there.
async fn dead(broker: &dyn Broker, group: &Group) -> Message {
    let found = async {
        loop {
            match broker.dead_letters(group, 1).await {
                Ok(mut letters) => {
                    if let Some(letter) = letters.pop() {
                        assert!(letter.failure.reason().contains("undecodable"), "{letter:?}");
                        return letter.message;
                    }
                }
                // The server has declared the queue, and does not find its process yet (`noproc`).
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, found).await.expect("neither delivered nor dead")
}

/// Read by recursion, as lapin does, its tables overflow any stack.
#[tokio::test(flavor = "multi_thread")]
async fn tables_nested_without_end_end_no_process() {
    let _turn = TURN.lock().await;
    let headers = table(&[(b"deep", nested(20_000)), (b"flat", string(b"read"))]);
    let (message, dead) = survives("deep", b".x", b"text/plain", headers).await;
    assert!(!dead);
    assert_eq!((message.headers().get_str("flat"), message.content_type()), (Some("read"), Some("text/plain")));
    assert!(message.headers().get("deep").is_some_and(|value| value.len() < 100));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_no_text_end_no_connection() {
    let _turn = TURN.lock().await;
    let headers = table(&[(b"bad\xFF\xFE", string(b"left out")), (b"good", string(b"\xFFread"))]);
    let (message, dead) = survives("header", b".x", b"text\xFF/plain", headers).await;
    assert!(!dead);
    let headers: Vec<_> = message.headers().iter().map(|(name, value)| (name.as_str(), value.as_ref())).collect();
    assert_eq!(headers, [("good", b"\xFFread".as_slice())]);
    assert_eq!(message.content_type(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_routing_key_that_is_no_text_is_a_dead_letter() {
    let _turn = TURN.lock().await;
    let (message, dead) = survives("key", b".\xE2\x82", b"text/plain", table(&[])).await;
    assert!(dead);
    assert_eq!(message.payload(), "strange");
}

/// As RabbitMQ does now and then, where a queue is deleted while a consumer leaves it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_that_is_confirmed_twice_ends_no_connection() {
    let _turn = TURN.lock().await;
    let proxy = Slow::start(address()).await;
    proxy.stutter();
    let broker = open(&at(&proxy.address(), None)).unwrap();
    let root = format!("suite.stutter-{:08x}", fastrand::u32(..));
    let groups: [Group; 2] = ["stays", "leaves"].map(|name| format!("{name}@{root}.>").parse().unwrap());
    let topic = Topic::new(format!("{root}.x")).unwrap();
    let mut stays = broker.subscribe(&groups[0].filter, Subscribe::group(groups[0].name.clone())).await.unwrap();
    let connections = proxy.accepted();
    for _ in 0..3 {
        broker.publish(&topic, Message::new("x")).await.unwrap();
        let held = timeout(PATIENCE, stays.next()).await.unwrap().unwrap().unwrap();
        let leaves = broker.subscribe(&groups[1].filter, Subscribe::group(groups[1].name.clone())).await.unwrap();
        timeout(PATIENCE, leaves.close()).await.expect("leaving hangs").unwrap();
        // On the connection that it came by.
        held.ack().await.unwrap();
    }
    let mut status = broker.status().await.unwrap();
    while status.group(&groups[0]).unwrap().lag != Some(0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        status = broker.status().await.unwrap();
    }
    assert_eq!(proxy.accepted(), connections, "another had to be made");
    for group in groups {
        assert!(broker.delete_group(&group).await.unwrap());
    }
    broker.close(PATIENCE).await;
}

/// Another service reads from a quorum queue, and sends on what it read with every header.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_of_another_queue_is_none_of_ours() {
    let _turn = TURN.lock().await;
    let headers = table(&[
        (b"x-delivery-count", [b"l".as_slice(), &1_000_i64.to_be_bytes()].concat()),
        (b"flat", string(b"read")),
    ]);
    let (message, dead) = survives("count", b".x", b"text/plain", headers).await;
    assert!(!dead, "{message:?}");
    assert_eq!(message.headers().get_str("flat"), Some("read"));
}
