//! Other people's RabbitMQ adapters beside ours, on one server: a classic queue, transient messages of 100 bytes,
//! a confirm for each publish and an ack for each delivery.

use broker_benches::amqp::{Kind, Load, PeerQueue, consume_versus, publish_versus};
use broker_benches::comparison::Comparison;

mod mq_bridge;
mod ruststream;

const LOAD: Load = Load { kind: Kind::Classic, payload: 100 };

/// Publishes unconfirmed at most.
const WINDOW: usize = 64;

/// Ours to each, for the reader.
pub(crate) fn comparisons() -> Vec<Comparison> {
    let name = |what: &str| format!("peers/amqp/{what}");
    let own = PeerQueue::Plain(mq_bridge::QUEUE);
    vec![
        publish_versus(name("ruststream_publish_64"), LOAD, WINDOW, 0.0, ruststream::open, ruststream::publish),
        consume_versus(name("ruststream_consume"), LOAD, PeerQueue::Ours, ruststream::consume),
        publish_versus(name("mq_bridge_publish_64"), LOAD, WINDOW, 0.0, mq_bridge::open, mq_bridge::publish),
        publish_versus(name("mq_bridge_batch_64"), LOAD, WINDOW, 0.0, mq_bridge::open, mq_bridge::publish_batches),
        consume_versus(name("mq_bridge_consume"), LOAD, own, mq_bridge::consume),
    ]
}
