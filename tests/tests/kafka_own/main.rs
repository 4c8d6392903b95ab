//! What is Kafka's own and no broker's in common.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::type_complexity,
    reason = "a test that cannot go on panics"
)]

mod dead_letters;
mod groups;
#[path = "../kafka_server/mod.rs"]
mod kafka_server;
mod members;
mod mock;
mod records;
mod refused;
mod retries;
mod secure;
mod soak;
mod topics;
mod transactions;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    Broker, BrokerExt, Delivery, ErrorKind, Group, GroupOptions, Message, Result, RetryPolicy, Subscribe, Topic,
};
use broker_kafka::{KafkaBroker, KafkaConfig, Transaction, rdkafka};
use kafka_server::server;

fn broker(parameters: &str) -> Result<KafkaBroker> {
    let url = format!("{}?partitions=1{parameters}", server().url);
    Ok(KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(&url)?)?))
}

fn topic(name: &str) -> Result<Topic> {
    Topic::new(format!("own.{:x}.{name}", fastrand::u64(..)))
}

async fn join(broker: &KafkaBroker, group: &Group, options: GroupOptions) -> Result<broker_core::Subscription> {
    broker.subscribe(&group.filter, Subscribe::group(group.name.clone()).with_options(options)).await
}

async fn take(subscription: &mut broker_core::Subscription, count: usize) -> Result<Vec<Delivery>> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(30), subscription.next()).await;
        taken.extend(next.unwrap_or_else(|_| panic!("{} of {count} deliveries came", taken.len()))?);
    }
    Ok(taken)
}

async fn is_quiet(subscription: &mut broker_core::Subscription) -> bool {
    is_quiet_for(subscription, Duration::from_millis(500)).await
}

async fn is_quiet_for(subscription: &mut broker_core::Subscription, duration: Duration) -> bool {
    tokio::time::timeout(duration, subscription.next()).await.is_err()
}

async fn close(broker: &KafkaBroker) {
    assert!(broker.close(Duration::from_secs(20)).await.complete);
}

/// What a test of a server of our own does on one that KAFKA_URL names: says so where it is seen, since
/// the runner shows nothing of a test that passed.
fn no_control(why: &str) -> Result<()> {
    assert!(!server().ours, "our own server: {why}");
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    writeln!(std::io::stderr(), "no control: {test}: the server that KAFKA_URL names is not ours: {why}")
        .expect("standard error");
    Ok(())
}

fn payload(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

/// Who makes and deletes topics beside us.
fn admin() -> rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> {
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", server().url.trim_start_matches("kafka://"));
    settings.create().unwrap()
}

/// A raw client, and where it is.
fn raw_consumer(topic: &Topic) -> rdkafka::consumer::BaseConsumer {
    use rdkafka::consumer::Consumer as _;
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", server().url.trim_start_matches("kafka://")).set("group.id", "nobody");
    settings.set("enable.auto.commit", "false").set("fetch.wait.max.ms", "50");
    let consumer: rdkafka::consumer::BaseConsumer = settings.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic.as_str(), 0, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    consumer
}

/// Reads `count` records of the topic's first partition as anybody would.
async fn raw_records(topic: &Topic, count: usize) -> Vec<rdkafka::message::OwnedMessage> {
    let consumer = raw_consumer(topic);
    let read = tokio::task::spawn_blocking(move || {
        let mut records = Vec::new();
        while records.len() < count {
            let record = consumer.poll(Duration::from_secs(20)).expect("a record within 20 s");
            records.push(record.unwrap().detach());
        }
        records
    });
    read.await.unwrap()
}

/// A record of somebody else's.
async fn produce(broker: &KafkaBroker, record: rdkafka::producer::BaseRecord<'_, [u8], [u8], usize>) {
    use rdkafka::producer::Producer as _;
    let producer = broker.raw_producer().unwrap();
    producer.send(record).unwrap_or_else(|(error, _)| panic!("{error}"));
    while producer.in_flight_count() > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The groups that the server knows.
fn group_names() -> Vec<String> {
    use rdkafka::consumer::Consumer as _;
    let topic = Topic::new("broker-none").unwrap();
    let groups = raw_consumer(&topic).fetch_group_list(None, Duration::from_secs(10)).unwrap();
    groups.groups().iter().map(|group| group.name().to_owned()).collect()
}

/// What the server has committed for a group in a topic's first partition.
fn committed(group: &Group, topic: &Topic) -> Option<i64> {
    use rdkafka::consumer::Consumer as _;
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", server().url.trim_start_matches("kafka://")).set("group.id", group.to_string());
    let consumer: rdkafka::consumer::BaseConsumer = settings.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition(topic.as_str(), 0);
    let committed = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
    let offset = committed.elements().first().map(|element| element.offset())?;
    offset.to_raw().filter(|offset| *offset >= 0)
}

/// The dead letters of a group, once there are so many.
async fn wait_for_letters(broker: &KafkaBroker, group: &Group, count: usize) -> Result<Vec<broker_core::DeadLetter>> {
    for _ in 0..300 {
        let letters = broker.dead_letters(group, 100).await?;
        if letters.len() >= count {
            return Ok(letters);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{count} dead letters did not come");
}
