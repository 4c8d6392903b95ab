//! How a broker, its groups and its subscriptions are doing.

use serde::Serialize;

use crate::{Group, TopicFilter};

/// What a broker, a group or a subscription is doing.
///
/// ```
/// assert_eq!(serde_json::to_string(&broker_core::State::Active).unwrap(), r#""active""#);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum State {
    /// Not connected yet, or connecting again.
    Connecting,
    /// At work.
    Active,
    /// Draining.
    Closing,
    /// Over.
    Closed,
}

/// A broker's status; see [`Broker::status`](crate::Broker::status).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, GroupOptions, MemoryBroker, State};
///
/// let broker = MemoryBroker::new();
/// broker.create_group(&"billing@orders.>".parse()?, GroupOptions::new()).await?;
/// let status = broker.status().await?;
/// assert_eq!(status.state, State::Active);
/// assert_eq!(status.groups[0].lag, Some(0));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// What the broker is called: its URL without credentials.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// The last error, without credentials.
    pub last_error: Option<String>,
    /// Every group known.
    pub groups: Vec<GroupStatus>,
    /// Every subscription without group of this broker value.
    pub subscriptions: Vec<SubscriptionStatus>,
}

impl Status {
    /// A broker called `name` in `state`, nothing else known.
    pub fn new(name: impl Into<String>, state: State) -> Self {
        Self { name: name.into(), state, last_error: None, groups: Vec::new(), subscriptions: Vec::new() }
    }

    /// The status of `group`.
    pub fn group(&self, group: &Group) -> Option<&GroupStatus> {
        self.groups.iter().find(|status| status.group == *group)
    }
}

/// What was counted for a group or a subscription without group since it was created.
///
/// ```
/// assert_eq!(broker_core::Counts::default().acked, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counts {
    /// Deliveries handed out, repeats included.
    pub delivered: u64,
    /// Messages acked.
    pub acked: u64,
    /// Deliveries to be repeated.
    pub retried: u64,
    /// Messages dead-lettered, or discarded where there is no dead-letter topic.
    pub dead_lettered: u64,
    /// Messages dropped because the backlog was full.
    pub dropped: u64,
    /// Messages that expired undelivered.
    pub expired: u64,
}

/// A group's status. What the broker cannot know is `None`.
///
/// ```
/// use broker_core::{GroupStatus, State};
/// assert_eq!(GroupStatus::new("billing@orders.>".parse()?, State::Active).lag, None);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GroupStatus {
    /// The group.
    pub group: Group,
    /// What it is doing.
    pub state: State,
    /// Messages kept for it and not settled: waiting, due later, and in flight.
    pub lag: Option<u64>,
    /// Bytes of those messages.
    pub lag_bytes: Option<u64>,
    /// Deliveries handed out and not settled.
    pub in_flight: Option<u64>,
    /// Members subscribed.
    pub members: Option<u64>,
    /// Partitions that members of this broker value read, `TOPIC/PARTITION` each, where the broker assigns
    /// such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Vec<String>>,
    /// Dead letters kept for it.
    pub dead_letters: Option<u64>,
    /// What was counted.
    pub counts: Counts,
    /// The last failure of a delivery, or error of the connection.
    pub last_error: Option<String>,
}

impl GroupStatus {
    /// A group in `state`, nothing else known.
    pub fn new(group: Group, state: State) -> Self {
        Self {
            group,
            state,
            lag: None,
            lag_bytes: None,
            in_flight: None,
            members: None,
            assignment: None,
            dead_letters: None,
            counts: Counts::default(),
            last_error: None,
        }
    }
}

/// The status of a subscription without group.
///
/// ```
/// use broker_core::{State, SubscriptionStatus};
/// assert_eq!(SubscriptionStatus::new("orders.>".parse()?, State::Active).in_flight, None);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SubscriptionStatus {
    /// What it subscribed to.
    pub filter: TopicFilter,
    /// What it is doing.
    pub state: State,
    /// Messages kept for it and not settled.
    pub lag: Option<u64>,
    /// Deliveries handed out and not settled.
    pub in_flight: Option<u64>,
    /// Partitions that it reads, `TOPIC/PARTITION` each, where the broker has such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Vec<String>>,
    /// What was counted.
    pub counts: Counts,
    /// The last failure of a delivery, or error of the connection.
    pub last_error: Option<String>,
}

impl SubscriptionStatus {
    /// A subscription to `filter` in `state`, nothing else known.
    pub fn new(filter: TopicFilter, state: State) -> Self {
        Self {
            filter,
            state,
            lag: None,
            in_flight: None,
            assignment: None,
            counts: Counts::default(),
            last_error: None,
        }
    }
}

/// What [`Broker::close`](crate::Broker::close) left behind.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::time::Duration;
/// use broker_core::{Broker, MemoryBroker};
///
/// let report = MemoryBroker::new().close(Duration::from_secs(1)).await;
/// assert!(report.complete);
/// assert_eq!(report.lost(), 0);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DrainReport {
    /// Whether the drain ended by itself, before the deadline.
    pub complete: bool,
    /// Whether what stayed is kept by the broker, or gone with it.
    pub durable: bool,
    /// Publishes whose outcome was not known at the deadline.
    pub unconfirmed: u64,
    /// Deliveries handed out and never settled.
    pub in_flight: u64,
    /// Messages kept for a group and not delivered: waiting, and due later.
    pub undelivered: u64,
    /// Dead letters kept.
    pub dead_letters: u64,
}

impl DrainReport {
    /// A drain that left nothing, of a broker that keeps (`durable`) or forgets what stays.
    pub fn new(durable: bool) -> Self {
        Self { complete: true, durable, unconfirmed: 0, in_flight: 0, undelivered: 0, dead_letters: 0 }
    }

    /// Messages gone with the broker: zero for a durable one.
    pub fn lost(&self) -> u64 {
        if self.durable { 0 } else { self.in_flight + self.undelivered + self.dead_letters }
    }
}
