//! Other people's brokers and channels beside ours. In one process: one publisher, a copy for every subscriber, the
//! same payload. With a feature each, other people's adapters of RabbitMQ
//! and Kafka. `cargo run --release --bin ratios -- peers` in the project's own workspace builds
//! and runs this one.

#[cfg(feature = "amqp")]
mod amqp;
mod channels;
#[cfg(feature = "kafka")]
mod kafka;
mod mq_bridge;
mod ruststream;

use broker_benches::comparison::Comparison;
use broker_benches::in_process::{CAPACITY, Load, fan_out, versus};

/// Few enough messages that mq-bridge, which keeps 100,000 and drops what is older, loses none.
const LOADS: [Load; 2] = [
    Load { receivers: 10, payload: 64, messages: 40_000, capacity: CAPACITY },
    Load { receivers: 100, payload: 64, messages: 10_000, capacity: CAPACITY },
];

/// What mq-bridge's log holds; RustStream's queues have no bound. Ours has the same room beside them.
const LOG: usize = 100_000;

/// Ours to each peer.
pub fn comparisons() -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for load in LOADS {
        let name = |peer: &str| format!("peers/{peer}_{}", load.receivers);
        let roomy = Load { capacity: LOG, ..load };
        comparisons.push(versus(name("ruststream"), 5.0, roomy, fan_out::ours, ruststream::run));
        comparisons.push(versus(name("mq_bridge"), 1.5, roomy, fan_out::ours, mq_bridge::run));
        comparisons.push(versus(name("flume"), 1.0, load, fan_out::ours, channels::flume));
        comparisons.push(versus(name("async_broadcast"), 1.0, load, fan_out::ours, channels::async_broadcast));
    }
    #[cfg(feature = "amqp")]
    comparisons.extend(amqp::comparisons());
    #[cfg(feature = "kafka")]
    comparisons.extend(kafka::comparisons());
    comparisons
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_that_the_list_promises() {
        let mut ours: Vec<_> = comparisons().iter().map(|it| (it.name().to_owned(), it.bars().usual.ratio)).collect();
        let is_built = |name: &str| {
            let needs = |group: &str| name.starts_with(group);
            (cfg!(feature = "amqp") || !needs("peers/amqp/")) && (cfg!(feature = "kafka") || !needs("peers/kafka/"))
        };
        let listed = broker_benches::peers::NAMES.iter().filter(|(name, _)| is_built(name));
        let mut listed: Vec<_> = listed.map(|(name, bar)| ((*name).to_owned(), *bar)).collect();
        ours.sort_by(|one, other| one.0.cmp(&other.0));
        listed.sort_by(|one, other| one.0.cmp(&other.0));
        assert_eq!(ours, listed);
    }

    const SMALL: Load = Load { receivers: 3, payload: 64, messages: 2_000, capacity: CAPACITY };

    #[tokio::test(flavor = "multi_thread")]
    async fn every_peer_delivers_everything_to_everybody() {
        for run in [
            ruststream::run(SMALL).await,
            mq_bridge::run(SMALL).await,
            channels::flume(SMALL).await,
            channels::async_broadcast(SMALL).await,
        ] {
            assert_eq!(run.map(|run| run.received).map_err(|error| error.to_string()), Ok(6_000));
        }
    }
}
