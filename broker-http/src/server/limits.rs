//! What the server takes from outside at most: in bytes, in time and in number.

use std::ops::RangeInclusive;
use std::time::Duration;

use broker_core::{Error, Result, format_duration};

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
///
/// Each has a range that it must be in, which [`check`](Self::check) tells. A server brings what is out of it
/// to the nearest value within, and logs that it did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections at a time. For one more another gives way that is at no request, idle or with nothing but a begun
    /// head or handshake, the one that has been so longest: of the address (of IPv6, the /64) that holds most, if
    /// that holds two more than the newcomer's at least. A request is never cut for it, nor a WebSocket, which counts
    /// until it ends. Where nobody gives way, one
    /// more is answered 503 and closed, with TLS without a word: a handshake would cost what the bound is to save.
    pub connections: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams_per_connection: u32,
    /// Headers of a request.
    pub headers: usize,
    /// Bytes of a request's line and headers together. Those of all requests at work on one HTTP/2 connection have
    /// 16 times as many; one more is answered 503.
    pub header_bytes: usize,
    /// Bytes of a request's path and query.
    pub uri_bytes: usize,
    /// How long a connection may take to send the next request's headers, half as long again at most;
    /// so also how long an idle one is kept.
    pub header_timeout: Duration,
    /// How long a body may take to arrive; one of streamed lines takes as long as it likes, and each line so long,
    /// from when it is waited for to its end. Also how long
    /// an answer may wait for a reader that takes nothing of it, twice as long at most over HTTP/2 and half as long again
    /// over HTTP/1; then its connection is cut, whatever becomes of others on it. A reader gets on by 16 KiB over
    /// HTTP/2, by what the kernel takes at a time over HTTP/1 (up to a third of the socket's buffer). A stream that has nothing to say waits for
    /// nobody.
    pub body_timeout: Duration,
    /// Bytes a second that whoever takes a whole answer with messages in it (a pull, a list) is thought to take at
    /// least: it has `body_timeout` for it and the time that its bytes have at that rate, half of `body_timeout` longer
    /// at most; then its connection is cut. All answers that a connection is owed count together. A stream may be read
    /// as slowly as one likes.
    pub answer_bytes_per_second: u64,
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
    /// Subscriptions. One identity makes no further one while it owns as many as are free; those it made or changed last are
    /// its own.
    pub subscriptions: usize,
    /// Topics in use: those whose messages are held somewhere, and those lately published to.
    /// At it those are forgotten that hold nothing, or nothing but what is only retained. One identity is given no further
    /// one while as many that it published to first hold messages as are free.
    pub topics: usize,
    /// Bytes that messages published through this server and the bodies of its requests may hold,
    /// counted with what each message takes besides; at it what the topics of `memory:` only retain
    /// is forgotten, then publishers are refused, and whoever takes messages out goes on. An eighth of it each is what
    /// may be encoded for readers (results of several publishes among it) and for endpoints before the next waits, where
    /// none of them is given more while it holds as much as is free; what the bodies of one identity may hold that are
    /// under way; and what begun heads of more than 8 KiB may hold over HTTP/1, of which then the first ends. Half of it
    /// is what deliveries of a broker elsewhere (RabbitMQ, Kafka) may take from there to their settlement: then a
    /// subscription takes one at a time. What others publish to `memory:` in this process is bounded by its groups'
    /// backlogs.
    pub memory_bytes: u64,
    /// Bytes that the messages of one topic may hold of that.
    pub topic_memory_bytes: u64,
    /// Leases held at a time. One identity is given no further one while it has as many as are free.
    pub leases: usize,
    /// Streams (server-sent events and WebSocket) at a time. One identity is given no further one while it has as many
    /// as are free.
    pub streams: usize,
    /// Bytes of answers kept for repeated idempotency keys, about 310 for one message's: each is kept
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
            answer_bytes_per_second: 8 << 10,
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

/// A limit: where it stands, and what it may be.
struct Bound<'a> {
    name: &'static str,
    value: Value<'a>,
    range: RangeInclusive<u64>,
}

enum Value<'a> {
    Count(&'a mut usize),
    Streams(&'a mut u32),
    Bytes(&'a mut u64),
    /// In milliseconds, rounded up.
    Time(&'a mut Duration),
}

impl Value<'_> {
    fn get(&self) -> u64 {
        match self {
            Self::Count(value) => u64::try_from(**value).unwrap_or(u64::MAX),
            Self::Streams(value) => u64::from(**value),
            Self::Bytes(value) => **value,
            Self::Time(value) => u64::try_from(value.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX),
        }
    }

    fn set(&mut self, new: u64) {
        match self {
            Self::Count(value) => **value = usize::try_from(new).unwrap_or(usize::MAX),
            Self::Streams(value) => **value = u32::try_from(new).unwrap_or(u32::MAX),
            Self::Bytes(value) => **value = new,
            Self::Time(value) => **value = Duration::from_millis(new),
        }
    }

    fn show(&self, number: u64) -> String {
        match self {
            Self::Time(_) => format_duration(Duration::from_millis(number)),
            _ => number.to_string(),
        }
    }
}

impl Limits {
    /// Whether every limit is in its range.
    ///
    /// ```
    /// use broker_http::Limits;
    ///
    /// let mut limits = Limits::default();
    /// assert!(limits.check().is_ok());
    /// limits.headers = 0;
    /// assert_eq!(limits.check().unwrap_err().message(), "limits.headers 0: it is from 1 to 10000");
    /// ```
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the first that is not, and its range.
    pub fn check(&self) -> Result<()> {
        for Bound { name, value, range } in self.clone().bounds() {
            let number = value.get();
            if !range.contains(&number) {
                let (least, most) = (value.show(*range.start()), value.show(*range.end()));
                let number = value.show(number);
                return Err(Error::invalid(format!("limits.{name} {number}: it is from {least} to {most}")));
            }
        }
        Ok(())
    }

    /// With what is out of its range brought to the nearest that is within.
    pub(crate) fn within(&self) -> Self {
        let mut limits = self.clone();
        if let Err(error) = self.check() {
            tracing::warn!(%error, "a limit is out of its range: the nearest value within holds");
            for Bound { mut value, range, .. } in limits.bounds() {
                let number = value.get();
                if !range.contains(&number) {
                    value.set(number.clamp(*range.start(), *range.end()));
                }
            }
        }
        limits
    }

    fn bounds(&mut self) -> Vec<Bound<'_>> {
        use Value::{Bytes, Count, Streams, Time};
        /// In milliseconds, a month: nobody means to wait longer, and clocks can add it.
        const MONTH: u64 = 30 * 24 * 3600 * 1000;
        const MANY: u64 = 10_000_000;
        const MEMORY: u64 = 1 << 48;
        // So that a new one is not forgotten here.
        let Self {
            connections,
            streams_per_connection,
            headers,
            header_bytes,
            uri_bytes,
            header_timeout,
            body_timeout,
            answer_bytes_per_second,
            message_body_bytes,
            batch_body_bytes,
            batch_messages,
            json_body_bytes,
            refused_body_bytes,
            subscriptions,
            topics,
            memory_bytes,
            topic_memory_bytes,
            leases,
            streams,
            idempotency_bytes,
        } = self;
        let all = [
            ("connections", Count(connections), 1..=MANY),
            ("streams_per_connection", Streams(streams_per_connection), 1..=65_536),
            // Room for so many is made for each request.
            ("headers", Count(headers), 1..=10_000),
            // The parser of HTTP/1.1 takes no less; each connection may hold the most.
            ("header_bytes", Count(header_bytes), 8 << 10..=16 << 20),
            ("uri_bytes", Count(uri_bytes), 1..=65_534),
            ("header_timeout", Time(header_timeout), 1..=MONTH),
            ("body_timeout", Time(body_timeout), 1..=MONTH),
            ("answer_bytes_per_second", Bytes(answer_bytes_per_second), 1..=1 << 30),
            ("message_body_bytes", Count(message_body_bytes), 1..=1 << 30),
            ("batch_body_bytes", Count(batch_body_bytes), 1..=1 << 30),
            ("batch_messages", Count(batch_messages), 1..=MANY),
            ("json_body_bytes", Count(json_body_bytes), 1..=1 << 30),
            ("refused_body_bytes", Bytes(refused_body_bytes), 1..=1 << 30),
            ("subscriptions", Count(subscriptions), 1..=MANY),
            ("topics", Count(topics), 1..=MANY),
            ("memory_bytes", Bytes(memory_bytes), 1..=MEMORY),
            ("topic_memory_bytes", Bytes(topic_memory_bytes), 1..=MEMORY),
            ("leases", Count(leases), 1..=MANY),
            ("streams", Count(streams), 1..=MANY),
            ("idempotency_bytes", Count(idempotency_bytes), 1..=1 << 30),
        ];
        all.into_iter().map(|(name, value, range)| Bound { name, value, range }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_range_and_is_brought_into_it() {
        Limits::default().check().expect("the defaults are within");
        let names: Vec<(&str, RangeInclusive<u64>)> =
            Limits::default().bounds().into_iter().map(|bound| (bound.name, bound.range)).collect();
        assert!(names.iter().all(|(_, range)| *range.start() > 0), "0 would refuse everything");
        for (index, (name, range)) in names.iter().enumerate() {
            for (absurd, nearest) in [(0, *range.start()), (u64::MAX, *range.end())] {
                let mut limits = Limits::default();
                limits.bounds().into_iter().nth(index).expect("it is there").value.set(absurd);
                let error = limits.check().expect_err(name);
                assert!(error.message().contains(name), "{error}");
                let mut within = limits.within();
                assert_eq!(within.bounds().into_iter().nth(index).expect("it is there").value.get(), nearest, "{name}");
                within.check().expect("all are within");
            }
        }
        let limits = Limits { body_timeout: Duration::MAX, ..Limits::default() };
        assert_eq!(limits.within().body_timeout, Duration::from_secs(30 * 24 * 3600));
    }
}
