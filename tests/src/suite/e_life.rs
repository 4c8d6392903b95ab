//! E. Life.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use broker_core::{
    Backlog, Broker, BrokerExt, ErrorKind, GroupOptions, Message, Overflow, PublisherOptions, Subscribe,
    SubscriptionStatus, TopicFilter,
};
use futures_util::FutureExt;
use futures_util::future::{join, join_all, try_join_all};
use tokio::sync::Notify;

use super::elsewhere;
use crate::{
    Attempt, Failed, PASSED, Scene, Shown, Verdict, ensure, numbered, refused, same_message, same_set, sent, shown,
};

pub(super) async fn closed(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("closed").await?;
    let filter = TopicFilter::from(&topic);
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    scene.publish_one(&publisher, Message::new("before")).await?;
    let mut open = scene.listen(broker, &topic).await?;
    scene.close(broker).await?;
    open.ended().await.map_err(|failed| failed.context("a subscription after close"))?;

    let closed = [ErrorKind::Closed];
    let late = scene.within("publishing", broker.publish(&topic, Message::new("late"))).await?;
    refused("publishing after close", late, &closed)?;
    let late = scene.within("publishing", publisher.publish(Message::new("late"))).await?;
    refused("publishing after close, through an old handle,", late, &closed)?;
    let late = scene.within("publishing", publisher.publish_batch(numbered(3))).await?;
    if let Ok(results) = late {
        // One error for the whole, or one each.
        ensure!(results.len() == 3, "a batch of 3 has {} results", results.len());
        for result in results {
            refused("publishing a batch after close", result, &closed)?;
        }
    } else {
        refused("publishing a batch after close", late, &closed)?;
    }
    let late = scene.within("subscribing", broker.subscribe(&filter, Subscribe::new())).await?;
    refused("subscribing after close", late, &closed)?;
    let group = scene.group("late", &topic)?;
    let late = scene.within("creating a group", broker.create_group(&group, GroupOptions::new())).await?;
    refused("creating a group after close", late, &closed)?;
    refused("connecting after close", scene.within("connecting", broker.connect()).await?, &closed)?;
    let status = scene.within("asking for the status", broker.status()).await?;
    let state = status.map_err(|error| Failed(format!("status after close failed: {error}")))?.state;
    ensure!(state == broker_core::State::Closed, "after close the state is {state:?}");
    PASSED
}

pub(super) async fn close_twice(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("twice").await?;
    let _open = scene.listen(broker, &topic).await?;
    let (first, second) = join(scene.close(broker), scene.close(broker)).await;
    let third = scene.close(broker).await?;
    let (first, second) = (first?, second?);
    ensure!(first == second && second == third, "three closes report {first:?}, {second:?} and {third:?}");
    ensure!(first.complete, "nothing was left and the drain is not complete: {first:?}");
    PASSED
}

pub(super) async fn close_in_flight(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("unread").await?;
    let group = scene.group("unread", &topic)?;
    let mut member = scene.join_with(broker, &group, scene.quick()?, 1).await?;
    scene.publish(broker, &topic, &numbered(2)).await?;
    let unsettled = member.one().await?;
    let deadline = Duration::from_millis(300);
    let report = scene.within("close with a deadline of 300 ms", broker.close(deadline)).await?;
    ensure!(!report.complete, "a delivery was unsettled and the drain called complete");
    ensure!(report.in_flight == 1, "one delivery was in flight, the report says {}", report.in_flight);
    if scene.in_process() {
        ensure!(report.undelivered == 1, "one message was unread, the report says {}", report.undelivered);
        ensure!(report.lost() == 2, "two messages are gone, the report says {}", report.lost());
    }
    // Shutting down is no failure of the message: settling is closed, dropping does nothing.
    let settled = scene.within("settling", unsettled.ack()).await?;
    refused("settling after close", settled, &[ErrorKind::Closed])?;
    member.ended().await?;
    PASSED
}

/// What the status says about subscriptions without a group on `filter`.
async fn alone(broker: &dyn Broker, scene: &Scene, filter: &TopicFilter) -> Attempt<Vec<SubscriptionStatus>> {
    let status = scene.done("asking for the status", broker.status()).await?;
    Ok(status.subscriptions.into_iter().filter(|subscription| subscription.filter == *filter).collect())
}

pub(super) async fn dropping_ends(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("dropped").await?;
    let filter = TopicFilter::from(&topic);
    let inbox = scene.listen(broker, &topic).await?;
    ensure!(alone(broker, scene, &filter).await?.len() == 1, "the status does not list the subscription");
    drop(inbox);
    scene
        .eventually("the status forgetting a dropped subscription", async || {
            Ok(alone(broker, scene, &filter).await?.is_empty().then_some(()))
        })
        .await?;
    let receipts = scene.publish(broker, &topic, &numbered(1)).await?;
    let matched = receipts.first().and_then(|receipt| receipt.matched);
    ensure!(matched.is_none_or(|matched| matched == 0), "nobody is left and a publish matched {matched:?}");

    // A group goes on without the member: what comes is the next one's.
    let group = scene.group("goes-on", &topic)?;
    let mut first = scene.join(broker, &group).await?;
    let messages = numbered(6);
    scene.publish(broker, &topic, messages.get(..3).unwrap_or_default()).await?;
    first.take_acked(1).await?;
    drop(first);
    scene
        .eventually("the group losing its member", async || {
            let status = scene.done("asking for the status", broker.status()).await?;
            let members = status.group(&group).and_then(|group| group.members);
            Ok(members.is_none_or(|members| members == 0).then_some(()))
        })
        .await?;
    scene.publish(broker, &topic, messages.get(3..).unwrap_or_default()).await?;
    let mut second = scene.join(broker, &group).await?;
    let received = second.take_acked(5).await.map_err(|failed| failed.context("the next member"))?;
    for one in &received {
        sent(&messages, one.message().id())?;
    }
    second.quiet().await?;
    PASSED
}

pub(super) async fn cancelling(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // Publishes dropped at once: each arrives wholly or not at all, once.
    let topic = scene.topic("cancelled").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    let cancelled: Vec<_> = (0..50).map(|n| Message::new(vec![b'c'; 1000]).with_key(n.to_string())).collect();
    for message in &cancelled {
        drop(publisher.publish(message.clone()));
    }
    let marker = Message::new("marker");
    scene.publish_one(&publisher, marker.clone()).await?;
    let mut seen = Vec::new();
    // The publisher's order is per key: the marker says that it was taken, not that it comes last.
    loop {
        let next = tokio::time::timeout(scene.timing().quiet, inbox.subscription().next());
        match next.await {
            Ok(delivery) => {
                let delivery = delivery?.ok_or_else(|| Failed("the subscription ended".to_owned()))?;
                seen.push(delivery.received().clone());
                inbox.settled(delivery.ack()).await?;
            }
            Err(_) if seen.iter().any(|one| one.message().id() == marker.id()) => break,
            Err(_) => seen.push(inbox.acked().await?),
        }
    }
    let all: Vec<_> = cancelled.iter().chain([&marker]).cloned().collect();
    for one in &seen {
        same_message(sent(&all, one.message().id())?, one.message())?;
    }
    let came: Vec<Message> = seen.iter().map(|one| one.message().clone()).collect();
    for message in &came {
        let times = came.iter().filter(|other| other.id() == message.id()).count();
        ensure!(times == 1, "a cancelled publish was delivered {times} times");
    }

    // One that waits for room is not taken yet: dropping withdraws it.
    if broker.capabilities().overflow_wait.is_some() {
        let topic = scene.topic("waiting").await?;
        let group = scene.group("waiting", &topic)?;
        let backlog = Backlog::default().with_max_messages(1)?.with_overflow(Overflow::Wait);
        scene.create(broker, &group, scene.quick()?.with_backlog(backlog)).await?;
        let publisher = broker.publisher(&topic, PublisherOptions::new())?;
        let first = Message::new("first");
        scene.publish_one(&publisher, first.clone()).await?;
        scene.pending("publishing to a full group", publisher.publish(Message::new("withdrawn"))).await?;
        let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
        let one = member.acked().await.map_err(|failed| failed.context("after a waiting publish was dropped"))?;
        same_message(&first, one.message())?;
        // A request under way to a server may have been taken there; in this process nothing was.
        if let Ok(taken) = tokio::time::timeout(scene.timing().quiet, member.subscription().next()).await {
            let taken = taken?.ok_or_else(|| Failed("the subscription ended".to_owned()))?;
            ensure!(!scene.in_process(), "a publish that waited for room was dropped, and published all the same");
            ensure!(taken.message().payload() == "withdrawn", "{} arrived", shown(taken.message()));
            member.settled(taken.ack()).await?;
        }
        member.quiet().await.map_err(|failed| failed.context("after a waiting publish was dropped"))?;
        let next = numbered(1);
        scene.publish(broker, &topic, &next).await?;
        member.expect(&next).await?;
    }

    // A subscribe dropped before it is ready leaves no subscription.
    let topic = scene.topic("unsubscribed").await?;
    let filter = TopicFilter::from(&topic);
    drop(broker.subscribe(&filter, Subscribe::new()));
    // Polled once: begun, and either ready (and then dropped as a subscription) or cut short.
    drop(broker.subscribe(&filter, Subscribe::new()).now_or_never());
    // What goes on behind a dropped future has had its time.
    scene.pause().await;
    scene
        .eventually("a cancelled subscribe leaving nothing", async || {
            Ok(alone(broker, scene, &filter).await?.is_empty().then_some(()))
        })
        .await?;
    PASSED
}

pub(super) async fn missing_topic(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // Never prepared.
    let filter = scene.filter("missing")?;
    let topic = filter.topic().ok_or_else(|| Failed("a plain filter names a topic".to_owned()))?;
    let publish = scene.within("publishing", broker.publish(&topic, Message::new("first"))).await?;
    let subscribe = scene.within("subscribing", broker.subscribe(&filter, Subscribe::new())).await?;
    if broker.capabilities().topics_must_exist {
        refused("publishing to a missing topic", publish, &[ErrorKind::NotFound])?;
        refused("subscribing to a missing topic", subscribe, &[ErrorKind::NotFound])?;
        return PASSED;
    }
    publish.map_err(|error| Failed(format!("topics need not exist, and publishing to a new one failed: {error}")))?;
    let subscription = subscribe
        .map_err(|error| Failed(format!("topics need not exist, and subscribing to a new one failed: {error}")))?;
    let mut inbox = crate::Inbox::new(subscription, scene.timing());
    let messages = numbered(3);
    scene.publish(broker, &topic, &messages).await?;
    inbox.expect(&messages).await?;
    PASSED
}

pub(super) async fn close_flushes(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("flush").await?;
    let group = scene.group("flush", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    let member = if scene.in_process() { Some(scene.join(broker, &group).await?) } else { None };
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    let messages = numbered(200);
    let publishes: Vec<_> = messages.iter().map(|message| publisher.publish(message.clone())).collect();
    // In-process, what can be delivered is delivered while the broker closes.
    let receiving = async {
        match member {
            Some(mut member) => {
                let received = member.take_acked(200).await?;
                member.ended().await?;
                Attempt::Ok(received)
            }
            None => Ok(Vec::new()),
        }
    };
    let (report, received) = join(scene.close(broker), receiving).await;
    let (report, mut received) = (report?, received?);
    ensure!(report.complete && report.unconfirmed == 0, "close with time enough left publishes behind: {report:?}");
    for result in join_all(publishes).await {
        result.map_err(|error| Failed(format!("a publish before close failed: {error}")))?;
    }
    if !scene.in_process() {
        let next = scene.open().await?;
        let mut member = scene.join_with(&next, &group, GroupOptions::new(), 256).await?;
        received = member.take_acked(200).await.map_err(|failed| failed.context("seen from a new connection"))?;
        scene.close(&next).await?;
    }
    same_set(&messages, &received)?;
    PASSED
}

pub(super) async fn before_close(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("before").await?;
    let group = scene.group("before", &topic)?;
    let mut member = scene.join_with(broker, &group, scene.quick()?, 5).await?;
    let messages = numbered(10);
    scene.publish(broker, &topic, messages.get(..5).unwrap_or_default()).await?;
    // Neither the acks nor the publishes are awaited.
    let acks: Vec<_> = member.take(5).await?.into_iter().map(broker_core::Delivery::ack).collect();
    drop(member);
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    let publishes: Vec<_> = messages.iter().skip(5).map(|message| publisher.publish(message.clone())).collect();
    let report = scene.close(broker).await?;
    for ack in acks {
        scene.done("an ack before close", ack).await?;
    }
    for publish in publishes {
        scene.done("a publish before close", publish).await?;
    }
    ensure!(report.in_flight == 0, "every delivery was acked, the report says {} in flight", report.in_flight);
    if scene.in_process() {
        ensure!(report.undelivered == 5, "5 messages stayed, the report says {}", report.undelivered);
        ensure!(report.lost() == 5, "a broker that forgets lost 5 messages, the report says {}", report.lost());
        return PASSED;
    }
    let next = scene.open().await?;
    let mut member = scene.join_with(&next, &group, GroupOptions::new(), 256).await?;
    member.expect(messages.get(5..).unwrap_or_default()).await.map_err(|failed| failed.context("a new connection"))?;
    scene.close(&next).await?;
    PASSED
}

pub(super) async fn drain(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("drain").await?;
    let group = scene.group("drain", &topic)?;
    let (started, finished) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
    let (begun, ended) = (Arc::clone(&started), Arc::clone(&finished));
    let options = Subscribe::group(group.name.clone()).with_options(scene.quick()?);
    let handling = broker.handle(&group.filter, options, move |_| {
        let (begun, ended) = (Arc::clone(&begun), Arc::clone(&ended));
        async move {
            begun.notify_one();
            tokio::time::sleep(Duration::from_millis(200)).await;
            ended.fetch_add(1, Ordering::SeqCst);
        }
    });
    let handling = scene.done("subscribing", handling).await?;
    scene.publish(broker, &topic, &numbered(1)).await?;
    scene.within("the handler starting", started.notified()).await?;
    let report = scene.close(broker).await?;
    ensure!(finished.load(Ordering::SeqCst) == 1, "close did not wait for the handler in flight");
    ensure!(report.complete && report.in_flight == 0, "the handler finished in time: {report:?}");
    scene.done("the handler's end", handling.finished()).await?;
    if !scene.in_process() {
        let next = scene.open().await?;
        let mut member = scene.join_with(&next, &group, GroupOptions::new(), 256).await?;
        member.quiet_for(scene.timing().quiet * 3).await.map_err(|failed| failed.context("a new connection"))?;
        scene.close(&next).await?;
    }
    PASSED
}

pub(super) async fn no_io(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // Outside any runtime nothing can wait, and nothing can be spawned.
    let outside = std::thread::scope(|threads| {
        let opening = threads.spawn(|| {
            let here = scene.harness().open().map(drop);
            let nowhere = scene.harness().unreachable().map(|opened| opened.map(drop));
            (here, nowhere)
        });
        opening.join().map_err(|_| Failed("opening a broker outside a runtime panicked".to_owned()))
    })?;
    outside.0.map_err(|error| Failed(format!("opening outside a runtime failed: {error}")))?;
    if let Some(opened) = outside.1 {
        opened.map_err(|error| Failed(format!("opening needed the server: {error}")))?;
    }
    if let Ok(link) = scene.link(broker).await {
        let handle = link.open()?;
        let topic = scene.topic("silent").await?;
        let _publisher = handle.publisher(&topic, PublisherOptions::new())?;
        scene.pause().await;
        let connections = link.connections();
        ensure!(connections.is_none_or(|count| count == 0), "opening made {connections:?} connections");
    }
    PASSED
}

pub(super) async fn another_runtime(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("elsewhere").await?;
    let group = scene.group("elsewhere", &topic)?;
    let mut member = scene.join(broker, &group).await?;
    let mut here = scene.listen(broker, &topic).await?;
    let messages = numbered(5);
    // This handle, connected here, publishes, receives and subscribes on another runtime.
    elsewhere::on_another_runtime(async || {
        let mut there = scene.listen(broker, &topic).await?;
        scene.publish(broker, &topic, &messages).await?;
        there.expect(&messages).await?;
        member.expect(&messages).await.map(drop)
    })?;
    here.expect(&messages).await?;
    PASSED
}

pub(super) async fn ten_at_once(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("ten").await?;
    let filter = TopicFilter::from(&topic);
    let group = scene.group("ten", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    for _ in 0..3 {
        let alone = try_join_all((0..10).map(|_| scene.listen(broker, &topic))).await?;
        let members = try_join_all((0..10).map(|_| scene.join(broker, &group))).await?;
        // Half are closed, half are dropped.
        let mut closing = Vec::new();
        for (number, inbox) in alone.into_iter().chain(members).enumerate() {
            if number.is_multiple_of(2) {
                closing.push(inbox.close());
            }
        }
        try_join_all(closing).await?;
    }
    scene
        .eventually("every subscription being gone", async || {
            Ok(alone(broker, scene, &filter).await?.is_empty().then_some(()))
        })
        .await?;
    let messages = numbered(10);
    scene.publish(broker, &topic, &messages).await?;
    let mut member = scene.join(broker, &group).await?;
    member.expect(&messages).await.map_err(|failed| failed.context("the group afterwards"))?;
    PASSED
}

pub(super) async fn reopening(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("reopen").await?;
    let group = scene.group("reopen", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    let messages = numbered(30);
    let mut received = Vec::new();
    for batch in messages.chunks(10) {
        // In-process a close would end the broker: there the member comes and goes.
        let handle = scene.open().await?;
        let mut member = scene.join_with(&handle, &group, GroupOptions::new(), 3).await?;
        scene.publish(&handle, &topic, batch).await?;
        received.extend(member.take_acked(4).await?);
        if scene.in_process() {
            member.close().await?;
        } else {
            drop(member);
            scene.close(&handle).await?;
        }
    }
    let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    let missing = messages.len() - received.len();
    received.extend(member.take_acked(missing).await?);
    same_set(&messages, &received)?;
    member.quiet().await?;
    PASSED
}

pub(super) async fn close_while_down(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let link = match scene.link(broker).await {
        Ok(link) => link,
        Err(verdict) => return verdict,
    };
    let handle = link.open()?;
    scene.done("connecting", handle.connect()).await?;
    let topic = scene.topic("down").await?;
    let group = scene.group("down", &topic)?;
    let mut member = scene.join(&handle, &group).await?;
    scene.publish(&handle, &topic, &numbered(2)).await?;
    let unsettled = member.one().await?;
    link.down().await;
    let publish = handle.publish(&topic, Message::new("into the void"));
    let begin = Instant::now();
    let report = scene.within("close with the broker down", handle.close(Duration::from_millis(500))).await?;
    ensure!(!report.complete, "the broker was down, and close called itself complete after {:?}", begin.elapsed());
    let outcome = scene.within("a publish whose broker is closed", publish).await?;
    ensure!(outcome.is_err(), "a publish succeeded with the broker down");
    drop(unsettled);
    link.up().await;
    Ok(Shown::Passed)
}
