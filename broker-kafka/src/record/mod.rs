//! A message as a Kafka record, and back.
//!
//! | | |
//! |---|---|
//! | [`native`] | key, payload, headers, time as Kafka's own; the rest in headers of ours, the last of them `broker-id` |
//! | [`event`] | the same, and the headers of CloudEvents' Kafka binding among ours |
//! | [`go_micro`] | the JSON of Go Micro's Kafka plugin as the value, and nothing else |
//!
//! A record with our `broker-id` is read as our own whatever the format is, so that dead letters,
//! retries and redriven messages, always written natively, reach everybody who has this crate.

mod copies;
mod event;
mod format;
mod go_micro;
mod native;

use std::borrow::Cow;

use broker_core::{Message, MessageId, Result, Timestamp, Topic};

pub(crate) use copies::Copies;
pub use format::Format;
pub(crate) use native::keep_strange;

/// What a message takes along besides itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Travel {
    /// The one group that it is for.
    pub(crate) for_group: Option<String>,
    /// What is known of it, where it waits in a retry topic.
    pub(crate) retried: Option<Box<Retried>>,
}

/// A message in a retry topic.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Retried {
    /// Where it was published.
    pub(crate) topic: Topic,
    /// Attempts that failed.
    pub(crate) failed: u32,
    /// When it is to be delivered again.
    pub(crate) due: Timestamp,
    /// When it was first delivered.
    pub(crate) first: Timestamp,
}

/// A record to send.
pub(crate) struct Encoded<'a, H> {
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) payload: Option<Cow<'a, [u8]>>,
    pub(crate) headers: Option<H>,
    pub(crate) timestamp: Option<i64>,
}

/// The record of a message published to `topic`.
///
/// # Errors
///
/// [`Unsupported`](broker_core::ErrorKind::Unsupported) for what the format cannot say.
pub(crate) fn encode<'a, H: Writer>(
    topic: &Topic,
    message: &'a Message,
    travel: Option<&Travel>,
    format: Format,
) -> Result<Encoded<'a, H>> {
    let headers = match (format, travel) {
        (Format::GoMicro, None) => return go_micro::encode(message),
        (Format::CloudEvents, None) => event::headers(topic, message),
        (_, travel) => native::headers(message, travel),
    };
    Ok(Encoded {
        key: message.key().map(|key| &key[..]),
        payload: (!message.is_tombstone()).then(|| Cow::Borrowed(&message.payload()[..])),
        headers: Some(headers),
        timestamp: field_timestamp(message, travel),
    })
}

/// The time that Kafka's own field carries: librdkafka reads 0 as the present, Kafka has no time
/// before 1970. What the broker itself sends on is of the present: retention counts from that time, and
/// would take at once what is as old as its message.
fn field_timestamp(message: &Message, travel: Option<&Travel>) -> Option<i64> {
    Some(message.timestamp().as_millis()).filter(|millis| *millis > 0 && travel.is_none())
}

/// What a record says.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The message; of what could not be decoded, as much as there is.
    pub(crate) message: Message,
    /// Why it could not be decoded.
    pub(crate) problem: Option<Box<str>>,
    /// What few records have, apart, so that the others are moved cheaply.
    pub(crate) travel: Option<Box<Travel>>,
}

/// The id of a record that has none: where it lies.
pub(crate) fn place(topic: &str, partition: i32, offset: i64) -> Option<MessageId> {
    let full = format!("{topic}-{partition}-{offset}");
    if full.len() <= 255 { full.parse().ok() } else { format!("{partition}-{offset}").parse().ok() }
}

/// A header as it was read.
pub(crate) type Field<'a> = (&'a str, &'a [u8]);

/// `bare` makes the message but for what its headers say; it is made once, and again where they cannot be read.
pub(crate) fn from_headers(
    mut bare: impl FnMut(MessageId) -> Message,
    headers: &[Field<'_>],
    format: Format,
    place: impl FnOnce() -> Option<MessageId>,
) -> Decoded {
    let placed = || place().unwrap_or_else(MessageId::random);
    let (id, read) = match native::our_headers(headers) {
        Some(end) => match native::read(&mut bare, headers, end) {
            Ok((message, travel)) => return Decoded { message, problem: None, travel },
            Err(error) => (placed(), Err(error)),
        },
        None => {
            let id = placed();
            let message = bare(id.clone());
            let read = match format {
                Format::GoMicro => go_micro::read(message, headers),
                Format::CloudEvents if event::is_event(headers) => event::read(message, headers),
                _ => native::read_foreign(message, headers),
            };
            (id, read)
        }
    };
    match read {
        Ok(message) => Decoded { message, problem: None, travel: None },
        Err(error) => {
            let message = bare(id).with_headers(native::raw(headers));
            Decoded { message, problem: Some(error.message().into()), travel: None }
        }
    }
}

/// Headers that are written, in the order they are put.
pub(crate) trait Writer {
    fn with_capacity(capacity: usize) -> Self;

    fn put(&mut self, name: &str, value: &[u8]);

    /// The text of `value`, which has 255 bytes at most, without an allocation.
    fn put_text(&mut self, name: &str, value: impl std::fmt::Display) {
        let mut buffer = [0_u8; 255];
        let mut rest = &mut buffer[..];
        // What does not fit is cut; ids, times and counts are shorter.
        let _ = std::io::Write::write_fmt(&mut rest, format_args!("{value}"));
        let left = rest.len();
        let written = buffer.len() - left;
        self.put(name, buffer.get(..written).unwrap_or_default());
    }
}

/// Headers to look at.
#[cfg(test)]
impl Writer for Vec<(String, Vec<u8>)> {
    fn with_capacity(capacity: usize) -> Self {
        Self::with_capacity(capacity)
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        self.push((name.to_owned(), value.to_owned()));
    }
}
