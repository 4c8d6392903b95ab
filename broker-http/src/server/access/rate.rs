//! How much one identity may do: a bucket of requests and messages that fills with time.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

use http::{HeaderMap, HeaderValue};

use crate::tokens::Tokens;

/// A bucket that holds `burst` and fills at `per_second`. It may be overdrawn by a batch, whose size
/// is known only once it is read, and then lets nobody through until it is full again that far.
#[derive(Debug)]
pub(crate) struct Bucket {
    tokens: Mutex<Tokens>,
}

impl Bucket {
    pub(crate) fn new(per_second: f64, burst: Option<u32>) -> Self {
        let burst = burst.map_or_else(|| per_second.ceil().max(1.0), f64::from);
        Self { tokens: Mutex::new(Tokens::new(per_second, burst, Instant::now())) }
    }

    /// Takes one, or tells how long until there is one.
    pub(crate) fn take(&self) -> Result<(), Duration> {
        let mut tokens = self.tokens.lock();
        if tokens.left(Instant::now()) < 1.0 {
            return Err(tokens.until(1.0));
        }
        tokens.take(1.0);
        Ok(())
    }

    /// Takes more than one thing let through turned out to be.
    pub(crate) fn overdraw(&self, count: usize) {
        let mut tokens = self.tokens.lock();
        tokens.left(Instant::now());
        tokens.take(count as f64);
    }

    /// How long until nothing is owed: what a stream waits for before it reads on.
    pub(crate) fn owed(&self) -> Duration {
        let mut tokens = self.tokens.lock();
        tokens.left(Instant::now());
        tokens.until(0.0)
    }

    /// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10): what may be done,
    /// and what is left of it.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let (burst, per_second, left, full) = {
            let mut tokens = self.tokens.lock();
            let (left, burst) = (tokens.left(Instant::now()), tokens.burst());
            (burst, tokens.per_second(), left, tokens.until(burst).as_secs_f64().ceil())
        };
        let window = (burst / per_second).ceil().max(1.0);
        let policy = format!("\"identity\";q={burst};w={window}");
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
