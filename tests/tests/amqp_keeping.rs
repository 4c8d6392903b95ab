//! Messages that are nobody's any more, on a real RabbitMQ: dead letters whose queue was deleted, groups that
//! were half deleted, deliveries that were given back unread.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

mod amqp_server;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use amqp_server::{TURN, address, at, ctl, join, names, next, open, open_as_it_is, ours, raw, server, unique};
use broker_amqp::lapin::options::{
    BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use broker_amqp::lapin::types::{AMQPValue, FieldTable};
use broker_amqp::lapin::{BasicProperties, ExchangeKind};
use broker_core::{
    Broker, BrokerExt, DeadLetter, Delivery, ErrorKind, Group, GroupOptions, Message, PublisherOptions, RetryPolicy,
    Subscribe, Timestamp, Topic,
};
use broker_tests::{Fault, Proxy};
use tokio::sync::Notify;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

async fn letters(broker: &dyn Broker, group: &Group, count: usize) -> Vec<DeadLetter> {
    let there = async {
        loop {
            let letters = broker.dead_letters(group, 100).await.unwrap();
            if letters.len() >= count {
                return letters;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, there).await.expect("the dead letters are not there")
}

async fn clean(broker: Arc<dyn Broker>, group: &Group) {
    assert!(broker.delete_group(group).await.unwrap());
    // With the group gone, what keeps its dead letters goes too, if it was ever made.
    let purged = broker.purge_dead_letters(group).await;
    assert!(purged.is_ok() || purged.is_err_and(|error| error.kind() == ErrorKind::NotFound));
    broker.close(PATIENCE).await;
}

/// An operator deletes the queue that keeps dead letters while a member that has seen it lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_kept_though_its_queue_was_deleted() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("deleted");
    let broker = open(server()).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    broker.publish(&topic, Message::new("first")).await.unwrap();
    next(&mut member).await.reject("no").await.unwrap();
    assert_eq!(letters(broker.as_ref(), &group, 1).await.len(), 1);
    let (connection, channel) = raw().await;
    let queue = format!("broker.dead:{group}");
    assert_eq!(channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap(), 1);
    connection.close(200, "OK".into()).await.unwrap();
    broker.publish(&topic, Message::new("second")).await.unwrap();
    next(&mut member).await.reject("no").await.unwrap();
    let kept = letters(broker.as_ref(), &group, 1).await;
    assert_eq!(kept.first().unwrap().message.payload(), "second");
    drop(member);
    clean(broker, &group).await;
}

/// An operator deletes queues that nobody reads, delay queues among them: what is to wait makes them again.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_wait_is_not_lost_though_its_delay_queue_was_deleted() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("delays");
    let exchange = unique("delays");
    let broker = open(&format!("{}?exchange={exchange}", server())).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    let (connection, channel) = raw().await;
    let delayed = async || {
        let due = Timestamp::now().after(Duration::from_secs(1));
        broker.publish(&topic, Message::new("later").with_deliver_at(due)).await.unwrap();
    };
    delayed().await;
    next(&mut member).await.retry_after(Duration::from_secs(1)).await.unwrap();
    next(&mut member).await.ack().await.unwrap();
    for queue in [format!("broker.delay.{exchange}.2s"), "broker.retry.2s".to_owned()] {
        channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    }
    delayed().await;
    let delivery = next(&mut member).await;
    assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (b"later".as_slice(), 1));
    delivery.retry_after(Duration::from_secs(1)).await.unwrap();
    let delivery = next(&mut member).await;
    assert_eq!(delivery.attempt(), 2);
    delivery.ack().await.unwrap();
    drop(member);
    channel.queue_delete(format!("broker.delay.{exchange}.2s").into(), QueueDeleteOptions::default()).await.unwrap();
    for exchange in [format!("broker.delay.{exchange}.2s"), exchange.clone()] {
        channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
    }
    connection.close(200, "OK".into()).await.unwrap();
    clean(broker, &group).await;
}

/// A wait is rounded up, and not for so long that nothing comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_before_it_expires_is_delivered() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("in-time");
    let broker = open(server()).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    let now = Timestamp::now();
    let (due, expires) = (now.after(Duration::from_millis(2100)), now.after(Duration::from_secs(9)));
    let message = Message::new("x").with_deliver_at(due).with_expires_at(expires);
    broker.publish(&topic, message).await.unwrap();
    let delivery = next(&mut member).await;
    assert!(Timestamp::now() >= due);
    assert_eq!(delivery.attempt(), 1);
    let due = Timestamp::now().after(Duration::from_millis(2100));
    delivery.retry_after(Duration::from_millis(2100)).await.unwrap();
    let delivery = next(&mut member).await;
    assert!(Timestamp::now() >= due);
    assert_eq!(delivery.attempt(), 2);
    delivery.ack().await.unwrap();
    drop(member);
    clean(broker, &group).await;
}

/// Whoever may publish can put anything into a queue.
#[tokio::test(flavor = "multi_thread")]
async fn redrive_passes_by_what_is_no_dead_letter() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("garbage");
    let broker = open(server()).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    broker.publish(&topic, Message::new("first")).await.unwrap();
    next(&mut member).await.reject("no").await.unwrap();
    letters(broker.as_ref(), &group, 1).await;
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
    let (connection, channel) = raw().await;
    let queue = format!("broker.dead:{group}");
    let (publish, bare) = (BasicPublishOptions::default(), BasicProperties::default());
    channel.basic_publish("".into(), queue.as_str().into(), publish, b"garbage", bare).await.unwrap();
    // It is there before what follows.
    channel.close(200, "OK".into()).await.unwrap();
    broker.publish(&topic, Message::new("second")).await.unwrap();
    next(&mut member).await.reject("no").await.unwrap();
    letters(broker.as_ref(), &group, 1).await;
    assert_eq!(broker.redrive(&group, 10).await.unwrap(), 1);
    let delivery = next(&mut member).await;
    assert_eq!(delivery.message().payload(), "second");
    delivery.ack().await.unwrap();
    let status = broker.status().await.unwrap();
    assert_eq!(status.group(&group).unwrap().dead_letters, Some(1), "the garbage stays");
    connection.close(200, "OK".into()).await.unwrap();
    drop(member);
    clean(broker, &group).await;
}

/// A crash in the middle of making or deleting an ordered group of several queues leaves one.
#[tokio::test(flavor = "multi_thread")]
async fn the_one_queue_left_of_several_is_bound_and_read() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("half");
    let (connection, channel) = raw().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    let first = format!("{group}/0");
    channel.queue_declare(first.as_str().into(), QueueDeclareOptions::durable(), arguments).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
    let broker = open(&format!("{}?ordered_queues=4", server())).unwrap();
    let ordered = Subscribe::group(group.name.clone()).with_options(GroupOptions::new().with_ordered(true));
    let mut member = broker.subscribe(&group.filter, ordered).await.unwrap();
    broker.publish(&topic, Message::new("read").with_key("k")).await.unwrap();
    let delivery = next(&mut member).await;
    assert_eq!(delivery.message().payload(), "read");
    delivery.ack().await.unwrap();
    drop(member);
    clean(broker, &group).await;
}

/// The crash may have left an exchange that goes on filling queues which nobody will read.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_several_queues_is_sent_nothing_more() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("left");
    let broker = open(server()).unwrap();
    broker.publish(&topic, Message::new("the exchange stands")).await.unwrap();
    let (connection, channel) = raw().await;
    let (last, name) = (format!("{group}/3"), group.to_string());
    let kind = ExchangeKind::Custom("x-consistent-hash".to_owned());
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let mut by_key = FieldTable::default();
    by_key.insert("hash-header".into(), AMQPValue::LongString("x-broker-key".into()));
    channel.exchange_declare(name.as_str().into(), kind, durable, by_key).await.unwrap();
    let (queue, none) = (QueueDeclareOptions::durable(), FieldTable::default());
    channel.queue_declare(last.as_str().into(), queue, none.clone()).await.unwrap();
    let bind = QueueBindOptions::default();
    channel.queue_bind(last.as_str().into(), name.as_str().into(), "1".into(), bind, none.clone()).await.unwrap();
    let (from, key) = ("broker".into(), topic.as_str().into());
    channel.exchange_bind(name.as_str().into(), from, key, Default::default(), none.clone()).await.unwrap();
    let ordered = Subscribe::group(group.name.clone()).with_options(GroupOptions::new().with_ordered(true));
    let mut member = broker.subscribe(&group.filter, ordered).await.unwrap();
    broker.publish(&topic, Message::new("read").with_key("k")).await.unwrap();
    let delivery = next(&mut member).await;
    assert_eq!(delivery.message().payload(), "read");
    delivery.ack().await.unwrap();
    assert_eq!(channel.queue_delete(last.as_str().into(), QueueDeleteOptions::default()).await.unwrap(), 0);
    connection.close(200, "OK".into()).await.unwrap();
    drop(member);
    clean(broker, &group).await;
}

/// Large ones are shown some at a time, and stay where they are.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_beyond_what_memory_is_meant_for_are_not_shown_at_once() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("large");
    let broker = open_as_it_is(&format!("{}?max_message_bytes=8388608", server())).unwrap();
    let mut member = join(&*broker, &group).await;
    for _ in 0..5 {
        broker.publish(&topic, Message::new(vec![b'x'; 7 << 20])).await.unwrap();
        next(&mut member).await.reject("no").await.unwrap();
    }
    for _ in 0..2 {
        // The third goes beyond.
        assert_eq!(broker.dead_letters(&group, 100).await.unwrap().len(), 3);
    }
    assert_eq!(broker.redrive(&group, 100).await.unwrap(), 5);
    for _ in 0..5 {
        next(&mut member).await.ack().await.unwrap();
    }
    drop(member);
    clean(broker, &group).await;
}

/// The connection that publishes loses a channel with each message that the server refuses: here for want of an exchange.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_refuses_wears_no_publisher_out() {
    let _turn = TURN.lock().await;
    let exchange = format!("suite.worn-{:08x}", fastrand::u32(..));
    let broker = open(&format!("{}?exchange={exchange}", server())).unwrap();
    let topic: Topic = "a".parse().unwrap();
    let (connection, channel) = raw().await;
    // More than there are numbers.
    for _ in 0..2_060 {
        channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
        // It may have come to the exchange, or be refused for it.
        let _ = timeout(PATIENCE, broker.publish(&topic, Message::new("x"))).await.expect("it has no end");
    }
    timeout(PATIENCE, broker.publish(&topic, Message::new("x"))).await.expect("it has no end").unwrap();
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
    broker.close(PATIENCE).await;
}

/// What cannot be read is not lost: an operator finds out what it was. Nor does it stay because it is large.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_kept_with_all_there_is_of_it() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("unread");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    let (connection, channel) = raw().await;
    let mut broken = FieldTable::default();
    broken.insert("good".into(), AMQPValue::LongString("yes".into()));
    broken.insert("x-broker-key".into(), AMQPValue::FieldTable(FieldTable::default()));
    let properties = BasicProperties::default().with_message_id("7".into()).with_content_type("text/plain".into());
    // Nearly a frame of headers, which a letter has more of.
    let mut large = broken.clone();
    for number in 0..100 {
        large.insert(format!("h{number}").into(), AMQPValue::LongString("x".repeat(1_290).into()));
    }
    for headers in [broken, large] {
        let properties = properties.clone().with_content_encoding("gzip".into()).with_headers(headers);
        let (exchange, key) = ("broker".into(), topic.as_str().into());
        channel.basic_publish(exchange, key, BasicPublishOptions::default(), b"x", properties).await.unwrap();
    }
    let kept = letters(&*broker, &group, 2).await;
    for letter in &kept {
        let message = &letter.message;
        assert_eq!((letter.attempts, letter.failure.status()), (0, Some("codec")));
        assert_eq!((message.id().to_string().as_str(), message.content_type()), ("7", Some("text/plain")));
        let told = ["good", "content-encoding", "x-broker-key"].map(|name| message.headers().get_str(name));
        assert_eq!(told, [Some("yes"), Some("gzip"), Some("{}")]);
    }
    // Of the large one not all could be sent on.
    let most = kept.iter().map(|letter| letter.message.headers().len()).max().unwrap();
    assert!((80..103).contains(&most), "{most}");
    broker.publish(&topic, Message::new("read")).await.unwrap();
    let delivery = next(&mut member).await;
    assert_eq!(delivery.message().payload(), "read");
    delivery.ack().await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
    drop(member);
    clean(broker, &group).await;
}

/// The server tells that a queue is missing by closing the channel, of which a connection has 2,047.
#[tokio::test(flavor = "multi_thread")]
async fn asking_for_what_is_missing_wears_nothing_out() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("asked-often");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    let asking = (0..10).map(|_| {
        let (broker, group) = (Arc::clone(&broker), group.clone());
        tokio::spawn(async move {
            for _ in 0..400 {
                assert!(broker.dead_letters(&group, 1).await.unwrap().is_empty());
            }
        })
    });
    for asked in asking.collect::<Vec<_>>() {
        asked.await.unwrap();
    }
    // Nor does what else there is suffer.
    broker.publish(&topic, Message::new("read")).await.unwrap();
    next(&mut member).await.ack().await.unwrap();
    let other = Group::new("another".parse().unwrap(), group.filter.clone());
    assert!(broker.create_group(&other, GroupOptions::new()).await.unwrap());
    assert!(broker.delete_group(&other).await.unwrap());
    drop(member);
    clean(broker, &group).await;
}

/// Two processes make a group at the same time, each as it thinks right.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_make_a_group_the_first_says_what_it_is() {
    let _turn = TURN.lock().await;
    let brokers = [open(server()).unwrap(), open(server()).unwrap()];
    let retries = |most| GroupOptions::new().with_retry(RetryPolicy::default().with_max_attempts(most).unwrap());
    for _ in 0..10 {
        let (_, group) = names("made-twice");
        let made = [0, 1].map(|index| {
            let (broker, group) = (Arc::clone(&brokers[index]), group.clone());
            tokio::spawn(async move { broker.create_group(&group, retries(3 + index as u32)).await })
        });
        let mut outcomes = Vec::new();
        for made in made {
            outcomes.push(made.await.unwrap());
        }
        let first = outcomes.iter().position(Result::is_ok).expect("nobody made it");
        assert!(*outcomes[first].as_ref().unwrap());
        let error = outcomes.swap_remove(1 - first).expect_err("both made it");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        // Of one mind it is no matter who was first.
        for broker in &brokers {
            assert!(!broker.create_group(&group, retries(3 + first as u32)).await.unwrap());
        }
        assert!(brokers[0].delete_group(&group).await.unwrap());
    }
    for broker in brokers {
        broker.close(PATIENCE).await;
    }
}

/// A job that reads one message, and closes: those that wait behind it have been at a member more often
/// than lost connections may bring a message back, and in nobody's hands.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_back_unread_does_not_die_of_it() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("unread");
    let broker = open(&format!("{}?max_redeliveries=10", server())).unwrap();
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    for number in 0..30_u8 {
        broker.publish(&topic, Message::new(vec![number])).await.unwrap();
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..30 {
        let mut member = join(broker.as_ref(), &group).await;
        let delivery = next(&mut member).await;
        assert!(seen.insert(delivery.message().payload().clone()), "twice");
        assert_eq!(delivery.attempt(), 1);
        delivery.ack().await.unwrap();
        timeout(PATIENCE, member.close()).await.expect("closing hangs").unwrap();
    }
    let status = broker.status().await.unwrap();
    let status = status.group(&group).unwrap();
    assert_eq!((status.lag, status.dead_letters), (Some(0), Some(0)));
    clean(broker, &group).await;
}

/// One frame acks all before it: not what was given back at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_back_between_two_that_are_acked_is_not_acked() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("between");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    for round in 0..20 {
        for name in ["first", "second", "third"] {
            broker.publish(&topic, Message::new(name)).await.unwrap();
        }
        let (first, second) = (next(&mut member).await, next(&mut member).await);
        let third = next(&mut member).await;
        let settled = [first.ack(), second.release(), third.ack()];
        for settled in settled {
            settled.await.unwrap();
        }
        let again = timeout(PATIENCE, member.next()).await;
        let again = again.unwrap_or_else(|_| panic!("round {round}: it was acked")).unwrap().unwrap();
        assert_eq!(again.message().payload(), "second");
        again.ack().await.unwrap();
    }
    drop(member);
    clean(broker, &group).await;
}

/// Far from the server, so that much is on its way when a message is given back.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_back_in_an_ordered_group_is_not_overtaken() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("overtaken");
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open_as_it_is(&format!("{}?max_redeliveries=5", at(&proxy.address().to_string(), None))).unwrap();
    let ordered = Subscribe::group(group.name.clone()).with_options(GroupOptions::new().with_ordered(true));
    let mut member = broker.subscribe(&group.filter, ordered.with_max_in_flight(4).unwrap()).await.unwrap();
    for number in 0..12_u8 {
        broker.publish(&topic, Message::new(vec![number]).with_key("k")).await.unwrap();
    }
    proxy.set(Fault::Delay(Duration::from_millis(50)));
    for number in 0..12_u8 {
        // More often than lost connections may bring it back.
        for _ in 0..7 {
            let delivery = next(&mut member).await;
            assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), ([number].as_slice(), 1));
            // The ack of the one before is on its way.
            tokio::time::sleep(Duration::from_millis(10)).await;
            delivery.release().await.unwrap();
        }
        let delivery = next(&mut member).await;
        assert_eq!(delivery.message().payload().as_ref(), [number]);
        delivery.ack().await.unwrap();
    }
    proxy.set(Fault::None);
    // One that is given back by a member that leaves is another's.
    broker.publish(&topic, Message::new("last").with_key("k")).await.unwrap();
    let last = next(&mut member).await;
    let leaving = tokio::spawn(member.close());
    tokio::time::sleep(Duration::from_millis(50)).await;
    last.release().await.unwrap();
    timeout(PATIENCE, leaving).await.expect("leaving hangs").unwrap().unwrap();
    let mut other = join(&*broker, &group).await;
    let last = next(&mut other).await;
    assert_eq!(last.message().payload(), "last");
    last.ack().await.unwrap();
    drop(other);
    clean(broker, &group).await;
}

/// A retry that waits when the connection is lost comes back before it is due, and holds back its key as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_waits_in_an_ordered_group_is_not_overtaken_after_a_lost_connection() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("waits");
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open(&at(&proxy.address().to_string(), None)).unwrap();
    let ordered = Subscribe::group(group.name.clone()).with_options(GroupOptions::new().with_ordered(true));
    let mut member = broker.subscribe(&group.filter, ordered).await.unwrap();
    for body in ["first", "second", "third"] {
        broker.publish(&topic, Message::new(body).with_key("k")).await.unwrap();
    }
    broker.publish(&topic, Message::new("beside").with_key("other")).await.unwrap();
    let first = next(&mut member).await;
    assert_eq!(first.message().payload(), "first");
    first.retry_after(Duration::from_secs(4)).await.unwrap();
    proxy.cut();
    let (mut expected, mut beside) = (vec![("third", 1), ("second", 1), ("first", 2)], 0);
    while let Some((body, attempt)) = expected.last() {
        let delivery = next(&mut member).await;
        if delivery.message().payload() == "beside" {
            // That of another key does not wait. It may have come before the cut as well.
            beside += usize::from(expected.len() == 3);
            let _ = delivery.ack().await;
            continue;
        }
        assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (body.as_bytes(), *attempt));
        delivery.ack().await.unwrap();
        expected.pop();
    }
    assert!(beside > 0, "it waited for a retry of another key");
    drop(member);
    clean(broker, &group).await;
}

/// The management API of a host that takes connections and says nothing is waited for once, not once a group.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_management_api_is_asked_once() {
    let _turn = TURN.lock().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let management = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&asked);
    let silent = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            counting.fetch_add(1, Ordering::Relaxed);
            held.push(socket);
        }
    });
    let broker = open_as_it_is(&format!("{}?connect_timeout=2s&management=http://{management}", server())).unwrap();
    let groups: Vec<_> = ["one", "two", "three"].map(|name| names(name).1).into();
    for group in &groups {
        broker.create_group(group, GroupOptions::new()).await.unwrap();
    }
    let status = broker.status().await.unwrap();
    for group in &groups {
        let status = status.group(group).unwrap();
        assert!(status.last_error.as_ref().is_some_and(|error| error.contains("management")), "{status:?}");
        assert_eq!(status.lag, Some(0));
        assert!(broker.delete_group(group).await.unwrap());
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    broker.close(PATIENCE).await;
    silent.abort();
}

/// Each dead letter is a question; the answers come one by one, in time, and all together take longer than one may.
#[tokio::test(flavor = "multi_thread")]
async fn many_dead_letters_are_listed_as_long_as_the_server_answers() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("listed");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    for number in 0..50_u8 {
        broker.publish(&topic, Message::new(vec![number])).await.unwrap();
        next(&mut member).await.reject("no").await.unwrap();
    }
    let proxy = Proxy::start(address()).await.unwrap();
    let far = open_as_it_is(&format!("{}?connect_timeout=2s", at(&proxy.address().to_string(), None))).unwrap();
    far.connect().await.unwrap();
    proxy.set(Fault::Delay(Duration::from_millis(40)));
    let kept = timeout(PATIENCE, far.dead_letters(&group, 100)).await.expect("it has no end").unwrap();
    let bodies: Vec<u8> = kept.iter().filter_map(|letter| letter.message.payload().first().copied()).collect();
    assert_eq!(bodies, (0..50).collect::<Vec<_>>());
    proxy.set(Fault::None);
    far.close(PATIENCE).await;
    drop(member);
    clean(broker, &group).await;
}

/// Retries wait in queues that all groups share: those of one go with it, and those of the other come.
async fn retries_that_wait(url: &str) {
    let (topic, group) = names("dropped");
    let other = Group::new("stays".parse().unwrap(), group.filter.clone());
    let broker = open(url).unwrap();
    for deleted in [false, true] {
        let (mut member, mut beside) = (join(&*broker, &group).await, join(&*broker, &other).await);
        for body in ["a", "b", "c"] {
            broker.publish(&topic, Message::new(body)).await.unwrap();
            for member in [&mut member, &mut beside] {
                let delivery = next(member).await;
                assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (body.as_bytes(), 1));
                delivery.retry_after(Duration::from_millis(1_500)).await.unwrap();
            }
        }
        if deleted {
            assert!(broker.delete_group(&group).await.unwrap());
            member = join(&*broker, &group).await;
        } else {
            assert_eq!(broker.purge_group(&group).await.unwrap(), 3);
        }
        // By then those that were dropped would have come.
        for body in ["a", "b", "c"] {
            let delivery = next(&mut beside).await;
            assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (body.as_bytes(), 2));
            delivery.ack().await.unwrap();
        }
        broker.publish(&topic, Message::new("last")).await.unwrap();
        for member in [&mut member, &mut beside] {
            let delivery = next(member).await;
            assert_eq!(delivery.message().payload(), "last", "deleted: {deleted}");
            delivery.ack().await.unwrap();
        }
    }
    assert!(broker.delete_group(&other).await.unwrap());
    clean(broker, &group).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_that_wait_are_purged_and_deleted_with_their_group() {
    let _turn = TURN.lock().await;
    retries_that_wait(server()).await;
    if !ours() {
        println!("no control: virtual hosts, for delay queues of the other type");
        return;
    }
    let host = format!("classic-{:08x}", fastrand::u32(..));
    ctl(&["add_vhost", &host]);
    ctl(&["set_permissions", "-p", &host, "guest", ".*", ".*", ".*"]);
    retries_that_wait(&format!("{}/{host}?queue_type=classic", server())).await;
    ctl(&["delete_vhost", &host]);
}

/// Of each kind of queue, brokers of that kind.
fn of_each_kind() -> [Box<dyn Fn() -> Arc<dyn Broker>>; 2] {
    ["quorum", "classic"].map(|kind| {
        let url = format!("{}?queue_type={kind}", server());
        Box::new(move || open(&url).unwrap()) as Box<dyn Fn() -> Arc<dyn Broker>>
    })
}

async fn publish(broker: &dyn Broker, topic: &Topic, count: usize, keys: usize) {
    let publisher = broker.publisher(topic, PublisherOptions::new()).unwrap();
    let message = |n: usize| Message::new(n.to_string()).with_key((n % keys).to_string());
    let published: Vec<_> = (0..count).map(|n| publisher.publish(message(n))).collect();
    for one in published {
        one.await.unwrap();
    }
}

fn number(delivery: &Delivery) -> usize {
    std::str::from_utf8(delivery.message().payload()).unwrap().parse().unwrap()
}

/// The next of an ordered group may go on only when the one that leaves holds nothing any more, and everything goes on
/// in its order.
#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_an_ordered_group_has_its_turn_until_it_holds_nothing() {
    let _turn = TURN.lock().await;
    for (round, broker) in of_each_kind().iter().flat_map(|broker| (0..4).map(move |round| (round, broker))) {
        let (leaving, staying) = (broker(), broker());
        let (topic, group) = names("turn");
        staying.create_group(&group, GroupOptions::new().with_ordered(true)).await.unwrap();
        let window = || Subscribe::group(group.name.clone()).with_max_in_flight(8).unwrap();
        let mut first = leaving.subscribe(&group.filter, window()).await.unwrap();
        let mut second = staying.subscribe(&group.filter, window()).await.unwrap();
        publish(&*staying, &topic, 20, 1).await;
        let held = next(&mut first).await;
        assert_eq!(number(&held), 0);
        let settling = Arc::new(Notify::new());
        let settled = Arc::clone(&settling);
        let gone = tokio::spawn(async move {
            match round % 3 {
                0 => first.close().await.unwrap(),
                1 => drop(first),
                // The subscription ends with its broker.
                _ => return leaving.close(PATIENCE).await.complete,
            }
            settled.notified().await;
            leaving.close(PATIENCE).await.complete
        });
        let early = timeout(Duration::from_millis(500), second.next()).await;
        assert!(early.is_err(), "round {round}: {early:?} came while one of its key was in somebody's hands");
        held.ack().await.unwrap();
        settling.notify_one();
        for expected in 1..20 {
            let delivery = next(&mut second).await;
            assert_eq!(number(&delivery), expected, "round {round}");
            delivery.ack().await.unwrap();
        }
        assert!(gone.await.unwrap());
        drop(second);
        clean(staying, &group).await;
    }
}

/// What was acked does not come back, however much was given back beside it just before the end.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acked_before_a_clean_close_does_not_come_back() {
    const COUNT: usize = 400;
    let _turn = TURN.lock().await;
    for (ordered, broker) in of_each_kind().iter().flat_map(|broker| [false, true].map(|ordered| (ordered, broker))) {
        let keeper = broker();
        let (topic, group) = names("acked");
        keeper.create_group(&group, GroupOptions::new().with_ordered(ordered)).await.unwrap();
        publish(&*keeper, &topic, COUNT, COUNT).await;
        let mut acked = vec![0_u32; COUNT];
        for round in 0..6 {
            let member = broker();
            let window = Subscribe::group(group.name.clone()).with_max_in_flight(300).unwrap();
            let mut subscription = member.subscribe(&group.filter, window).await.unwrap();
            let mut held = Vec::new();
            while held.len() < 50 {
                held.push(next(&mut subscription).await);
            }
            // As handlers end: in no order, while the others are given back.
            fastrand::shuffle(&mut held);
            let closing = tokio::spawn(async move {
                drop(subscription);
                member.close(PATIENCE).await.complete
            });
            tokio::time::sleep(Duration::from_millis(round)).await;
            for delivery in held {
                let number = number(&delivery);
                delivery.ack().await.unwrap();
                acked[number] += 1;
            }
            assert!(closing.await.unwrap());
        }
        let mut rest = join(&*keeper, &group).await;
        while acked.contains(&0) {
            let delivery = next(&mut rest).await;
            acked[number(&delivery)] += 1;
            delivery.ack().await.unwrap();
        }
        // What came back would have come before the last.
        let twice = acked.iter().filter(|times| **times > 1).count();
        assert_eq!(twice, 0, "acked twice, ordered: {ordered}");
        drop(rest);
        clean(keeper, &group).await;
    }
}

/// A group that reads everything reads its own dead letters, and may fail again: each is kept once, and once redriven. It was
/// twice as many with each redrive.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_reads_its_own_dead_letters_has_each_of_them_once() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("own");
    let group = Group::new(group.name, format!("{topic}.>").parse().unwrap());
    let (orders, dead) = (Topic::new(format!("{topic}.orders")).unwrap(), Topic::new(format!("{topic}.dead")).unwrap());
    let broker = open(server()).unwrap();
    let options = GroupOptions::new().with_dead_letter(dead.clone());
    let options = Subscribe::group(group.name.clone()).with_options(options);
    let mut member = broker.subscribe(&group.filter, options).await.unwrap();
    broker.publish(&orders, Message::new("1")).await.unwrap();
    for round in 0..2 {
        for (from, reason) in [(&orders, "first"), (&dead, "second")] {
            let delivery = next(&mut member).await;
            assert_eq!(delivery.topic(), from);
            delivery.reject(reason).await.unwrap();
        }
        let kept = letters(broker.as_ref(), &group, 1).await;
        let told: Vec<_> = kept.iter().map(|letter| (&letter.topic, letter.failure.reason())).collect();
        assert_eq!(told, [(&orders, "first")], "{round}");
        assert_eq!(broker.redrive(&group, 10).await.unwrap(), 1);
    }
    next(&mut member).await.ack().await.unwrap();
    drop(member);
    clean(broker, &group).await;
}
