//! What travels.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use crate::headers::check_text;
use crate::{Error, Headers, Result, Timestamp};

/// A message's identity: a UUIDv7 unless the publisher gave another, 1 to 255 bytes of UTF-8
/// without control characters.
///
/// ```
/// use broker_core::MessageId;
///
/// let id: MessageId = "order-42".parse()?;
/// assert_eq!(id.to_string(), "order-42");
/// assert_ne!(MessageId::random(), MessageId::random());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId(Repr);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Repr {
    /// Held by value, so that the id we make costs no allocation, and as two numbers: bytes would lie
    /// behind the tag unaligned, and every copy of a message would pay for it.
    Uuid(u64, u64),
    Text(Arc<str>),
}

impl MessageId {
    /// A UUIDv7 (RFC 9562, section 5.7): the time in milliseconds, then 74 random bits.
    pub fn random() -> Self {
        Self::random_at(Timestamp::now())
    }

    /// A UUIDv7 of this time, where it is known already: reading the clock costs more than the rest.
    ///
    /// ```
    /// use broker_core::{MessageId, Timestamp};
    ///
    /// let id = MessageId::random_at(Timestamp::from_millis(0x0190_a5e0_7a3b));
    /// assert!(id.to_string().starts_with("0190a5e0-7a3b-7"));
    /// ```
    pub fn random_at(time: Timestamp) -> Self {
        const VERSION: u64 = 7 << 12;
        const VARIANT: u64 = 0b10 << 62;
        let millis = u64::try_from(time.as_millis()).unwrap_or(0);
        let high = (millis << 16) | VERSION | (fastrand::u64(..) >> 52);
        Self(Repr::Uuid(high, VARIANT | (fastrand::u64(..) >> 2)))
    }

    fn of(uuid: Uuid) -> Self {
        let (high, low) = uuid.as_u64_pair();
        Self(Repr::Uuid(high, low))
    }

    /// Bytes of its text.
    pub fn size(&self) -> usize {
        match &self.0 {
            Repr::Uuid(..) => 36,
            Repr::Text(text) => text.len(),
        }
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Uuid(high, low) => Uuid::from_u64_pair(*high, *low).as_hyphenated().fmt(f),
            Repr::Text(text) => f.write_str(text),
        }
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageId({self})")
    }
}

impl FromStr for MessageId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // Only the spelling we would write ourselves becomes a number, so that text comes back
        // byte for byte and equal ids are equal.
        if text.len() == 36
            && let Ok(uuid) = Uuid::try_parse(text)
            && uuid.as_hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text
        {
            return Ok(Self::of(uuid));
        }
        check_text("id", text).map(|text| Self(Repr::Text(text)))
    }
}

crate::text::serde_as_text!(MessageId);

/// What is published and delivered: a payload and what is said about it. Never copied by us.
///
/// A new message has an id and the present as its timestamp. Dropping one does nothing.
///
/// ```
/// use std::time::Duration;
/// use broker_core::Message;
///
/// let message = Message::new(r#"{"id":42}"#)
///     .with_content_type("application/json")?
///     .with_key("customer-7")
///     .with_header("traceparent", "00-…")?
///     .with_ttl(Duration::from_secs(3600));
/// assert_eq!(message.payload().as_ref(), br#"{"id":42}"#);
/// assert_eq!(message.key().map(|key| key.as_ref()), Some(&b"customer-7"[..]));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Message {
    id: MessageId,
    timestamp: Timestamp,
    key: Option<Bytes>,
    /// Of a tombstone empty.
    payload: Bytes,
    content_type: Option<Arc<str>>,
    headers: Headers,
    /// What few messages have, apart, so that the others stay small.
    schedule: Option<Box<Schedule>>,
}

#[derive(Clone, Default, PartialEq)]
struct Schedule {
    deliver_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    dedup: Option<Arc<str>>,
    tombstone: bool,
}

/// What a message takes besides its bytes, about: its fields and its place in a log.
const OVERHEAD: usize = 256;

/// What a header takes besides its bytes, about: an empty one is two handles on shared bytes.
const HEADER_OVERHEAD: usize = 96;
/// Of a text of its own: the allocation and what counts its owners.
const TEXT_OVERHEAD: usize = 32;

impl Message {
    /// A message with this payload, a new id and the present as its timestamp.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self::build(Some(payload.into()))
    }

    /// A message without a payload, which says that what its key names is gone. Not the same as an
    /// empty payload; a broker that cannot tell them apart refuses it as
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    ///
    /// ```
    /// use broker_core::Message;
    /// assert!(Message::tombstone().is_tombstone());
    /// assert!(!Message::new("").is_tombstone());
    /// ```
    pub fn tombstone() -> Self {
        Self::build(None)
    }

    fn build(payload: Option<Bytes>) -> Self {
        let timestamp = Timestamp::now();
        Self::received(MessageId::random_at(timestamp), timestamp, payload)
    }

    /// For adapters: a message as it was received, with the id and time that it came with, so that neither is made
    /// up first. Without a payload it is a tombstone.
    ///
    /// ```
    /// use broker_core::{Message, Timestamp};
    ///
    /// let message = Message::received("orders-0-42".parse()?, Timestamp::from_millis(7), Some("paid".into()));
    /// assert_eq!((message.id().to_string().as_str(), message.timestamp().as_millis()), ("orders-0-42", 7));
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn received(id: MessageId, timestamp: Timestamp, payload: Option<Bytes>) -> Self {
        let schedule = payload.is_none().then(|| Box::new(Schedule { tombstone: true, ..Schedule::default() }));
        let payload = payload.unwrap_or_default();
        Self { id, timestamp, key: None, payload, content_type: None, headers: Headers::new(), schedule }
    }

    /// Gives it this id instead of the one it was made with.
    #[must_use]
    pub fn with_id(mut self, id: MessageId) -> Self {
        self.id = id;
        self
    }

    /// Gives it a key: messages of one key on one [`Publisher`](crate::Publisher) keep their
    /// order. An empty key is a key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header; names may repeat.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if `name` is no [`HeaderName`](crate::HeaderName).
    pub fn with_header(mut self, name: impl AsRef<str>, value: impl Into<Bytes>) -> Result<Self> {
        self.headers.append(name, value)?;
        Ok(self)
    }

    /// Replaces all headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        self.headers = headers;
        self
    }

    /// Says what the payload is.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) unless it is 1 to 255 printable ASCII characters that
    /// neither begin nor end with a space, which every broker's wire keeps as they are.
    pub fn with_content_type(mut self, content_type: impl AsRef<str>) -> Result<Self> {
        let text = content_type.as_ref();
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if text.is_empty() || text.len() > 255 || !printable || text.trim() != text {
            let shown: String = text.chars().take(40).collect();
            return Err(Error::invalid(format!(
                "content type {shown:?}: it has 1 to 255 printable ASCII characters and no space at its ends"
            )));
        }
        self.content_type = Some(text.into());
        Ok(self)
    }

    /// Says when it came to be, where that is not now.
    #[must_use]
    pub fn with_timestamp(mut self, timestamp: Timestamp) -> Self {
        self.timestamp = timestamp;
        self
    }

    /// Delivers it no earlier than this.
    #[must_use]
    pub fn with_deliver_at(mut self, time: Timestamp) -> Self {
        self.schedule().deliver_at = Some(time);
        self
    }

    /// Delivers it no earlier than `delay` from now.
    #[must_use]
    pub fn with_delay(self, delay: Duration) -> Self {
        self.with_deliver_at(Timestamp::past(delay))
    }

    /// Discards it, counted, if it was not delivered by then.
    #[must_use]
    pub fn with_expires_at(mut self, time: Timestamp) -> Self {
        self.schedule().expires_at = Some(time);
        self
    }

    /// Discards it, counted, if it was not delivered `ttl` from now.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        self.with_expires_at(Timestamp::now().after(ttl))
    }

    /// Publishes it once per topic within the broker's window, however often this key comes.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) unless it is 1 to 255 bytes without control
    /// characters.
    pub fn with_dedup_key(mut self, key: impl AsRef<str>) -> Result<Self> {
        self.schedule().dedup = Some(check_text("deduplication key", key.as_ref())?);
        Ok(self)
    }

    fn schedule(&mut self) -> &mut Schedule {
        self.schedule.get_or_insert_default()
    }

    /// Its identity.
    pub fn id(&self) -> &MessageId {
        &self.id
    }

    /// When it came to be.
    pub fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// Its key; absent and empty are different.
    pub fn key(&self) -> Option<&Bytes> {
        self.key.as_ref()
    }

    /// Its payload; that of a [tombstone](Message::tombstone) reads as empty.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Its payload, to change it before publishing. That of a tombstone is to stay empty.
    ///
    /// ```
    /// use broker_core::Message;
    ///
    /// let mut message = Message::new("old");
    /// let payload = message.payload_mut();
    /// *payload = [&payload[..], b" and new"].concat().into();
    /// assert_eq!(message.payload().as_ref(), b"old and new");
    /// ```
    pub fn payload_mut(&mut self) -> &mut Bytes {
        &mut self.payload
    }

    /// Whether it has no payload at all.
    pub fn is_tombstone(&self) -> bool {
        self.schedule.as_ref().is_some_and(|schedule| schedule.tombstone)
    }

    /// What the payload is, if the publisher said so.
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// Its headers.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Its headers, to change them before publishing.
    pub fn headers_mut(&mut self) -> &mut Headers {
        &mut self.headers
    }

    /// The earliest time of delivery, if not at once.
    pub fn deliver_at(&self) -> Option<Timestamp> {
        self.schedule.as_ref()?.deliver_at
    }

    /// When it is no longer worth delivering.
    pub fn expires_at(&self) -> Option<Timestamp> {
        self.schedule.as_ref()?.expires_at
    }

    /// The key it is deduplicated by.
    pub fn dedup_key(&self) -> Option<&str> {
        self.schedule.as_ref()?.dedup.as_deref()
    }

    /// Bytes that count towards every limit: payload, key and headers together.
    ///
    /// ```
    /// use broker_core::Message;
    /// assert_eq!(Message::new("1234").with_key("k").with_header("n", "v")?.size(), 7);
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn size(&self) -> usize {
        self.payload().len() + self.key.as_ref().map_or(0, Bytes::len) + self.headers.size()
    }

    /// Bytes that it takes in memory while it waits, about: its [`size`](Self::size), what an id of its own, its content
    /// type and its deduplication key have, 256 for itself, 96 for each header and 32 for each of those. For bounds that
    /// keep a process within its memory.
    ///
    /// ```
    /// use broker_core::Message;
    /// assert_eq!(Message::new("1234").with_header("n", "v")?.memory_size(), 4 + 256 + 2 + 96);
    /// assert_eq!(Message::new("").with_content_type("text/csv")?.memory_size(), 256 + 8 + 32);
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn memory_size(&self) -> usize {
        let id = match &self.id.0 {
            Repr::Uuid(..) => None,
            Repr::Text(text) => Some(text.len()),
        };
        let texts = [id, self.content_type().map(str::len), self.dedup_key().map(str::len)];
        let texts: usize = texts.into_iter().flatten().map(|text| text + TEXT_OVERHEAD).sum();
        self.size() + texts + OVERHEAD + self.headers.len() * HEADER_OVERHEAD
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Message");
        out.field("id", &self.id).field("timestamp", &self.timestamp).field("key", &self.key);
        if self.is_tombstone() {
            out.field("payload", &format_args!("tombstone"));
        } else {
            // It may be a megabyte, and may be a secret.
            out.field("payload", &format_args!("{} bytes", self.payload.len()));
        }
        out.field("content_type", &self.content_type).field("headers", &self.headers);
        if let Some(schedule) = &self.schedule {
            out.field("deliver_at", &schedule.deliver_at)
                .field("expires_at", &schedule.expires_at)
                .field("dedup_key", &schedule.dedup);
        }
        out.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_comes_back_as_it_was_written() {
        for text in ["order-42", "0190A5E0-7A3B-7000-8000-000000000001", "0190a5e0-7a3b-7000-8000-000000000001", "ü"] {
            assert_eq!(text.parse::<MessageId>().unwrap().to_string(), text);
        }
        assert!("".parse::<MessageId>().is_err());
        assert!("a\u{7f}".parse::<MessageId>().is_err());
        assert!("x".repeat(256).parse::<MessageId>().is_err());
    }

    #[test]
    fn ids_we_make_are_version_7_and_carry_the_time() {
        let id = MessageId::random_at(Timestamp::from_millis(0x0190_a5e0_7a3b)).to_string();
        assert!(id.starts_with("0190a5e0-7a3b-7"), "{id}");
    }

    #[test]
    fn content_types_that_a_wire_would_change_are_refused() {
        for bad in ["", " text/plain", "text/plain ", "text/\tplain", "textä"] {
            assert!(Message::new("").with_content_type(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_message_stays_small() {
        // A million of them wait in a backlog: what few have is kept apart.
        assert!(size_of::<Message>() <= 152, "{}", size_of::<Message>());
    }
}
