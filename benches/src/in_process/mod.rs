//! The in-process broker, through its full public contract, beside bare channels.
//!
//! Both sides carry [`Message`]s made from one shared payload, in channels and backlogs of
//! the same size, taken off in batches of [`BATCH`] at most. Ours is an `Arc<dyn Broker>`, and
//! every delivery is acked; theirs is the channel alone.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use broker_core::{
    Backlog, Broker, Connectors, Delivery, GroupName, GroupOptions, Message, PublisherOptions, Subscribe, Subscription,
    Topic, TopicFilter,
};
use bytes::Bytes;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

pub mod fan_out;
pub mod footprint;
pub mod group;
mod linear;
mod one_core;
pub mod publish;

/// Messages a channel or a backlog holds at most, unless a load says otherwise.
pub const CAPACITY: usize = 1024;

/// Messages taken off at once at most, on both sides.
pub const BATCH: usize = 256;

/// How long a round may take before it is taken for a hang.
const HANG: Duration = Duration::from_secs(120);

/// The comparisons of this group.
pub fn comparisons() -> Vec<Comparison> {
    let of_threads = [fan_out::comparisons(), group::comparisons(), one_core::comparisons()];
    let of_one = [publish::comparisons(), footprint::comparisons(), linear::comparisons()];
    of_threads.into_iter().chain(of_one).flatten().collect()
}

/// What is published and to how many.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Subscribers with a copy each, or members of one group.
    pub receivers: usize,
    /// Bytes of a payload.
    pub payload: usize,
    /// Messages published.
    pub messages: u64,
    /// Messages that a channel, or the backlog of a subscription, holds at most: the same on both sides.
    pub capacity: usize,
}

impl Load {
    /// The payload that all messages share.
    pub fn payload(self) -> Bytes {
        Bytes::from(vec![b'x'; self.payload])
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// Messages received, by all receivers together.
    pub received: u64,
    /// From the first publish until the last receiver was done.
    pub elapsed: Duration,
}

impl Run {
    /// Messages received a second, by all receivers together.
    pub fn rate(self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64()
    }

    /// This run, if exactly `expected` messages were received.
    ///
    /// # Errors
    ///
    /// Another count.
    pub fn checked(self, expected: u64) -> Result<Self> {
        if self.received != expected {
            return Err(format!("{} messages were received where {expected} were due", self.received).into());
        }
        Ok(self)
    }
}

/// Runs `publisher` and `receivers`, which wait for it already and tell how many messages they
/// received, to their end.
///
/// # Errors
///
/// What one of them reports, and that they hang.
pub async fn run(
    receivers: Vec<JoinHandle<Result<u64>>>,
    publisher: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<Run> {
    let began = Instant::now();
    let whole = async {
        let publisher = tokio::spawn(publisher);
        let mut received = 0;
        for receiver in receivers {
            received += receiver.await??;
        }
        publisher.await??;
        Ok(Run { received, elapsed: began.elapsed() })
    };
    let hangs = |_| format!("the round was not over after {HANG:?}: a message was lost or a wake-up missed");
    tokio::time::timeout(HANG, whole).await.map_err(hangs)?
}

/// A comparison of two runs of the same load, by what is received a second.
pub fn versus<O, T>(name: String, bar: f64, load: Load, ours: fn(Load) -> O, theirs: fn(Load) -> T) -> Comparison
where
    O: Future<Output = Result<Run>> + Send + 'static,
    T: Future<Output = Result<Run>> + Send + 'static,
{
    Comparison::new(name, Unit::DeliveriesPerSecond, bar, async move || {
        let ours = move || async move { Ok(ours(load).await?.rate()) };
        let theirs = move || async move { Ok(theirs(load).await?.rate()) };
        Ok(Pair::new(ours, theirs))
    })
}

/// Our broker as a service has it.
fn open() -> Result<Arc<dyn Broker>> {
    Ok(Connectors::new().open("memory:")?)
}

fn topic() -> Result<Topic> {
    Ok(Topic::new("bench.load")?)
}

/// Subscribes with a backlog of so many messages: with a copy of one's own, or as a member of `group`.
async fn subscribe(broker: &dyn Broker, topic: &Topic, capacity: usize, group: Option<&str>) -> Result<Subscription> {
    let options = match group {
        Some(name) => Subscribe::group(GroupName::new(name)?),
        None => Subscribe::new(),
    };
    let backlog = Backlog::default().with_max_messages(capacity as u64)?;
    let options = options.with_options(GroupOptions::new().with_backlog(backlog)).with_max_in_flight(BATCH)?;
    Ok(broker.subscribe(&TopicFilter::from(topic), options).await?)
}

/// Messages that receivers have yet to receive, all of them together.
struct Due {
    left: AtomicI64,
    none: Notify,
}

impl Due {
    fn new(messages: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicI64::new(i64::try_from(messages).unwrap_or(i64::MAX)), none: Notify::new() })
    }

    fn received(&self, messages: usize) {
        let messages = i64::try_from(messages).unwrap_or(i64::MAX);
        if self.left.fetch_sub(messages, Ordering::AcqRel) <= messages {
            self.none.notify_one();
        }
    }

    async fn all_received(&self) {
        while self.left.load(Ordering::Acquire) > 0 {
            self.none.notified().await;
        }
    }
}

/// Publishes one message after another, and closes the broker when all are received, so that
/// receivers come to an end: a drain is not what is measured.
async fn publish_and_close(broker: Arc<dyn Broker>, topic: Topic, load: Load, due: Arc<Due>) -> Result<()> {
    let payload = load.payload();
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;
    for _ in 0..load.messages {
        publisher.publish(Message::new(Bytes::clone(&payload))).await?;
    }
    due.all_received().await;
    let report = broker.close(HANG).await;
    if !report.complete || report.lost() > 0 {
        return Err(format!("closing lost messages: {report:?}").into());
    }
    Ok(())
}

/// Receives and acks until the broker has closed; tells how many.
async fn receive(mut subscription: Subscription, due: Arc<Due>) -> Result<u64> {
    let mut batch = Vec::with_capacity(BATCH);
    let mut received = 0;
    while subscription.receive(&mut batch, BATCH).await? > 0 {
        let messages = batch.len();
        ack(&mut batch).await?;
        received += messages as u64;
        due.received(messages);
    }
    Ok(received)
}

/// Reads and acks a batch, one delivery after another.
async fn ack(batch: &mut Vec<Delivery>) -> Result<()> {
    for delivery in batch.drain(..) {
        black_box(delivery.message().payload().len());
        delivery.ack().await?;
    }
    Ok(())
}
