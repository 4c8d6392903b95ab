//! What stands behind a `Subscription` of the in-process broker.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::yield_now;
use tokio::time::{Sleep, sleep_until};

use super::Shared;
use super::group::{Group, Received};
use crate::{Consumer, Delivery, Gap, Result};

pub(super) struct Member {
    group: Arc<Group>,
    shared: Arc<Shared>,
    id: u64,
    /// The tick slept until. Made where it is polled, so that a subscription may move to another
    /// runtime.
    sleep: Option<(u64, Pin<Box<Sleep>>)>,
    left: bool,
    /// Whether it took the last message there was.
    drained: bool,
}

impl Member {
    pub(super) fn new(shared: Arc<Shared>, group: Arc<Group>, max_in_flight: usize) -> Self {
        let id = group.join(max_in_flight);
        Self { group, shared, id, sleep: None, left: false, drained: false }
    }

    fn leave(&mut self) {
        if !std::mem::replace(&mut self.left, true) && self.group.leave(self.id) && self.group.id.is_none() {
            self.shared.remove_solo(&self.group);
        }
    }
}

impl Consumer for Member {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        if std::mem::take(&mut self.drained) {
            // It keeps up. Coming back at once it would fight the publisher for each single message;
            // while others run, a batch gathers.
            ready!(pin!(yield_now()).poll(cx));
        }
        loop {
            let before = batch.len();
            match self.group.receive(self.id, cx, batch, limit)? {
                Received::Some { drained } => {
                    (self.sleep, self.drained) = (None, drained);
                    return Poll::Ready(Ok(batch.len() - before));
                }
                Received::Ended => return Poll::Ready(Ok(0)),
                Received::Again => {
                    // Much was looked at and nothing found: others may run before the rest.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Received::Wait(None) => {
                    self.sleep = None;
                    return Poll::Pending;
                }
                Received::Wait(Some(tick)) => {
                    if self.sleep.as_ref().is_none_or(|(until, _)| *until != tick) {
                        self.sleep = Some((tick, Box::pin(sleep_until(self.shared.clock.instant(tick)))));
                    }
                    if let Some((_, sleep)) = &mut self.sleep {
                        ready!(sleep.as_mut().poll(cx));
                        self.sleep = None;
                    }
                }
            }
        }
    }

    fn gap(&mut self) -> Option<Gap> {
        self.group.gap()
    }

    fn stop_waiting(&mut self) {
        self.group.stop_waiting(self.id);
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        self.leave();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
    }
}
