//! A table of operations that another thread or task will confirm.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use slab::Slab;

use crate::{Confirm, Error, Operation, Result};

/// Operations under way, one slot each, slots reused: an adapter takes a ticket, sends it along
/// with the work, and completes it from wherever the answer arrives (a callback of librdkafka, a
/// confirm of RabbitMQ, an HTTP answer). No allocation or channel per operation.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::sync::Arc;
/// use broker_core::Confirms;
///
/// let confirms = Arc::new(Confirms::<u32>::new());
/// let (ticket, operation) = confirms.issue();
/// assert!(confirms.take(ticket), "still wanted: the work may begin");
/// confirms.complete(ticket, Ok(7));
/// assert_eq!(operation.await.unwrap(), 7);
///
/// let (ticket, operation) = confirms.issue();
/// drop(operation);
/// assert!(!confirms.take(ticket), "withdrawn before the work began");
/// # }
/// ```
pub struct Confirms<T> {
    slots: Mutex<Slab<Slot<T>>>,
}

enum Slot<T> {
    /// Nobody has begun the work; it can still be withdrawn.
    Queued(Option<Waker>),
    /// The work has begun.
    Taken(Option<Waker>),
    Done(Result<T>),
    /// Withdrawn before the work began.
    Withdrawn,
    /// The work has begun and nobody waits for its outcome.
    Unheard,
}

impl<T: Send + Unpin + 'static> Confirms<T> {
    /// An empty table; allocates nothing.
    pub fn new() -> Self {
        Self { slots: Mutex::new(Slab::new()) }
    }

    /// A new operation and the ticket to complete it with.
    pub fn issue(self: &Arc<Self>) -> (u64, Operation<T>) {
        let ticket = self.reserve();
        let by: Arc<dyn Confirm<T>> = Arc::<Self>::clone(self);
        (ticket, Operation::confirmed(by, ticket))
    }

    /// A new ticket alone, for an adapter whose own [`Confirm`] stands before this table: it hands on
    /// what it is asked, and hears of every operation that is abandoned.
    pub fn reserve(&self) -> u64 {
        self.slots.lock().insert(Slot::Queued(None)) as u64
    }

    /// Takes responsibility for the operation: call it right before the work becomes visible
    /// outside. False if it was withdrawn; then the ticket is gone and the work must not be done.
    pub fn take(&self, ticket: u64) -> bool {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(ticket as usize) else { return false };
        match slot {
            Slot::Queued(waker) => {
                *slot = Slot::Taken(waker.take());
                true
            }
            Slot::Withdrawn => {
                slots.remove(ticket as usize);
                false
            }
            Slot::Taken(_) | Slot::Done(_) | Slot::Unheard => true,
        }
    }

    /// Completes the operation, taken or not, and wakes who waits for it. A ticket that was
    /// completed already is ignored.
    pub fn complete(&self, ticket: u64, result: Result<T>) {
        let waker = {
            let mut slots = self.slots.lock();
            let Some(slot) = slots.get_mut(ticket as usize) else { return };
            match slot {
                Slot::Queued(waker) | Slot::Taken(waker) => {
                    let waker = waker.take();
                    *slot = Slot::Done(result);
                    waker
                }
                Slot::Withdrawn | Slot::Unheard => {
                    slots.remove(ticket as usize);
                    None
                }
                Slot::Done(_) => None,
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Operations not yet done, withdrawn ones included.
    pub fn pending(&self) -> usize {
        self.slots.lock().iter().filter(|(_, slot)| !matches!(slot, Slot::Done(_))).count()
    }
}

impl<T: Send + Unpin + 'static> Confirm<T> for Confirms<T> {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut slots = self.slots.lock();
        match slots.get_mut(ticket as usize) {
            Some(Slot::Queued(waker) | Slot::Taken(waker)) => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            Some(Slot::Done(_)) => match slots.remove(ticket as usize) {
                Slot::Done(result) => Poll::Ready(result),
                _ => Poll::Pending,
            },
            _ => Poll::Ready(Err(Error::closed("the operation was abandoned"))),
        }
    }

    fn abandon(&self, ticket: u64) {
        let mut slots = self.slots.lock();
        match slots.get_mut(ticket as usize) {
            Some(slot @ Slot::Queued(_)) => *slot = Slot::Withdrawn,
            Some(slot @ Slot::Taken(_)) => *slot = Slot::Unheard,
            Some(Slot::Done(_)) => drop(slots.remove(ticket as usize)),
            _ => {}
        }
    }
}

impl<T: Send + Unpin + 'static> Default for Confirms<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Confirms<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Confirms").field("slots", &self.slots.lock().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_free_again_in_every_order_of_events() {
        let confirms = Arc::new(Confirms::<()>::new());
        let slots = |confirms: &Confirms<()>| confirms.slots.lock().len();

        let (ticket, operation) = confirms.issue();
        drop(operation);
        assert!(!confirms.take(ticket));
        assert_eq!(slots(&confirms), 0, "withdrawn, then skipped");

        let (ticket, operation) = confirms.issue();
        assert!(confirms.take(ticket));
        drop(operation);
        confirms.complete(ticket, Ok(()));
        assert_eq!(slots(&confirms), 0, "taken, dropped, completed");

        let (ticket, operation) = confirms.issue();
        confirms.complete(ticket, Ok(()));
        drop(operation);
        assert_eq!(slots(&confirms), 0, "completed, dropped");
        assert_eq!(confirms.pending(), 0);
    }
}
