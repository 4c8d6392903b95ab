//! What a group keeps on the server: progress, settings, names.

use super::*;

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

/// Kafka has topics whose names are none of ours. One that a pattern seems to mean is not taken for what it means, and keeps
/// nobody from the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_is_not_held_up_by_a_topic_that_is_none_of_ours() -> Result<()> {
    use broker_kafka::rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
    let (broker, topic) = (broker("&metadata_refresh=1s")?, topic("strange")?);
    let admin = admin();
    let strange = [format!("{topic}..x"), format!("{topic}.x.")];
    let new = strange.each_ref().map(|name| NewTopic::new(name, 1, TopicReplication::Fixed(1)));
    admin.create_topics(&new, &AdminOptions::new()).await.unwrap().into_iter().for_each(|made| drop(made.unwrap()));
    let group: Group = format!("strange@{topic}.>").parse()?;
    let ours = Topic::new(format!("{topic}.x.y"))?;
    broker.publish(&ours, Message::new("1")).await?;
    let mut member = join(&broker, &group, GroupOptions::new().with_start(broker_core::StartAt::Earliest)).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    assert_eq!(delivery.topic(), &ours);
    delivery.ack().await?;
    let names = strange.each_ref().map(String::as_str);
    admin.delete_topics(&names, &AdminOptions::new()).await.unwrap();
    assert!(broker.delete_group(&group).await?);
    close(&broker).await;
    Ok(())
}

/// A group that another process has deleted begins anew, as who joins asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_deleted_elsewhere_begins_anew() -> Result<()> {
    let (one, two, topic) = (broker("")?, broker("")?, topic("elsewhere")?);
    let group: Group = format!("elsewhere@{topic}").parse()?;
    let mut member = join(&one, &group, GroupOptions::new()).await?;
    one.publish(&topic, Message::new("before")).await?;
    take(&mut member, 1).await?.remove(0).ack().await?;
    member.close().await?;
    assert!(two.delete_group(&group).await?);
    let ordered = GroupOptions::new().with_ordered(true);
    let mut member = join(&one, &group, ordered.clone()).await?;
    one.publish(&topic, Message::new("after")).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    assert_eq!(payload(&delivery), "after");
    delivery.ack().await?;
    // Its settings are the new ones, here and there.
    assert!(!one.create_group(&group, ordered.clone()).await? && !two.create_group(&group, ordered).await?);
    one.delete_group(&group).await?;
    close(&one).await;
    close(&two).await;
    Ok(())
}
