//! What the server takes from outside at most: in bytes, in time and in number.

use std::time::Duration;

/// The bounds of a [`Server`](crate::Server). The defaults suit a daemon on one machine; every
/// bound holds from the first request on.
///
/// ```
/// use broker_http::{Limits, ServerOptions};
///
/// let mut limits = Limits::default();
/// limits.connections = 100;
/// let options = ServerOptions::new().with_limits(limits);
/// assert_eq!(options.limits().connections, 100);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections at a time; one more is answered 503 and closed.
    pub connections: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams_per_connection: u32,
    /// Headers of a request.
    pub headers: usize,
    /// Bytes of a request's line and headers together.
    pub header_bytes: usize,
    /// Bytes of a request's path and query.
    pub uri_bytes: usize,
    /// How long a connection may take to send the next request's headers, half as long again at most;
    /// so also how long an idle one is kept.
    pub header_timeout: Duration,
    /// How long a body may take to arrive, and how long a streamed one may stand still. Also how long
    /// an answer may wait for a reader that takes nothing of it, half as long again at most; then its
    /// connection is cut. A reader gets on by 16 KiB over HTTP/2, by what the kernel takes at a time
    /// over HTTP/1 (up to a third of the socket's buffer). A stream that has nothing to say waits for
    /// nobody.
    pub body_timeout: Duration,
    /// Bytes of a body that holds one message, beyond which no message can be meant: the broker's own
    /// limit of a message is checked besides.
    pub message_body_bytes: usize,
    /// Bytes of a body that holds a batch.
    pub batch_body_bytes: usize,
    /// Messages of a batch whose results are collected.
    pub batch_messages: usize,
    /// Bytes of the JSON of a subscription or a settlement.
    pub json_body_bytes: usize,
    /// Bytes of a refused body that are read and dropped, so that its sender sees the answer.
    pub refused_body_bytes: u64,
    /// Subscriptions.
    pub subscriptions: usize,
    /// Topics in use: those whose messages are held somewhere, and those lately published to.
    pub topics: usize,
    /// Bytes that messages published through this server and the bodies of its requests may hold,
    /// counted with what each message takes besides; at it publishers are refused, and whoever
    /// takes messages out goes on. Half of it is what deliveries of a broker elsewhere (RabbitMQ,
    /// Kafka) may take from there to their settlement: then a subscription takes one at a time. What
    /// others publish to `memory:` in this process is bounded by its groups' backlogs.
    pub memory_bytes: u64,
    /// Bytes that the messages of one topic may hold of that.
    pub topic_memory_bytes: u64,
    /// Leases held at a time.
    pub leases: usize,
    /// Streams (server-sent events) at a time.
    pub streams: usize,
    /// Bytes of answers kept for repeated idempotency keys, about 270 for one message's: each is kept
    /// for a day, or from 10 minutes on until a newer one needs its room. Where all are younger a new
    /// key is refused with 503.
    pub idempotency_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            streams_per_connection: 256,
            headers: 100,
            header_bytes: 64 << 10,
            uri_bytes: 8 << 10,
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(60),
            message_body_bytes: 2 << 20,
            batch_body_bytes: 32 << 20,
            batch_messages: 10_000,
            json_body_bytes: 1 << 20,
            refused_body_bytes: 64 << 20,
            subscriptions: 20_000,
            topics: 100_000,
            memory_bytes: 1 << 30,
            topic_memory_bytes: 512 << 20,
            leases: 100_000,
            streams: 1_000,
            idempotency_bytes: 64 << 20,
        }
    }
}
