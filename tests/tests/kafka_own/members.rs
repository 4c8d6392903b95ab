//! Members of groups, and subscriptions without one: what they leave, keep and lose.

use broker_core::Broker as _;
use broker_tests::{Fault, Proxy};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_without_group_leaves_no_trace() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("alone")?);
    let before = group_names();
    let mut alone = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    broker.publish(&topic, Message::new("1")).await?;
    take(&mut alone, 1).await?.remove(0).ack().await?;
    let is_new = |name: &String| !before.contains(name) && (name.contains(topic.as_str()) || !name.contains('@'));
    assert_eq!(group_names().into_iter().find(is_new), None, "while it reads");
    close(&broker).await;
    assert_eq!(group_names().into_iter().find(is_new), None, "after it");
    Ok(())
}

/// Handlers and the group's membership have nothing to do with each other.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_slower_than_the_poll_interval_keeps_its_membership() -> Result<()> {
    let impatient = "&librdkafka.max.poll.interval.ms=6000&librdkafka.session.timeout.ms=6000";
    let (broker, topic) = (broker(impatient)?, topic("slow")?);
    let group: Group = format!("slow@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&topic, Message::new("1")).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    tokio::time::sleep(Duration::from_secs(8)).await;
    delivery.ack().await?;
    assert!(is_quiet_for(&mut member, Duration::from_secs(2)).await, "it came again");
    let status = broker.status().await?;
    assert_eq!(status.group(&group).and_then(|group| group.members), Some(1));
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

/// A member that goes waits for what is in flight no longer than it was told to, and makes its last commit; an ack after
/// that is refused, not taken and forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn an_ack_that_was_taken_while_its_member_goes_holds() -> Result<()> {
    // Between the last commit and the end is little time: whether an ack falls into it is chance, and holds in any case.
    for _ in 0..4 {
        if acks_while_a_member_goes().await? {
            break;
        }
    }
    Ok(())
}

/// Acks what a member was given while it goes, and whatever was acked does not come again, all else does. Returns whether an
/// ack was asked for between the last commit and the end.
async fn acks_while_a_member_goes() -> Result<bool> {
    // As many as are in flight at most.
    const MESSAGES: usize = 256;
    const DRAIN: Duration = Duration::from_millis(200);
    let (broker, topic) = (broker("&drain_timeout=200ms")?, topic("going")?);
    let group: Group = format!("going@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let publisher = broker.publisher(&topic, broker_core::PublisherOptions::new())?;
    for published in publisher.publish_batch((0..MESSAGES).map(|n| Message::new(n.to_string())).collect()).await? {
        published?;
    }
    let deliveries = take(&mut member, MESSAGES).await?;
    let begun = std::time::Instant::now();
    let closing = tokio::spawn(async move { member.close().await });
    let (mut acked, mut is_hit) = (std::collections::BTreeSet::new(), false);
    for delivery in deliveries {
        // Few at first, and close together around the end.
        let is_near = begun.elapsed() > DRAIN - Duration::from_millis(20);
        let is_open = !closing.is_finished();
        if is_open {
            tokio::time::sleep(Duration::from_millis(if is_near { 1 } else { 5 })).await;
        }
        let number = payload(&delivery);
        match delivery.ack().await {
            Ok(()) => drop(acked.insert(number)),
            Err(_) => is_hit |= is_open && !closing.is_finished(),
        }
    }
    assert!(!acked.is_empty(), "none was acked before its end");
    closing.await.unwrap()?;
    let mut next = join(&broker, &group, GroupOptions::new()).await?;
    let mut came = std::collections::BTreeSet::new();
    for delivery in take(&mut next, MESSAGES - acked.len()).await? {
        came.insert(payload(&delivery));
        delivery.ack().await?;
    }
    assert!(is_quiet(&mut next).await, "more came again than was refused");
    let both: Vec<_> = came.intersection(&acked).collect();
    assert!(both.is_empty(), "acked and come again: {both:?}");
    assert_eq!(came.len() + acked.len(), MESSAGES, "lost");
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(is_hit)
}

/// A member with an `instance_id` that goes and comes back is the same to the group: its partition waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_comes_back_to_its_partition() -> Result<()> {
    let open = |name: &str| {
        let parameters = format!("&instance_id={name}&librdkafka.session.timeout.ms=20000");
        let url = format!("{}?partitions=2{parameters}", server().url);
        Ok::<_, broker_core::Error>(KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(&url)?)?))
    };
    let (one, two, topic) = (open("one")?, open("two")?, topic("static")?);
    let group: Group = format!("static@{topic}").parse()?;
    let mut first = join(&one, &group, GroupOptions::new()).await?;
    let mut second = join(&two, &group, GroupOptions::new()).await?;
    let assigned = async |broker: &KafkaBroker| {
        broker.status().await.map(|status| status.group(&group).unwrap().assignment.clone().unwrap())
    };
    // Both settle down with a partition each.
    let (mine, theirs) = loop {
        let both = (assigned(&one).await?, assigned(&two).await?);
        if (both.0.len(), both.1.len()) == (1, 1) {
            break both;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    // Messages for both partitions: whoever has one gets its share.
    let publish = async |from: u32| {
        let messages = (from..from + 40).map(|n| Message::new(n.to_string()).with_key(n.to_string())).collect();
        one.publish_batch(&topic, messages)
            .await
            .map(|results| results.into_iter().for_each(|result| drop(result.unwrap())))
    };
    second.close().await?;
    close(&two).await;
    publish(0).await?;
    let mut got = 0;
    while let Ok(next) = tokio::time::timeout(Duration::from_secs(3), first.next()).await {
        next?.expect("open").ack().await?;
        got += 1;
    }
    assert!(got > 0 && got < 40, "{got} of 40: the other's partition must wait for it");
    assert_eq!(assigned(&one).await?, mine);
    let two = open("two")?;
    second = join(&two, &group, GroupOptions::new()).await?;
    for delivery in take(&mut second, 40 - got).await? {
        delivery.ack().await?;
    }
    assert_eq!(assigned(&two).await?, theirs);

    // Another with the same id takes its place, and it is told. What it still holds comes to the other.
    publish(100).await?;
    let held = take(&mut second, 1).await?.remove(0);
    let usurper = open("two")?;
    let third = join(&usurper, &group, GroupOptions::new()).await?;
    let fenced = async {
        while let Some(delivery) = second.next().await? {
            drop(delivery.release())
        }
        Ok(())
    };
    let fenced: Result<()> = tokio::time::timeout(Duration::from_secs(30), fenced).await.expect("it is told");
    assert_eq!(fenced.unwrap_err().kind(), ErrorKind::Conflict);
    let late = held.ack().await.map(drop).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    drop((first, second, third));
    for broker in [&one, &two, &usurper] {
        broker.close(Duration::from_secs(20)).await;
    }
    Ok(())
}

/// A member that was cut off for too long has lost its partitions: it commits nothing of them, and what it
/// acked meanwhile comes to another.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_committed_of_a_partition_that_was_lost() -> Result<()> {
    let Some((told, listening)) = server().links.lock().pop() else {
        return no_control("it has no listener that we could cut off");
    };
    let proxy = Proxy::start_at(&told, listening.clone()).await.expect("a proxy");
    let through = format!("kafka://{told}?partitions=1&librdkafka.session.timeout.ms=6000&drain_timeout=2s");
    let cut_off = KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(&through)?)?);
    let (other, topic) = (broker("")?, topic("lost")?);
    let group: Group = format!("lost@{topic}").parse()?;
    let mut member = join(&cut_off, &group, GroupOptions::new()).await?;
    for n in 0..3 {
        other.publish(&topic, Message::new(n.to_string())).await?;
    }
    let mut taken = take(&mut member, 3).await?;
    // The first is acked and committed, the second acked where nobody hears of it.
    taken.remove(0).ack().await?;
    let begun = std::time::Instant::now();
    while committed(&group, &topic) != Some(1) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", committed(&group, &topic));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    proxy.set(Fault::Stall);
    taken.remove(0).ack().await?;
    let mut successor = join(&other, &group, GroupOptions::new()).await?;
    let again = take(&mut successor, 2).await?;
    assert_eq!(again.iter().map(payload).collect::<Vec<_>>(), ["1", "2"]);
    proxy.set(Fault::None);
    proxy.cut();
    // It hears of its loss, and that what it still holds is not its own any more.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let late = taken.remove(0).ack().await.map(drop).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    assert_eq!(committed(&group, &topic), Some(1), "the lost member committed");
    for delivery in again {
        delivery.ack().await?;
    }
    cut_off.close(Duration::from_secs(10)).await;
    close(&other).await;
    assert_eq!(committed(&group, &topic), Some(3));
    drop(proxy);
    server().links.lock().insert(0, (told, listening));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_lag_flight_assignment_and_the_last_error() -> Result<()> {
    let (broker, topic) = (broker("&commit_interval=100ms")?, topic("status")?);
    let group: Group = format!("status@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let mut alone = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    for n in 0..5 {
        broker.publish(&topic, Message::new(n.to_string())).await?;
    }
    let mut taken = take(&mut member, 3).await?;
    let mut own = take(&mut alone, 5).await?;
    // Acked out of order: what is settled beyond the watermark is no lag.
    taken.remove(1).ack().await?;
    taken.remove(0).reject("no such customer").await?;
    own.drain(1..3).for_each(|delivery| drop(delivery.ack()));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let status = broker.status().await?;
    let of_group = status.group(&group).expect("the group is known");
    let place = vec![format!("{topic}/0")];
    assert_eq!((of_group.lag, of_group.in_flight, of_group.members), (Some(3), Some(1), Some(1)));
    assert_eq!(of_group.assignment.as_ref(), Some(&place));
    assert_eq!(of_group.last_error.as_deref(), Some("no such customer"));
    let of_alone = &status.subscriptions[0];
    assert_eq!((of_alone.lag, of_alone.in_flight), (Some(3), Some(3)));
    assert_eq!(of_alone.assignment.as_ref(), Some(&place));
    drop((taken, own));
    broker.delete_group(&group).await?;
    broker.close(Duration::from_secs(10)).await;
    Ok(())
}

/// Deletes a topic and makes it again, with nothing in it.
async fn make_again(topic: &Topic) {
    use broker_kafka::rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
    let admin = admin();
    admin.delete_topics(&[topic.as_str()], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let new = NewTopic::new(topic.as_str(), 1, TopicReplication::Fixed(1));
    while admin.create_topics([&new], &AdminOptions::new()).await.unwrap().remove(0).is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A topic is deleted and made again while it is read: its offsets begin anew, and what lies under those that were acked is
/// another message. Nothing of it is lost, with a group and without.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_made_again_is_read_from_its_beginning() -> Result<()> {
    let (broker, topic) = (broker("&commit_interval=100ms")?, topic("again")?);
    let group: Group = format!("again@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let mut alone = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    for n in 0..5 {
        broker.publish(&topic, Message::new(format!("before {n}"))).await?;
    }
    for subscription in [&mut member, &mut alone] {
        for delivery in take(subscription, 5).await? {
            delivery.ack().await?;
        }
    }
    make_again(&topic).await;
    for n in 0..3 {
        // The publisher may hear of it first.
        while broker.publish(&topic, Message::new(format!("after {n}"))).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    for subscription in [&mut member, &mut alone] {
        for (n, delivery) in take(subscription, 3).await?.into_iter().enumerate() {
            assert_eq!(payload(&delivery), format!("after {n}"));
            delivery.ack().await?;
        }
    }
    drop(alone);
    close(&broker).await;
    assert_eq!(committed(&group, &topic), Some(3));
    Ok(())
}

/// What a group has committed lies beyond the end of the log: the log is another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_beyond_the_end_of_its_log_reads_all_of_it() -> Result<()> {
    use broker_kafka::rdkafka::admin::{AdminClient, AdminOptions};
    use broker_kafka::rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
    let (broker, topic) = (broker("")?, topic("beyond")?);
    let group: Group = format!("beyond@{topic}").parse()?;
    for n in 0..5 {
        broker.publish(&topic, Message::new(n.to_string())).await?;
    }
    let mut settings = rdkafka::ClientConfig::new();
    settings.set("bootstrap.servers", server().url.trim_start_matches("kafka://")).set("group.id", group.to_string());
    // Its first records are gone, as they are after a while.
    let admin: AdminClient<rdkafka::client::DefaultClientContext> = settings.create().unwrap();
    let mut gone = rdkafka::TopicPartitionList::new();
    gone.add_partition_offset(topic.as_str(), 0, rdkafka::Offset::Offset(2)).unwrap();
    admin.delete_records(&gone, &AdminOptions::new()).await.unwrap();
    let other: BaseConsumer = settings.create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic.as_str(), 0, rdkafka::Offset::Offset(1_000)).unwrap();
    other.commit(&list, CommitMode::Sync).unwrap();
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let came: Vec<_> = take(&mut member, 3).await?;
    assert_eq!(came.iter().map(payload).collect::<Vec<_>>(), ["2", "3", "4"]);
    for delivery in came {
        delivery.ack().await?;
    }
    close(&broker).await;
    assert_eq!(committed(&group, &topic), Some(5));
    Ok(())
}

/// A start that is not there yet is refused: to the server it would be a mistake to be mended by beginning elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_beyond_the_end_is_refused() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("future")?);
    broker.publish(&topic, Message::new("1")).await?;
    let at = |offset| GroupOptions::new().with_start(broker_core::StartAt::Position(vec![(0, offset)]));
    let error = broker.create_group(&format!("far@{topic}").parse()?, at(2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.message().contains("ends at 1"), "{error}");
    let nowhere = GroupOptions::new().with_start(broker_core::StartAt::Position(vec![(0, 0), (7, 0)]));
    let error = broker.create_group(&format!("nowhere@{topic}").parse()?, nowhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.message().contains("partition 7"), "{error}");
    let end: Group = format!("end@{topic}").parse()?;
    assert!(broker.create_group(&end, at(1)).await?);
    broker.delete_group(&end).await?;
    close(&broker).await;
    Ok(())
}
