#![doc = include_str!("../README.md")]

// What a message looks like over HTTP.
pub mod event;

// What a subscription looks like in JSON.
mod attributes;
mod null;
mod once;
mod spec;

// What the daemon and its library read.
#[doc(hidden)]
pub mod files;

// The interface, the engine behind it, and the way back.
pub mod client;
mod outgoing;
pub mod push;
mod retry_after;
mod server;
mod tls;
mod tokens;
mod traces;
pub mod webhook;

/// Ways to the decoders in here, and what must hold of what they decode: for `fuzz/`, which alone builds
/// with `--cfg fuzzing`.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use crate::client::fuzzing::daemon_answer;
    pub use crate::push::fuzzing::{consent_answer, push_answer};
    pub use crate::server::fuzzing::{body, connection, frame, pull, redrive, request_headers, settlements, state};
}

pub use attributes::AttributeFilter;
pub use push::PushTls;
pub use server::{
    Access, Action, Allow, CertificateName, Identity, Limits, Server, ServerOptions, Tls, TlsFiles, Token, TokenHash,
    TopicRule, Topics,
};
pub use spec::{Batch, Endpoint, Mode, Secret, Signing, StatusVerdict, SubscriptionSpec};
#[cfg(feature = "otlp")]
pub use traces::{OtlpOptions, Traces};
