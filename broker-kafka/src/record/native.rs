//! The native format.
//!
//! Key, payload, headers and time travel as what they are. What Kafka has no place for travels in
//! headers of ours *before* the user's, the last of them `broker-id`: a header of the same name after
//! it is the user's own. A record without `broker-id` is somebody else's: its `content-type` header
//! is taken for what it says, its id is its place.

use broker_core::{Error, Headers, Message, MessageId, Result, Timestamp, Topic};
use bytes::Bytes;

use super::{Field, Retried, Travel, Writer, event, field_timestamp};

/// Ends our headers.
const ID: &str = "broker-id";
pub(super) const CONTENT_TYPE: &str = "content-type";
const EXPIRES_AT: &str = "broker-expires-at";
/// A time that Kafka's own field does not carry.
const TIMESTAMP: &str = "broker-timestamp";
/// The one group that a redriven record is for.
const FOR_GROUP: &str = "broker-for-group";
const RETRY_TOPIC: &str = "broker-retry-topic";
const RETRY_FAILED: &str = "broker-retry-failed";
const RETRY_DUE: &str = "broker-retry-due";
const RETRY_FIRST: &str = "broker-retry-first";
/// A header of a record that could not be decoded: its name escaped, `=`, its value.
const RAW_HEADER: &str = "broker-raw-header";

/// The headers that `message` has on the wire.
pub(super) fn headers<H: Writer>(message: &Message, travel: Option<&Travel>) -> H {
    let mut out = H::with_capacity(message.headers().len() + 3);
    if let Some(content_type) = message.content_type() {
        out.put(CONTENT_TYPE, content_type.as_bytes());
    }
    if let Some(group) = travel.and_then(|travel| travel.for_group.as_ref()) {
        out.put(FOR_GROUP, group.as_bytes());
    }
    if let Some(retried) = travel.and_then(|travel| travel.retried.as_ref()) {
        out.put(RETRY_TOPIC, retried.topic.as_str().as_bytes());
        out.put_text(RETRY_FAILED, retried.failed);
        out.put_text(RETRY_DUE, retried.due.as_millis());
        out.put_text(RETRY_FIRST, retried.first.as_millis());
    }
    finish(out, message, travel)
}

/// What every format of ours ends with: times, our id, and the user's headers.
pub(super) fn finish<H: Writer>(mut out: H, message: &Message, travel: Option<&Travel>) -> H {
    if let Some(time) = message.expires_at() {
        out.put_text(EXPIRES_AT, time.as_millis());
    }
    if field_timestamp(message, travel).is_none() {
        out.put_text(TIMESTAMP, message.timestamp().as_millis());
    }
    out.put_text(ID, message.id());
    for (name, value) in message.headers().iter() {
        out.put(name.as_str(), value);
    }
    out
}

/// Where our headers end, of a record that we wrote.
pub(super) fn our_headers(headers: &[Field<'_>]) -> Option<usize> {
    let end = headers.iter().position(|(name, _)| *name == ID)?;
    headers.iter().take(end).all(|(name, _)| is_ours(name)).then_some(end)
}

fn is_ours(name: &str) -> bool {
    let native = matches!(
        name,
        CONTENT_TYPE | EXPIRES_AT | TIMESTAMP | FOR_GROUP | RETRY_TOPIC | RETRY_FAILED | RETRY_DUE | RETRY_FIRST
    );
    native || name.starts_with(event::PREFIX)
}

/// Reads what we wrote, whose own headers end at `end`.
pub(super) fn read(
    bare: &mut impl FnMut(MessageId) -> Message,
    headers: &[Field<'_>],
    end: usize,
) -> Result<(Message, Option<Box<Travel>>)> {
    let id = headers.get(end).map_or(&[][..], |(_, value)| value);
    let mut message = bare(text(ID, id)?.parse()?);
    let mut travel = Travel::default();
    let mut retry = Draft::default();
    for (name, value) in headers.iter().take(end) {
        message = match *name {
            CONTENT_TYPE => message.with_content_type(text(name, value)?)?,
            EXPIRES_AT => message.with_expires_at(time(name, value)?),
            TIMESTAMP => message.with_timestamp(time(name, value)?),
            other => {
                match other {
                    FOR_GROUP => travel.for_group = Some(text(name, value)?.to_owned()),
                    RETRY_TOPIC => retry.topic = Some(Topic::new(text(name, value)?)?),
                    RETRY_FAILED => retry.failed = Some(number(name, value)?),
                    RETRY_DUE => retry.due = Some(time(name, value)?),
                    RETRY_FIRST => retry.first = Some(time(name, value)?),
                    // An event's attribute: the message says the same.
                    _ => {}
                }
                message
            }
        };
    }
    travel.retried = retry.finish().map(Box::new);
    let travel = (travel != Travel::default()).then(|| Box::new(travel));
    for (name, value) in headers.iter().skip(end + 1) {
        message.headers_mut().append(name, Bytes::copy_from_slice(value))?;
    }
    Ok((message, travel))
}

/// What a record in a retry topic says, header by header.
#[derive(Default)]
struct Draft {
    topic: Option<Topic>,
    failed: Option<u32>,
    due: Option<Timestamp>,
    first: Option<Timestamp>,
}

impl Draft {
    fn finish(self) -> Option<Retried> {
        Some(Retried { topic: self.topic?, failed: self.failed?, due: self.due?, first: self.first? })
    }
}

/// Reads what somebody else wrote.
pub(super) fn read_foreign(mut message: Message, headers: &[Field<'_>]) -> Result<Message> {
    for (name, value) in headers {
        // What others understand by this name; where that cannot be a content type of ours it stays a
        // header.
        if *name == CONTENT_TYPE
            && message.content_type().is_none()
            && let Ok(value) = std::str::from_utf8(value)
            && let Ok(typed) = message.clone().with_content_type(value)
        {
            message = typed;
            continue;
        }
        message.headers_mut().append(name, Bytes::copy_from_slice(value))?;
    }
    Ok(message)
}

pub(super) fn text<'a>(name: &str, value: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(value).map_err(|_| Error::codec(format!("header {name} is not UTF-8")))
}

fn number<T: std::str::FromStr>(name: &str, value: &[u8]) -> Result<T> {
    text(name, value)?.parse().map_err(|_| Error::codec(format!("header {name} is no number")))
}

fn time(name: &str, value: &[u8]) -> Result<Timestamp> {
    number(name, value).map(Timestamp::from_millis)
}

/// The headers of a record that could not be decoded, in a form that can.
pub(super) fn raw(headers: &[Field<'_>]) -> Headers {
    let mut kept = Headers::new();
    for (name, value) in headers {
        if *name != ID && !is_ours(name) && kept.append(name, Bytes::copy_from_slice(value)).is_ok() {
            continue;
        }
        keep_raw(&mut kept, &name.escape_default().to_string(), value);
    }
    kept
}

/// Keeps headers whose names are not even UTF-8.
pub(crate) fn keep_strange(kept: &mut Headers, strange: &[(&[u8], &[u8])]) {
    strange.iter().for_each(|(name, value)| keep_raw(kept, &name.escape_ascii().to_string(), value));
}

fn keep_raw(kept: &mut Headers, escaped: &str, value: &[u8]) {
    let whole = [escaped.as_bytes(), b"=", value].concat();
    // The name is our own and well formed.
    let _ = kept.append(RAW_HEADER, whole);
}

#[cfg(test)]
mod tests {
    use super::super::{Decoded, Format, from_headers};
    use super::*;

    fn round_trip(message: &Message, travel: Option<&Travel>, format: Format) -> Decoded {
        let topic = Topic::new("orders").unwrap();
        let wire = super::super::encode(&topic, message, travel, format).unwrap();
        let headers: Vec<(String, Vec<u8>)> = wire.headers.unwrap();
        let fields: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        let bare = |id| {
            let payload = wire.payload.as_ref().map(|payload| Bytes::copy_from_slice(payload));
            let message = Message::received(id, Timestamp::from_millis(wire.timestamp.unwrap_or(0)), payload);
            match wire.key {
                Some(key) => message.with_key(key.to_vec()),
                None => message,
            }
        };
        from_headers(bare, &fields, Format::Native, || None)
    }

    fn bare(payload: &'static str) -> impl FnMut(MessageId) -> Message {
        move |id| Message::received(id, Timestamp::from_millis(1), Some(payload.into()))
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
            .with_header("ce-subject", "s")
            .unwrap()
            .with_header("ce_id", "a user's own")
            .unwrap()
            .with_expires_at(Timestamp::from_millis(7));
        let untyped = Message::new("3").with_header("content-type", "a user's own").unwrap();
        let old = Message::tombstone().with_timestamp(Timestamp::from_millis(-5));
        for message in [plain, odd, untyped, old] {
            for format in [Format::Native, Format::CloudEvents] {
                let decoded = round_trip(&message, None, format);
                assert_eq!((decoded.message, decoded.problem), (message.clone(), None), "{format:?}");
            }
        }
    }

    #[test]
    fn what_a_message_takes_along_comes_back() {
        let retried = Retried {
            topic: Topic::new("orders.created").unwrap(),
            failed: 3,
            due: Timestamp::from_millis(9),
            first: Timestamp::from_millis(4),
        };
        let travel = Travel { for_group: Some("billing@>".to_owned()), retried: Some(Box::new(retried)) };
        let message = Message::new("1").with_header("broker-retry-due", "a user's own").unwrap();
        for format in [Format::Native, Format::CloudEvents, Format::GoMicro] {
            let decoded = round_trip(&message, Some(&travel), format);
            assert_eq!(
                (decoded.message, decoded.travel),
                (message.clone(), Some(Box::new(travel.clone()))),
                "{format:?}"
            );
        }
    }

    /// Retention counts from a record's time: what is sent on is of the present, however old its message is.
    #[test]
    fn what_is_sent_on_is_as_young_as_its_record() {
        let old = Message::new("1").with_timestamp(Timestamp::from_millis(1_000));
        let topic = Topic::new("orders").unwrap();
        let time = |travel: Option<&Travel>| {
            super::super::encode::<Vec<_>>(&topic, &old, travel, Format::Native).unwrap().timestamp
        };
        assert_eq!((time(None), time(Some(&Travel::default()))), (Some(1_000), None));
        assert_eq!(round_trip(&old, Some(&Travel::default()), Format::Native).message, old);
    }

    #[test]
    fn what_somebody_else_wrote_is_read_as_they_meant_it() {
        let headers: [(&str, &[u8]); 2] = [("content-type", b"text/plain"), ("x", b"1")];
        let decoded = from_headers(bare("1"), &headers, Format::Native, || "orders-0-42".parse().ok());
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
            let decoded = from_headers(bare("raw"), &headers, Format::Native, || None);
            assert!(decoded.problem.is_some(), "{headers:?}");
            assert_eq!(decoded.message.payload(), "raw");
            assert_eq!(decoded.message.headers().get_str("x"), Some("1"));
            assert!(decoded.message.headers().get("broker-raw-header").is_some());
        }
    }
}
