//! What RabbitMQ refuses, and how it is told: connections, with what to do about them, members beyond what a
//! connection holds, and settlements: they end, are said to be refused, and their messages come back.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod amqp_server;

use std::time::Duration;

use amqp_server::{TURN, address, ctl, join, names, next, open, ours, printed, raw, server, unique, within};
use broker_amqp::lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use broker_amqp::lapin::types::{AMQPValue, FieldTable};
use broker_amqp::lapin::{Channel, Connection, ConnectionProperties};
use broker_core::{Broker, BrokerExt, Counts, ErrorKind, Group, GroupOptions, Message, RetryPolicy, Subscribe, Topic};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

/// Why a connection is refused, and what to do about it; of the password nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_says_what_to_do() {
    let _turn = TURN.lock().await;
    let (Some(tls), Some(folder)) = (printed("AMQP_TLS_ADDRESS"), printed("AMQP_TLS")) else {
        println!("no control: neither users nor certificates of the server at AMQP_URL are known");
        return;
    };
    let (plain, user, full) = (address(), unique("stranger"), unique("full"));
    ctl(&["add_user", &user, "sesame"]);
    ctl(&["add_vhost", &full]);
    ctl(&["set_permissions", "-p", &full, &user, ".*", ".*", ".*"]);
    ctl(&["set_vhost_limits", "-p", &full, r#"{"max-connections": 0}"#]);
    let outcomes = [
        (format!("amqp://{user}:sesame@{plain}/absent"), ErrorKind::NotFound, "add_vhost 'absent'"),
        (format!("amqp://{user}:sesame@{plain}"), ErrorKind::Unauthorized, "set_permissions -p '/'"),
        (format!("amqp://{user}:sesame@{plain}/{full}"), ErrorKind::Unavailable, "set_vhost_limits"),
        (format!("amqp://{user}:open-sesame@{plain}"), ErrorKind::Unauthorized, "change_password"),
        (format!("amqps://{user}:sesame@{plain}"), ErrorKind::Unavailable, "speaks no TLS"),
        (format!("amqps://{user}:sesame@{tls}"), ErrorKind::Unavailable, "ca=FILE"),
        (format!("amqps://{user}:sesame@{tls}?ca={folder}/client.pem"), ErrorKind::Unavailable, "ca=FILE"),
        (format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem"), ErrorKind::Unavailable, "cert=FILE"),
        (
            format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/server.key"),
            ErrorKind::Unavailable,
            "key=FILE",
        ),
        // No key in the one, and no certificate in the other.
        (
            format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/client.pem"),
            ErrorKind::Unavailable,
            "no private key",
        ),
        (
            format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem&cert={folder}/client.key&key={folder}/client.key"),
            ErrorKind::Unavailable,
            "no certificate",
        ),
    ]
    .map(async |(url, kind, advice)| {
        let broker = open(&url).unwrap();
        let error = within("connecting", broker.connect()).await.unwrap_err();
        broker.close(PATIENCE).await;
        (url, error, kind, advice)
    });
    let outcomes = futures_util::future::join_all(outcomes).await;
    ctl(&["delete_user", &user]);
    ctl(&["delete_vhost", &full]);
    for (url, error, kind, advice) in outcomes {
        assert_eq!(error.kind(), kind, "{url}: {error}");
        assert!(error.message().contains(advice), "{url}: {error}");
        assert!(!format!("{error:?} {error}").contains("sesame"), "{url}: {error:?}");
    }
}

/// A connection has so many channels, and each member one: beyond them it says so, and there is room again when one leaves.
#[tokio::test(flavor = "multi_thread")]
async fn members_beyond_the_channels_of_a_connection_are_refused() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: channel_max");
        return;
    }
    let topic = Topic::new(format!("suite.{}", unique("crowd"))).unwrap();
    ctl(&["eval", "application:set_env(rabbit, channel_max, 12)."]);
    let broker = open(server()).unwrap();
    let mut members = Vec::new();
    while members.len() < 12 {
        members.push(broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap());
    }
    let refused = broker.subscribe(&(&topic).into(), Subscribe::new()).await.map(drop);
    ctl(&["eval", "application:set_env(rabbit, channel_max, 2047)."]);
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.message().contains("channel_max"), "{error}");
    broker.publish(&topic, Message::new("x")).await.unwrap();
    let left = members.pop().unwrap();
    for member in &mut members {
        within("receiving", member.next()).await.unwrap().unwrap().ack().await.unwrap();
    }
    within("leaving", left.close()).await.unwrap();
    // Its channel is closed a moment later.
    let again = async {
        loop {
            match broker.subscribe(&(&topic).into(), Subscribe::new()).await {
                Ok(member) => return member,
                Err(error) => assert!(error.message().contains("channel_max"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    members.push(within("joining", again).await);
    assert!(broker.close(PATIENCE).await.complete);
}

/// The server closes a channel whose deliveries are unacked for too long: they come again, on another.
#[tokio::test(flavor = "multi_thread")]
async fn who_holds_a_delivery_for_too_long_goes_on_and_has_it_again() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: the consumer timeout");
        return;
    }
    let (topic, group) = names("held");
    let set = |value: &str| ctl(&["eval", &format!("application:set_env(rabbit, {value}).")]);
    // A channel keeps the one, and asks for the other each time.
    set("consumer_timeout, 500");
    set("channel_tick_interval, 500");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    set("consumer_timeout, 1800000");
    broker.publish(&topic, Message::new("a")).await.unwrap();
    let held = next(&mut member).await;
    let again = timeout(PATIENCE, member.next()).await;
    set("channel_tick_interval, 60000");
    let again = again.expect("it does not come again").unwrap().unwrap();
    assert_eq!((again.message().payload().as_ref(), again.attempt()), (&b"a"[..], 1));
    again.ack().await.unwrap();
    let error = within("settling", held.ack()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    drop(member);
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

async fn counts(broker: &dyn Broker, group: &Group) -> Counts {
    broker.status().await.unwrap().group(group).unwrap().counts
}

async fn declare(channel: &Channel, queue: &str, arguments: &[(&str, AMQPValue)]) {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), table).await.unwrap();
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// The queue that keeps dead letters is there, and of another kind: so it is where a service has changed its queue type.
#[tokio::test(flavor = "multi_thread")]
async fn a_reject_that_cannot_be_kept_is_told_and_its_message_comes_back() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("unkept");
    let (connection, channel) = raw().await;
    let keeping = format!("broker.dead:{group}");
    declare(&channel, &keeping, &[("x-queue-type", text("classic"))]).await;
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    broker.publish(&topic, Message::new("a")).await.unwrap();
    for _ in 0..2 {
        let delivery = next(&mut member).await;
        assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (&b"a"[..], 1));
        let error = within("rejecting", delivery.reject("no")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(error.message().contains(&keeping) && error.message().contains("inequivalent arg"), "{error}");
    }
    assert_eq!(counts(&*broker, &group).await.dead_lettered, 0);
    channel.queue_delete(keeping.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    within("rejecting", next(&mut member).await.reject("no")).await.unwrap();
    assert_eq!(counts(&*broker, &group).await.dead_lettered, 1);
    let kept = broker.dead_letters(&group, 10).await.unwrap();
    assert_eq!(kept.first().expect("it is not kept").message.payload(), "a");
    connection.close(200, "OK".into()).await.unwrap();
    drop(member);
    assert!(broker.delete_group(&group).await.unwrap());
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
    broker.close(PATIENCE).await;
}

/// What keeps dead letters cannot: what is to go there is handed out so often and no more, and is kept as soon as it can be.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_dead_lettered_comes_no_more_often_than_it_may() {
    let _turn = TURN.lock().await;
    let (connection, channel) = raw().await;
    for (kind, ordered) in [("quorum", false), ("quorum", true), ("classic", false)] {
        for is_exhausted in [false, true] {
            let (topic, group) = names("bounded");
            let keeping = format!("broker.dead:{group}");
            declare(&channel, &keeping, &[("x-max-length", AMQPValue::LongInt(7))]).await;
            let broker = open(&format!("{}?queue_type={kind}&max_redeliveries=3", server())).unwrap();
            let retry = RetryPolicy::default().with_max_attempts(1).unwrap();
            let options = GroupOptions::new().with_ordered(ordered).with_retry(retry);
            let joining = Subscribe::group(group.name.clone()).with_options(options);
            let mut member = broker.subscribe(&group.filter, joining).await.unwrap();
            let bodies = if ordered { &["a", "b"][..] } else { &["a"] };
            for body in bodies {
                broker.publish(&topic, Message::new(*body).with_key("k")).await.unwrap();
            }
            for _ in 0..if is_exhausted { 1 } else { 3 } {
                let delivery = next(&mut member).await;
                assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (&b"a"[..], 1));
                let refused = if is_exhausted { delivery.retry() } else { delivery.reject("no") };
                let error = within("refusing", refused).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            }
            // Longer than it took to come back before.
            let more = timeout(Duration::from_secs(3), member.next()).await;
            assert!(more.is_err(), "{kind}, ordered: {ordered}, exhausted: {is_exhausted}: {more:?}");
            channel.queue_delete(keeping.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
            let kept = async {
                loop {
                    if let Some(letter) = broker.dead_letters(&group, 10).await.unwrap().pop() {
                        return letter;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let letter = within("keeping it", kept).await;
            let reason = if is_exhausted { "retried, no reason given" } else { "redelivered" };
            assert_eq!((letter.failure.reason(), letter.attempts), (reason, 1));
            if ordered {
                let delivery = next(&mut member).await;
                assert_eq!(delivery.message().payload(), "b");
                delivery.ack().await.unwrap();
            }
            drop(member);
            assert!(broker.delete_group(&group).await.unwrap());
            assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
            broker.close(PATIENCE).await;
        }
    }
    connection.close(200, "OK".into()).await.unwrap();
}

/// A delay queue is not as it is needed: retries are refused, and count among what brings a message back in vain.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_whose_retries_are_refused_is_a_dead_letter_in_the_end() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: virtual hosts");
        return;
    }
    let host = unique("retries");
    ctl(&["add_vhost", &host]);
    ctl(&["set_permissions", "-p", &host, "guest", ".*", ".*", ".*"]);
    let url = format!("{}/{host}", server());
    let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    declare(&channel, "broker.retry.100ms", &[]).await;
    for kind in ["quorum", "classic"] {
        let (topic, group) = names("tired");
        let broker = open(&format!("{url}?queue_type={kind}&max_redeliveries=3")).unwrap();
        let mut member = join(&*broker, &group).await;
        broker.publish(&topic, Message::new("a")).await.unwrap();
        for _ in 0..3 {
            let retry = next(&mut member).await.retry_after(Duration::from_millis(50));
            let error = within("retrying", retry).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        }
        broker.publish(&topic, Message::new("b")).await.unwrap();
        let kept = async {
            while counts(&*broker, &group).await.dead_lettered == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        within("dying", kept).await;
        let delivery = next(&mut member).await;
        assert_eq!(delivery.message().payload(), "b");
        delivery.ack().await.unwrap();
        let kept = broker.dead_letters(&group, 10).await.unwrap();
        assert_eq!(kept.first().expect("it is not kept").failure.reason(), "redelivered");
        drop(member);
        broker.close(PATIENCE).await;
    }
    connection.close(200, "OK".into()).await.unwrap();
    ctl(&["delete_vhost", &host]);
}

/// Whoever may consume and not publish can ack and give back, and is told that nothing else goes.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_publish_is_told_so_when_it_rejects_and_retries() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: users");
        return;
    }
    let (topic, group) = names("reader");
    let user = unique("reader");
    ctl(&["add_user", &user, "sesame"]);
    // What it writes to is the group's queues, none of the exchanges.
    ctl(&["set_permissions", &user, ".*", "@", ".*"]);
    let owner = open(server()).unwrap();
    owner.create_group(&group, GroupOptions::new()).await.unwrap();
    owner.publish(&topic, Message::new("a")).await.unwrap();
    let broker = open(&format!("amqp://{user}:sesame@{}", address())).unwrap();
    let mut member = join(&*broker, &group).await;
    let error = within("rejecting", next(&mut member).await.reject("no")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let error = within("retrying", next(&mut member).await.retry()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    let delivery = next(&mut member).await;
    assert_eq!((delivery.message().payload().as_ref(), delivery.attempt()), (&b"a"[..], 1));
    delivery.ack().await.unwrap();
    let counted = counts(&*broker, &group).await;
    assert_eq!((counted.dead_lettered, counted.retried, counted.acked), (0, 0, 1));
    drop(member);
    assert!(within("closing", broker.close(PATIENCE)).await.complete);
    ctl(&["delete_user", &user]);
    assert!(owner.delete_group(&group).await.unwrap());
    let _ = owner.purge_dead_letters(&group).await;
    owner.close(PATIENCE).await;
}

/// The group's first dead letter may be made while the broker closes.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_reject_is_taken_while_the_broker_closes() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("closing");
    let broker = open(server()).unwrap();
    let mut member = join(&*broker, &group).await;
    broker.publish(&topic, Message::new("a")).await.unwrap();
    let delivery = next(&mut member).await;
    let closing = tokio::spawn({
        let broker = std::sync::Arc::clone(&broker);
        async move { broker.close(PATIENCE).await }
    });
    // It closes once it takes nothing any more.
    let is_closing = async {
        while broker.publish(&topic, Message::new("b")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("closing", is_closing).await;
    delivery.reject("no").await.unwrap();
    assert!(within("closing", closing).await.unwrap().complete);
    let broker = open(server()).unwrap();
    let kept = broker.dead_letters(&group, 10).await.unwrap();
    assert_eq!(kept.first().expect("it is not kept").message.payload(), "a");
    assert!(broker.delete_group(&group).await.unwrap());
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
    broker.close(PATIENCE).await;
}

/// A queue under a delay queue's name that hands nothing on would keep a retry for good. One of the other queue type serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_delay_queue_that_differs_in_more_than_its_type_is_refused() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: virtual hosts");
        return;
    }
    let (topic, group) = names("ladder");
    let host = unique("ladder");
    ctl(&["add_vhost", &host]);
    ctl(&["set_permissions", "-p", &host, "guest", ".*", ".*", ".*"]);
    let url = format!("{}/{host}", server());
    let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let (classic, nowhere) = (("x-queue-type", text("classic")), ("x-dead-letter-exchange", text("")));
    let half_second = ("x-message-ttl", AMQPValue::LongLongInt(500));
    declare(&channel, "broker.retry.100ms", &[]).await;
    declare(&channel, "broker.retry.500ms", &[classic, half_second, nowhere]).await;
    let broker = open(&url).unwrap();
    let mut member = join(&*broker, &group).await;
    broker.publish(&topic, Message::new("a")).await.unwrap();
    let retry = next(&mut member).await.retry_after(Duration::from_millis(50));
    let error = within("retrying", retry).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    for word in ["broker.retry.100ms", "inequivalent arg", "x-message-ttl"] {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    assert_eq!(counts(&*broker, &group).await.retried, 0);
    let delivery = next(&mut member).await;
    assert_eq!(delivery.attempt(), 1);
    delivery.retry_after(Duration::from_millis(200)).await.unwrap();
    let delivery = next(&mut member).await;
    assert_eq!(delivery.attempt(), 2);
    delivery.ack().await.unwrap();
    assert_eq!(counts(&*broker, &group).await.retried, 1);
    connection.close(200, "OK".into()).await.unwrap();
    drop(member);
    broker.close(PATIENCE).await;
    ctl(&["delete_vhost", &host]);
}
