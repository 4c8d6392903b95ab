//! Consuming a backlog: each delivery acked and committed from the tracker, beside a bare loop that reads every byte
//! of a record and stores its offset. From the first record to the last, on both sides.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_core::{Broker, Delivery, Group, GroupOptions, Message, PublisherOptions, StartAt, Subscribe};
use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use broker_kafka::rdkafka::message::{BorrowedMessage, Headers as _};
use broker_kafka::rdkafka::{ClientConfig, Message as _, Offset, TopicPartitionList};

use super::{Scene, blocking, bounded};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};
use crate::sample::{Sample, Stopwatch};

/// Deliveries taken off at once at most.
const BATCH: usize = 256;

/// Records of a backlog beside a peer: a second or two of the slower.
const PEERS: u64 = 200_000;

/// Deliveries that a handler holds on to, so that its acks are out of order.
const HELD: usize = 100;

pub(super) fn comparisons(size: usize) -> Vec<Comparison> {
    // More than librdkafka's queue holds (100,000 messages, 64 MiB), which is where its defaults stall.
    let many: u64 = if size <= 100 { 500_000 } else { 200_000 };
    let name = |what: &str| format!("kafka/consume/{what}_{size}");
    vec![
        versus(name("base_consumer"), 0.9, Load { size, many, partitions: 1, shuffled: false, tuned: true }),
        versus(name("librdkafka_defaults"), 2.0, Load { size, many, partitions: 1, shuffled: false, tuned: false }),
        versus(name("out_of_order"), 0.8, Load { size, many, partitions: 12, shuffled: true, tuned: true }),
    ]
}

#[derive(Clone, Copy)]
struct Load {
    size: usize,
    many: u64,
    partitions: i32,
    /// Whether our acks are out of order.
    shuffled: bool,
    /// Whether the bare consumer has the fetch settings that ours has.
    tuned: bool,
}

fn versus(name: String, bar: f64, load: Load) -> Comparison {
    Comparison::new(name, Unit::DeliveriesPerSecond, bar, async move || {
        let scene = Arc::new(Scene::open(load.size, usize::try_from(load.partitions)?).await?);
        // One is there already.
        fill(&scene, load.many - 1).await?;
        let theirs = Arc::clone(&scene);
        let rounds = AtomicU64::new(0);
        let ours = move || {
            let round = rounds.fetch_add(1, Ordering::Relaxed);
            bounded(ours(Arc::clone(&scene), load, round))
        };
        Ok(Pair::new(ours, move || {
            let scene = Arc::clone(&theirs);
            blocking(move || bare(&scene, load))
        }))
    })
}

/// Ours, each delivery acked, beside a peer that is a member of the group that is named to it, which has no commits
/// yet, and reads as many records of the same topic of one partition. After each round of either side the group's
/// commits are at the end, or the round is an error.
pub fn consume_versus<R>(name: String, size: usize, round: fn(Arc<Scene>, String, u64) -> R) -> Comparison
where
    R: Future<Output = Result<Sample>> + Send + 'static,
{
    let load = Load { size, many: PEERS, partitions: 1, shuffled: false, tuned: true };
    Comparison::new(name, Unit::DeliveriesPerSecond, 0.0, async move || {
        let scene = Arc::new(Scene::open(load.size, 1).await?);
        fill(&scene, load.many - 1).await?;
        let beside = Arc::clone(&scene);
        let (our_rounds, their_rounds) = (AtomicU64::new(0), AtomicU64::new(0));
        let ours = move || {
            let number = our_rounds.fetch_add(1, Ordering::Relaxed);
            bounded(ours(Arc::clone(&scene), load, number))
        };
        Ok(Pair::new(ours, move || {
            let number = their_rounds.fetch_add(1, Ordering::Relaxed);
            let scene = Arc::clone(&beside);
            bounded(async move {
                let group = format!("peer-{number}@{}", scene.topic);
                let sample = round(Arc::clone(&scene), group.clone(), load.many).await?;
                scene.check_committed(&group, load.many).await?;
                Ok(sample)
            })
        }))
    })
}

async fn fill(scene: &Scene, messages: u64) -> Result<()> {
    let publisher = scene.broker.publisher(&scene.topic, PublisherOptions::new())?;
    let mut left = messages;
    while left > 0 {
        let some = left.min(10_000);
        let batch = (0..some).map(|_| Message::new(scene.payload.clone())).collect();
        for result in publisher.publish_batch(batch).await? {
            result?;
        }
        left -= some;
    }
    Ok(())
}

/// A member of a group of its own, whose acks are in the commits when it has closed.
async fn ours(scene: Arc<Scene>, load: Load, round: u64) -> Result<Sample> {
    let group: Group = format!("round-{round}@{}", scene.topic).parse()?;
    let options = GroupOptions::new().with_start(StartAt::Earliest);
    let options = Subscribe::group(group.name.clone()).with_options(options);
    let mut subscription = scene.broker.subscribe(&group.filter, options).await?;
    let (mut received, mut watch) = (0, None);
    let mut batch: Vec<Delivery> = Vec::with_capacity(BATCH);
    let mut held: Vec<Delivery> = Vec::with_capacity(HELD + BATCH);
    while received < load.many {
        received += subscription.receive(&mut batch, BATCH).await? as u64;
        watch.get_or_insert_with(Stopwatch::start);
        if load.shuffled {
            held.append(&mut batch);
            while held.len() > HELD {
                let delivery = held.swap_remove(fastrand::usize(..held.len()));
                black_box(delivery.message().payload().len());
                delivery.ack().await?;
            }
        } else {
            for delivery in batch.drain(..) {
                black_box(delivery.message().payload().len());
                delivery.ack().await?;
            }
        }
    }
    for delivery in held {
        delivery.ack().await?;
    }
    let sample = watch.map(|watch| watch.per_message(load.many)).ok_or("nothing was received")?;
    subscription.close().await?;
    if received > load.many {
        return Err(format!("{received} deliveries of {} messages", load.many).into());
    }
    scene.check_committed(&scene.config.group_id(&group), load.many).await?;
    scene.broker.delete_group(&group).await?;
    Ok(sample)
}

fn bare(scene: &Scene, load: Load) -> Result<Sample> {
    let mut settings: ClientConfig = scene.raw();
    // Offsets that are stored are committed in the background, every 5 s by default.
    settings.set("group.id", format!("bare@{}", scene.topic)).set("enable.auto.offset.store", "false");
    if load.tuned {
        settings.set("fetch.queue.backoff.ms", "10").set("fetch.wait.max.ms", "100");
    }
    let consumer: BaseConsumer = settings.create()?;
    let mut list = TopicPartitionList::new();
    for partition in 0..load.partitions {
        list.add_partition_offset(scene.topic.as_str(), partition, Offset::Beginning)?;
    }
    consumer.assign(&list)?;
    let (mut received, mut watch) = (0, None);
    let mut read = Vec::new();
    while received < load.many {
        let Some(record) = consumer.poll(Duration::from_millis(100)) else { continue };
        let record = record?;
        watch.get_or_insert_with(Stopwatch::start);
        copy_out(&record, &mut read);
        black_box(&read);
        consumer.store_offset_from_message(&record)?;
        received += 1;
    }
    Ok(watch.map(|watch| watch.per_message(load.many)).ok_or("nothing was received")?)
}

/// Reads all that a delivery has: key, payload, name and value of each header, which librdkafka takes apart only
/// where they are asked for. Into one buffer that is used again, the cheapest way to have read every byte.
fn copy_out(record: &BorrowedMessage<'_>, into: &mut Vec<u8>) {
    into.clear();
    for part in [record.key(), record.payload()].into_iter().flatten() {
        into.extend_from_slice(part);
    }
    for header in record.headers().into_iter().flat_map(|headers| headers.iter()) {
        into.extend_from_slice(header.key.as_bytes());
        into.extend_from_slice(header.value.unwrap_or_default());
    }
}
