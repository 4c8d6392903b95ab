#![doc = include_str!("../README.md")]

// What a URL means, what is refused, how things are called.
mod capabilities;
mod cause;
mod config;
mod error;
mod pattern;
mod refusal;

// The contract.
mod broker;
mod registry;

// Talking to the server.
mod admin;
mod client;
mod dead;
mod group;
mod health;
mod record;
mod retry_topics;
mod wire;

// Publishing.
mod callbacks;
mod process;
mod producer;
mod publishing;
mod tickets;
mod topic_queue;
mod transaction;

// Receiving: the state machines, then what drives them.
mod lot;
mod progress;
mod ready;
mod state;
mod stored;
mod tracker;

mod batch;
mod committer;
mod consumer;
mod delivery;
mod member;
mod metadata;
mod poller;

pub use broker::{KafkaBroker, connector};
pub use callbacks::Callbacks;
pub use capabilities::capabilities;
pub use config::{Compression, Credentials, KafkaConfig, Sasl, Security, Settings};
pub use error::error_kind;
pub use pattern::topic_pattern;
pub use publishing::RawProducer;
pub use record::Format;
pub use refusal::{check_collision, check_message, check_options};
pub use transaction::Transaction;

/// The client underneath, in the version this crate uses.
pub use rdkafka;
