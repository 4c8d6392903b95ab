//! An ordered group of several queues: its members share them out.
//!
//! Every member consumes every queue, and the server lets one of them receive from each: the one that came
//! first. So that the work is shared, a member that receives from more queues than its share steps back
//! from the rest: its consumer goes to the end of the queue's list, and the next one's turn comes. Whoever
//! gets it and has its share already hands it on. Nobody steps back before all it holds is settled, so
//! that no message overtakes another of its key.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use broker_core::{Consumer, Delivery, Gap, Result};
use tokio::time::{MissedTickBehavior, interval};

use crate::consumer::Receiver;
use crate::member::Member;

/// How often a member compares what it has with its share.
const EVERY: Duration = Duration::from_secs(1);

/// The subscriber's end: what comes from any of the queues.
pub(crate) struct Receivers {
    all: Vec<Receiver>,
    /// Which is asked first: not always the same.
    next: usize,
}

impl Receivers {
    pub(crate) fn new(all: Vec<Receiver>) -> Self {
        Self { all, next: 0 }
    }
}

impl Consumer for Receivers {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        self.next = self.next.wrapping_add(1);
        let (after, before) = {
            let first = self.next % self.all.len().max(1);
            let (before, after) = self.all.split_at_mut(first);
            (after, before)
        };
        let mut ended = true;
        for receiver in after.iter_mut().chain(before) {
            match receiver.poll_receive(cx, batch, limit) {
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(done) => return Poll::Ready(done),
                Poll::Pending => ended = false,
            }
        }
        if ended { Poll::Ready(Ok(0)) } else { Poll::Pending }
    }

    fn gap(&mut self) -> Option<Gap> {
        None
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut open = false;
        for receiver in &mut self.all {
            open |= receiver.poll_close(cx).is_pending();
        }
        if open { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

/// Keeps a subscription, a member at each queue, to its share until it ends.
pub(crate) async fn run(members: Vec<Arc<Member>>) {
    let Some(first) = members.first() else { return };
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = first.stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let active: Vec<&Arc<Member>> = members.iter().filter(|member| member.is_active()).collect();
        // A lost connection is somebody else's to notice.
        let Ok(Some(queue)) = first.shared.queue_state(&first.queue).await else { continue };
        for member in active.into_iter().skip(share(members.len(), queue.consumers)) {
            member.step_back.notify_one();
        }
    }
}

/// Queues for each of so many members; together they have room for all.
fn share(queues: usize, members: u64) -> usize {
    queues.div_ceil(usize::try_from(members).unwrap_or(usize::MAX).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_room_for_every_queue() {
        for queues in 1..20 {
            for members in 1..25_u64 {
                let share = share(queues, members);
                assert!(share >= 1 && share as u64 * members >= queues as u64);
            }
        }
        assert_eq!(share(8, 0), 8, "nobody else is there");
    }
}
