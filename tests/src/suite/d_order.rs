//! D. Order and pressure.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{
    Backlog, Broker, BrokerExt, ErrorKind, Group, GroupOptions, Message, Overflow, PublisherOptions, Subscribe, Topic,
};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{Attempt, Failed, Inbox, PASSED, Scene, Shown, Verdict, ensure, numbered, refused, same_set, shown};

/// Joins with `ordered`; `None` if the broker says that it cannot, and refuses.
async fn ordered(broker: &dyn Broker, scene: &Scene, group: &Group, max_in_flight: usize) -> Attempt<Option<Inbox>> {
    let options = scene.quick()?.with_ordered(true);
    if broker.capabilities().ordered.is_some() {
        return scene.join_with(broker, group, options, max_in_flight).await.map(Some);
    }
    let joining = broker.subscribe(&group.filter, Subscribe::group(group.name.clone()).with_options(options));
    refused("joining an ordered group", scene.within("joining", joining).await?, &[ErrorKind::Unsupported])?;
    Ok(None)
}

fn not_ordered() -> Verdict {
    Ok(Shown::Declared("order by key is not kept, and refused".to_owned()))
}

fn keyed(key: &str, text: &str) -> Message {
    Message::new(text.to_owned()).with_key(key.to_owned())
}

pub(super) async fn order_per_key(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("ordered").await?;
    let group = scene.group("ordered", &topic)?;
    let mut inboxes = Vec::new();
    for _ in 0..3 {
        match ordered(broker, scene, &group, 16).await? {
            Some(inbox) => inboxes.push(inbox),
            None => return not_ordered(),
        }
    }
    let messages: Vec<_> = (0..100).map(|n| keyed(&format!("key-{}", n % 5), &n.to_string())).collect();

    /// What one key has seen: messages received in order, and those unsettled.
    #[derive(Default)]
    struct Seen {
        order: Vec<usize>,
        unsettled: usize,
        overlapped: bool,
    }
    let seen: Mutex<BTreeMap<String, Seen>> = Mutex::default();
    let (count, done) = (AtomicUsize::new(0), CancellationToken::new());
    let member = async |mut inbox: Inbox| -> Attempt {
        loop {
            let mut batch = Vec::new();
            let received = tokio::select! {
                biased;
                () = done.cancelled() => return Ok(()),
                received = inbox.subscription().receive(&mut batch, 16) => received?,
            };
            ensure!(received > 0, "a member's subscription ended");
            for delivery in &batch {
                let key = String::from_utf8_lossy(delivery.message().key().map_or(&[], |key| &key[..])).into_owned();
                let number = String::from_utf8_lossy(delivery.message().payload()).parse().unwrap_or(usize::MAX);
                let mut seen = seen.lock();
                let seen = seen.entry(key).or_default();
                // A retried message comes again before the next one does.
                if seen.order.last() != Some(&number) {
                    seen.order.push(number);
                }
                seen.unsettled += 1;
                seen.overlapped |= seen.unsettled > 1;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
            for delivery in batch {
                let key = String::from_utf8_lossy(delivery.message().key().map_or(&[], |key| &key[..])).into_owned();
                // Before the settlement: what follows may arrive at once.
                if let Some(seen) = seen.lock().get_mut(&key) {
                    seen.unsettled -= 1;
                }
                let retry = delivery.attempt() == 1 && delivery.message().payload().ends_with(b"7");
                let settle = if retry { delivery.retry() } else { delivery.ack() };
                inbox.settled(settle).await?;
                if !retry && count.fetch_add(1, Ordering::Relaxed) + 1 >= 100 {
                    done.cancel();
                }
            }
        }
    };
    let members = join_all(inboxes.into_iter().map(member));
    let (published, received) = futures_util::future::join(
        scene.publish(broker, &topic, &messages),
        scene.arriving("receiving every message", members),
    )
    .await;
    published?;
    received?.into_iter().collect::<Attempt<Vec<()>>>()?;

    let seen = seen.into_inner();
    let total: usize = seen.values().map(|seen| seen.order.len()).sum();
    for (key, seen) in &seen {
        ensure!(seen.order.is_sorted(), "{key} was delivered in the order {:?}", seen.order);
        ensure!(!seen.overlapped, "{key} had two messages unsettled at once");
    }
    ensure!(total == 100, "{total} of 100 messages were delivered in order");
    PASSED
}

pub(super) async fn one_of_a_key(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("one").await?;
    let group = scene.group("one", &topic)?;
    let Some(mut member) = ordered(broker, scene, &group, 16).await? else { return not_ordered() };
    let messages = [keyed("a", "a1"), keyed("a", "a2"), keyed("b", "b1"), Message::new("none")];
    scene.publish(broker, &topic, &messages).await?;
    let mut first = Vec::new();
    for delivery in member.take(3).await? {
        ensure!(delivery.message().payload() != "a2", "a2 was delivered while a1 was unsettled");
        first.push(delivery);
    }
    member.quiet().await.map_err(|failed| failed.context("while a1 is unsettled"))?;
    // Retried, it still comes before the next of its key.
    let a1 = first.iter().position(|delivery| delivery.message().payload() == "a1");
    let a1 = first.remove(a1.ok_or_else(|| Failed("a1 was not delivered".to_owned()))?);
    member.settled(a1.retry_after(Duration::from_millis(50))).await?;
    let a1 = member.one().await?;
    ensure!(a1.message().payload() == "a1", "{} overtook the retry of a1", shown(a1.message()));
    member.settled(a1.ack()).await?;
    let a2 = member.one().await?;
    ensure!(a2.message().payload() == "a2", "{} came instead of a2", shown(a2.message()));
    member.settled(a2.ack()).await?;
    for delivery in first {
        member.settled(delivery.ack()).await?;
    }
    member.quiet().await?;
    // Settled elsewhere, as by a handler of its own task, it wakes who waits for the next.
    scene.publish(broker, &topic, &[keyed("c", "c1"), keyed("c", "c2"), keyed("c", "c3")]).await?;
    let mut before = member.one().await?;
    for name in ["c2", "c3"] {
        let settling = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            before.ack().await
        });
        before = member.one().await.map_err(|failed| failed.context("once the one before is settled elsewhere"))?;
        ensure!(before.message().payload() == name, "{} came instead of {name}", shown(before.message()));
        let settled = settling.await.map_err(|error| Failed(format!("settling elsewhere: {error}")))?;
        scene.done("settling elsewhere", std::future::ready(settled)).await?;
    }
    member.settled(before.ack()).await?;
    PASSED
}

pub(super) async fn max_in_flight(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("window").await?;
    for (name, in_group) in [("in a group", true), ("without a group", false)] {
        let mut inbox = if in_group {
            scene.join_with(broker, &scene.group("window", &topic)?, scene.quick()?, 3).await?
        } else {
            let options = Subscribe::new().with_options(scene.quick()?).with_max_in_flight(3)?;
            scene.subscribe(broker, &(&topic).into(), options).await?
        };
        let messages = numbered(10);
        scene.publish(broker, &topic, &messages).await?;
        let mut held = inbox.take(3).await.map_err(|failed| failed.context(name))?;
        inbox.quiet().await.map_err(|failed| failed.context(format!("{name}, 3 of at most 3 unsettled")))?;
        let mut received = Vec::new();
        while let Some(delivery) = held.pop() {
            received.push(delivery.received().clone());
            inbox.settled(delivery.ack()).await?;
            if received.len() + held.len() < messages.len() {
                held.push(inbox.one().await.map_err(|failed| failed.context(format!("{name}, after an ack")))?);
                inbox.quiet_for(Duration::from_millis(20)).await.map_err(|failed| failed.context(name))?;
            }
        }
        same_set(&messages, &received)?;
        inbox.close().await?;
    }
    // Beyond what the broker can count.
    let most = broker.capabilities().max_in_flight;
    if let Some(beyond) = most.checked_add(1) {
        let subscribing = broker.subscribe(&(&topic).into(), Subscribe::new().with_max_in_flight(beyond)?);
        let result = scene.within("subscribing", subscribing).await?;
        refused("max_in_flight beyond the most", result, &[ErrorKind::Invalid])?;
    }
    PASSED
}

/// Options of a group that holds `max` messages.
fn bounded(scene: &Scene, max: u64, overflow: Overflow) -> Attempt<GroupOptions> {
    Ok(scene.quick()?.with_backlog(Backlog::default().with_max_messages(max)?.with_overflow(overflow)))
}

pub(super) async fn slow_groups(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("busy").await?;
    let absent = scene.group("absent", &topic)?;
    let slow = scene.group("slow", &topic)?;
    let fast = scene.group("fast", &topic)?;
    scene.create(broker, &absent, scene.quick()?).await?;
    let mut slow = scene.join_with(broker, &slow, scene.quick()?, 1).await?;
    let mut fast = scene.join(broker, &fast).await?;
    let messages = numbered(300);
    let held = {
        scene.publish(broker, &topic, messages.get(..1).unwrap_or_default()).await?;
        slow.one().await?
    };
    scene
        .publish(broker, &topic, messages.get(1..).unwrap_or_default())
        .await
        .map_err(|failed| failed.context("with a slow group"))?;
    let received = fast.take_acked(300).await.map_err(|failed| failed.context("the fast group"))?;
    same_set(&messages, &received)?;
    slow.settled(held.ack()).await?;
    drop(slow.take_acked(299).await.map_err(|failed| failed.context("the slow group"))?);
    let mut late = scene.join(broker, &absent).await?;
    late.expect(&messages).await.map_err(|failed| failed.context("the absent group"))?;

    // At the bound: who publishes elsewhere feels nothing.
    let can = broker.capabilities();
    let overflow = if can.overflow_reject.is_some() {
        Overflow::Reject
    } else if can.overflow_wait.is_some() {
        Overflow::Wait
    } else {
        return PASSED;
    };
    let (full_topic, other_topic) = (scene.topic("full").await?, scene.topic("other").await?);
    let full = scene.group("full", &full_topic)?;
    scene.create(broker, &full, bounded(scene, 5, overflow)?).await?;
    scene.publish(broker, &full_topic, &numbered(5)).await?;
    let mut other = scene.listen(broker, &other_topic).await?;
    let publish = broker.publish(&full_topic, Message::new("one too many"));
    let messages = numbered(20);
    if overflow == Overflow::Reject {
        refused("publishing to a full group", scene.within("publishing", publish).await?, &[ErrorKind::Unavailable])?;
        scene.publish(broker, &other_topic, &messages).await?;
    } else {
        let waiting = scene.pending("publishing to a full group", publish);
        let (waited, published) =
            futures_util::future::join(waiting, scene.publish(broker, &other_topic, &messages)).await;
        waited?;
        published?;
    }
    other.expect(&messages).await.map_err(|failed| failed.context("another topic"))?;
    PASSED
}

pub(super) async fn retries_stall_their_key(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("stall").await?;
    let group = scene.group("stall", &topic)?;
    let can_order = broker.capabilities().ordered.is_some();
    let mut member = match ordered(broker, scene, &group, 16).await? {
        Some(member) => member,
        None => scene.join_with(broker, &group, scene.quick()?, 16).await?,
    };
    scene.publish(broker, &topic, &[keyed("a", "a1")]).await?;
    let a1 = member.one().await?;
    // Longer than anybody waits here: who waits for it is stuck.
    member.settled(a1.retry_after(Duration::from_secs(300))).await?;
    let others: Vec<_> = (0..10).map(|n| keyed(&format!("key-{n}"), &n.to_string())).collect();
    let a2 = keyed("a", "a2");
    let mut messages = vec![a2.clone()];
    messages.extend(others.iter().cloned());
    scene.publish(broker, &topic, &messages).await?;
    // Ordered, a2 waits behind a1; else it is one of the others.
    let wanted = if can_order { &others } else { &messages };
    member.expect(wanted).await.map_err(|failed| failed.context("while one message waits for its retry"))?;
    PASSED
}

pub(super) async fn overflow(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let can = broker.capabilities();
    let mut refusals = Vec::new();
    for (support, overflow, name) in [
        (can.overflow_wait, Overflow::Wait, "wait"),
        (can.overflow_reject, Overflow::Reject, "reject"),
        (can.overflow_drop_oldest, Overflow::DropOldest, "drop_oldest"),
    ] {
        let topic = scene.topic(name).await?;
        let group = scene.group(name, &topic)?;
        let options = bounded(scene, 3, overflow)?;
        if !support.is_some() {
            let creating = scene.within("creating a group", broker.create_group(&group, options)).await?;
            refused(&format!("a group with overflow {name}"), creating, &[ErrorKind::Unsupported])?;
            refusals.push(name);
            continue;
        }
        scene.create(broker, &group, options).await?;
        let result = match overflow {
            Overflow::Wait => waits(broker, scene, &topic, &group).await,
            Overflow::Reject => rejects(broker, scene, &topic, &group).await,
            _ => drops(broker, scene, &topic, &group).await,
        };
        result.map_err(|failed| failed.context(format!("overflow {name}")))?;
    }
    match refusals.as_slice() {
        [] => PASSED,
        [_, _, _] => Ok(Shown::Declared("a group has no bound, and one is refused".to_owned())),
        refused => Ok(Shown::Declared(format!("{} refused", refused.join(" and ")))),
    }
}

async fn waits(broker: &dyn Broker, scene: &Scene, topic: &Topic, group: &Group) -> Attempt {
    let publisher = broker.publisher(topic, PublisherOptions::new())?;
    let messages = numbered(6);
    scene.publish(broker, topic, messages.get(..3).unwrap_or_default()).await?;
    let mut waiting: Vec<_> = messages.iter().skip(3).map(|message| publisher.publish(message.clone())).collect();
    scene.pending("publishing to a full group", futures_util::future::select_all(&mut waiting)).await?;
    let mut member = scene.join_with(broker, group, GroupOptions::new(), 1).await?;
    let received = member.take_acked(6).await?;
    same_set(&messages, &received)?;
    for publish in waiting {
        scene.done("a publish that waited", publish).await?;
    }
    member.quiet().await
}

async fn rejects(broker: &dyn Broker, scene: &Scene, topic: &Topic, group: &Group) -> Attempt {
    let messages = numbered(3);
    scene.publish(broker, topic, &messages).await?;
    for _ in 0..2 {
        let publish = scene.within("publishing", broker.publish(topic, Message::new("one too many"))).await?;
        let error = refused("publishing to a full group", publish, &[ErrorKind::Unavailable])?;
        ensure!(error.is_retryable(), "a full group is not for ever, and its error says so");
        ensure!(error.message().contains(group.name.as_str()), "the error does not name the group: {error}");
    }
    let mut member = scene.join_with(broker, group, GroupOptions::new(), 256).await?;
    member.expect(&messages).await?;
    scene.publish(broker, topic, &numbered(1)).await.map_err(|failed| failed.context("with room again"))?;
    member.take_acked(1).await.map(drop)
}

async fn drops(broker: &dyn Broker, scene: &Scene, topic: &Topic, group: &Group) -> Attempt {
    let messages = numbered(8);
    scene.publish(broker, topic, &messages).await?;
    let status = scene.done("asking for the status", broker.status()).await?;
    let counted = status.group(group).map(|status| status.counts.dropped);
    ensure!(counted == Some(5), "5 messages were dropped and {counted:?} counted");
    let mut member = scene.join_with(broker, group, GroupOptions::new(), 256).await?;
    member.expect(messages.get(5..).unwrap_or_default()).await?;
    let gap = member.subscription().gap();
    ensure!(gap.and_then(broker_core::Gap::lost) == Some(5), "5 messages were dropped and the reader told {gap:?}");
    ensure!(member.subscription().gap().is_none(), "a gap was told twice");
    Ok(())
}

/// What a member holds when it leaves, in somebody's hands or unread, is in its place until it is settled.
pub(super) async fn leaving_keeps_order(broker: &dyn Broker, scene: &Scene) -> Verdict {
    const OF_A_KEY: usize = 10;
    let topic = scene.topic("leaving").await?;
    let group = scene.group("leaving", &topic)?;
    let Some(mut leaving) = ordered(broker, scene, &group, 16).await? else { return not_ordered() };
    let messages: Vec<_> = (0..OF_A_KEY).flat_map(|n| ["a", "b"].map(|key| keyed(key, &format!("{key}{n}")))).collect();
    scene.publish(broker, &topic, &messages).await?;
    let mut held = leaving.take(2).await?;
    // What else comes to it is there by then.
    scene.pause().await;
    let elsewhere = scene.open().await?;
    let Some(mut staying) = ordered(&*elsewhere, scene, &group, 16).await? else { return not_ordered() };
    let after = async {
        let first_of_each = "while the member that leaves holds the first of each key";
        staying.quiet().await.map_err(|failed| failed.context(first_of_each))?;
        // One is done with, the other somebody else's to begin.
        let given_back = held.pop().ok_or_else(|| Failed("two were taken".to_owned()))?;
        let mut expected = BTreeMap::from([("a", 0), ("b", 0)].map(|(key, n)| (key.to_owned(), n)));
        let key_of = |received: &broker_core::Received| {
            String::from_utf8_lossy(received.message().key().map_or(&[], |key| &key[..])).into_owned()
        };
        let mut left = messages.len();
        for acked in held.drain(..) {
            expected.insert(key_of(acked.received()), 1);
            left -= 1;
            scene.done("acking what the member held that left", acked.ack()).await?;
        }
        scene.done("giving back what the member held that left", given_back.release()).await?;
        for _ in 0..left {
            let received = staying.acked().await.map_err(|failed| failed.context("after the member left"))?;
            let key = key_of(&received);
            let next = expected.entry(key.clone()).or_default();
            ensure!(
                received.message().payload() == format!("{key}{next}").as_bytes(),
                "{} overtook {key}{next}, which a member held that left",
                shown(received.message())
            );
            *next += 1;
        }
        staying.quiet().await
    };
    let (closed, after) = futures_util::future::join(leaving.close(), after).await;
    after?;
    closed?;
    PASSED
}
