//! What is answered to a push that is not taken.

use std::fmt;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use broker_core::{Error, ErrorKind};
use http::StatusCode;

use crate::server::problem::Problem;

/// Why a push is not taken; as an answer it is `application/problem+json`.
///
/// Our engine retries all of these but 400 and 413, which are dead letters at once: what is malformed
/// stays so.
#[derive(Clone, Debug)]
pub struct Refused(Problem);

impl Refused {
    pub(super) fn malformed(detail: impl Into<String>) -> Self {
        Self(Problem::invalid(detail))
    }

    pub(super) fn too_large(max: usize) -> Self {
        Self(Problem::too_large(format!("the body is over the limit of {max} bytes")))
    }

    pub(super) fn too_slow() -> Self {
        Self(Problem::new(StatusCode::REQUEST_TIMEOUT, ErrorKind::Timeout, "the body did not arrive in time"))
    }

    /// It is here a second time. A retry made within the same second is signed alike: it is to come
    /// again when it no longer is.
    pub(super) fn repeated() -> Self {
        let problem = Problem::conflict("this push was here already, and what became of it is not known");
        Self(problem.retry_after(Duration::from_secs(2)))
    }

    /// The status it is answered with.
    pub fn status(&self) -> StatusCode {
        self.0.status()
    }
}

/// By its kind; what is not verified is 401.
impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self(Problem::from(error))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.detail())
    }
}

impl std::error::Error for Refused {}
