//! Errors that a real server will not give on demand: librdkafka's mock cluster of three brokers, in this
//! process.

use std::time::Instant;

use broker_core::Broker as _;
use broker_kafka::rdkafka::mocking::{MockCluster, MockCoordinator};
use broker_kafka::rdkafka::producer::DefaultProducerContext;
use broker_kafka::rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::*;

const TOPIC: &str = "orders";

fn cluster() -> MockCluster<'static, DefaultProducerContext> {
    let cluster = MockCluster::new(3).unwrap();
    cluster.create_topic(TOPIC, 1, 3).unwrap();
    cluster
}

fn open(cluster: &MockCluster<'static, DefaultProducerContext>, parameters: &str) -> Result<KafkaBroker> {
    let url = format!("kafka://{}?{parameters}", cluster.bootstrap_servers());
    Ok(KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(&url)?)?))
}

fn orders() -> Topic {
    Topic::new(TOPIC).unwrap()
}

/// Too few replicas in sync, then enough: publishes wait it out, and each is in the log once, in order.
#[tokio::test(flavor = "multi_thread")]
async fn too_few_replicas_are_waited_out() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "")?;
    let mut inbox = broker.subscribe(&(&orders()).into(), Subscribe::new()).await?;
    broker.publish(&orders(), Message::new("0")).await?;
    use RDKafkaRespErr::*;
    let errors = [
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
        RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    ];
    cluster.request_errors(RDKafkaApiKey::Produce, &errors);
    // One after another: the mock takes a batch though it has refused the one before, which a server does not.
    for n in 1..20 {
        broker.publish(&orders(), Message::new(n.to_string())).await?;
    }
    let received: Vec<_> = take(&mut inbox, 20).await?.iter().map(payload).collect();
    assert_eq!(received, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// Too few replicas for longer than a publish may take: it says so, and does not hang.
#[tokio::test(flavor = "multi_thread")]
async fn too_few_replicas_for_too_long_are_an_error() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "publish_timeout=2s")?;
    broker.publish(&orders(), Message::new("0")).await?;
    let errors = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS; 500];
    cluster.request_errors(RDKafkaApiKey::Produce, &errors);
    let began = Instant::now();
    let error = broker.publish(&orders(), Message::new("1")).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    broker.publish(&orders(), Message::new("2")).await?;
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// How librdkafka's idempotent producer ends for good: the server has lost count of its batches.
const FATAL: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;

/// The client meets a fatal error: what was in flight says that it may be tried again, the status tells it, and a new
/// client goes on, with what was published meanwhile in its order. As often as it happens.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_done_for_is_replaced() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "")?;
    let mut inbox = broker.subscribe(&(&orders()).into(), Subscribe::new()).await?;
    for round in 0..3 {
        broker.publish(&orders(), Message::new("before")).await?;
        let raw = broker.raw_producer()?;
        cluster.request_errors(RDKafkaApiKey::Produce, &[FATAL]);
        let error = broker.publish(&orders(), Message::new("lost")).await.unwrap_err();
        assert!(error.is_retryable() && error.kind() == ErrorKind::Unavailable, "{round}: {error}");
        let status = broker.status().await?;
        assert!(status.last_error.as_ref().is_some_and(|last| last.contains("replaced")), "{:?}", status.last_error);
        let publisher = broker.publisher(&orders(), broker_core::PublisherOptions::new())?;
        let publishes: Vec<_> = (0..200).map(|n| publisher.publish(Message::new(n.to_string()))).collect();
        for publish in publishes {
            publish.await?;
        }
        assert!(!std::sync::Arc::ptr_eq(&raw, &broker.raw_producer()?), "{round}");
        let mut received = Vec::new();
        for delivery in take(&mut inbox, 201).await? {
            received.push(payload(&delivery));
            delivery.ack().await?;
        }
        let expected = std::iter::once("before".to_owned()).chain((0..200).map(|n| n.to_string()));
        assert_eq!(received, expected.collect::<Vec<_>>());
    }
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// The same under load: every publish comes to an end, and each that succeeded is in the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_done_for_under_load_keeps_nobody_waiting() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "")?;
    let mut inbox = broker.subscribe(&(&orders()).into(), Subscribe::new()).await?;
    broker.publish(&orders(), Message::new("first")).await?;
    let publisher = broker.publisher(&orders(), broker_core::PublisherOptions::new())?;
    let mut publishes = Vec::new();
    for n in 0..20_000 {
        if n % 5_000 == 1_000 {
            cluster.request_errors(RDKafkaApiKey::Produce, &[FATAL]);
        }
        publishes.push((n.to_string(), publisher.publish(Message::new(n.to_string()))));
        if n % 1_000 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let (mut written, mut failed) = (std::collections::BTreeSet::from(["first".to_owned()]), 0);
    for (payload, publish) in publishes {
        match tokio::time::timeout(Duration::from_secs(60), publish).await.expect("an outcome") {
            Ok(_) => drop(written.insert(payload)),
            Err(error) => {
                assert!(error.is_retryable(), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "no publish met the error");
    cluster.clear_request_errors(RDKafkaApiKey::Produce);
    broker.publish(&orders(), Message::new("last")).await?;
    let mut received = std::collections::BTreeSet::new();
    while !received.contains("last") {
        let delivery = take(&mut inbox, 1).await?.remove(0);
        received.insert(payload(&delivery));
        delivery.ack().await?;
    }
    assert_eq!(written.difference(&received).count(), 0, "said to be written, and not there");
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// A dead letter meets the fatal error: it is written by the next client, and the group goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_waits_for_the_next_client() -> Result<()> {
    let cluster = cluster();
    cluster.create_topic("dead.letters", 1, 3).unwrap();
    let broker = open(&cluster, "")?;
    let group: Group = format!("letters@{TOPIC}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&orders(), Message::new("1")).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    cluster.request_errors(RDKafkaApiKey::Produce, &[FATAL]);
    delivery.reject("no").await?;
    assert_eq!(super::wait_for_letters(&broker, &group, 1).await?.len(), 1);
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// In transactions the same error fails the transaction, which may be tried again, and the next goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_done_for_may_be_tried_again() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "transactional_id=counts")?;
    broker.publish(&orders(), Message::new("0")).await?;
    cluster.request_errors(RDKafkaApiKey::Produce, &[FATAL]);
    let error = broker.publish(&orders(), Message::new("1")).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    broker.publish(&orders(), Message::new("2")).await?;
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// The answer to a commit comes later than a publish may take, but no later than an answer may: what has become of it is
/// known, and the caller is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_answered_late_is_known() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "transactional_id=late&publish_timeout=1s&connect_timeout=30s")?;
    broker.publish(&orders(), Message::new("0")).await?;
    for round in 0..2 {
        let busy = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS; 500];
        cluster.request_errors(RDKafkaApiKey::EndTxn, &busy);
        let transaction = Transaction::new().publish(orders(), Message::new("1"));
        let late = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            cluster.clear_request_errors(RDKafkaApiKey::EndTxn);
        };
        let committed = async {
            match round {
                0 => broker.publish(&orders(), Message::new("1")).await.map(|receipt| vec![receipt]),
                _ => broker.transact(transaction).await,
            }
        };
        let (committed, ()) = futures_util::future::join(committed, late).await;
        assert_eq!(committed?.len(), 1, "{round}");
    }
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// The answer to a commit does not come in time: the error says that nothing is known of it, and the next transaction
/// goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_without_an_answer_is_not_said_to_be_aborted() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "transactional_id=patience&publish_timeout=2s&connect_timeout=2s")?;
    broker.publish(&orders(), Message::new("0")).await?;
    let busy = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS; 500];
    cluster.request_errors(RDKafkaApiKey::EndTxn, &busy);
    let transaction = Transaction::new().publish(orders(), Message::new("1"));
    for error in [
        broker.publish(&orders(), Message::new("1")).await.unwrap_err(),
        broker.transact(transaction).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.message().contains("not known") && !error.message().contains("aborted"), "{error}");
    }
    cluster.clear_request_errors(RDKafkaApiKey::EndTxn);
    broker.publish(&orders(), Message::new("2")).await?;
    assert!(broker.close(Duration::from_secs(5)).await.complete);
    Ok(())
}

/// Answers that come too late: a publish times out, and the broker goes on when they come in time again.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_time_out_are_errors_and_not_the_end() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "publish_timeout=2s&librdkafka.socket.timeout.ms=1000")?;
    broker.publish(&orders(), Message::new("0")).await?;
    cluster.broker_round_trip_time(-1, Duration::from_secs(10)).unwrap();
    let began = Instant::now();
    let error = broker.publish(&orders(), Message::new("1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    cluster.broker_round_trip_time(-1, Duration::ZERO).unwrap();
    let began = Instant::now();
    while let Err(error) = broker.publish(&orders(), Message::new("2")).await {
        assert!(error.is_retryable() && began.elapsed() < Duration::from_secs(60), "{error}");
    }
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// The server asks to slow down (KIP-599): what was asked of it is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn throttling_is_obeyed() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "commit_interval=50ms")?;
    let group: Group = format!("throttled@{TOPIC}").parse()?;
    let throttled = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_THROTTLING_QUOTA_EXCEEDED; 3];
    cluster.request_errors(RDKafkaApiKey::OffsetCommit, &throttled);
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&orders(), Message::new("1")).await?;
    cluster.request_errors(RDKafkaApiKey::OffsetCommit, &throttled);
    take(&mut member, 1).await?.remove(0).ack().await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    member.close().await?;
    // What was acked is committed in the end.
    let mut next = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&orders(), Message::new("2")).await?;
    let delivery = take(&mut next, 1).await?.remove(0);
    assert_eq!(payload(&delivery), "2");
    delivery.ack().await?;
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// The group's coordinator moves to another broker, twice, and says so by errors: members find it, commits
/// arrive, and nothing that was acked comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_follows_its_coordinator() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "commit_interval=50ms")?;
    let group: Group = format!("moving@{TOPIC}").parse()?;
    cluster.coordinator(MockCoordinator::Group(group.to_string()), 1).unwrap();
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    for coordinator in [2, 3] {
        broker.publish(&orders(), Message::new(format!("before {coordinator}"))).await?;
        take(&mut member, 1).await?.remove(0).ack().await?;
        cluster.coordinator(MockCoordinator::Group(group.to_string()), coordinator).unwrap();
        use RDKafkaRespErr::*;
        let moved = [RD_KAFKA_RESP_ERR_NOT_COORDINATOR, RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS];
        cluster.request_errors(RDKafkaApiKey::OffsetCommit, &moved);
        cluster.request_errors(RDKafkaApiKey::Heartbeat, &moved);
        broker.publish(&orders(), Message::new(format!("after {coordinator}"))).await?;
        let delivery = take(&mut member, 1).await?.remove(0);
        assert_eq!(payload(&delivery), format!("after {coordinator}"));
        delivery.ack().await?;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    member.close().await?;
    let mut next = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&orders(), Message::new("last")).await?;
    assert_eq!(payload(&take(&mut next, 1).await?.remove(0)), "last");
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// What the server has for a group in the topic's first partition.
fn offset(cluster: &MockCluster<'static, DefaultProducerContext>, group: &Group) -> rdkafka::Offset {
    use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer as _};
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", cluster.bootstrap_servers()).set("group.id", group.to_string());
    let other: BaseConsumer = settings.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition(TOPIC, 0);
    other.committed_offsets(list, Duration::from_secs(10)).unwrap().elements()[0].offset()
}

/// The server refuses a commit, and nothing is acked after it: what it said is said again.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_refused_is_made_again() -> Result<()> {
    let cluster = cluster();
    let broker = open(&cluster, "commit_interval=50ms")?;
    let group: Group = format!("refused@{TOPIC}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&orders(), Message::new("1")).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    // What the member has to say at first is said.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let refused = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED; 2];
    cluster.request_errors(RDKafkaApiKey::OffsetCommit, &refused);
    delivery.ack().await?;
    let began = Instant::now();
    while offset(&cluster, &group) != rdkafka::Offset::Offset(1) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", offset(&cluster, &group));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}

/// The server cannot take a commit at once, and librdkafka sends it again a little later: what was acked meanwhile is not
/// committed in between, only to be taken back by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_sent_again_takes_nothing_back() -> Result<()> {
    let cluster = cluster();
    let broker =
        open(&cluster, "commit_interval=20ms&librdkafka.retry.backoff.ms=1000&librdkafka.retry.backoff.max.ms=1000")?;
    let group: Group = format!("overtaken@{TOPIC}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    for n in 0..5 {
        broker.publish(&orders(), Message::new(n.to_string())).await?;
    }
    let taken = take(&mut member, 5).await?;
    // What the member has to say at first is said.
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.request_errors(RDKafkaApiKey::OffsetCommit, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT]);
    for delivery in taken {
        delivery.ack().await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(offset(&cluster, &group), rdkafka::Offset::Offset(5));
    broker.close(Duration::from_secs(5)).await;
    Ok(())
}
