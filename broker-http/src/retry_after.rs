//! `Retry-After` (RFC 9110, section 10.2.3): how long an answer asks to wait.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::RETRY_AFTER;

/// The longest wait that is believed.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The wait that these headers ask for. `now` is asked where it is a date; what is neither that nor seconds is ignored, what
/// is longer than [`MAX_RETRY_AFTER`] is cut.
pub(crate) fn retry_after(headers: &HeaderMap, now: fn() -> SystemTime) -> Option<Duration> {
    headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(|text| read(text, now))
}

fn read(text: &str, now: fn() -> SystemTime) -> Option<Duration> {
    let text = text.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are a long time.
        text.parse().map_or(MAX_RETRY_AFTER, Duration::from_secs)
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now()).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_seconds_or_a_date_and_bounded() {
        let now = || SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, wait) in [
            ("5", Some(5)),
            (" 5 ", Some(5)),
            ("0", Some(0)),
            ("+60", None),
            ("3601", Some(3600)),
            ("99999999999999999999999999", Some(3600)),
            ("Sun, 06 Nov 1994 08:49:42 GMT", Some(5)),
            ("Sun, 06 Nov 1994 08:49:30 GMT", Some(0)),
            ("Sunday, 06-Nov-94 08:49:42 GMT", Some(5)),
            ("Sat, 06 Nov 2094 08:49:42 GMT", Some(3600)),
            ("", None),
            ("-5", None),
            ("5.5", None),
            ("soon", None),
            ("Sun, 99 Nov 1994", None),
        ] {
            assert_eq!(read(text, now), wait.map(Duration::from_secs), "{text:?}");
        }
    }
}
