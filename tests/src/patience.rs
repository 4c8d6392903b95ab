//! Waiting for what must come, for so long at most.

use std::pin::pin;
use std::time::Duration;

/// What `future` gives within the patience; `None` if it gives nothing.
///
/// When the time is over it is not asked once more, as [`tokio::time::timeout`] does: a broker that has something and
/// wakes nobody for it would be found out by that alone, and pass.
pub(crate) async fn within<T>(patience: Duration, future: impl Future<Output = T>) -> Option<T> {
    let future = pin!(future);
    tokio::select! {
        biased;
        () = tokio::time::sleep(patience) => None,
        given = future => Some(given),
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn what_wakes_nobody_does_not_come() {
        let long = Duration::from_millis(200);
        let mut polls = 0;
        let silent = std::future::poll_fn(|_| {
            polls += 1;
            if polls > 1 { Poll::Ready(()) } else { Poll::Pending }
        });
        assert_eq!(within(long, silent).await, None);
        assert_eq!(within(long, tokio::time::sleep(Duration::from_millis(1))).await, Some(()));
    }
}
