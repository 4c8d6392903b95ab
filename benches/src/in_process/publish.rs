//! What a publish costs by itself: publisher and subscriber in one task, no wake-ups.

use std::sync::Arc;
use std::time::Instant;

use broker_core::{Broker, BrokerExt, Message, Publisher, PublisherOptions, Subscription, Topic};
use bytes::Bytes;
use tokio::sync::Mutex;

use super::{BATCH, CAPACITY, Load, Run, ack, open, subscribe, topic};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

const LOAD: Load = Load { receivers: 1, payload: 64, messages: 300_000, capacity: CAPACITY };

/// A publish beside 100,000 other topics and subscriptions to one beside 10, the topic looked up by
/// its name each time: within 20 %.
pub(super) fn comparisons() -> Vec<Comparison> {
    let name = "in_process/publish/other_topics_100000";
    vec![Comparison::new(name, Unit::MessagesPerSecond, 1.0 / 1.2, async || {
        let many = Arc::new(Mutex::new(Loop::new(100_000).await?));
        let few = Arc::new(Mutex::new(Loop::new(10).await?));
        let side = |it: Arc<Mutex<Loop>>| {
            move || {
                let it = Arc::clone(&it);
                async move { Ok(it.lock().await.publish_by_name(LOAD).await?.rate()) }
            }
        };
        Ok(Pair::new(side(many), side(few)))
    })]
}

/// A broker with a subscription that the publisher itself takes messages off from, and with other
/// topics that have a subscription each.
#[derive(Debug)]
pub struct Loop {
    broker: Arc<dyn Broker>,
    topic: Topic,
    publisher: Publisher,
    subscription: Subscription,
    others: Vec<Subscription>,
}

impl Loop {
    /// With so many other topics.
    ///
    /// # Errors
    ///
    /// The broker's.
    pub async fn new(others: usize) -> Result<Self> {
        let (broker, topic) = (open()?, topic()?);
        let subscription = subscribe(&*broker, &topic, CAPACITY, None).await?;
        let publisher = broker.publisher(&topic, PublisherOptions::new())?;
        let mut it = Self { broker, topic, publisher, subscription, others: Vec::with_capacity(others) };
        for number in 0..others {
            let other = Topic::new(format!("bench.other.{number}"))?;
            it.others.push(subscribe(&*it.broker, &other, CAPACITY, None).await?);
        }
        Ok(it)
    }

    /// Publishes through the handle that has looked its topic up.
    ///
    /// # Errors
    ///
    /// The broker's, and a count that is not exact.
    pub async fn publish(&mut self, load: Load) -> Result<Run> {
        let publisher = self.publisher.clone();
        self.run(load, |message| publisher.publish(message)).await
    }

    /// Publishes by the topic's name.
    ///
    /// # Errors
    ///
    /// The broker's, and a count that is not exact.
    pub async fn publish_by_name(&mut self, load: Load) -> Result<Run> {
        let (broker, topic) = (Arc::clone(&self.broker), self.topic.clone());
        self.run(load, |message| broker.publish(&topic, message)).await
    }

    async fn run(&mut self, load: Load, publish: impl Fn(Message) -> broker_core::Publish) -> Result<Run> {
        let payload = load.payload();
        let mut batch = Vec::with_capacity(BATCH);
        let (mut published, mut received) = (0, 0);
        let began = Instant::now();
        while published < load.messages {
            let burst = (load.messages - published).min(BATCH as u64);
            for _ in 0..burst {
                publish(Message::new(Bytes::clone(&payload))).await?;
            }
            published += burst;
            while received < published {
                received += self.subscription.receive(&mut batch, BATCH).await? as u64;
                ack(&mut batch).await?;
            }
        }
        Run { received, elapsed: began.elapsed() }.checked(load.messages)
    }
}
