//! Errors as clients see them: `application/problem+json` (RFC 9457).

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use broker_core::{Error, ErrorKind};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;

use super::metrics::Refusal;

/// What a handler returns.
pub(crate) type Answer<T = Response> = Result<T, Problem>;

/// An error answer: a status, a sentence that says what is wrong and what is allowed, and the kind
/// of the contract's error, so that a client of ours has the same error as a service inside.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Problem {
    title: &'static str,
    #[serde(serialize_with = "as_number")]
    status: StatusCode,
    detail: String,
    kind: &'static str,
    #[serde(skip)]
    retry_after: Option<Duration>,
    #[serde(skip)]
    close: bool,
    #[serde(skip)]
    headers: Option<Box<HeaderMap>>,
    #[serde(skip)]
    refusal: Option<Refusal>,
}

fn as_number<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

impl Problem {
    /// A problem with a status of its own.
    pub(crate) fn new(status: StatusCode, kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or("Error"),
            status,
            detail: detail.into(),
            kind: kind.as_str(),
            retry_after: None,
            close: false,
            headers: None,
            refusal: None,
        }
    }

    /// Counts the answer as this; without it the status says.
    pub(crate) fn counted(mut self, refusal: Refusal) -> Self {
        self.refusal = Some(refusal);
        self
    }

    /// Headers the answer has besides.
    pub(crate) fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers.get_or_insert_default()
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, ErrorKind::Invalid, detail)
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, ErrorKind::NotFound, detail)
    }

    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, ErrorKind::Conflict, detail)
    }

    pub(crate) fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorKind::TooLarge, detail)
    }

    pub(crate) fn too_many(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, ErrorKind::Unavailable, detail).retry_after(Duration::from_secs(1))
    }

    pub(crate) fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Closed, "the server is shutting down; try another")
            .retry_after(Duration::from_secs(1))
            .counted(Refusal::Draining)
    }

    /// Says when to try again.
    pub(crate) fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Closes the connection after the answer: its request was not read to the end.
    pub(crate) fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// Whether the broker cannot do this at all.
    pub(crate) fn is_unsupported(&self) -> bool {
        self.status == StatusCode::NOT_IMPLEMENTED
    }

    /// What it counts as.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal.or_else(|| Refusal::of(self.status))
    }

    /// Says what it is about.
    pub(crate) fn context(mut self, about: impl std::fmt::Display) -> Self {
        self.detail = format!("{about}: {}", self.detail);
        self
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }
}

/// The table of the HTTP interface.
fn status_of(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Invalid | ErrorKind::Codec => StatusCode::BAD_REQUEST,
        ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unroutable => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Unavailable | ErrorKind::Closed => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        // Whatever else the server behind an adapter says, and kinds yet to come.
        _ => StatusCode::BAD_GATEWAY,
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let mut problem = Self::new(status_of(error.kind()), error.kind(), error.message());
        problem.retry_after = error.retry_after();
        if problem.status == StatusCode::SERVICE_UNAVAILABLE {
            problem.retry_after.get_or_insert(Duration::from_secs(1));
        }
        problem
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        // Numbers and text always serialize.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        if let Some(refusal) = self.refusal() {
            // Counted where the answer leaves.
            response.extensions_mut().insert(refusal);
        }
        if let Some(headers) = self.headers {
            *response.headers_mut() = *headers;
        }
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: a floor stays one.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_status() {
        for (error, status) in [
            (Error::invalid(""), 400),
            (Error::codec(""), 400),
            (Error::unauthorized(""), 401),
            (Error::not_found(""), 404),
            (Error::conflict(""), 409),
            (Error::too_large(""), 413),
            (Error::unroutable(""), 422),
            (Error::unsupported(""), 501),
            (Error::backend(""), 502),
            (Error::unavailable(""), 503),
            (Error::closed(""), 503),
            (Error::timeout(""), 504),
        ] {
            assert_eq!(Problem::from(error).status().as_u16(), status);
        }
    }

    #[test]
    fn a_wait_is_rounded_up() {
        let problem = Problem::from(Error::unavailable("full").with_retry_after(Duration::from_millis(1_200)));
        let response = problem.into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
    }
}
