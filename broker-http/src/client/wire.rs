//! The JSON the daemon answers, as far as we read it; fields we do not know are left alone.

use broker_core::{
    Backlog, Counts, DeadLetter, Error, Failure, Gap, Group, GroupName, GroupOptions, GroupSettings, Receipt, Result,
    RetryPolicy, StartAt, Timestamp, Topic, TopicFilter,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::Problem;
use crate::event::{Options, json};

/// Reads an answer.
pub(super) fn read<'a, T: Deserialize<'a>>(what: &str, body: &'a [u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| {
        Error::backend(format!("{what}: the daemon's answer is not the JSON that was expected: {error}"))
    })
}

/// What became of one message.
#[derive(Debug, Deserialize)]
pub(super) struct Accepted {
    id: String,
    matched: Option<u64>,
    #[serde(default)]
    duplicate: bool,
    partition: Option<i32>,
    offset: Option<i64>,
}

impl Accepted {
    pub(super) fn into_receipt(self) -> Result<Receipt> {
        let mut receipt = Receipt::new(self.id.parse()?);
        if let Some(matched) = self.matched {
            receipt = receipt.with_matched(matched);
        }
        receipt.duplicate = self.duplicate;
        receipt.partition = self.partition;
        receipt.offset = self.offset;
        Ok(receipt)
    }
}

/// What became of the messages of a batch.
#[derive(Debug, Deserialize)]
pub(super) struct Results {
    pub(super) results: Vec<Outcome>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Outcome {
    Refused { error: Problem },
    Accepted(Accepted),
}

impl Outcome {
    pub(super) fn into_result(self) -> Result<Receipt> {
        match self {
            Self::Refused { error } => Err(error.into_error()),
            Self::Accepted(accepted) => accepted.into_receipt(),
        }
    }
}

/// What a pull brought.
#[derive(Debug, Deserialize)]
pub(super) struct Pulled<'a> {
    #[serde(borrow)]
    pub(super) deliveries: Vec<Leased<'a>>,
    /// How many messages this subscription will not see; null if that is not known.
    #[serde(default, deserialize_with = "gap")]
    pub(super) lost: Option<Gap>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Leased<'a> {
    pub(super) lease: Box<str>,
    pub(super) attempt: u32,
    #[serde(borrow)]
    pub(super) event: &'a RawValue,
}

fn gap<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Gap>, D::Error> {
    let lost = Option::<u64>::deserialize(deserializer)?;
    Ok(Some(lost.map_or(Gap::Unknown, Gap::Lost)))
}

/// Leases that no longer held.
#[derive(Debug, Deserialize)]
pub(super) struct Settled {
    #[serde(default)]
    pub(super) gone: Vec<Box<str>>,
}

/// A subscription of the daemon.
#[derive(Debug, Deserialize)]
pub(super) struct View {
    pub(super) name: String,
    pub(super) filter: TopicFilter,
    pub(super) group: Option<GroupName>,
    pub(super) start: Option<StartAt>,
    pub(super) ordered: Option<bool>,
    pub(super) backlog: Option<Backlog>,
    pub(super) retry: Option<RetryPolicy>,
    pub(super) dead_letter: Option<Topic>,
    pub(super) expires: Option<String>,
    #[serde(default)]
    pub(super) status: ViewStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ViewStatus {
    pub(super) lag: Option<u64>,
    pub(super) lag_bytes: Option<u64>,
    pub(super) in_flight: Option<u64>,
    pub(super) dead_letters: Option<u64>,
    pub(super) last_error: Option<String>,
    pub(super) counts: ViewCounts,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ViewCounts {
    delivered: u64,
    acked: u64,
    retried: u64,
    dead_lettered: u64,
    dropped: u64,
    expired: u64,
}

impl From<ViewCounts> for Counts {
    fn from(view: ViewCounts) -> Self {
        let mut counts = Self::default();
        counts.delivered = view.delivered;
        counts.acked = view.acked;
        counts.retried = view.retried;
        counts.dead_lettered = view.dead_lettered;
        counts.dropped = view.dropped;
        counts.expired = view.expired;
        counts
    }
}

impl View {
    /// The group's name: by default the subscription's own.
    pub(super) fn group_name(&self) -> &str {
        self.group.as_ref().map_or(&self.name, GroupName::as_str)
    }

    /// What its group has.
    pub(super) fn settings(&self) -> Result<GroupSettings> {
        let mut options = GroupOptions::new();
        options.start = self.start.clone();
        options.ordered = self.ordered;
        options.backlog = self.backlog;
        options.retry = self.retry;
        options.dead_letter = self.dead_letter.clone();
        options.resolve(Some(&GroupName::new(self.group_name())?))
    }
}

/// A page of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    pub(super) subscriptions: Vec<View>,
    #[serde(default)]
    pub(super) next: Option<String>,
}

/// Dead letters: the original messages, and their stories.
#[derive(Debug, Deserialize)]
pub(super) struct Dead<'a> {
    #[serde(borrow)]
    pub(super) dead: Vec<Letter<'a>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Letter<'a> {
    #[serde(borrow)]
    event: &'a RawValue,
    reason: String,
    status: Option<String>,
    attempts: u32,
    topic: Topic,
    group: Option<Group>,
    first: Timestamp,
    last: Timestamp,
}

impl Letter<'_> {
    pub(super) fn into_dead_letter(self) -> Result<DeadLetter> {
        let decoded = json::decode(self.event.get().as_bytes(), &Options::default(), None)?;
        let failure = Failure::new(self.reason);
        Ok(DeadLetter {
            message: decoded.message,
            topic: self.topic,
            group: self.group,
            failure: self.status.iter().fold(failure, |failure, status| failure.with_status(status)),
            attempts: self.attempts,
            first: self.first,
            last: self.last,
        })
    }
}

/// How many it was.
#[derive(Debug, Deserialize)]
pub(super) struct Purged {
    pub(super) purged: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Redriven {
    pub(super) redriven: u64,
}
