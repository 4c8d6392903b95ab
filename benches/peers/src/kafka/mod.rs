//! Other people's Kafka adapters beside ours, on one server and a topic of one partition: records of 100 bytes, acks
//! from all replicas and idempotent producers on every side, without compression, and our fetch settings.

use broker_benches::comparison::Comparison;
use broker_benches::kafka::{consume_versus, publish_versus};

mod mq_bridge;
mod ruststream;
mod sea_streamer;

/// Bytes of a payload.
const SIZE: usize = 100;

/// What ours sets for producers, too.
const PRODUCING: [(&str, &str); 3] = [("enable.idempotence", "true"), ("acks", "all"), ("compression.type", "none")];

/// What ours sets for consumers, too: librdkafka's defaults stall for a second whenever its queue was full.
const FETCHING: [(&str, &str); 2] = [("fetch.queue.backoff.ms", "10"), ("fetch.wait.max.ms", "100")];

/// Ours to each, for the reader.
pub(crate) fn comparisons() -> Vec<Comparison> {
    let name = |what: &str| format!("peers/kafka/{what}");
    vec![
        publish_versus(name("ruststream_publish"), SIZE, ruststream::open, ruststream::publish),
        publish_versus(name("mq_bridge_publish"), SIZE, mq_bridge::open, mq_bridge::publish),
        publish_versus(name("sea_streamer_publish"), SIZE, sea_streamer::open, sea_streamer::publish),
        consume_versus(name("ruststream_consume"), SIZE, ruststream::consume),
        consume_versus(name("mq_bridge_consume"), SIZE, mq_bridge::consume),
        consume_versus(name("sea_streamer_consume"), SIZE, sea_streamer::consume),
    ]
}
