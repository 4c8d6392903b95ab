//! One trace from publish to push, by OpenTelemetry.
//!
//! A publish is a *producer* span, a child of the request's `traceparent`; the message carries its
//! context on, over any broker, in the header `traceparent`. A push is a *consumer* span, its child,
//! which ends with the verdict, and within it the *client* span of the request, whose context the
//! endpoint gets. Pullers and streams get the publish's context with the message. Names follow the
//! semantic conventions of messaging and HTTP; no payload, key, header, path or query is ever told.
//!
//! Of several messages sent at once, each that brings no context gets the one span's, and those that
//! bring one are its links; so are the messages of a batch to the push of it.
//!
//! Built without the feature `otlp`, all of it is nothing.

#[cfg(feature = "otlp")]
mod exporter;
#[cfg(not(feature = "otlp"))]
mod none;
#[cfg(feature = "otlp")]
mod spans;

#[cfg(feature = "otlp")]
pub use exporter::OtlpOptions;
#[cfg(not(feature = "otlp"))]
pub(crate) use none::{Parent, Processing, Traces};
#[cfg(feature = "otlp")]
pub use spans::Traces;
#[cfg(feature = "otlp")]
pub(crate) use spans::{Parent, Processing};
