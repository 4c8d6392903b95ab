//! What lapin and the server say, in the contract's kinds.

use broker_core::{Error, ErrorKind};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

/// How the server says 404 of a queue that exists and does not answer; of others it says `no queue '…'`.
const ABSENT: [&str; 4] = [
    "is down or inaccessible",
    "has crashed and failed to restart",
    "process is stopped by supervisor",
    "failed to perform operation on",
];

/// How the server says that it lets nobody in for now.
const FULL: [&str; 2] = ["connection limit", "is down"];

/// How the server says, as it says that something is not allowed, that a user has all the channels it may.
const NO_MORE_CHANNELS: &str = "has reached the maximum allowed";

/// How the server says, as it says that two declarations differ, that the virtual host has all the queues it may.
const NO_MORE_QUEUES: &str = "queue limit in vhost";

/// How the server says that it takes back what a channel has held for longer than it lets anybody.
const HELD_TOO_LONG: &str = "delivery acknowledgement on channel";

/// An error of lapin's. Its text holds no credential: lapin never prints them.
pub(crate) fn from_lapin(error: lapin::Error) -> Error {
    let (kind, text) = describe(&error);
    Error::new(kind, text).with_source(error)
}

fn describe(error: &lapin::Error) -> (ErrorKind, String) {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(said) => {
            let text = said.get_message().as_str();
            if text.contains(NO_MORE_QUEUES) {
                let advice = "raise it with rabbitmqctl set_vhost_limits, or delete queues";
                return (ErrorKind::Unavailable, format!("the server says: {text}; {advice}"));
            }
            if text.contains(NO_MORE_CHANNELS) {
                let advice = "raise it with rabbitmqctl set_user_limits; every subscription has a channel";
                return (ErrorKind::Unavailable, format!("the server says: {text}; {advice}"));
            }
            let kind = match said.kind() {
                // It is there, on a node that is not, or its process is not: it comes back as it was.
                AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) if ABSENT.iter().any(|word| text.contains(word)) => {
                    ErrorKind::Unavailable
                }
                AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => ErrorKind::NotFound,
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => ErrorKind::Unauthorized,
                AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) if text.contains(HELD_TOO_LONG) => {
                    ErrorKind::Unavailable
                }
                AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::RESOURCELOCKED) => {
                    ErrorKind::Conflict
                }
                // What is full has room again, and what is down comes up.
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) if FULL.iter().any(|word| text.contains(word)) => {
                    ErrorKind::Unavailable
                }
                // The virtual host is missing, or not ours to use.
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) if text.contains("not found") => ErrorKind::NotFound,
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => ErrorKind::Unauthorized,
                AMQPErrorKind::Hard(
                    AMQPHardError::CONNECTIONFORCED | AMQPHardError::INTERNALERROR | AMQPHardError::RESOURCEERROR,
                ) => ErrorKind::Unavailable,
                _ => ErrorKind::Backend,
            };
            (kind, format!("the server says: {text}"))
        }
        lapin::ErrorKind::IOError(io) => (ErrorKind::Unavailable, format!("the connection failed: {io}")),
        lapin::ErrorKind::MissingHeartbeatError => {
            (ErrorKind::Unavailable, "the connection failed: the server was silent for too long".to_owned())
        }
        lapin::ErrorKind::InvalidConnectionState(_)
        | lapin::ErrorKind::InvalidChannelState(..)
        | lapin::ErrorKind::InvalidChannel(_) => (ErrorKind::Unavailable, "the connection is lost".to_owned()),
        lapin::ErrorKind::RuntimeShutdownError(_) => {
            (ErrorKind::Unavailable, "the connection's runtime has ended".to_owned())
        }
        _ => (ErrorKind::Backend, error.to_string()),
    }
}

/// Whether trying again soon is of no use: somebody must change something first.
pub(crate) fn is_final(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unauthorized
            | ErrorKind::NotFound
            | ErrorKind::Conflict
            | ErrorKind::Invalid
            | ErrorKind::Unsupported
    )
}

/// Whether the server makes no more queues: others may be deleted, so that a later try can succeed, but none soon.
pub(crate) fn is_queue_limit(error: &Error) -> bool {
    error.message().contains(NO_MORE_QUEUES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::AMQPError;

    #[test]
    fn a_connection_too_many_is_worth_a_retry() {
        for (text, kind) in [
            ("NOT_ALLOWED - vhost a not found", ErrorKind::NotFound),
            ("NOT_ALLOWED - access to vhost 'a' refused for user 'u'", ErrorKind::Unauthorized),
            (
                "NOT_ALLOWED - access to vhost 'a' refused for user 'u': connection limit (1) is reached",
                ErrorKind::Unavailable,
            ),
            ("NOT_ALLOWED - access to vhost 'a' refused for user 'u': vhost 'a' is down", ErrorKind::Unavailable),
        ] {
            let error = AMQPError::new(AMQPHardError::NOTALLOWED.into(), text.into());
            assert_eq!(from_lapin(lapin::ErrorKind::ProtocolError(error).into()).kind(), kind, "{text}");
        }
    }

    #[test]
    fn a_queue_whose_node_is_down_is_not_gone() {
        for (text, kind) in [
            ("NOT_FOUND - no queue 'q' in vhost '/'", ErrorKind::NotFound),
            (
                "NOT_FOUND - home node 'a@b' of durable queue 'q' in vhost '/' is down or inaccessible",
                ErrorKind::Unavailable,
            ),
            ("NOT_FOUND - queue 'q' in vhost '/' has crashed and failed to restart", ErrorKind::Unavailable),
            ("NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor", ErrorKind::Unavailable),
            (
                "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout",
                ErrorKind::Unavailable,
            ),
        ] {
            let error = AMQPError::new(AMQPSoftError::NOTFOUND.into(), text.into());
            assert_eq!(from_lapin(lapin::ErrorKind::ProtocolError(error).into()).kind(), kind, "{text}");
        }
    }
}
