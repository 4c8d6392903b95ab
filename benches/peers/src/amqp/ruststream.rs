//! RustStream's lapin adapter. A publish is done when its confirm has come; it is not `mandatory`, so that a
//! message that reaches no queue is confirmed, too. Its messages have no id, no time and no header.

use std::hint::black_box;
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::Arc;

use ::ruststream::{Broker, ConnectedBroker, IncomingMessage, OutgoingMessage, Publisher, Subscriber};
use broker_benches::Result;
use broker_benches::amqp::{PREFETCH, Scene, timed};
use broker_benches::sample::Sample;
use futures_util::{StreamExt, TryStreamExt, stream};
use ruststream_lapin::{ConfirmsPublisher, ConnectedLapinBroker, LapinBroker, LapinPublish, RabbitQueue};

/// Connected, with what publishes.
pub(crate) struct Peer {
    _connected: ConnectedLapinBroker,
    publisher: ConfirmsPublisher,
}

pub(crate) async fn open(scene: Arc<Scene>) -> Result<Peer> {
    let connected = connect(&scene).await?;
    let policy = LapinPublish::default().exchange(scene.exchange()).persistent(scene.load.is_persistent());
    let publisher = connected.publisher(policy.confirms());
    Ok(Peer { _connected: connected, publisher })
}

async fn connect(scene: &Scene) -> Result<ConnectedLapinBroker> {
    Ok(LapinBroker::new(format!("{}/%2f", scene.url)).connect().await?)
}

pub(crate) async fn publish(peer: Arc<Peer>, scene: Arc<Scene>, messages: u64, window: usize) -> Result<Sample> {
    let body = scene.load.body();
    let publish = |_| peer.publisher.publish(OutgoingMessage::new(scene.topic.as_str(), body.as_ref()), None);
    let publishing = async {
        stream::iter(0..messages).map(publish).buffer_unordered(window).try_collect::<()>().await?;
        Ok(())
    };
    timed(messages, publishing).await
}

pub(crate) async fn consume(scene: Arc<Scene>, queue: String, messages: u64) -> Result<Sample> {
    let connected = connect(&scene).await?;
    let prefetch = NonZeroU16::new(PREFETCH as u16).ok_or("a prefetch of 0 is none")?;
    let mut subscriber = connected.subscribe(RabbitQueue::new(queue).prefetch(prefetch)).await?;
    let consuming = async {
        let mut stream = pin!(subscriber.stream());
        for _ in 0..messages {
            let message = stream.next().await.ok_or("the stream ended")??;
            black_box(message.payload().len());
            message.ack().await?;
        }
        connected.shutdown().await?;
        Ok(())
    };
    timed(messages, consuming).await
}
