//! What lapin and the server say, in the contract's kinds.

use broker_core::{Error, ErrorKind};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

/// An error of lapin's. Its text holds no credential: lapin never prints them.
pub(crate) fn from_lapin(error: lapin::Error) -> Error {
    let (kind, text) = describe(&error);
    Error::new(kind, text).with_source(error)
}

fn describe(error: &lapin::Error) -> (ErrorKind, String) {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(said) => {
            let text = said.get_message().as_str();
            let kind = match said.kind() {
                AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => ErrorKind::NotFound,
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => ErrorKind::Unauthorized,
                AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::RESOURCELOCKED) => {
                    ErrorKind::Conflict
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
