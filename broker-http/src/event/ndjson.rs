//! One message a line: `{"payload": …}` or `{"payload_base64": "…"}`, and what is said about it.

use std::borrow::Cow;
use std::fmt;

use broker_core::{Error, HeaderName, Headers, Message, MessageId, Result, Timestamp};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::Options;
use super::draft::{read_base64, read_due, read_expiry};

/// Reads the message of a line. JSON payloads are kept as JSON text, byte for byte, with the
/// content type `application/json` unless the line says another.
///
/// Of the request's options, a delay, a time to live, a key and headers go to every message that
/// has none itself.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid), naming the field and what is allowed. Which line it is
/// only the caller knows.
///
/// ```
/// use broker_http::event::{Options, ndjson};
///
/// let line = br#"{"payload": {"id": 42}, "key": "7", "headers": {"via": ["a", "b"]}, "ttl": "1h"}"#;
/// let message = ndjson::decode(line, &Options::default())?;
/// assert_eq!(message.payload().as_ref(), br#"{"id": 42}"#);
/// assert_eq!(message.content_type(), Some("application/json"));
/// assert_eq!(message.headers().get_all("via").count(), 2);
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn decode(line: &[u8], options: &Options) -> Result<Message> {
    decode_at(line, options, Timestamp::now())
}

/// The same for many lines that came at one time.
pub(crate) fn decode_at(line: &[u8], options: &Options, now: Timestamp) -> Result<Message> {
    // An array would be taken for the fields in their order.
    if line.trim_ascii_start().first() == Some(&b'[') {
        return Err(Error::invalid("an object is expected, as in {\"payload\": 1}"));
    }
    let fields: Fields<'_> = serde_json::from_slice(line).map_err(|error| syntax(&error))?;
    fields.decode(options, now)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    // Absent and null differ here: null is a payload.
    #[serde(borrow, default, deserialize_with = "raw")]
    payload: Option<&'a RawValue>,
    #[serde(borrow, default)]
    payload_base64: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content_type: Option<Cow<'a, str>>,
    #[serde(default, deserialize_with = "headers")]
    headers: Headers,
    #[serde(borrow, default)]
    delay: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    ttl: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    dedup: Option<Cow<'a, str>>,
}

impl Fields<'_> {
    fn decode(self, options: &Options, now: Timestamp) -> Result<Message> {
        let mut content_type = self.content_type;
        let payload = match (self.payload, self.payload_base64) {
            (Some(json), None) => {
                content_type = content_type.or(Some(Cow::Borrowed("application/json")));
                Bytes::copy_from_slice(json.get().as_bytes())
            }
            (None, Some(base64)) => named("payload_base64", read_base64(&base64))?.into(),
            (Some(_), Some(_)) => return Err(Error::invalid("it has payload or payload_base64, not both")),
            (None, None) => {
                return Err(Error::invalid("payload is missing; give payload (any JSON) or payload_base64"));
            }
        };
        let mut headers = self.headers;
        for (name, value) in options.headers.iter() {
            if headers.get(name.as_str()).is_none() {
                headers.push(name.clone(), value.clone());
            }
        }
        let id = match self.id {
            Some(id) => named("id", id.parse())?,
            None => MessageId::random_at(now),
        };
        let mut message = Message::received(id, options.time.unwrap_or(now), Some(payload));
        *message.headers_mut() = headers;
        let key = self.key.map(|key| Bytes::from(key.into_owned())).or_else(|| options.key.clone());
        if let Some(key) = key {
            message = message.with_key(key);
        }
        if let Some(content_type) = content_type {
            message = named("content_type", message.with_content_type(content_type))?;
        }
        if let Some(time) = time("delay", self.delay, read_due, options.deliver_at)? {
            message = message.with_deliver_at(time);
        }
        if let Some(time) = time("ttl", self.ttl, read_expiry, options.expires_at)? {
            message = message.with_expires_at(time);
        }
        if let Some(dedup) = self.dedup {
            message = named("dedup", message.with_dedup_key(dedup))?;
        }
        Ok(message)
    }
}

fn time(
    name: &str,
    text: Option<Cow<'_, str>>,
    read: fn(&str) -> Result<Timestamp>,
    option: Option<Timestamp>,
) -> Result<Option<Timestamp>> {
    text.map(|text| named(name, read(&text))).transpose().map(|time| time.or(option))
}

fn named<T>(field: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| error.context(field))
}

/// Of the place the column is left: the parser takes each line for the first.
fn syntax(error: &serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    Error::invalid(match text.strip_suffix(&format!(" at line {line} column {column}")) {
        Some(why) => format!("column {column}: {why}"),
        None => text,
    })
}

fn raw<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// `{"name": "text"}` or `{"name": ["text", …]}`, in order.
fn headers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
    struct Map;

    impl<'de> Visitor<'de> for Map {
        type Value = Headers;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("headers: an object of names to text or to a list of text")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
            let mut headers = Headers::new();
            while let Some(name) = map.next_key::<String>()? {
                let name = HeaderName::new(name).map_err(|error| A::Error::custom(error.message()))?;
                let Values(values) = map.next_value()?;
                values.into_iter().for_each(|value| headers.push(name.clone(), value));
            }
            Ok(headers)
        }

        fn visit_unit<E>(self) -> Result<Headers, E> {
            Ok(Headers::new())
        }
    }

    deserializer.deserialize_any(Map)
}

struct Values(Vec<Bytes>);

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Values;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a header's value: text, or a list of text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Values, E> {
                Ok(Values(vec![Bytes::copy_from_slice(text.as_bytes())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Values, A::Error> {
                let mut values = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    values.push(Bytes::from(text));
                }
                Ok(Values(values))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}
