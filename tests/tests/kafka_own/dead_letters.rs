//! Dead letters that fail again, and such as are none of ours.

use broker_core::{Broker as _, DeadLetter};

use super::*;

/// The payload, the topic and the reason of each.
fn told(letters: &[DeadLetter]) -> Vec<(String, String, &str)> {
    let payload = |letter: &DeadLetter| String::from_utf8_lossy(letter.message.payload()).into_owned();
    letters.iter().map(|letter| (payload(letter), letter.topic.to_string(), letter.failure.reason())).collect()
}

/// Whoever watches a dead-letter topic may fail as well: the letter is then in the watcher's list, and goes round to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_again_is_in_the_list_of_the_group_that_failed() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("again")?);
    let (dead, deader) = (Topic::new(format!("{topic}.dead"))?, Topic::new(format!("{topic}.deader"))?);
    let (billing, ops): (Group, Group) = (format!("billing@{topic}").parse()?, format!("ops@{dead}").parse()?);
    let mut watcher = join(&broker, &ops, GroupOptions::new().with_dead_letter(deader.clone())).await?;
    let mut other = broker.subscribe(&(&deader).into(), Subscribe::new()).await?;
    let mut member = join(&broker, &billing, GroupOptions::new().with_dead_letter(dead.clone())).await?;
    broker.publish(&topic, Message::new("1")).await?;
    take(&mut member, 1).await?.remove(0).reject("no such customer").await?;
    take(&mut watcher, 1).await?.remove(0).reject("nobody to call").await?;
    let letters = broker.dead_letters(&ops, 10).await?;
    assert_eq!(told(&letters), [("1".to_owned(), dead.to_string(), "nobody to call")]);
    let letters = broker.dead_letters(&billing, 10).await?;
    assert_eq!(told(&letters), [("1".to_owned(), topic.to_string(), "no such customer")]);
    assert!(is_quiet(&mut other).await && is_quiet(&mut watcher).await, "it was sent round");
    assert_eq!(broker.redrive(&ops, 10).await?, 1);
    let again = take(&mut watcher, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.topic(), again.attempt()), ("1", &dead, 1));
    again.ack().await?;
    assert_eq!((broker.dead_letters(&ops, 10).await?.len(), broker.purge_dead_letters(&billing).await?), (0, 1));
    for group in [&billing, &ops] {
        broker.delete_group(group).await?;
    }
    close(&broker).await;
    Ok(())
}

/// A message that somebody sends on with the headers of a dead letter is a message: rejected, it is not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_looks_like_a_dead_letter_is_kept_when_it_fails() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("alike")?);
    let dead = Topic::new(format!("{topic}.dead"))?;
    let group: Group = format!("billing@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new().with_dead_letter(dead.clone())).await?;
    broker.publish(&topic, Message::new("1").with_header("broker-dead-reason", "elsewhere")?).await?;
    take(&mut member, 1).await?.remove(0).reject("no such customer").await?;
    let letters = broker.dead_letters(&group, 10).await?;
    assert_eq!(told(&letters), [("1".to_owned(), topic.to_string(), "no such customer")]);
    assert_eq!(broker.redrive(&group, 10).await?, 1);
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.topic()), ("1", &topic));
    again.ack().await?;
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

/// A group that reads everything reads its own dead letters. One that it rejects is in its list already.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_reads_its_own_dead_letters_has_each_of_them_once() -> Result<()> {
    let (broker, topic) = (broker("&metadata_refresh=1s")?, topic("own")?);
    let (orders, dead) = (Topic::new(format!("{topic}.orders"))?, Topic::new(format!("{topic}.dead"))?);
    let group: Group = format!("all@{topic}.>").parse()?;
    broker.publish(&orders, Message::new("before")).await?;
    let mut member = join(&broker, &group, GroupOptions::new().with_dead_letter(dead.clone())).await?;
    broker.publish(&orders, Message::new("1")).await?;
    for (reason, from) in [("first", &orders), ("second", &dead)] {
        let delivery = take(&mut member, 1).await?.remove(0);
        assert_eq!((payload(&delivery).as_str(), delivery.topic()), ("1", from));
        delivery.reject(reason).await?;
    }
    assert!(is_quiet(&mut member).await, "it was sent round");
    let letters = broker.dead_letters(&group, 10).await?;
    assert_eq!(told(&letters), [("1".to_owned(), orders.to_string(), "first")]);
    assert_eq!(broker.redrive(&group, 10).await?, 1);
    let again = take(&mut member, 1).await?.remove(0);
    assert_eq!((payload(&again).as_str(), again.topic()), ("1", &orders));
    again.ack().await?;
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}
