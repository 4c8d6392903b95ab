//! Topics that somebody deletes while they are used.

use std::time::Instant;

use broker_core::Broker as _;
use broker_kafka::rdkafka::admin::AdminOptions;
use broker_kafka::rdkafka::error::RDKafkaErrorCode;
use broker_kafka::rdkafka::producer::Producer as _;

use super::*;

async fn delete(topic: &Topic) {
    let deleted = admin().delete_topics(&[topic.as_str()], &AdminOptions::new()).await.unwrap();
    deleted.into_iter().for_each(|deleted| drop(deleted.unwrap()));
}

/// Publishes, for no longer than a publish to a topic that is missing may take here.
async fn publish(broker: &KafkaBroker, topic: &Topic) -> Result<broker_core::Receipt> {
    let limit = Duration::from_secs(20);
    let published = tokio::time::timeout(limit, broker.publish(topic, Message::new("1"))).await;
    published.unwrap_or_else(|_| panic!("no outcome within {limit:?}"))
}

/// What is on its way when its topic goes is told so within seconds, not after half a minute; then the topic is made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_under_its_publisher_is_made_again() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("deleted")?);
    publish(&broker, &topic).await?;
    delete(&topic).await;
    let began = Instant::now();
    while let Err(error) = publish(&broker, &topic).await {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(began.elapsed() < Duration::from_secs(20), "{error}");
    }
    close(&broker).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_and_may_not_be_made_is_not_found() -> Result<()> {
    let (open, strict, topic) = (broker("")?, broker("&auto_create=false")?, topic("deleted")?);
    publish(&open, &topic).await?;
    publish(&strict, &topic).await?;
    delete(&topic).await;
    // The server has said so before all of it knows.
    let mut before = 0;
    while publish(&strict, &topic).await.is_ok() {
        before += 1;
        assert!(before < 1_000, "it is still there");
    }
    for _ in 0..3 {
        let error = publish(&strict, &topic).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    // Somebody makes it again.
    while publish(&open, &topic).await.is_err() {}
    publish(&strict, &topic).await?;
    close(&open).await;
    close(&strict).await;
    Ok(())
}

/// Nothing was on its way: librdkafka has heard that the topic is gone, and takes nothing for it. The next publish does not fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_deleted_while_nothing_was_published_is_made_again_unnoticed() -> Result<()> {
    let brief = "&librdkafka.topic.metadata.propagation.max.ms=100";
    let (broker, strict, topic) = (broker(brief)?, broker(&format!("{brief}&auto_create=false"))?, topic("unnoticed")?);
    publish(&broker, &topic).await?;
    publish(&strict, &topic).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    delete(&topic).await;
    for broker in [&broker, &strict] {
        let (producer, name) = (broker.raw_producer()?, topic.to_string());
        let noticed = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            loop {
                let metadata = producer.client().fetch_metadata(Some(&name), Duration::from_secs(10)).unwrap();
                let error = metadata.topics().first().and_then(|topic| topic.error()).map(RDKafkaErrorCode::from);
                match error {
                    Some(RDKafkaErrorCode::UnknownTopicOrPartition) => return,
                    other => assert!(began.elapsed() < Duration::from_secs(20), "{other:?}"),
                }
            }
        });
        noticed.await.unwrap();
    }
    let error = publish(&strict, &topic).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.message().contains("auto_create"), "it was looked for: {error}");
    let publisher = broker.publisher(&topic, broker_core::PublisherOptions::new())?;
    let publishes: Vec<_> = (0..100).map(|n| publisher.publish(Message::new(n.to_string()).with_key("k"))).collect();
    for (offset, publish) in (0..).zip(publishes) {
        let receipt = tokio::time::timeout(Duration::from_secs(20), publish).await.expect("an outcome")?;
        assert_eq!(receipt.offset, Some(offset), "in their order");
    }
    publish(&strict, &topic).await?;
    close(&broker).await;
    close(&strict).await;
    Ok(())
}

/// In transactions nothing of it is noticed, but that it takes its time.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_is_made_again_for_a_transaction() -> Result<()> {
    let (broker, topic) = (broker(&format!("&transactional_id=deleted-{:x}", fastrand::u64(..)))?, topic("deleted")?);
    publish(&broker, &topic).await?;
    delete(&topic).await;
    publish(&broker, &topic).await?;
    close(&broker).await;
    Ok(())
}
