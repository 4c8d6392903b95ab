//! mq-bridge's AMQP endpoint. A send is done when its confirm has come, `mandatory` as ours is; a batch when all of
//! its confirms have. Its messages have an id, and neither time nor header.
//!
//! Its consumer declares the queue itself, without arguments, which would not fit ours: it has a queue of its own,
//! filled with the messages that ours has.

use std::hint::black_box;
use std::sync::Arc;

use ::mq_bridge::CanonicalMessage;
use ::mq_bridge::endpoints::amqp::{AmqpConsumer, AmqpPublisher};
use ::mq_bridge::models::AmqpConfig;
use ::mq_bridge::traits::{MessageConsumer, MessageDisposition, MessagePublisher, SentBatch};
use broker_benches::Result;
use broker_benches::amqp::{PREFETCH, Scene, timed};
use broker_benches::in_process::BATCH;
use broker_benches::sample::Sample;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

/// The queue that it consumes.
pub(crate) const QUEUE: &str = "bench.mq_bridge";

pub(crate) async fn open(scene: Arc<Scene>) -> Result<AmqpPublisher> {
    let config = AmqpConfig {
        url: url(&scene),
        exchange: Some(scene.exchange().to_owned()),
        // The routing key.
        queue: Some(scene.topic.to_string()),
        no_declare_queue: true,
        no_persistence: !scene.load.is_persistent(),
        ..Default::default()
    };
    Ok(AmqpPublisher::new(&config).await?)
}

fn url(scene: &Scene) -> String {
    format!("{}/%2f", scene.url)
}

fn message(body: &Bytes) -> CanonicalMessage {
    CanonicalMessage::new_bytes(Bytes::clone(body), None)
}

/// So many sends at once.
pub(crate) async fn publish(
    peer: Arc<AmqpPublisher>,
    scene: Arc<Scene>,
    messages: u64,
    window: usize,
) -> Result<Sample> {
    let body = scene.load.body();
    let publishing = async {
        let sends = stream::iter(0..messages).map(|_| peer.send(message(&body))).buffer_unordered(window);
        sends.try_for_each(|_| std::future::ready(Ok(()))).await?;
        Ok(())
    };
    timed(messages, publishing).await
}

/// So many in a batch, one batch after another.
pub(crate) async fn publish_batches(
    peer: Arc<AmqpPublisher>,
    scene: Arc<Scene>,
    messages: u64,
    window: usize,
) -> Result<Sample> {
    let body = scene.load.body();
    let publishing = async {
        let mut left = usize::try_from(messages)?;
        while left > 0 {
            let some = window.min(left);
            left -= some;
            if let SentBatch::Partial { failed, .. } =
                peer.send_batch((0..some).map(|_| message(&body)).collect()).await?
            {
                return Err(format!("{} messages of a batch were not taken", failed.len()).into());
            }
        }
        Ok(())
    };
    timed(messages, publishing).await
}

pub(crate) async fn consume(scene: Arc<Scene>, queue: String, messages: u64) -> Result<Sample> {
    let prefetch = u16::try_from(PREFETCH)?;
    let config =
        AmqpConfig { url: url(&scene), queue: Some(queue), prefetch_count: Some(prefetch), ..Default::default() };
    let mut consumer = AmqpConsumer::new(&config).await?;
    let consuming = async {
        let mut received = 0;
        while received < messages {
            let batch = consumer.receive_batch(BATCH).await?;
            for message in &batch.messages {
                black_box(message.payload.len());
            }
            received += batch.messages.len() as u64;
            (batch.commit)(vec![MessageDisposition::Ack; batch.messages.len()]).await?;
        }
        // It closes nothing by itself: dropping it ends the connection, and what is not acked comes back.
        drop(consumer);
        Ok(())
    };
    timed(messages, consuming).await
}
