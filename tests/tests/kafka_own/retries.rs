//! Retry topics.

use broker_core::Broker as _;

use super::*;

const PARAMETERS: &str = "&retry_topics=2s&metadata_refresh=1s&commit_interval=100ms";

#[tokio::test(flavor = "multi_thread")]
async fn a_long_retry_waits_in_a_topic_and_comes_back_as_it_was() -> Result<()> {
    let (one, topic) = (broker(PARAMETERS)?, topic("aside")?);
    let group: Group = format!("aside@{topic}").parse()?;
    let twice = GroupOptions::new().with_retry(RetryPolicy::default().with_max_attempts(3)?);
    let mut member = join(&one, &group, twice.clone()).await?;
    let message = Message::new("1").with_key("k").with_header("x", vec![0xff])?.with_content_type("text/plain")?;
    one.publish(&topic, message.clone()).await?;
    let began = std::time::Instant::now();
    take(&mut member, 1).await?.remove(0).retry_after(Duration::from_secs(3)).await?;
    // Its record is settled: the partition's watermark is beyond it, and it is still the group's.
    while committed(&group, &topic) != Some(1) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", committed(&group, &topic));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(one.status().await?.group(&group).and_then(|group| group.lag), Some(1));
    close(&one).await;

    // Another member finds it, with its attempt, when it is due.
    let two = broker(PARAMETERS)?;
    let mut member = join(&two, &group, twice).await?;
    let again = take(&mut member, 1).await?.remove(0);
    assert!(began.elapsed() >= Duration::from_secs(3), "too early: {:?}", began.elapsed());
    assert_eq!((again.attempt(), again.topic()), (2, &topic));
    assert_eq!(again.message(), &message);
    // Below the threshold its new member holds it; the attempts add up.
    again.retry_after(Duration::from_millis(10)).await?;
    let last = take(&mut member, 1).await?.remove(0);
    assert_eq!(last.attempt(), 3);
    last.retry().await?;
    let letters = wait_for_letters(&two, &group, 1).await?;
    assert_eq!((&letters[0].topic, letters[0].attempts), (&topic, 3));
    assert_eq!(letters[0].message.payload(), message.payload());

    assert!(two.delete_group(&group).await?);
    // Deletion reaches the metadata a moment after it is confirmed.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let left: Vec<String> = topics().into_iter().filter(|name| name.starts_with("broker-retry.aside_a")).collect();
    assert_eq!(left, Vec::<String>::new(), "the retry topics go with their group");
    close(&two).await;
    Ok(())
}

/// The server deletes records by their time, a message published years ago on its next look: what waits in a topic of
/// ours is as young as its record, and its message as old as it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_old_message_leaves_behind_is_young() -> Result<()> {
    use broker_kafka::rdkafka::Message as _;
    use broker_kafka::rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
    let (broker, topic) = (broker(PARAMETERS)?, topic("old")?);
    let group: Group = format!("old-{:x}@{topic}", fastrand::u64(..)).parse()?;
    // The server may look at any time, and what is published here is old. What it deletes is not of the matter.
    let new = NewTopic::new(topic.as_str(), 1, TopicReplication::Fixed(1)).set("retention.ms", "-1");
    admin().create_topics([&new], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let old = broker_core::Timestamp::from_millis(1_000_000_000_000);
    let began = broker_core::Timestamp::now();
    for payload in ["set aside", "rejected"] {
        broker.publish(&topic, Message::new(payload).with_timestamp(old)).await?;
    }
    let mut taken = take(&mut member, 2).await?;
    taken.remove(0).retry_after(Duration::from_secs(3)).await?;
    taken.remove(0).reject("no such customer").await?;
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.message().timestamp()), ("set aside", old));
    again.ack().await?;
    let letters = wait_for_letters(&broker, &group, 1).await?;
    assert_eq!(letters[0].message.timestamp(), old);
    assert_eq!(broker.redrive(&group, 1).await?, 1);
    let redriven = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&redriven).as_str(), redriven.message().timestamp()), ("rejected", old));
    redriven.ack().await?;
    let aside = topics().into_iter().find(|name| name.starts_with(&format!("broker-retry.{}_a", group.name)));
    let places = [aside.expect("a retry topic"), format!("dead.{}", group.name), topic.to_string()];
    for (place, count) in places.iter().zip([1, 1, 3]) {
        let last = raw_records(&Topic::new(place)?, count).await.pop().and_then(|last| last.timestamp().to_millis());
        assert!(last >= Some(began.as_millis()), "{place}: {last:?}");
    }
    assert!(broker.delete_group(&group).await?);
    broker.close(Duration::from_secs(10)).await;
    Ok(())
}

/// However many are asked for, no more of them are in memory than fit; all of them are redriven, and once.
#[tokio::test(flavor = "multi_thread")]
async fn large_dead_letters_are_paged() -> Result<()> {
    const COUNT: usize = 40;
    let (broker, topic) = (broker("")?, topic("large")?);
    let group: Group = format!("large-{:x}@{topic}", fastrand::u64(..)).parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    for n in 0..COUNT {
        let payload = format!("{n}{}", " ".repeat(900_000));
        broker.publish(&topic, Message::new(payload)).await?;
    }
    for _ in 0..COUNT {
        take(&mut member, 1).await?.remove(0).reject("too much").await?;
    }
    let listed = broker.dead_letters(&group, usize::MAX).await?;
    let bytes: usize = listed.iter().map(|letter| letter.message.size()).sum();
    assert!(!listed.is_empty() && listed.len() < COUNT && bytes < 24 << 20, "{} of them, {bytes} bytes", listed.len());
    assert_eq!(broker.redrive(&group, 3).await?, 3);
    assert_eq!(broker.redrive(&group, u64::MAX).await?, COUNT as u64 - 3);
    assert_eq!(broker.dead_letters(&group, usize::MAX).await?.len(), 0);
    let mut numbers = Vec::new();
    for _ in 0..COUNT {
        let delivery = take(&mut member, 1).await?.remove(0);
        numbers.push(payload(&delivery).trim().parse::<usize>().unwrap());
        delivery.ack().await?;
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
    assert!(broker.delete_group(&group).await?);
    close(&broker).await;
    Ok(())
}

/// The longest wait there is holds its message and nobody else, until its member goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_without_end_is_one() -> Result<()> {
    let (one, topic) = (broker("")?, topic("endless")?);
    let group: Group = format!("endless@{topic}").parse()?;
    let mut member = join(&one, &group, GroupOptions::new()).await?;
    one.publish(&topic, Message::new("1")).await?;
    one.publish(&topic, Message::new("2")).await?;
    let mut both = take(&mut member, 2).await?;
    both.remove(0).retry_after(Duration::MAX).await?;
    both.remove(0).ack().await?;
    assert!(is_quiet(&mut member).await);
    assert_eq!(one.status().await?.group(&group).and_then(|group| group.in_flight), Some(0));
    member.close().await?;
    let mut member = join(&one, &group, GroupOptions::new()).await?;
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((again.message().payload().as_ref(), again.attempt()), (&b"1"[..], 2));
    again.ack().await?;
    drop(member);
    assert!(one.close(Duration::MAX).await.complete);
    Ok(())
}

fn topics() -> Vec<String> {
    use rdkafka::consumer::Consumer as _;
    let none = Topic::new("broker-none").unwrap();
    let metadata = raw_consumer(&none).fetch_metadata(None, Duration::from_secs(10)).unwrap();
    metadata.topics().iter().map(|topic| topic.name().to_owned()).collect()
}

/// More retries than a commit has room to speak of: held, they would stall their partition.
#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_long_retries_stalls_nobody() -> Result<()> {
    let (broker, topic) = (broker(PARAMETERS)?, topic("many")?);
    let group: Group = format!("many@{topic}").parse()?;
    let options = Subscribe::group(group.name.clone()).with_max_in_flight(500)?;
    let mut member = broker.subscribe(&group.filter, options).await?;
    let messages = (0..3_000).map(|n| Message::new(n.to_string())).collect();
    broker.publish_batch(&topic, messages).await?.into_iter().for_each(|result| drop(result.unwrap()));
    broker.publish(&topic, Message::new("last")).await?;
    let mut set_aside = 0;
    loop {
        let delivery = take(&mut member, 1).await?.remove(0);
        if payload(&delivery) == "last" {
            delivery.ack().await?;
            break;
        }
        assert_eq!(delivery.attempt(), 1);
        delivery.retry_after(Duration::from_secs(40)).await?;
        set_aside += 1;
    }
    assert_eq!(set_aside, 3_000);
    assert!(broker.delete_group(&group).await?);
    broker.close(Duration::from_secs(10)).await;
    Ok(())
}

/// In an ordered group a key waits for its message, so that such a message never goes aside.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_key_waits_for_its_retry_all_the_same() -> Result<()> {
    let (broker, topic) = (broker(PARAMETERS)?, topic("ordered")?);
    let group: Group = format!("ordered@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new().with_ordered(true)).await?;
    for (payload, key) in [("1", "a"), ("2", "a"), ("3", "b")] {
        broker.publish(&topic, Message::new(payload).with_key(key)).await?;
    }
    let mut seen = Vec::new();
    for _ in 0..4 {
        let delivery = take(&mut member, 1).await?.remove(0);
        seen.push((payload(&delivery), delivery.attempt()));
        if seen.len() == 1 {
            delivery.retry_after(Duration::from_secs(3)).await?;
        } else {
            delivery.ack().await?;
        }
    }
    let expected = [("1", 1), ("3", 1), ("1", 2), ("2", 1)];
    assert_eq!(seen, expected.map(|(payload, attempt)| (payload.to_owned(), attempt)));
    assert!(broker.delete_group(&group).await?);
    close(&broker).await;
    Ok(())
}

/// Topics that nobody may make: a retry is held by its member instead of waiting there, and whoever rejects is told. The dead
/// letter is written once there is a topic for it.
#[tokio::test(flavor = "multi_thread")]
async fn where_no_topic_may_be_made_nothing_hangs_and_nothing_is_lost() -> Result<()> {
    let (other, topic) = (broker("")?, topic("unmade")?);
    let group: Group = format!("unmade-{:x}@{topic}", fastrand::u64(..)).parse()?;
    for payload in ["retried", "rejected", "next"] {
        other.publish(&topic, Message::new(payload)).await?;
    }
    let broker = broker("&retry_topics=10ms&auto_create=false")?;
    let mut member = join(&broker, &group, GroupOptions::new().with_start(broker_core::StartAt::Earliest)).await?;
    let mut taken = take(&mut member, 3).await?;
    taken.remove(0).retry_after(Duration::from_millis(20)).await?;
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.attempt()), ("retried", 2));
    again.ack().await?;
    let rejected = tokio::time::timeout(Duration::from_secs(20), taken.remove(0).reject("no such customer")).await;
    let error = rejected.expect("an answer").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    taken.remove(0).ack().await?;

    let dead = Topic::new(format!("dead.{}", group.name))?;
    drop(other.subscribe(&(&dead).into(), Subscribe::new()).await?);
    let letters = wait_for_letters(&other, &group, 1).await?;
    assert_eq!(letters[0].message.payload().as_ref(), b"rejected");
    close(&broker).await;
    assert_eq!(committed(&group, &topic), Some(3));
    assert!(other.delete_group(&group).await?);
    close(&other).await;
    Ok(())
}
