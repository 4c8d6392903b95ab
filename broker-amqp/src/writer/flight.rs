//! Publishes under way: each is handed to lapin, and then waits for its confirmation.
//!
//! A task woken by each of them, twice (written, confirmed) and from lapin's thread, spends more on being
//! woken than on publishing. So of many only one has a waker, a quarter of the way: when it is confirmed,
//! about a quarter of them are, all are looked at, and the server still has enough to do while more are
//! sent. Nobody waits much longer for that than he would have: after a moment all are looked at anyway. Of
//! a few every one has a waker.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::{Instant, Sleep, sleep};

/// So many have a waker each.
const FEW: usize = 8;
/// How long confirmations may lie unseen: a millisecond for every so many under way, and more while the
/// server confirms nothing at all.
const A_MILLISECOND_PER: usize = 256;
const PATIENCE_MIN: Duration = Duration::from_millis(1);
const PATIENCE_MAX: Duration = Duration::from_millis(64);

pub(super) struct Flight<F> {
    /// In the order they were added.
    under_way: Vec<Pin<Box<F>>>,
    /// So many of them were polled: lapin has their frames.
    handed: usize,
    /// Whether one of many has the waker, and has not used it.
    watched: bool,
    signal: Arc<Signal>,
    waker: Waker,
    timer: Pin<Box<Sleep>>,
    patience: Duration,
}

/// Says that it was woken, and wakes the task.
#[derive(Default)]
struct Signal {
    given: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.given.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<F: Future> Flight<F> {
    pub(super) fn new() -> Self {
        let signal = Arc::new(Signal::default());
        let waker = Waker::from(Arc::clone(&signal));
        let timer = Box::pin(sleep(PATIENCE_MIN));
        Self { under_way: Vec::new(), handed: 0, watched: false, signal, waker, timer, patience: PATIENCE_MIN }
    }

    /// Adds one; it begins when the whole is polled.
    pub(super) fn push(&mut self, future: F) {
        self.under_way.push(Box::pin(future));
    }

    pub(super) fn len(&self) -> usize {
        self.under_way.len()
    }

    /// What has ended, some of it at least, in the order it was added. Never ends while nothing is under
    /// way.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Vec<F::Output>> {
        self.signal.task.register(cx.waker());
        let mut ended = Vec::new();
        let timed_out = self.watched && self.timer.as_mut().poll(cx).is_ready();
        if timed_out || self.signal.given.swap(false, Ordering::Acquire) {
            self.watched = false;
            self.look(0, &mut ended);
            self.patience = match ended.is_empty() {
                true if timed_out => (self.patience * 2).min(PATIENCE_MAX),
                _ => PATIENCE_MIN,
            };
        } else {
            self.look(self.handed, &mut ended);
        }
        while ended.is_empty() && !self.watched && self.under_way.len() >= FEW {
            self.watch(cx, &mut ended);
        }
        if ended.is_empty() { Poll::Pending } else { Poll::Ready(ended) }
    }

    /// Takes out all that have ended already, wherever they are.
    pub(super) fn drain(&mut self) -> Vec<F::Output> {
        let mut ended = Vec::new();
        self.watched = false;
        self.look(0, &mut ended);
        // Whoever had the waker may have lost it.
        self.signal.given.store(true, Ordering::Release);
        ended
    }

    /// Polls all from an index on, and takes out what has ended.
    fn look(&mut self, from: usize, ended: &mut Vec<F::Output>) {
        let few = self.under_way.len() < FEW;
        let mut cx = Context::from_waker(if few { &self.waker } else { Waker::noop() });
        let mut index = 0;
        self.under_way.retain_mut(|future| {
            index += 1;
            if index <= from {
                return true;
            }
            match future.as_mut().poll(&mut cx) {
                Poll::Ready(output) => {
                    ended.push(output);
                    false
                }
                Poll::Pending => true,
            }
        });
        self.handed = self.under_way.len();
        if !few && self.handed < FEW {
            // They were many, and are few: each gets a waker when all are looked at again.
            self.signal.given.store(true, Ordering::Release);
        }
    }

    /// Gives the one a quarter of the way the waker, unless it has ended.
    fn watch(&mut self, cx: &mut Context<'_>, ended: &mut Vec<F::Output>) {
        let chosen = self.under_way.len() / 4;
        let Some(future) = self.under_way.get_mut(chosen) else { return };
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&self.waker)) {
            drop(self.under_way.remove(chosen));
            self.handed = self.under_way.len();
            ended.push(output);
            return;
        }
        self.watched = true;
        let millis = u32::try_from(self.under_way.len() / A_MILLISECOND_PER).unwrap_or(u32::MAX);
        let patience = self.patience.max(PATIENCE_MIN.saturating_mul(millis)).min(PATIENCE_MAX);
        self.timer.as_mut().reset(Instant::now() + patience);
        // So that the timer knows whom to wake.
        if self.timer.as_mut().poll(cx).is_ready() {
            self.signal.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::future::poll_fn;

    use super::*;
    use proptest::prelude::*;
    use tokio::sync::oneshot;

    /// All end, in whatever order and however many at a time, and none is forgotten: no wake-up is lost.
    fn run(order: Vec<prop::sample::Index>, burst: usize, window: usize) -> BTreeSet<usize> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async move {
            let mut flight = Flight::new();
            let (done, mut confirm) = tokio::sync::mpsc::unbounded_channel::<oneshot::Sender<usize>>();
            let server = tokio::spawn(async move {
                let mut waiting = Vec::new();
                for index in order.iter().cycle() {
                    while let Ok(one) = confirm.try_recv() {
                        waiting.push(one);
                    }
                    if waiting.is_empty() {
                        match confirm.recv().await {
                            Some(one) => waiting.push(one),
                            None => return,
                        }
                    }
                    let one: oneshot::Sender<usize> = waiting.swap_remove(index.index(waiting.len()));
                    let _ = one.send(0);
                    if index.index(burst) == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            });
            let (mut next, mut ended) = (0, BTreeSet::new());
            while ended.len() < 300 {
                while next < 300 && flight.len() < window {
                    let (sender, receiver) = oneshot::channel();
                    done.send(sender).unwrap();
                    let number = next;
                    flight.push(async move { receiver.await.map(|_| number).unwrap() });
                    next += 1;
                }
                for number in poll_fn(|cx| flight.poll_ended(cx)).await {
                    assert!(ended.insert(number), "{number} ended twice");
                }
            }
            drop(done);
            server.await.unwrap();
            ended
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn everything_ends_once(
            order in proptest::collection::vec(any::<prop::sample::Index>(), 1..50),
            burst in 1_usize..20, window in 1_usize..100,
        ) {
            prop_assert_eq!(run(order, burst, window).len(), 300);
        }
    }
}
