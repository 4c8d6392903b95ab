//! The answers a connection is owed: the time it has to take them, by their size.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Answers with an end that a connection has yet to take. A reader that gets on a little now and then would hold them
/// for as long as it likes.
#[derive(Debug, Default)]
pub(crate) struct Owed(Mutex<Option<Due>>);

/// There is something.
#[derive(Clone, Copy, Debug)]
struct Due {
    bytes: u64,
    at: Instant,
}

/// How fast an answer is to be taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Besides the time that its bytes have.
    pub(crate) patience: Duration,
    pub(crate) bytes_per_second: u64,
}

impl Pace {
    fn time(&self, bytes: u64) -> Duration {
        Duration::from_millis(bytes.saturating_mul(1_000) / self.bytes_per_second.max(1))
    }
}

impl Owed {
    /// The answer, due until it is taken or dropped.
    pub(crate) fn add(self: &Arc<Self>, answer: Bytes, pace: Pace) -> Bytes {
        let bytes = answer.len() as u64;
        {
            let mut due = self.0.lock();
            let (before, at) = due.map_or_else(|| (0, Instant::now() + pace.patience), |due| (due.bytes, due.at));
            *due = Some(Due { bytes: before + bytes, at: at + pace.time(bytes) });
        }
        Bytes::from_owner(Answer { answer, pace, owed: Arc::clone(self) })
    }

    /// Whether the time is up.
    pub(crate) fn is_late(&self) -> bool {
        self.0.lock().is_some_and(|due| due.at <= Instant::now())
    }

    /// So much was taken: what is left has no more time than it would have if it was asked for now, so that none is
    /// saved up.
    fn sub(&self, bytes: u64, pace: Pace) {
        let mut due = self.0.lock();
        *due = due.filter(|due| due.bytes > bytes).map(|due| {
            let left = due.bytes - bytes;
            Due { bytes: left, at: due.at.min(Instant::now() + pace.patience + pace.time(left)) }
        });
    }
}

struct Answer {
    answer: Bytes,
    pace: Pace,
    owed: Arc<Owed>,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.answer
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.owed.sub(self.answer.len() as u64, self.pace);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_its_time_and_none_is_saved_up() {
        let owed = Arc::<Owed>::default();
        let pace = Pace { patience: Duration::from_secs(10), bytes_per_second: 100 };
        let answer = |bytes: usize| owed.add(vec![0; bytes].into(), pace);
        let seconds = Duration::from_secs;
        // Ten seconds, and ten for its bytes.
        let first = answer(1_000);
        advance(seconds(19)).await;
        assert!(!owed.is_late());
        advance(seconds(1)).await;
        assert!(owed.is_late());
        drop(first);
        assert!(!owed.is_late());
        // Two beside each other have the time of both, and once one is taken the other its own.
        let (first, second) = (answer(1_000), answer(1_000));
        advance(seconds(5)).await;
        drop(first);
        advance(seconds(19)).await;
        assert!(!owed.is_late());
        // Small ones that are taken give it their own second and no more.
        drop(answer(100));
        advance(Duration::from_millis(1_900)).await;
        assert!(!owed.is_late());
        advance(Duration::from_millis(100)).await;
        assert!(owed.is_late());
        drop(second);
        assert!(!owed.is_late());
    }
}
