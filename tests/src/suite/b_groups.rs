//! B. Groups.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{
    Broker, BrokerExt, ErrorKind, Group, GroupOptions, Message, Received, StartAt, Subscribe, Support, Timestamp,
};
use futures_util::future::{join_all, try_join_all};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{Attempt, Failed, Inbox, PASSED, Scene, Shown, Verdict, ensure, numbered, refused, same_set};

pub(super) async fn two_groups(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("both").await?;
    let (one, two) = (scene.group("one", &topic)?, scene.group("two", &topic)?);
    let mut first = scene.join(broker, &one).await?;
    let mut second = scene.join(broker, &two).await?;
    let messages = numbered(50);
    let receipts = scene.publish(broker, &topic, &messages).await?;
    ensure!(receipts.iter().all(|receipt| receipt.matched.is_none_or(|n| n == 2)), "two groups, another matched count");
    first.expect(&messages).await.map_err(|failed| failed.context("the first group"))?;
    second.expect(&messages).await.map_err(|failed| failed.context("the second group"))?;

    // The same name on another filter is another group.
    let namesake = Group::new(one.name.clone(), scene.filter(">")?);
    scene.adopt(&namesake);
    let mut third = scene.join(broker, &namesake).await?;
    let more = numbered(5);
    scene.publish(broker, &topic, &more).await?;
    third.expect(&more).await.map_err(|failed| failed.context("the same name on another filter"))?;
    first.expect(&more).await?;
    PASSED
}

/// Members that receive until all of `messages` are acked; what each received.
async fn share(inboxes: Vec<Inbox>, scene: &Scene, messages: usize) -> Attempt<Vec<Vec<Received>>> {
    let (count, done) = (AtomicUsize::new(0), CancellationToken::new());
    let (count, done) = (&count, &done);
    let member = async |mut inbox: Inbox| -> Attempt<Vec<Received>> {
        let mut own = Vec::new();
        loop {
            let delivery = tokio::select! {
                biased;
                () = done.cancelled() => break,
                delivery = inbox.subscription().next() => delivery?,
            };
            let Some(delivery) = delivery else { return Err(Failed("a member's subscription ended".to_owned())) };
            own.push(delivery.received().clone());
            // Work takes a moment: nobody can have it all before the others are awake.
            tokio::time::sleep(Duration::from_millis(2)).await;
            inbox.settled(delivery.ack()).await?;
            if count.fetch_add(1, Ordering::Relaxed) + 1 >= messages {
                done.cancel();
            }
        }
        // What comes now came twice.
        inbox.quiet().await?;
        Ok(own)
    };
    let all = join_all(inboxes.into_iter().map(member));
    let all = scene.arriving("the members receiving everything", all).await?;
    all.into_iter().collect()
}

/// That each message went to exactly one of the members, and each member had some.
fn check_shares(broker: &dyn Broker, messages: &[Message], shares: &[Vec<Received>]) -> Attempt {
    same_set(messages, shares.iter().flatten())?;
    let idle = shares.iter().filter(|share| share.is_empty()).count();
    let allowed = broker.capabilities().max_active_members.map_or(0, |active| shares.len().saturating_sub(active));
    let sizes: Vec<usize> = shares.iter().map(Vec::len).collect();
    ensure!(idle <= allowed, "{idle} of the members received nothing: {sizes:?}");
    Ok(())
}

pub(super) async fn members_split(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("work").await?;
    let group = scene.group("workers", &topic)?;
    let mut handles = Vec::new();
    for _ in 0..3 {
        handles.push(scene.open().await?);
    }
    let mut inboxes = Vec::new();
    for handle in &handles {
        inboxes.push(scene.join_with(handle, &group, scene.quick()?, 4).await?);
    }
    let messages: Vec<_> = (0..150).map(|n| Message::new(n.to_string()).with_key(n.to_string())).collect();
    let (published, shares) =
        futures_util::future::join(scene.publish(broker, &topic, &messages), share(inboxes, scene, messages.len()))
            .await;
    published?;
    check_shares(broker, &messages, &shares?)?;
    if !scene.in_process() {
        for handle in handles {
            scene.close(&handle).await?;
        }
    }
    PASSED
}

pub(super) async fn members_of_one_process(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("work").await?;
    let group = scene.group("workers", &topic)?;
    let inboxes = vec![
        scene.join_with(broker, &group, scene.quick()?, 4).await?,
        scene.join_with(broker, &group, scene.quick()?, 4).await?,
    ];
    let messages: Vec<_> = (0..100).map(|n| Message::new(n.to_string()).with_key(n.to_string())).collect();
    let (published, shares) =
        futures_util::future::join(scene.publish(broker, &topic, &messages), share(inboxes, scene, messages.len()))
            .await;
    published?;
    check_shares(broker, &messages, &shares?)?;
    PASSED
}

pub(super) async fn no_group(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("copies").await?;
    let mut inboxes = Vec::new();
    for _ in 0..3 {
        inboxes.push(scene.listen(broker, &topic).await?);
    }
    let messages = numbered(30);
    scene.publish(broker, &topic, &messages).await?;
    try_join_all(inboxes.iter_mut().map(|inbox| inbox.expect(&messages))).await?;
    PASSED
}

pub(super) async fn created_ahead(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("ahead").await?;
    let group = scene.group("later", &topic)?;
    ensure!(scene.create(broker, &group, scene.quick()?).await?, "a new group was called an old one");
    ensure!(!scene.create(broker, &group, scene.quick()?).await?, "an old group was called a new one");
    let messages = numbered(20);
    scene.publish(broker, &topic, &messages).await?;
    if let Some(status) = scene.done("asking for the status", broker.status()).await?.group(&group) {
        ensure!(status.lag.is_none_or(|lag| lag == 20), "20 messages wait and lag is {:?}", status.lag);
        ensure!(status.members.is_none_or(|members| members == 0), "nobody joined and members is {:?}", status.members);
    } else {
        return Err(Failed("the status does not list the group".to_owned()));
    }
    let mut member = scene.join_with(broker, &group, GroupOptions::new(), 256).await?;
    member.expect(&messages).await?;

    // What a member asks for must be what the group has, where the broker can know.
    let other = GroupOptions::new().with_retry(crate::quick_retry(3)?);
    let joining = broker.subscribe(&group.filter, Subscribe::group(group.name.clone()).with_options(other));
    refused("joining with other settings", scene.within("joining", joining).await?, &[ErrorKind::Conflict])?;

    ensure!(scene.done("deleting a group", broker.delete_group(&group)).await?, "a group that stands was not there");
    ensure!(!scene.done("deleting a group", broker.delete_group(&group)).await?, "a deleted group was still there");
    let ended = scene.within("the end of a deleted group's subscription", member.subscription().next()).await?;
    refused("receiving from a deleted group", ended, &[ErrorKind::NotFound])?;
    PASSED
}

/// Subscribes from `start`; the verdict if the broker says that it cannot.
async fn from(broker: &dyn Broker, scene: &Scene, group: &Group, start: StartAt) -> Attempt<Option<Inbox>> {
    let can = broker.capabilities();
    let support = match &start {
        StartAt::Earliest => can.start_earliest,
        StartAt::Time(_) => can.start_time,
        StartAt::Position(_) => can.start_position,
        _ => Support::Full,
    };
    let options = scene.quick()?.with_start(start.clone());
    if support.is_some() {
        return scene.join_with(broker, group, options, 256).await.map(Some);
    }
    let joining = broker.subscribe(&group.filter, Subscribe::group(group.name.clone()).with_options(options));
    refused(&format!("starting at {start}"), scene.within("joining", joining).await?, &[ErrorKind::Unsupported])?;
    Ok(None)
}

pub(super) async fn start(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // New, on the broker as it is: what was published before is not seen.
    let topic = scene.topic("late").await?;
    let mut early = scene.listen(broker, &topic).await?;
    let old = numbered(10);
    scene.publish(broker, &topic, &old).await?;
    early.expect(&old).await?;
    let group = scene.group("new", &topic)?;
    let joined = from(broker, scene, &group, StartAt::New).await?;
    let mut member = joined.ok_or_else(|| Failed("start new was refused".to_owned()))?;
    let mut alone = scene.listen(broker, &topic).await?;
    let new = numbered(10);
    scene.publish(broker, &topic, &new).await?;
    member.expect(&new).await.map_err(|failed| failed.context("start new"))?;
    alone.expect(&new).await.map_err(|failed| failed.context("start new, no group"))?;

    // Earliest and a time, where topics retain.
    let keeper = scene.harness().retaining()?;
    scene.done("connecting", keeper.connect()).await?;
    let result = start_in_history(&*keeper, scene).await;
    if scene.in_process() {
        scene.within("close", keeper.close(Duration::ZERO)).await?;
    }
    result
}

async fn start_in_history(keeper: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("history").await?;
    // A subscriber makes the topic one that the broker knows.
    let mut early = scene.listen(keeper, &topic).await?;
    let first = numbered(10);
    scene.publish(keeper, &topic, &first).await?;
    early.expect(&first).await?;
    // Times are milliseconds: what follows is of a later one.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let between = Timestamp::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let second = numbered(10);
    scene.publish(keeper, &topic, &second).await?;
    early.expect(&second).await?;

    let mut refusals = Vec::new();
    let both: Vec<Message> = first.iter().chain(&second).cloned().collect();
    match from(keeper, scene, &scene.group("earliest", &topic)?, StartAt::Earliest).await? {
        Some(mut member) => drop(member.expect(&both).await.map_err(|failed| failed.context("start earliest"))?),
        None => refusals.push("earliest"),
    }
    match from(keeper, scene, &scene.group("time", &topic)?, StartAt::Time(between)).await? {
        Some(mut member) => drop(member.expect(&second).await.map_err(|failed| failed.context("start at a time"))?),
        None => refusals.push("a time"),
    }
    match refusals.as_slice() {
        [] => PASSED,
        refused => Ok(Shown::Declared(format!("new works; {} refused", refused.join(" and ")))),
    }
}

pub(super) async fn unsubscribing(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("leave").await?;
    let group = scene.group("stay", &topic)?;
    let mut stays = scene.join(broker, &group).await?;
    let leaves = scene.join(broker, &group).await?;
    let mut other = scene.join(broker, &scene.group("other", &topic)?).await?;
    let mut alone = scene.listen(broker, &topic).await?;
    let gone = scene.listen(broker, &topic).await?;
    leaves.close().await?;
    gone.close().await?;

    let messages = numbered(40);
    let receipts = scene.publish(broker, &topic, &messages).await?;
    ensure!(
        receipts.iter().all(|receipt| receipt.matched.is_none_or(|n| n == 3)),
        "two groups and one subscriber are left, matched {:?}",
        receipts.first().and_then(|receipt| receipt.matched)
    );
    stays.expect(&messages).await.map_err(|failed| failed.context("the member that stayed"))?;
    other.expect(&messages).await.map_err(|failed| failed.context("the other group"))?;
    alone.expect(&messages).await.map_err(|failed| failed.context("the subscriber without a group"))?;
    PASSED
}

pub(super) async fn two_groups_one_process(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("handled").await?;
    let counts: Arc<Mutex<BTreeMap<(usize, String), usize>>> = Arc::default();
    let mut handlings = Vec::new();
    for number in 0..2 {
        let group = scene.group(&format!("handler-{number}"), &topic)?;
        let counts = Arc::clone(&counts);
        let options = Subscribe::group(group.name.clone()).with_options(scene.quick()?);
        let handling = broker.handle(&group.filter, options, move |received| {
            *counts.lock().entry((number, received.message().id().to_string())).or_insert(0) += 1;
            std::future::ready(())
        });
        handlings.push(scene.done("subscribing", handling).await?);
    }
    let messages = numbered(30);
    scene.publish(broker, &topic, &messages).await?;
    scene
        .eventually("both handlers running for every message", async || {
            Ok((counts.lock().values().sum::<usize>() >= 60).then_some(()))
        })
        .await?;
    scene.pause().await;
    let counts = counts.lock().clone();
    for number in 0..2 {
        for message in &messages {
            let count = counts.get(&(number, message.id().to_string())).copied().unwrap_or(0);
            ensure!(count == 1, "handler {number} ran {count} times for one message");
        }
    }
    for handling in handlings {
        scene.done("stopping a handler", handling.stop()).await?;
    }
    PASSED
}
