//! How an in-process broker is set up.

use std::time::Duration;

use super::history::Retention;
use crate::{BrokerUrl, Error, Result};

/// How a [`MemoryBroker`](crate::MemoryBroker) is set up.
///
/// In a URL: `memory:NAME?max_message_bytes=…&retain=MESSAGES&retain_bytes=…&retain_age=…&retain_total_bytes=…&dedup_window=…&max_dead_letters=…`.
///
/// ```
/// use std::time::Duration;
/// use broker_core::{MemoryOptions, Retention};
///
/// let options = MemoryOptions::new()
///     .with_retention(Retention::messages(10_000))
///     .with_dedup_window(Duration::from_secs(10));
/// assert_eq!(options.max_message_bytes, 1 << 20);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryOptions {
    /// Bytes of payload, key and headers a message has at most (default 1 MiB).
    pub max_message_bytes: usize,
    /// What every topic retains for who comes later (default nothing).
    pub retention: Option<Retention>,
    /// How long a deduplication key is remembered (default 2 minutes). A topic remembers 100,000 keys at
    /// most, and all topics together 1,000,000 and one a topic beyond (a key of 36 bytes takes some 200):
    /// where more are published within this time, the topic's oldest are forgotten early, uncounted.
    pub dedup_window: Duration,
    /// Dead letters a group keeps at most (default 10,000).
    pub max_dead_letters: usize,
    /// Bytes of dead letters a group keeps at most (default 64 MiB).
    pub max_dead_letter_bytes: u64,
}

/// What a batch's counter has bits for, with 256 messages in it.
const MAX_MESSAGE_BYTES: usize = 1 << 30;

impl MemoryOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self {
            max_message_bytes: 1 << 20,
            retention: None,
            dedup_window: Duration::from_secs(120),
            max_dead_letters: 10_000,
            max_dead_letter_bytes: 64 << 20,
        }
    }

    /// Sets how large a message may be, 1 GiB at most.
    #[must_use]
    pub fn with_max_message_bytes(mut self, max_message_bytes: usize) -> Self {
        self.max_message_bytes = max_message_bytes.min(MAX_MESSAGE_BYTES);
        self
    }

    /// Sets what every topic retains.
    #[must_use]
    pub fn with_retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }

    /// Sets how long a deduplication key is remembered.
    #[must_use]
    pub fn with_dedup_window(mut self, window: Duration) -> Self {
        self.dedup_window = window;
        self
    }

    /// Sets how many dead letters a group keeps.
    #[must_use]
    pub fn with_max_dead_letters(mut self, max_dead_letters: usize) -> Self {
        self.max_dead_letters = max_dead_letters;
        self
    }

    /// Takes the parameters of a URL.
    pub(super) fn from_url(url: &mut BrokerUrl) -> Result<Self> {
        let mut options = Self::new();
        if let Some(bytes) = url.parameter("max_message_bytes")? {
            if !(1..=MAX_MESSAGE_BYTES).contains(&bytes) {
                return Err(Error::invalid("broker URL parameter max_message_bytes: it is 1 to 1073741824"));
            }
            options.max_message_bytes = bytes;
        }
        let messages = url.parameter("retain")?;
        let bytes = url.parameter("retain_bytes")?;
        let age = url.duration("retain_age")?;
        let total = url.parameter("retain_total_bytes")?;
        if messages.is_some() || bytes.is_some() || age.is_some() || total.is_some() {
            let retention =
                Retention::messages(messages.unwrap_or(usize::MAX)).with_max_total_bytes(total.unwrap_or(u64::MAX));
            options.retention =
                Some(retention.with_max_bytes(bytes.unwrap_or(16 << 20)).with_max_age(age.unwrap_or(Duration::MAX)));
        }
        if let Some(window) = url.duration("dedup_window")? {
            options.dedup_window = window;
        }
        if let Some(letters) = url.parameter("max_dead_letters")? {
            options.max_dead_letters = letters;
        }
        Ok(options)
    }
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self::new()
    }
}
