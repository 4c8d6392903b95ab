//! The suite on a real RabbitMQ: the one that AMQP_URL names, or one of our own that
//! `tests/servers up amqp` starts.

mod amqp_server;

use std::sync::Arc;
use std::time::Duration;

use amqp_server::{TURN, address, at, fault, open, ours, raw, script, server};
use broker_amqp::{AmqpBroker, AmqpOptions, lapin};
use broker_core::{
    BoxFuture, Broker, BrokerExt, BrokerUrl, Error, ErrorKind, Group, Message, Result, Subscribe, Topic,
};
use broker_tests::{Fault, Harness, Link, Proxy, Report, Secret, Suite, Timing, keep_column, summary};
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties, ExchangeKind};

fn nowhere() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map(|address| address.to_string()).map_err(|error| Error::backend("no free port").with_source(error))
}

#[derive(Debug)]
struct RabbitMq {
    /// Nobody else uses the server meanwhile: it may be restarted.
    alone: bool,
    queue_type: &'static str,
}

impl RabbitMq {
    fn parameters(&self, url: &str) -> String {
        let separator = if url.contains('?') { '&' } else { '?' };
        format!("{url}{separator}queue_type={}&exchange=suite.{}", self.queue_type, self.queue_type)
    }
}

impl Harness for RabbitMq {
    fn name(&self) -> String {
        format!("amqp: ({})", self.queue_type)
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        open(&self.parameters(server()))
    }

    fn timing(&self) -> Timing {
        let timing = Timing { lease: Duration::ZERO, ..Timing::default() };
        // A real restart takes the server a quarter of a minute, with the management API and on a busy machine more.
        if self.alone { Timing { patience: Duration::from_secs(120), ..timing } } else { timing }
    }

    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        Box::pin(async move {
            let proxy = Proxy::start(address()).await;
            let proxy = proxy.map_err(|error| Error::backend("start a proxy").with_source(error))?;
            let url = self.parameters(&at(&proxy.address().to_string(), None));
            Ok(Some(Arc::new(Proxied { proxy, url, alone: self.alone }) as Arc<dyn Link>))
        })
    }

    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        Some(nowhere().and_then(|nowhere| open(&at(&nowhere, None))))
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-suite".to_owned();
        // The server says no to it, and says so in its own words.
        let opened = open(&at(address(), Some(&format!("user:{text}"))));
        Some(Secret { text, opened })
    }

    fn inject<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        Box::pin(async move {
            // A key that is no string: whoever wrote it is not us.
            let mut headers = FieldTable::default();
            headers.insert("x-broker-key".into(), AMQPValue::LongInt(7));
            let properties = BasicProperties::default().with_headers(headers);
            let exchange = format!("suite.{}", self.queue_type);
            Some(publish_raw(&exchange, topic.as_str(), b"\xff", properties).await)
        })
    }

    fn raw_client<'a>(&'a self, broker: &'a dyn Broker) -> BoxFuture<'a, Option<bool>> {
        let broker: &dyn std::any::Any = broker;
        let broker = broker.downcast_ref::<AmqpBroker>();
        Box::pin(async move {
            match broker {
                Some(amqp) => Some(amqp.raw().await.is_ok()),
                None => Some(false),
            }
        })
    }
}

async fn publish_raw(exchange: &str, key: &str, body: &[u8], properties: BasicProperties) -> Result<()> {
    let publish = async {
        let connection = Connection::connect(&format!("{}/%2f", server()), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicPublishOptions::default();
        channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?.await?;
        connection.close(200, "OK".into()).await
    };
    publish.await.map_err(|error: lapin::Error| Error::backend("publish past the adapter").with_source(error))
}

#[derive(Debug)]
struct Proxied {
    proxy: Proxy,
    url: String,
    alone: bool,
}

impl Link for Proxied {
    fn open(&self) -> Result<Arc<dyn Broker>> {
        open(&self.url)
    }

    fn connections(&self) -> Option<u64> {
        Some(self.proxy.accepted())
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.proxy.cut();
        Box::pin(std::future::ready(()))
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Refuse);
        self.proxy.cut();
        Box::pin(std::future::ready(()))
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Stall);
        Box::pin(std::future::ready(()))
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::None);
        Box::pin(std::future::ready(()))
    }

    fn restart(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            if self.alone && ours() {
                let restart = tokio::task::spawn_blocking(|| script(&["restart", server()]));
                restart
                    .await
                    .map_err(|error| Error::backend("restart RabbitMQ").with_source(error))?
                    .map_err(|error| Error::backend(format!("restart RabbitMQ: {error}")))?;
                return Ok(true);
            }
            self.down().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.up().await;
            Ok(false)
        })
    }
}

async fn run(queue_type: &'static str) {
    let name = format!("amqp: ({queue_type})");
    let wanted = std::env::var("CHECKS").ok();
    let suite = Suite::new(name.clone(), move || Arc::new(RabbitMq { alone: false, queue_type })).parallel(4);
    let suite = match &wanted {
        Some(wanted) => suite.only(wanted.split(',')),
        None => suite,
    };
    let mut reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    if wanted.is_none() {
        // Alone on the server, which now really is restarted.
        let faults = Suite::new(name.clone(), move || Arc::new(RabbitMq { alone: true, queue_type })).only(["F1"]);
        reports.extend(faults.run(|report| println!("restarted: {report} ({} ms)", report.millis)).await);
    }
    println!("{}", summary(&name, &reports));
    if wanted.is_none() && queue_type == "quorum" {
        assert!(keep_column(env!("CARGO_TARGET_TMPDIR"), "amqp", &reports).is_ok(), "the column is not kept");
    }
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_check_on_both_kinds_of_queue() {
    let _turn = TURN.lock().await;
    let _ = AmqpOptions::from_url(BrokerUrl::parse(server()).unwrap()).unwrap();
    match std::env::var("QUEUES").as_deref() {
        Ok("classic") => run("classic").await,
        Ok("quorum") => run("quorum").await,
        _ => {
            run("quorum").await;
            run("classic").await;
        }
    }
}

/// The server's memory alarm: publishers fail in time and say why, acks go through, and it is over
/// when the alarm is.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_publisher_fails_in_time_and_stops_no_ack() {
    let _turn = TURN.lock().await;
    let broker = open(server()).unwrap();
    let topic: Topic = format!("suite.blocked-{}", fastrand::u32(..)).parse().unwrap();
    let group = Group::new("blocked".parse().unwrap(), (&topic).into());
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    let delivery = member.next().await.unwrap().unwrap();
    if !fault("block").await {
        return;
    }
    // Far from the publish timeout of a few seconds, and as far from never.
    let outcome = tokio::time::timeout(Duration::from_secs(15), broker.publish(&topic, Message::new("blocked"))).await;
    delivery.ack().await.unwrap();
    let mut lag = None;
    for _ in 0..200 {
        lag = broker.status().await.unwrap().group(&group).and_then(|group| group.lag);
        if lag == Some(0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fault("unblock").await;
    let error = outcome.expect("the publish ends within its timeout").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.is_retryable() && error.message().contains("blocks"), "{error}");
    assert_eq!(lag, Some(0), "the ack did not go through while publishers were blocked");
    let mut taken = broker.publish(&topic, Message::new("after")).await;
    for _ in 0..10 {
        if taken.is_ok() {
            break;
        }
        taken = broker.publish(&topic, Message::new("after")).await;
    }
    taken.unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    assert!(broker.close(Duration::from_secs(10)).await.complete);
}

/// What the management side can do to every client.
#[tokio::test(flavor = "multi_thread")]
async fn connections_closed_by_the_server_come_back() {
    let _turn = TURN.lock().await;
    let broker = open(server()).unwrap();
    let topic: Topic = format!("suite.closed-{}", fastrand::u32(..)).parse().unwrap();
    let group = Group::new("closed".parse().unwrap(), (&topic).into());
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&topic, Message::new("before")).await.unwrap();
    member.next().await.unwrap().unwrap().ack().await.unwrap();
    if !fault("close-connections").await {
        return;
    }
    broker.publish(&topic, Message::new("after")).await.unwrap();
    let delivery = member.next().await.unwrap().unwrap();
    assert_eq!(delivery.message().payload().as_ref(), b"after");
    delivery.ack().await.unwrap();
    assert!(broker.delete_group(&group).await.unwrap());
    assert!(broker.close(Duration::from_secs(10)).await.complete);
}

/// A message as a stranger writes it, and one of ours as a stranger reads it.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_read_and_can_read() {
    let _turn = TURN.lock().await;
    let broker = open(server()).unwrap();
    let topic: Topic = format!("suite.stranger-{}", fastrand::u32(..)).parse().unwrap();
    let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    let mut death = FieldTable::default();
    death.insert("count".into(), AMQPValue::LongLongInt(3));
    let mut headers = FieldTable::default();
    headers.insert("number".into(), AMQPValue::LongInt(4));
    headers.insert("text".into(), AMQPValue::LongString("yes".into()));
    headers.insert("x-death".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into()));
    let properties = BasicProperties::default().with_headers(headers);
    publish_raw("broker", topic.as_str(), b"foreign", properties).await.unwrap();
    publish_raw("broker", topic.as_str(), b"bare", BasicProperties::default()).await.unwrap();

    let foreign = inbox.next().await.unwrap().unwrap();
    let message = foreign.message();
    assert_eq!((message.payload().as_ref(), message.headers().get_str("number")), (&b"foreign"[..], Some("4")));
    assert_eq!(message.headers().get_str("text"), Some("yes"));
    assert_eq!(message.headers().get_str("x-death"), Some(r#"[{"count":3}]"#));
    foreign.ack().await.unwrap();
    let bare = inbox.next().await.unwrap().unwrap();
    assert_eq!((bare.message().payload().as_ref(), bare.message().headers().len()), (&b"bare"[..], 0));
    bare.ack().await.unwrap();
    broker.close(Duration::from_secs(10)).await;
}

/// Go Micro's RabbitMQ broker as it was recorded, played by the raw client: both ways, and one queue shared.
#[tokio::test(flavor = "multi_thread")]
async fn go_micro_is_understood_and_understands() {
    let _turn = TURN.lock().await;
    let name = format!("go-{}", fastrand::u32(..));
    let topic: Topic = format!("suite.{name}").parse().unwrap();
    let (_connection, channel) = raw().await;
    channel
        .exchange_declare("micro".into(), ExchangeKind::Topic, ExchangeDeclareOptions::default(), FieldTable::default())
        .await
        .unwrap();
    // A Go service has declared the queue group already, by its own rules.
    let auto_delete = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
    for queue in [name.clone(), format!("{name}-listener")] {
        channel.queue_declare(queue.as_str().into(), auto_delete, FieldTable::default()).await.unwrap();
        let (exchange, key) = ("micro".into(), topic.as_str().into());
        channel
            .queue_bind(queue.as_str().into(), exchange, key, QueueBindOptions::default(), FieldTable::default())
            .await
            .unwrap();
    }
    let broker = open(&format!("{}?preset=go-micro", server())).unwrap();
    let group = Subscribe::group(name.parse().unwrap());
    let mut member = broker.subscribe(&(&topic).into(), group).await.unwrap();

    let mut headers = FieldTable::default();
    headers.insert("Content-Type".into(), AMQPValue::LongString("application/json".into()));
    headers.insert("x-trace".into(), AMQPValue::LongString("abc".into()));
    let properties = BasicProperties::default().with_headers(headers);
    publish_raw("micro", topic.as_str(), br#"{"id":1}"#, properties).await.unwrap();
    let delivery = member.next().await.unwrap().unwrap();
    let message = delivery.message();
    assert_eq!((message.payload().as_ref(), message.content_type()), (&br#"{"id":1}"#[..], Some("application/json")));
    assert_eq!((message.headers().len(), message.headers().get_str("x-trace")), (1, Some("abc")));
    delivery.ack().await.unwrap();

    let ours = Message::new(r#"{"id":2}"#).with_content_type("application/json").unwrap();
    broker.publish(&topic, ours.with_header("x-trace", "def").unwrap()).await.unwrap();
    member.next().await.unwrap().unwrap().ack().await.unwrap();
    let queue = format!("{name}-listener");
    for (body, trace) in [(&br#"{"id":1}"#[..], "abc"), (&br#"{"id":2}"#[..], "def")] {
        let got = channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap().unwrap();
        assert_eq!((got.delivery.data.as_slice(), got.delivery.routing_key.as_str()), (body, topic.as_str()));
        let headers = got.delivery.properties.headers().clone().unwrap_or_default();
        let expected = [("Content-Type", "application/json"), ("x-trace", trace)];
        assert_eq!(headers.inner().len(), 2, "{headers:?}");
        for (name, text) in expected {
            assert_eq!(headers.inner().get(name), Some(&AMQPValue::LongString(text.into())), "{name}");
        }
    }
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    broker.close(Duration::from_secs(10)).await;
}
