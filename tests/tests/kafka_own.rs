//! What is Kafka's own and no broker's in common: what a commit carries from one member to the next,
//! names that collide, topics that must exist, records of others.

mod kafka_server;

use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    Broker, BrokerExt, Delivery, ErrorKind, Group, GroupOptions, Message, Result, RetryPolicy, Subscribe, Topic,
};
use broker_kafka::rdkafka::message::{Header, OwnedHeaders};
use broker_kafka::rdkafka::producer::BaseRecord;
use broker_kafka::{KafkaBroker, KafkaConfig};
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
    tokio::time::timeout(Duration::from_millis(500), subscription.next()).await.is_err()
}

async fn close(broker: &KafkaBroker) {
    assert!(broker.close(Duration::from_secs(20)).await.complete);
}

fn payload(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

/// Acks around one that is held, and an attempt that failed: the next member knows both.
#[tokio::test(flavor = "multi_thread")]
async fn acks_beyond_the_watermark_and_attempts_outlive_their_member() -> Result<()> {
    let (one, topic) = (broker("")?, topic("progress")?);
    let group: Group = format!("progress@{topic}").parse()?;
    let patient = RetryPolicy::default().with_backoff(Duration::from_secs(60), Duration::from_secs(60), 1.0)?;
    let mut member = join(&one, &group, GroupOptions::new().with_retry(patient)).await?;
    let messages = (0..10).map(|n| Message::new(n.to_string())).collect();
    one.publish_batch(&topic, messages).await?.into_iter().for_each(|result| drop(result.unwrap()));
    for delivery in take(&mut member, 10).await? {
        match payload(&delivery).as_str() {
            // Given back untried, failed once, settled.
            "2" => delivery.release().await?,
            "5" => delivery.retry_after(Duration::from_secs(60)).await?,
            _ => delivery.ack().await?,
        }
    }
    close(&one).await;

    let two = broker("")?;
    let mut member = join(&two, &group, GroupOptions::new()).await?;
    let mut left: Vec<_> = take(&mut member, 2).await?;
    left.sort_by_key(payload);
    let seen: Vec<_> = left.iter().map(|delivery| (payload(delivery), delivery.attempt())).collect();
    assert_eq!(seen, [("2".to_owned(), 1), ("5".to_owned(), 2)]);
    assert!(is_quiet(&mut member).await, "what was acked came again");
    for delivery in left {
        delivery.ack().await?;
    }
    assert!(two.delete_group(&group).await?);
    close(&two).await;
    Ok(())
}

/// A group's settings are on the server: another process's member is held to them.
#[tokio::test(flavor = "multi_thread")]
async fn settings_are_known_elsewhere_and_can_be_altered() -> Result<()> {
    let (one, two, topic) = (broker("")?, broker("")?, topic("settings")?);
    let group: Group = format!("settings@{topic}").parse()?;
    let three = RetryPolicy::default().with_max_attempts(3)?;
    assert!(one.create_group(&group, GroupOptions::new().with_retry(three)).await?);
    assert!(!two.create_group(&group, GroupOptions::new().with_retry(three)).await?);
    let five = GroupOptions::new().with_retry(RetryPolicy::default().with_max_attempts(5)?);
    let elsewhere = broker("")?;
    let refused = join(&elsewhere, &group, five.clone()).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    one.alter_group(&group, five.clone()).await?;
    drop(join(&elsewhere, &group, five).await?);
    close(&elsewhere).await;

    // Purging moves the group to the end.
    let messages = (0..7).map(|n| Message::new(n.to_string())).collect();
    one.publish_batch(&topic, messages).await?;
    assert_eq!(one.purge_group(&group).await?, 7);
    assert_eq!(one.purge_group(&group).await?, 0);
    assert!(one.delete_group(&group).await?);
    let gone = one.purge_group(&group).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound, "{gone}");
    close(&one).await;
    close(&two).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_kafka_confuses_are_refused_and_topics_that_must_exist_are_not_made() -> Result<()> {
    let (open, strict, topic) = (broker("")?, broker("&auto_create=false")?, topic("a.b")?);
    open.publish(&topic, Message::new("1")).await?;
    let twin = Topic::new(topic.as_str().replace("a.b", "a_b"))?;
    let refused = open.publish(&twin, Message::new("1")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    assert!(refused.message().contains(topic.as_str()), "{refused}");

    let missing = Topic::new(format!("{topic}.missing"))?;
    let refused = strict.publish(&missing, Message::new("1")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    let refused = strict.subscribe(&(&missing).into(), Subscribe::new()).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    strict.publish(&topic, Message::new("2")).await?;
    close(&open).await;
    close(&strict).await;
    Ok(())
}

/// A record that this crate did not write.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_others_are_read() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("foreign")?);
    let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    let producer = broker.raw_producer()?;
    let headers = OwnedHeaders::new()
        .insert(Header { key: "content-type", value: Some("application/json") })
        .insert(Header { key: "x", value: Some("1") })
        .insert(Header::<&str> { key: "none", value: None });
    let record = BaseRecord::with_opaque_to(topic.as_str(), usize::MAX).key("k").payload("{}").headers(headers);
    producer.send(record).unwrap_or_else(|(error, _)| panic!("{error}"));
    let delivery = take(&mut inbox, 1).await?.remove(0);
    let message = delivery.message();
    assert_eq!((message.content_type(), message.payload().as_ref()), (Some("application/json"), &b"{}"[..]));
    assert_eq!(message.headers().get_str("x"), Some("1"));
    assert_eq!(message.id().to_string(), format!("{topic}-0-0"), "its id is its place");
    delivery.ack().await?;
    close(&broker).await;
    Ok(())
}

/// More than librdkafka's queue holds: publishes wait in the order of the calls, and none fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_waits_in_order() -> Result<()> {
    let (broker, topic) = (Arc::new(broker("&librdkafka.queue.buffering.max.messages=100")?), topic("full")?);
    let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new().with_max_in_flight(5_000)?).await?;
    let messages: Vec<_> = (0..3_000).map(|n| Message::new(n.to_string()).with_key("one")).collect();
    for result in broker.publish_batch(&topic, messages).await? {
        result?;
    }
    let mut received = Vec::new();
    while received.len() < 3_000 {
        for delivery in take(&mut inbox, 100).await? {
            received.push(payload(&delivery));
            delivery.ack().await?;
        }
    }
    assert!(received.iter().map(|text| text.parse::<u32>().unwrap()).is_sorted(), "out of order");
    close(&broker).await;
    Ok(())
}
