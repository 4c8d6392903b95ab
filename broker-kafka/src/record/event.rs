//! CloudEvents' Kafka protocol binding, version 1.0.2.
//!
//! Written in binary mode (section 3.2): the payload is the value, attributes are headers `ce_NAME`,
//! `datacontenttype` is `content-type`, the key is the record's (section 3.1). Which attributes a message
//! has is as over HTTP: its id, time, key and content type; its headers called `ce-NAME`; `source` is
//! `/topics/TOPIC` and `type` the topic unless there are such headers. The user's headers follow as they
//! are, so that we read the same message.
//!
//! Others' events are read in binary and in structured mode (section 3.3); their attributes become headers
//! `ce-NAME`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Message, Result, Topic};
use bytes::Bytes;
use serde_json::value::RawValue;

use super::native::{self, CONTENT_TYPE};
use super::{Field, Writer};

/// Of an attribute as a record's header.
pub(super) const PREFIX: &str = "ce_";
/// Of an attribute as a message's header.
const HEADER: &str = "ce-";
const STRUCTURED: &str = "application/cloudevents+json";

/// Parts of the message: no headers of it.
const OWN: [&str; 5] = ["specversion", "id", "time", "datacontenttype", "partitionkey"];

/// The headers of a message as an event.
pub(super) fn headers<H: Writer>(topic: &Topic, message: &Message) -> H {
    let mut out = H::with_capacity(2 * message.headers().len() + 9);
    if let Some(content_type) = message.content_type() {
        out.put(CONTENT_TYPE, content_type.as_bytes());
    }
    out.put("ce_specversion", b"1.0");
    out.put_text("ce_id", message.id());
    let mut has = (false, false);
    for (name, value) in message.headers().iter() {
        let Some((name, value)) = attribute(message, name.as_str(), value) else { continue };
        has = (has.0 || name == "source", has.1 || name == "type");
        out.put(&format!("{PREFIX}{name}"), value.as_bytes());
    }
    if !has.0 {
        out.put("ce_source", format!("/topics/{topic}").as_bytes());
    }
    if !has.1 {
        out.put("ce_type", topic.as_str().as_bytes());
    }
    out.put_text("ce_time", message.timestamp());
    if let Some(key) = message.key().and_then(|key| string(key)).filter(|key| !key.is_empty()) {
        out.put("ce_partitionkey", key.as_bytes());
    }
    native::finish(out, message, None)
}

/// The attribute that a header is: one of a well-formed name, given once, whose value is a `String` of
/// CloudEvents' type system.
fn attribute<'a>(message: &Message, header: &'a str, value: &'a Bytes) -> Option<(&'a str, &'a str)> {
    let name = header.strip_prefix(HEADER).filter(|name| is_name(name) && !OWN.contains(name))?;
    let once = message.headers().get_all(header).nth(1).is_none();
    string(value).filter(|value| once && !value.is_empty()).map(|value| (name, value))
}

/// "Naming Conventions": lower-case letters and digits.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

fn string(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value).ok().filter(|text| !text.chars().any(char::is_control))
}

/// Whether somebody else's record is an event.
pub(super) fn is_event(headers: &[Field<'_>]) -> bool {
    headers.iter().any(|(name, _)| *name == "ce_specversion") || is_structured(headers)
}

fn is_structured(headers: &[Field<'_>]) -> bool {
    let structured = |value: &[u8]| {
        let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default();
        media_type.trim_ascii().eq_ignore_ascii_case(STRUCTURED.as_bytes())
    };
    headers.iter().any(|(name, value)| *name == CONTENT_TYPE && structured(value))
}

/// Reads somebody else's event.
///
/// # Errors
///
/// [`Codec`](broker_core::ErrorKind::Codec) for one that is not complete or not well formed.
pub(super) fn read(message: Message, headers: &[Field<'_>]) -> Result<Message> {
    let mut event = Event::default();
    let structured = is_structured(headers);
    let mut message = message;
    for (name, value) in headers {
        if *name == CONTENT_TYPE {
            if !structured {
                event.content_type = Some(native::text(name, value)?.to_owned());
            }
        } else if let Some(name) = name.strip_prefix(PREFIX).filter(|_| !structured) {
            event.attributes.insert(name.to_owned(), native::text(name, value)?.to_owned());
        } else {
            message.headers_mut().append(name, Bytes::copy_from_slice(value))?;
        }
    }
    if structured {
        let payload = event.read_json(message.payload())?;
        let key = message.key().cloned();
        let (headers, id, time) = (message.headers().clone(), message.id().clone(), message.timestamp());
        message = Message::new(payload).with_headers(headers).with_id(id).with_timestamp(time);
        if let Some(key) = key {
            message = message.with_key(key);
        }
    }
    event.apply(message)
}

/// What an event says beside its data.
#[derive(Default)]
struct Event {
    content_type: Option<String>,
    attributes: BTreeMap<String, String>,
}

impl Event {
    /// Reads the attributes of the JSON format; returns the data.
    fn read_json(&mut self, json: &[u8]) -> Result<Vec<u8>> {
        let members: BTreeMap<String, &RawValue> = serde_json::from_slice(json)
            .map_err(|error| Error::codec(format!("the event is no JSON object: {error}")))?;
        let (mut data, mut base64) = (None, None);
        for (name, value) in members {
            let text = || match serde_json::from_str(value.get()) {
                Ok(serde_json::Value::String(text)) => Some(text),
                Ok(serde_json::Value::Null) => None,
                // Booleans and integers in their canonical string form.
                _ => Some(value.get().to_owned()),
            };
            match name.as_str() {
                "data" => data = Some(value.get()),
                "data_base64" => base64 = text(),
                "datacontenttype" => self.content_type = text(),
                _ => {
                    if let Some(text) = text() {
                        self.attributes.insert(name, text);
                    }
                }
            }
        }
        match (data, base64) {
            (None, None) => Ok(Vec::new()),
            (_, Some(text)) => {
                STANDARD.decode(text).map_err(|_| Error::codec("the event's data_base64 is no base64".to_owned()))
            }
            (Some(data), None) => Ok(match serde_json::from_str(data) {
                // Text that is no JSON stands in a JSON string.
                Ok(serde_json::Value::String(text)) if !self.is_json() => text.into_bytes(),
                _ => data.as_bytes().to_vec(),
            }),
        }
    }

    fn is_json(&self) -> bool {
        let Some(content_type) = &self.content_type else { return true };
        let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        media_type.ends_with("/json") || media_type.ends_with("+json")
    }

    fn apply(mut self, mut message: Message) -> Result<Message> {
        for required in ["specversion", "id", "source", "type"] {
            if self.attributes.get(required).is_none_or(String::is_empty) {
                return Err(Error::codec(format!("the event has no {required}")));
            }
        }
        let version = self.attributes.remove("specversion").unwrap_or_default();
        if !version.starts_with("1.") {
            return Err(Error::codec(format!("the event is of CloudEvents {version:?}; 1.0 is understood")));
        }
        if let Some(id) = self.attributes.remove("id") {
            message = message.with_id(id.parse()?);
        }
        if let Some(time) = self.attributes.remove("time") {
            message = message.with_timestamp(time.parse()?);
        }
        match self.attributes.remove("partitionkey") {
            Some(key) if message.key().is_none() => message = message.with_key(key),
            _ => {}
        }
        if let Some(content_type) = self.content_type {
            message = message.with_content_type(content_type)?;
        }
        for (name, value) in self.attributes {
            message.headers_mut().append(format!("{HEADER}{name}"), value)?;
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_an_event_in_binary_mode() {
        let message = Message::new("{}")
            .with_id("7".parse().unwrap())
            .with_key("customer-7")
            .with_timestamp("2026-11-22T12:00:00.250Z".parse().unwrap())
            .with_content_type("application/json")
            .unwrap()
            .with_header("ce-subject", "42")
            .unwrap()
            .with_header("x", "1")
            .unwrap();
        let headers: Vec<(String, Vec<u8>)> = headers(&Topic::new("orders.created").unwrap(), &message);
        let fields: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value).into_owned())).collect();
        let expected = [
            ("content-type", "application/json"),
            ("ce_specversion", "1.0"),
            ("ce_id", "7"),
            ("ce_subject", "42"),
            ("ce_source", "/topics/orders.created"),
            ("ce_type", "orders.created"),
            ("ce_time", "2026-11-22T12:00:00.250Z"),
            ("ce_partitionkey", "customer-7"),
            ("broker-id", "7"),
            ("ce-subject", "42"),
            ("x", "1"),
        ];
        assert_eq!(fields, expected.map(|(name, value)| (name, value.to_owned())));
    }

    fn binary() -> Vec<Field<'static>> {
        vec![
            ("content-type", b"text/plain"),
            ("ce_specversion", b"1.0"),
            ("ce_id", b"7"),
            ("ce_source", b"/shop"),
            ("ce_type", b"sold"),
            ("ce_time", b"2026-11-22T12:00:00Z"),
            ("ce_partitionkey", b"k"),
            ("x", b"\xff"),
        ]
    }

    #[test]
    fn somebody_elses_event_is_read_in_binary_mode() {
        let message = read(Message::new("42"), &binary()).unwrap();
        assert_eq!((message.id().to_string().as_str(), message.content_type()), ("7", Some("text/plain")));
        assert_eq!(message.key().unwrap(), "k");
        assert_eq!(message.timestamp().to_string(), "2026-11-22T12:00:00.000Z");
        assert_eq!(message.headers().get_str("ce-type"), Some("sold"));
        assert_eq!(message.headers().get("x").unwrap().as_ref(), b"\xff");
    }

    #[test]
    fn somebody_elses_event_is_read_in_structured_mode() {
        let headers: [Field<'_>; 1] = [("content-type", b"application/cloudevents+json; charset=UTF-8")];
        for (data, payload) in [
            (r#""data": {"n": [1,  2]}"#, &br#"{"n": [1,  2]}"#[..]),
            (r#""data_base64": "AP8=""#, b"\x00\xff"),
            (r#""datacontenttype": "text/plain", "data": "4\u00322""#, b"422"),
            (r#""datacontenttype": "application/json", "data": "text""#, br#""text""#),
            (r#""count": 3"#, b""),
        ] {
            let json = format!(r#"{{"specversion": "1.0", "id": "7", "source": "/shop", "type": "sold", {data}}}"#);
            let message = read(Message::new(json).with_key("k"), &headers).unwrap();
            assert_eq!(message.payload().as_ref(), payload, "{data}");
            assert_eq!((message.id().to_string().as_str(), message.key().unwrap().as_ref()), ("7", &b"k"[..]));
            assert_eq!(message.headers().get_str("ce-source"), Some("/shop"));
        }
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for missing in ["ce_id", "ce_source", "ce_type"] {
            let headers: Vec<_> = binary().into_iter().filter(|(name, _)| *name != missing).collect();
            assert!(read(Message::new("42"), &headers).is_err(), "{missing}");
        }
        let headers: [Field<'_>; 1] = [("content-type", b"application/cloudevents+json")];
        for json in ["", "[]", "{}", r#"{"specversion":"2.0","id":"7","source":"/","type":"t"}"#] {
            assert!(read(Message::new(json), &headers).is_err(), "{json}");
        }
    }
}
