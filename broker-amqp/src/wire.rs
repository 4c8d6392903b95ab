//! A message as AMQP properties and headers, and back.
//!
//! | of the message | on the wire |
//! |---|---|
//! | id, content type | `message-id`, `content-type` |
//! | timestamp | `timestamp` (seconds), and the header `x-broker-timestamp` (milliseconds) |
//! | key | the header `x-broker-key`; absent where there is none |
//! | headers | headers of the same name, a string (of any bytes) each; a repeated name is an array of strings |
//! | their order | the header `x-broker-order`, names by line, where it is not that of the sorted names |
//! | expiry | the header `x-broker-expires` (milliseconds), and `expiration` a minute later |
//! | delivery time | the header `x-broker-due` (milliseconds); of a retry `x-broker-deliver-at` |
//! | tombstone | an empty body and the header `x-broker-tombstone` |
//! | of a retry: deliveries so far, the first, the topic | `x-broker-attempt`, `x-broker-first`, `x-broker-topic` |
//! | of a retry: when it is due | `x-broker-due`, which then is no part of the message |
//!
//! What others say in other properties (`content-encoding`, `correlation-id`, `reply-to`, `type`, `app-id`, `user-id`,
//! `priority`) is read as a header of that name, unless there is one; so is a `content-type` or a `message-id` that is none.
//!
//! Names that RabbitMQ gives a meaning (`CC`, `BCC`, `x-death` and its like) and names beginning with
//! `x-broker-` travel with `x-broker-header-` before them. The server discards what expired a minute ago,
//! uncounted; a member discards it at once, and counts it.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::time::Duration;

use broker_core::{Error, Headers, Message, MessageId, Result, Timestamp, Topic};
use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString};

use crate::foreign;
use crate::naming::short;

const OURS: &str = "x-broker-";
const ESCAPED: &str = "x-broker-header-";
pub(crate) const KEY: &str = "x-broker-key";
const TIMESTAMP: &str = "x-broker-timestamp";
const EXPIRES: &str = "x-broker-expires";
/// Until when it waits, on whichever way.
const DUE: &str = "x-broker-due";
/// The delivery time that the publisher gave, where the message waits for another.
const DELIVER_AT: &str = "x-broker-deliver-at";
const TOMBSTONE: &str = "x-broker-tombstone";
const ORDER: &str = "x-broker-order";
const ATTEMPT: &str = "x-broker-attempt";
const FIRST: &str = "x-broker-first";
const TOPIC: &str = "x-broker-topic";
/// Where Go Micro has it.
const CONTENT_TYPE: &str = "Content-Type";
/// What a quorum queue counts.
const DELIVERY_COUNT: &str = "x-delivery-count";

/// How long after its expiry the server may discard a message that nobody has counted.
const EXPIRY_GRACE: Duration = Duration::from_secs(60);

/// How messages are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) persistent: bool,
    /// The content type as a header, and none that is no string: Go Micro reads nothing else.
    pub(crate) go_micro: bool,
}

/// What a message takes along besides itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Travel {
    /// Deliveries so far.
    pub(crate) attempts: u32,
    /// When the first of them was.
    pub(crate) first: Option<Timestamp>,
    /// The topic, where the routing key is not it.
    pub(crate) topic: Option<Topic>,
    /// When it is due, where it waits.
    pub(crate) due: Option<Timestamp>,
    /// Whether it is persistent whatever the others are.
    pub(crate) kept: bool,
}

/// A message as it came, and what it took along.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) message: Message,
    pub(crate) topic: Topic,
    pub(crate) attempts: u32,
    pub(crate) first: Option<Timestamp>,
    pub(crate) due: Option<Timestamp>,
    /// How often the server has redelivered it, where it counts.
    pub(crate) redeliveries: u64,
}

/// Bytes that the content header of a message has at most about; it must fit into one frame.
pub(crate) fn header_bytes(message: &Message) -> usize {
    // Names are written once more where their order is kept.
    let headers: usize = message.headers().iter().map(|(name, value)| 2 * name.as_str().len() + value.len() + 24).sum();
    // Go Micro has the content type twice.
    headers + message.key().map_or(0, Bytes::len) + 2 * message.content_type().map_or(0, str::len) + 1024
}

/// Checks that AMQP can carry the message.
pub(crate) fn check(message: &Message, frame_max: usize) -> Result<()> {
    if message.dedup_key().is_some() {
        return Err(Error::unsupported("RabbitMQ does not deduplicate: publish without a deduplication key"));
    }
    let size = header_bytes(message);
    if size > frame_max {
        return Err(Error::unsupported(format!(
            "message {}: its key and headers come to {size} bytes; AMQP carries them in one frame, of {frame_max} bytes here",
            message.id()
        )));
    }
    message.headers().iter().try_for_each(|(name, _)| wire_name(name.as_str()).map(drop))
}

/// Whether the server writes headers of such a name where a queue hands a message on to another
/// (<https://www.rabbitmq.com/docs/dlx#effects>). It is asked both of what is escaped and of what is left out when a
/// message is read: were it two questions, a publisher's header between them would be lost.
fn is_mark(name: &str) -> bool {
    name == "x-death" || name.starts_with("x-first-death-") || name.starts_with("x-last-death-")
}

fn wire_name(name: &str) -> Result<ShortString> {
    let special = name.starts_with(OURS) || matches!(name, "CC" | "BCC" | DELIVERY_COUNT) || is_mark(name);
    if special { short("header, escaped,", &format!("{ESCAPED}{name}")) } else { short("header", name) }
}

/// The properties of a message.
pub(crate) fn encode(message: &Message, travel: &Travel, style: Style) -> Result<BasicProperties> {
    let mut table = BTreeMap::new();
    let mut put = |name: &str, value: AMQPValue| table.insert(ShortString::from(name), value);
    let millis = message.timestamp().as_millis();
    if !style.go_micro {
        put(TIMESTAMP, AMQPValue::LongLongInt(millis));
    } else if let Some(content_type) = message.content_type() {
        put(CONTENT_TYPE, AMQPValue::LongString(content_type.into()));
    }
    if let Some(key) = message.key() {
        put(KEY, bytes_value(key));
    }
    if message.is_tombstone() {
        put(TOMBSTONE, AMQPValue::Boolean(true));
    }
    if let Some(time) = message.expires_at() {
        put(EXPIRES, AMQPValue::LongLongInt(time.as_millis()));
    }
    if let Some(time) = travel.due.or(message.deliver_at()) {
        put(DUE, AMQPValue::LongLongInt(time.as_millis()));
    }
    if let Some(time) = message.deliver_at().filter(|_| travel.due.is_some()) {
        put(DELIVER_AT, AMQPValue::LongLongInt(time.as_millis()));
    }
    if travel.attempts > 0 {
        put(ATTEMPT, AMQPValue::LongLongInt(travel.attempts.into()));
    }
    if let Some(time) = travel.first {
        put(FIRST, AMQPValue::LongLongInt(time.as_millis()));
    }
    if let Some(topic) = &travel.topic {
        put(TOPIC, AMQPValue::LongString(topic.as_str().into()));
    }
    put_headers(message.headers(), &mut table)?;

    let mut properties = BasicProperties::default()
        .with_message_id(short("message id", &message.id().to_string())?)
        .with_delivery_mode(if style.persistent || travel.kept { 2 } else { 1 })
        .with_headers(FieldTable::from(table));
    if let Ok(millis) = u64::try_from(millis) {
        properties = properties.with_timestamp(millis / 1000);
    }
    if let Some(content_type) = message.content_type() {
        properties = properties.with_content_type(short("content type", content_type)?);
    }
    if let Some(time) = message.expires_at() {
        let wait = (time.since(Timestamp::now()) + EXPIRY_GRACE).as_millis();
        // More than the server takes is as good as never.
        if wait < u128::from(u32::MAX) {
            properties = properties.with_expiration(short("expiration", &wait.to_string())?);
        }
    }
    Ok(properties)
}

fn put_headers(headers: &Headers, table: &mut BTreeMap<ShortString, AMQPValue>) -> Result<()> {
    let mut sorted = true;
    let mut last: Option<ShortString> = None;
    for (name, value) in headers.iter() {
        let name = wire_name(name.as_str())?;
        sorted &= last.as_ref().is_none_or(|last| *last < name);
        match table.get_mut(&name) {
            Some(AMQPValue::FieldArray(values)) => values.push(bytes_value(value)),
            Some(first) => {
                let both = vec![std::mem::replace(first, AMQPValue::Void), bytes_value(value)];
                *first = AMQPValue::FieldArray(FieldArray::from(both));
            }
            None => {
                table.insert(name.clone(), bytes_value(value));
            }
        }
        last = Some(name);
    }
    if !sorted {
        let order: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
        table.insert(ORDER.into(), AMQPValue::LongString(order.join("\n").into()));
    }
    Ok(())
}

fn bytes_value(bytes: &[u8]) -> AMQPValue {
    AMQPValue::LongString(LongString::from(bytes))
}

/// Reads a message, whoever wrote it. What is our own must be as we write it; of what is not, what
/// has no place in a [`Message`] is left out.
///
/// # Errors
///
/// Why it cannot be read.
pub(crate) fn decode(
    routing_key: &str,
    properties: &BasicProperties,
    body: Bytes,
    go_micro: bool,
) -> Result<Arrived, String> {
    let empty = FieldTable::default();
    let table = properties.headers().as_ref().unwrap_or(&empty).inner();
    let ours = Ours::of(table);
    let topic = match ours.topic {
        Some(value) => text(TOPIC, value)?,
        None => routing_key,
    };
    let topic = Topic::new(topic).map_err(|error| error.message().to_owned())?;
    let time = |name: &str, value: Option<&AMQPValue>| {
        value.map(|value| integer(name, value).map(Timestamp::from_millis)).transpose()
    };

    let tombstone = matches!(ours.tombstone, Some(AMQPValue::Boolean(true)));
    let message = if tombstone { Message::tombstone() } else { Message::new(body) };
    let (mut message, besides) = described(message, properties);
    let seconds = properties.timestamp().and_then(|seconds| i64::try_from(seconds).ok()?.checked_mul(1000));
    if let Some(timestamp) = time(TIMESTAMP, ours.timestamp)?.or(seconds.map(Timestamp::from_millis)) {
        message = message.with_timestamp(timestamp);
    }
    if let Some(value) = ours.key {
        message = message.with_key(Bytes::copy_from_slice(raw(KEY, value)?));
    }
    if let Some(expires) = time(EXPIRES, ours.expires)? {
        message = message.with_expires_at(expires);
    }
    let (due, first) = (time(DUE, ours.due)?, time(FIRST, ours.first)?);
    // Of what is sent round after it was delivered, it is our own affair when it is due.
    let deliver_at = time(DELIVER_AT, ours.deliver_at)?.or(due.filter(|_| first.is_none()));
    if let Some(deliver_at) = deliver_at {
        message = message.with_deliver_at(deliver_at);
    }
    let attempts = match ours.attempt {
        Some(value) => u32::try_from(integer(ATTEMPT, value)?).map_err(|_| format!("header {ATTEMPT} is no count"))?,
        None => 0,
    };
    let redeliveries = ours.delivery_count.and_then(foreign::integer).and_then(|count| u64::try_from(count).ok());
    *message.headers_mut() = headers(table)?;
    add(message.headers_mut(), besides);
    if go_micro
        && let Some(content_type) = message.headers().get_str(CONTENT_TYPE).map(str::to_owned)
        && let Ok(mut with) = message.clone().with_content_type(&content_type)
    {
        with.headers_mut().remove(CONTENT_TYPE);
        message = with;
    }
    let due = due.or(deliver_at);
    Ok(Arrived { message, topic, attempts, first, due, redeliveries: redeliveries.unwrap_or(0) })
}

/// Our own headers of a message, and the server's.
#[derive(Default)]
struct Ours<'a> {
    key: Option<&'a AMQPValue>,
    timestamp: Option<&'a AMQPValue>,
    expires: Option<&'a AMQPValue>,
    due: Option<&'a AMQPValue>,
    deliver_at: Option<&'a AMQPValue>,
    tombstone: Option<&'a AMQPValue>,
    attempt: Option<&'a AMQPValue>,
    first: Option<&'a AMQPValue>,
    topic: Option<&'a AMQPValue>,
    delivery_count: Option<&'a AMQPValue>,
}

impl<'a> Ours<'a> {
    /// In one pass: most messages have a header or two, and there are ten names to look for.
    fn of(table: &'a BTreeMap<ShortString, AMQPValue>) -> Self {
        let mut ours = Self::default();
        for (name, value) in table {
            let place = match name.as_str() {
                KEY => &mut ours.key,
                TIMESTAMP => &mut ours.timestamp,
                EXPIRES => &mut ours.expires,
                DUE => &mut ours.due,
                DELIVER_AT => &mut ours.deliver_at,
                TOMBSTONE => &mut ours.tombstone,
                ATTEMPT => &mut ours.attempt,
                FIRST => &mut ours.first,
                TOPIC => &mut ours.topic,
                DELIVERY_COUNT => &mut ours.delivery_count,
                _ => continue,
            };
            *place = Some(value);
        }
        ours
    }
}

/// What there is of a message that cannot be read: its body, what its properties say, and each header as text.
pub(crate) fn salvage(properties: &BasicProperties, body: Bytes) -> Message {
    let (mut message, besides) = described(Message::new(body), properties);
    let table = properties.headers().iter().flat_map(FieldTable::inner);
    for (name, value) in table.filter(|(name, _)| name.as_str() != DELIVERY_COUNT) {
        for value in foreign::values(value) {
            // What is no name has no place.
            let _ = message.headers_mut().append(name.as_str(), value);
        }
    }
    add(message.headers_mut(), besides);
    message
}

/// Leaves out of a message what keeps a copy of it from being sent on, which somebody else wrote: headers whose names are
/// too long once they are escaped, and the largest where all fit into no frame.
pub(crate) fn fit(message: &mut Message, frame_max: usize) {
    let nameless = message.headers().iter().map(|(name, _)| name).filter(|name| wire_name(name.as_str()).is_err());
    for name in nameless.cloned().collect::<Vec<_>>() {
        message.headers_mut().remove(name.as_str());
    }
    while header_bytes(message) > frame_max {
        let largest = message.headers().iter().filter(|(name, _)| !name.as_str().starts_with("broker-"));
        let Some(name) = largest.max_by_key(|(name, value)| name.as_str().len() + value.len()) else { return };
        let name = name.0.clone();
        tracing::warn!(id = %message.id(), header = name.as_str(), "a header too large to be sent on is left out");
        message.headers_mut().remove(name.as_str());
    }
}

/// A message with what the properties say of it, and what else they say, by their names in AMQP.
fn described(mut message: Message, properties: &BasicProperties) -> (Message, Vec<(&'static str, String)>) {
    let mut besides = Vec::new();
    if let Some(id) = properties.message_id() {
        match id.as_str().parse::<MessageId>() {
            Ok(id) => message = message.with_id(id),
            Err(_) => besides.push(("message-id", id.to_string())),
        }
    }
    if let Some(content_type) = properties.content_type() {
        match message.clone().with_content_type(content_type.as_str()) {
            Ok(with) => message = with,
            Err(_) => besides.push(("content-type", content_type.to_string())),
        }
    }
    for (name, value) in [
        ("content-encoding", properties.content_encoding()),
        ("correlation-id", properties.correlation_id()),
        ("reply-to", properties.reply_to()),
        ("type", properties.kind()),
        ("app-id", properties.app_id()),
        ("user-id", properties.user_id()),
    ] {
        besides.extend(value.as_ref().map(|value| (name, value.to_string())));
    }
    besides.extend(properties.priority().map(|priority| ("priority", priority.to_string())));
    (message, besides)
}

/// Adds headers where there is none of the name. What has control characters was no text ([`sieve`](crate::sieve)).
fn add(headers: &mut Headers, besides: Vec<(&'static str, String)>) {
    for (name, value) in besides {
        if headers.get(name).is_none() && !value.contains(char::is_control) {
            // They are all names.
            let _ = headers.append(name, value);
        }
    }
}

fn headers(table: &BTreeMap<ShortString, AMQPValue>) -> Result<Headers, String> {
    // What we have sent through a delay queue, the server has marked; nobody else has a use for that. What else bears
    // such a name then was escaped by us.
    let delayed = table.contains_key(DUE) || table.contains_key(ATTEMPT);
    let mut headers = Headers::new();
    let mut add = |name: &str, value: Bytes| {
        // A name that is none (a control character in it) was put there by somebody else.
        let _ = headers.append(name, value);
    };
    let mut by_name: BTreeMap<&str, VecDeque<Bytes>> = BTreeMap::new();
    for (wire, value) in table {
        let wire = wire.as_str();
        let name = match wire.strip_prefix(ESCAPED) {
            Some(name) => name,
            None if wire.starts_with(OURS) || wire == DELIVERY_COUNT => continue,
            None if delayed && is_mark(wire) => continue,
            None => wire,
        };
        by_name.entry(name).or_default().extend(foreign::values(value));
    }
    if let Some(order) = table.get(ORDER) {
        for name in text(ORDER, order)?.split('\n') {
            if let Some(value) = by_name.get_mut(name).and_then(VecDeque::pop_front) {
                add(name, value);
            }
        }
    }
    // Sorted by the names on the wire, as they were written.
    let mut rest: Vec<_> = by_name.into_iter().collect();
    rest.sort_by_key(|(name, _)| wire_name(name).ok());
    for (name, values) in rest {
        values.into_iter().for_each(|value| add(name, value));
    }
    Ok(headers)
}

fn raw<'a>(name: &str, value: &'a AMQPValue) -> Result<&'a [u8], String> {
    match value {
        AMQPValue::LongString(bytes) => Ok(bytes.as_bytes()),
        AMQPValue::ByteArray(bytes) => Ok(bytes.as_slice()),
        _ => Err(format!("header {name} is no string")),
    }
}

fn text<'a>(name: &str, value: &'a AMQPValue) -> Result<&'a str, String> {
    std::str::from_utf8(raw(name, value)?).map_err(|_| format!("header {name} is not UTF-8"))
}

fn integer(name: &str, value: &AMQPValue) -> Result<i64, String> {
    foreign::integer(value).ok_or_else(|| format!("header {name} is no integer"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STYLE: Style = Style { persistent: true, go_micro: false };

    fn round_trip(message: &Message) -> Message {
        let properties = encode(message, &Travel::default(), STYLE).unwrap();
        let arrived = decode("a.b", &properties, message.payload().clone(), false).unwrap();
        assert_eq!((arrived.topic.as_str(), arrived.attempts), ("a.b", 0));
        arrived.message
    }

    /// A frame that is too long would end the connection, whenever the message is sent again.
    #[test]
    fn no_header_is_longer_than_it_is_taken_for() {
        let time = Timestamp::from_millis(1 << 50);
        let mut message = Message::tombstone()
            .with_id("i".repeat(255).parse().unwrap())
            .with_content_type(format!("a/{}", "b".repeat(253)))
            .unwrap()
            .with_key("k")
            .with_expires_at(time)
            .with_deliver_at(time);
        for name in ["x-death", "CC", "b", "a", "a"] {
            message = message.with_header(name, "").unwrap();
        }
        let topic = Topic::new("t".repeat(249)).unwrap();
        let travel = Travel { attempts: 1, first: Some(time), topic: Some(topic), due: Some(time), kept: true };
        for style in [STYLE, Style { persistent: true, go_micro: true }] {
            let properties = encode(&message, &travel, style).unwrap();
            let written =
                lapin::protocol::basic::gen_properties(&properties)(Vec::new().into()).unwrap().into_inner().0;
            // Beside them there are the 8 bytes of the frame, and 12 of the content header.
            let (bytes, taken_for) = (written.len() + 20, header_bytes(&message));
            assert!(bytes <= taken_for, "{bytes} bytes, taken for {taken_for}: {style:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            names in proptest::collection::vec(("[a-cA-C]{1,2}|CC|x-death|x-broker-key|ü", proptest::collection::vec(any::<u8>(), 0..4)), 0..8),
            key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..5)),
            millis in any::<i64>(), expires in proptest::option::of(0_i64..1 << 50), tombstone in any::<bool>(),
            deliver_at in proptest::option::of(0_i64..1 << 50), again in 0_i64..1 << 50,
        ) {
            let mut message = if tombstone { Message::tombstone() } else { Message::new("payload") };
            message = message.with_timestamp(Timestamp::from_millis(millis));
            for (name, value) in names {
                message = message.with_header(name, value).unwrap();
            }
            if let Some(key) = key {
                message = message.with_key(key);
            }
            if let Some(expires) = expires {
                message = message.with_expires_at(Timestamp::from_millis(expires));
            }
            if let Some(deliver_at) = deliver_at {
                message = message.with_deliver_at(Timestamp::from_millis(deliver_at));
            }
            prop_assert_eq!(round_trip(&message), message.clone());

            let again = Timestamp::from_millis(again);
            let travel = Travel { attempts: 1, first: Some(again), due: Some(again), ..Travel::default() };
            let properties = encode(&message, &travel, STYLE).unwrap();
            let arrived = decode("a.b", &properties, message.payload().clone(), false).unwrap();
            prop_assert_eq!((arrived.due, arrived.attempts), (Some(again), 1));
            prop_assert_eq!(arrived.message, message);
        }
    }

    /// As they were written before the due time of a retry and the delivery time of a message were told apart.
    #[test]
    fn what_waits_in_a_queue_from_before_is_read() {
        let arrived = |names: &[&str]| {
            let table: BTreeMap<_, _> =
                names.iter().map(|name| (ShortString::from(*name), AMQPValue::LongLongInt(7))).collect();
            let properties = BasicProperties::default().with_headers(FieldTable::from(table));
            decode("a", &properties, Bytes::new(), false).unwrap()
        };
        let time = Some(Timestamp::from_millis(7));
        let delayed = arrived(&[DUE]);
        assert_eq!((delayed.due, delayed.message.deliver_at()), (time, time));
        let retried = arrived(&[DUE, ATTEMPT, FIRST]);
        assert_eq!((retried.due, retried.message.deliver_at()), (time, None));
    }

    /// As RabbitMQ 3.13 writes them; 3.10 has no `x-last-death-`.
    #[test]
    fn of_what_went_through_a_delay_queue_the_marks_of_the_server_are_left_out_and_nothing_else() {
        let marks = ["x-death", "x-first-death-queue", "x-first-death-reason", "x-first-death-exchange"];
        let marks = [&marks[..], &["x-last-death-queue", "x-last-death-reason", "x-last-death-exchange"]].concat();
        let others =
            ["x-cause-of-death", "x-my-death-count", "x-death-", "x-deathbed", "X-Death", "my-x-death", "death"];
        let mut message = Message::new("x");
        for name in marks.iter().chain(&others) {
            message = message.with_header(name, "ours").unwrap();
        }
        let travel = Travel { attempts: 1, ..Travel::default() };
        let mut properties = encode(&message, &travel, STYLE).unwrap();
        let mut table = properties.headers().clone().unwrap_or_default();
        for name in marks {
            assert!(!table.contains_key(name), "{name} travels bare");
            table.insert(name.into(), AMQPValue::LongString("the server's".into()));
        }
        properties = properties.with_headers(table);
        let arrived = decode("a", &properties, message.payload().clone(), false).unwrap().message;
        assert_eq!(arrived, message);
    }

    #[test]
    fn a_message_without_any_properties_is_read() {
        let arrived = decode("a", &BasicProperties::default(), Bytes::from_static(b"x"), false).unwrap();
        assert_eq!((arrived.message.payload().as_ref(), arrived.message.key()), (&b"x"[..], None));
    }

    #[test]
    fn what_others_say_in_properties_is_in_headers() {
        let table = FieldTable::from(BTreeMap::from([
            (ShortString::from("reply-to"), AMQPValue::LongString("a header".into())),
            (ShortString::from(KEY), AMQPValue::FieldTable(FieldTable::default())),
            (ShortString::from("good"), AMQPValue::Boolean(true)),
        ]));
        let properties = BasicProperties::default()
            .with_message_id("7".into())
            .with_content_type("no type \u{e9}".into())
            .with_content_encoding("gzip".into())
            .with_reply_to("a property".into())
            .with_priority(3)
            .with_headers(table);
        let shown = |message: &Message| {
            let mut all: Vec<_> =
                message.headers().iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
            all.sort();
            all
        };
        let expected = |pairs: &[(&str, &'static str)]| {
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), Bytes::from_static(value.as_bytes())))
                .collect::<Vec<_>>()
        };
        let common = [
            ("content-encoding", "gzip"),
            ("content-type", "no type \u{e9}"),
            ("good", "true"),
            ("priority", "3"),
            ("reply-to", "a header"),
        ];
        // The key is broken: what there is is kept, with what broke it.
        assert!(decode("a", &properties, Bytes::new(), false).is_err());
        let salvaged = salvage(&properties, Bytes::from_static(b"x"));
        assert_eq!((salvaged.id().to_string().as_str(), salvaged.payload().as_ref()), ("7", &b"x"[..]));
        assert_eq!(shown(&salvaged), expected(&[&common[..], &[(KEY, "{}")]].concat()));
        let mut table = properties.headers().clone().unwrap_or_default().inner().clone();
        table.remove(KEY);
        let properties = properties.with_headers(FieldTable::from(table));
        let message = decode("a", &properties, Bytes::new(), false).unwrap().message;
        assert_eq!(shown(&message), expected(&common));
        assert_eq!(shown(&round_trip(&message)), shown(&message));
    }

    #[test]
    fn what_fits_into_no_frame_loses_its_largest_headers() {
        let mut message = Message::new("x").with_header("broker-dead-reason", vec![b'r'; 900]).unwrap();
        message = message.with_header(format!("x-broker-{}", "n".repeat(246)), "").unwrap();
        for (name, bytes) in [("small", 10), ("large", 100_000), ("larger", 200_000)] {
            message = message.with_header(name, vec![b'x'; bytes]).unwrap();
        }
        fit(&mut message, 131_072);
        let names: Vec<_> = message.headers().iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["broker-dead-reason", "small", "large"]);
        fit(&mut message, 3_000);
        assert_eq!(message.headers().len(), 2);
        fit(&mut message, 10);
        assert_eq!(message.headers().len(), 1);
        assert!(check(&message, 131_072).is_ok());
    }

    #[test]
    fn what_is_ours_and_broken_is_told() {
        let table = FieldTable::from(BTreeMap::from([(ShortString::from(KEY), AMQPValue::LongInt(1))]));
        let properties = BasicProperties::default().with_headers(table);
        assert_eq!(decode("a", &properties, Bytes::new(), false).unwrap_err(), "header x-broker-key is no string");
        assert!(decode("a b", &BasicProperties::default(), Bytes::new(), false).is_err());
    }

    #[test]
    fn go_micro_gets_strings_and_nothing_else() {
        let message =
            Message::new("{}").with_content_type("application/json").unwrap().with_header("x-trace", "abc").unwrap();
        let properties = encode(&message, &Travel::default(), Style { go_micro: true, ..STYLE }).unwrap();
        let table = properties.headers().clone().unwrap_or_default();
        let names: Vec<_> = table.inner().keys().map(ShortString::as_str).collect();
        assert_eq!(names, ["Content-Type", "x-trace"]);
        assert!(table.inner().values().all(|value| matches!(value, AMQPValue::LongString(_))));
        // As recorded from Go Micro: no property at all.
        let bare = BasicProperties::default().with_headers(table);
        let arrived = decode("orders.created", &bare, Bytes::from_static(b"{}"), true).unwrap().message;
        assert_eq!(arrived.content_type(), Some("application/json"));
        assert_eq!((arrived.headers().len(), arrived.headers().get_str("x-trace")), (1, Some("abc")));
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused() {
        let long = Message::new("").with_header(format!("x-broker-{}", "n".repeat(246)), "").unwrap();
        assert_eq!(check(&long, 131_072).unwrap_err().kind(), broker_core::ErrorKind::Invalid);
        let large = Message::new("").with_header("n", vec![0; 131_072]).unwrap();
        assert_eq!(check(&large, 131_072).unwrap_err().kind(), broker_core::ErrorKind::Unsupported);
    }
}
