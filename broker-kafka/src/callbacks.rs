//! What becomes of what was published: librdkafka's callbacks, on the polling thread.

use std::sync::{Arc, OnceLock, Weak};

use broker_core::{Error, ErrorKind};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, DeliveryResult, Message as _};
use rdkafka::producer::{Producer as _, ProducerContext};

use crate::health::Health;
use crate::publishing::{Publishing, RawProducer, closed};
use crate::tickets::Tickets;
use crate::{client, error};

/// What librdkafka calls back for.
#[derive(Debug)]
pub struct Callbacks {
    pub(crate) publishing: Weak<Publishing>,
    pub(crate) tickets: Arc<Tickets>,
    pub(crate) health: Arc<Health>,
    /// The client that calls back.
    pub(crate) client: OnceLock<Weak<RawProducer>>,
}

impl Callbacks {
    /// Why the client is done for, if it is.
    pub(crate) fn fatal(&self) -> Option<Error> {
        let (code, why) = self.client.get()?.upgrade()?.client().fatal_error()?;
        Some(error::fatal(code, &why))
    }

    /// Why a record is not known to be written.
    fn failed(&self, record: &BorrowedMessage<'_>, error: &KafkaError) -> Error {
        let what = format_args!("publish to {}", record.topic());
        let error = error::failed(what, error);
        match error.kind() {
            // The end of the client is why, whatever is said of the record: refused, not sent, given up.
            ErrorKind::Backend | ErrorKind::Unavailable | ErrorKind::Closed => match self.fatal() {
                Some(fatal) => {
                    self.health.failed(fatal.clone());
                    fatal.context(what)
                }
                None if error.kind() == ErrorKind::Closed => closed(),
                None => self.health.explain(error),
            },
            _ => self.health.explain(error),
        }
    }
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match self.fatal() {
            Some(fatal) => self.health.failed(fatal),
            None => self.health.told(&error, reason),
        }
    }
}

impl ProducerContext for Callbacks {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        let outcome = match result {
            Ok(record) => {
                self.health.recovered();
                Ok((record.partition(), record.offset()))
            }
            Err((error, record)) => {
                let error = self.failed(record, error);
                if error.kind() == ErrorKind::NotFound
                    && let Some(publishing) = self.publishing.upgrade()
                {
                    publishing.not_there(record.topic());
                }
                Err(error)
            }
        };
        self.tickets.complete(ticket, outcome);
    }
}
