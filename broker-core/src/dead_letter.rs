//! What is kept of a message that could not be handled.

use bytes::Bytes;

use crate::{Error, Failure, Group, Message, Result, Timestamp, Topic};

/// A message that was rejected or ran out of attempts, and the story of it.
///
/// On the dead-letter topic it is the original message with this story in its headers
/// (`broker-dead-reason` and so on), written before the original is settled: after a crash between
/// the two possibly twice with the same id, never zero times.
///
/// ```
/// use broker_core::{DeadLetter, Failure, Message, Timestamp};
///
/// let letter = DeadLetter {
///     message: Message::new("42"),
///     topic: "orders.created".parse()?,
///     group: Some("billing@orders.>".parse()?),
///     failure: Failure::new("no such customer").with_status("422"),
///     attempts: 3,
///     first: Timestamp::from_millis(1),
///     last: Timestamp::from_millis(2),
/// };
/// let message = letter.clone().into_message();
/// assert_eq!(message.headers().get_str("broker-dead-reason"), Some("no such customer"));
/// assert_eq!(DeadLetter::from_message(message)?, letter);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// The original message.
    pub message: Message,
    /// The topic it was published to.
    pub topic: Topic,
    /// The group that gave up on it.
    pub group: Option<Group>,
    /// Why, and with what status.
    pub failure: Failure,
    /// How often it was delivered.
    pub attempts: u32,
    /// When it was first delivered.
    pub first: Timestamp,
    /// When it last failed.
    pub last: Timestamp,
}

const PREFIX: &str = "broker-dead-";
const REASON: &str = "broker-dead-reason";
const TOPIC: &str = "broker-dead-topic";
const GROUP: &str = "broker-dead-group";
const ATTEMPTS: &str = "broker-dead-attempts";
const STATUS: &str = "broker-dead-status";
const FIRST: &str = "broker-dead-first";
const LAST: &str = "broker-dead-last";

impl DeadLetter {
    /// Whether `message` is a dead letter already: one that fails again is kept, not sent round.
    pub fn is_dead(message: &Message) -> bool {
        message.headers().get(REASON).is_some()
    }

    /// Without the message's delivery time, expiry and deduplication key, which are over: what is given again is to
    /// be delivered, as it is by brokers that keep what [`into_message`](Self::into_message) makes.
    pub(crate) fn undated(self) -> Self {
        Self { message: undated(self.message), ..self }
    }

    /// Whether `message` is a dead letter of `topic`.
    pub(crate) fn is_from(message: &Message, topic: &Topic) -> bool {
        Self::is_dead(message) && message.headers().get_str(TOPIC) == Some(topic.as_str())
    }

    /// Whether `message` is a dead letter of `group`. Where the group reads its own dead-letter topic and fails again at one,
    /// it is in the group's list already.
    ///
    /// ```
    /// use broker_core::{DeadLetter, Message};
    ///
    /// let message = Message::new("42")
    ///     .with_header("broker-dead-reason", "no such customer")?
    ///     .with_header("broker-dead-group", "billing@>")?;
    /// assert!(DeadLetter::is_of(&message, &"billing@>".parse()?));
    /// assert!(!DeadLetter::is_of(&message, &"ops@>".parse()?));
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn is_of(message: &Message, group: &Group) -> bool {
        Self::is_dead(message) && message.headers().get_str(GROUP) == Some(group.to_string().as_str())
    }

    /// The message to publish to the dead-letter topic: the original with the story in its
    /// headers. Its delivery time and expiry are over; neither must keep it from being read.
    pub fn into_message(self) -> Message {
        let Self { message, topic, group, failure, attempts, first, last } = self;
        let mut dead = undated(message);
        let mut write = |name: &str, value: String| {
            // The names are our own and well formed, so that this cannot fail.
            let _ = dead.headers_mut().set(name, value);
        };
        write(REASON, failure.reason().to_owned());
        write(TOPIC, topic.to_string());
        if let Some(group) = group {
            write(GROUP, group.to_string());
        }
        write(ATTEMPTS, attempts.to_string());
        if let Some(status) = failure.status() {
            write(STATUS, status.to_owned());
        }
        write(FIRST, first.to_string());
        write(LAST, last.to_string());
        dead
    }

    /// Reads a message of a dead-letter topic.
    ///
    /// # Errors
    ///
    /// [`Codec`](crate::ErrorKind::Codec) if a header of the story is missing or does not parse: it
    /// was put there by somebody else.
    pub fn from_message(message: Message) -> Result<Self> {
        fn read<T>(message: &Message, name: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
            message.headers().get_str(name).and_then(parse).ok_or_else(|| {
                Error::codec(format!(
                    "message {} is no dead letter: its header {name} is missing or broken",
                    message.id()
                ))
            })
        }
        let mut failure = Failure::new(read(&message, REASON, |text| Some(text.to_owned()))?);
        if let Some(status) = message.headers().get_str(STATUS) {
            failure = failure.with_status(status);
        }
        let group = message.headers().get(GROUP).is_some();
        let letter = Self {
            topic: read(&message, TOPIC, |text| text.parse().ok())?,
            group: if group { Some(read(&message, GROUP, |text| text.parse().ok())?) } else { None },
            failure,
            attempts: read(&message, ATTEMPTS, |text| text.parse().ok())?,
            first: read(&message, FIRST, |text| text.parse().ok())?,
            last: read(&message, LAST, |text| text.parse().ok())?,
            message,
        };
        Ok(Self { message: letter.message.clone().without_story(), ..letter })
    }
}

/// The message without delivery time, expiry and deduplication key.
fn undated(message: Message) -> Message {
    if message.deliver_at().is_none() && message.expires_at().is_none() && message.dedup_key().is_none() {
        return message;
    }
    let bare =
        if message.is_tombstone() { Message::tombstone() } else { Message::new(Bytes::clone(message.payload())) };
    let bare =
        bare.with_id(message.id().clone()).with_timestamp(message.timestamp()).with_headers(message.headers().clone());
    let bare = match message.key() {
        Some(key) => bare.with_key(Bytes::clone(key)),
        None => bare,
    };
    match message.content_type() {
        // It was checked when the original was made.
        Some(content_type) => bare.clone().with_content_type(content_type).unwrap_or(bare),
        None => bare,
    }
}

impl Message {
    /// The message as it was before it became a dead letter.
    fn without_story(mut self) -> Self {
        self.headers_mut().retain(|name, _| !name.as_str().starts_with(PREFIX));
        self
    }
}
