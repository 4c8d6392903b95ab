//! A message as a Kafka record, and back.
//!
//! Key, payload, headers and time travel as what they are. What Kafka has no place for travels in
//! headers of ours *before* the user's, the last of them `broker-id`: a header of the same name after
//! it is the user's own. A record without `broker-id` is somebody else's: its `content-type` header
//! is taken for what it says, its id is its place.

use std::panic::{AssertUnwindSafe, catch_unwind};

use broker_core::{Error, Headers, Message, MessageId, Result, Timestamp};
use bytes::Bytes;
use rdkafka::message::{BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders};

/// Ends our headers.
const ID: &str = "broker-id";
const CONTENT_TYPE: &str = "content-type";
const EXPIRES_AT: &str = "broker-expires-at";
/// A time that Kafka's own field cannot carry.
const TIMESTAMP: &str = "broker-timestamp";
/// The one group that a redriven record is for.
const FOR_GROUP: &str = "broker-for-group";
/// A header of a record that could not be decoded: its name escaped, `=`, its value.
const RAW_HEADER: &str = "broker-raw-header";

/// The headers that `message` has on the wire; `for_group` says that it is for that group alone.
pub(crate) fn headers(message: &Message, for_group: Option<&str>) -> OwnedHeaders {
    let mut out = OwnedHeaders::new_with_capacity(message.headers().len() + 3);
    let mut text = |name: &str, value: &str| {
        let headers = std::mem::take(&mut out);
        out = headers.insert(Header { key: name, value: Some(value.as_bytes()) });
    };
    if let Some(content_type) = message.content_type() {
        text(CONTENT_TYPE, content_type);
    }
    if let Some(time) = message.expires_at() {
        text(EXPIRES_AT, &time.as_millis().to_string());
    }
    if field_timestamp(message).is_none() {
        text(TIMESTAMP, &message.timestamp().as_millis().to_string());
    }
    if let Some(group) = for_group {
        text(FOR_GROUP, group);
    }
    text(ID, &message.id().to_string());
    for (name, value) in message.headers().iter() {
        out = out.insert(Header { key: name.as_str(), value: Some(&value[..]) });
    }
    out
}

/// The time that Kafka's own field carries: librdkafka reads 0 as the present, Kafka has no time
/// before 1970.
pub(crate) fn field_timestamp(message: &Message) -> Option<i64> {
    Some(message.timestamp().as_millis()).filter(|millis| *millis > 0)
}

/// What a record says.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The message; of what could not be decoded, as much as there is.
    pub(crate) message: Message,
    /// Why it could not be decoded.
    pub(crate) problem: Option<String>,
    /// The one group it is for.
    pub(crate) for_group: Option<String>,
}

/// Reads a record.
pub(crate) fn decode(record: &BorrowedMessage<'_>) -> Decoded {
    let mut message = match record.payload() {
        Some(payload) => Message::new(Bytes::copy_from_slice(payload)),
        None => Message::tombstone(),
    };
    if let Some(key) = record.key() {
        message = message.with_key(Bytes::copy_from_slice(key));
    }
    message = message.with_timestamp(Timestamp::from_millis(record.timestamp().to_millis().unwrap_or(0)));
    let mut headers = Vec::new();
    // rdkafka panics at a name that is not UTF-8; there is no other way to read one.
    let read = catch_unwind(AssertUnwindSafe(|| {
        for header in record.headers().into_iter().flat_map(|headers| headers.iter()) {
            headers.push((header.key, header.value.unwrap_or_default()));
        }
    }));
    let place = || place(record.topic(), record.partition(), record.offset());
    let mut decoded = from_headers(message, &headers, place);
    if read.is_err() && decoded.problem.is_none() {
        decoded.problem = Some("the name of a header is not UTF-8; it and those after it are left out".to_owned());
    }
    decoded
}

/// The id of a record that has none: where it lies.
fn place(topic: &str, partition: i32, offset: i64) -> Option<MessageId> {
    let full = format!("{topic}-{partition}-{offset}");
    if full.len() <= 255 { full.parse().ok() } else { format!("{partition}-{offset}").parse().ok() }
}

fn from_headers(message: Message, headers: &[(&str, &[u8])], place: impl FnOnce() -> Option<MessageId>) -> Decoded {
    let ours = headers.iter().position(|(name, _)| *name == ID);
    let ours = ours.filter(|end| headers.iter().take(*end).all(|(name, _)| is_ours(name)));
    match read(message.clone(), headers, ours) {
        Ok((read, for_group)) => {
            let message = if ours.is_some() { read } else { with_place(read, place) };
            Decoded { message, problem: None, for_group }
        }
        Err(error) => {
            let message = with_place(message.with_headers(raw(headers)), place);
            Decoded { message, problem: Some(error.message().to_owned()), for_group: None }
        }
    }
}

fn with_place(message: Message, place: impl FnOnce() -> Option<MessageId>) -> Message {
    match place() {
        Some(id) => message.with_id(id),
        None => message,
    }
}

fn is_ours(name: &str) -> bool {
    matches!(name, CONTENT_TYPE | EXPIRES_AT | TIMESTAMP | FOR_GROUP)
}

fn read(mut message: Message, headers: &[(&str, &[u8])], ours: Option<usize>) -> Result<(Message, Option<String>)> {
    let text = |name: &str, value: &[u8]| {
        std::str::from_utf8(value).map(str::to_owned).map_err(|_| Error::codec(format!("header {name} is not UTF-8")))
    };
    let millis = |name: &str, value: &[u8]| {
        let number = text(name, value)?.parse().map_err(|_| Error::codec(format!("header {name} is no time")))?;
        Ok::<_, Error>(Timestamp::from_millis(number))
    };
    let mut for_group = None;
    let users = ours.map_or(0, |end| end + 1);
    for (name, value) in headers.iter().take(users) {
        message = match *name {
            CONTENT_TYPE => message.with_content_type(text(name, value)?)?,
            EXPIRES_AT => message.with_expires_at(millis(name, value)?),
            TIMESTAMP => message.with_timestamp(millis(name, value)?),
            FOR_GROUP => {
                for_group = Some(text(name, value)?);
                message
            }
            _ => message.with_id(text(name, value)?.parse()?),
        };
    }
    for (name, value) in headers.iter().skip(users) {
        // Of somebody else's record, what others understand by this name; where that cannot be a
        // content type of ours it stays a header.
        if ours.is_none()
            && *name == CONTENT_TYPE
            && message.content_type().is_none()
            && let Ok(value) = std::str::from_utf8(value)
            && let Ok(typed) = message.clone().with_content_type(value)
        {
            message = typed;
            continue;
        }
        message.headers_mut().append(name, Bytes::copy_from_slice(value))?;
    }
    Ok((message, for_group))
}

/// The headers of a record that could not be decoded, in a form that can.
fn raw(headers: &[(&str, &[u8])]) -> Headers {
    let mut kept = Headers::new();
    for (name, value) in headers {
        if *name != ID && !is_ours(name) && kept.append(name, Bytes::copy_from_slice(value)).is_ok() {
            continue;
        }
        let mut whole: Vec<u8> = name.escape_default().collect::<String>().into_bytes();
        whole.push(b'=');
        whole.extend_from_slice(value);
        // The name is our own and well formed.
        let _ = kept.append(RAW_HEADER, whole);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(message: &Message) -> Decoded {
        let wire = headers(message, None);
        let wire: Vec<_> = wire.iter().map(|header| (header.key, header.value.unwrap_or_default())).collect();
        let bare = if message.is_tombstone() { Message::tombstone() } else { Message::new(message.payload().clone()) };
        let bare = match message.key() {
            Some(key) => bare.with_key(key.clone()),
            None => bare,
        };
        let bare = bare.with_timestamp(Timestamp::from_millis(field_timestamp(message).unwrap_or(0)));
        from_headers(bare, &wire, || None)
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let plain = Message::new("1").with_key("k");
        let odd = Message::new("2")
            .with_content_type("text/plain")
            .unwrap()
            .with_header("content-type", "a user's own")
            .unwrap()
            .with_header("broker-id", vec![0xff])
            .unwrap()
            .with_header("broker-expires-at", "never")
            .unwrap()
            .with_expires_at(Timestamp::from_millis(7));
        let untyped = Message::new("3").with_header("content-type", "a user's own").unwrap();
        let old = Message::tombstone().with_timestamp(Timestamp::from_millis(-5));
        for message in [plain, odd, untyped, old] {
            let decoded = round_trip(&message);
            assert_eq!((decoded.message, decoded.problem), (message, None));
        }
    }

    #[test]
    fn what_somebody_else_wrote_is_read_as_they_meant_it() {
        let headers: [(&str, &[u8]); 2] = [("content-type", b"text/plain"), ("x", b"1")];
        let decoded = from_headers(Message::new("1"), &headers, || "orders-0-42".parse().ok());
        assert_eq!(decoded.message.content_type(), Some("text/plain"));
        assert_eq!(decoded.message.id().to_string(), "orders-0-42");
        assert_eq!(decoded.message.headers().len(), 1);
    }

    #[test]
    fn what_is_no_message_keeps_its_bytes() {
        for headers in [
            [("", &b"nameless"[..]), ("x", b"1")],
            [("a\nb", b"1"), ("x", b"1")],
            [("broker-id", b"\xff"), ("x", b"1")],
        ] {
            let decoded = from_headers(Message::new("raw"), &headers, || None);
            assert!(decoded.problem.is_some(), "{headers:?}");
            assert_eq!(decoded.message.payload(), "raw");
            assert_eq!(decoded.message.headers().get_str("x"), Some("1"));
            assert!(decoded.message.headers().get("broker-raw-header").is_some());
        }
    }
}
