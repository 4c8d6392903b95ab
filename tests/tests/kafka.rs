//! The suite on a real Apache Kafka: the one that KAFKA_URL names, or one of our own that
//! `tests/servers up kafka` starts.

mod kafka_server;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Connectors, Error, Group, GroupOptions, Message, PublisherOptions, Result, Subscribe, Topic,
};
use broker_kafka::KafkaBroker;
use broker_kafka::rdkafka::message::{Header, OwnedHeaders};
use broker_kafka::rdkafka::producer::BaseRecord;
use broker_tests::{Fault, Harness, Link, Proxy, Report, Secret, Suite, Timing, keep_column, summary};
use kafka_server::{run, server};
use tokio_util::sync::CancellationToken;

fn open(address: &str, parameters: &str) -> Result<Arc<dyn Broker>> {
    let mut connectors = Connectors::new();
    connectors.add(["kafka"], broker_kafka::connector());
    connectors.open(&format!("{address}?partitions=3&metadata_refresh=1s{parameters}"))
}

/// Where nobody listens.
fn nowhere() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map(|address| address.to_string()).map_err(|error| Error::backend("no free port").with_source(error))
}

#[derive(Debug)]
struct Kafka;

impl Harness for Kafka {
    fn name(&self) -> String {
        "kafka:".to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        open(&server().url, "")
    }

    fn timing(&self) -> Timing {
        // A member that joins or leaves is noticed by the others at their next heartbeat.
        Timing { patience: Duration::from_secs(60), guard: Duration::from_secs(300), ..Timing::default() }
    }

    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        Box::pin(async {
            let Some((told, listening)) = server().links.lock().pop() else { return Ok(None) };
            let proxy = Proxy::start_at(&told, listening.clone()).await;
            let proxy = proxy.map_err(|error| Error::backend("start a proxy").with_source(error))?;
            Ok(Some(Arc::new(Proxied { proxy, told, listening }) as Arc<dyn Link>))
        })
    }

    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        let short = "&connect_timeout=2s&publish_timeout=2s";
        Some(nowhere().and_then(|nowhere| open(&format!("kafka://{nowhere}"), short)))
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-suite".to_owned();
        let address = server().url.replace("kafka://", &format!("kafka://user:{text}@"));
        Some(Secret { opened: open(&address, "&connect_timeout=2s&publish_timeout=2s"), text })
    }

    fn inject<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        Box::pin(async move {
            let injected = async {
                let broker = KafkaBroker::new(config(&server().url)?);
                broker.connect().await?;
                let producer = broker.raw_producer()?;
                // No header of a message has no name.
                let headers = OwnedHeaders::new().insert(Header { key: "", value: Some("nameless") });
                let record = BaseRecord::with_opaque_to(topic.as_str(), usize::MAX).key("k").payload("\u{1}raw");
                let sent = producer.send(record.headers(headers)).map_err(|(error, _)| error);
                sent.map_err(|error| Error::backend("inject").with_source(error))?;
                while broker_kafka::rdkafka::producer::Producer::in_flight_count(&*producer) > 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                broker.close(Duration::from_secs(5)).await;
                Ok(())
            };
            Some(injected.await)
        })
    }

    fn raw_client<'a>(&'a self, broker: &'a dyn Broker) -> BoxFuture<'a, Option<bool>> {
        let broker: &dyn std::any::Any = broker;
        let reached = broker.downcast_ref::<KafkaBroker>().is_some_and(|kafka| kafka.raw_producer().is_ok());
        Box::pin(std::future::ready(Some(reached)))
    }
}

fn config(url: &str) -> Result<broker_kafka::KafkaConfig> {
    broker_kafka::KafkaConfig::from_url(broker_core::BrokerUrl::parse(url)?)
}

/// The way through a proxy that the server itself names.
struct Proxied {
    proxy: Proxy,
    told: String,
    listening: String,
}

impl fmt::Debug for Proxied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxied").field(&self.proxy).finish()
    }
}

impl Drop for Proxied {
    fn drop(&mut self) {
        // The port is free when the proxy has ended, a moment later; the pool is longer than a moment.
        server().links.lock().insert(0, (self.told.clone(), self.listening.clone()));
    }
}

fn done() -> BoxFuture<'static, ()> {
    Box::pin(std::future::ready(()))
}

impl Link for Proxied {
    fn open(&self) -> Result<Arc<dyn Broker>> {
        // A member whose link is gone cannot say goodbye: the server's patience with it is cut short.
        let short = "&connect_timeout=5s&publish_timeout=5s&librdkafka.session.timeout.ms=6000";
        open(&format!("kafka://{}", self.told), short)
    }

    fn connections(&self) -> Option<u64> {
        Some(self.proxy.accepted())
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.proxy.cut();
        done()
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Refuse);
        self.proxy.cut();
        done()
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Stall);
        done()
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::None);
        done()
    }

    fn restart(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async {
            if !server().ours {
                return Err(Error::unsupported("the server that KAFKA_URL names is not ours to restart"));
            }
            let restarted = tokio::task::spawn_blocking(|| run(&["restart", &server().url])).await;
            let restarted = restarted.map_err(|error| Error::backend("restart the server").with_source(error))?;
            restarted.map(|_| true).map_err(|error| Error::backend(format!("restart the server: {error}")))
        })
    }
}

/// Whether `id` restarts the server that others would be using.
fn restarts(id: &str) -> bool {
    id == "F1"
}

/// KAFKA_CHECKS=A1,B runs only those.
fn wanted() -> Option<Vec<String>> {
    let wanted = std::env::var("KAFKA_CHECKS").ok()?;
    Some(wanted.split(',').map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_check() {
    let mut suite = Suite::new("kafka:", || Arc::new(Kafka));
    if let Some(wanted) = wanted() {
        suite = suite.only(wanted);
    }
    let (alone, shared): (Vec<&str>, Vec<&str>) =
        suite.checks().iter().map(|check| check.id).partition(|id| restarts(id));
    let mut reports = Vec::new();
    for (checks, parallel) in [(shared, 3), (alone, 1)] {
        let part = suite.clone().only(checks).parallel(parallel);
        reports.extend(part.run(|report| println!("{report} ({} ms)", report.millis)).await);
    }
    println!("{}", summary("kafka:", &reports));
    if wanted().is_none() {
        assert!(keep_column(env!("CARGO_TARGET_TMPDIR"), "kafka", &reports).is_ok(), "the column is not kept");
    }
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// What happened to each of the messages: deliveries and acks by number.
struct History {
    delivered: Vec<AtomicU32>,
    acked: Vec<AtomicU32>,
}

impl History {
    fn new(count: usize) -> Self {
        let zeros = || (0..count).map(|_| AtomicU32::new(0)).collect();
        Self { delivered: zeros(), acked: zeros() }
    }

    fn all_acked(&self) -> bool {
        self.acked.iter().all(|acks| acks.load(Ordering::Relaxed) > 0)
    }

    fn of<'a>(counts: &'a [AtomicU32], message: &Message) -> Option<&'a AtomicU32> {
        counts.get(String::from_utf8_lossy(message.payload()).parse::<usize>().ok()?)
    }
}

/// A member that acks out of order until it is told to go; some of what it holds then it drops.
async fn member(broker: Arc<dyn Broker>, group: Group, history: Arc<History>, go: CancellationToken) -> Result<()> {
    let options = Subscribe::group(group.name.clone()).with_max_in_flight(200)?;
    let mut subscription = broker.subscribe(&group.filter, options).await?;
    let mut held = Vec::new();
    loop {
        let received = tokio::select! {
            biased;
            () = go.cancelled() => break,
            received = subscription.receive(&mut held, 100) => received?,
        };
        if received == 0 {
            break;
        }
        for delivery in held.iter().rev().take(received) {
            History::of(&history.delivered, delivery.message()).map(|count| count.fetch_add(1, Ordering::Relaxed));
        }
        fastrand::shuffle(&mut held);
        let keep = if history.delivered.len() > 100 { fastrand::usize(..50) } else { 0 };
        for delivery in held.drain(keep.min(held.len())..) {
            let acked = History::of(&history.acked, delivery.message());
            delivery.ack().await?;
            acked.map(|count| count.fetch_add(1, Ordering::Relaxed));
        }
        // What is kept is acked a little later, by somebody else.
        let late: Vec<_> = held.drain(..).map(|delivery| (delivery, Arc::clone(&history))).collect();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            for (delivery, history) in late {
                let message = delivery.message().clone();
                if delivery.ack().await.is_ok() {
                    History::of(&history.acked, &message).map(|count| count.fetch_add(1, Ordering::Relaxed));
                }
            }
        });
    }
    subscription.close().await
}

/// Members come and go all the time, on connections of their own: nothing is lost, and because those
/// that go settle what they hold first, what was acked never comes again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn members_come_and_go_under_load() {
    const MESSAGES: usize = 40_000;
    let unique = format!("{:x}", fastrand::u64(..));
    let url = format!("{}?partitions=12", server().url);
    let connect = || -> Arc<dyn Broker> { Arc::new(KafkaBroker::new(config(&url).unwrap())) };
    let publisher = connect();
    let topic = Topic::new(format!("churn.{unique}")).unwrap();
    let group: Group = format!("churn-{unique}@{topic}").parse().unwrap();
    publisher.create_group(&group, GroupOptions::new()).await.unwrap();
    let history = Arc::new(History::new(MESSAGES));

    let load = async {
        let publish = publisher.publisher(&topic, PublisherOptions::new()).unwrap();
        for from in (0..MESSAGES).step_by(500) {
            let number = |n: usize| Message::new(n.to_string()).with_key(n.to_string());
            let batch = publish.publish_batch((from..from + 500).map(number).collect()).await.unwrap();
            batch.into_iter().for_each(|result| drop(result.unwrap()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let churn = async {
        let mut members = Vec::new();
        while !history.all_acked() {
            let (broker, go) = (connect(), CancellationToken::new());
            let task = tokio::spawn(member(Arc::clone(&broker), group.clone(), Arc::clone(&history), go.clone()));
            members.push((broker, go, task));
            if members.len() > 3 {
                let (broker, go, task) = members.remove(fastrand::usize(..members.len()));
                go.cancel();
                task.await.unwrap().unwrap();
                assert!(broker.close(Duration::from_secs(20)).await.complete);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        for (broker, go, task) in members {
            go.cancel();
            task.await.unwrap().unwrap();
            broker.close(Duration::from_secs(20)).await;
        }
    };
    let both = futures_util::future::join(load, churn);
    tokio::time::timeout(Duration::from_secs(240), both).await.expect("every message is acked in time");

    let count = |counts: &[AtomicU32], more: u32| counts.iter().filter(|n| n.load(Ordering::Relaxed) > more).count();
    assert_eq!(count(&history.acked, 1), 0, "a message was acked twice");
    let again = count(&history.delivered, 1);
    println!("{MESSAGES} messages, none lost, none acked twice; {again} came again unsettled");
    assert!(publisher.delete_group(&group).await.unwrap());
    publisher.close(Duration::from_secs(10)).await;
}
