//! Consuming what lies in the queue: ours, each delivery acked, and raw lapin, which acks each, every so
//! many, or none.

use std::hint::black_box;
use std::sync::Arc;

use broker_amqp::lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use broker_amqp::lapin::types::{FieldTable, ShortString};
use futures_util::StreamExt;

use super::scene::{PREFETCH, Scene, connect};
use super::timed;
use crate::Result;
use crate::sample::Sample;

/// A round of ours: from the first delivery that is looked at until all acks are with the server.
pub(super) async fn ours(scene: Arc<Scene>, messages: u64) -> Result<Sample> {
    scene.fill(messages).await?;
    let mut member = scene.join().await?;
    let consuming = async {
        let (mut batch, mut received) = (Vec::new(), 0);
        while received < messages {
            member.receive(&mut batch, 256).await?;
            for delivery in batch.drain(..) {
                black_box(delivery.message().payload().len());
                delivery.ack().await?;
                received += 1;
            }
        }
        member.close().await?;
        Ok(())
    };
    timed(messages, consuming).await
}

/// How raw lapin acks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Acks {
    /// Not at all: the server forgets what it has sent, and sends as fast as it can.
    No,
    /// Each delivery.
    Each,
    /// One for so many, with `multiple`.
    Every(u64),
}

impl Acks {
    /// The acks that are due after so many of so many deliveries.
    fn after(self, number: u64, last: u64) -> Option<BasicAckOptions> {
        match self {
            Self::No => None,
            Self::Each => Some(BasicAckOptions { multiple: false }),
            Self::Every(every) => {
                (number.is_multiple_of(every) || number == last).then_some(BasicAckOptions { multiple: true })
            }
        }
    }
}

/// A round of theirs, likewise.
pub(super) async fn raw(scene: Arc<Scene>, messages: u64, acks: Acks) -> Result<Sample> {
    scene.fill(messages).await?;
    let (connection, channel) = connect(&scene.url).await?;
    channel.basic_qos(PREFETCH as u16, BasicQosOptions::default()).await?;
    let queue = ShortString::from(scene.queue());
    let options = BasicConsumeOptions { no_ack: matches!(acks, Acks::No), ..Default::default() };
    let mut consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
    let consuming = async {
        for number in 1..=messages {
            let delivery = consumer.next().await.ok_or("the consumer ended")??;
            black_box(delivery.data.len());
            if let Some(options) = acks.after(number, messages) {
                channel.basic_ack(delivery.delivery_tag, options).await?;
            }
        }
        channel.close(200, "OK".into()).await?;
        Ok(())
    };
    let sample = timed(messages, consuming).await?;
    connection.close(200, "OK".into()).await?;
    Ok(sample)
}
