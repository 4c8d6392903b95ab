//! CloudEvents in JSON: structured mode and batches.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Message, Result, Topic};
use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::attributes::{Plan, TIME, as_partition_key, default_source};
use super::draft::{Draft, read_base64};
use super::format::{charset, essence};
use super::{Decoded, Envelope, Options};

/// Appends one event as a JSON object.
///
/// A JSON payload stands in `data` as it is, byte for byte, unless white space around it or a
/// carriage return in it would get lost on the way, or it is nested more than 120 deep or has a number
/// that no double holds, which parsers refuse; text stands in `data` as a string; everything
/// else is in `data_base64`. So the object has no carriage return, and has line feeds only where a
/// JSON payload has them.
///
/// ```
/// use broker_core::{Message, Topic};
/// use broker_http::event::{Envelope, json};
///
/// let topic = Topic::new("orders.created")?;
/// let message = Message::new(r#"{"id": 42}"#).with_content_type("application/json")?.with_key("7");
/// let mut out = Vec::new();
/// json::encode(Envelope::new(&topic, &message), &mut out);
/// let text = String::from_utf8_lossy(&out);
/// assert!(text.contains(r#""data":{"id": 42}"#) && text.contains(r#""partitionkey":"7""#), "{text}");
/// assert_eq!(json::decode(&out, &Default::default(), None)?.message, message);
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn encode(envelope: Envelope<'_>, out: &mut Vec<u8>) {
    let Envelope { topic, message, subscription, attempt } = envelope;
    let plan = Plan::of(topic, message);
    out.extend_from_slice(br#"{"specversion":"1.0""#);
    let mut object = Members(out);
    object.display("id", message.id());
    if !plan.has("source") {
        object.display("source", default_source(topic));
    }
    if !plan.has("type") {
        object.display("type", topic);
    }
    if !plan.has(TIME) {
        object.display(TIME, message.timestamp());
    }
    if let Some(content_type) = message.content_type() {
        object.value("datacontenttype", content_type);
    }
    match message.key().map(|key| (key, as_partition_key(key))) {
        Some((_, Some(text))) => object.value("partitionkey", text),
        Some((key, None)) => object.value("brokerkey", &STANDARD.encode(key)),
        None => {}
    }
    for (name, value) in &plan.attributes {
        object.value(name, *value);
    }
    object.display("brokertopic", topic);
    if let Some(subscription) = subscription {
        object.value("brokersubscription", subscription);
    }
    if let Some(attempt) = attempt {
        // An integer of CloudEvents has 31 bits.
        object.value("brokerattempt", &attempt.min(i32::MAX.unsigned_abs()));
    }
    if let Some(form) = plan.form() {
        object.value("brokerheaders", &form);
    }
    if let Some(time) = message.deliver_at() {
        object.display("brokerdelay", time);
    }
    if let Some(time) = message.expires_at() {
        object.display("brokerttl", time);
    }
    if let Some(dedup) = message.dedup_key() {
        object.value("brokerdedup", dedup);
    }
    if message.is_tombstone() {
        object.value("brokertombstone", &true);
    } else if !message.payload().is_empty() {
        encode_payload(message.content_type(), message.payload(), &mut object);
    }
    out.push(b'}');
}

/// Bytes that a message takes in JSON, about: what is no text is a third longer.
pub(crate) fn about(message: &Message) -> u64 {
    message.size() as u64 * 4 / 3 + 512
}

/// Appends several events as a JSON array.
pub fn encode_batch<'a>(envelopes: impl IntoIterator<Item = Envelope<'a>>, out: &mut Vec<u8>) {
    let mut before = b'[';
    for envelope in envelopes {
        out.push(before);
        encode(envelope, out);
        before = b',';
    }
    if before == b'[' {
        out.push(b'[');
    }
    out.push(b']');
}

fn encode_payload(content_type: Option<&str>, payload: &[u8], object: &mut Members<'_>) {
    match content_type {
        Some(content_type) if is_json(content_type) => {
            let kept = serde_json::from_slice::<&RawValue>(payload)
                .is_ok_and(|json| json.get().len() == payload.len() && !payload.contains(&b'\r'))
                && !is_deep(payload)
                && !is_beyond_doubles(payload);
            if kept {
                return object.raw("data", payload);
            }
        }
        Some(content_type) if is_text(content_type) => {
            // A control character would take six bytes, base64 takes one and a third.
            let plain = |text: &&str| !text.bytes().any(|byte| byte < b' ' && byte != b'\n' && byte != b'\t');
            if let Some(text) = std::str::from_utf8(payload).ok().filter(plain) {
                return object.value("data", text);
            }
        }
        _ => {}
    }
    object.value("data_base64", &STANDARD.encode(payload));
}

/// Levels of a JSON payload up to which it is embedded: with the few around it a whole answer stays
/// within the 128 that many parsers read at most (serde_json among them), and one payload makes nobody's
/// pull unreadable.
const MAX_DEPTH: usize = 120;

/// Whether well-formed JSON is nested deeper than that.
fn is_deep(json: &[u8]) -> bool {
    // Most has not even so many brackets.
    if memchr::memchr2_iter(b'[', b'{', json).nth(MAX_DEPTH).is_none() {
        return false;
    }
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => depth += 1,
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return true;
        }
    }
    false
}

/// Whether well-formed JSON has a number that is infinite as a double, as `1e999` is. There are readers that take nothing
/// of an array in which there is one (Go's `encoding/json` among them).
fn is_beyond_doubles(json: &[u8]) -> bool {
    let digits = |some: &[u8]| some.iter().all(u8::is_ascii_digit);
    let large = |at: usize| {
        let exponent = json.get(at + 1..).unwrap_or_default();
        exponent.strip_prefix(b"+").unwrap_or(exponent).first_chunk::<3>().is_some_and(|some| digits(some))
    };
    // With two digits of exponent it takes two hundred before that, which have half as many in their middle, wherever they
    // begin.
    let suspect = memchr::memchr2_iter(b'e', b'E', json).any(large) || json.chunks_exact(100).any(digits);
    if !suspect {
        return false;
    }
    // It may be text.
    let (mut in_text, mut escaped) = (false, false);
    let outside = |byte: &u8| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            _ => {}
        }
        if in_text { b' ' } else { *byte }
    };
    let bare: Vec<u8> = json.iter().map(outside).collect();
    let numbers = bare.split(|byte| !matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'));
    numbers.filter_map(|number| std::str::from_utf8(number).ok()?.parse::<f64>().ok()).any(f64::is_infinite)
}

/// A media type that is JSON: `*/json` or `*/*+json` (JSON event format, section 3.1.1).
fn is_json(content_type: &str) -> bool {
    let essence = essence(content_type).to_ascii_lowercase();
    essence.ends_with("/json") || essence.ends_with("+json")
}

/// A media type whose payload people read, in UTF-8.
fn is_text(content_type: &str) -> bool {
    let essence = essence(content_type).to_ascii_lowercase();
    let readable = essence.starts_with("text/") || essence == "application/xml" || essence.ends_with("+xml");
    readable && charset(content_type).is_none_or(|charset| charset.eq_ignore_ascii_case("utf-8"))
}

/// Members of an object after the first.
struct Members<'a>(&'a mut Vec<u8>);

impl Members<'_> {
    fn name(&mut self, name: &str) {
        self.0.extend_from_slice(b",\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
    }

    fn value<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) {
        self.name(name);
        // Neither writing to memory nor these types can fail.
        let _ = serde_json::to_writer(&mut *self.0, value);
    }

    fn display(&mut self, name: &str, value: impl fmt::Display) {
        self.value(name, &value.to_string());
    }

    fn raw(&mut self, name: &str, json: &[u8]) {
        self.name(name);
        self.0.extend_from_slice(json);
    }
}

/// Reads one event. `on` is the topic it is published to, if it is on its way to the broker.
///
/// JSON data is kept byte for byte.
///
/// # Errors
///
/// [`Codec`](broker_core::ErrorKind::Codec) for what is no JSON object,
/// [`Invalid`](broker_core::ErrorKind::Invalid) naming the attribute that is missing or wrong.
pub fn decode(json: &[u8], options: &Options, on: Option<&Topic>) -> Result<Decoded> {
    let event: Event<'_> = serde_json::from_slice(json)
        .map_err(|error| Error::codec(format!("the event is not one JSON object: {error}")))?;
    event.decode(options, on)
}

/// Reads a batch of events; one result per event, in order.
///
/// # Errors
///
/// [`Codec`](broker_core::ErrorKind::Codec) for what is no JSON array of objects.
pub fn decode_batch(json: &[u8], options: &Options, on: Option<&Topic>) -> Result<Vec<Result<Decoded>>> {
    decode_batch_of(json, options, on, usize::MAX).map(Option::unwrap_or_default)
}

/// The same, or `None` if there are more than `max` events: each takes some hundred bytes beside the two that it may
/// be written in.
pub(crate) fn decode_batch_of(
    json: &[u8],
    options: &Options,
    on: Option<&Topic>,
    max: usize,
) -> Result<Option<Vec<Result<Decoded>>>> {
    options.check_many()?;
    let mut reader = serde_json::Deserializer::from_slice(json);
    let events = AtMost(max)
        .deserialize(&mut reader)
        .and_then(|events| reader.end().map(|()| events))
        .map_err(|error| Error::codec(format!("the batch is not a JSON array of events: {error}")))?;
    let Some(events) = events else { return Ok(None) };
    let decoded = events
        .into_iter()
        .enumerate()
        .map(|(index, event)| event.decode(options, on).map_err(|error| error.context(format!("event {index}"))))
        .collect();
    Ok(Some(decoded))
}

/// An array of so many events at most; of a longer one none is kept.
struct AtMost(usize);

impl<'de> DeserializeSeed<'de> for AtMost {
    type Value = Option<Vec<Event<'de>>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for AtMost {
    type Value = Option<Vec<Event<'de>>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        let mut events = Vec::new();
        while let Some(event) = array.next_element()? {
            if events.len() == self.0 {
                drop(events);
                while array.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(None);
            }
            events.push(event);
        }
        Ok(Some(events))
    }
}

/// The members of an event, in order, their values not yet read.
struct Event<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Event<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Event<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CloudEvent: an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(12);
                while let Some(Text(name)) = map.next_key()? {
                    members.push((name, map.next_value()?));
                }
                Ok(Event(members))
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// A string, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Event<'a> {
    fn decode(self, options: &Options, on: Option<&Topic>) -> Result<Decoded> {
        let mut draft = Draft::default();
        let (mut data, mut base64) = (None, None);
        for (name, value) in self.0 {
            let twice = match &*name {
                "data" => data.replace(value).is_some(),
                "data_base64" if value.get() == "null" => false,
                "data_base64" => base64.replace(value).is_some(),
                _ => {
                    if let Some(text) = read_attribute(&name, value)? {
                        draft.set(name, text)?;
                    }
                    continue;
                }
            };
            if twice {
                return Err(Error::invalid(format!("member {name}: it is given twice")));
            }
        }
        draft.check_complete()?;
        let payload = match (data, base64) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid("member data: an event has data or data_base64, not both"));
            }
            (None, None) => Bytes::new(),
            (None, Some(value)) => read_text(value)
                .ok_or_else(|| Error::invalid("a string is expected"))
                .and_then(|text| read_base64(&text))
                .map_err(|error| Error::invalid(format!("member data_base64: {}", error.message())))?
                .into(),
            (Some(value), None) => read_data(&mut draft, value)?,
        };
        draft.merge(options)?;
        draft.finish(payload, on)
    }
}

/// `data`: JSON as it is written, or the text of a string if the content type is not JSON (JSON
/// event format, section 3.1.2).
fn read_data(draft: &mut Draft<'_>, value: &RawValue) -> Result<Bytes> {
    match draft.content_type() {
        None => draft.set_content_type(Cow::Borrowed("application/json"))?,
        Some(content_type) if is_json(content_type) => {}
        Some(content_type) => {
            return read_text(value).map(|text| Bytes::from(text.into_owned())).ok_or_else(|| {
                Error::invalid(format!(
                    "member data: datacontenttype is {content_type:?}, and then a string is expected; use data_base64 for other bytes"
                ))
            });
        }
    }
    Ok(Bytes::copy_from_slice(value.get().as_bytes()))
}

fn read_text(value: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::from_str::<Text<'_>>(value.get()).ok().map(|Text(text)| text)
}

/// The canonical string of an attribute's value; none for null, which is the same as leaving it
/// out.
fn read_attribute<'a>(name: &str, value: &'a RawValue) -> Result<Option<Cow<'a, str>>> {
    let json = value.get();
    match json.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b't' | b'f') => Ok(Some(Cow::Borrowed(json))),
        Some(b'"') => match read_text(value) {
            Some(text) => Ok(Some(text)),
            None => Err(Error::invalid(format!("attribute {name}: its string is not well formed"))),
        },
        Some(b'-' | b'0'..=b'9') if json.parse::<i32>().is_ok() => Ok(Some(Cow::Borrowed(json))),
        _ => Err(Error::invalid(format!(
            "attribute {name}: its value is a string, a boolean or an integer of 32 bits; everything else belongs into data"
        ))),
    }
}
