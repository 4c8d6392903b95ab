//! Frames that say nothing: of a WebSocket, of HTTP/2. Each costs little, and who sends nothing else keeps a core busy.

use tokio::time::Instant;

use crate::tokens::Tokens;

/// So many at once, so many a second besides, and so many beyond that for what is done.
const AT_ONCE: f64 = 1_000.0;
const A_SECOND: f64 = 100.0;
const EARNED: f64 = 20_000.0;

/// How many may still come.
#[derive(Debug)]
pub(crate) struct Chatter(Tokens);

impl Chatter {
    pub(crate) fn new(now: Instant) -> Self {
        Self(Tokens::new(A_SECOND, AT_ONCE, now))
    }

    /// Something is done for which so many are no chatter.
    pub(crate) fn earn(&mut self, frames: usize) {
        self.0.earn(frames as f64, EARNED);
    }

    /// So many more have come.
    pub(crate) fn may_go_on(&mut self, frames: usize, now: Instant) -> bool {
        self.0.left(now);
        self.0.take(frames as f64);
        self.0.left(now) >= 0.0
    }
}
