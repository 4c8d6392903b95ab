//! How much one identity may do: a bucket of requests and messages that fills with time.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

use http::{HeaderMap, HeaderValue};

/// A bucket that holds `burst` and fills at `per_second`. It may be overdrawn by a batch, whose size
/// is known only once it is read, and then lets nobody through until it is full again that far.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_second: f64,
    burst: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new(per_second: f64, burst: Option<u32>) -> Self {
        let burst = burst.map_or_else(|| per_second.ceil().max(1.0), f64::from);
        Self { per_second, burst, state: Mutex::new(State { left: burst, at: Instant::now() }) }
    }

    fn filled(&self, state: &mut State) {
        let now = Instant::now();
        state.left = (state.left + now.duration_since(state.at).as_secs_f64() * self.per_second).min(self.burst);
        state.at = now;
    }

    fn until(&self, wanted: f64, left: f64) -> Duration {
        // A rate is never less than a thousandth.
        Duration::try_from_secs_f64((wanted - left).max(0.0) / self.per_second).unwrap_or(Duration::MAX)
    }

    /// Takes one, or tells how long until there is one.
    pub(crate) fn take(&self) -> Result<(), Duration> {
        let mut state = self.state.lock();
        self.filled(&mut state);
        if state.left < 1.0 {
            return Err(self.until(1.0, state.left));
        }
        state.left -= 1.0;
        Ok(())
    }

    /// Takes more than one thing let through turned out to be.
    pub(crate) fn overdraw(&self, count: usize) {
        let mut state = self.state.lock();
        self.filled(&mut state);
        state.left -= count as f64;
    }

    /// How long until nothing is owed: what a stream waits for before it reads on.
    pub(crate) fn owed(&self) -> Duration {
        let mut state = self.state.lock();
        self.filled(&mut state);
        self.until(0.0, state.left)
    }

    /// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10): what may be done,
    /// and what is left of it.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let left = {
            let mut state = self.state.lock();
            self.filled(&mut state);
            state.left
        };
        let window = (self.burst / self.per_second).ceil().max(1.0);
        let full = self.until(self.burst, left).as_secs_f64().ceil();
        let policy = format!("\"identity\";q={};w={window}", self.burst);
        let now = format!("\"identity\";r={};t={full}", left.max(0.0).floor());
        for (name, text) in [("ratelimit-policy", policy), ("ratelimit", now)] {
            if let Ok(value) = HeaderValue::try_from(text) {
                headers.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_then_the_rate() {
        let bucket = Bucket::new(2.0, Some(3));
        for _ in 0..3 {
            assert_eq!(bucket.take(), Ok(()));
        }
        assert_eq!(bucket.take(), Err(Duration::from_millis(500)));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(bucket.take(), Ok(()));
        bucket.overdraw(4);
        assert_eq!(bucket.owed(), Duration::from_secs(2));
        assert_eq!(bucket.take(), Err(Duration::from_millis(2_500)));
        tokio::time::advance(Duration::from_secs(3600)).await;
        let mut headers = HeaderMap::new();
        bucket.tell(&mut headers);
        assert_eq!(headers["ratelimit-policy"], "\"identity\";q=3;w=2");
        assert_eq!(headers["ratelimit"], "\"identity\";r=3;t=0");
    }
}
