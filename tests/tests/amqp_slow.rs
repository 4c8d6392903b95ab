//! A RabbitMQ that is slow to declare, as a cluster is whose quorum is slow to agree: who needs no declaration waits
//! for none.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod amqp_server;

use std::sync::Arc;
use std::time::Duration;

use amqp_server::slow::Slow;
use amqp_server::{TURN, address, at, ctl, join, names, next, open, open_as_it_is, ours, raw, server, unique};
use broker_core::{Broker, BrokerExt, ErrorKind, Group, GroupOptions, Message, Subscribe, Timestamp};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// A broker behind a proxy, with an exchange of its own, which has no delay queues yet. Nothing else is in a hurry.
async fn slow() -> (Slow, Arc<dyn Broker>, String) {
    let proxy = Slow::start(address()).await;
    let exchange = unique("slow");
    let url = at(&proxy.address(), None);
    let broker = open_as_it_is(&format!("{url}?exchange={exchange}&connect_timeout=60s&publish_timeout=60s")).unwrap();
    (proxy, broker, exchange)
}

async fn clean(broker: Arc<dyn Broker>, groups: &[Group], exchange: &str) {
    for group in groups {
        assert!(broker.delete_group(group).await.unwrap());
        let _ = broker.purge_dead_letters(group).await;
    }
    broker.close(PATIENCE).await;
    let (connection, channel) = raw().await;
    channel.exchange_delete(exchange.into(), Default::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_needs_no_delay_queue_waits_for_none() {
    let _turn = TURN.lock().await;
    let (proxy, broker, exchange) = slow().await;
    let (topic, group) = names("plain");
    let mut member = join(&*broker, &group).await;
    broker.publish(&topic, Message::new("before")).await.unwrap();
    next(&mut member).await.ack().await.unwrap();
    proxy.keep("broker.delay.");
    let soon = Timestamp::now().after(Duration::from_millis(300));
    let delayed = (0..3_u8).map(|number| Message::new(vec![number]).with_deliver_at(soon));
    let delayed: Vec<_> = delayed.map(|message| tokio::spawn(broker.publish(&topic, message))).collect();
    timeout(PATIENCE, proxy.kept(1)).await.expect("it is not declared");
    for _ in 0..3 {
        let plain = timeout(PATIENCE, broker.publish(&topic, Message::new("plain"))).await;
        plain.expect("its confirm waits for the declaration").unwrap();
        let delivery = next(&mut member).await;
        assert_eq!(delivery.message().payload(), "plain");
        delivery.ack().await.unwrap();
    }
    assert!(delayed.iter().all(|publish| !publish.is_finished()));
    proxy.release();
    for publish in delayed {
        timeout(PATIENCE, publish).await.expect("it does not end").unwrap().unwrap();
    }
    let mut numbers = Vec::new();
    for _ in 0..3 {
        let delivery = next(&mut member).await;
        numbers.push(delivery.message().payload().to_vec());
        delivery.ack().await.unwrap();
    }
    numbers.sort();
    assert_eq!(numbers, [[0], [1], [2]]);
    drop(member);
    clean(broker, &[group], &exchange).await;
}

/// A retry waits for the queue that delays it; others are settled meanwhile, and the broker closes in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_waits_for_its_queue_holds_up_no_other_group() {
    let _turn = TURN.lock().await;
    let (proxy, broker, exchange) = slow().await;
    let ((tried, first), (rejected, second)) = (names("tried"), names("rejected"));
    let (mut one, mut other) = (join(&*broker, &first).await, join(&*broker, &second).await);
    broker.publish(&tried, Message::new("tried")).await.unwrap();
    broker.publish(&rejected, Message::new("rejected")).await.unwrap();
    proxy.keep("broker.retry.");
    let retry = next(&mut one).await.retry_after(Duration::from_millis(300));
    let retry = tokio::spawn(retry);
    timeout(PATIENCE, proxy.kept(1)).await.expect("it is not declared");
    let reject = timeout(PATIENCE, next(&mut other).await.reject("no")).await;
    reject.expect("its dead letter waits for the declaration").unwrap();
    assert_eq!(broker.dead_letters(&second, 1).await.unwrap().len(), 1);
    assert!(!retry.is_finished());
    proxy.release();
    timeout(PATIENCE, retry).await.expect("it does not end").unwrap().unwrap();
    let delivery = next(&mut one).await;
    assert_eq!(delivery.attempt(), 2);
    delivery.ack().await.unwrap();
    drop((one, other));
    clean(broker, &[first, second], &exchange).await;
}

/// The server says that a queue is missing by closing the channel, when whoever asked has closed it already.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_ends_no_connection() {
    let _turn = TURN.lock().await;
    let proxy = Slow::start(address()).await;
    let broker = open_as_it_is(&format!("{}?connect_timeout=1s", at(&proxy.address(), None))).unwrap();
    let ((_, group), (_, absent)) = (names("asked"), names("absent"));
    assert!(broker.create_group(&group, GroupOptions::new()).await.unwrap());
    let connections = proxy.accepted();
    for round in 1..4 {
        proxy.keep("absent@");
        let error = broker.purge_group(&absent).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        proxy.kept(round).await;
        proxy.release();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(broker.purge_group(&absent).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(proxy.accepted(), connections, "another had to be made");
    }
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

/// Who makes a group says so on the server, until it stands or is given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_given_up_half_made_can_be_made() {
    let _turn = TURN.lock().await;
    let proxy = Slow::start(address()).await;
    let slow = open_as_it_is(&format!("{}?connect_timeout=1s", at(&proxy.address(), None))).unwrap();
    let swift = open(server()).unwrap();
    let group = names("half").1;
    // The claim is before it.
    proxy.keep(&format!("broker.settings:{group}"));
    assert_eq!(slow.create_group(&group, GroupOptions::new()).await.unwrap_err().kind(), ErrorKind::Timeout);
    proxy.kept(1).await;
    assert!(swift.create_group(&group, GroupOptions::new()).await.unwrap());
    proxy.release();
    assert!(!slow.create_group(&group, GroupOptions::new()).await.unwrap());
    assert!(swift.delete_group(&group).await.unwrap());
    for broker in [slow, swift] {
        broker.close(PATIENCE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_slowly_made_holds_up_no_other() {
    let _turn = TURN.lock().await;
    let proxy = Slow::start(address()).await;
    let broker = open_as_it_is(&format!("{}?connect_timeout=60s", at(&proxy.address(), None))).unwrap();
    let (slow, swift) = (names("slow").1, names("swift").1);
    proxy.keep(&format!("broker.settings:{slow}"));
    let (making, group) = (Arc::clone(&broker), slow.clone());
    let making = tokio::spawn(async move { making.create_group(&group, GroupOptions::new()).await });
    timeout(PATIENCE, proxy.kept(1)).await.expect("it is not made");
    let made = timeout(PATIENCE, broker.create_group(&swift, GroupOptions::new())).await;
    assert!(made.expect("it waits for the other").unwrap());
    assert!(!making.is_finished());
    proxy.release();
    assert!(timeout(PATIENCE, making).await.expect("it does not end").unwrap().unwrap());
    for group in [slow, swift] {
        assert!(broker.delete_group(&group).await.unwrap());
    }
    broker.close(PATIENCE).await;
}

/// What a subscription without group is given up over, half made, does not fill for as long as the connection stands.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_never_had_a_consumer_goes() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: the server's queues cannot be listed");
        return;
    }
    let proxy = Slow::start(address()).await;
    let broker = open_as_it_is(&format!("{}?connect_timeout=2s", at(&proxy.address(), None))).unwrap();
    let topic = names("alone").0;
    broker.connect().await.unwrap();
    proxy.keep_consumers();
    let subscribed = broker.subscribe(&(&topic).into(), Subscribe::new()).await.map(drop);
    assert_eq!(subscribed.unwrap_err().kind(), ErrorKind::Timeout);
    let left = ctl(&["list_queues", "name", "consumers", "arguments"]);
    let left: Vec<_> = left.lines().filter(|line| line.starts_with("amq.gen-")).collect();
    assert!(!left.is_empty() && left.iter().all(|line| line.contains("x-expires")), "{left:?}");
    proxy.release();
    broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    broker.close(PATIENCE).await;
}

/// What waits for a queue that is never declared ends when any publish would.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_does_not_wait_for_its_delay_queue_for_ever() {
    let _turn = TURN.lock().await;
    let proxy = Slow::start(address()).await;
    let (topic, exchange) = (names("late").0, unique("slow"));
    let url = format!("{}?exchange={exchange}&connect_timeout=1s&publish_timeout=3s", at(&proxy.address(), None));
    let broker = open_as_it_is(&url).unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    proxy.keep("broker.delay.");
    let hour = Timestamp::now().after(Duration::from_secs(3600));
    let delayed = timeout(PATIENCE, broker.publish(&topic, Message::new("late").with_deliver_at(hour))).await;
    let error = delayed.expect("it does not end").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.message().contains("was not sent"), "{error}");
    // The declaration was tried again, and is there for the next.
    proxy.release();
    let hour = Timestamp::now().after(Duration::from_secs(3600));
    let delayed = timeout(PATIENCE, broker.publish(&topic, Message::new("in time").with_deliver_at(hour))).await;
    delayed.expect("it does not end").unwrap();
    clean(broker, &[], &exchange).await;
}
