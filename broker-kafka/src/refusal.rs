//! What is refused before it reaches the server.

use broker_core::{Error, Message, PublisherOptions, Result, Topic};

/// Checks that Kafka can keep what a publisher asks for.
///
/// # Errors
///
/// [`Unsupported`](broker_core::ErrorKind::Unsupported) for `require_route`.
///
/// ```
/// use broker_core::{ErrorKind, PublisherOptions};
///
/// let error = broker_kafka::check_options(&PublisherOptions::new().with_require_route(true)).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Unsupported);
/// ```
pub fn check_options(options: &PublisherOptions) -> Result<()> {
    if options.require_route {
        return Err(Error::unsupported("require_route: a Kafka topic is a log, and keeps what no group reads"));
    }
    Ok(())
}

/// Checks that Kafka can keep what a message asks for.
///
/// # Errors
///
/// [`Unsupported`](broker_core::ErrorKind::Unsupported) for a delivery time or a deduplication key.
///
/// ```
/// use std::time::Duration;
/// use broker_core::{ErrorKind, Message};
///
/// let later = Message::new("42").with_delay(Duration::from_secs(1));
/// assert_eq!(broker_kafka::check_message(&later).unwrap_err().kind(), ErrorKind::Unsupported);
/// assert!(broker_kafka::check_message(&Message::tombstone().with_ttl(Duration::from_secs(1))).is_ok());
/// ```
pub fn check_message(message: &Message) -> Result<()> {
    let asks_for = if message.deliver_at().is_some() {
        "a delivery time"
    } else if message.dedup_key().is_some() {
        "a deduplication key"
    } else {
        return Ok(());
    };
    Err(Error::unsupported(format!("message {}: it has {asks_for}, which Kafka cannot keep", message.id())))
}

/// Checks that none of the `existing` topics differs from `topic` only in having `.` where the other
/// has `_`: Kafka's metrics cannot tell such topics apart, and its tools refuse to make the second.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid), naming the other topic.
///
/// ```
/// use broker_core::Topic;
///
/// let topic = Topic::new("orders.created")?;
/// assert!(broker_kafka::check_collision(&topic, ["orders.created", "orders-created"]).is_ok());
/// let error = broker_kafka::check_collision(&topic, ["orders_created"]).unwrap_err();
/// assert!(error.message().contains("orders_created"));
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn check_collision<'a>(topic: &Topic, existing: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let as_kafka_sees_it = |name: &str| name.replace('.', "_");
    let wanted = as_kafka_sees_it(topic.as_str());
    match existing.into_iter().find(|other| *other != topic.as_str() && as_kafka_sees_it(other) == wanted) {
        None => Ok(()),
        Some(other) => Err(Error::invalid(format!(
            "topic {topic}: Kafka cannot tell it from the topic {other}, which exists; use that or another name"
        ))),
    }
}
