//! How often and when a message is delivered again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, duration_text};

/// Retries of a message: exponential backoff with full jitter, and a limit of deliveries.
///
/// `retry()` after the nth delivery waits a uniform time between zero and
/// `min(max, initial × multiplier^(n-1))` ("Exponential Backoff And Jitter", AWS Architecture
/// Blog). After `max_attempts` deliveries, the first included, the message is dead-lettered.
///
/// ```
/// use std::time::Duration;
/// use broker_core::RetryPolicy;
///
/// let policy = RetryPolicy::default().with_max_attempts(3)?;
/// assert_eq!(policy.ceiling(1), Duration::from_secs(1));
/// assert_eq!(policy.ceiling(4), Duration::from_secs(8));
/// assert_eq!(policy.ceiling(1_000), Duration::from_secs(600));
/// assert!(policy.backoff(4) <= Duration::from_secs(8));
/// assert!(policy.is_exhausted(3));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct RetryPolicy {
    max_attempts: u32,
    initial: Duration,
    max: Duration,
    multiplier: f64,
}

/// The policy as it is written; unknown fields are refused, missing ones are the defaults.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Fields {
    max_attempts: u32,
    #[serde(with = "duration_text")]
    initial: Duration,
    #[serde(with = "duration_text")]
    max: Duration,
    multiplier: f64,
}

impl Default for RetryPolicy {
    /// 20 deliveries; from 1 second, doubling, to 10 minutes.
    fn default() -> Self {
        Self { max_attempts: 20, initial: Duration::from_secs(1), max: Duration::from_secs(600), multiplier: 2.0 }
    }
}

impl RetryPolicy {
    /// Sets how often a message is delivered at most, the first time included.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for zero.
    pub fn with_max_attempts(self, max_attempts: u32) -> Result<Self> {
        Self { max_attempts, ..self }.checked()
    }

    /// Sets the backoff: the first ceiling, the highest, and the factor between two.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if `initial` exceeds `max`, or `multiplier` is below
    /// 1 or not finite.
    ///
    /// ```
    /// use std::time::Duration;
    /// use broker_core::RetryPolicy;
    /// let policy = RetryPolicy::default();
    /// assert!(policy.with_backoff(Duration::from_millis(10), Duration::from_secs(1), 2.0).is_ok());
    /// assert!(policy.with_backoff(Duration::from_millis(10), Duration::from_secs(1), 0.5).is_err());
    /// ```
    pub fn with_backoff(self, initial: Duration, max: Duration, multiplier: f64) -> Result<Self> {
        Self { initial, max, multiplier, ..self }.checked()
    }

    fn checked(self) -> Result<Self> {
        if self.max_attempts == 0 {
            return Err(Error::invalid("retry max_attempts is 0: it counts the first delivery too, so 1 is the least"));
        }
        if !self.multiplier.is_finite() || self.multiplier < 1.0 {
            return Err(Error::invalid(format!(
                "retry multiplier is {}: it is a number of 1 or more",
                self.multiplier
            )));
        }
        if self.initial > self.max {
            return Err(Error::invalid("retry initial is longer than retry max"));
        }
        Ok(self)
    }

    /// Deliveries at most, the first included.
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// Whether delivery number `attempt` was the last one allowed.
    pub fn is_exhausted(&self, attempt: u32) -> bool {
        attempt >= self.max_attempts
    }

    /// The longest wait after delivery number `attempt` (1 is the first).
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.initial.as_secs_f64() * self.multiplier.powi(exponent);
        // Infinite and NaN (zero times infinity) both end here.
        if seconds < self.max.as_secs_f64() { Duration::from_secs_f64(seconds) } else { self.max }
    }

    /// A wait after delivery number `attempt`, drawn anew: uniform between zero and the
    /// [ceiling](Self::ceiling).
    pub fn backoff(&self, attempt: u32) -> Duration {
        self.ceiling(attempt).mul_f64(fastrand::f64())
    }
}

impl TryFrom<Fields> for RetryPolicy {
    type Error = String;

    fn try_from(fields: Fields) -> Result<Self, String> {
        let Fields { max_attempts, initial, max, multiplier } = fields;
        Self { max_attempts, initial, max, multiplier }.checked().map_err(|error| error.message().to_owned())
    }
}

impl From<RetryPolicy> for Fields {
    fn from(policy: RetryPolicy) -> Self {
        let RetryPolicy { max_attempts, initial, max, multiplier } = policy;
        Self { max_attempts, initial, max, multiplier }
    }
}

impl Default for Fields {
    fn default() -> Self {
        RetryPolicy::default().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_backoff_never_exceeds_its_ceiling_nor_the_maximum(
            initial in 0_u64..1_000_000, more in 0_u64..1_000_000, multiplier in 1.0_f64..1e300, attempt in 0_u32..,
        ) {
            let (initial, max) = (Duration::from_millis(initial), Duration::from_millis(initial + more));
            let policy = RetryPolicy::default().with_backoff(initial, max, multiplier).unwrap();
            prop_assert!(policy.ceiling(attempt) <= max);
            prop_assert!(policy.backoff(attempt) <= policy.ceiling(attempt));
        }
    }

    #[test]
    fn json_names_what_it_does_not_know() {
        let policy: RetryPolicy = serde_json::from_str(r#"{"max_attempts":3,"initial":"10ms"}"#).unwrap();
        assert_eq!(
            (policy.max_attempts, policy.initial, policy.max),
            (3, Duration::from_millis(10), Duration::from_secs(600))
        );
        for (bad, named) in [
            (r#"{"max_attempts":0}"#, "max_attempts"),
            (r#"{"multiplier":0.5}"#, "multiplier"),
            (r#"{"initial":"1h"}"#, "initial"),
            (r#"{"attempts":3}"#, "attempts"),
        ] {
            let error = serde_json::from_str::<RetryPolicy>(bad).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
