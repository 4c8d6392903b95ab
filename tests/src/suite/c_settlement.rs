//! C. Settlement.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use broker_core::{
    Broker, BrokerExt, DeadLetter, ErrorKind, Group, GroupOptions, Message, Settlement, Subscribe, Timestamp,
};
use tokio::sync::Notify;

use crate::{Attempt, Failed, PASSED, Scene, Verdict, ensure, numbered, quick_retry, refused, same_message, same_set};

pub(super) async fn acked_never_returns(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("acked").await?;
    let group = scene.group("acks", &topic)?;
    let mut member = scene.join(broker, &group).await?;
    let messages = numbered(20);
    scene.publish(broker, &topic, &messages).await?;
    same_set(&messages, &member.take_acked(20).await?)?;
    // The same connection, beyond the time after which what is unsettled comes back: by half of it, and not
    // for minutes where that is long. Whoever runs the suite sets it short.
    let beyond = (scene.timing().lease * 3 / 2).min(Duration::from_secs(5));
    member.quiet_for(scene.timing().quiet.max(beyond)).await?;
    member.close().await?;

    // Another member, on the same connection and on a new one.
    let mut member = scene.join(broker, &group).await?;
    member.quiet().await.map_err(|failed| failed.context("a new member"))?;
    member.close().await?;
    let second = scene.open().await?;
    let mut member = scene.join(&second, &group).await?;
    member.quiet().await.map_err(|failed| failed.context("a new connection"))?;

    // After a close, which hands back what the connection held.
    let marker = numbered(1);
    if !scene.in_process() {
        scene.publish(&second, &topic, &messages).await?;
        member.take_acked(20).await?;
        scene.close(&second).await?;
    }
    drop(member);
    let third = scene.open().await?;
    let mut member = scene.join(&third, &group).await?;
    scene.publish(&third, &topic, &marker).await?;
    member.expect(&marker).await.map_err(|failed| failed.context("after a close"))?;
    if !scene.in_process() {
        scene.close(&third).await?;
    }
    PASSED
}

pub(super) async fn retry_redelivers(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("retry").await?;
    for (name, with_group) in [("in a group", true), ("without a group", false)] {
        let mut inbox = if with_group {
            scene.join(broker, &scene.group("retries", &topic)?).await?
        } else {
            scene.listen(broker, &topic).await?
        };
        for message in [Message::new("bare"), with_every_part(broker)?] {
            scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
            for _ in 0..3 {
                let delivery = inbox.one().await.map_err(|failed| failed.context(name))?;
                same_message(&message, delivery.message()).map_err(|failed| failed.context(name))?;
                inbox.settled(delivery.retry()).await?;
            }
            let received = inbox.acked().await.map_err(|failed| failed.context(name))?;
            same_message(&message, received.message()).map_err(|failed| failed.context(name))?;
        }
        inbox.quiet().await?;
        inbox.close().await?;
    }
    PASSED
}

/// A message with all that the broker can carry.
fn with_every_part(broker: &dyn Broker) -> Attempt<Message> {
    let can = broker.capabilities();
    let mut message = Message::new("again").with_key("k").with_content_type("text/plain")?.with_header("h", "v")?;
    // Such as a server might take for its own notes on a retry.
    for name in ["x-death", "x-first-death-queue", "x-cause-of-death", "x-delivery-count", "x-retry-count"] {
        message = message.with_header(name, "the publisher's")?;
    }
    if can.delay.is_some() {
        message = message.with_deliver_at(Timestamp::from_millis(1));
    }
    if can.expiry.is_some() {
        message = message.with_ttl(Duration::from_secs(3600));
    }
    if can.deduplication.is_some() {
        let key = message.id().to_string();
        message = message.with_dedup_key(key)?;
    }
    Ok(message)
}

/// The dead letters kept for `group`, once there are `count`, by the broker's own listing.
async fn listed(broker: &dyn Broker, scene: &Scene, group: &Group, count: usize) -> Attempt<Vec<DeadLetter>> {
    let listing = async || {
        let letters = broker.dead_letters(group, 100).await?;
        Ok((letters.len() >= count).then_some(letters))
    };
    let letters = scene.eventually("listing the dead letters", listing).await?;
    ensure!(letters.len() == count, "{} dead letters are kept, not {count}", letters.len());
    Ok(letters)
}

/// What a dead letter of `message` must tell.
fn check_letter(letter: &DeadLetter, message: &Message, group: &Group, reason: &str, attempts: u32) -> Attempt {
    same_message(message, &letter.message).map_err(|failed| failed.context("the dead letter's message"))?;
    ensure!(Some(&letter.topic) == group.filter.topic().as_ref(), "the dead letter's origin is {}", letter.topic);
    ensure!(letter.group.as_ref() == Some(group), "the dead letter's group is {:?}", letter.group);
    ensure!(letter.attempts == attempts, "the dead letter counts {} attempts, not {attempts}", letter.attempts);
    ensure!(letter.failure.reason().contains(reason), "the dead letter's reason is {:?}", letter.failure.reason());
    let now = Timestamp::now();
    ensure!(
        message.timestamp() <= letter.first && letter.first <= letter.last && letter.last <= now,
        "the dead letter's times are {} and {}",
        letter.first,
        letter.last
    );
    Ok(())
}

pub(super) async fn reject_dead_letters(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("reject").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("rejects", &topic)?;
    let mut letters = scene.join(broker, &scene.group("reader", &dead)?).await?;
    let mut member = scene.join_with(broker, &group, scene.quick()?.with_dead_letter(dead.clone()), 256).await?;
    let message = Message::new("bad").with_key("k").with_header("h", vec![0, 255])?.with_content_type("text/plain")?;
    scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
    let delivery = member.one().await?;
    member.settled(delivery.retry()).await?;
    let delivery = member.one().await?;
    member.settled(delivery.reject("no such customer")).await?;
    member.quiet().await?;

    // On the dead-letter topic, for whoever reads it, once.
    let received = letters.acked().await.map_err(|failed| failed.context("the dead-letter topic"))?;
    ensure!(*received.topic() == dead, "the dead letter came on {}", received.topic());
    let letter = DeadLetter::from_message(received.message().clone())?;
    check_letter(&letter, &message, &group, "no such customer", 2)?;
    letters.quiet().await?;

    if !broker.capabilities().dead_letters.is_some() {
        let listing = scene.within("listing the dead letters", broker.dead_letters(&group, 10)).await?;
        refused("listing dead letters", listing, &[ErrorKind::Unsupported])?;
        return PASSED;
    }
    // Kept for the group, listed, redriven to it alone with attempts from 1, and purged.
    let kept = listed(broker, scene, &group, 1).await?;
    for letter in &kept {
        check_letter(letter, &message, &group, "no such customer", 2)?;
    }
    let mut bystander = scene.listen(broker, &topic).await?;
    let redriven = scene.done("redriving", broker.redrive(&group, 10)).await?;
    ensure!(redriven == 1, "one dead letter was kept and {redriven} redriven");
    let delivery = member.one().await.map_err(|failed| failed.context("after redriving"))?;
    ensure!(delivery.attempt() == 1, "a redriven message begins with attempt {}", delivery.attempt());
    same_message(&message, delivery.message())?;
    member.settled(delivery.reject("still none")).await?;
    let kept = listed(broker, scene, &group, 1).await?;
    for letter in &kept {
        check_letter(letter, &message, &group, "still none", 1)?;
    }
    bystander.quiet().await.map_err(|failed| failed.context("a bystander while redriving"))?;
    let purged = scene.done("purging dead letters", broker.purge_dead_letters(&group)).await?;
    ensure!(purged == 1, "one dead letter was kept and {purged} purged");
    listed(broker, scene, &group, 0).await?;
    PASSED
}

pub(super) async fn settled_once(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // That a delivery cannot be settled twice is the compiler's to keep; what is left is a broker
    // that counts one settlement twice: as settled, and once more as dropped.
    let topic = scene.topic("once").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("settles", &topic)?;
    let mut letters = scene.listen(broker, &dead).await?;
    let options = scene.quick()?.with_dead_letter(dead);
    let mut member = scene.join_with(broker, &group, options, 256).await?;
    let messages = numbered(4);
    scene.publish(broker, &topic, &messages).await?;
    let mut again = 0;
    for (number, delivery) in member.take(4).await?.into_iter().enumerate() {
        let received = delivery.received().clone();
        let settle = match number {
            0 => delivery.ack(),
            1 => delivery.reject("once"),
            2 => delivery.retry(),
            _ => delivery.settle(Settlement::Retry { after: Some(Duration::from_millis(5)), failure: None }),
        };
        // Whether its outcome is awaited or dropped, a settlement counts once.
        if number % 2 == 0 {
            member.settled(settle).await?;
        } else {
            let _ = futures_util::FutureExt::now_or_never(member.settled(settle));
        }
        again += usize::from(number >= 2);
        drop(received);
    }
    let received = member.take_acked(again).await?;
    ensure!(received.iter().all(|one| one.attempt() == 2), "a retried message came back with another attempt");
    member.quiet().await?;
    letters.acked().await?;
    letters.quiet().await.map_err(|failed| failed.context("the dead-letter topic"))?;
    PASSED
}

pub(super) async fn acks_are_exact(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("exact").await?;
    let group = scene.group("exact", &topic)?;
    let mut member = scene.join(broker, &group).await?;
    // One key: on a partitioned broker they share a partition, where a watermark would show.
    let messages: Vec<_> = (0..10).map(|n| Message::new(n.to_string()).with_key("one")).collect();
    scene.publish(broker, &topic, &messages).await?;
    let mut unsettled = Vec::new();
    for (number, delivery) in member.take(10).await?.into_iter().enumerate() {
        if number == 4 || number == 9 {
            member.settled(delivery.ack()).await?;
        } else {
            unsettled.push(delivery);
        }
    }
    let wanted: Vec<Message> = unsettled.iter().map(|delivery| delivery.message().clone()).collect();
    drop(unsettled);
    let received = member.take_acked(wanted.len()).await?;
    same_set(&wanted, &received)?;
    member.quiet().await?;
    PASSED
}

pub(super) async fn dropped_comes_back(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("dropped").await?;
    let mut member = scene.join(broker, &scene.group("drops", &topic)?).await?;
    let message = Message::new("dropped");
    scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
    drop(member.one().await?);
    let delivery = member.one().await.map_err(|failed| failed.context("after a drop"))?;
    same_message(&message, delivery.message())?;
    ensure!(delivery.attempt() == 2, "a dropped delivery is an attempt; it came back as {}", delivery.attempt());

    // A delivery outlives its subscription, and can still be settled, or dropped.
    let group = scene.group("outlives", &topic)?;
    let mut leaving = scene.join(broker, &group).await?;
    let messages = numbered(2);
    scene.publish(broker, &topic, &messages).await?;
    let mut held = leaving.take(2).await?;
    drop(leaving);
    if let Some(acked) = held.pop() {
        member.settled(acked.ack()).await.map_err(|failed| failed.context("settling after unsubscribing"))?;
    }
    let dropped: Vec<Message> = held.iter().map(|delivery| delivery.message().clone()).collect();
    drop(held);
    let mut next = scene.join(broker, &group).await?;
    next.expect(&dropped).await.map_err(|failed| failed.context("after unsubscribing"))?;
    PASSED
}

pub(super) async fn failing_handlers(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("handlers").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("fails", &topic)?;
    let mut letters = scene.listen(broker, &dead).await?;
    let (calls, others) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (counted, passed) = (Arc::clone(&calls), Arc::clone(&others));
    let options = scene.quick()?.with_dead_letter(dead);
    let handling =
        broker.handle(&group.filter.clone(), Subscribe::group(group.name).with_options(options), move |received| {
            let bad = received.message().payload() == "bad";
            let call = if bad { counted.fetch_add(1, Ordering::SeqCst) } else { passed.fetch_add(1, Ordering::SeqCst) };
            async move {
                match call {
                    // Unwinds as a panic does, without the hook that would print it.
                    0 if bad => std::panic::resume_unwind(Box::new("a handler's panic")),
                    1 if bad => Err(Failed("a handler's error".to_owned())),
                    _ => Ok(()),
                }
            }
        });
    let handling = scene.done("subscribing", handling).await?;
    scene.publish(broker, &topic, &[Message::new("good"), Message::new("bad"), Message::new("good")]).await?;
    scene
        .eventually("the message being retried after a panic and an error", async || {
            Ok((calls.load(Ordering::SeqCst) >= 3).then_some(()))
        })
        .await?;
    scene.publish(broker, &topic, &[Message::new("good")]).await?;
    scene
        .eventually("the subscription going on", async || Ok((others.load(Ordering::SeqCst) >= 3).then_some(())))
        .await?;
    scene.pause().await;
    let calls = (calls.load(Ordering::SeqCst), others.load(Ordering::SeqCst));
    ensure!(calls == (3, 3), "the handler ran {} and {} times, not 3 and 3", calls.0, calls.1);
    letters.quiet().await.map_err(|failed| failed.context("the dead-letter topic"))?;
    scene.done("stopping the handler", handling.stop()).await?;
    PASSED
}

pub(super) async fn attempts_grow(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("attempts").await?;
    let mut member = scene.join(broker, &scene.group("attempts", &topic)?).await?;
    scene.publish(broker, &topic, &[Message::new("grows")]).await?;
    for expected in 1..=5 {
        let delivery = member.one().await?;
        ensure!(delivery.attempt() == expected, "delivery {expected} says it is attempt {}", delivery.attempt());
        match expected {
            1 => member.settled(delivery.retry()).await?,
            2 => drop(delivery),
            3 => member.settled(delivery.retry_after(Duration::from_millis(5))).await?,
            4 => member.settled(delivery.retry()).await?,
            _ => member.settled(delivery.ack()).await?,
        }
    }
    member.quiet().await?;

    // Given back untried, it was no attempt, however often.
    scene.publish(broker, &topic, &[Message::new("released")]).await?;
    for (attempt, settlement) in [
        (1, Settlement::Release),
        (1, Settlement::Release),
        (1, Settlement::Retry { after: None, failure: None }),
        (2, Settlement::Release),
        (2, Settlement::Ack),
    ] {
        let delivery = member.one().await.map_err(|failed| failed.context("after a release"))?;
        ensure!(delivery.attempt() == attempt, "attempt {attempt} says it is attempt {}", delivery.attempt());
        member.settled(delivery.settle(settlement)).await?;
    }
    member.quiet().await?;
    PASSED
}

pub(super) async fn exhausted(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("exhausted").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("gives-up", &topic)?;
    let mut letters = scene.join(broker, &scene.group("reader", &dead)?).await?;
    let options = GroupOptions::new().with_retry(quick_retry(3)?).with_dead_letter(dead);
    let mut member = scene.join_with(broker, &group, options, 256).await?;
    let messages = [Message::new("hopeless"), Message::new("dropped")];
    scene.publish(broker, &topic, &messages).await?;
    for _ in 0..6 {
        let delivery = member.one().await?;
        ensure!(delivery.attempt() <= 3, "attempt {} of at most 3", delivery.attempt());
        if delivery.message().payload() == "dropped" {
            drop(delivery);
        } else {
            member.settled(delivery.retry()).await?;
        }
    }
    member.quiet().await?;
    let received = letters.take_acked(2).await.map_err(|failed| failed.context("the dead-letter topic"))?;
    for (one, message) in received.iter().filter_map(|one| {
        messages.iter().find(|message| message.id() == one.message().id()).map(|message| (one, message))
    }) {
        let letter = DeadLetter::from_message(one.message().clone())?;
        check_letter(&letter, message, &group, "", 3)?;
    }
    same_set(&messages, &received)?;
    letters.quiet().await?;
    if broker.capabilities().dead_letters.is_some() {
        listed(broker, scene, &group, 2).await?;
    }
    PASSED
}

pub(super) async fn retry_delay_is_a_floor(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("floor").await?;
    let mut member = scene.join(broker, &scene.group("floor", &topic)?).await?;
    for floor in [Duration::from_millis(50), Duration::from_millis(400)] {
        scene.publish(broker, &topic, &[Message::new("later")]).await?;
        let delivery = member.one().await?;
        let begin = Instant::now();
        member.settled(delivery.retry_after(floor)).await?;
        let delivery = member.one().await?;
        let waited = begin.elapsed();
        ensure!(waited >= floor, "retry_after({floor:?}) came back after {waited:?}");
        member.settled(delivery.ack()).await?;
    }
    PASSED
}

pub(super) async fn cancelled_handler(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // A task that held a delivery is aborted: the message is neither acked nor lost.
    let topic = scene.topic("aborted").await?;
    let mut member = scene.join(broker, &scene.group("aborts", &topic)?).await?;
    let message = Message::new("held");
    scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
    let delivery = member.one().await?;
    let held = tokio::spawn(async move {
        std::future::pending::<()>().await;
        drop(delivery.ack());
    });
    held.abort();
    let _ = held.await;
    let delivery = member.one().await.map_err(|failed| failed.context("after an aborted task"))?;
    same_message(&message, delivery.message())?;
    member.settled(delivery.ack()).await?;

    // A handler cut short by close: not acked, not nacked, not dead-lettered.
    let handle = scene.open().await?;
    let topic = scene.topic("cut").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("cut", &topic)?;
    let started = Arc::new(Notify::new());
    let begun = Arc::clone(&started);
    let options = Subscribe::group(group.name.clone())
        .with_options(GroupOptions::new().with_retry(quick_retry(2)?).with_dead_letter(dead.clone()));
    let handling = handle.handle(&group.filter, options, move |_| {
        begun.notify_one();
        std::future::pending::<()>()
    });
    let _handling = scene.done("subscribing", handling).await?;
    scene.publish(&handle, &topic, &[Message::new("cut")]).await?;
    scene.within("the handler starting", started.notified()).await?;
    let report = scene.within("close", handle.close(Duration::from_millis(200))).await?;
    ensure!(!report.complete, "a handler was cut short and the drain called complete");
    ensure!(report.in_flight == 1, "one delivery was in flight, the report says {}", report.in_flight);
    ensure!(report.dead_letters == 0 || !scene.in_process(), "a handler cut short was dead-lettered");
    if scene.in_process() {
        return PASSED;
    }
    // Of two attempts the one that was cut may count, where a lease ran out, and no more than once.
    let next = scene.open().await?;
    let mut letters = scene.listen(&next, &dead).await?;
    let mut member = scene.join_with(&next, &group, GroupOptions::new(), 256).await?;
    member.acked().await.map_err(|failed| failed.context("the message coming back"))?;
    letters.quiet().await?;
    scene.close(&next).await?;
    PASSED
}
