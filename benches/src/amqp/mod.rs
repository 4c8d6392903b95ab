//! The RabbitMQ adapter beside raw lapin, Go's amqp091 and Watermill, on one server, with messages that are the
//! same on the wire; throughput and client CPU.
//!
//! A name says what the queue and its messages are, how large a payload is, and what is done:
//! `amqp/classic/100B/publish_64`. `classic` is a classic queue and transient messages, `persistent` the
//! same queue and persistent ones, `quorum` a quorum queue.

use std::sync::Arc;
use std::time::Duration;

use crate::comparison::{Bar, Comparison, Pair, Unit};
use crate::sample::{Sample, Stopwatch};
use crate::{Failure, Result};

mod consume;
mod go;
mod limit;
mod publish;
mod raw;
mod scene;

use consume::Acks;
use go::Program;
pub use scene::{Kind, Load, PREFETCH, Scene};

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

/// Messages of a round: enough for a second or so.
const ONE_BY_ONE: u64 = 2_000;
const MANY: u64 = 20_000;

/// The comparisons of this group.
pub fn comparisons() -> Vec<Comparison> {
    let kinds = [Kind::Classic, Kind::Persistent, Kind::Quorum].into_iter();
    kinds.flat_map(|kind| [100, 1024].map(|payload| Load { kind, payload })).flat_map(of).collect()
}

/// The comparisons of one kind of queue and one size.
fn of(load: Load) -> Vec<Comparison> {
    let mut comparisons = vec![publish(load, 1, ONE_BY_ONE, 0.97)];
    for window in [64, 1_000] {
        let pipelined = publish(load, window, MANY, 1.3).with_cpu_at_most(0.6);
        comparisons.push(bound_by_server(load, pipelined));
        comparisons.push(publish_beside(load, window, "go", "amqp091"));
        comparisons.push(publish_joined(load, window));
    }
    // For the reader: its messages are its own, with other headers.
    comparisons.push(publish_beside(load, 64, "watermill", "watermill"));
    let every_64th = Acks::Every(64);
    comparisons.push(bound_by_server(load, consume(load, "consume_single", Acks::Each, 2.5)));
    comparisons.push(bound_by_server(load, consume(load, "consume_multiple", every_64th, 0.9)));
    // For the reader: what a client gains at most by acking less.
    comparisons.push(ceiling(load, "ceiling_multiple", every_64th));
    comparisons.push(ceiling(load, "ceiling_no_ack", Acks::No));
    comparisons
}

/// Of persistent messages the server may be the limit; then the bar is on the processor time.
fn bound_by_server(load: Load, comparison: Comparison) -> Comparison {
    match load.is_persistent() {
        true => comparison.with_bar_at_limit(Bar { ratio: 0.97, cpu_at_most: Some(0.6) }),
        false => comparison,
    }
}

/// Ours beside raw lapin that awaits each `basic_publish`, so many confirms outstanding.
fn publish(load: Load, window: usize, messages: u64, bar: f64) -> Comparison {
    let name = load.name(&format!("publish_{window}"));
    Comparison::new(name, Unit::MessagesPerSecond, bar, async move || {
        let scene = Arc::new(Scene::open(load).await?);
        let raw = Arc::new(raw::Publisher::open(&scene).await?);
        scene.check_alike(&raw).await?;
        let limit = limit::publishing(&scene).await?;
        let theirs = Arc::clone(&scene);
        let ours = move || publish::ours(Arc::clone(&scene), messages, window);
        let theirs = move || raw::publish(Arc::clone(&raw), Arc::clone(&theirs), messages, window);
        Ok(Pair::new(ours, theirs).with_limit(limit))
    })
}

/// For the reader: ours beside raw lapin as few of its users write it, which hands many messages to it at once and
/// so has it write them together, as ours does.
fn publish_joined(load: Load, window: usize) -> Comparison {
    let name = load.name(&format!("publish_{window}_joined"));
    let open = async |scene: Arc<Scene>| raw::Publisher::open(&scene).await;
    publish_versus(name, load, window, 0.0, open, raw::publish_joined)
}

/// Ours beside a program in Go.
fn publish_beside(load: Load, window: usize, peer: &str, program: &'static str) -> Comparison {
    let name = load.name(&format!("publish_{window}_{peer}"));
    publish_versus(name, load, window, 1.0, move |_| Program::build(program), go::publish)
}

/// Ours, so many publishes unconfirmed, beside a peer that is opened once and publishes as many messages to the
/// same exchange. After each round of either side the queue holds every message, or the round is an error.
pub fn publish_versus<P, O, R>(
    name: String,
    load: Load,
    window: usize,
    bar: f64,
    open: impl FnOnce(Arc<Scene>) -> O + Send + 'static,
    round: fn(Arc<P>, Arc<Scene>, u64, usize) -> R,
) -> Comparison
where
    P: Send + Sync + 'static,
    O: Future<Output = Result<P>> + Send + 'static,
    R: Future<Output = Result<Sample>> + Send + 'static,
{
    Comparison::new(name, Unit::MessagesPerSecond, bar, async move || {
        let scene = Arc::new(Scene::open(load).await?);
        let peer = Arc::new(open(Arc::clone(&scene)).await?);
        let beside = Arc::clone(&scene);
        let ours = move || {
            let scene = Arc::clone(&scene);
            async move {
                let sample = publish::ours(Arc::clone(&scene), MANY, window).await?;
                scene.check_left(&scene.queue(), MANY).await?;
                Ok(sample)
            }
        };
        Ok(Pair::new(ours, move || {
            let (peer, scene) = (Arc::clone(&peer), Arc::clone(&beside));
            async move {
                scene.purge().await?;
                let sample = round(peer, Arc::clone(&scene), MANY, window).await?;
                scene.check_left(&scene.queue(), MANY).await?;
                Ok(sample)
            }
        }))
    })
}

/// The queue that a peer consumes.
#[derive(Clone, Copy, Debug)]
pub enum PeerQueue {
    /// That of our group, which the peer takes as it is.
    Ours,
    /// One of this name, durable and without arguments: what a peer declares itself, whose declaration would not
    /// fit ours.
    Plain(&'static str),
}

/// Ours, each delivery acked, beside a peer that empties the queue that is named to it, which holds as many of the
/// same messages. After each round of either side nothing is left, or the round is an error.
pub fn consume_versus<R>(
    name: String,
    load: Load,
    queue: PeerQueue,
    round: fn(Arc<Scene>, String, u64) -> R,
) -> Comparison
where
    R: Future<Output = Result<Sample>> + Send + 'static,
{
    Comparison::new(name, Unit::DeliveriesPerSecond, 0.0, async move || {
        let scene = Arc::new(Scene::open(load).await?);
        let beside = Arc::clone(&scene);
        let ours = move || {
            let scene = Arc::clone(&scene);
            async move {
                let sample = consume::ours(Arc::clone(&scene), MANY).await?;
                scene.check_left(&scene.queue(), 0).await?;
                Ok(sample)
            }
        };
        Ok(Pair::new(ours, move || {
            let scene = Arc::clone(&beside);
            async move {
                let queue = match queue {
                    PeerQueue::Ours => {
                        scene.fill(MANY).await?;
                        scene.queue()
                    }
                    PeerQueue::Plain(name) => {
                        scene.fill_plain(name, MANY).await?;
                        name.to_owned()
                    }
                };
                let sample = round(Arc::clone(&scene), queue.clone(), MANY).await?;
                scene.check_left(&queue, 0).await?;
                Ok(sample)
            }
        }))
    })
}

/// Ours, each delivery acked, beside raw lapin.
fn consume(load: Load, name: &str, acks: Acks, bar: f64) -> Comparison {
    Comparison::new(load.name(name), Unit::DeliveriesPerSecond, bar, async move || {
        let scene = Arc::new(Scene::open(load).await?);
        let limit = limit::consuming(&scene).await?;
        let theirs = Arc::clone(&scene);
        let ours = move || consume::ours(Arc::clone(&scene), MANY);
        Ok(Pair::new(ours, move || consume::raw(Arc::clone(&theirs), MANY, acks)).with_limit(limit))
    })
}

/// Raw lapin that acks less beside raw lapin that acks one by one.
fn ceiling(load: Load, name: &str, acks: Acks) -> Comparison {
    Comparison::new(load.name(name), Unit::DeliveriesPerSecond, 0.0, async move || {
        let scene = Arc::new(Scene::open(load).await?);
        let theirs = Arc::clone(&scene);
        let less = move || consume::raw(Arc::clone(&scene), MANY, acks);
        Ok(Pair::new(less, move || consume::raw(Arc::clone(&theirs), MANY, Acks::Each)))
    })
}

/// Does a round's work, which is about so many messages.
///
/// # Errors
///
/// What the work says, and that it hangs.
pub async fn timed(messages: u64, work: impl Future<Output = Result<()>>) -> Result<Sample> {
    let watch = Stopwatch::start();
    bounded("a round", work).await?;
    Ok(watch.per_message(messages))
}

/// Waits for what a round waits for, and says that it hangs if it takes far too long.
async fn bounded<T>(what: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    let hangs = |_| Failure::from(format!("{what} was not over after {HANG:?}"));
    tokio::time::timeout(HANG, future).await.map_err(hangs)?
}
