//! SeaStreamer's Kafka backend, a thin layer over rdkafka. A send is done when its delivery report has come. It
//! consumes as a member of a group and stores the offset of each message once it is read; librdkafka commits what is
//! stored.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;

use broker_benches::Result;
use broker_benches::kafka::Scene;
use broker_benches::sample::{Sample, Stopwatch};
use sea_streamer_kafka::{
    AutoOffsetReset, KafkaConnectOptions, KafkaConsumerOptions, KafkaProducer, KafkaProducerOptions, KafkaStreamer,
    SendFuture,
};
use sea_streamer_types::{
    Buffer, Consumer, ConsumerGroup, ConsumerMode, ConsumerOptions, Message, Producer, StreamKey, Streamer,
};

use super::{FETCHING, PRODUCING};

async fn connect(scene: &Scene) -> Result<KafkaStreamer> {
    let servers = format!("kafka://{}", scene.servers).parse()?;
    Ok(KafkaStreamer::connect(servers, KafkaConnectOptions::default()).await?)
}

fn topic(scene: &Scene) -> Result<StreamKey> {
    Ok(StreamKey::new(scene.topic.as_str())?)
}

pub(crate) async fn open(scene: Arc<Scene>) -> Result<KafkaProducer> {
    let mut options = KafkaProducerOptions::default();
    for (key, value) in PRODUCING {
        options.add_custom_option(key, value);
    }
    Ok(connect(&scene).await?.create_producer(topic(&scene)?, options).await?)
}

pub(crate) async fn publish(
    peer: Arc<KafkaProducer>,
    scene: Arc<Scene>,
    messages: u64,
    window: usize,
) -> Result<Sample> {
    let mut sends: VecDeque<SendFuture> = VecDeque::with_capacity(window);
    let watch = Stopwatch::start();
    for _ in 0..messages {
        if sends.len() >= window
            && let Some(oldest) = sends.pop_front()
        {
            oldest.await?;
        }
        sends.push_back(peer.send(scene.payload.as_ref())?);
    }
    for send in sends {
        send.await?;
    }
    Ok(watch.per_message(messages))
}

pub(crate) async fn consume(scene: Arc<Scene>, group: String, messages: u64) -> Result<Sample> {
    let mut options = KafkaConsumerOptions::new(ConsumerMode::LoadBalanced);
    options.set_consumer_group(ConsumerGroup::new(group))?;
    options.set_auto_offset_reset(AutoOffsetReset::Earliest);
    options.set_enable_auto_offset_store(false);
    for (key, value) in FETCHING {
        options.add_custom_option(key, value);
    }
    let mut consumer = connect(&scene).await?.create_consumer(&[topic(&scene)?], options).await?;
    let mut watch = None;
    for _ in 0..messages {
        let message = consumer.next().await?;
        watch.get_or_insert_with(Stopwatch::start);
        black_box(message.message().as_bytes().len());
        // The message borrows the consumer, which storing its offset needs for itself.
        let read = message.identifier();
        drop(message);
        consumer.store_offset_with(&read)?;
    }
    let sample = watch.map(|watch| watch.per_message(messages)).ok_or("nothing was received")?;
    // Closing commits what is stored, and blocks while it does.
    tokio::task::spawn_blocking(move || drop(consumer)).await?;
    Ok(sample)
}
