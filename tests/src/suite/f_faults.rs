//! F. Faults.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use broker_core::{
    Broker, BrokerExt, DeadLetter, ErrorKind, GroupOptions, Message, Publisher, PublisherOptions, Received,
};
use futures_util::future::join;
use parking_lot::Mutex;

use crate::{
    Attempt, Failed, Inbox, PASSED, Scene, Shown, Verdict, ensure, numbered, refused, same_message, same_set, sent,
};

/// Publishes until the broker has taken it, as a caller with patience does.
async fn publish_until_taken(scene: &Scene, publisher: &Publisher, message: &Message) -> Attempt {
    let trying = async {
        loop {
            match publisher.publish(message.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if error.is_retryable() => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => return Err(Failed(format!("publishing with the broker away failed for good: {error}"))),
            }
        }
    };
    scene.within("publishing until the broker has taken it", trying).await?
}

async fn publish_all_until_taken(scene: &Scene, publisher: &Publisher, messages: &[Message]) -> Attempt {
    for message in messages {
        publish_until_taken(scene, publisher, message).await?;
    }
    Ok(())
}

/// Receives and acks until `done` says that what was received is enough. An ack that a lost
/// connection swallows is no failure: the message comes back.
async fn receive_until(
    scene: &Scene,
    inbox: &mut Inbox,
    received: &mut Vec<Received>,
    mut done: impl FnMut(&[Received]) -> bool,
) -> Attempt {
    let receiving = async {
        while !done(received) {
            let delivery = inbox.subscription().next().await?;
            let delivery = delivery.ok_or_else(|| Failed("the subscription ended".to_owned()))?;
            received.push(delivery.received().clone());
            let _ = delivery.ack().await;
        }
        Ok(())
    };
    scene.arriving("receiving what was published", receiving).await?
}

/// Whether each of `messages` is among `received`.
fn has_all(messages: &[Message], received: &[Received]) -> bool {
    let have: BTreeSet<String> = received.iter().map(|one| one.message().id().to_string()).collect();
    messages.iter().all(|message| have.contains(&message.id().to_string()))
}

pub(super) async fn restarts(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let link = match scene.link(broker).await {
        Ok(link) => link,
        Err(verdict) => return verdict,
    };
    let handle = link.open()?;
    scene.done("connecting", handle.connect()).await?;
    let topic = scene.topic("restart").await?;
    let group = scene.group("restart", &topic)?;
    let mut member = scene.join(&*handle, &group).await?;
    let publisher = handle.publisher(&topic, PublisherOptions::new())?;
    let messages = numbered(150);
    let lost_with_it = Mutex::new(false);

    let load = async {
        for message in &messages {
            publish_until_taken(scene, &publisher, message).await?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Attempt::Ok(())
    };
    let faults = async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(150)).await;
            let real = scene.done("restarting the broker", link.restart()).await?;
            *lost_with_it.lock() |= real;
        }
        Attempt::Ok(())
    };
    let mut received = Vec::new();
    let volatile = |real: bool| real && !handle.capabilities().durable;
    let all = async {
        let (load, faults) = join(load, faults).await;
        load?;
        faults
    };
    // What a broker in memory had at its restart is gone, as its capabilities say; what is published
    // after it is not.
    let receive = receive_until(scene, &mut member, &mut received, |received| {
        has_all(
            if volatile(*lost_with_it.lock()) { messages.get(149..).unwrap_or_default() } else { &messages },
            received,
        )
    });
    let (all, receive) = join(all, receive).await;
    all?;
    receive?;
    for one in &received {
        same_message(sent(&messages, one.message().id())?, one.message())?;
    }
    if volatile(*lost_with_it.lock()) {
        return Ok(Shown::Declared("not durable: what a restart finds in memory is gone; it recovers".to_owned()));
    }
    PASSED
}

pub(super) async fn lost_connection(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let link = match scene.link(broker).await {
        Ok(link) => link,
        Err(verdict) => return verdict,
    };
    let handle = link.open()?;
    scene.done("connecting", handle.connect()).await?;
    let topic = scene.topic("cut").await?;
    let group = scene.group("cut", &topic)?;
    let mut member = scene.join(&*handle, &group).await?;
    let mut alone = scene.listen(&*handle, &topic).await?;
    for round in 0..3 {
        let before = numbered(5);
        scene.publish(broker, &topic, &before).await?;
        link.cut().await;
        let after = numbered(5);
        scene.publish(broker, &topic, &after).await?;
        let both: Vec<Message> = before.iter().chain(&after).cloned().collect();
        let mut received = Vec::new();
        let receiving = receive_until(scene, &mut member, &mut received, |received| has_all(&both, received));
        receiving.await.map_err(|failed| failed.context(format!("the group after cut {round}")))?;
        // Without a group a message in between may be lost, and then the subscriber is told. A marker that
        // arrives says that it hears again, not that the other partitions of the topic have been read.
        let marker = numbered(1);
        let publisher = broker.publisher(&topic, PublisherOptions::new())?;
        let mut received = Vec::new();
        let seen = AtomicBool::new(false);
        let markers = async {
            while !seen.load(Ordering::Relaxed) {
                publish_all_until_taken(scene, &publisher, &marker).await?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Attempt::Ok(())
        };
        let receiving = async {
            let done = receive_until(scene, &mut alone, &mut received, |received| has_all(&marker, received)).await;
            seen.store(true, Ordering::Relaxed);
            done
        };
        let (published, received_marker) = join(markers, receiving).await;
        published?;
        received_marker.map_err(|failed| failed.context(format!("without a group after cut {round}")))?;
        if alone.subscription().gap().is_none() {
            let all = receive_until(scene, &mut alone, &mut received, |received| has_all(&both, received)).await;
            ensure!(
                all.is_ok() || alone.subscription().gap().is_some(),
                "messages were lost with cut {round} and the subscriber was not told"
            );
        }
        // The markers that were in flight when the first was seen.
        while let Ok(next) = tokio::time::timeout(scene.timing().quiet, alone.subscription().next()).await {
            let delivery = next?.ok_or_else(|| Failed("the subscription ended".to_owned()))?;
            let _ = delivery.ack().await;
        }
        while let Ok(next) = tokio::time::timeout(scene.timing().quiet, member.subscription().next()).await {
            let delivery = next?.ok_or_else(|| Failed("the subscription ended".to_owned()))?;
            let _ = delivery.ack().await;
        }
    }
    // The handle publishes and makes groups again as well.
    let last = numbered(3);
    let publisher = handle.publisher(&topic, PublisherOptions::new())?;
    publish_all_until_taken(scene, &publisher, &last).await?;
    let mut received = Vec::new();
    receive_until(scene, &mut member, &mut received, |received| has_all(&last, received)).await?;
    PASSED
}

pub(super) async fn members_come_and_go(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("churn").await?;
    let group = scene.group("churn", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    let messages: Vec<_> = (0..200).map(|n| Message::new(n.to_string()).with_key(n.to_string())).collect();
    let mut acked: Vec<Received> = Vec::new();

    let publishing = async {
        let publisher = broker.publisher(&topic, PublisherOptions::new())?;
        for message in &messages {
            scene.publish_one(&publisher, message.clone()).await?;
            tokio::task::yield_now().await;
        }
        Attempt::Ok(())
    };
    let churning = async {
        for round in 0..10 {
            let mut member = scene.join_with(broker, &group, GroupOptions::new(), 8).await?;
            for delivery in member.take(8).await? {
                // Some are acked, the rest leaves with the member, unsettled.
                if round % 2 == 0 || delivery.message().payload().ends_with(b"1") {
                    acked.push(delivery.received().clone());
                    member.settled(delivery.ack()).await?;
                }
            }
        }
        Attempt::Ok(())
    };
    let (published, churned) = join(publishing, churning).await;
    published?;
    churned?;
    let mut last = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    while !has_all(&messages, &acked) {
        let received = last.acked().await;
        let missing = messages.len().saturating_sub(acked.len());
        acked.push(received.map_err(|failed| failed.context(format!("{missing} of 200 are still to come")))?);
    }
    last.quiet().await?;
    // What was acked once never came again: the duplicates are those that were held back.
    same_set(&messages, &acked)?;
    PASSED
}

pub(super) async fn undecodable(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("raw").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("raw", &topic)?;
    let mut member = scene.join_with(broker, &group, scene.quick()?.with_dead_letter(dead.clone()), 256).await?;
    let mut letters = scene.listen(broker, &dead).await?;
    let before = numbered(2);
    scene.publish(broker, &topic, &before).await?;
    let injected = scene.within("injecting bytes", scene.harness().inject(&topic)).await?;
    let after = numbered(2);
    scene.publish(broker, &topic, &after).await?;
    let both: Vec<Message> = before.into_iter().chain(after).collect();
    member.expect(&both).await.map_err(|failed| failed.context("around bytes that are no message"))?;
    match injected {
        None if scene.in_process() => Ok(Shown::Declared("in-process: nothing is decoded".to_owned())),
        None => Ok(Shown::NoControl("nothing here can put other bytes on a topic".to_owned())),
        Some(Err(error)) => {
            refused("bytes that are no message", Err::<(), _>(error), &[ErrorKind::Codec, ErrorKind::Invalid])?;
            PASSED
        }
        Some(Ok(())) => {
            let letter = letters.acked().await.map_err(|failed| failed.context("the dead-letter topic"))?;
            let letter = DeadLetter::from_message(letter.message().clone())?;
            ensure!(letter.topic == topic, "the dead letter's origin is {}", letter.topic);
            PASSED
        }
    }
}

pub(super) async fn tombstone(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("tombstone").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let message = Message::tombstone().with_key("gone").with_header("h", "v")?;
    let publish = scene.within("publishing", broker.publish(&topic, message.clone())).await?;
    if !broker.capabilities().tombstones.is_some() {
        refused("publishing a tombstone", publish, &[ErrorKind::Unsupported])?;
        return Ok(Shown::Declared("tombstones are refused".to_owned()));
    }
    publish?;
    let empty = Message::new("").with_key("empty");
    scene.publish(broker, &topic, std::slice::from_ref(&empty)).await?;
    let both = [message, empty];
    for one in inbox.expect(&both).await? {
        same_message(sent(&both, one.message().id())?, one.message())?;
    }
    PASSED
}

pub(super) async fn unroutable(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("nowhere").await?;
    let options = PublisherOptions::new().with_require_route(true);
    let publisher = broker.publisher(&topic, options);
    if !broker.capabilities().require_route.is_some() {
        // Refused where the handle is made, or by its first publish.
        let result = match publisher {
            Ok(publisher) => scene.within("publishing", publisher.publish(Message::new("nobody"))).await?.map(drop),
            Err(error) => Err(error),
        };
        refused("require_route", result, &[ErrorKind::Unsupported])?;
        return Ok(Shown::Declared("require_route is refused".to_owned()));
    }
    let publisher = publisher?;
    let unrouted = scene.within("publishing", publisher.publish(Message::new("nobody"))).await?;
    refused("publishing to nobody with require_route", unrouted, &[ErrorKind::Unroutable])?;
    let receipts = scene.publish(broker, &topic, &numbered(1)).await?;
    let routed = receipts.first().and_then(|receipt| receipt.routed);
    ensure!(routed != Some(true), "a message nobody wanted was called routed");

    let group = scene.group("somebody", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    let message = Message::new("somebody");
    let receipt = scene.publish_one(&publisher, message.clone()).await?;
    ensure!(receipt.routed != Some(false), "a message a group wanted was called unrouted");
    let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    member.expect(&[message]).await?;
    PASSED
}

pub(super) async fn blocked(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let link = match scene.link(broker).await {
        Ok(link) => link,
        Err(verdict) => return verdict,
    };
    let handle = link.open()?;
    scene.done("connecting", handle.connect()).await?;
    let topic = scene.topic("blocked").await?;
    let publisher = handle.publisher(&topic, PublisherOptions::new())?;
    scene.publish_one(&publisher, Message::new("before")).await?;
    let away = [ErrorKind::Timeout, ErrorKind::Unavailable];

    for stalled in [true, false] {
        let what = if stalled { "a broker that answers nothing" } else { "a broker that refuses" };
        if stalled {
            link.stall().await;
        } else {
            link.down().await;
        }
        let publish = scene.within("publishing", publisher.publish(Message::new("blocked"))).await;
        let publish = publish.map_err(|failed| failed.context(what))?;
        let error = refused(&format!("publishing to {what}"), publish, &away)?;
        ensure!(error.is_retryable(), "{what} is not for ever, and the error says so: {error}");
        let second = link.open()?;
        let connect = scene.within("connecting", second.connect()).await.map_err(|failed| failed.context(what))?;
        refused(&format!("connecting to {what}"), connect, &away)?;
        scene.within("close", second.close(Duration::from_millis(200))).await?;
        link.up().await;
        publish_until_taken(scene, &publisher, &Message::new("after")).await.map_err(|failed| failed.context(what))?;
    }
    scene.close(&*handle).await?;
    PASSED
}

pub(super) async fn expired(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("expired").await?;
    let group = scene.group("expired", &topic)?;
    let dead = scene.topic("dead").await?;
    scene.create(broker, &group, scene.quick()?.with_dead_letter(dead.clone())).await?;
    let mut letters = scene.listen(broker, &dead).await?;
    let ttl = Duration::from_secs(1);
    let publish = broker.publish(&topic, Message::new("short").with_ttl(ttl));
    let publish = scene.within("publishing", publish).await?;
    if !broker.capabilities().expiry.is_some() {
        refused("publishing a message that expires", publish, &[ErrorKind::Unsupported])?;
        return Ok(Shown::Declared("expiry is refused".to_owned()));
    }
    publish?;
    let lasting = [Message::new("long").with_ttl(Duration::from_secs(3600)), Message::new("for ever")];
    scene.publish(broker, &topic, &lasting).await?;
    tokio::time::sleep(ttl + ttl / 2).await;
    let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    for one in member.expect(&lasting).await? {
        let message = sent(&lasting, one.message().id())?;
        same_message(message, one.message())?;
        ensure!(message.expires_at() == one.message().expires_at(), "the expiry arrived changed");
    }
    // A retry does not outlive it either.
    let brief = Message::new("brief").with_ttl(2 * ttl);
    scene.publish(broker, &topic, std::slice::from_ref(&brief)).await?;
    let delivery = member.one().await?;
    member.settled(delivery.retry_after(3 * ttl)).await?;
    member.quiet_for(3 * ttl + ttl / 2).await.map_err(|failed| failed.context("retried beyond its expiry"))?;
    letters.quiet().await.map_err(|failed| failed.context("an expired message's dead letter"))?;
    let status = scene.done("asking for the status", broker.status()).await?;
    let counted = status.group(&group).map(|status| status.counts.expired);
    ensure!(counted == Some(2), "2 messages expired and {counted:?} are counted");
    PASSED
}

pub(super) async fn unreachable(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let opened = match scene.harness().unreachable() {
        Some(opened) => opened?,
        None => return scene.no_connection(broker),
    };
    let result = scene.within("connecting to a broker that is not there", opened.connect()).await?;
    let error =
        refused("connecting to a broker that is not there", result, &[ErrorKind::Unavailable, ErrorKind::Timeout])?;
    ensure!(error.is_retryable(), "it may be there later, and the error says so: {error}");
    ensure!(!error.message().trim().is_empty(), "the error says nothing");
    let topic = scene.topic("nowhere").await?;
    let publish = scene.within("publishing", opened.publish(&topic, Message::new("nobody"))).await?;
    refused("publishing to a broker that is not there", publish, &[ErrorKind::Unavailable, ErrorKind::Timeout])?;
    scene.within("close", opened.close(Duration::from_millis(200))).await?;
    PASSED
}
