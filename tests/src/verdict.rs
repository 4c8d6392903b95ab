//! What a check found.

use std::fmt;

use broker_core::{Error, ErrorKind};

/// How a check ended that found nothing wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The contract was kept.
    Passed,
    /// The broker cannot do this, says so (in its [`Capabilities`](broker_core::Capabilities), or by
    /// running in this process), and was seen to refuse it with the typed error.
    Declared(String),
    /// The harness cannot bring about what the check needs, so that nothing was learned.
    NoControl(String),
}

/// What a check found wrong: a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed(pub String);

/// What a step of a check returns.
pub type Attempt<T = ()> = Result<T, Failed>;

/// What a check returns.
pub type Verdict = Attempt<Shown>;

/// The verdict of a check that found the contract kept.
pub const PASSED: Verdict = Ok(Shown::Passed);

impl Failed {
    /// Puts what was being done before the sentence.
    #[must_use]
    pub fn context(self, what: impl fmt::Display) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failed {}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(format!("unexpected error: {error}"))
    }
}

/// Checks that `result` is an error of one of `kinds`, and returns it.
///
/// # Errors
///
/// If it is `Ok`, or an error of another kind.
pub fn refused<T>(what: &str, result: broker_core::Result<T>, kinds: &[ErrorKind]) -> Attempt<Error> {
    let wanted = || kinds.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(" or ");
    match result {
        Ok(_) => Err(Failed(format!("{what} succeeded; it should have been refused as {}", wanted()))),
        Err(error) if kinds.contains(&error.kind()) => Ok(error),
        Err(error) => Err(Failed(format!("{what} was refused as {:?}, not as {}: {error}", error.kind(), wanted()))),
    }
}

/// Returns a [`Failed`] from the check unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err($crate::Failed(format!($($sentence)+)));
        }
    };
}
