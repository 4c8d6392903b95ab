//! The last pushes of a subscription, for whoever asks what happened.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{MessageId, Timestamp};
use serde::{Serialize, Serializer};

/// Pushes remembered per subscription.
const KEPT: usize = 100;

/// One push of one message.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Attempt {
    /// The message.
    pub id: MessageId,
    /// How often it had been delivered, this time included: 1 is the first.
    pub attempt: u32,
    /// The HTTP status, if the endpoint answered.
    pub status: Option<u16>,
    /// From the first step towards the endpoint to the last byte of the answer.
    #[serde(rename = "latency_ms", serialize_with = "millis")]
    pub latency: Duration,
    /// Why it was not acked.
    #[serde(serialize_with = "text")]
    pub error: Option<Arc<str>>,
    /// When it began.
    pub time: Timestamp,
}

fn millis<S: Serializer>(latency: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    // To the microsecond: on loopback a push takes a fraction of a millisecond.
    serializer.serialize_f64((latency.as_secs_f64() * 1e6).round() / 1e3)
}

fn text<S: Serializer>(error: &Option<Arc<str>>, serializer: S) -> Result<S::Ok, S::Error> {
    error.as_deref().serialize(serializer)
}

/// The last [`KEPT`] pushes.
#[derive(Debug, Default)]
pub(crate) struct Attempts(VecDeque<Attempt>);

impl Attempts {
    /// Remembers a push, and forgets the oldest where there are too many.
    pub(crate) fn push(&mut self, attempt: Attempt) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(attempt);
    }

    /// The newest first.
    pub(crate) fn newest_first(&self) -> Vec<Attempt> {
        self.0.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_and_shows_the_newest_first() {
        let mut attempts = Attempts::default();
        for number in 1..=KEPT as u32 + 5 {
            attempts.push(Attempt {
                id: "order-42".parse().unwrap(),
                attempt: number,
                status: Some(500),
                latency: Duration::from_micros(1_500),
                error: Some("the endpoint answered 500".into()),
                time: Timestamp::from_millis(0),
            });
        }
        let kept: Vec<_> = attempts.newest_first().iter().map(|attempt| attempt.attempt).collect();
        assert_eq!(kept, (6..=KEPT as u32 + 5).rev().collect::<Vec<_>>());
        assert_eq!(
            serde_json::to_value(&attempts.newest_first()[0]).unwrap(),
            serde_json::json!({
                "id": "order-42", "attempt": 105, "status": 500, "latency_ms": 1.5,
                "error": "the endpoint answered 500", "time": "1970-01-01T00:00:00.000Z",
            })
        );
    }
}
