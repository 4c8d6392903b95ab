//! The client behind a subscription: how it is made, and what it calls back for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use broker_core::Result;
use crossbeam_channel::Sender;
use parking_lot::Mutex;
use rdkafka::TopicPartitionList;
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::RDKafkaRespErr;

use crate::admin::{Admin, Partition};
use crate::client::{self, Role, millis};
use crate::health::Health;

/// The group of consumers without one: named because librdkafka wants a name, never joined, never
/// committed to.
pub(crate) const NO_GROUP: &str = "broker-no-group";

pub(crate) type Client = BaseConsumer<Callbacks>;

/// What a subscription reads from.
pub(crate) enum Source {
    /// What the group's coordinator assigns.
    Group(String),
    /// These partitions, from these offsets, and new ones from their beginning.
    Alone(Vec<(Partition, i64)>),
}

/// Makes the client of the group's member `number` in this broker value; `rouse` is sent to when it has something to say.
pub(crate) fn make(admin: &Admin, source: &Source, number: usize, rouse: &Sender<()>) -> Result<Client> {
    let group_id = match source {
        Source::Group(id) => id.as_str(),
        Source::Alone(_) => NO_GROUP,
    };
    let mut settings = client::settings(
        admin.config(),
        &[
            ("group.id", group_id),
            ("enable.auto.commit", "false"),
            ("enable.auto.offset.store", "false"),
            // What retention has taken is gone; what is left is read.
            ("auto.offset.reset", "earliest"),
            ("allow.auto.create.topics", "false"),
            ("partition.assignment.strategy", "cooperative-sticky"),
            // The default, a second, is a stall whenever the prefetch queue was full.
            ("fetch.queue.backoff.ms", "10"),
            ("fetch.wait.max.ms", "100"),
            // How soon members hear that another has come or gone.
            ("heartbeat.interval.ms", "500"),
            // Heartbeats come from a thread of librdkafka's own, whatever handlers do: a member that is
            // silent for so long is dead, and its messages go to the others.
            ("session.timeout.ms", "10000"),
            ("topic.metadata.refresh.fast.interval.ms", "250"),
        ],
    );
    settings.set("topic.metadata.refresh.interval.ms", millis(admin.config().metadata_refresh));
    if let (Source::Group(_), Some(id)) = (source, &admin.config().instance_id) {
        // Each member of a group has one of its own.
        settings.set("group.instance.id", if number == 0 { id.clone() } else { format!("{id}.{number}") });
    }
    client::hand_on(&mut settings, admin.config(), Role::Consumer);
    let callbacks =
        Callbacks { health: Arc::clone(admin.health()), rebalances: Mutex::default(), closing: AtomicBool::new(false) };
    let consumer = Client::from_config_and_context(&settings, callbacks);
    let mut consumer = consumer.map_err(|error| client::not_made(&error))?;
    let rouse = rouse.clone();
    consumer.set_nonempty_callback(move || {
        // Full means that it is roused already.
        let _ = rouse.try_send(());
    });
    Ok(consumer)
}

/// What librdkafka calls back for, on the polling thread.
pub(crate) struct Callbacks {
    health: Arc<Health>,
    /// Rebalances that wait for the thread to act.
    pub(crate) rebalances: Mutex<Vec<(RDKafkaRespErr, TopicPartitionList)>>,
    /// The thread has done its part: what is assigned or revoked now is answered at once.
    pub(crate) closing: AtomicBool,
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.health.told(&error, reason);
    }
}

impl ConsumerContext for Callbacks {
    fn rebalance(&self, consumer: &Client, what: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        if self.closing.load(Ordering::Acquire) {
            // Each is answered by its like: to be rid of what was never taken is `_INVALID_ARG` to librdkafka, which then
            // goes on waiting for its answer.
            let _ = match what {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => assign(consumer, partitions),
                _ => unassign(consumer, partitions),
            };
        } else {
            self.rebalances.lock().push((what, partitions.clone()));
        }
    }
}

pub(crate) fn assign(consumer: &Client, partitions: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Eager => consumer.assign(partitions),
        _ => consumer.incremental_assign(partitions),
    }
}

pub(crate) fn unassign(consumer: &Client, partitions: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Eager => consumer.unassign(),
        _ => consumer.incremental_unassign(partitions),
    }
}
