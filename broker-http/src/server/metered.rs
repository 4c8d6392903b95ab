//! What is held of a broker elsewhere: deliveries of RabbitMQ and Kafka that pushes, pullers and
//! streams have in hand, charged to the same books as what publishers bring.
//!
//! A message of `memory:` is charged when it is published, wherever it waits. One of a broker elsewhere
//! waits there, and is ours from its delivery to its settlement. All such deliveries together may take
//! half of the books, so that publishers are not kept out by what an endpoint has yet to answer; at
//! that bound a subscription takes the next message when it has settled all it has, and so everybody
//! goes on, one message at a time.
//!
//! What an adapter has fetched ahead and not handed over is bounded by the adapter: `max_in_flight`
//! messages a subscription for RabbitMQ, librdkafka's `queued.max.messages.kbytes` for Kafka.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, Consumer, DeadLetter, Deliveries, Delivery, DrainReport, Gap, Group, GroupOptions,
    Message, Publisher, PublisherOptions, Received, Result, Settle, Settlement, Status, Subscribe, Subscription, Topic,
    TopicFilter,
};
use parking_lot::Mutex;

use super::charge::cost;
use super::memory::Ledger;

/// What [`cost`] adds to the bytes of a message without headers.
const OVERHEAD: u64 = 256;

/// A broker whose deliveries are charged.
pub(crate) struct Metered {
    broker: Arc<dyn Broker>,
    ledger: Ledger,
}

impl Metered {
    /// The broker as it is, if what is published to it stays in this process and is charged already.
    pub(crate) fn over(broker: Arc<dyn Broker>, ledger: &Ledger) -> Arc<dyn Broker> {
        if broker.capabilities().durable { Arc::new(Self { broker, ledger: ledger.clone() }) } else { broker }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Broker for Metered {
    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let subscribing = self.broker.subscribe(filter, options);
        Box::pin(async move {
            let largest = self.broker.capabilities().max_message_bytes.max(1) as u64;
            let meter =
                Arc::new(Meter { ledger: self.ledger.clone(), held: AtomicUsize::new(0), waker: Mutex::default() });
            Ok(Subscription::new(Measured { subscription: subscribing.await?, meter, largest, taken: Vec::new() }))
        })
    }

    fn name(&self) -> &str {
        self.broker.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.broker.capabilities()
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        self.broker.connect()
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.broker.publisher(topic, options)
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        self.broker.create_group(group, options)
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        self.broker.alter_group(group, options)
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        self.broker.delete_group(group)
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.broker.purge_group(group)
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        self.broker.dead_letters(group, max)
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.broker.purge_dead_letters(group)
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        self.broker.redrive(group, max)
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        self.broker.status()
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        self.broker.close(deadline)
    }
}

impl fmt::Debug for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metered").field(&self.broker.name()).finish()
    }
}

/// What one subscription has in hand.
struct Meter {
    ledger: Ledger,
    held: AtomicUsize,
    /// Who waits for room; settling wakes it.
    waker: Mutex<Option<Waker>>,
}

struct Measured {
    subscription: Subscription,
    meter: Arc<Meter>,
    /// Bytes of the largest message the broker takes.
    largest: u64,
    taken: Vec<Delivery>,
}

impl Measured {
    /// How many messages may be taken: as many as there is room for if all were as large as can be.
    fn room(&self) -> usize {
        let bytes = self.meter.ledger.room_of_deliveries() / (self.largest + OVERHEAD);
        let least = usize::from(self.meter.held.load(Ordering::Acquire) == 0);
        usize::try_from(bytes).unwrap_or(usize::MAX).max(least)
    }
}

impl Consumer for Measured {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let mut room = self.room();
        if room == 0 {
            *self.meter.waker.lock() = Some(cx.waker().clone());
            // What was settled before it could wake us.
            room = self.room();
            if room == 0 {
                return Poll::Pending;
            }
        }
        let polled = self.subscription.poll_receive(cx, &mut self.taken, limit.min(room));
        for delivery in self.taken.drain(..) {
            batch.push(Delivery::new(Arc::new(InHand::new(delivery, &self.meter)), 0));
        }
        polled
    }

    fn gap(&mut self) -> Option<Gap> {
        self.subscription.gap()
    }

    fn stop_waiting(&mut self) {
        self.subscription.stop_waiting();
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.subscription.poll_close(cx)
    }
}

/// A delivery and its charge, which ends when nobody holds it any more.
struct InHand {
    received: Received,
    unsettled: Mutex<Option<Delivery>>,
    meter: Arc<Meter>,
    bytes: u64,
}

impl InHand {
    fn new(delivery: Delivery, meter: &Arc<Meter>) -> Self {
        let bytes = cost(delivery.message());
        meter.ledger.deliver(bytes);
        meter.held.fetch_add(1, Ordering::AcqRel);
        Self {
            received: delivery.received().clone(),
            unsettled: Mutex::new(Some(delivery)),
            meter: Arc::clone(meter),
            bytes,
        }
    }
}

impl Deliveries for InHand {
    fn message(&self, _: u32) -> &Message {
        self.received.message()
    }

    fn topic(&self, _: u32) -> &Topic {
        self.received.topic()
    }

    fn attempt(&self, _: u32) -> u32 {
        self.received.attempt()
    }

    fn settle(&self, _: u32, settlement: Settlement) -> Settle {
        let delivery = self.unsettled.lock().take();
        delivery.map_or_else(Settle::done, |delivery| delivery.settle(settlement))
    }

    fn abandon(&self, _: u32) {
        drop(self.unsettled.lock().take());
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.meter.ledger.settle(self.bytes);
        self.meter.held.fetch_sub(1, Ordering::AcqRel);
        let waker = self.meter.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use broker_core::{BrokerExt as _, GroupName, MemoryBroker, MemoryOptions};

    use super::*;

    const MESSAGES: usize = 200;
    const LARGEST: u64 = 1_000;
    /// Half of it, the deliveries' part, has room for four.
    const BOUND: u64 = 2 * 4 * (LARGEST + OVERHEAD);

    async fn subscribe(broker: &Metered, group: &str) -> Subscription {
        let options = Subscribe::group(GroupName::new(group).unwrap()).with_max_in_flight(MESSAGES).unwrap();
        broker.subscribe(&"a".parse().unwrap(), options).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_in_hand_is_bounded_and_everybody_goes_on() {
        let inner: Arc<dyn Broker> =
            Arc::new(MemoryBroker::with_options(MemoryOptions::new().with_max_message_bytes(LARGEST as usize)));
        let ledger = Ledger::new(BOUND, BOUND);
        let broker = Metered { broker: Arc::clone(&inner), ledger: ledger.clone() };
        let mut groups = [subscribe(&broker, "one").await, subscribe(&broker, "two").await];
        for _ in 0..MESSAGES {
            let message = Message::new(vec![0; LARGEST as usize]);
            inner.publish(&Topic::new("a").unwrap(), message).await.unwrap();
        }
        let mut cx = Context::from_waker(Waker::noop());
        let mut seen = [0, 0];
        let mut most = 0;
        while seen != [MESSAGES; 2] {
            for (group, seen) in groups.iter_mut().zip(&mut seen) {
                if *seen == MESSAGES {
                    continue;
                }
                let mut batch = Vec::new();
                // All it gets, over several polls.
                while group.poll_receive(&mut cx, &mut batch, MESSAGES).is_ready() {}
                assert!(!batch.is_empty(), "a group that holds nothing gets one");
                most = most.max(ledger.held());
                *seen += batch.len();
                for delivery in batch {
                    delivery.ack().await.unwrap();
                }
            }
        }
        assert_eq!(most, BOUND / 2, "the bound is used and not passed");
        assert_eq!(ledger.held(), 0);
    }

    #[tokio::test]
    async fn one_that_waits_for_room_is_woken_by_its_own_settlement() {
        let inner: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
        let ledger = Ledger::new(2, 2);
        let broker = Metered { broker: Arc::clone(&inner), ledger: ledger.clone() };
        let mut group = subscribe(&broker, "one").await;
        for _ in 0..3 {
            inner.publish(&Topic::new("a").unwrap(), Message::new("x")).await.unwrap();
        }
        let mut held = group.next().await.unwrap().unwrap();
        for _ in 0..2 {
            // Publishers are told first, and the deliveries' part is never theirs.
            assert_eq!(ledger.room().grow(1).unwrap_err().status(), 503);
            let waiting = tokio::spawn(async move { (group.next().await.unwrap().unwrap(), group) });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            held.ack().await.unwrap();
            (held, group) = waiting.await.unwrap();
        }
        drop(held);
        assert_eq!(ledger.held(), 0);
    }
}
