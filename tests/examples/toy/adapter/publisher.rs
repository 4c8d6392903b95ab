//! Publishing: refused, or done at once.

use std::sync::Arc;

use broker_core::{
    Error, Message, Operation, Producer, Publish, PublishBatch, PublisherOptions, Receipt, Result, Topic,
};
use parking_lot::Mutex;

use super::queues::Queues;

pub(super) struct ToyProducer {
    pub(super) queues: Arc<Mutex<Queues>>,
    pub(super) topic: Topic,
    pub(super) options: PublisherOptions,
}

/// What `Capabilities` does not declare is refused here, and never silently ignored.
fn check(message: &Message) -> Result<()> {
    let what = if message.deliver_at().is_some() {
        "a delivery time"
    } else if message.expires_at().is_some() {
        "an expiry"
    } else if message.dedup_key().is_some() {
        "a deduplication key"
    } else {
        return Ok(());
    };
    Err(Error::unsupported(format!("message {} has {what}, which this broker cannot keep", message.id())))
}

impl ToyProducer {
    fn publish_now(&self, message: &Message) -> Result<Receipt> {
        check(message)?;
        let mut queues = self.queues.lock();
        queues.check_open()?;
        if self.options.require_route && !queues.queues.values().any(|queue| queue.filter.matches(&self.topic)) {
            return Err(Error::unroutable(format!("nobody subscribed to {}", self.topic)));
        }
        let matched = queues.append(&self.topic, message);
        Ok(Receipt::new(message.id().clone()).with_matched(matched))
    }
}

impl Producer for ToyProducer {
    fn publish(&self, message: Message) -> Publish {
        Operation::ready(self.publish_now(&message))
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        Operation::ready(Ok(messages.iter().map(|message| self.publish_now(message)).collect()))
    }
}
