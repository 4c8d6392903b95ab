//! A message as HTTP headers and a body that is its payload: CloudEvents binary mode, and the
//! plain form.

use std::borrow::Cow;
use std::fmt::Display;

use broker_core::{Error, Message, Result, Topic};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::attributes::{self, DEFAULT_SOURCE, Plan, as_partition_key, check_uri, is_uri};
use super::draft::Draft;
use super::format::Format;
pub use super::trace::{take_trace_context, trace_context};
use super::{Decoded, Envelope, Options, percent};

/// How a message becomes headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As a CloudEvent, with what CloudEvents cannot say beside it.
    Binary,
    /// Without CloudEvents: what is not the payload is in `broker-` headers.
    Raw,
}

// Names parsed once and not for every push.
const ID: HeaderName = HeaderName::from_static("broker-id");
const TIME: HeaderName = HeaderName::from_static("broker-time");
const TOMBSTONE: HeaderName = HeaderName::from_static("broker-tombstone");
const DELAY: HeaderName = HeaderName::from_static("broker-delay");
const TTL: HeaderName = HeaderName::from_static("broker-ttl");
const DEDUP: HeaderName = HeaderName::from_static("broker-dedup");
const CE_SPECVERSION: HeaderName = HeaderName::from_static("ce-specversion");
const CE_ID: HeaderName = HeaderName::from_static("ce-id");
const CE_SOURCE: HeaderName = HeaderName::from_static("ce-source");
const CE_TYPE: HeaderName = HeaderName::from_static("ce-type");
const CE_TIME: HeaderName = HeaderName::from_static("ce-time");
const CE_PARTITIONKEY: HeaderName = HeaderName::from_static("ce-partitionkey");
const TOPIC: HeaderName = HeaderName::from_static("broker-topic");
const SUBSCRIPTION: HeaderName = HeaderName::from_static("broker-subscription");
const ATTEMPT: HeaderName = HeaderName::from_static("broker-attempt");
const KEY: HeaderName = HeaderName::from_static("broker-key");

/// Headers a message may take for [`fits`]; servers take a hundred or so in all.
const MAX_FIELDS: usize = 48;
/// Bytes of them; servers take 8 KiB and more.
const MAX_BYTES: usize = 6 << 10;

/// Writes the headers of a request; its body is what is returned, the payload, not copied.
///
/// The W3C trace context, if the message has one, is also written as `traceparent` and
/// `tracestate`. Whoever reads this takes a payload that is itself of a CloudEvents type (`application/cloudevents…`) for
/// the event, so that such a message goes as [JSON](super::json); see [`fits`].
pub fn encode(envelope: Envelope<'_>, mode: Mode, headers: &mut HeaderMap) -> Bytes {
    encode_route(envelope.topic, envelope.subscription, mode, headers);
    encode_message(envelope, mode, headers)
}

/// Writes what [`encode`] does for every message of `topic` that goes to `subscription`.
pub(crate) fn encode_route(topic: &Topic, subscription: Option<&str>, mode: Mode, headers: &mut HeaderMap) {
    if mode == Mode::Binary {
        headers.insert(CE_SPECVERSION, HeaderValue::from_static("1.0"));
        headers.insert(CE_SOURCE, text(format_args!("{DEFAULT_SOURCE}{topic}")));
        headers.insert(CE_TYPE, percent::encode_value(topic.as_str().as_bytes()));
    }
    describe_route(topic, subscription, headers);
}

/// Writes the rest of what [`encode`] does, over the headers of its route.
pub(crate) fn encode_message(envelope: Envelope<'_>, mode: Mode, headers: &mut HeaderMap) -> Bytes {
    let Envelope { topic, message, .. } = envelope;
    let plan = (mode == Mode::Binary).then(|| Plan::of(topic, message));
    match &plan {
        Some(plan) => encode_event(message, plan, headers),
        None => {
            headers.insert(ID, text(message.id()));
            headers.insert(TIME, text(message.timestamp()));
        }
    }
    if let Some(content_type) = message.content_type().and_then(|text| HeaderValue::from_str(text).ok()) {
        headers.insert(CONTENT_TYPE, content_type);
    }
    describe_delivery(envelope, headers);
    match &plan {
        Some(plan) => plan.listed.iter().for_each(|(name, value)| push_header(headers, name, value)),
        None => message.headers().iter().for_each(|(name, value)| push_header(headers, name, value)),
    }
    for (name, value) in trace_context(message) {
        headers.insert(name, value);
    }
    if message.is_tombstone() {
        headers.insert(TOMBSTONE, HeaderValue::from_static("true"));
    }
    if let Some(time) = message.deliver_at() {
        headers.insert(DELAY, text(time));
    }
    if let Some(time) = message.expires_at() {
        headers.insert(TTL, text(time));
    }
    if let Some(dedup) = message.dedup_key() {
        headers.insert(DEDUP, text(dedup));
    }
    Bytes::clone(message.payload())
}

fn encode_event(message: &Message, plan: &Plan<'_>, headers: &mut HeaderMap) {
    headers.insert(CE_ID, text(message.id()));
    if !plan.has(attributes::TIME) {
        headers.insert(CE_TIME, text(message.timestamp()));
    }
    for (name, value) in &plan.attributes {
        if let Ok(name) = HeaderName::try_from(format!("ce-{name}")) {
            headers.insert(name, percent::encode_value(value.as_bytes()));
        }
    }
    if let Some(key) = message.key().and_then(as_partition_key) {
        headers.insert(CE_PARTITIONKEY, percent::encode_value(key.as_bytes()));
    }
}

/// Writes what a structured event's request says in headers too: topic, subscription, attempt, key
/// and message headers. The event itself says all of it, so that message headers are left out where
/// they are too many or too long for a server.
pub fn describe(envelope: Envelope<'_>, headers: &mut HeaderMap) {
    describe_route(envelope.topic, envelope.subscription, headers);
    describe_delivery(envelope, headers);
    if fits_headers(envelope.message) {
        envelope.message.headers().iter().for_each(|(name, value)| push_header(headers, name, value));
    }
    for (name, value) in trace_context(envelope.message) {
        headers.insert(name, value);
    }
}

fn describe_route(topic: &Topic, subscription: Option<&str>, headers: &mut HeaderMap) {
    headers.insert(TOPIC, percent::encode_value(topic.as_str().as_bytes()));
    if let Some(subscription) = subscription {
        headers.insert(SUBSCRIPTION, percent::encode_value(subscription.as_bytes()));
    }
}

fn describe_delivery(envelope: Envelope<'_>, headers: &mut HeaderMap) {
    if let Some(attempt) = envelope.attempt {
        headers.insert(ATTEMPT, if attempt == 1 { HeaderValue::from_static("1") } else { HeaderValue::from(attempt) });
    }
    if let Some(key) = envelope.message.key() {
        headers.insert(KEY, percent::encode_value(key));
    }
}

fn push_header(headers: &mut HeaderMap, name: &broker_core::HeaderName, value: &[u8]) {
    // An encoded name is a token, so that this cannot fail.
    if let Ok(name) = HeaderName::try_from(format!("broker-header-{}", percent::encode_name(name.as_str()))) {
        headers.append(name, percent::encode_value(value));
    }
}

fn text(value: impl Display) -> HeaderValue {
    percent::encode_display(value)
}

/// Whether the plain form says all of this message to every server: it has no name that repeats
/// after another, few and short headers, and a content type that is not one of the other
/// [formats](Format). What does not fit goes as [JSON](super::json).
pub fn fits(message: &Message) -> bool {
    let taken = message.content_type().is_some_and(Format::is_taken);
    let key = message.key().map_or(0, |key| percent::encoded_len(key));
    !taken && key <= MAX_BYTES && fits_headers(message)
}

fn fits_headers(message: &Message) -> bool {
    let headers = message.headers();
    let bytes = || -> usize {
        headers.iter().map(|(name, value)| 16 + 3 * name.as_str().len() + percent::encoded_len(value)).sum()
    };
    headers.len() <= MAX_FIELDS && headers.size() <= MAX_BYTES && bytes() <= MAX_BYTES && keeps_order(message)
}

fn keeps_order(message: &Message) -> bool {
    let names = || message.headers().iter().map(|(name, _)| name);
    names()
        .zip(names().skip(1))
        .enumerate()
        .all(|(index, (name, next))| name == next || !names().take(index).any(|n| n == next))
}

/// Reads a message from a request: a CloudEvent in binary mode if it says `ce-specversion`, a plain
/// message otherwise. `on` is the topic it is published to, if it is on its way to the broker.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid), naming the header.
///
/// ```
/// use broker_http::event::{Options, binary};
/// use http::HeaderMap;
///
/// let mut headers = HeaderMap::new();
/// for (name, value) in [("ce-specversion", "1.0"), ("ce-id", "7"), ("ce-source", "/shop"), ("ce-type", "sold")] {
///     headers.insert(name, value.parse().unwrap());
/// }
/// let decoded = binary::decode(&headers, &Options::default(), "42".into(), None)?;
/// assert_eq!(decoded.message.id().to_string(), "7");
/// assert_eq!(decoded.message.headers().get_str("ce-type"), Some("sold"));
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn decode(headers: &HeaderMap, options: &Options, body: Bytes, on: Option<&Topic>) -> Result<Decoded> {
    let mut draft = Draft::default();
    let mut first = None;
    for (name, value) in headers {
        let Some(attribute) = name.as_str().strip_prefix("ce-") else { continue };
        first = first.or(Some(name));
        let value =
            read_attribute(attribute, value).map_err(|why| Error::invalid(format!("attribute {attribute}: {why}")))?;
        draft.set(Cow::Borrowed(attribute), value)?;
    }
    match first {
        Some(name) if !headers.contains_key("ce-specversion") => {
            return Err(Error::invalid(format!(
                "header {name}: it makes this a CloudEvent, and then ce-specversion: 1.0 is missing"
            )));
        }
        Some(_) => draft.check_complete()?,
        None => {}
    }
    if let Some(content_type) = headers.get(CONTENT_TYPE) {
        let content_type = content_type
            .to_str()
            .map_err(|_| Error::invalid("header content-type: it has 1 to 255 printable ASCII characters"))?;
        // An empty field says as much as none.
        if !content_type.is_empty() {
            draft.set_content_type(Cow::Borrowed(content_type))?;
        }
    }
    draft.merge(options)?;
    let mut decoded = draft.finish(body, on)?;
    take_trace_context(headers, &mut decoded.message)?;
    Ok(decoded)
}

fn read_attribute<'a>(name: &str, value: &'a HeaderValue) -> Result<Cow<'a, str>, &'static str> {
    let not_utf8 = "what it decodes to is not UTF-8";
    let decoded = match percent::decode_value(value.as_bytes())? {
        Cow::Borrowed(bytes) => std::str::from_utf8(bytes).map(Cow::Borrowed).map_err(|_| not_utf8),
        Cow::Owned(bytes) => String::from_utf8(bytes).map(Cow::Owned).map_err(|_| not_utf8),
    };
    if is_uri(name) && !decoded.as_ref().is_ok_and(|decoded| check_uri(name, decoded).is_ok()) {
        // Of some SDKs, which encode no percent sign, `/a%20b` is what was meant: encoded as it is to be it would be
        // `/a%2520b`, and a URI with a space there is none.
        let as_sent = value.to_str().ok().filter(|text| check_uri(name, text).is_ok());
        return as_sent.map_or(decoded, |text| Ok(Cow::Borrowed(text)));
    }
    decoded
}
