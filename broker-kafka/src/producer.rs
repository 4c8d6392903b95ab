//! The publisher of one topic, as the contract has it.

use std::sync::Arc;

use broker_core::{Error, ErrorKind, Message, Operation, Producer, Publish, PublishBatch, Result};

use crate::publishing::{Publishing, closed};
use crate::topic_queue::TopicQueue;
use crate::{check_message, transaction};

/// The publisher of one topic.
#[derive(Debug)]
pub(crate) struct KafkaProducer {
    pub(crate) publishing: Arc<Publishing>,
    pub(crate) topic: Arc<TopicQueue>,
    pub(crate) max_message_bytes: usize,
}

impl KafkaProducer {
    fn start(&self, message: Message) -> Publish {
        match self.check(&message) {
            Ok(()) => self.publishing.publish(&self.topic, message),
            Err(error) => Operation::from(error),
        }
    }

    fn check(&self, message: &Message) -> Result<()> {
        check_message(message)?;
        // Of a batch that is atomic, the publisher must not take some and leave others.
        if message.size() > self.max_message_bytes {
            let (size, max) = (message.size(), self.max_message_bytes);
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("message {}: {size} bytes, of {max} at most", message.id()),
            ));
        }
        Ok(())
    }

    /// One transaction: all of them or none.
    fn publish_atomically(&self, messages: Vec<Message>) -> Vec<Publish> {
        let checks: Vec<Result<()>> = messages.iter().map(|message| self.check(message)).collect();
        let Some(first) = checks.iter().find_map(|check| check.as_ref().err().cloned()) else {
            let topic = &self.topic.topic;
            let messages = messages.into_iter().map(|message| (topic.clone(), message)).collect();
            return self.publishing.publish_together(messages, true);
        };
        let with_it = |check: Result<()>| check.err().unwrap_or_else(|| transaction::with_others(&first));
        checks.into_iter().map(|check| Operation::from(with_it(check))).collect()
    }
}

impl Producer for KafkaProducer {
    fn publish(&self, message: Message) -> Publish {
        self.start(message)
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        if self.publishing.is_closed() {
            return Operation::from(closed());
        }
        let publishes: Vec<Publish> = match self.publishing.config.transactional_id {
            Some(_) => self.publish_atomically(messages),
            None => messages.into_iter().map(|message| self.start(message)).collect(),
        };
        Operation::boxed(async move {
            let mut results = Vec::with_capacity(publishes.len());
            for publish in publishes {
                results.push(publish.await);
            }
            Ok(results)
        })
    }
}
