//! What a message looks like over HTTP: the codec between a [`Message`] and the CloudEvents 1.0
//! HTTP binding (binary, structured and batched), the plain form with `broker-` headers, and
//! NDJSON lines.
//!
//! Every message the contract allows comes back as it was, with these two exceptions, which only
//! JSON ([`json`]) can carry and [`binary::fits`] tells apart: HTTP keeps no order among headers of
//! different names once one repeats, and a server takes only so much of headers.
//!
//! CloudEvents attributes other than `id`, `time`, `partitionkey` and `datacontenttype` are message
//! headers called `ce-NAME`. Names of message headers are case-sensitive: `Foo` and `foo` are two, in any of the forms,
//! and only the one in lower case can be an attribute (`ce-foo`). What CloudEvents cannot say travels beside it:
//!
//! | of the message | HTTP header | JSON attribute |
//! |---|---|---|
//! | key | `broker-key`, percent-encoded | `partitionkey`, or `brokerkey` (base64) where that cannot say it |
//! | headers | `broker-header-NAME`, percent-encoded | `brokerheaders`, form-urlencoded, in order |
//! | tombstone | `broker-tombstone: true` and no body | `brokertombstone`: true and no data |
//! | delivery time | `broker-delay` | `brokerdelay` |
//! | expiry | `broker-ttl` | `brokerttl` |
//! | deduplication key | `broker-dedup`, percent-encoded | `brokerdedup` |
//! | timestamp | `ce-time`, or `broker-time` | `time` |
//!
//! The timestamp is in milliseconds. An event's `time` that was written in another way than we write it (with
//! microseconds, with none, with an offset) is a message header `ce-time` as well, from which it is written again as it came.
//!
//! A delay and a time to live are durations (`10s`) or points in time (RFC 3339); we write points
//! in time, which lose nothing on the way.

mod attributes;
pub mod binary;
mod draft;
mod format;
pub mod json;
pub mod ndjson;
mod options;
pub(crate) mod percent;
pub(crate) mod trace;

pub(crate) use attributes::value as attribute_value;

#[cfg(test)]
pub(crate) mod arbitrary;
#[cfg(test)]
mod tests;

use broker_core::{Message, Topic};

pub use format::Format;
pub(crate) use format::is_event;
pub use options::Options;

/// The media type of one structured CloudEvent.
pub const EVENT_TYPE: &str = "application/cloudevents+json";
/// The media type of a batch of CloudEvents.
pub const BATCH_TYPE: &str = "application/cloudevents-batch+json";
/// The media type of one message a line.
pub const LINES_TYPE: &str = "application/x-ndjson";

/// A message to encode, and what is said about its delivery.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// The topic it was, or is to be, published to.
    pub topic: &'a Topic,
    /// The message.
    pub message: &'a Message,
    /// The subscription it is delivered to.
    pub subscription: Option<&'a str>,
    /// The attempt, from 1.
    pub attempt: Option<u32>,
}

impl<'a> Envelope<'a> {
    /// A message on its way to the broker: nothing is said about a delivery.
    pub fn new(topic: &'a Topic, message: &'a Message) -> Self {
        Self { topic, message, subscription: None, attempt: None }
    }
}

/// A message that was decoded, and what was said about its delivery.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The message.
    pub message: Message,
    /// The topic it was delivered on.
    pub topic: Option<Topic>,
    /// The subscription it was delivered to.
    pub subscription: Option<String>,
    /// The attempt, from 1.
    pub attempt: Option<u32>,
    /// Whether an operator pushed it, to see whether it arrives.
    pub test: bool,
}
