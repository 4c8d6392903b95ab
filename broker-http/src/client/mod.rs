//! The client: the same contract for a Rust service that talks to a `broker-http` daemon.
//!
//! Add [`connector`] to [`Connectors`](broker_core::Connectors) under `http` and `https`, or make an
//! [`HttpBroker`] from [`HttpOptions`].

mod able;
mod backoff;
mod broker;
mod config;
mod connection;
mod error;
mod groups;
mod http;
mod keeping;
mod lane;
mod link;
mod publisher;
mod pulling;
mod shared;
mod wire;

#[cfg(fuzzing)]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;

pub use broker::{HttpBroker, connector};
pub use config::HttpOptions;

// Traces are sent as requests to the daemon are.
#[cfg(feature = "otlp")]
pub(crate) use http::{Call, Http};
