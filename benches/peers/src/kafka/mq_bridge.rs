//! mq-bridge's Kafka endpoint. A send is done when its delivery report has come; it lingers for a millisecond, and has
//! the message's id as the record's key and in a header. It consumes in batches, and commits the last offset of each
//! without waiting for the answer.

use std::hint::black_box;
use std::sync::Arc;

use ::mq_bridge::CanonicalMessage;
use ::mq_bridge::endpoints::kafka::{KafkaConsumer, KafkaPublisher};
use ::mq_bridge::models::KafkaConfig;
use ::mq_bridge::traits::{MessageConsumer, MessageDisposition, MessagePublisher};
use broker_benches::Result;
use broker_benches::in_process::BATCH;
use broker_benches::kafka::Scene;
use broker_benches::sample::{Sample, Stopwatch};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{FETCHING, PRODUCING};

fn config(scene: &Scene) -> KafkaConfig {
    KafkaConfig { url: scene.servers.clone(), topic: Some(scene.topic.to_string()), ..Default::default() }
}

fn options<const N: usize>(settings: [(&str, &str); N]) -> Option<Vec<(String, String)>> {
    Some(settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
}

pub(crate) async fn open(scene: Arc<Scene>) -> Result<KafkaPublisher> {
    let config = KafkaConfig { producer_options: options(PRODUCING), create_topic: Some(false), ..config(&scene) };
    Ok(KafkaPublisher::new(&config).await?)
}

pub(crate) async fn publish(
    peer: Arc<KafkaPublisher>,
    scene: Arc<Scene>,
    messages: u64,
    window: usize,
) -> Result<Sample> {
    let send = |_| peer.send(CanonicalMessage::new_bytes(Bytes::clone(&scene.payload), None));
    let watch = Stopwatch::start();
    let sends = stream::iter(0..messages).map(send).buffer_unordered(window);
    sends.try_for_each(|_| std::future::ready(Ok(()))).await?;
    Ok(watch.per_message(messages))
}

pub(crate) async fn consume(scene: Arc<Scene>, group: String, messages: u64) -> Result<Sample> {
    let config = KafkaConfig { group_id: Some(group), consumer_options: options(FETCHING), ..config(&scene) };
    let mut consumer = KafkaConsumer::new(&config).await?;
    let (mut received, mut watch) = (0, None);
    while received < messages {
        let batch = consumer.receive_batch(BATCH).await?;
        watch.get_or_insert_with(Stopwatch::start);
        for message in &batch.messages {
            black_box(message.payload.len());
        }
        received += batch.messages.len() as u64;
        (batch.commit)(vec![MessageDisposition::Ack; batch.messages.len()]).await?;
    }
    Ok(watch.map(|watch| watch.per_message(messages)).ok_or("nothing was received")?)
}
