//! G. Extras.

use std::time::{Duration, Instant};

use broker_core::{
    Broker, BrokerExt, ErrorKind, GroupOptions, Message, PublisherOptions, StartAt, Subscribe, Support, Timestamp,
};
use futures_util::future::try_join_all;

use super::elsewhere;
use crate::{Attempt, Failed, PASSED, Scene, Shown, Verdict, ensure, numbered, refused, same_message, same_set};

pub(super) async fn batch_receive(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("batch").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("batch", &topic)?;
    let mut member = scene.join_with(broker, &group, scene.quick()?.with_dead_letter(dead.clone()), 256).await?;
    let mut letters = scene.listen(broker, &dead).await?;
    let messages = numbered(60);
    scene.publish(broker, &topic, &messages).await?;

    let mut batch = Vec::new();
    while batch.len() < 60 {
        let (before, limit) = (batch.len(), 25);
        let receiving = member.subscription().receive(&mut batch, limit);
        let count = scene.done("receiving a batch", receiving).await?;
        ensure!(count > 0, "the subscription ended");
        ensure!(count <= limit, "{count} deliveries came where {limit} were asked for");
        ensure!(batch.len() == before + count, "{count} deliveries were told and {} came", batch.len() - before);
    }
    let (mut retried, mut rejected) = (Vec::new(), Vec::new());
    for (number, delivery) in batch.into_iter().enumerate() {
        let message = delivery.message().clone();
        let settle = match number % 3 {
            0 => delivery.ack(),
            1 => {
                retried.push(message);
                delivery.retry()
            }
            _ => {
                rejected.push(message);
                delivery.reject("every third")
            }
        };
        member.settled(settle).await?;
    }
    let again = member.take_acked(retried.len()).await?;
    same_set(&retried, &again).map_err(|failed| failed.context("those retried"))?;
    ensure!(again.iter().all(|one| one.attempt() == 2), "a retried message came back with another attempt");
    member.quiet().await?;
    let letters = letters.take_acked(rejected.len()).await?;
    same_set(&rejected, &letters).map_err(|failed| failed.context("those rejected"))?;
    PASSED
}

pub(super) async fn replay(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let keeper = scene.harness().retaining()?;
    scene.done("connecting", keeper.connect()).await?;
    let result = replay_on(&*keeper, scene).await;
    if scene.in_process() {
        scene.within("close", keeper.close(Duration::ZERO)).await?;
    }
    let _ = broker;
    result
}

async fn replay_on(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let can = broker.capabilities();
    let topic = scene.topic("replay").await?;
    let mut early = scene.listen(broker, &topic).await?;
    let messages: Vec<_> = (0..10).map(|n| Message::new(n.to_string()).with_key("one")).collect();
    let receipts = scene.publish(broker, &topic, &messages).await?;
    early.expect(&messages).await?;

    let middle = receipts.get(5).and_then(|receipt| receipt.partition.zip(receipt.offset));
    let mut refusals = Vec::new();
    for (support, name, start) in [
        (can.start_position, "a position", StartAt::Position(vec![middle.unwrap_or((0, 0))])),
        (can.start_time, "a time", StartAt::Time(Timestamp::from_millis(0))),
    ] {
        let group = scene.group("replay", &topic)?;
        let options = scene.quick()?.with_start(start.clone());
        if !support.is_some() {
            let joining = broker.subscribe(&group.filter, Subscribe::group(group.name.clone()).with_options(options));
            refused(
                &format!("a replay from {name}"),
                scene.within("joining", joining).await?,
                &[ErrorKind::Unsupported],
            )?;
            refusals.push(name);
            continue;
        }
        let wanted = match start {
            StartAt::Position(_) => {
                ensure!(middle.is_some(), "a broker that starts at positions does not tell them in receipts");
                messages.get(5..).unwrap_or_default()
            }
            _ => &messages,
        };
        let mut member = scene.join_with(broker, &group, options, 256).await?;
        member.expect(wanted).await.map_err(|failed| failed.context(format!("a replay from {name}")))?;
        scene.done("deleting a group", broker.delete_group(&group)).await?;
    }
    match refusals.as_slice() {
        [] => PASSED,
        [_] => Ok(Shown::Declared(format!("replay from {} is refused", refusals.join(" and ")))),
        _ => Ok(Shown::Declared("replay is refused".to_owned())),
    }
}

pub(super) async fn traceparent(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("trace").await?;
    let dead = scene.topic("dead").await?;
    let group = scene.group("trace", &topic)?;
    let mut member = scene.join_with(broker, &group, scene.quick()?.with_dead_letter(dead.clone()), 256).await?;
    let mut letters = scene.listen(broker, &dead).await?;
    let (parent, state) = ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "congo=t61rcWkgMzE,rojo=00f067");
    let message = Message::new("traced").with_header("traceparent", parent)?.with_header("tracestate", state)?;
    scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
    for attempt in 1..=2 {
        let delivery = member.one().await?;
        same_message(&message, delivery.message())?;
        let settle = if attempt == 1 { delivery.retry() } else { delivery.reject("traced") };
        member.settled(settle).await?;
    }
    let letter = letters.acked().await?;
    for (name, value) in [("traceparent", parent), ("tracestate", state)] {
        let have = letter.message().headers().get_str(name);
        ensure!(have == Some(value), "the dead letter's {name} is {have:?}");
    }
    PASSED
}

pub(super) async fn no_credentials(_broker: &dyn Broker, scene: &Scene) -> Verdict {
    let Some(secret) = scene.harness().secret() else {
        if scene.in_process() {
            return Ok(Shown::Declared("in-process: there are no credentials".to_owned()));
        }
        return Ok(Shown::NoControl("the harness has no credential to look for".to_owned()));
    };
    let (text, opened) = (secret.text, secret.opened);
    // Everything the broker says runs on one thread here, so that its log lines are caught as well.
    let log = elsewhere::Log::new();
    let mut said = elsewhere::logged(&log, async || {
        let mut said = Vec::new();
        let broker = match opened {
            Ok(broker) => broker,
            Err(error) => return Ok(vec![("opening", format!("{error} {error:?}"))]),
        };
        said.push(("the name", broker.name().to_owned()));
        said.push(("Debug", format!("{broker:?} {broker:#?}")));
        let topic = scene.topic("secret").await?;
        if let Err(error) = scene.within("connecting", broker.connect()).await? {
            said.push(("connecting", format!("{error} {error:?}")));
        }
        match broker.publisher(&topic, PublisherOptions::new()) {
            Ok(publisher) => {
                said.push(("a publisher's Debug", format!("{publisher:?}")));
                if let Err(error) = scene.within("publishing", publisher.publish(Message::new("x"))).await? {
                    said.push(("publishing", format!("{error} {error:?}")));
                }
            }
            Err(error) => said.push(("making a publisher", format!("{error} {error:?}"))),
        }
        let subscribing = broker.subscribe(&(&topic).into(), Subscribe::new());
        if let Ok(Err(error)) = tokio::time::timeout(scene.timing().patience, subscribing).await {
            said.push(("subscribing", format!("{error} {error:?}")));
        }
        match scene.within("asking for the status", broker.status()).await? {
            Ok(status) => said.push(("the status", format!("{status:?}"))),
            Err(error) => said.push(("asking for the status", format!("{error} {error:?}"))),
        }
        let report = scene.within("close", broker.close(Duration::from_millis(200))).await?;
        said.push(("the drain report", format!("{report:?}")));
        Attempt::Ok(said)
    })?;
    said.push(("the log", log.text()));
    for (place, words) in said {
        ensure!(!words.contains(&text), "a credential is seen in {place}");
    }
    PASSED
}

pub(super) async fn raw_client(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let _ = broker;
    // The handle as the adapter makes it: a wrapper may hide what it wraps.
    let handle = scene.harness().open()?;
    match scene.within("reaching the raw client", scene.harness().raw_client(&*handle)).await? {
        None => Ok(Shown::Declared("no client underneath".to_owned())),
        Some(reachable) => {
            ensure!(reachable, "the adapter has a raw client, and it cannot be reached through the broker");
            PASSED
        }
    }
}

pub(super) async fn in_parallel(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let one = async |number: usize| -> Attempt {
        let topic = scene.topic(&format!("p{number}")).await?;
        let group = scene.group(&format!("p{number}"), &topic)?;
        let mut member = scene.join(broker, &group).await?;
        let mut alone = scene.listen(broker, &topic).await?;
        let messages = numbered(20);
        scene.publish(broker, &topic, &messages).await?;
        let mut received = Vec::new();
        for delivery in member.take(20).await? {
            // A third goes round once more.
            if delivery.message().payload().len() == 1 {
                member.settled(delivery.retry()).await?;
            } else {
                received.push(delivery.received().clone());
                member.settled(delivery.ack()).await?;
            }
        }
        received.extend(member.take_acked(10).await?);
        same_set(&messages, &received)?;
        member.quiet().await?;
        alone.expect(&messages).await?;
        Ok(())
    };
    try_join_all(
        (0..16).map(async |number| one(number).await.map_err(|failed| failed.context(format!("scene {number} of 16")))),
    )
    .await?;
    PASSED
}

pub(super) async fn delay_is_a_floor(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("delay").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let delay = Duration::from_millis(1500);
    let begin = Instant::now();
    let late = Message::new("late").with_delay(delay).with_header("x-cause-of-death", "waiting")?;
    let publish = scene.within("publishing", broker.publish(&topic, late.clone())).await?;
    if !broker.capabilities().delay.is_some() {
        refused("publishing with a delay", publish, &[ErrorKind::Unsupported])?;
        return Ok(Shown::Declared("delays are refused".to_owned()));
    }
    publish?;
    let soon = [Message::new("now"), Message::new("past").with_deliver_at(Timestamp::from_millis(1))];
    scene.publish(broker, &topic, &soon).await?;
    same_set(&soon, &inbox.take_acked(2).await.map_err(|failed| failed.context("what has no delay"))?)?;
    let received = inbox.acked().await.map_err(|failed| failed.context("what was delayed"))?;
    let waited = begin.elapsed();
    same_message(&late, received.message())?;
    // A delivery time is in milliseconds: it may be cut by a part of one.
    ensure!(waited + Duration::from_millis(1) >= delay, "a delay of {delay:?} was over after {waited:?}");
    ensure!(received.attempt() == 1, "waiting was counted as an attempt");
    inbox.quiet().await?;

    // It is kept for a group meanwhile, and holds back nobody else.
    let group = scene.group("delay", &topic)?;
    scene.create(broker, &group, scene.quick()?).await?;
    let late = Message::new("late").with_delay(delay).with_key("same");
    let now = Message::new("now").with_key("other");
    scene.publish(broker, &topic, &[late.clone(), now.clone()]).await?;
    let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    let first = member.acked().await?;
    ensure!(first.message().id() == now.id(), "a delayed message came before one without delay");
    member.expect(&[late]).await?;
    PASSED
}

pub(super) async fn capabilities_are_true(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let can = broker.capabilities();
    ensure!(can.max_message_bytes > 0 && can.max_in_flight > 0, "the limits say that nothing is allowed");
    let topic = scene.topic("able").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    let hour = Duration::from_secs(3600);
    let probes = [
        ("a delivery time", can.delay, Message::new("x").with_deliver_at(Timestamp::from_millis(1))),
        ("an expiry", can.expiry, Message::new("x").with_ttl(hour)),
        ("a deduplication key", can.deduplication, Message::new("x").with_dedup_key(topic.as_str())?),
        ("no payload", can.tombstones, Message::tombstone()),
    ];
    let mut taken = Vec::new();
    for (what, support, message) in probes {
        let publish = scene.within("publishing", publisher.publish(message.clone())).await?;
        as_declared(&format!("a message with {what}"), support, publish)?;
        if support.is_some() {
            taken.push(message);
        }
    }
    inbox.expect(&taken).await?;

    let settings = [
        ("ordered", can.ordered, GroupOptions::new().with_ordered(true)),
        ("start earliest", can.start_earliest, GroupOptions::new().with_start(StartAt::Earliest)),
        ("start at a time", can.start_time, GroupOptions::new().with_start(StartAt::Time(Timestamp::now()))),
        ("start at a position", can.start_position, GroupOptions::new().with_start(StartAt::Position(vec![(0, 0)]))),
    ];
    for (number, (what, support, options)) in settings.into_iter().enumerate() {
        let group = scene.group(&format!("able-{number}"), &topic)?;
        let created = scene.within("creating a group", broker.create_group(&group, options)).await?;
        as_declared(&format!("a group with {what}"), support, created)?;
    }

    if can.deduplication.is_some() {
        let first = Message::new("first").with_dedup_key("once")?;
        let second = Message::new("second").with_dedup_key("once")?;
        let one = scene.publish_one(&publisher, first.clone()).await?;
        let two = scene.publish_one(&publisher, second.clone()).await?;
        ensure!(!one.duplicate && two.duplicate, "of two messages with one deduplication key none was the duplicate");
        ensure!(two.id == *first.id(), "a duplicate's receipt names {}, not the first message", two.id);
        // Per topic, and by the key only.
        let elsewhere = scene.topic("able-too").await?;
        let other = scene.publish(broker, &elsewhere, std::slice::from_ref(&second)).await?;
        ensure!(other.iter().all(|receipt| !receipt.duplicate), "a duplicate on another topic is none");
        let again = Message::new("again").with_id(first.id().clone());
        ensure!(!scene.publish_one(&publisher, again.clone()).await?.duplicate, "the same id alone is no duplicate");
        let received = inbox.take_acked(2).await?;
        let payloads: Vec<_> = received.iter().map(|one| one.message().payload().clone()).collect();
        ensure!(payloads == ["first", "again"], "of deduplicated messages arrived {payloads:?}");
        inbox.quiet().await?;
    }
    if can.matched {
        let receipt = scene.publish_one(&publisher, Message::new("counted")).await?;
        ensure!(receipt.matched.is_some(), "matched is declared, and not told");
    }
    PASSED
}

/// That what is declared is done, and what is not is refused with the typed error.
fn as_declared<T>(what: &str, support: Support, result: broker_core::Result<T>) -> Attempt {
    if support.is_some() {
        return result.map(drop).map_err(|error| Failed(format!("{what} is declared, and failed: {error}")));
    }
    refused(&format!("{what}, which is not declared,"), result, &[ErrorKind::Unsupported]).map(drop)
}
