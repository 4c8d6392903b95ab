//! What an idle subscription and an idle topic hold.

use broker_core::{Message, PublisherOptions, Topic};

use super::{CAPACITY, open, subscribe};
use crate::Result;
use crate::comparison::Comparison;
use crate::footprint::{Footprint, at_most, resident_bytes};

/// How many are made, the first few of them before the memory is read.
const COUNT: usize = 50_000;
const WARM_UP: usize = 1_000;

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![
        at_most("in_process/idle/subscription", Footprint::Subscription, 4096.0),
        at_most("in_process/idle/topic", Footprint::Topic, 1024.0),
    ]
}

/// Bytes of a subscription with a topic of its own.
pub(crate) async fn subscription() -> Result<f64> {
    let broker = open()?;
    each(async |topic| subscribe(&*broker, &topic, CAPACITY, None).await).await
}

/// Bytes of a topic that was published to and has a publisher.
pub(crate) async fn topic() -> Result<f64> {
    let broker = open()?;
    each(async |topic| {
        let publisher = broker.publisher(&topic, PublisherOptions::new())?;
        publisher.publish(Message::new("")).await?;
        Ok(publisher)
    })
    .await
}

/// Makes many on topics of their own and tells the bytes of one.
async fn each<T>(make: impl AsyncFn(Topic) -> Result<T>) -> Result<f64> {
    let mut made = Vec::with_capacity(COUNT);
    let mut before = 0;
    for number in 0..COUNT {
        if number == WARM_UP {
            before = resident_bytes()?;
        }
        made.push(make(Topic::new(format!("bench.idle.{number}"))?).await?);
    }
    let held = resident_bytes()?.saturating_sub(before);
    Ok(held as f64 / (COUNT - WARM_UP) as f64)
}
