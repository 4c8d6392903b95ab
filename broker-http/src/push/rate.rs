//! How many messages a second an endpoint gets.

use std::time::Duration;

use tokio::time::Instant;

use crate::tokens::Tokens;

/// A bucket that fills at a rate and holds a tenth of a second of it (one message at least), so
/// that a limit holds over short times too.
#[derive(Debug)]
pub(crate) struct Rate {
    tokens: Tokens,
}

impl Rate {
    /// A full bucket. `per_second` is finite and above zero.
    pub(crate) fn new(per_second: f64, now: Instant) -> Self {
        Self { tokens: Tokens::new(per_second, (per_second / 10.0).max(1.0), now) }
    }

    /// Messages that may be sent now, or when the next one may.
    pub(crate) fn available(&mut self, now: Instant) -> Result<usize, Instant> {
        let tokens = self.tokens.left(now);
        if tokens >= 1.0 {
            return Ok(tokens as usize);
        }
        // A day at most, so that the slowest rate is no overflow; rounded up, so that the token is
        // there when the time has come.
        let wait = self.tokens.until(1.0).min(Duration::from_secs(86_400));
        Err(now + wait + Duration::from_micros(1))
    }

    /// So many are sent.
    pub(crate) fn take(&mut self, messages: usize) {
        self.tokens.take(messages as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_slow_rate_is_one_at_a_time() {
        let start = Instant::now();
        let mut rate = Rate::new(0.5, start);
        assert_eq!(rate.available(start), Ok(1));
        rate.take(1);
        let next = rate.available(start).unwrap_err();
        assert!((next - start).as_secs_f64() - 2.0 < 0.001);
        assert_eq!(rate.available(next), Ok(1));
        assert_eq!(rate.available(start + Duration::from_secs(3600)), Ok(1), "nothing is saved up");
    }

    #[test]
    fn the_slowest_rate_is_no_overflow() {
        let start = Instant::now();
        let mut rate = Rate::new(f64::MIN_POSITIVE, start);
        rate.take(1);
        assert!(rate.available(start).unwrap_err() > start);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_a_burst_and_never_idle(
            per_second in 0.1_f64..10_000.0, steps in prop::collection::vec(1_u64..200_000, 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut rate = Rate::new(per_second, start);
            let mut sent = 0_usize;
            for step in steps {
                now += Duration::from_micros(step);
                match rate.available(now) {
                    Ok(count) => { rate.take(count); sent += count; }
                    Err(next) => {
                        prop_assert!(next > now);
                        prop_assert!(rate.available(next).is_ok(), "the token is there when it is said to be");
                        now = next;
                    }
                }
                let allowed = (now - start).as_secs_f64() * per_second + (per_second / 10.0).max(1.0);
                prop_assert!(sent as f64 <= allowed + 1e-6, "{sent} sent, {allowed} allowed");
            }
        }
    }
}
