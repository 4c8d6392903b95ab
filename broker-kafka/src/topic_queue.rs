//! The publishes to one topic: straight to librdkafka, or in a queue while it cannot take them.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

use broker_core::{Error, Message, Topic};
use parking_lot::Mutex;

use crate::record::Travel;

/// The publishes to one topic.
#[derive(Debug)]
pub(crate) struct TopicQueue {
    pub(crate) topic: Topic,
    /// Whether publishes go straight to librdkafka: the topic is there and nobody waits.
    pub(crate) direct: AtomicBool,
    pub(crate) waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    pub(crate) state: Lookup,
    pub(crate) messages: VecDeque<Queued>,
    /// It was looked up again because librdkafka missed it, and nothing was taken since.
    pub(crate) sought: bool,
}

#[derive(Debug, Default)]
pub(crate) enum Lookup {
    #[default]
    Needed,
    Running,
    Done,
}

#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) ticket: usize,
    pub(crate) message: Message,
    pub(crate) travel: Option<Travel>,
}

pub(crate) enum Refused {
    /// Librdkafka's queue is full, or the client is being replaced.
    Later,
    /// Librdkafka has heard that there is no such topic.
    Missing(Error),
    Failed(Error),
}
