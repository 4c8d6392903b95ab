//! What an operator relies on, on a real RabbitMQ: errors that name what is wrong, queues that are adopted,
//! hosts tried in turn, TLS with client certificates, names in the server's own listing.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

mod amqp_server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use amqp_server::{TURN, address, at, ctl, fault, open, ours, printed, raw, server, unique, within};
use broker_amqp::lapin::options::{
    BasicGetOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use broker_amqp::lapin::types::{AMQPValue, FieldTable};
use broker_amqp::lapin::{Channel, ExchangeKind};
use broker_core::{
    Broker, BrokerExt, ErrorKind, Group, GroupOptions, Message, PublisherOptions, Subscribe, Subscription, Timestamp,
    Topic,
};
use broker_tests::{Fault, Proxy};
use parking_lot::Mutex;
use tokio::time::timeout;

fn topic(name: &str) -> Topic {
    Topic::new(format!("suite.{}", unique(name))).unwrap()
}

fn group(name: &str, topic: &Topic) -> Group {
    Group::new(name.parse().unwrap(), topic.into())
}

const PATIENCE: Duration = Duration::from_secs(10);

async fn declare(channel: &Channel, queue: &str, options: QueueDeclareOptions, arguments: &[(&str, AMQPValue)]) {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    channel.queue_declare(queue.into(), options, table).await.unwrap();
}

async fn delete(channel: &Channel, queue: &str) {
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
}

/// The server closes the channel over a message it refuses, and with it over all that are under way beside
/// it. The one is told why, the others arrive.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_message_fails_alone() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: no user can be made who may publish to some topics only");
        return;
    }
    let name = unique("writer");
    ctl(&["add_user", &name, "secret"]);
    ctl(&["set_permissions", &name, ".*", ".*", ".*"]);
    ctl(&["set_topic_permissions", &name, "broker", "^suite[.]allowed", ".*"]);
    let broker = open(&at(address(), Some(&format!("{name}:secret")))).unwrap();
    let allowed = Topic::new(format!("suite.allowed-{name}")).unwrap();
    let group = group("refused", &allowed);
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    let (good, bad) = (
        broker.publisher(&allowed, PublisherOptions::new()),
        broker.publisher(&topic("forbidden"), PublisherOptions::new()),
    );
    let (good, bad) = (good.unwrap(), bad.unwrap());
    let mut publishes = Vec::new();
    for number in 0_u32..60 {
        publishes.push(good.publish(Message::new(number.to_be_bytes().to_vec())));
        if number % 20 == 10 {
            publishes.push(bad.publish(Message::new("no")));
        }
    }
    let outcomes = within("publishing", futures_util::future::join_all(publishes)).await;
    let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert_eq!(refused.len(), 3, "{refused:?}");
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(!error.is_retryable() && error.message().contains("ACCESS_REFUSED"), "{error}");
    }
    // In order, each at least once.
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    let mut next = 0;
    while next < 60 {
        let delivery = within("receiving", member.next()).await.unwrap().unwrap();
        let number = u32::from_be_bytes(delivery.message().payload().as_ref().try_into().unwrap());
        assert!(number <= next, "{number} overtook {next}");
        next = next.max(number + 1);
        delivery.ack().await.unwrap();
    }
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
    ctl(&["delete_user", &name]);
}

/// A full queue that refuses: a nack is an error of the right kind, and of that message alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_nack_is_an_error_worth_a_retry() {
    let _turn = TURN.lock().await;
    let (queue, topic) = (unique("full"), topic("full"));
    let (connection, channel) = raw().await;
    let full =
        [("x-max-length", AMQPValue::LongInt(2)), ("x-overflow", AMQPValue::LongString("reject-publish".into()))];
    declare(&channel, &queue, QueueDeclareOptions::durable(), &full).await;
    let group = group("full", &topic);
    let broker = open(&format!("{}?queue.{group}={queue}", server())).unwrap();
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    let mut outcomes = Vec::new();
    for _ in 0..4 {
        outcomes.push(broker.publish(&topic, Message::new("x")).await);
    }
    let refused: Vec<_> = outcomes.into_iter().filter_map(|outcome| outcome.err()).collect();
    assert!(!refused.is_empty(), "a queue of two took four");
    assert!(refused.iter().all(|error| error.kind() == ErrorKind::Unavailable && error.is_retryable()), "{refused:?}");
    assert!(refused.iter().all(|error| error.message().contains("full")), "{refused:?}");
    broker.close(PATIENCE).await;
    delete(&channel, &queue).await;
    connection.close(200, "OK".into()).await.unwrap();
}

/// A queue and an exchange that somebody else made, with arguments of their own: used as they are.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_is_adopted() {
    let _turn = TURN.lock().await;
    let (queue, exchange, topic) = (unique("legacy"), unique("house"), topic("adopted"));
    let (connection, channel) = raw().await;
    let transient = QueueDeclareOptions::default();
    declare(&channel, &queue, transient, &[("x-max-priority", AMQPValue::LongInt(3))]).await;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, FieldTable::default())
        .await
        .unwrap();
    let group = group("billing", &topic);
    let broker = open(&format!("{}?exchange={exchange}&queue.{group}={queue}", server())).unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&topic, Message::new("adopted")).await.unwrap();
    let delivery = within("receiving", member.next()).await.unwrap().unwrap();
    assert_eq!(delivery.message().payload().as_ref(), b"adopted");
    delivery.ack().await.unwrap();
    broker.close(PATIENCE).await;
    // One that is to be adopted and is not there is not made.
    let broker = open(&format!("{}?exchange={exchange}&queue.{group}={queue}-none", server())).unwrap();
    let error = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.message().contains(&format!("{queue}-none")), "{error}");
    broker.close(PATIENCE).await;
    delete(&channel, &queue).await;
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
}

/// With `passive` nothing is declared: what is missing is `NotFound`, and what is there is used.
#[tokio::test(flavor = "multi_thread")]
async fn passive_declares_nothing() {
    let _turn = TURN.lock().await;
    let (exchange, topic) = (unique("passive"), topic("passive"));
    let group = group("passive", &topic);
    let (connection, channel) = raw().await;
    let broker = open(&format!("{}?exchange={exchange}&passive=true", server())).unwrap();
    let error = within("publishing", broker.publish(&topic, Message::new("x"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.message().contains(&exchange), "{error}");
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, FieldTable::default())
        .await
        .unwrap();
    let error = broker.create_group(&group, GroupOptions::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let queue = group.to_string();
    declare(&channel, &queue, QueueDeclareOptions::durable(), &[]).await;
    let (key, options) = (topic.as_str().into(), QueueBindOptions::default());
    channel
        .queue_bind(queue.as_str().into(), exchange.as_str().into(), key, options, FieldTable::default())
        .await
        .unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    within("publishing", broker.publish(&topic, Message::new("x"))).await.unwrap();
    within("receiving", member.next()).await.unwrap().unwrap().ack().await.unwrap();
    broker.close(PATIENCE).await;
    delete(&channel, &queue).await;
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
}

/// What was declared otherwise is a conflict that says which argument differs.
#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_names_the_argument() {
    let _turn = TURN.lock().await;
    let topic = topic("conflict");
    let group = group("conflict", &topic);
    let quorum = open(&format!("{}?queue_type=quorum", server())).unwrap();
    quorum.create_group(&group, GroupOptions::new()).await.unwrap();
    let classic = open(&format!("{}?queue_type=classic", server())).unwrap();
    let error = classic.create_group(&group, GroupOptions::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.message().contains("x-queue-type") && error.message().contains(&group.to_string()), "{error}");
    let error = quorum.create_group(&group, GroupOptions::new().with_ordered(true)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.message().contains("ordered"), "{error}");

    let exchange = unique("fanout");
    let (connection, channel) = raw().await;
    channel
        .exchange_declare(
            exchange.as_str().into(),
            ExchangeKind::Fanout,
            ExchangeDeclareOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let broker = open(&format!("{}?exchange={exchange}", server())).unwrap();
    let error = within("publishing", broker.publish(&topic, Message::new("x"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.message().contains("inequivalent arg 'type'"), "{error}");
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
    assert!(quorum.delete_group(&group).await.unwrap());
    for broker in [quorum, classic, broker] {
        broker.close(PATIENCE).await;
    }
}

/// An exchange that is deleted under a publisher is made again, and the message goes through.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_exchange_is_made_again() {
    let _turn = TURN.lock().await;
    let (exchange, topic) = (unique("deleted"), topic("deleted"));
    let broker = open(&format!("{}?exchange={exchange}", server())).unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    let (connection, channel) = raw().await;
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    let receipt = within("publishing", broker.publish(&topic, Message::new("after"))).await.unwrap();
    assert_eq!(receipt.routed, Some(false));
    broker.close(PATIENCE).await;
    channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    connection.close(200, "OK".into()).await.unwrap();
}

/// Hosts are tried in turn, and when the one is lost, the other takes over.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_tried_in_turn() {
    let _turn = TURN.lock().await;
    let (one, other) = (Proxy::start(address()).await.unwrap(), Proxy::start(address()).await.unwrap());
    one.set(Fault::Refuse);
    let broker = open(&at(&format!("{},{}", one.address(), other.address()), None)).unwrap();
    let topic = topic("hosts");
    broker.publish(&topic, Message::new("other")).await.unwrap();
    assert!(one.accepted() > 0 && other.accepted() > 0, "both were tried");
    one.set(Fault::None);
    other.set(Fault::Refuse);
    other.cut();
    let before = one.accepted();
    within("publishing", broker.publish(&topic, Message::new("one"))).await.unwrap();
    assert!(one.accepted() > before);
    broker.close(PATIENCE).await;
}

/// A connection on which nothing comes any more is given up after two heartbeats, and made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_given_up() {
    let _turn = TURN.lock().await;
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open(&format!("{}?heartbeat=1s", at(&proxy.address().to_string(), None))).unwrap();
    let topic = topic("silent");
    let group = group("silent", &topic);
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    let before = proxy.accepted();
    proxy.set(Fault::HalfOpen);
    within("noticing", async {
        while proxy.accepted() == before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    proxy.set(Fault::None);
    proxy.cut();
    within("publishing", broker.publish(&topic, Message::new("x"))).await.unwrap();
    within("receiving", member.next()).await.unwrap().unwrap().ack().await.unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

/// Deliveries are a sign of life as good as any other: where nothing else comes, the connection is not given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_on_which_only_deliveries_come_stands() {
    let _turn = TURN.lock().await;
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open(&format!("{}?heartbeat=1s", at(&proxy.address().to_string(), None))).unwrap();
    let elsewhere = open(server()).unwrap();
    let topic = topic("lively");
    let group = group("lively", &topic);
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    let before = proxy.accepted();
    let until = tokio::time::Instant::now() + Duration::from_secs(5);
    while tokio::time::Instant::now() < until {
        within("publishing", elsewhere.publish(&topic, Message::new("x"))).await.unwrap();
        within("receiving", member.next()).await.unwrap().unwrap().ack().await.unwrap();
        // The server sends a heartbeat where it has sent nothing for half a second.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(proxy.accepted(), before);
    assert!(broker.delete_group(&group).await.unwrap());
    elsewhere.close(PATIENCE).await;
    broker.close(PATIENCE).await;
}

/// What is unconfirmed when connections are cut is sent again, in order: seen by their first arrival,
/// messages are in the order of the calls.
#[tokio::test(flavor = "multi_thread")]
async fn replays_keep_the_order() {
    let _turn = TURN.lock().await;
    const COUNT: u32 = 5_000;
    let proxy = Proxy::start(address()).await.unwrap();
    let broker = open(&at(&proxy.address().to_string(), None)).unwrap();
    let topic = topic("replayed");
    let group = group("replayed", &topic);
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
    let mut publishes = std::collections::VecDeque::new();
    for number in 0..COUNT {
        publishes.push_back(publisher.publish(Message::new(number.to_be_bytes().to_vec())));
        if publishes.len() > 500 {
            within("publishing", publishes.pop_front().unwrap()).await.unwrap();
        }
        if number % 1_000 == 700 {
            proxy.cut();
        }
    }
    for publish in publishes {
        within("publishing", publish).await.unwrap();
    }
    let reader = open(server()).unwrap();
    let mut member = reader.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    let (mut next, mut again) = (0, 0);
    while next < COUNT {
        let delivery = within("receiving", member.next()).await.unwrap().unwrap();
        let number = u32::from_be_bytes(delivery.message().payload().as_ref().try_into().unwrap());
        assert!(number <= next, "{number} came before {next}");
        if number == next {
            next += 1
        } else {
            again += 1
        }
        delivery.ack().await.unwrap();
    }
    println!("{again} came again");
    assert!(reader.delete_group(&group).await.unwrap());
    reader.close(PATIENCE).await;
    broker.close(PATIENCE).await;
}

/// While publishers are blocked, a lost connection and `close` are as bounded as ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_publisher_can_be_cut_and_closed() {
    let _turn = TURN.lock().await;
    let proxy = Proxy::start(address()).await.unwrap();
    let url = format!("{}?publish_timeout=20s", at(&proxy.address().to_string(), None));
    let (broker, second) = (amqp_server::open_as_it_is(&url).unwrap(), open(server()).unwrap());
    let topic = topic("blocked");
    let group = group("blocked", &topic);
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    second.publish(&topic, Message::new("before")).await.unwrap();
    if !fault("block").await {
        return;
    }
    let (held, lost) = (broker.publish(&topic, Message::new("held")), second.publish(&topic, Message::new("lost")));
    let held = tokio::spawn(held);
    let lost = tokio::spawn(lost);
    tokio::time::sleep(Duration::from_millis(500)).await;
    proxy.cut();
    let closed = within("closing", second.close(Duration::from_secs(1))).await;
    let failed = within("the publish of a closed broker", lost).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let waiting = !held.is_finished();
    fault("unblock").await;
    assert!(!closed.complete || failed.is_err(), "{closed:?} {failed:?}");
    assert!(waiting, "what is cut while blocked is sent again when the server takes it");
    within("the publish", held).await.unwrap().unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
}

/// A delay queue is declared when the first message needs it, on a connection that is not blocked: the message fails at
/// its publish timeout all the same, and so does one behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_delayed_publish_fails_in_time() {
    let _turn = TURN.lock().await;
    // No answer is waited for so long as this test waits.
    let broker = amqp_server::open_as_it_is(&format!("{}?connect_timeout=120s&publish_timeout=1s", server())).unwrap();
    let topic = topic("delayed-blocked");
    broker.publish(&topic, Message::new("before")).await.unwrap();
    if !fault("block").await {
        return;
    }
    // The server blocks a connection when it publishes.
    let first = timeout(PATIENCE, broker.publish(&topic, Message::new("first"))).await;
    let hour = Timestamp::now().after(Duration::from_secs(3600));
    let delayed = tokio::spawn(broker.publish(&topic, Message::new("delayed").with_deliver_at(hour)));
    let behind = tokio::spawn(broker.publish(&topic, Message::new("behind")));
    let (delayed, behind) = (timeout(PATIENCE, delayed).await, timeout(PATIENCE, behind).await);
    fault("unblock").await;
    let (delayed, behind) = (delayed.map(Result::unwrap), behind.map(Result::unwrap));
    for (name, outcome) in [("first", first), ("delayed", delayed), ("behind", behind)] {
        let error = outcome.unwrap_or_else(|_| panic!("{name} does not end")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {error}");
        assert!(error.message().contains("blocks"), "{name}: {error}");
    }
    broker.close(PATIENCE).await;
}

/// The server's listing says whose connections these are, and what each is for.
#[tokio::test(flavor = "multi_thread")]
async fn connections_are_named_after_the_service() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: the server's connections cannot be listed");
        return;
    }
    let name = unique("billing");
    let broker = open(&format!("{}?name={name}", server())).unwrap();
    broker.connect().await.unwrap();
    let listed = ctl(&["list_connections", "client_properties"]);
    for purpose in ["publish", "consume"] {
        assert!(listed.contains(&format!("{name} ({purpose})")), "{listed}");
    }
    broker.close(PATIENCE).await;
}

/// A listener that takes only clients with a certificate: with one that its authority has signed, a whole
/// conversation; without it, or without trusting the server's, a clear error.
#[tokio::test(flavor = "multi_thread")]
async fn tls_with_client_certificates() {
    let _turn = TURN.lock().await;
    let (Some(address), Some(folder)) = (printed("AMQP_TLS_ADDRESS"), printed("AMQP_TLS")) else {
        println!("no control: certificates of the server at AMQP_URL are not known");
        return;
    };
    let url = |parameters: &str| format!("amqps://guest:guest@{address}?{parameters}");
    let (ca, identity) = (format!("ca={folder}/ca.pem"), format!("cert={folder}/client.pem&key={folder}/client.key"));
    let topic = topic("tls");
    let group = group("tls", &topic);
    let broker = open(&url(&format!("{ca}&{identity}"))).unwrap();
    broker.connect().await.unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&topic, Message::new("sealed")).await.unwrap();
    let delivery = within("receiving", member.next()).await.unwrap().unwrap();
    assert_eq!(delivery.message().payload().as_ref(), b"sealed");
    delivery.ack().await.unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    assert!(broker.close(PATIENCE).await.complete);

    for (parameters, why) in [(ca.as_str(), "no certificate"), (identity.as_str(), "an unknown authority")] {
        let broker = open(&url(parameters)).unwrap();
        let error = within("connecting", broker.connect()).await.unwrap_err();
        println!("{why}: {error}");
        assert!(error.message().to_lowercase().contains("certificate"), "{why}: {error}");
        broker.close(PATIENCE).await;
    }
    let broker = open(&url(&format!("{ca}&cert=/nowhere/cert.pem&key=/nowhere/key.pem"))).unwrap();
    let error = within("connecting", broker.connect()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.message().contains("/nowhere/cert.pem"), "{error}");
    broker.close(PATIENCE).await;
}

/// The attempt is in the message: another process goes on counting.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_counted_across_restarts() {
    let _turn = TURN.lock().await;
    let topic = topic("attempts");
    let group = group("attempts", &topic);
    for attempt in 1..=3 {
        let broker = open(server()).unwrap();
        if attempt == 1 {
            broker.create_group(&group, GroupOptions::new()).await.unwrap();
            broker.publish(&topic, Message::new("x")).await.unwrap();
        }
        let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
        let delivery = within("receiving", member.next()).await.unwrap().unwrap();
        assert_eq!(delivery.attempt(), attempt);
        delivery.retry_after(Duration::from_millis(10)).await.unwrap();
        assert!(broker.close(PATIENCE).await.complete);
    }
    let (connection, channel) = raw().await;
    let broker = open(server()).unwrap();
    let queue = group.to_string();
    let got = within("the third retry", async {
        loop {
            let got = channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap();
            if let Some(got) = got {
                return got;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let properties = got.await.delivery.properties;
    let headers = properties.headers().clone().unwrap_or_default();
    assert_eq!(headers.inner().get("x-broker-attempt"), Some(&AMQPValue::LongLongInt(3)), "{headers:?}");
    assert!(broker.delete_group(&group).await.unwrap());
    broker.close(PATIENCE).await;
    connection.close(200, "OK".into()).await.unwrap();
}

/// Ordered by key over several queues: two members share the work, no key is overtaken, and group
/// administration sees one group.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_group_of_several_queues_is_shared_and_in_order() {
    let _turn = TURN.lock().await;
    const KEYS: u32 = 40;
    let topic = topic("lanes");
    let group = group("lanes", &topic);
    let brokers = [0, 1].map(|_| open(&format!("{}?ordered_queues=4&queue_type=classic", server())).unwrap());
    let [one, other] = &brokers;
    let ordered = GroupOptions::new().with_ordered(true);
    assert!(one.create_group(&group, ordered.clone()).await.unwrap());
    assert!(!other.create_group(&group, ordered.clone()).await.unwrap(), "it is there");
    let narrow = Subscribe::group(group.name.clone()).with_max_in_flight(3).unwrap();
    let error = one.subscribe(&group.filter, narrow).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");

    let seen = Arc::new(Mutex::new((BTreeMap::<u32, u32>::new(), [0_u32; 2])));
    let mut members = Vec::new();
    for (number, broker) in brokers.iter().enumerate() {
        let member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
        members.push(tokio::spawn(receive_in_order(number, member, Arc::clone(&seen))));
    }
    let publisher = one.publisher(&topic, PublisherOptions::new()).unwrap();
    let mut published = 0;
    // Until both have had their turn.
    within("sharing", async {
        while seen.lock().1.iter().any(|count| *count < 200) {
            let publishes = (0..KEYS).map(|key| {
                let body = [key.to_be_bytes(), u32::to_be_bytes(published)].concat();
                publisher.publish(Message::new(body).with_key(key.to_be_bytes().to_vec()))
            });
            for outcome in futures_util::future::join_all(publishes).await {
                assert_eq!(outcome.unwrap().routed, Some(true));
            }
            published += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    within("receiving", async {
        while !(0..KEYS).all(|key| seen.lock().0.get(&key) == Some(&published)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    println!("{published} of each of {KEYS} keys, by member {:?}", seen.lock().1);
    let status = one.status().await.unwrap();
    let status = status.group(&group).unwrap();
    assert_eq!((status.lag, status.members), (Some(0), Some(2)), "{status:?}");
    for broker in &brokers {
        assert!(broker.close(PATIENCE).await.complete);
    }
    for member in members {
        within("the end of a member", member).await.unwrap();
    }

    // Dead letters go back to the queue of their key; purging and deleting leave nothing.
    let broker = open(&format!("{}?queue_type=classic", server())).unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&topic, Message::new("dead").with_key("k")).await.unwrap();
    within("receiving", member.next()).await.unwrap().unwrap().reject("no use").await.unwrap();
    assert_eq!(broker.redrive(&group, 10).await.unwrap(), 1);
    let again = within("receiving", member.next()).await.unwrap().unwrap();
    assert_eq!((again.message().payload().as_ref(), again.attempt()), (&b"dead"[..], 1));
    again.ack().await.unwrap();
    member.close().await.unwrap();
    broker.publish(&topic, Message::new("left").with_key("k")).await.unwrap();
    assert_eq!(broker.purge_group(&group).await.unwrap(), 1);
    assert!(broker.delete_group(&group).await.unwrap());
    assert!(!broker.delete_group(&group).await.unwrap());
    broker.purge_dead_letters(&group).await.unwrap();
    broker.close(PATIENCE).await;
    if ours() {
        let left = ctl(&["list_queues", "name"]) + &ctl(&["list_exchanges", "name"]);
        // But the mark for members that are away, which goes by itself.
        let mark = format!("broker.deleted:{group}");
        let left: Vec<_> = left.lines().filter(|name| name.contains(group.to_string().as_str())).collect();
        assert_eq!(left, [mark]);
    }
}

/// What each key has come to, and what each member has received.
type Seen = Arc<Mutex<(BTreeMap<u32, u32>, [u32; 2])>>;

async fn receive_in_order(number: usize, mut member: Subscription, seen: Seen) {
    while let Some(delivery) = member.next().await.unwrap() {
        let body = delivery.message().payload();
        let part = |range: std::ops::Range<usize>| u32::from_be_bytes(body[range].try_into().unwrap());
        let (key, place) = (part(0..4), part(4..8));
        {
            let mut seen = seen.lock();
            let next = seen.0.entry(key).or_insert(0);
            assert_eq!(place, *next, "key {key} is out of order at member {number}");
            *next += 1;
            seen.1[number] += 1;
        }
        delivery.ack().await.unwrap();
    }
}

/// A queue of another kind of consumers is in the count: what they hold unacked, the management API tells.
#[tokio::test(flavor = "multi_thread")]
async fn the_management_api_tells_what_others_hold() {
    let _turn = TURN.lock().await;
    let Some(management) = printed("AMQP_MANAGEMENT") else {
        println!("no control: the management API of the server at AMQP_URL is not known");
        return;
    };
    let topic = topic("managed");
    let group = group("managed", &topic);
    let broker = open(&format!("{}?management={management}", server())).unwrap();
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    for _ in 0..5 {
        broker.publish(&topic, Message::new("x")).await.unwrap();
    }
    // Somebody who is not of this broker.
    let (connection, channel) = raw().await;
    for _ in 0..3 {
        let queue = group.to_string();
        channel.basic_get(queue.as_str().into(), BasicGetOptions::default()).await.unwrap().unwrap();
    }
    within("the server's statistics", async {
        loop {
            let status = broker.status().await.unwrap();
            let status = status.group(&group).unwrap();
            if (status.lag, status.in_flight) == (Some(5), Some(3)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let alone = open(server()).unwrap();
    assert!(!alone.create_group(&group, GroupOptions::new()).await.unwrap());
    let status = alone.status().await.unwrap();
    assert_eq!(status.group(&group).unwrap().in_flight, Some(0), "without it only our own are known");
    connection.close(200, "OK".into()).await.unwrap();

    // Where it cannot be asked, status says so and tells what it knows.
    let lame = open(&format!("{}?management=http://127.0.0.1:1", server())).unwrap();
    assert!(!lame.create_group(&group, GroupOptions::new()).await.unwrap());
    let status = lame.status().await.unwrap();
    let status = status.group(&group).unwrap();
    assert_eq!((status.lag, status.in_flight), (Some(5), Some(0)), "{status:?}");
    assert!(status.last_error.as_ref().is_some_and(|error| error.contains("management")), "{status:?}");
    assert!(broker.delete_group(&group).await.unwrap());
    for broker in [broker, alone, lame] {
        broker.close(PATIENCE).await;
    }
}
