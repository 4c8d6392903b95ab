//! A timer that is used again and again.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::time::Duration;

use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep};

/// A deadline per request, and nearly no work for one that is kept: the timer underneath is left
/// alone while it would fire too early, and set anew only when it has. So a lane registers a timer
/// once in a while and not once a request.
pub(crate) struct Timer(Pin<Box<Sleep>>);

impl Timer {
    pub(crate) fn new() -> Self {
        Self(Box::pin(sleep(Duration::ZERO)))
    }

    /// Waits for `future`, until `deadline` at most.
    pub(crate) async fn until<T>(&mut self, deadline: Instant, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        let sleep = &mut self.0;
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        poll_fn(|cx| {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(cx) {
                return std::task::Poll::Ready(Some(output));
            }
            // The future may have spent the task's budget, as it does where an endpoint never stops talking, and
            // would then find the timer pending each time.
            while pin!(unconstrained(sleep.as_mut())).poll(cx).is_ready() {
                if sleep.deadline() >= deadline {
                    return std::task::Poll::Ready(None);
                }
                sleep.as_mut().reset(deadline);
            }
            std::task::Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    #[tokio::test]
    async fn fires_though_the_future_has_always_more_to_do() {
        let mut timer = Timer::new();
        let busy = async {
            loop {
                tokio::task::consume_budget().await;
            }
        };
        assert_eq!(timer.until(Instant::now() + Duration::from_millis(20), busy).await, None::<()>);
    }

    #[tokio::test(start_paused = true)]
    async fn fires_at_each_deadline_and_never_before() {
        let mut timer = Timer::new();
        for millis in [10, 1_000, 20, 5_000, 0, 30] {
            let deadline = Instant::now() + Duration::from_millis(millis);
            assert_eq!(timer.until(deadline, async { 42 }).await, Some(42));
            assert_eq!(timer.until(deadline, pending::<()>()).await, None);
            let late = Instant::now() - deadline;
            assert!(late <= Duration::from_millis(2), "{late:?} late, and not early");
        }
    }
}
