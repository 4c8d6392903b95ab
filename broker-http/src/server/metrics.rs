//! What is counted, as Prometheus reads it (text format 0.0.4).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_core::{GroupStatus, Status};
use http::StatusCode;

use crate::push::{PushState, PushStatus};

/// Groups that have lines of their own; labels must be bounded.
const MAX_GROUPS: usize = 1_000;

/// Upper bounds of the latency buckets in microseconds: loopback lives below a millisecond.
const BUCKETS: [u64; 17] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000,
];

/// Why something was refused: a label, so that the list is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Unauthenticated,
    Forbidden,
    Attempts,
    Rate,
    TooLarge,
    BodyTimeout,
    HeadTimeout,
    AnswerTimeout,
    UriTooLong,
    HeadTooLarge,
    Heads,
    Malformed,
    Flood,
    Tls,
    Connections,
    GaveWay,
    Descriptors,
    ConnectionStreams,
    ConnectionHeaders,
    Streams,
    Subscriptions,
    Topics,
    Leases,
    Memory,
    TopicMemory,
    Bodies,
    Idempotency,
    Draining,
    TooMany,
    Unavailable,
}

impl Refusal {
    const ALL: [(Self, &'static str); 30] = [
        (Self::Unauthenticated, "unauthenticated"),
        (Self::Forbidden, "forbidden"),
        (Self::Attempts, "attempts"),
        (Self::Rate, "rate"),
        (Self::TooLarge, "too_large"),
        (Self::BodyTimeout, "body_timeout"),
        (Self::HeadTimeout, "head_timeout"),
        (Self::AnswerTimeout, "answer_timeout"),
        (Self::UriTooLong, "uri_too_long"),
        (Self::HeadTooLarge, "head_too_large"),
        (Self::Heads, "heads"),
        (Self::Malformed, "malformed"),
        (Self::Flood, "flood"),
        (Self::Tls, "tls"),
        (Self::Connections, "connections"),
        (Self::GaveWay, "gave_way"),
        (Self::Descriptors, "descriptors"),
        (Self::ConnectionStreams, "connection_streams"),
        (Self::ConnectionHeaders, "connection_headers"),
        (Self::Streams, "streams"),
        (Self::Subscriptions, "subscriptions"),
        (Self::Topics, "topics"),
        (Self::Leases, "leases"),
        (Self::Memory, "memory"),
        (Self::TopicMemory, "topic_memory"),
        (Self::Bodies, "bodies"),
        (Self::Idempotency, "idempotency"),
        (Self::Draining, "draining"),
        (Self::TooMany, "too_many"),
        (Self::Unavailable, "unavailable"),
    ];

    /// What a status says, where nothing more is known.
    pub(crate) fn of(status: StatusCode) -> Option<Self> {
        Some(match status.as_u16() {
            401 => Self::Unauthenticated,
            403 => Self::Forbidden,
            408 => Self::BodyTimeout,
            413 => Self::TooLarge,
            414 => Self::UriTooLong,
            429 => Self::TooMany,
            503 => Self::Unavailable,
            _ => return None,
        })
    }
}

/// The server's counters; adding to one is an atomic addition.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    publish: Histogram,
    publish_ok: AtomicU64,
    publish_refused: AtomicU64,
    publish_failed: AtomicU64,
    accepted: AtomicU64,
    pulled: AtomicU64,
    streamed: AtomicU64,
    connections: AtomicU64,
    connections_refused: AtomicU64,
    push: Histogram,
    deliver: Histogram,
    push_ok: AtomicU64,
    push_failed: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
}

/// What is read elsewhere when the metrics are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gauges {
    pub(crate) connections: usize,
    pub(crate) subscriptions: usize,
    pub(crate) leases: usize,
    pub(crate) streams: usize,
    pub(crate) topics: usize,
    pub(crate) memory: usize,
    pub(crate) memory_limit: usize,
}

impl Metrics {
    /// A publish request was answered.
    pub(crate) fn published(&self, status: StatusCode, took: Duration) {
        self.publish.observe(took);
        let outcome = match status.as_u16() {
            200..300 => &self.publish_ok,
            500.. => &self.publish_failed,
            _ => &self.publish_refused,
        };
        outcome.fetch_add(1, Ordering::Relaxed);
    }

    /// The broker took messages.
    pub(crate) fn accepted(&self, messages: u64) {
        self.accepted.fetch_add(messages, Ordering::Relaxed);
    }

    /// Deliveries were pulled.
    pub(crate) fn pulled(&self, deliveries: usize) {
        self.pulled.fetch_add(deliveries as u64, Ordering::Relaxed);
    }

    /// Messages were written to a stream.
    pub(crate) fn streamed(&self, messages: usize) {
        self.streamed.fetch_add(messages as u64, Ordering::Relaxed);
    }

    /// A push was answered, or failed.
    pub(crate) fn pushed(&self, ok: bool, took: Duration) {
        self.push.observe(took);
        if ok { &self.push_ok } else { &self.push_failed }.fetch_add(1, Ordering::Relaxed);
    }

    /// A push was acked so long after its message was published.
    pub(crate) fn delivered(&self, after: Duration) {
        self.deliver.observe(after);
    }

    /// A connection was accepted.
    pub(crate) fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection was one too many.
    pub(crate) fn connection_refused(&self) {
        self.connections_refused.fetch_add(1, Ordering::Relaxed);
        self.refused(Refusal::Connections);
    }

    /// Something was refused.
    pub(crate) fn refused(&self, refusal: Refusal) {
        if let Some(count) = self.refused.get(refusal as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An answer leaves; if it refuses, it is counted.
    pub(crate) fn answered<B>(&self, response: &http::Response<B>) {
        // Most answers say nothing of the kind, which costs a comparison.
        if response.status().as_u16() >= 400
            && let Some(refusal) = response.extensions().get::<Refusal>()
        {
            self.refused(*refusal);
        }
    }

    /// Everything as text.
    pub(crate) fn render(&self, gauges: Gauges, pushes: &[(String, PushStatus)], status: Option<&Status>) -> String {
        let mut page = Page(String::with_capacity(8 << 10));
        page.labelled(
            "broker_publish_requests_total",
            "Publish requests answered.",
            "counter",
            [("ok", &self.publish_ok), ("refused", &self.publish_refused), ("failed", &self.publish_failed)]
                .map(|(outcome, count)| (format!("outcome=\"{outcome}\""), count.load(Ordering::Relaxed))),
        );
        page.histogram("broker_publish_seconds", "How long publish requests took.", &self.publish);
        page.one("broker_messages_published_total", "Messages the broker took.", "counter", &self.accepted);
        page.labelled(
            "broker_push_attempts_total",
            "Pushes answered or failed.",
            "counter",
            [("ok", &self.push_ok), ("failed", &self.push_failed)]
                .map(|(outcome, count)| (format!("outcome=\"{outcome}\""), count.load(Ordering::Relaxed))),
        );
        page.histogram("broker_push_seconds", "How long pushes took.", &self.push);
        page.histogram(
            "broker_delivery_seconds",
            "From a message's timestamp to the ack of its push, to the millisecond.",
            &self.deliver,
        );
        page.one("broker_messages_pulled_total", "Deliveries handed out to pullers.", "counter", &self.pulled);
        page.one("broker_messages_streamed_total", "Messages written to streams.", "counter", &self.streamed);
        page.one("broker_connections_total", "Connections accepted.", "counter", &self.connections);
        page.one(
            "broker_connections_refused_total",
            "Connections refused, being too many.",
            "counter",
            &self.connections_refused,
        );
        page.labelled(
            "broker_refused_total",
            "Requests, connections and attempts refused, by reason.",
            "counter",
            Refusal::ALL
                .iter()
                .zip(&self.refused)
                .map(|((_, reason), count)| (format!("reason=\"{reason}\""), count.load(Ordering::Relaxed))),
        );
        for (name, help, value) in [
            ("broker_memory_bytes", "Bytes held by messages and request bodies.", gauges.memory),
            ("broker_memory_limit_bytes", "Bytes they may hold.", gauges.memory_limit),
            ("broker_topics", "Topics that are published to or hold messages.", gauges.topics),
            ("broker_connections", "Connections open.", gauges.connections),
            ("broker_subscriptions", "Subscriptions.", gauges.subscriptions),
            ("broker_leases", "Leases held by pullers.", gauges.leases),
            ("broker_streams", "Streams open.", gauges.streams),
        ] {
            page.head(name, help, "gauge");
            page.line(name, "", value as u64);
        }
        page.pushes(pushes);
        if let Some(status) = status {
            page.groups(&status.groups);
        }
        page.0
    }
}

/// Counts of durations, by bucket.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.partition_point(|bound| *bound < micros);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }
}

/// The text in the making. Writing to a string cannot fail.
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: u64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            _ => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    fn one(&mut self, name: &str, help: &str, kind: &str, value: &AtomicU64) {
        self.head(name, help, kind);
        self.line(name, "", value.load(Ordering::Relaxed));
    }

    fn labelled(&mut self, name: &str, help: &str, kind: &str, values: impl IntoIterator<Item = (String, u64)>) {
        self.head(name, help, kind);
        for (labels, value) in values {
            self.line(name, &labels, value);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let mut total = 0;
        let bounds = BUCKETS.iter().map(|micros| format!("{}", *micros as f64 / 1e6)).chain(["+Inf".to_owned()]);
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            total += bucket.load(Ordering::Relaxed);
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        let sum = histogram.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(self.0, "{name}_sum {sum}\n{name}_count {total}");
    }

    /// How pushes are doing: the breaker is open where the state is `open`.
    fn pushes(&mut self, pushes: &[(String, PushStatus)]) {
        const STATES: [(PushState, &str); 7] = [
            (PushState::Active, "active"),
            (PushState::Open, "open"),
            (PushState::Paused, "paused"),
            (PushState::Disabled, "disabled"),
            (PushState::Unconsented, "unconsented"),
            (PushState::Unauthorized, "unauthorized"),
            (PushState::Ended, "ended"),
        ];
        self.head("broker_push_states", "Push subscriptions by state; open is an open breaker.", "gauge");
        for (state, name) in STATES {
            let count = pushes.iter().filter(|(_, status)| status.state == state).count();
            self.line("broker_push_states", &format!("state=\"{name}\""), count as u64);
        }
        let pushes = pushes.get(..MAX_GROUPS).unwrap_or(pushes);
        self.head("broker_push_state", "1 for the state a push subscription is in.", "gauge");
        for (subscription, status) in pushes {
            for (state, name) in STATES {
                let labels = format!("subscription=\"{subscription}\",state=\"{name}\"");
                self.line("broker_push_state", &labels, u64::from(status.state == state));
            }
        }
        self.head("broker_push_in_flight", "Pushes under way.", "gauge");
        for (subscription, status) in pushes {
            self.line("broker_push_in_flight", &format!("subscription=\"{subscription}\""), status.in_flight);
        }
    }

    fn groups(&mut self, groups: &[GroupStatus]) {
        type Read = fn(&GroupStatus) -> Option<u64>;
        let columns: [(&str, &str, &str, Read); 11] = [
            ("broker_group_lag", "Messages kept and not settled.", "gauge", |group| group.lag),
            ("broker_group_lag_bytes", "Bytes of those messages.", "gauge", |group| group.lag_bytes),
            ("broker_group_in_flight", "Deliveries handed out and not settled.", "gauge", |group| group.in_flight),
            ("broker_group_members", "Members subscribed.", "gauge", |group| group.members),
            ("broker_group_dead_letters", "Dead letters kept.", "gauge", |group| group.dead_letters),
            ("broker_group_delivered_total", "Deliveries, repeats included.", "counter", |group| {
                Some(group.counts.delivered)
            }),
            ("broker_group_acked_total", "Messages acked.", "counter", |group| Some(group.counts.acked)),
            ("broker_group_retried_total", "Deliveries to be repeated.", "counter", |group| Some(group.counts.retried)),
            ("broker_group_dead_lettered_total", "Messages dead-lettered.", "counter", |group| {
                Some(group.counts.dead_lettered)
            }),
            ("broker_group_dropped_total", "Messages dropped by a full backlog.", "counter", |group| {
                Some(group.counts.dropped)
            }),
            ("broker_group_expired_total", "Messages that expired.", "counter", |group| Some(group.counts.expired)),
        ];
        self.head("broker_groups", "Groups; the first thousand have lines of their own.", "gauge");
        self.line("broker_groups", "", groups.len() as u64);
        let groups = groups.get(..MAX_GROUPS).unwrap_or(groups);
        for (name, help, kind, read) in columns {
            self.head(name, help, kind);
            for group in groups {
                if let Some(value) = read(group) {
                    // A group's grammar needs no escaping within quotes.
                    self.line(name, &format!("group=\"{}\"", group.group), value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_core::State;

    #[test]
    fn every_refusal_counts_under_its_own_name() {
        for (index, (refusal, reason)) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, index, "{reason}");
            let metrics = Metrics::default();
            metrics.refused(refusal);
            let text = metrics.render(Gauges::default(), &[], None);
            let line = format!("broker_refused_total{{reason=\"{reason}\"}} 1");
            assert!(text.lines().any(|have| have == line), "{line}");
        }
    }

    #[test]
    fn buckets_add_up_and_lines_are_well_formed() {
        let metrics = Metrics::default();
        metrics.published(StatusCode::ACCEPTED, Duration::from_micros(80));
        metrics.published(StatusCode::SERVICE_UNAVAILABLE, Duration::from_secs(60));
        let mut status = Status::new("memory:", State::Active);
        status.groups.push(GroupStatus::new("billing@orders.>".parse().unwrap(), State::Active));
        let text = metrics.render(Gauges::default(), &[], Some(&status));
        for line in [
            "broker_publish_seconds_bucket{le=\"0.00005\"} 0",
            "broker_publish_seconds_bucket{le=\"0.0001\"} 1",
            "broker_publish_seconds_bucket{le=\"10\"} 1",
            "broker_publish_seconds_bucket{le=\"+Inf\"} 2",
            "broker_publish_seconds_count 2",
            "broker_publish_requests_total{outcome=\"failed\"} 1",
            "broker_group_acked_total{group=\"billing@orders.>\"} 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}\n{text}");
        }
        for line in text.lines() {
            assert!(line.starts_with('#') || line.rsplit_once(' ').unwrap().1.parse::<f64>().is_ok(), "{line}");
        }
    }
}
