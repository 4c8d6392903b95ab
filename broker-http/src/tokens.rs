//! The token bucket: how much of something there may be at once, and how much a second.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket that fills with time. It may be overdrawn.
#[derive(Debug)]
pub(crate) struct Tokens {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

impl Tokens {
    /// A full bucket of `burst`. `per_second` is finite and above zero.
    pub(crate) fn new(per_second: f64, burst: f64, now: Instant) -> Self {
        Self { per_second, burst, left: burst, at: now }
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.per_second
    }

    pub(crate) fn burst(&self) -> f64 {
        self.burst
    }

    /// How much there is now; below zero it is owed.
    pub(crate) fn left(&mut self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        // What was earned beyond it stays.
        self.left = self.left.max((self.left + passed * self.per_second).min(self.burst));
        self.at = self.at.max(now);
        self.left
    }

    pub(crate) fn take(&mut self, count: f64) {
        self.left -= count;
    }

    /// More, up to so much beyond what it holds by itself.
    pub(crate) fn earn(&mut self, count: f64, beyond: f64) {
        self.left = self.left.max((self.left + count).min(self.burst + beyond));
    }

    /// How long until there is so much, from when it was last looked at.
    pub(crate) fn until(&self, wanted: f64) -> Duration {
        Duration::try_from_secs_f64((wanted - self.left).max(0.0) / self.per_second).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fills_with_time_and_keeps_what_is_earned() {
        let start = Instant::now();
        let mut tokens = Tokens::new(2.0, 3.0, start);
        tokens.take(7.0);
        assert_eq!((tokens.left(start), tokens.until(0.0)), (-4.0, Duration::from_secs(2)));
        assert_eq!(tokens.left(start + Duration::from_secs(3)), 2.0);
        // Time does not go back.
        assert_eq!(tokens.left(start), 2.0);
        assert_eq!(tokens.left(start + Duration::from_secs(3_600)), 3.0);
        tokens.earn(100.0, 10.0);
        assert_eq!(tokens.left(start + Duration::from_secs(7_200)), 13.0);
        tokens.earn(1.0, 0.0);
        assert_eq!(tokens.left(start), 13.0);
    }

    #[test]
    fn the_slowest_is_no_overflow() {
        let mut tokens = Tokens::new(f64::MIN_POSITIVE, 1.0, Instant::now());
        tokens.take(1.0);
        assert_eq!(tokens.until(1.0), Duration::MAX);
    }
}
