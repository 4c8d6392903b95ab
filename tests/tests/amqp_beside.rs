//! Groups beside others on a real RabbitMQ: who makes one while another wants to, what does not reach it, what becomes of its
//! messages when somebody deletes it; and what is full, or away, for a while.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod amqp_server;

use std::time::Duration;

use amqp_server::{TURN, address, at, ctl, join, names, next, open, open_as_it_is, ours, raw, server, unique, within};
use broker_amqp::lapin::options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use broker_amqp::lapin::types::{AMQPValue, FieldTable};
use broker_core::{
    Broker, BrokerExt, Delivery, ErrorKind, Group, GroupOptions, Message, PublisherOptions, RetryPolicy, State,
    Subscribe, Timestamp, Topic,
};
use broker_tests::{Fault, Proxy};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// Where its dead letters go.
fn dead(group: &Group) -> Topic {
    Topic::new(format!("dead.{}", group.name)).unwrap()
}

/// A virtual host of its own on our server, with a limit; the URL's end. Deleted by its name.
fn limited(limit: &str) -> (String, String) {
    let vhost = unique("limited");
    ctl(&["add_vhost", &vhost]);
    ctl(&["set_permissions", "-p", &vhost, "guest", ".*", ".*", ".*"]);
    ctl(&["set_vhost_limits", "-p", &vhost, limit]);
    let url = format!("amqp://guest:guest@{}/{vhost}", address());
    (vhost, url)
}

/// Whoever begins to make a group may go away in the middle; others make it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_can_be_made_though_somebody_gave_up_making_it() {
    let _turn = TURN.lock().await;
    let brokers = [open(server()).unwrap(), open(server()).unwrap()];
    for broker in &brokers {
        broker.connect().await.unwrap();
    }
    let [hasty, patient] = &brokers;
    for round in 0..40 {
        let (_, group) = names("given-up");
        let making = hasty.create_group(&group, GroupOptions::new());
        let _ = timeout(Duration::from_micros(300 + round * 500), making).await;
        if let Err(error) = patient.create_group(&group, GroupOptions::new()).await {
            panic!("round {round}: {error}");
        }
        // Whatever of it is under way has ended, and the group goes for good.
        hasty.create_group(&group, GroupOptions::new()).await.unwrap();
        patient.delete_group(&group).await.unwrap();
    }
    for broker in brokers {
        broker.close(PATIENCE).await;
    }
}

/// Somebody makes a group and does not get on with it.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_another_to_make_a_group_is_told_so() {
    let _turn = TURN.lock().await;
    let (_, group) = names("busy");
    let (connection, channel) = raw().await;
    let queue = format!("broker.making:{group}");
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.as_str().into(), exclusive, FieldTable::default()).await.unwrap();
    let broker = open(server()).unwrap();
    let error = within("waiting", broker.create_group(&group, GroupOptions::new())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.message().contains(&queue) && error.message().contains("somebody else"), "{error}");
    connection.close(200, "OK".into()).await.unwrap();
    assert!(broker.create_group(&group, GroupOptions::new()).await.unwrap());
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

/// Dead letters go to their topic and to what keeps them, and to nobody who asked for other topics.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_reaches_no_filter_that_its_topic_does_not_match() {
    let _turn = TURN.lock().await;
    // An exchange of its own, since the filters are wide.
    let exchange = unique("apart");
    let broker = open(&format!("{}?exchange={exchange}", server())).unwrap();
    let (topic, group) = names("crossed");
    let own = dead(&group);
    // `suite.…`, the dead letter, and its group's name with any number of segments.
    let filters = ["*", "*.*", "*.*.*", "*.*.*.*", "*.*.>", ">"];
    let wide = |filter: &str| Group::new("wide".parse().unwrap(), filter.parse().unwrap());
    let mut wides = Vec::new();
    for filter in filters {
        wides.push((wide(filter), join(broker.as_ref(), &wide(filter)).await));
    }
    let mut member = join(broker.as_ref(), &group).await;
    broker.publish(&topic, Message::new("first")).await.unwrap();
    next(&mut member).await.reject("no").await.unwrap();
    // What comes after it shows what came before it.
    let last = Topic::new("last.a.b.c").unwrap();
    for end in ["last", "last.a", "last.a.b", last.as_str()] {
        broker.publish(&Topic::new(end).unwrap(), Message::new("end")).await.unwrap();
    }
    for (wide, reader) in &mut wides {
        let expected = [topic.as_str(), own.as_str(), "last", "last.a", "last.a.b", last.as_str()];
        for expected in expected.into_iter().filter(|one| wide.filter.matches(&Topic::new(*one).unwrap())) {
            let delivery = next(reader).await;
            assert_eq!(delivery.topic().as_str(), expected, "of filter {}", wide.filter);
            delivery.ack().await.unwrap();
        }
    }
    assert_eq!(broker.dead_letters(&group, 10).await.unwrap().len(), 1);
    for (group, reader) in wides {
        within("leaving", reader.close()).await.unwrap();
        assert!(broker.delete_group(&group).await.unwrap());
    }
    drop(member);
    assert!(broker.delete_group(&group).await.unwrap());
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 1);
    broker.close(PATIENCE).await;
    let (connection, channel) = raw().await;
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
}

/// A keeping queue of an earlier version, bound to the exchange of topics by a key of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeping_queue_that_is_there_keeps_each_dead_letter_once() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("earlier");
    let broker = open(server()).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    let (connection, channel) = raw().await;
    let queue = format!("broker.dead:{group}");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(100_000));
    arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(256 << 20));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
    channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), arguments).await.unwrap();
    let (from, key) = ("broker".into(), format!("broker-dead.{group}"));
    let bind = QueueBindOptions::default();
    channel.queue_bind(queue.as_str().into(), from, key.into(), bind, FieldTable::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
    let reading = Group::new("reader".parse().unwrap(), (&dead(&group)).into());
    let mut reader = join(broker.as_ref(), &reading).await;
    for body in ["first", "second"] {
        broker.publish(&topic, Message::new(body)).await.unwrap();
        next(&mut member).await.reject("no").await.unwrap();
        let letter = next(&mut reader).await;
        assert_eq!(letter.message().payload(), body);
        letter.ack().await.unwrap();
    }
    let kept: Vec<_> = broker.dead_letters(&group, 10).await.unwrap();
    assert_eq!(kept.iter().map(|letter| letter.message.payload()).collect::<Vec<_>>(), ["first", "second"]);
    drop(member);
    within("leaving", reader.close()).await.unwrap();
    assert!(broker.delete_group(&reading).await.unwrap());
    assert!(broker.delete_group(&group).await.unwrap());
    assert_eq!(broker.purge_dead_letters(&group).await.unwrap(), 2);
    broker.close(PATIENCE).await;
}

/// Who holds messages of a group that was deleted has nothing to settle, and is not told that they come back.
#[tokio::test(flavor = "multi_thread")]
async fn settling_what_was_deleted_has_no_effect() {
    let _turn = TURN.lock().await;
    for by_itself in [true, false] {
        let (topic, group) = names("emptied");
        let (broker, other) = (open(server()).unwrap(), open(server()).unwrap());
        let mut member = join(broker.as_ref(), &group).await;
        for _ in 0..8 {
            broker.publish(&topic, Message::new("x")).await.unwrap();
        }
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(next(&mut member).await);
        }
        let deleter = if by_itself { &broker } else { &other };
        assert!(deleter.delete_group(&group).await.unwrap());
        // At once, and when it is known.
        let late = held.split_off(4);
        settle_in_every_way(held).await;
        let error = within("the end", member.next()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        settle_in_every_way(late).await;
        assert!(broker.close(PATIENCE).await.complete);
        let _ = other.purge_dead_letters(&group).await;
        other.close(PATIENCE).await;
    }
}

/// A group may be deleted while a member has no connection: it does not come back to make it anew.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_when_its_group_was_deleted_ends() {
    let _turn = TURN.lock().await;
    for (kind, ordered) in [("queue_type=quorum", false), ("queue_type=classic", true), ("ordered_queues=3", true)] {
        let (topic, group) = names("away");
        let proxy = Proxy::start(address()).await.unwrap();
        let away = open(&format!("{}?{kind}", at(&proxy.address().to_string(), None))).unwrap();
        let other = open(&format!("{}?{kind}", server())).unwrap();
        let options = GroupOptions::new().with_ordered(ordered);
        let joining = Subscribe::group(group.name.clone()).with_options(options.clone());
        let mut member = away.subscribe(&group.filter, joining).await.unwrap();
        other.publish(&topic, Message::new("held").with_key("k")).await.unwrap();
        let held = next(&mut member).await;
        proxy.set(Fault::Refuse);
        proxy.cut();
        assert!(other.delete_group(&group).await.unwrap());
        proxy.set(Fault::None);
        let error = within("the end", member.next()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.message().contains(&group.to_string()), "{error}");
        let settled = within("settling", held.ack()).await;
        // Of several queues another may have been missed first.
        assert!(settled.is_ok() || kind == "ordered_queues=3", "{settled:?}");
        drop(member);
        away.close(PATIENCE).await;
        assert!(other.create_group(&group, options).await.unwrap(), "{kind}: its queue came back");
        assert!(other.delete_group(&group).await.unwrap());
        other.close(PATIENCE).await;
    }
}

/// Nor while it is on its way back: what it found at first, and declares, may be deleted in between.
#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_while_its_group_is_deleted_ends() {
    let _turn = TURN.lock().await;
    let other = open(server()).unwrap();
    let rounds = (0..24).map(async |round| {
        let (_, group) = names("back");
        let ordered = round % 2 == 0;
        let kind = if ordered { "ordered_queues=2" } else { "queue_type=quorum" };
        let proxy = Proxy::start(address()).await.unwrap();
        let away = open(&format!("{}?{kind}", at(&proxy.address().to_string(), None))).unwrap();
        let joining = Subscribe::group(group.name.clone()).with_options(GroupOptions::new().with_ordered(ordered));
        let mut member = away.subscribe(&group.filter, joining).await.unwrap();
        // Slow enough that the deletion fits between a question of the member's and the next.
        proxy.set(Fault::Delay(Duration::from_millis(40)));
        proxy.cut();
        tokio::time::sleep(Duration::from_millis(50 * round)).await;
        assert!(other.delete_group(&group).await.unwrap());
        let error = within("the end", member.next()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "round {round}: {error}");
        drop(member);
        away.close(PATIENCE).await;
        let again = GroupOptions::new().with_ordered(ordered);
        assert!(other.create_group(&group, again).await.unwrap(), "round {round}: its queue came back");
        assert!(other.delete_group(&group).await.unwrap());
    });
    futures_util::future::join_all(rounds).await;
    other.close(PATIENCE).await;
}

/// And of one that was made again with other queues, it makes none of its own beside them.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_when_its_group_was_made_with_other_queues_ends() {
    let _turn = TURN.lock().await;
    let (_, group) = names("away-anew");
    let proxy = Proxy::start(address()).await.unwrap();
    let away = open(&at(&proxy.address().to_string(), None)).unwrap();
    let other = open(&format!("{}?ordered_queues=3", server())).unwrap();
    let mut member = join(&away, &group).await;
    proxy.set(Fault::Refuse);
    proxy.cut();
    assert!(other.delete_group(&group).await.unwrap());
    assert!(other.create_group(&group, GroupOptions::new().with_ordered(true)).await.unwrap());
    proxy.set(Fault::None);
    let error = within("the end", member.next()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let (connection, channel) = raw().await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    assert!(channel.queue_declare(group.to_string().into(), passive, FieldTable::default()).await.is_err());
    let _ = connection.close(200, "".into()).await;
    drop(member);
    away.close(PATIENCE).await;
    assert!(other.delete_group(&group).await.unwrap());
    other.close(PATIENCE).await;
}

/// A server whose data was wiped, or another of the list: what nobody deleted is made again by those who come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_the_server_has_lost_is_made_again_whole() {
    let _turn = TURN.lock().await;
    for (kind, queues) in [("queue_type=quorum", ""), ("ordered_queues=3", "/0 /1 /2")] {
        let (topic, group) = names("lost");
        let proxy = Proxy::start(address()).await.unwrap();
        let away = open(&format!("{}?{kind}", at(&proxy.address().to_string(), None))).unwrap();
        let other = open(&format!("{}?{kind}", server())).unwrap();
        let options = GroupOptions::new().with_ordered(!queues.is_empty());
        let options = options.with_retry(RetryPolicy::default().with_max_attempts(7).unwrap());
        let joining = Subscribe::group(group.name.clone()).with_options(options.clone());
        let mut member = away.subscribe(&group.filter, joining).await.unwrap();
        other.publish(&topic, Message::new("1").with_key("k")).await.unwrap();
        next(&mut member).await.ack().await.unwrap();
        proxy.set(Fault::Refuse);
        proxy.cut();
        let (connection, channel) = raw().await;
        for queue in queues.split(' ').map(|lane| format!("{group}{lane}")).chain([format!("broker.settings:{group}")])
        {
            channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
        }
        connection.close(200, "".into()).await.unwrap();
        proxy.set(Fault::None);
        // Until it is bound again, a message has nowhere to go.
        let again = PublisherOptions::new().with_require_route(true);
        let publisher = other.publisher(&topic, again).unwrap();
        within("the group", async {
            while publisher.publish(Message::new("2").with_key("k")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        let delivery = next(&mut member).await;
        assert_eq!(delivery.message().payload().as_ref(), b"2");
        delivery.ack().await.unwrap();
        // Its settings, too: who joins with others is told.
        let third = open(&format!("{}?{kind}", server())).unwrap();
        let other_retry = options.clone().with_retry(RetryPolicy::default().with_max_attempts(3).unwrap());
        let error = third.create_group(&group, other_retry).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(!third.create_group(&group, options).await.unwrap(), "{kind}: it stands");
        drop(member);
        away.close(PATIENCE).await;
        assert!(other.delete_group(&group).await.unwrap());
        for broker in [other, third] {
            broker.close(PATIENCE).await;
        }
    }
}

/// Whoever deletes a group while others join it leaves it whole or not at all: never a queue without its settings.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_deleted_while_others_join_it_stands_or_does_not() {
    let _turn = TURN.lock().await;
    let brokers = [open(server()).unwrap(), open(server()).unwrap(), open(server()).unwrap()];
    let retries = |most| GroupOptions::new().with_retry(RetryPolicy::default().with_max_attempts(most).unwrap());
    let [owner, joiner, deleter] = &brokers;
    let (mut stood, mut gone) = (0, 0);
    for round in 0..60 {
        let (_, group) = names("raced");
        assert!(owner.create_group(&group, retries(3)).await.unwrap());
        let joining = async {
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..12_000))).await;
            joiner.create_group(&group, retries(3)).await
        };
        let deleting = async {
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..12_000))).await;
            deleter.delete_group(&group).await
        };
        let (joined, deleted) = within("joining", futures_util::future::join(joining, deleting)).await;
        assert!(deleted.unwrap(), "round {round}: it was there");
        let joined = match joined {
            Ok(joined) => joined,
            // The server (3.10) may trip over a queue that is declared while it is deleted, and nobody can tell what it made of it.
            Err(error) => {
                assert!(error.is_retryable(), "round {round}: {error}");
                owner.delete_group(&group).await.unwrap();
                continue;
            }
        };
        match owner.create_group(&group, retries(5)).await {
            Ok(true) if !joined => gone += 1,
            Err(error) if joined && error.kind() == ErrorKind::Conflict => stood += 1,
            other => panic!("round {round}: made anew: {joined}, and then {other:?}"),
        }
        assert!(owner.delete_group(&group).await.unwrap());
    }
    println!("joined and then deleted: {gone}, deleted and then made: {stood}");
    assert!(gone + stood > 0, "no round was decided");
    for broker in brokers {
        broker.close(PATIENCE).await;
    }
}

/// What a process knows of a group does not outlive it: another may have made one of the name since.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_made_anew_is_taken_as_it_is() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("anew");
    let (broker, other) = (open(server()).unwrap(), open(server()).unwrap());
    let retries = |most| {
        let retry = RetryPolicy::default().with_max_attempts(most).unwrap();
        GroupOptions::new().with_retry(retry.with_backoff(Duration::ZERO, Duration::from_millis(1), 2.0).unwrap())
    };
    assert!(broker.create_group(&group, retries(1)).await.unwrap());
    assert!(other.delete_group(&group).await.unwrap());
    assert!(other.create_group(&group, retries(3)).await.unwrap());
    let mut member = join(&*broker, &group).await;
    broker.publish(&topic, Message::new("x")).await.unwrap();
    for attempt in 1..=3 {
        let delivery = next(&mut member).await;
        assert_eq!(delivery.attempt(), attempt);
        delivery.retry().await.unwrap();
    }
    drop(member);
    assert!(other.delete_group(&group).await.unwrap());
    let _ = other.purge_dead_letters(&group).await;
    for broker in [broker, other] {
        broker.close(PATIENCE).await;
    }
}

async fn settle_in_every_way(held: Vec<Delivery>) {
    for (way, delivery) in held.into_iter().enumerate() {
        let settled = match way % 4 {
            0 => delivery.ack(),
            1 => delivery.retry(),
            2 => delivery.reject("no"),
            _ => delivery.release(),
        };
        if let Err(error) = within("settling", settled).await {
            panic!("{way}: {error}");
        }
    }
}

/// A virtual host that lets nobody in for a while: members wait until it does, and publishes are worth a retry.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_connections_ends_no_subscription() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: limits of a virtual host");
        return;
    }
    let (vhost, url) = limited(r#"{"max-connections": 100}"#);
    let (topic, group) = names("shut-out");
    let broker = open(&url).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    let mut alone = broker.subscribe(&group.filter, Subscribe::new()).await.unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    for reader in [&mut member, &mut alone] {
        next(reader).await.ack().await.unwrap();
    }
    ctl(&["set_vhost_limits", "-p", &vhost, r#"{"max-connections": 0}"#]);
    ctl(&["close_all_connections", "--vhost", &vhost, "the test closes them"]);
    let error = within("publishing", broker.publish(&topic, Message::new("shut out"))).await.unwrap_err();
    assert!(error.is_retryable() && error.message().contains("connection limit"), "{error}");
    let status = within("asking", broker.status()).await.unwrap();
    assert_eq!(status.state, State::Connecting);
    assert!(status.last_error.as_ref().is_some_and(|error| error.contains("connection limit")), "{status:?}");
    ctl(&["clear_vhost_limits", "-p", &vhost]);
    let published = async {
        while let Err(error) = broker.publish(&topic, Message::new("after")).await {
            assert!(error.is_retryable(), "{error}");
        }
    };
    within("publishing again", published).await;
    let delivery = next(&mut member).await;
    assert_eq!(delivery.message().payload(), "after");
    delivery.ack().await.unwrap();
    assert!(broker.close(PATIENCE).await.complete);
    ctl(&["delete_vhost", &vhost]);
}

/// A user with all the channels it may have: who is there already comes back as soon as it may.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_channels_ends_no_subscription() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: no user can be made that has a limit");
        return;
    }
    let name = unique("limited");
    ctl(&["add_user", &name, "secret"]);
    ctl(&["set_permissions", &name, ".*", ".*", ".*"]);
    let proxy = Proxy::start(address()).await.unwrap();
    let limited = open(&at(&proxy.address().to_string(), Some(&format!("{name}:secret")))).unwrap();
    let broker = open(server()).unwrap();
    let (topic, group) = names("channels");
    let mut member = join(limited.as_ref(), &group).await;
    ctl(&["set_user_limits", &name, r#"{"max-channels": 0}"#]);
    proxy.cut();
    let refused = async {
        loop {
            // That the connection was cut may be what it hears of first, or that it takes long to come back.
            let error = limited.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout), "{error}");
            if error.message().contains("set_user_limits") {
                break;
            }
        }
    };
    within("being refused", refused).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    ctl(&["clear_user_limits", &name, "max-channels"]);
    broker.publish(&topic, Message::new("x")).await.unwrap();
    next(&mut member).await.ack().await.unwrap();
    within("leaving", member.close()).await.unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    for broker in [broker, limited] {
        broker.close(PATIENCE).await;
    }
    ctl(&["delete_user", &name]);
}

/// A virtual host with all the queues it may have.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_queues_is_said() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: limits of a virtual host");
        return;
    }
    let (vhost, url) = limited(r#"{"max-queues": 2}"#);
    let (topic, group) = names("full");
    let broker = open(&url).unwrap();
    // The limit is met at each step of making one.
    let mut errors = vec![within("making", broker.create_group(&group, GroupOptions::new())).await.unwrap_err()];
    for limit in [r#"{"max-queues": 2}"#, r#"{"max-queues": 0}"#] {
        ctl(&["set_vhost_limits", "-p", &vhost, limit]);
        let (_, another) = names("full");
        errors.push(within("making", broker.create_group(&another, GroupOptions::new())).await.unwrap_err());
    }
    errors.push(broker.subscribe(&group.filter, Subscribe::new()).await.map(drop).unwrap_err());
    let late = Timestamp::past(Duration::from_secs(1));
    let delayed = broker.publish(&topic, Message::new("later").with_deliver_at(late));
    errors.push(within("publishing", delayed).await.unwrap_err());
    ctl(&["clear_vhost_limits", "-p", &vhost]);
    assert!(broker.create_group(&group, GroupOptions::new()).await.unwrap());
    broker.close(PATIENCE).await;
    ctl(&["delete_vhost", &vhost]);
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.message().contains("queue limit in vhost"), "{error}");
        assert!(error.message().contains("set_vhost_limits"), "{error}");
    }
}

/// Many more than can be under way at once wait for their turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_any_number_is_published() {
    let _turn = TURN.lock().await;
    let (topic, _) = names("many");
    let broker = open_as_it_is(&format!("{}?publish_timeout=3m", server())).unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
    let messages = (0..120_000).map(|_| Message::new("x")).collect();
    let outcomes = timeout(Duration::from_secs(200), publisher.publish_batch(messages)).await.unwrap().unwrap();
    let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());
    broker.close(PATIENCE).await;
}

/// So many publishes wait that there is no room for more: those wait for room, in order, and at their timeout say what is full.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_for_which_there_is_no_room_waits_for_it() {
    let _turn = TURN.lock().await;
    let (topic, group) = names("crowded");
    let broker = open(server()).unwrap();
    let mut member = join(broker.as_ref(), &group).await;
    let proxy = Proxy::start(address()).await.unwrap();
    proxy.set(Fault::Refuse);
    // 512 MiB that share their memory.
    let large = Message::new(vec![b'x'; 1 << 20]);
    for (patience, is_in_time) in [("2s", false), ("60s", true)] {
        let url = at(&proxy.address().to_string(), None);
        let url = format!("{url}?publish_timeout={patience}&max_reconnect_wait=1s");
        let crowded = open_as_it_is(&url).unwrap();
        let publisher = crowded.publisher(&topic, PublisherOptions::new()).unwrap();
        let crowd: Vec<_> = (0..512).map(|_| publisher.publish(large.clone())).collect();
        let mut late = ["a", "b", "c"].map(|body| publisher.publish(Message::new(body)));
        if is_in_time {
            assert!(timeout(Duration::from_millis(300), &mut late[0]).await.is_err(), "it did not wait");
            // They are withdrawn, and make room.
            drop(crowd);
            proxy.set(Fault::None);
            for publish in late {
                within("publishing", publish).await.unwrap();
            }
            for body in ["a", "b", "c"] {
                let delivery = next(&mut member).await;
                assert_eq!(delivery.message().payload(), body);
                delivery.ack().await.unwrap();
            }
        } else {
            for publish in late {
                let error = within("publishing", publish).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                let words = ["512 MiB", "no room", "not sent", "not reached"];
                assert!(error.is_retryable() && words.iter().all(|word| error.message().contains(word)), "{error}");
            }
        }
        crowded.close(PATIENCE).await;
    }
    drop(member);
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

/// Whoever looks at a broker whose server is away learns that it is.
#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_that_the_server_is_away() {
    let _turn = TURN.lock().await;
    let (_, group) = names("away");
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open(&at(&proxy.address().to_string(), None)).unwrap();
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    assert_eq!(broker.status().await.unwrap().group(&group).unwrap().state, State::Active);
    drop(proxy);
    let away = async {
        loop {
            let status = broker.status().await.unwrap();
            if status.state == State::Connecting {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let status = within("asking", away).await;
    let one = status.group(&group).unwrap();
    assert_eq!((one.state, one.lag), (State::Connecting, None), "{status:?}");
    assert!(one.last_error.is_some() && status.last_error.is_some(), "{status:?}");
    broker.close(Duration::from_secs(1)).await;
    let other = open(server()).unwrap();
    assert!(other.delete_group(&group).await.unwrap());
    other.close(PATIENCE).await;
}

/// A runtime that ends before it has come to the tasks of a broker.
#[test]
fn nobody_waits_for_what_a_runtime_never_came_to() {
    let (topic, group) = names("unborn");
    let broker = open(server()).unwrap();
    let single = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = single();
    let under_way = {
        // The tasks that this starts have no turn.
        let _entered = first.enter();
        broker.publish(&topic, Message::new("under way"))
    };
    drop(first);
    single().block_on(async {
        let error = within("a publish under way", under_way).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        let error = within("joining", broker.create_group(&group, GroupOptions::new())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        within("closing", broker.close(PATIENCE)).await;
    });
}

/// Its connections go with the runtime that it was first used on: whoever waits is told, and so is who comes later.
#[test]
fn nobody_waits_for_a_broker_whose_runtime_has_ended() {
    let _turn = TURN.blocking_lock();
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (topic, group) = names("orphan");
    let proxy_runtime = runtime();
    let proxy = proxy_runtime.block_on(Proxy::start(address())).unwrap();
    let broker = open(&at(&proxy.address().to_string(), None)).unwrap();
    let first = runtime();
    let (mut member, held) = first.block_on(async {
        let mut member = join(broker.as_ref(), &group).await;
        broker.publish(&topic, Message::new("held")).await.unwrap();
        let held = next(&mut member).await;
        (member, held)
    });
    proxy.set(Fault::Stall);
    let under_way = {
        let _entered = first.enter();
        broker.publish(&topic, Message::new("under way"))
    };
    drop(first);
    runtime().block_on(async {
        let outcomes = [
            ("under way", within("a publish under way", under_way).await.map(drop)),
            ("a publish", within("a publish", broker.publish(&topic, Message::new("late"))).await.map(drop)),
            ("receiving", within("receiving", member.next()).await.map(drop)),
            ("settling", within("settling", held.ack()).await),
            ("joining", within("joining", broker.create_group(&group, GroupOptions::new())).await.map(drop)),
        ];
        for (what, outcome) in outcomes {
            let error = outcome.expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Closed, "{what}: {error}");
        }
        let error = broker.publish(&topic, Message::new("late")).await.unwrap_err();
        assert!(error.message().contains("runtime"), "{error}");
        within("leaving", member.close()).await.unwrap();
        assert_eq!(within("asking", broker.status()).await.unwrap().state, State::Closed);
        assert!(!within("closing", broker.close(PATIENCE)).await.complete);
        let other = open(server()).unwrap();
        assert!(other.delete_group(&group).await.unwrap());
        other.close(PATIENCE).await;
    });
}
