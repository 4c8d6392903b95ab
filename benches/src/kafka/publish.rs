//! Publishing: one after another, and pipelined.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_core::{Broker, Message, Publish, PublisherOptions};
use broker_kafka::rdkafka::client::{ClientContext, DefaultClientContext};
use broker_kafka::rdkafka::config::FromClientConfigAndContext;
use broker_kafka::rdkafka::producer::{
    BaseRecord, DeliveryFuture, DeliveryResult, FutureProducer as AnyFutureProducer, FutureRecord, ProducerContext,
    ThreadedProducer,
};
use broker_kafka::rdkafka::util::AsyncRuntime;

use super::{Scene, blocking, bounded, headers};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};
use crate::sample::{Sample, Stopwatch};

/// rdkafka's own, on tokio.
type FutureProducer = AnyFutureProducer<DefaultClientContext, Tokio>;

/// As rdkafka's feature `tokio` has it, which nothing else of ours needs.
struct Tokio;

impl AsyncRuntime for Tokio {
    type Delay = tokio::time::Sleep;

    fn spawn<T: Future<Output = ()> + Send + 'static>(task: T) {
        tokio::spawn(task);
    }

    fn delay_for(duration: Duration) -> Self::Delay {
        tokio::time::sleep(duration)
    }
}

const ONE_BY_ONE: u64 = 3_000;

/// Records of a round beside a peer: a second or so.
const PEERS: u64 = 200_000;

/// Publishes outstanding at most where they are pipelined: a future each, the oldest awaited.
const WINDOW: usize = 10_000;

pub(super) fn comparisons(size: usize) -> Vec<Comparison> {
    // A second or so.
    let many: u64 = if size <= 100 { 300_000 } else { 100_000 };
    vec![
        Comparison::new(format!("kafka/publish/awaited_{size}"), Unit::MessagesPerSecond, 0.97, async move || {
            let scene = Arc::new(Scene::open(size, 1).await?);
            let raw: FutureProducer = scene.raw_producer().set("linger.ms", "0").create()?;
            let theirs = Arc::clone(&scene);
            Ok(Pair::new(
                move || bounded(awaited(Arc::clone(&scene))),
                move || bounded(raw_awaited(Arc::clone(&theirs), raw.clone())),
            ))
        }),
        // rdkafka's own way of a future each, with librdkafka's defaults for what batches form by.
        Comparison::new(
            format!("kafka/publish/future_producer_{size}"),
            Unit::MessagesPerSecond,
            1.5,
            async move || {
                let scene = Arc::new(Scene::open(size, 1).await?);
                let raw: FutureProducer = scene.raw_producer().create()?;
                let theirs = Arc::clone(&scene);
                Ok(Pair::new(
                    move || bounded(pipelined(Arc::clone(&scene), many)),
                    move || bounded(raw_futures(Arc::clone(&theirs), raw.clone(), many)),
                ))
            },
        ),
        // Not ours: what is left to gain where librdkafka does the work and nobody makes futures.
        Comparison::new(format!("kafka/publish/ceiling_{size}"), Unit::MessagesPerSecond, 0.0, async move || {
            let scene = Arc::new(Scene::open(size, 1).await?);
            let done = Arc::new(AtomicU64::new(0));
            // Our settings, so that batches form as ours do.
            let counting = Counting(Arc::clone(&done));
            let mut settings = scene.raw_producer();
            let least = ThreadedProducer::from_config_and_context(settings.set("linger.ms", "0"), counting)?;
            let least = Arc::new(least);
            let raw: FutureProducer = scene.raw_producer().create()?;
            let theirs = Arc::clone(&scene);
            Ok(Pair::new(
                move || {
                    let (scene, least, done) = (Arc::clone(&scene), Arc::clone(&least), Arc::clone(&done));
                    blocking(move || raw_callbacks(&scene, &least, &done, many, WINDOW as u64))
                },
                move || bounded(raw_futures(Arc::clone(&theirs), raw.clone(), many)),
            ))
        }),
        // The least that can be done: a callback that counts.
        Comparison::new(
            format!("kafka/publish/threaded_producer_{size}"),
            Unit::MessagesPerSecond,
            0.7,
            async move || {
                let scene = Arc::new(Scene::open(size, 1).await?);
                let done = Arc::new(AtomicU64::new(0));
                let counting = Counting(Arc::clone(&done));
                let raw = ThreadedProducer::from_config_and_context(&scene.raw_producer(), counting)?;
                let raw = Arc::new(raw);
                let theirs = Arc::clone(&scene);
                Ok(Pair::new(
                    move || bounded(pipelined(Arc::clone(&scene), many)),
                    move || {
                        let (scene, raw, done) = (Arc::clone(&theirs), Arc::clone(&raw), Arc::clone(&done));
                        blocking(move || raw_callbacks(&scene, &raw, &done, many, u64::MAX))
                    },
                ))
            },
        ),
    ]
}

/// Ours, a future each, beside a peer that is opened once and publishes as many records to the same topic, as many
/// outstanding. After each round of either side the topic holds as many more, or the round is an error.
pub fn publish_versus<P, O, R>(
    name: String,
    size: usize,
    open: impl FnOnce(Arc<Scene>) -> O + Send + 'static,
    round: fn(Arc<P>, Arc<Scene>, u64, usize) -> R,
) -> Comparison
where
    P: Send + Sync + 'static,
    O: Future<Output = Result<P>> + Send + 'static,
    R: Future<Output = Result<Sample>> + Send + 'static,
{
    Comparison::new(name, Unit::MessagesPerSecond, 0.0, async move || {
        let scene = Arc::new(Scene::open(size, 1).await?);
        let peer = Arc::new(open(Arc::clone(&scene)).await?);
        let beside = Arc::clone(&scene);
        let ours = move || {
            let scene = Arc::clone(&scene);
            counted(Arc::clone(&scene), pipelined(scene, PEERS))
        };
        Ok(Pair::new(ours, move || {
            let (peer, scene) = (Arc::clone(&peer), Arc::clone(&beside));
            counted(Arc::clone(&scene), round(peer, scene, PEERS, WINDOW))
        }))
    })
}

/// A round that publishes, if the server has as many records more after it.
async fn counted(scene: Arc<Scene>, round: impl Future<Output = Result<Sample>>) -> Result<Sample> {
    let before = scene.records().await?;
    let sample = bounded(round).await?;
    match scene.records().await? - before {
        PEERS => Ok(sample),
        other => Err(format!("the topic holds {other} records more, not {PEERS}").into()),
    }
}

async fn awaited(scene: Arc<Scene>) -> Result<Sample> {
    let publisher = scene.broker.publisher(&scene.topic, PublisherOptions::new())?;
    let watch = Stopwatch::start();
    for _ in 0..ONE_BY_ONE {
        publisher.publish(Message::new(scene.payload.clone())).await?;
    }
    Ok(watch.per_message(ONE_BY_ONE))
}

async fn raw_awaited(scene: Arc<Scene>, raw: FutureProducer) -> Result<Sample> {
    let watch = Stopwatch::start();
    for _ in 0..ONE_BY_ONE {
        raw_send(&scene, &raw)?.await?.map_err(|(error, _)| error)?;
    }
    Ok(watch.per_message(ONE_BY_ONE))
}

async fn pipelined(scene: Arc<Scene>, messages: u64) -> Result<Sample> {
    let publisher = scene.broker.publisher(&scene.topic, PublisherOptions::new())?;
    let mut window: VecDeque<Publish> = VecDeque::with_capacity(WINDOW);
    let watch = Stopwatch::start();
    for _ in 0..messages {
        if window.len() >= WINDOW
            && let Some(oldest) = window.pop_front()
        {
            oldest.await?;
        }
        window.push_back(publisher.publish(Message::new(scene.payload.clone())));
    }
    for publish in window {
        publish.await?;
    }
    Ok(watch.per_message(messages))
}

async fn raw_futures(scene: Arc<Scene>, raw: FutureProducer, messages: u64) -> Result<Sample> {
    let mut window: VecDeque<DeliveryFuture> = VecDeque::with_capacity(WINDOW);
    let watch = Stopwatch::start();
    for _ in 0..messages {
        if window.len() >= WINDOW
            && let Some(oldest) = window.pop_front()
        {
            oldest.await?.map_err(|(error, _)| error)?;
        }
        window.push_back(raw_send(&scene, &raw)?);
    }
    for publish in window {
        publish.await?.map_err(|(error, _)| error)?;
    }
    Ok(watch.per_message(messages))
}

/// The window is far below librdkafka's queue, so that it is never full.
fn raw_send(scene: &Scene, raw: &FutureProducer) -> Result<DeliveryFuture> {
    let record = FutureRecord::<[u8], [u8]>::to(scene.topic.as_str()).payload(&scene.payload).headers(headers());
    raw.send_result(record).map_err(|(error, _)| error.into())
}

struct Counting(Arc<AtomicU64>);

impl ClientContext for Counting {}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Of `window` outstanding at most, none but librdkafka's queue if it is longer than that.
fn raw_callbacks(
    scene: &Scene,
    raw: &ThreadedProducer<Counting>,
    done: &AtomicU64,
    messages: u64,
    window: u64,
) -> Result<Sample> {
    done.store(0, Ordering::Relaxed);
    let watch = Stopwatch::start();
    for sent in 0..messages {
        while sent - done.load(Ordering::Relaxed) >= window {
            std::thread::yield_now();
        }
        let mut record = BaseRecord::<[u8], [u8]>::to(scene.topic.as_str()).payload(&scene.payload).headers(headers());
        while let Err((error, again)) = raw.send(record) {
            if !is_full(&error) {
                return Err(error.into());
            }
            record = again;
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
    while done.load(Ordering::Relaxed) < messages {
        std::thread::park_timeout(Duration::from_millis(1));
    }
    Ok(watch.per_message(messages))
}

fn is_full(error: &broker_kafka::rdkafka::error::KafkaError) -> bool {
    error.rdkafka_error_code() == Some(broker_kafka::rdkafka::error::RDKafkaErrorCode::QueueFull)
}
