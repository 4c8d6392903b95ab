#![doc = include_str!("../README.md")]

mod broker;
mod config;

// Publishing.
mod returns;
mod writer;

// Consuming.
mod acks;
mod balance;
mod consumer;
mod lanes;
mod member;

// What stands on the server.
mod dead_letters;
mod groups;
mod ladder;
mod management;
mod naming;
mod settings;
mod topology;

// The wire and the connection.
mod advice;
mod cancels;
mod channel;
mod error;
mod foreign;
mod intake;
mod link;
mod reactor;
mod sieve;
mod wire;

/// Ways to the decoders in here: for `fuzz/`, which alone builds with `--cfg fuzzing`.
#[cfg(fuzzing)]
pub mod fuzzing;

use std::sync::Arc;

use broker_core::{Broker, BrokerUrl, Connector};

pub use broker::AmqpBroker;
pub use config::{AmqpOptions, QueueType};
/// The client underneath, of the version this crate uses.
pub use lapin;

/// Opens `amqp:` and `amqps:` URLs.
///
/// ```
/// use broker_core::Connectors;
///
/// let mut connectors = Connectors::new();
/// connectors.add(["amqp", "amqps"], broker_amqp::connector());
/// assert_eq!(connectors.open("amqp://user:secret@localhost/orders")?.name(), "amqp://localhost/orders");
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn connector() -> impl Connector {
    |url: BrokerUrl| {
        let broker: Arc<dyn Broker> = Arc::new(AmqpBroker::new(AmqpOptions::from_url(url)?));
        Ok(broker)
    }
}
