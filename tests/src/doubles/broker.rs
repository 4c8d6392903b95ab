//! A right broker with one defect around it.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, Consumer, DeadLetter, Deliveries, Delivery, DrainReport, Gap, Group, GroupOptions,
    Message, Producer, Publish, PublishBatch, Publisher, PublisherOptions, Received, Result, Settle, Settlement,
    Status, Subscribe, Subscription, Topic, TopicFilter,
};

use super::defect::{Defect, Slot};

/// A handle of a double.
pub(crate) struct Flawed {
    inner: Arc<dyn Broker>,
    defect: Arc<Defect>,
}

impl Flawed {
    pub(crate) fn new(inner: Arc<dyn Broker>, defect: Arc<Defect>) -> Self {
        if let Some(opening) = &defect.opening {
            opening();
        }
        Self { inner, defect }
    }

    /// The options with the settings the double makes of them.
    fn flawed(&self, options: &Subscribe) -> Subscribe {
        let mut settings = options.options().clone();
        if let Some(hook) = &self.defect.settings {
            hook(&mut settings);
        }
        options.clone().with_options(settings)
    }
}

impl fmt::Debug for Flawed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Flawed").field(&self.inner).finish()
    }
}

impl Broker for Flawed {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        let mut can = self.inner.capabilities();
        if let Some(hook) = &self.defect.capabilities {
            hook(&mut can);
        }
        can
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        self.inner.connect()
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        let publisher = match &self.defect.publisher {
            Some(hook) => hook(&*self.inner, topic, options)?,
            None => self.inner.publisher(topic, options)?,
        };
        if self.defect.publish.is_none() && self.defect.publish_batch.is_none() {
            return Ok(publisher);
        }
        let max = self.inner.capabilities().max_message_bytes;
        Publisher::new(topic.clone(), max, Arc::new(FlawedProducer { publisher, defect: Arc::clone(&self.defect) }))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let (filter, options) = (filter.clone(), self.flawed(&options));
        let group = options.group_name().map(|name| Group::new(name.clone(), filter.clone()));
        Box::pin(async move {
            let subscription = match &self.defect.subscribe {
                Some(hook) => hook(Arc::clone(&self.inner), filter, options).await?,
                None => self.inner.subscribe(&filter, options).await?,
            };
            Ok(Subscription::new(FlawedConsumer {
                inner: Some(subscription),
                broker: Arc::clone(&self.inner),
                group,
                defect: Arc::clone(&self.defect),
                held: None,
                batch: Vec::new(),
                surplus: VecDeque::new(),
            }))
        })
    }

    fn create_group(&self, group: &Group, mut options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        if let Some(hook) = &self.defect.settings {
            hook(&mut options);
        }
        match &self.defect.create_group {
            Some(hook) => hook(Arc::clone(&self.inner), group.clone(), options),
            None => self.inner.create_group(group, options),
        }
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        self.inner.alter_group(group, options)
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        self.inner.delete_group(group)
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.inner.purge_group(group)
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        self.inner.dead_letters(group, max)
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.inner.purge_dead_letters(group)
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        self.inner.redrive(group, max)
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        Box::pin(async move {
            let mut status = self.inner.status().await?;
            if let Some(hook) = &self.defect.status {
                hook(&mut status);
            }
            Ok(status)
        })
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        match &self.defect.close {
            Some(hook) => hook(Arc::clone(&self.inner), deadline),
            None => self.inner.close(deadline),
        }
    }
}

struct FlawedProducer {
    publisher: Publisher,
    defect: Arc<Defect>,
}

impl Producer for FlawedProducer {
    fn publish(&self, message: Message) -> Publish {
        match &self.defect.publish {
            Some(hook) => hook(&self.publisher, message),
            None => self.publisher.publish(message),
        }
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        match (&self.defect.publish_batch, &self.defect.publish) {
            (Some(hook), _) => hook(&self.publisher, messages),
            (None, None) => self.publisher.publish_batch(messages),
            (None, Some(hook)) => {
                let publishes: Vec<Publish> =
                    messages.into_iter().map(|message| hook(&self.publisher, message)).collect();
                PublishBatch::boxed(async { Ok(futures_util::future::join_all(publishes).await) })
            }
        }
    }
}

struct FlawedConsumer {
    /// `None` once it was left.
    inner: Option<Subscription>,
    broker: Arc<dyn Broker>,
    group: Option<Group>,
    defect: Arc<Defect>,
    held: Option<Pin<Box<tokio::time::Sleep>>>,
    batch: Vec<Delivery>,
    /// Copies beyond what was asked for, to be handed out next.
    surplus: VecDeque<Delivery>,
}

impl Consumer for FlawedConsumer {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        if let Some(held) = &mut self.held {
            ready!(held.as_mut().poll(cx));
            self.held = None;
        }
        if let Some(time) = self.defect.hold.as_ref().and_then(|hook| hook()) {
            let mut sleep = Box::pin(tokio::time::sleep(time));
            let waiting = sleep.as_mut().poll(cx).is_pending();
            self.held = Some(sleep);
            if waiting {
                return Poll::Pending;
            }
        }
        let Some(inner) = &mut self.inner else { return Poll::Ready(Ok(0)) };
        if self.surplus.is_empty() {
            ready!(inner.poll_receive(cx, &mut self.batch, limit))?;
            for delivery in self.batch.drain(..) {
                hand_out(&self.defect, delivery, &mut self.surplus);
            }
        }
        let count = limit.min(self.surplus.len());
        batch.extend(self.surplus.drain(..count));
        Poll::Ready(Ok(count))
    }

    fn gap(&mut self) -> Option<Gap> {
        let gap = self.inner.as_mut()?.gap();
        gap.filter(|_| self.defect.silent.as_ref().is_none_or(|hook| !hook()))
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        self.leave();
        Poll::Ready(Ok(()))
    }
}

impl FlawedConsumer {
    fn leave(&mut self) {
        if let (Some(inner), Some(hook)) = (self.inner.take(), &self.defect.leave) {
            hook(&self.defect.trail, Arc::clone(&self.broker), self.group.take(), inner);
        }
    }
}

impl Drop for FlawedConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The delivery as the double hands it out, as often as it does.
fn hand_out(defect: &Arc<Defect>, delivery: Delivery, out: &mut VecDeque<Delivery>) {
    let copies = defect.copies.as_ref().map_or(1, |hook| hook(&delivery));
    let received = delivery.received().clone();
    let message = defect.message.as_ref().map(|hook| hook(received.message()));
    let attempt = defect.attempt.as_ref().map_or(received.attempt(), |hook| hook(received.attempt()));
    let (place, slot) = defect.trail.add(delivery);
    for copy in 0..copies {
        // The copies beyond the first have nothing behind them to settle.
        let slot = if copy == 0 { Arc::clone(&slot) } else { Slot::default() };
        let one = Flawedly { received: received.clone(), message: message.clone(), attempt, place, slot };
        out.push_back(Delivery::new(Arc::new(FlawedDelivery { one, defect: Arc::clone(defect) }), 0));
    }
}

struct Flawedly {
    received: Received,
    message: Option<Message>,
    attempt: u32,
    place: usize,
    slot: Slot,
}

struct FlawedDelivery {
    one: Flawedly,
    defect: Arc<Defect>,
}

impl Deliveries for FlawedDelivery {
    fn message(&self, _: u32) -> &Message {
        self.one.message.as_ref().unwrap_or_else(|| self.one.received.message())
    }

    fn topic(&self, _: u32) -> &Topic {
        self.one.received.topic()
    }

    fn attempt(&self, _: u32) -> u32 {
        self.one.attempt
    }

    fn settle(&self, _: u32, settlement: Settlement) -> Settle {
        let delivery = self.one.slot.lock().take();
        match (delivery, &self.defect.settle) {
            (None, _) => Settle::done(),
            (Some(delivery), None) => delivery.settle(settlement),
            (Some(delivery), Some(hook)) => hook(&self.defect.trail, self.one.place, delivery, settlement),
        }
    }

    fn abandon(&self, _: u32) {
        let delivery = self.one.slot.lock().take();
        match (delivery, &self.defect.abandon) {
            (Some(delivery), Some(hook)) => hook(delivery),
            (delivery, _) => drop(delivery),
        }
    }
}
