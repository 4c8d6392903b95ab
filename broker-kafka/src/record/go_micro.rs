//! What Go Micro's Kafka plugin (v5) writes and reads: the record's value is
//! `{"Header":{"Content-Type":"application/json","x-trace":"abc"},"Body":"eyJpZCI6MX0="}`, its key is null,
//! it has no headers.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Message, Result};
use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{Encoded, Field};

/// Where Go Micro has the content type.
const CONTENT_TYPE: &str = "Content-Type";

/// As Go's `encoding/json` writes it: fields in this order, a map's keys sorted.
#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(rename = "Header")]
    header: BTreeMap<&'a str, &'a str>,
    #[serde(rename = "Body")]
    body: String,
}

/// The record of a message.
///
/// # Errors
///
/// [`Unsupported`](broker_core::ErrorKind::Unsupported) for what the format has no place for: a key, a
/// tombstone, an expiry, a header that repeats or is no text.
pub(super) fn encode<H>(message: &Message) -> Result<Encoded<'static, H>> {
    let refuse = |what: String| {
        let why = format!("message {}: it has {what}, which Go Micro's format has no place for", message.id());
        Err(Error::unsupported(why))
    };
    if message.key().is_some() {
        return refuse("a key".to_owned());
    }
    if message.is_tombstone() {
        return refuse("no payload (a tombstone)".to_owned());
    }
    if message.expires_at().is_some() {
        return refuse("an expiry".to_owned());
    }
    let mut header = BTreeMap::new();
    header.extend(message.content_type().map(|content_type| (CONTENT_TYPE, content_type)));
    for (name, value) in message.headers().iter() {
        let name = name.as_str();
        let Ok(value) = std::str::from_utf8(value) else {
            return refuse(format!("a header {name:?} that is not UTF-8"));
        };
        if name == CONTENT_TYPE || header.insert(name, value).is_some() {
            return refuse(format!("a header {name:?} twice, or in the place of the content type"));
        }
    }
    let envelope = Envelope { header, body: STANDARD.encode(message.payload()) };
    let json = serde_json::to_string(&envelope);
    let json = json.map_err(|error| Error::codec("write Go Micro's format").with_source(error))?;
    Ok(Encoded {
        key: None,
        payload: Some(escape_as_go(&json).into_bytes().into()),
        headers: None,
        timestamp: super::field_timestamp(message, None),
    })
}

/// Go escapes what HTML and JavaScript stumble over; in JSON these stand inside strings only.
fn escape_as_go(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for letter in json.chars() {
        match letter {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", u32::from(letter))),
            letter => out.push(letter),
        }
    }
    out
}

/// Reads a record that a Go Micro service wrote. Record headers, if there are any, count over those
/// of the value.
///
/// # Errors
///
/// [`Codec`](broker_core::ErrorKind::Codec) for a value that is not that JSON.
pub(super) fn read(message: Message, headers: &[Field<'_>]) -> Result<Message> {
    let mut header: BTreeMap<String, Bytes> = BTreeMap::new();
    let mut body = Vec::new();
    let members: BTreeMap<String, &RawValue> = serde_json::from_slice(message.payload()).map_err(not_ours)?;
    for (name, value) in members {
        // Go's decoder takes names in any case, and null for nothing.
        if name.eq_ignore_ascii_case("header") {
            let fields: Option<BTreeMap<String, String>> = serde_json::from_str(value.get()).map_err(not_ours)?;
            header.extend(fields.unwrap_or_default().into_iter().map(|(name, value)| (name, value.into())));
        } else if name.eq_ignore_ascii_case("body") {
            let text: Option<String> = serde_json::from_str(value.get()).map_err(not_ours)?;
            let decoded = STANDARD.decode(text.unwrap_or_default());
            body = decoded.map_err(|_| Error::codec("Go Micro's Body is no base64"))?;
        }
    }
    header.extend(headers.iter().map(|(name, value)| ((*name).to_owned(), Bytes::copy_from_slice(value))));
    let (id, time, key) = (message.id().clone(), message.timestamp(), message.key().cloned());
    let mut read = Message::new(body).with_id(id).with_timestamp(time);
    if let Some(key) = key {
        read = read.with_key(key);
    }
    if let Some(content_type) = header.remove(CONTENT_TYPE).as_deref().and_then(|value| std::str::from_utf8(value).ok())
        && !content_type.is_empty()
    {
        read = read.with_content_type(content_type)?;
    }
    for (name, value) in header {
        read.headers_mut().append(&name, value)?;
    }
    Ok(read)
}

fn not_ours(error: serde_json::Error) -> Error {
    Error::codec(format!("the value is not what Go Micro writes: {error}"))
}

#[cfg(test)]
mod tests {
    use broker_core::ErrorKind;

    use super::*;

    /// Recorded from Go Micro's Kafka plugin v5 on Kafka 4.3.
    const RECORDED: &str = r#"{"Header":{"Content-Type":"application/json","x-trace":"abc"},"Body":"eyJpZCI6MX0="}"#;

    fn message() -> Message {
        let message = Message::new(r#"{"id":1}"#).with_content_type("application/json").unwrap();
        message.with_header("x-trace", "abc").unwrap()
    }

    #[test]
    fn what_was_recorded_is_written() {
        let encoded = encode::<()>(&message()).unwrap();
        assert_eq!(encoded.payload.unwrap().as_ref(), RECORDED.as_bytes());
        assert!(encoded.key.is_none() && encoded.headers.is_none());
        let html = encode::<()>(&Message::new("").with_header("x", "<&>").unwrap()).unwrap();
        assert_eq!(html.payload.unwrap().as_ref(), br#"{"Header":{"x":"\u003c\u0026\u003e"},"Body":""}"#);
    }

    #[test]
    fn what_was_recorded_is_read() {
        let read = read(Message::new(RECORDED), &[]).unwrap();
        assert_eq!((read.payload().as_ref(), read.content_type()), (&br#"{"id":1}"#[..], Some("application/json")));
        assert_eq!(read.headers().get_str("x-trace"), Some("abc"));
        assert_eq!(read.headers().len(), 1);
    }

    #[test]
    fn a_records_headers_count_over_the_values() {
        let message = Message::new(r#"{"header":{"x":"1","y":"2"},"BODY":null}"#);
        let read = read(message, &[("x", b"3")]).unwrap();
        assert_eq!((read.headers().get_str("x"), read.headers().get_str("y")), (Some("3"), Some("2")));
        assert!(read.payload().is_empty());
    }

    #[test]
    fn what_go_micro_did_not_write_cannot_be_decoded() {
        for value in ["", "plain", "[]", r#"{"Body":1}"#, r#"{"Body":"*"}"#, r#"{"Header":{"x":1}}"#] {
            assert_eq!(read(Message::new(value), &[]).unwrap_err().kind(), ErrorKind::Codec, "{value}");
        }
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let twice = message().with_header("x-trace", "again").unwrap();
        let binary = message().with_header("x", vec![0xff]).unwrap();
        let typed = message().with_header("Content-Type", "x").unwrap();
        for refused in [message().with_key("k"), Message::tombstone(), twice, binary, typed] {
            let Err(error) = encode::<()>(&refused) else { panic!("{refused:?} was taken") };
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
    }
}
