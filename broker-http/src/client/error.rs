//! From what the daemon answers to the contract's errors.

use std::time::{Duration, SystemTime};

use broker_core::{Error, ErrorKind};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use crate::retry_after::{MAX_RETRY_AFTER, retry_after};

/// Problem details (RFC 9457), as far as we read them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Problem {
    status: Option<u16>,
    title: Option<String>,
    detail: Option<String>,
    /// Ours: the kind of the contract's error.
    kind: Option<String>,
    /// Ours, in the results of a batch: seconds.
    retry_after: Option<f64>,
}

impl Problem {
    /// The error of one message of a batch.
    pub(super) fn into_error(self) -> Error {
        let status = self.status.and_then(|status| StatusCode::from_u16(status).ok());
        let retry_after = self.retry_after.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        self.error(status.unwrap_or(StatusCode::BAD_GATEWAY), retry_after)
    }

    fn error(self, status: StatusCode, retry_after: Option<Duration>) -> Error {
        let kind = self.kind.as_deref().and_then(kind_called).unwrap_or(kind_of(status));
        // The daemon is closing; we are not.
        let kind = if kind == ErrorKind::Closed { ErrorKind::Unavailable } else { kind };
        let text = self.detail.or(self.title).unwrap_or_else(|| format!("the daemon answered {status}"));
        let error = Error::new(kind, text);
        match retry_after {
            Some(after) if error.is_retryable() => error.with_retry_after(after.min(MAX_RETRY_AFTER)),
            _ => error,
        }
    }
}

/// The error of an answer that is none of the expected.
pub(super) fn refused(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
    // What is no problem document still has its status.
    let problem = serde_json::from_slice::<Problem>(body).unwrap_or_default();
    problem.error(status, retry_after(headers, SystemTime::now))
}

/// The table of the HTTP interface, read backwards.
fn kind_of(status: StatusCode) -> ErrorKind {
    match status.as_u16() {
        400 => ErrorKind::Invalid,
        401 | 403 => ErrorKind::Unauthorized,
        404 => ErrorKind::NotFound,
        409 | 412 => ErrorKind::Conflict,
        413 => ErrorKind::TooLarge,
        422 => ErrorKind::Unroutable,
        408 | 504 => ErrorKind::Timeout,
        429 | 503 => ErrorKind::Unavailable,
        501 => ErrorKind::Unsupported,
        // A gateway in between, or something that is no daemon of ours.
        _ => ErrorKind::Backend,
    }
}

fn kind_called(name: &str) -> Option<ErrorKind> {
    use ErrorKind::*;
    [
        Invalid,
        TooLarge,
        NotFound,
        Conflict,
        Unauthorized,
        Closed,
        Timeout,
        Unavailable,
        Unroutable,
        Unsupported,
        Codec,
        Backend,
    ]
    .into_iter()
    .find(|kind| kind.as_str() == name)
}

#[cfg(test)]
mod tests {
    use http::header::RETRY_AFTER;

    use super::*;

    fn error(status: u16, retry_after: Option<&str>, body: &str) -> Error {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, value.parse().unwrap());
        }
        refused(StatusCode::from_u16(status).unwrap(), &headers, body.as_bytes())
    }

    #[test]
    fn a_problem_keeps_its_kind_and_its_words() {
        let full = error(503, Some("7"), r#"{"status":503,"kind":"unavailable","detail":"group a@b is full","x":1}"#);
        assert_eq!((full.kind(), full.message()), (ErrorKind::Unavailable, "group a@b is full"));
        assert_eq!(full.retry_after(), Some(Duration::from_secs(7)));
        // A gateway in between may say it by a date: this one has passed, and that one is far away.
        for (date, wait) in [("Sun, 06 Nov 1994 08:49:37 GMT", 0), ("Sat, 06 Nov 2094 08:49:37 GMT", 3600)] {
            assert_eq!(error(503, Some(date), "<html>").retry_after(), Some(Duration::from_secs(wait)), "{date}");
        }
        assert_eq!(error(400, None, r#"{"kind":"codec","detail":"x"}"#).kind(), ErrorKind::Codec);
        assert_eq!(error(503, None, r#"{"kind":"closed","detail":"x"}"#).kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn what_is_no_problem_still_has_its_status() {
        for (status, kind) in [
            (400, ErrorKind::Invalid),
            (401, ErrorKind::Unauthorized),
            (403, ErrorKind::Unauthorized),
            (404, ErrorKind::NotFound),
            (409, ErrorKind::Conflict),
            (413, ErrorKind::TooLarge),
            (422, ErrorKind::Unroutable),
            (429, ErrorKind::Unavailable),
            (431, ErrorKind::Backend),
            (500, ErrorKind::Backend),
            (501, ErrorKind::Unsupported),
            (502, ErrorKind::Backend),
            (503, ErrorKind::Unavailable),
            (504, ErrorKind::Timeout),
            (302, ErrorKind::Backend),
        ] {
            let error = error(status, Some("soon"), "<html>");
            assert_eq!(error.kind(), kind, "{status}");
            assert!(error.message().contains(&status.to_string()), "{error}");
            assert_eq!(error.retry_after(), None);
        }
    }

    #[test]
    fn words_from_outside_are_bounded_and_one_line() {
        let body = format!(r#"{{"detail":"a\r\nb{}"}}"#, "x".repeat(5_000));
        let error = error(400, None, &body);
        assert!(error.message().starts_with("a  b") && error.message().len() <= 1_024);
    }
}
