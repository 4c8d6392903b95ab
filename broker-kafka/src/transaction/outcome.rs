//! What becomes of a transaction and of each of its records.

use std::sync::Arc;

use broker_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Message as _};
use rdkafka::producer::ProducerContext;

use crate::health::Health;
use crate::{client, error};

/// Partition and offset of a record.
pub(super) type Place = (i32, i64);

/// Where a record is, or why it is nowhere.
pub(super) type Outcome = Result<Place>;

/// How a transaction ended that was not committed.
pub(super) enum Ended {
    /// There is nothing of it.
    Aborted(Error),
    /// The server was asked to commit it, and what came of that is not known.
    Unknown(Error),
}

/// A transaction that came to nothing, or is not known to have come to anything.
pub(super) struct Aborted {
    pub(super) cause: Error,
    /// Why each record failed, of those that did so by themselves.
    pub(super) own: Vec<Option<Error>>,
    /// A topic that was known is not there any more.
    pub(super) deleted: bool,
}

impl Aborted {
    /// The error of each record.
    pub(super) fn each(self) -> impl Iterator<Item = Error> {
        let others = self.own.iter().flatten().next().map_or(self.cause, with_others);
        self.own.into_iter().map(move |own| own.unwrap_or_else(|| others.clone()))
    }

    pub(super) fn first(self) -> Error {
        self.own.into_iter().flatten().next().unwrap_or(self.cause)
    }
}

/// What became of the records of one transaction.
#[derive(Default)]
pub(super) struct Round {
    /// Told apart from the rounds before: a record that was purged may be heard of late.
    number: u32,
    pub(super) outcomes: Vec<Option<Outcome>>,
}

impl Round {
    pub(super) fn begin(&mut self, records: usize) {
        self.number = self.number.wrapping_add(1);
        self.outcomes = vec![None; records];
    }

    /// What a record takes along, to be known by.
    pub(super) fn ticket(&self, index: usize) -> usize {
        (self.number as usize) << 32 | index
    }

    pub(super) fn set(&mut self, ticket: usize, outcome: Outcome) {
        if ticket >> 32 == self.number as usize
            && let Some(slot) = self.outcomes.get_mut(ticket & 0xffff_ffff)
        {
            *slot = Some(outcome);
        }
    }
}

/// Takes down what became of each record.
pub(super) struct Outcomes {
    pub(super) outcomes: Arc<Mutex<Round>>,
    pub(super) health: Arc<Health>,
}

impl ClientContext for Outcomes {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.health.told(&error, reason);
    }
}

impl ProducerContext for Outcomes {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        let outcome = match result {
            Ok(record) => Ok((record.partition(), record.offset())),
            Err((error, record)) => Err(error::failed(format_args!("publish to {}", record.topic()), error)),
        };
        self.outcomes.lock().set(ticket, outcome);
    }
}

/// The error of what failed because something else did.
pub(crate) fn with_others(cause: &Error) -> Error {
    Error::new(cause.kind(), format!("the transaction was aborted: {}", cause.message()))
}

/// The error of a commit that may have come to pass.
pub(super) fn not_known(failed: &Error) -> Error {
    let kind = match failed.kind() {
        ErrorKind::Backend | ErrorKind::Unavailable => ErrorKind::Timeout,
        kind => kind,
    };
    Error::new(kind, format!("whether the transaction was committed is not known: {}", failed.message()))
}

pub(super) fn unknown() -> Error {
    Error::unavailable("the transaction was aborted")
}
