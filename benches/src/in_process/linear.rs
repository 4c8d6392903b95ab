//! What must cost each the same however many there are: making and leaving subscriptions, and firing
//! delays.

use std::time::{Duration, Instant};

use broker_core::{Broker, Message, PublisherOptions, Timestamp, Topic};
use bytes::Bytes;

use super::{BATCH, CAPACITY, Load, Run, ack, open, subscribe, topic, versus};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

/// Ten times as many at half the rate at least: what is quadratic would come to a tenth.
const BAR: f64 = 0.5;

/// A hundred thousand beside ten thousand, a million beside a hundred thousand.
pub(super) fn comparisons() -> Vec<Comparison> {
    vec![
        subscriptions("in_process/linear/subscriptions", |number| Topic::new(format!("bench.linear.{number}"))),
        subscriptions("in_process/linear/subscribers", |_| Topic::new("bench.linear")),
        versus("in_process/linear/firing".to_owned(), BAR, delays(1_000_000), fire, |load| {
            fire(delays(load.messages / 10))
        }),
    ]
}

fn subscriptions(name: &str, topic: fn(usize) -> broker_core::Result<Topic>) -> Comparison {
    let side = move |count| move || async move { come_and_go(count, topic).await };
    Comparison::new(name, Unit::MessagesPerSecond, BAR, async move || Ok(Pair::new(side(100_000), side(10_000))))
}

/// Makes so many subscriptions and leaves them; tells how many a second.
async fn come_and_go(count: usize, topic: fn(usize) -> broker_core::Result<Topic>) -> Result<f64> {
    let broker = open()?;
    let mut subscriptions = Vec::with_capacity(count);
    let began = Instant::now();
    for number in 0..count {
        subscriptions.push(subscribe(&*broker, &topic(number)?, CAPACITY, None).await?);
    }
    drop(subscriptions);
    let elapsed = began.elapsed();
    let _ = broker.close(Duration::ZERO).await;
    Ok(count as f64 / elapsed.as_secs_f64())
}

fn delays(messages: u64) -> Load {
    Load { receivers: 1, payload: 64, messages, capacity: messages as usize }
}

/// Publishes messages that are due within one second of each other, waits until all are, and takes the
/// time until the last is acked.
async fn fire(load: Load) -> Result<Run> {
    // Long enough for a million to be published and looked at before the first is due.
    const AHEAD: u64 = 4_000;
    const SPREAD: u64 = 1_000;
    let (broker, topic, payload) = (open()?, topic()?, load.payload());
    let mut subscription = subscribe(&*broker, &topic, load.capacity, None).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    let from = Timestamp::now();
    for number in 0..load.messages {
        let due = from.after(Duration::from_millis(AHEAD + number * SPREAD / load.messages));
        publisher.publish(Message::new(Bytes::clone(&payload)).with_deliver_at(due)).await?;
    }
    let mut batch = Vec::with_capacity(BATCH);
    // Looking for a message moves what is due later into the timer.
    let looked = tokio::time::timeout(Duration::from_millis(1), subscription.receive(&mut batch, BATCH)).await;
    if looked.is_ok() {
        return Err("a delay was over before all were published: the machine is too slow for this".into());
    }
    let due = from.after(Duration::from_millis(AHEAD + SPREAD));
    tokio::time::sleep(due.since(Timestamp::now())).await;
    let mut received = 0;
    let began = Instant::now();
    while received < load.messages {
        received += subscription.receive(&mut batch, BATCH).await? as u64;
        ack(&mut batch).await?;
    }
    Run { received, elapsed: began.elapsed() }.checked(load.messages)
}
