//! Whether an endpoint wants to be pushed to: the handshake of CloudEvents' "HTTP 1.1 Web Hooks for
//! Event Delivery" 1.0, section 4.
//!
//! Anybody can name an endpoint that is not theirs. So the endpoint is asked first, by `OPTIONS` with
//! `WebHook-Request-Origin`, and consents by naming that origin in `WebHook-Allowed-Origin`. No status
//! is consent, since many servers answer `OPTIONS` whatever it is about.

use std::time::Duration;

use broker_core::{Error, Result};
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::client::PushClient;
use super::connection::{Broken, Route};
use super::encode::Encoder;
use super::target::Target;
use crate::SubscriptionSpec;

pub(crate) const REQUEST_ORIGIN: HeaderName = HeaderName::from_static("webhook-request-origin");
pub(crate) const REQUEST_CALLBACK: HeaderName = HeaderName::from_static("webhook-request-callback");
pub(crate) const REQUEST_RATE: HeaderName = HeaderName::from_static("webhook-request-rate");
pub(crate) const ALLOWED_ORIGIN: HeaderName = HeaderName::from_static("webhook-allowed-origin");
pub(crate) const ALLOWED_RATE: HeaderName = HeaderName::from_static("webhook-allowed-rate");

/// How long an endpoint may take to answer, unless a push may take less.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an endpoint says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Said {
    /// It wants pushes, so many requests a second if it says so.
    Yes(Option<f64>),
    /// Nothing; it may consent at the callback.
    Nothing,
}

/// Asks the endpoint of `spec`, which may consent later at the URL `callback`, if there is one.
///
/// # Errors
///
/// [`Unauthorized`](broker_core::ErrorKind::Unauthorized) if it does not consent,
/// [`Backend`](broker_core::ErrorKind::Backend) if it gives no answer.
pub(crate) async fn ask(
    client: &PushClient,
    spec: &SubscriptionSpec,
    origin: &HeaderValue,
    callback: Option<&HeaderValue>,
) -> Result<Said> {
    let Some(endpoint) = &spec.endpoint else { return Ok(Said::Yes(None)) };
    let silent = |why: &str| Error::backend(format!("endpoint: it was asked whether it wants pushes: {why}"));
    let route = Route::new(client.for_spec(spec)?, Target::new(endpoint)?.with_h2(spec.http2));
    let mut request = Encoder::new(spec, client.outgoing())?.bare(Method::OPTIONS);
    request.headers.insert(REQUEST_ORIGIN, origin.clone());
    if let Some(url) = callback {
        let mut url = url.clone();
        url.set_sensitive(true);
        request.headers.insert(REQUEST_CALLBACK, url);
    }
    if let Some(rate) = spec.rate_limit {
        // Requests a minute, a whole number above zero.
        let per_minute = HeaderValue::from((rate * 60.0).ceil() as u64);
        request.headers.insert(REQUEST_RATE, per_minute);
    }
    let asking = async {
        let mut connection = route.open(client.place().await).await?;
        connection.exchange(request, &route).await.map_err(|broken| match broken {
            Broken::Failed(why) => why,
            Broken::Unseen | Broken::Stale => "connection closed without an answer".to_owned(),
        })
    };
    let answer = match tokio::time::timeout(PATIENCE.min(spec.timeout), asking).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(why)) => return Err(silent(&why)),
        Err(_) => return Err(silent("no answer in time")),
    };
    if callback.is_some() && !answer.headers.contains_key(ALLOWED_ORIGIN) {
        return Ok(Said::Nothing);
    }
    if !(200..=299).contains(&answer.status) {
        // Whatever a proxy or a framework adds to a refusal is no consent.
        return Err(Error::unauthorized(format!(
            "endpoint: it does not consent to pushes from {}: it answered OPTIONS with {}; it is to answer 200 with WebHook-Allowed-Origin",
            origin.to_str().unwrap_or_default(),
            answer.status
        )));
    }
    read(&answer.headers, origin).map(Said::Yes).map_err(|why| {
        Error::unauthorized(format!(
            "endpoint: it does not consent to pushes from {}: {why}; it is to answer OPTIONS with WebHook-Allowed-Origin",
            origin.to_str().unwrap_or_default()
        ))
    })
}

/// What an answer consents to.
pub(super) fn read(headers: &HeaderMap, origin: &HeaderValue) -> Result<Option<f64>, String> {
    let allowed =
        headers.get(ALLOWED_ORIGIN).ok_or("its answer has no WebHook-Allowed-Origin")?.as_bytes().trim_ascii();
    if allowed != b"*" && !allowed.eq_ignore_ascii_case(origin.as_bytes()) {
        return Err("its answer allows another origin".to_owned());
    }
    allowed_rate(headers).map_err(str::to_owned)
}

/// The requests a second that are allowed, if there is a bound.
pub(crate) fn allowed_rate(headers: &HeaderMap) -> Result<Option<f64>, &'static str> {
    let rate = headers.get(ALLOWED_RATE).map_or(b"*".as_slice(), |rate| rate.as_bytes().trim_ascii());
    if rate == b"*" {
        return Ok(None);
    }
    match std::str::from_utf8(rate).ok().and_then(|rate| rate.parse::<u32>().ok()) {
        Some(per_minute @ 1..) => Ok(Some(f64::from(per_minute) / 60.0)),
        _ => Err("its WebHook-Allowed-Rate is neither * nor a number of requests a minute"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_origin_consents() {
        let origin = HeaderValue::from_static("broker.example");
        for (allowed, rate, consent) in [
            (Some("broker.example"), None, Ok(None)),
            (Some("Broker.Example"), Some("*"), Ok(None)),
            (Some("*"), Some("120"), Ok(Some(2.0))),
            (Some("*"), Some("1"), Ok(Some(1.0 / 60.0))),
            (None, Some("120"), Err("no WebHook-Allowed-Origin")),
            (Some("other.example"), None, Err("another origin")),
            (Some(""), None, Err("another origin")),
            (Some("*"), Some("0"), Err("Allowed-Rate")),
            (Some("*"), Some("-1"), Err("Allowed-Rate")),
            (Some("*"), Some("many"), Err("Allowed-Rate")),
        ] {
            let headers = [(ALLOWED_ORIGIN, allowed), (ALLOWED_RATE, rate)];
            let headers = headers.into_iter().filter_map(|(name, value)| Some((name, value?.parse().unwrap())));
            match (read(&headers.collect(), &origin), consent) {
                (Ok(read), Ok(expected)) => assert_eq!(read, expected, "{allowed:?} {rate:?}"),
                (Err(why), Err(expected)) => assert!(why.contains(expected), "{why}"),
                (read, _) => panic!("{allowed:?} {rate:?}: {read:?}"),
            }
        }
    }
}
