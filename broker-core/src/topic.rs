//! Where a message goes: a checked name.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::{Error, Result};

/// Bytes a topic may have: the most that Kafka carries.
pub(crate) const MAX_TOPIC_BYTES: usize = 249;

/// The name messages are published under: dot-separated segments of `[A-Za-z0-9_-]`, 249 bytes at
/// most, which is what every broker can carry.
///
/// Checked once, here; past this point nobody checks again. Cloning is a reference count.
///
/// A topic whose first segment begins with `broker-` is the broker's own: it can be named and
/// subscribed to, but [`Broker::publisher`](crate::Broker::publisher) refuses it.
///
/// ```
/// use broker_core::Topic;
///
/// let topic = Topic::new("orders.created")?;
/// assert_eq!(topic.segments().collect::<Vec<_>>(), ["orders", "created"]);
/// assert!(Topic::new("orders.*").is_err());
/// assert!(Topic::new("broker-retry.orders")?.is_reserved());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

impl Topic {
    /// Parses a topic.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), naming the topic and what is allowed.
    pub fn new(name: impl AsRef<str>) -> Result<Self> {
        let name = name.as_ref();
        check_segments("topic", name, MAX_TOPIC_BYTES)?;
        Ok(Self(name.into()))
    }

    /// The topic as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parts between the dots, at least one.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// Whether the topic is the broker's own, refused from publishers.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with("broker-")
    }
}

/// Checks what a topic, a group name and the literal part of a filter have in common.
pub(crate) fn check_segments(what: &str, name: &str, max: usize) -> Result<()> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > max {
        return Err(Error::invalid(format!("{what} of {} bytes: at most {max} are allowed", name.len())));
    } else if name.split('.').any(str::is_empty) {
        "a segment is empty"
    } else if !name.bytes().all(|byte| byte == b'.' || is_segment_byte(byte)) {
        "it has a character that is not allowed"
    } else {
        return Ok(());
    };
    Err(Error::invalid(format!(
        "{what} {name:?}: {problem}; it is dot-separated segments of A-Z, a-z, 0-9, '_' and '-', {max} bytes at most"
    )))
}

fn is_segment_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Topic({})", self.0)
    }
}

impl AsRef<str> for Topic {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for Topic {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<String> for Topic {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<&str> for Topic {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl From<Topic> for String {
    fn from(topic: Topic) -> Self {
        topic.as_str().to_owned()
    }
}

crate::text::serde_as_text!(Topic);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_every_broker_carries_and_nothing_else() {
        for good in ["a", "orders.created", "A_b-9.0", "__internal", &"x".repeat(249)] {
            assert!(Topic::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "ä", "a/b", "a*", "*", ">", "a\n", &"x".repeat(250)] {
            let error = Topic::new(bad).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{bad}");
        }
    }
}
