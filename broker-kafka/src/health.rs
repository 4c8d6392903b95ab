//! How the connections to the server are, as the clients of one broker last heard.

use std::sync::atomic::{AtomicBool, Ordering};

use broker_core::{Error, ErrorKind};
use parking_lot::Mutex;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::cause::cause;
use crate::error;

#[derive(Debug, Default)]
pub(crate) struct Health {
    /// The server has answered once: so it is reached, and lets us in.
    stood: AtomicBool,
    /// Since something succeeded there was an error: whoever succeeds looks here and at nothing else.
    troubled: AtomicBool,
    trouble: Mutex<Trouble>,
}

#[derive(Debug, Default)]
struct Trouble {
    last: Option<Error>,
    /// No connection stands.
    down: bool,
}

impl Health {
    /// Whether the server has ever answered.
    pub(crate) fn stood(&self) -> bool {
        self.stood.load(Ordering::Acquire)
    }

    /// Whether the server has answered, and no client has lost it since, as far as is known.
    pub(crate) fn is_connected(&self) -> bool {
        self.stood() && !self.trouble.lock().down
    }

    /// The last error, if nothing succeeded since.
    pub(crate) fn last_error(&self) -> Option<Error> {
        self.trouble.lock().last.clone()
    }

    /// Something succeeded.
    pub(crate) fn recovered(&self) {
        if !self.stood.load(Ordering::Relaxed) {
            self.stood.store(true, Ordering::Release);
        }
        if self.troubled.load(Ordering::Acquire) {
            let mut trouble = self.trouble.lock();
            *trouble = Trouble::default();
            self.troubled.store(false, Ordering::Release);
        }
    }

    /// Something failed.
    pub(crate) fn failed(&self, error: Error) {
        let mut trouble = self.trouble.lock();
        trouble.last = Some(error);
        self.troubled.store(true, Ordering::Release);
    }

    /// What a client of librdkafka says of itself. That all servers are away follows from what it has said of each, and
    /// tells no cause.
    pub(crate) fn told(&self, told: &KafkaError, reason: &str) {
        match told.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                let mut trouble = self.trouble.lock();
                trouble.down = true;
                trouble.last.get_or_insert_with(|| Error::unavailable(reason));
                self.troubled.store(true, Ordering::Release);
            }
            Some(code) if error::is_of_connection(code) => self.failed(cause(code, reason)),
            _ => self.failed(error::failed(reason, told)),
        }
    }

    /// A line of librdkafka's log says that a connection was closed, which it takes for no error. It is the cause where none
    /// has ever stood.
    pub(crate) fn closed(&self, reason: &str) {
        if !self.stood() {
            self.failed(cause(RDKafkaErrorCode::BrokerTransportFailure, reason));
        }
    }

    /// `error`, with the cause that the connections tell, if it is of such.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let waited = matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable);
        match self.last_error().filter(|_| waited) {
            Some(last) if last.kind() == ErrorKind::Unauthorized => last.context(error.message()),
            Some(last) => Error::new(error.kind(), format!("{}: {}", error.message(), last.message())),
            None => error,
        }
    }

    /// How the clients are refused, if that is the last that was heard.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.last_error().filter(|last| last.kind() == ErrorKind::Unauthorized)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(health: &Health, code: RDKafkaErrorCode, reason: &str) {
        health.told(&KafkaError::Global(code), reason);
    }

    #[test]
    fn the_cause_is_told_until_something_succeeds() {
        let health = Health::default();
        assert!(!health.is_connected(), "nothing has succeeded yet");
        told(&health, RDKafkaErrorCode::BrokerTransportFailure, "a:1/bootstrap: Connection refused");
        told(&health, RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        let explained = health.explain(Error::timeout("publish to orders"));
        assert_eq!(explained.kind(), ErrorKind::Timeout);
        assert!(explained.message().starts_with("publish to orders: a:1: Connection refused; "), "{explained}");
        assert!(!health.is_connected());
        health.recovered();
        assert!(health.is_connected() && health.last_error().is_none());
        assert_eq!(health.explain(Error::timeout("publish to orders")).message(), "publish to orders");
        told(&health, RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        assert!(!health.is_connected());
        assert_eq!(health.last_error().unwrap().message(), "1/1 brokers are down");
        // What is said of a connection that stood is no cause of anything by itself.
        health.recovered();
        health.closed("a:1/1: Disconnected");
        assert!(health.is_connected() && health.last_error().is_none());
    }

    #[test]
    fn a_refusal_explains_waiting_and_nothing_else() {
        let health = Health::default();
        let reason = "sasl_plaintext://a:1/bootstrap: SASL authentication error: Authentication failed";
        told(&health, RDKafkaErrorCode::Authentication, reason);
        told(&health, RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        assert!(health.refusal().is_some());
        let explained = health.explain(Error::timeout("publish to orders"));
        assert_eq!(explained.kind(), ErrorKind::Unauthorized);
        assert!(explained.message().starts_with("publish to orders: a:1: SASL"), "{explained}");
        let missing = health.explain(Error::not_found("topic orders"));
        assert_eq!((missing.kind(), missing.message()), (ErrorKind::NotFound, "topic orders"));
        // It went away: that is what is the matter now.
        told(&health, RDKafkaErrorCode::BrokerTransportFailure, "a:1/bootstrap: Connection refused");
        assert!(health.refusal().is_none());
    }
}
