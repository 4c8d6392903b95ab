//! RustStream's rdkafka adapter. A publish is done when its delivery report has come. It consumes with
//! `Commit::Tracked`: an ack stores the offset below which everything is acked, and librdkafka commits what is stored.

use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;

use ::ruststream::{Broker, IncomingMessage, OutgoingMessage, Publisher, Subscriber};
use broker_benches::Result;
use broker_benches::kafka::Scene;
use broker_benches::sample::{Sample, Stopwatch};
use futures_util::{StreamExt, TryStreamExt, stream};
use ruststream_rdkafka::{
    Commit, ConnectedKafkaBroker, KafkaBroker, KafkaPublish, KafkaPublisher, KafkaTopic, StartOffset,
};

use super::{FETCHING, PRODUCING};

/// Connected, with what publishes.
pub(crate) struct Peer {
    _connected: ConnectedKafkaBroker,
    publisher: KafkaPublisher,
}

pub(crate) async fn open(scene: Arc<Scene>) -> Result<Peer> {
    let broker = KafkaBroker::new(scene.servers.split(','));
    let set = |broker: KafkaBroker, (key, value): (&str, &str)| broker.producer_config(key, value);
    let connected = PRODUCING.into_iter().fold(broker, set).connect().await?;
    let publisher = connected.publisher(KafkaPublish::default());
    Ok(Peer { _connected: connected, publisher })
}

pub(crate) async fn publish(peer: Arc<Peer>, scene: Arc<Scene>, messages: u64, window: usize) -> Result<Sample> {
    let publish = |_| peer.publisher.publish(OutgoingMessage::new(scene.topic.as_str(), scene.payload.as_ref()), None);
    let watch = Stopwatch::start();
    stream::iter(0..messages).map(publish).buffer_unordered(window).try_collect::<()>().await?;
    Ok(watch.per_message(messages))
}

pub(crate) async fn consume(scene: Arc<Scene>, group: String, messages: u64) -> Result<Sample> {
    let connected = KafkaBroker::new(scene.servers.split(',')).connect().await?;
    let topic = KafkaTopic::new(scene.topic.as_str()).group(group).start(StartOffset::Earliest).commit(Commit::Tracked);
    let topic = FETCHING.into_iter().fold(topic, |topic, (key, value)| topic.config(key, value));
    let mut subscriber = connected.subscribe_with(topic).await?;
    let mut stream = pin!(subscriber.stream());
    let mut watch = None;
    for _ in 0..messages {
        let message = stream.next().await.ok_or("the stream ended")??;
        watch.get_or_insert_with(Stopwatch::start);
        black_box(message.payload().len());
        message.ack().await?;
    }
    Ok(watch.map(|watch| watch.per_message(messages)).ok_or("nothing was received")?)
}
