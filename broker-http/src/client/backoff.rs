//! Waits between attempts to reach the daemon: growing, jittered, capped.

use std::time::Duration;

/// The wait before the next attempt doubles each time.
#[derive(Debug)]
pub(super) struct Backoff {
    initial: Duration,
    max: Duration,
    ceiling: Duration,
}

impl Backoff {
    /// For connecting again: from 25 ms to 2 s.
    pub(super) fn connecting() -> Self {
        let initial = Duration::from_millis(25);
        Self { initial, max: Duration::from_secs(2), ceiling: initial }
    }

    /// The next wait: between half the ceiling and the ceiling, so that many clients spread and
    /// none hammers.
    pub(super) fn next(&mut self) -> Duration {
        let ceiling = self.ceiling;
        self.ceiling = ceiling.saturating_mul(2).min(self.max);
        ceiling.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// It worked: the next failure begins anew.
    pub(super) fn reset(&mut self) {
        self.ceiling = self.initial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_maximum_and_begins_anew() {
        let mut backoff = Backoff::connecting();
        let waits: Vec<_> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] <= Duration::from_millis(25));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(2)));
        assert!(waits[19] >= Duration::from_secs(1));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(25));
    }
}
