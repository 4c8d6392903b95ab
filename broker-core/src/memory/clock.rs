//! Milliseconds since the broker was made, by a clock that never goes back.

use std::time::Duration;

use tokio::time::Instant;

/// Ticks of a millisecond; delays round up, so that each is a floor.
pub(super) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now() }
    }

    /// The present.
    pub(super) fn tick(&self) -> u64 {
        to_millis(self.epoch.elapsed())
    }

    /// The first tick that is at least `wait` from now.
    pub(super) fn tick_after(&self, wait: Duration) -> u64 {
        to_millis(self.epoch.elapsed().saturating_add(wait).saturating_add(Duration::from_nanos(999_999)))
    }

    /// When `tick` is. A tick beyond a year is far enough for whoever sleeps until then.
    pub(super) fn instant(&self, tick: u64) -> Instant {
        const YEAR: u64 = 366 * 24 * 3600 * 1000;
        self.epoch + Duration::from_millis(tick.min(self.tick().saturating_add(YEAR)))
    }
}

fn to_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
