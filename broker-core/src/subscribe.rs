//! How to subscribe, and how a group is set up.

use serde::{Deserialize, Serialize};

use crate::{Error, Group, GroupName, Result, RetryPolicy, Timestamp, Topic};

/// Where a new group, or a subscription without group, begins. Counts when the group is created;
/// what a broker cannot do is [`Unsupported`](crate::ErrorKind::Unsupported).
///
/// ```
/// use broker_core::{StartAt, Timestamp};
///
/// let start: StartAt = "2026-11-22T12:00:00Z".parse()?;
/// assert_eq!(start, StartAt::Time(Timestamp::from_millis(1_795_348_800_000)));
/// assert_eq!("earliest".parse::<StartAt>()?, StartAt::Earliest);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartAt {
    /// What is published from now on.
    #[default]
    New,
    /// The oldest message the topic retains.
    Earliest,
    /// The first message published at this time or later; in-process a delayed one counts from when it
    /// is due.
    Time(Timestamp),
    /// These positions: partition to offset of the first message wanted.
    Position(Vec<(i32, i64)>),
}

impl std::fmt::Display for StartAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => f.write_str("new"),
            Self::Earliest => f.write_str("earliest"),
            Self::Time(time) => time.fmt(f),
            Self::Position(positions) => {
                for (index, (partition, offset)) in positions.iter().enumerate() {
                    write!(f, "{}{partition}:{offset}", if index == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl std::str::FromStr for StartAt {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let position = |part: &str| {
            let (partition, offset) = part.split_once(':')?;
            Some((partition.parse().ok()?, offset.parse().ok()?))
        };
        match text {
            "new" => Ok(Self::New),
            "earliest" => Ok(Self::Earliest),
            _ => text
                .parse()
                .map(Self::Time)
                .ok()
                .or_else(|| text.split(',').map(position).collect::<Option<Vec<_>>>().map(Self::Position))
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "start {text:?}: it is new, earliest, a time as in 2026-11-22T12:00:00Z, or positions as in 0:42,1:7"
                    ))
                }),
        }
    }
}

crate::text::serde_as_text!(StartAt);

/// What happens to a publish that would take a group over its bound.
///
/// ```
/// use broker_core::Overflow;
/// assert_eq!(serde_json::to_string(&Overflow::DropOldest).unwrap(), r#""drop_oldest""#);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Overflow {
    /// The publish waits for room.
    #[default]
    Wait,
    /// The publish fails as [`Unavailable`](crate::ErrorKind::Unavailable), naming the group.
    Reject,
    /// The group's oldest undelivered message is dropped and counted, and its reader is told.
    /// What waits for its time (a delay, a retry), waits behind its key or is read again from the past counts
    /// and is not dropped: where it fills the bound, the message that comes is the oldest that can be.
    DropOldest,
}

/// The bound of a group's unsettled messages, in count and in bytes, and what happens at it.
/// Below it, a slow, paused or memberless group stalls nobody.
///
/// ```
/// use broker_core::{Backlog, Overflow};
///
/// let backlog = Backlog::default().with_max_messages(10)?.with_overflow(Overflow::Reject);
/// assert_eq!(backlog.max_messages(), 10);
/// assert!(Backlog::default().with_max_messages(0).is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BacklogFields", into = "BacklogFields")]
pub struct Backlog {
    max_messages: u64,
    max_bytes: u64,
    overflow: Overflow,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BacklogFields {
    max_messages: u64,
    max_bytes: u64,
    overflow: Overflow,
}

impl Default for Backlog {
    /// 1,000,000 messages, 256 MiB, [`Overflow::Wait`].
    fn default() -> Self {
        Self { max_messages: 1_000_000, max_bytes: 256 << 20, overflow: Overflow::Wait }
    }
}

impl Backlog {
    /// Sets the bound in messages.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for zero.
    pub fn with_max_messages(self, max_messages: u64) -> Result<Self> {
        Self { max_messages, ..self }.checked()
    }

    /// Sets the bound in bytes. A group with nothing in it takes one message of any size.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for zero.
    pub fn with_max_bytes(self, max_bytes: u64) -> Result<Self> {
        Self { max_bytes, ..self }.checked()
    }

    /// Sets what happens at the bound.
    #[must_use]
    pub fn with_overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    fn checked(self) -> Result<Self> {
        if self.max_messages == 0 || self.max_bytes == 0 {
            return Err(Error::invalid("a backlog of 0 could hold nothing: max_messages and max_bytes are 1 or more"));
        }
        Ok(self)
    }

    /// Messages at most.
    pub fn max_messages(&self) -> u64 {
        self.max_messages
    }

    /// Bytes at most, of payloads, keys and headers.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// What happens at the bound.
    pub fn overflow(&self) -> Overflow {
        self.overflow
    }
}

impl TryFrom<BacklogFields> for Backlog {
    type Error = String;

    fn try_from(fields: BacklogFields) -> Result<Self, String> {
        let BacklogFields { max_messages, max_bytes, overflow } = fields;
        Self { max_messages, max_bytes, overflow }.checked().map_err(|error| error.message().to_owned())
    }
}

impl From<Backlog> for BacklogFields {
    fn from(backlog: Backlog) -> Self {
        let Backlog { max_messages, max_bytes, overflow } = backlog;
        Self { max_messages, max_bytes, overflow }
    }
}

impl Default for BacklogFields {
    fn default() -> Self {
        Backlog::default().into()
    }
}

/// How a group is set up. What is `None` is the default for who creates the group, and whatever
/// the group has for who joins it; a member asking for something else gets
/// [`Conflict`](crate::ErrorKind::Conflict) where the broker can know.
///
/// ```
/// use broker_core::{GroupOptions, RetryPolicy, StartAt};
///
/// let options = GroupOptions::new()
///     .with_start(StartAt::Earliest)
///     .with_ordered(true)
///     .with_retry(RetryPolicy::default().with_max_attempts(5)?);
/// assert_eq!(options.ordered, Some(true));
/// assert_eq!(options.backlog, None);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct GroupOptions {
    /// Where the group begins.
    pub start: Option<StartAt>,
    /// Whether messages of one key are delivered one at a time, in order.
    pub ordered: Option<bool>,
    /// The bound of its backlog.
    pub backlog: Option<Backlog>,
    /// How messages are retried.
    pub retry: Option<RetryPolicy>,
    /// Where rejected and exhausted messages go; by default `dead.NAME`.
    pub dead_letter: Option<Topic>,
}

impl GroupOptions {
    /// Nothing asked for.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets where the group begins.
    #[must_use]
    pub fn with_start(mut self, start: StartAt) -> Self {
        self.start = Some(start);
        self
    }

    /// Sets whether messages of one key are delivered one at a time, in order.
    #[must_use]
    pub fn with_ordered(mut self, ordered: bool) -> Self {
        self.ordered = Some(ordered);
        self
    }

    /// Sets the bound of its backlog.
    #[must_use]
    pub fn with_backlog(mut self, backlog: Backlog) -> Self {
        self.backlog = Some(backlog);
        self
    }

    /// Sets how messages are retried.
    #[must_use]
    pub fn with_retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = Some(retry);
        self
    }

    /// Sets where rejected and exhausted messages go.
    #[must_use]
    pub fn with_dead_letter(mut self, topic: Topic) -> Self {
        self.dead_letter = Some(topic);
        self
    }

    /// What a group made with these options has: every default filled in.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if the dead-letter topic is the broker's own.
    ///
    /// ```
    /// use broker_core::{Group, GroupOptions};
    /// let group: Group = "billing@orders.>".parse()?;
    /// let settings = GroupOptions::new().resolve(Some(&group.name))?;
    /// assert_eq!(settings.dead_letter.map(|topic| topic.to_string()).as_deref(), Some("dead.billing"));
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn resolve(&self, group: Option<&GroupName>) -> Result<GroupSettings> {
        let dead_letter = match (&self.dead_letter, group) {
            (Some(topic), _) => Some(topic.clone()),
            (None, Some(name)) => Some(Topic::new(format!("dead.{name}"))?),
            (None, None) => None,
        };
        if let Some(topic) = dead_letter.as_ref().filter(|topic| topic.is_reserved()) {
            return Err(Error::invalid(format!(
                "dead-letter topic {topic}: topics beginning with 'broker-' are the broker's own"
            )));
        }
        Ok(GroupSettings {
            start: self.start.clone().unwrap_or_default(),
            ordered: self.ordered.unwrap_or(false),
            backlog: self.backlog.unwrap_or_default(),
            retry: self.retry.unwrap_or_default(),
            dead_letter,
        })
    }

    /// Checks that who asks for these options can join a group that has `settings`.
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict), naming the option that differs.
    pub fn check_joins(&self, group: &Group, settings: &GroupSettings) -> Result<()> {
        let Some(name) = self.differs_from(settings) else { return Ok(()) };
        Err(Error::conflict(format!(
            "group {group} exists with another {name}: ask for what it has, leave {name} out, or delete the group first"
        )))
    }

    /// The first option that is asked for and is another in `settings`; what is left out is no different.
    ///
    /// ```
    /// use broker_core::GroupOptions;
    ///
    /// let settings = GroupOptions::new().with_ordered(true).resolve(None)?;
    /// assert_eq!(GroupOptions::new().with_ordered(false).differs_from(&settings), Some("ordered"));
    /// assert_eq!(GroupOptions::new().differs_from(&settings), None);
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn differs_from(&self, settings: &GroupSettings) -> Option<&'static str> {
        [
            ("start", self.start.as_ref().is_some_and(|start| *start != settings.start)),
            ("ordered", self.ordered.is_some_and(|ordered| ordered != settings.ordered)),
            ("backlog", self.backlog.is_some_and(|backlog| backlog != settings.backlog)),
            ("retry", self.retry.is_some_and(|retry| retry != settings.retry)),
            ("dead_letter", self.dead_letter.is_some() && self.dead_letter != settings.dead_letter),
        ]
        .into_iter()
        .find_map(|(name, differs)| differs.then_some(name))
    }
}

/// What a group has, every option decided; see [`GroupOptions::resolve`].
///
/// ```
/// let settings = broker_core::GroupOptions::new().resolve(None)?;
/// assert!(!settings.ordered);
/// assert!(settings.dead_letter.is_none(), "a subscription without group keeps no dead letters");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GroupSettings {
    /// Where the group began.
    pub start: StartAt,
    /// Whether messages of one key are delivered one at a time, in order.
    pub ordered: bool,
    /// The bound of its backlog.
    pub backlog: Backlog,
    /// How messages are retried.
    pub retry: RetryPolicy,
    /// Where rejected and exhausted messages go; `None` discards, counts and logs them.
    pub dead_letter: Option<Topic>,
}

/// How to subscribe: as a member of a group, or with a copy of one's own.
///
/// ```
/// use broker_core::{GroupName, Subscribe};
///
/// let options = Subscribe::group(GroupName::new("billing")?).with_max_in_flight(64)?;
/// assert_eq!(options.max_in_flight(), 64);
/// assert!(Subscribe::new().with_max_in_flight(0).is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Subscribe {
    group: Option<GroupName>,
    options: GroupOptions,
    max_in_flight: usize,
}

impl Default for Subscribe {
    fn default() -> Self {
        Self { group: None, options: GroupOptions::new(), max_in_flight: 256 }
    }
}

impl Subscribe {
    /// A copy of one's own, which lives and dies with the subscription.
    pub fn new() -> Self {
        Self::default()
    }

    /// As a member of the group `name`; the first member creates it.
    pub fn group(name: GroupName) -> Self {
        Self { group: Some(name), ..Self::default() }
    }

    /// Sets how the group (or the copy of one's own) is set up.
    #[must_use]
    pub fn with_options(mut self, options: GroupOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets how many deliveries this member has unsettled at most (default 256).
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for zero.
    pub fn with_max_in_flight(mut self, max_in_flight: usize) -> Result<Self> {
        if max_in_flight == 0 {
            return Err(Error::invalid("max_in_flight is 0: a subscription that may hold nothing receives nothing"));
        }
        self.max_in_flight = max_in_flight;
        Ok(self)
    }

    /// The group to join, if any.
    pub fn group_name(&self) -> Option<&GroupName> {
        self.group.as_ref()
    }

    /// How the group is set up.
    pub fn options(&self) -> &GroupOptions {
        &self.options
    }

    /// Unsettled deliveries at most.
    pub fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }
}
