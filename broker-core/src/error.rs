//! The one error type of the contract.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A `Result` whose error is [`Error`].
///
/// ```
/// fn parse(name: &str) -> broker_core::Result<broker_core::Topic> {
///     name.parse()
/// }
/// assert!(parse("orders.created").is_ok());
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by kind; match on it, never on the text.
///
/// ```
/// use broker_core::{ErrorKind, Topic};
///
/// let error = Topic::new("orders..created").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Invalid);
/// assert!(!error.is_retryable());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller's input does not parse or is out of range.
    Invalid,
    /// The message exceeds the broker's limit.
    TooLarge,
    /// A topic, group or subscription does not exist.
    NotFound,
    /// It exists with other settings.
    Conflict,
    /// Credentials are missing, wrong or not sufficient.
    Unauthorized,
    /// The broker, publisher or subscription was closed.
    Closed,
    /// Not done within its time; the outcome may be unknown.
    Timeout,
    /// Not possible right now: unreachable, full or shedding load.
    Unavailable,
    /// No group or subscription matches, and the publisher asked for one.
    Unroutable,
    /// This broker cannot do this; [`Capabilities`](crate::Capabilities) says so.
    Unsupported,
    /// Bytes from outside could not be decoded, or a value could not be encoded.
    Codec,
    /// Anything else the server behind an adapter answered.
    Backend,
}

impl ErrorKind {
    /// The kind in the words of the HTTP interface and of logs.
    ///
    /// ```
    /// assert_eq!(broker_core::ErrorKind::TooLarge.as_str(), "too large");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::TooLarge => "too large",
            Self::NotFound => "not found",
            Self::Conflict => "conflict",
            Self::Unauthorized => "unauthorized",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Unroutable => "unroutable",
            Self::Unsupported => "unsupported",
            Self::Codec => "codec",
            Self::Backend => "backend",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The error of every operation: a [kind](ErrorKind), a sentence that says what to do next, and
/// the source if there is one.
///
/// One pointer wide and cheap to clone, so that a `Result` on the hot path stays small. No
/// credential is ever part of it: adapters strip URLs before they make one.
///
/// ```
/// use broker_core::{Error, ErrorKind};
///
/// let error = Error::unavailable("group billing@orders.> is full").with_retry_after(std::time::Duration::from_secs(1));
/// assert_eq!(error.kind(), ErrorKind::Unavailable);
/// assert!(error.is_retryable());
/// assert_eq!(error.to_string(), "unavailable: group billing@orders.> is full");
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(ErrorKind::$kind, message)
        }
    )*};
}

impl Error {
    /// An error of `kind`; `message` is lower case, without a full stop, and says what to do next.
    ///
    /// A message may quote what came from outside, so it is kept to one line of at most 1,024 bytes: control
    /// characters become spaces, the rest is cut.
    ///
    /// ```
    /// use broker_core::{Error, ErrorKind};
    /// let name = "x\nlevel=info";
    /// assert_eq!(Error::new(ErrorKind::Invalid, format!("attribute {name}")).message(), "attribute x level=info");
    /// ```
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            message: one_line(Cow::Owned(message.into())),
            retryable: matches!(kind, ErrorKind::Timeout | ErrorKind::Unavailable),
            retry_after: None,
            source: None,
        }))
    }

    constructors! {
        /// An [`ErrorKind::Invalid`] error.
        invalid => Invalid;
        /// An [`ErrorKind::TooLarge`] error.
        too_large => TooLarge;
        /// An [`ErrorKind::NotFound`] error.
        not_found => NotFound;
        /// An [`ErrorKind::Conflict`] error.
        conflict => Conflict;
        /// An [`ErrorKind::Unauthorized`] error.
        unauthorized => Unauthorized;
        /// An [`ErrorKind::Closed`] error.
        closed => Closed;
        /// An [`ErrorKind::Timeout`] error.
        timeout => Timeout;
        /// An [`ErrorKind::Unavailable`] error.
        unavailable => Unavailable;
        /// An [`ErrorKind::Unroutable`] error.
        unroutable => Unroutable;
        /// An [`ErrorKind::Unsupported`] error.
        unsupported => Unsupported;
        /// An [`ErrorKind::Codec`] error.
        codec => Codec;
        /// An [`ErrorKind::Backend`] error.
        backend => Backend;
    }

    /// Adds the error this one was made from.
    ///
    /// ```
    /// use std::error::Error as _;
    /// let error = broker_core::Error::backend("read the answer").with_source(std::io::Error::other("reset"));
    /// assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("reset"));
    /// ```
    #[must_use]
    pub fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.alter(|inner| inner.source = Some(Arc::from(source.into())))
    }

    /// Says whether trying again may help, where the kind alone would say otherwise.
    #[must_use]
    pub fn with_retryable(self, retryable: bool) -> Self {
        self.alter(|inner| inner.retryable = retryable)
    }

    /// Adds how long to wait before trying again; makes the error retryable.
    #[must_use]
    pub fn with_retry_after(self, after: Duration) -> Self {
        self.alter(|inner| {
            inner.retry_after = Some(after);
            inner.retryable = true;
        })
    }

    /// Puts `context` before the message: `"publish to orders.created: …"`.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        self.alter(|inner| inner.message = one_line(format!("{context}: {}", inner.message).into()))
    }

    fn alter(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// What went wrong, by kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The sentence without the kind.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Whether the same call may succeed later, unchanged.
    pub fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    /// How long the broker asks to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }
}

/// Most bytes of a text about an error: it may hold what came from outside.
pub(crate) const MAX_LINE: usize = 1_024;

/// `text` as one line that a log or a header can hold: at most 1,024 bytes, control characters made spaces.
pub(crate) fn one_line(text: Cow<'_, str>) -> String {
    if text.len() <= MAX_LINE && !text.contains(char::is_control) {
        return text.into_owned();
    }
    let mut line = String::with_capacity(text.len().min(MAX_LINE));
    for letter in text.chars() {
        if line.len() + letter.len_utf8() > MAX_LINE {
            break;
        }
        line.push(if letter.is_control() { ' ' } else { letter });
    }
    line
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.kind, self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(source) = &self.0.source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_message_quotes_is_bounded_and_one_line() {
        let foreign = format!("a\r\nb\u{85}{}", "ä".repeat(2_000));
        for error in [Error::invalid(foreign.clone()), Error::invalid("x").context(foreign)] {
            assert!(error.message().starts_with("a  b ä"), "{error}");
            assert!(error.message().len() <= MAX_LINE, "{}", error.message().len());
        }
    }
}
