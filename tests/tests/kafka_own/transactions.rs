//! Transactions: batches, and consume-process-produce.

use broker_core::Broker as _;
use broker_kafka::rdkafka::Message as _;
use broker_kafka::rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer as _};

use super::*;

/// A broker whose publishing is in transactions of a name of its own.
fn transactional(parameters: &str) -> Result<KafkaBroker> {
    broker(&format!("&transactional_id=own-{:x}{parameters}", fastrand::u64(..)))
}

/// A topic whose records the server refuses from 2,000 bytes on: nobody but the server knows.
async fn small(topic: &Topic) {
    let admin = admin();
    let new = NewTopic::new(topic.as_str(), 1, TopicReplication::Fixed(1)).set("max.message.bytes", "2000");
    admin.create_topics([&new], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
}

/// What a reader of this isolation finds within a second.
fn contents(topic: &Topic, isolation: &str) -> Vec<String> {
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", server().url.trim_start_matches("kafka://")).set("group.id", "nobody");
    settings.set("enable.auto.commit", "false").set("isolation.level", isolation);
    let consumer: BaseConsumer = settings.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic.as_str(), 0, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    let mut found = Vec::new();
    let mut wait = Duration::from_secs(5);
    while let Some(record) = consumer.poll(wait) {
        found.push(String::from_utf8_lossy(record.unwrap().payload().unwrap()).into_owned());
        wait = Duration::from_secs(1);
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_published_wholly_or_not_at_all() -> Result<()> {
    let (broker, topic) = (transactional("")?, topic("atomic")?);
    small(&topic).await;
    let refused = vec![Message::new("1"), Message::new(vec![b'x'; 5_000]), Message::new("3")];
    let results = broker.publish_batch(&topic, refused).await?;
    let kinds: Vec<_> = results.iter().map(|result| result.as_ref().unwrap_err().kind()).collect();
    assert_eq!(kinds, [ErrorKind::TooLarge; 3]);
    assert_eq!(contents(&topic, "read_committed"), Vec::<String>::new());

    // What is refused before it begins fails the whole, too.
    let refused = vec![Message::new("1"), Message::new("2").with_delay(Duration::from_secs(1))];
    let results = broker.publish_batch(&topic, refused).await?;
    assert!(results.iter().all(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported)));
    let large = vec![Message::new("1"), Message::new(vec![0; 2 << 20])];
    let results = broker.publish_batch(&topic, large).await?;
    assert!(results.iter().all(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::TooLarge)));

    let good = ["4", "5", "6"].map(Message::new).to_vec();
    let receipts: Vec<_> = broker.publish_batch(&topic, good).await?.into_iter().map(Result::unwrap).collect();
    let offsets: Vec<i64> = receipts.iter().map(|receipt| receipt.offset.unwrap()).collect();
    assert!(offsets.is_sorted_by(|one, next| one + 1 == *next), "{offsets:?}");
    assert_eq!(contents(&topic, "read_committed"), ["4", "5", "6"]);
    close(&broker).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lone_publishes_and_batches_keep_the_order_of_their_calls() -> Result<()> {
    let (broker, topic) = (transactional("")?, topic("order")?);
    let publisher = broker.publisher(&topic, broker_core::PublisherOptions::new())?;
    let mut publishes = Vec::new();
    let mut batches = Vec::new();
    for round in 0..10 {
        let number = |n: i32| Message::new((round * 10 + n).to_string());
        publishes.extend((0..5).map(|n| publisher.publish(number(n))));
        batches.push(publisher.publish_batch((5..10).map(number).collect()));
    }
    for publish in publishes {
        publish.await?;
    }
    for batch in batches {
        batch.await?.into_iter().for_each(|result| drop(result.unwrap()));
    }
    let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    assert_eq!(contents(&topic, "read_committed"), expected);
    close(&broker).await;
    Ok(())
}

/// The acks are in the transaction, exact as they are: the group is behind them at once, though the member
/// itself commits nothing for an hour.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_consumed_and_what_is_produced_stand_or_fall_together() -> Result<()> {
    let (broker, input, output) = (transactional("&commit_interval=1h")?, topic("input")?, topic("output")?);
    small(&output).await;
    let group: Group = format!("process@{input}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let source = super::broker("")?;
    for n in 0..4 {
        source.publish(&input, Message::new(n.to_string())).await?;
    }
    // The member's first turn may still commit by itself.
    let mut taken = take(&mut member, 4).await?;
    let second = taken.remove(1);
    let receipts =
        broker.transact(Transaction::new().publish(output.clone(), Message::new("from 1")).ack(second)).await?;
    assert_eq!((receipts.len(), receipts[0].partition), (1, Some(0)));
    assert_eq!(committed(&group, &input), Some(0), "0 is not done: the watermark stays");
    let first = taken.remove(0);
    let both = Transaction::new().publish(output.clone(), Message::new("from 0")).ack(first);
    broker.transact(both).await?;
    assert_eq!(committed(&group, &input), Some(2), "0 and 1 are done");

    // The server refuses the output: nothing is acked, nothing is to be seen, and the input comes again.
    let third = taken.remove(0);
    let refused = Transaction::new()
        .publish(output.clone(), Message::new("from 2"))
        .publish(output.clone(), Message::new(vec![b'x'; 5_000]))
        .ack(third);
    let error = broker.transact(refused).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    assert_eq!(committed(&group, &input), Some(2));
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.attempt()), ("2", 1), "it was no attempt");
    broker.transact(Transaction::new().publish(output.clone(), Message::new("from 2")).ack(again)).await?;
    assert_eq!(contents(&output, "read_committed"), ["from 1", "from 0", "from 2"]);
    // Acks alone are a transaction, too.
    broker.transact(Transaction::new().ack(taken.remove(0))).await?;
    assert_eq!(committed(&group, &input), Some(4));

    // What is not this broker's to ack.
    let mut alone = source.subscribe(&(&input).into(), Subscribe::new()).await?;
    source.publish(&input, Message::new("5")).await?;
    let strange = take(&mut alone, 1).await?.remove(0);
    let error = broker.transact(Transaction::new().ack(strange)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let error = source.transact(Transaction::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    broker.delete_group(&group).await?;
    close(&broker).await;
    source.close(Duration::from_secs(10)).await;
    Ok(())
}

/// Many at once, each with one ack of the same partition: each says what those before it have acked. The server is as far as
/// they are together, though the member itself commits nothing.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_at_once_take_nothing_back_of_each_other() -> Result<()> {
    const MESSAGES: usize = 30;
    let (broker, topic) = (transactional("&commit_interval=1h")?, topic("atonce")?);
    let group: Group = format!("atonce@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let messages = (0..MESSAGES).map(|n| Message::new(n.to_string())).collect();
    broker.publish_batch(&topic, messages).await?.into_iter().for_each(|result| drop(result.unwrap()));
    let taken = take(&mut member, MESSAGES).await?;
    let under_way: Vec<_> =
        taken.into_iter().map(|delivery| tokio::spawn(broker.transact(Transaction::new().ack(delivery)))).collect();
    for one in under_way {
        one.await.unwrap()?;
    }
    // The transactions' markers lie behind the batch, not among its records.
    assert_eq!(committed(&group, &topic), Some(MESSAGES as i64));
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

/// A transaction that is refused before it begins is no attempt of what it was to ack.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_to_be_acked_is_given_back_untried() -> Result<()> {
    let (broker, topic) = (transactional("")?, topic("untried")?);
    let group: Group = format!("untried@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&topic, Message::new("1")).await?;
    let refused =
        |delivery| Transaction::new().publish(Topic::new("broker-own").unwrap(), Message::new("")).ack(delivery);
    for _ in 0..3 {
        let delivery = take(&mut member, 1).await?.remove(0);
        assert_eq!(delivery.attempt(), 1);
        let error = broker.transact(refused(delivery)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    take(&mut member, 1).await?.remove(0).ack().await?;
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

/// Publishes that wait share a transaction, not their faults.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_fails_alone() -> Result<()> {
    let (broker, missing) = (transactional("&auto_create=false")?, topic("missing")?);
    // The server refuses a whole batch of a partition, so that what is too large has a topic of its own.
    let topics = [topic("one")?, topic("other")?, topic("small")?];
    for topic in &topics {
        small(topic).await;
    }
    let publisher = |topic| broker.publisher(topic, broker_core::PublisherOptions::new()).unwrap();
    let publishers: Vec<_> = topics.iter().chain([&missing]).map(publisher).collect();
    let mut good = Vec::new();
    let mut refused = Vec::new();
    for n in 0..50 {
        good.push(publishers[n % 2].publish(Message::new(n.to_string())));
        match n % 20 {
            3 => refused.push((ErrorKind::NotFound, publishers[3].publish(Message::new("lost")))),
            7 => refused.push((ErrorKind::TooLarge, publishers[2].publish(Message::new(vec![b'x'; 5_000])))),
            _ => {}
        }
    }
    for publish in good {
        publish.await?;
    }
    for (kind, publish) in refused {
        assert_eq!(publish.await.unwrap_err().kind(), kind);
    }
    for (first, topic) in topics.iter().take(2).enumerate() {
        let expected: Vec<_> = (0..50).filter(|n| n % 2 == first).map(|n| n.to_string()).collect();
        assert_eq!(contents(topic, "read_committed"), expected);
    }
    close(&broker).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_second_with_a_transactional_id_takes_it() -> Result<()> {
    let id = format!("&transactional_id=taken-{:x}", fastrand::u64(..));
    let (one, two, topic) = (broker(&id)?, broker(&id)?, topic("fenced")?);
    one.publish(&topic, Message::new("1")).await?;
    two.publish(&topic, Message::new("2")).await?;
    for _ in 0..2 {
        let error = one.publish(&topic, Message::new("3")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    }
    two.publish(&topic, Message::new("4")).await?;
    assert_eq!(contents(&topic, "read_committed"), ["1", "2", "4"]);
    close(&one).await;
    close(&two).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn close_flushes_transactions() -> Result<()> {
    let (broker, topic) = (transactional("")?, topic("flushed")?);
    let publisher = broker.publisher(&topic, broker_core::PublisherOptions::new())?;
    let publishes: Vec<_> = (0..20).map(|n| publisher.publish(Message::new(n.to_string()))).collect();
    close(&broker).await;
    for publish in publishes {
        publish.await?;
    }
    assert_eq!(contents(&topic, "read_committed").len(), 20);
    let closed = publisher.publish_batch(vec![Message::new("late")]).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Closed);
    Ok(())
}
