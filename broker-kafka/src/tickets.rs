//! Publishes under way: a slot each, reused, completed from the delivery callback.
//!
//! [`broker_core::Confirms`] with the message's id in the slot, so that the callback makes the
//! receipt without reading the record again.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use broker_core::{Confirm, Error, MessageId, Operation, Publish, Receipt, Result};
use parking_lot::Mutex;
use slab::Slab;

#[derive(Debug, Default)]
pub(crate) struct Tickets {
    slots: Mutex<Slab<Slot>>,
}

#[derive(Debug)]
struct Slot {
    id: MessageId,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Not with librdkafka yet: it can be withdrawn.
    Queued(Option<Waker>),
    /// With librdkafka.
    Taken(Option<Waker>),
    Done(Result<(i32, i64)>),
    /// Withdrawn while it was queued.
    Withdrawn,
    /// With librdkafka, and nobody waits for its outcome.
    Unheard,
}

impl Tickets {
    /// A publish that librdkafka is about to be given.
    pub(crate) fn issue(self: &Arc<Self>, id: MessageId) -> (usize, Publish) {
        let ticket = self.slots.lock().insert(Slot { id, state: State::Taken(None) });
        (ticket, Operation::confirmed(Arc::<Self>::clone(self), ticket as u64))
    }

    /// It could not be given to librdkafka yet.
    pub(crate) fn queued(&self, ticket: usize) {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(ticket) else { return };
        slot.state = match std::mem::replace(&mut slot.state, State::Unheard) {
            State::Taken(waker) => State::Queued(waker),
            State::Unheard => State::Withdrawn,
            other => other,
        };
    }

    /// It is about to be given to librdkafka again; false if it was withdrawn meanwhile.
    pub(crate) fn take(&self, ticket: usize) -> bool {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(ticket) else { return false };
        match &mut slot.state {
            State::Queued(waker) => {
                slot.state = State::Taken(waker.take());
                true
            }
            State::Withdrawn => {
                slots.remove(ticket);
                false
            }
            _ => true,
        }
    }

    /// The outcome is known.
    pub(crate) fn complete(&self, ticket: usize, result: Result<(i32, i64)>) {
        let waker = {
            let mut slots = self.slots.lock();
            let Some(slot) = slots.get_mut(ticket) else { return };
            match &mut slot.state {
                State::Queued(waker) | State::Taken(waker) => {
                    let waker = waker.take();
                    slot.state = State::Done(result);
                    waker
                }
                State::Withdrawn | State::Unheard => {
                    slots.remove(ticket);
                    None
                }
                State::Done(_) => None,
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Nobody will tell what became of those under way.
    pub(crate) fn give_up(&self, error: &Error) {
        let tickets: Vec<usize> = self.slots.lock().iter().map(|(ticket, _)| ticket).collect();
        tickets.into_iter().for_each(|ticket| self.complete(ticket, Err(error.clone())));
    }

    /// Publishes whose outcome is not known.
    pub(crate) fn pending(&self) -> usize {
        self.slots.lock().iter().filter(|(_, slot)| !matches!(slot.state, State::Done(_) | State::Withdrawn)).count()
    }
}

impl Confirm<Receipt> for Tickets {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Receipt>> {
        let mut slots = self.slots.lock();
        let ticket = ticket as usize;
        match slots.get_mut(ticket).map(|slot| &mut slot.state) {
            Some(State::Queued(waker) | State::Taken(waker)) => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            Some(State::Done(_)) => {
                let Slot { id, state } = slots.remove(ticket);
                Poll::Ready(match state {
                    State::Done(Ok((partition, offset))) => {
                        let mut receipt = Receipt::new(id);
                        receipt.partition = Some(partition);
                        receipt.offset = Some(offset).filter(|offset| *offset >= 0);
                        Ok(receipt)
                    }
                    State::Done(Err(error)) => Err(error),
                    _ => Err(Error::closed("the publish was abandoned")),
                })
            }
            _ => Poll::Ready(Err(Error::closed("the publish was abandoned"))),
        }
    }

    fn abandon(&self, ticket: u64) {
        let mut slots = self.slots.lock();
        let ticket = ticket as usize;
        match slots.get_mut(ticket).map(|slot| &mut slot.state) {
            Some(state @ State::Queued(_)) => *state = State::Withdrawn,
            Some(state @ State::Taken(_)) => *state = State::Unheard,
            Some(State::Done(_)) => drop(slots.remove(ticket)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_free_again_in_every_order_of_events() {
        let tickets = Arc::new(Tickets::default());
        let slots = |tickets: &Tickets| tickets.slots.lock().len();

        let (ticket, publish) = tickets.issue(MessageId::random());
        tickets.queued(ticket);
        drop(publish);
        assert!(!tickets.take(ticket), "withdrawn");
        assert_eq!(slots(&tickets), 0);

        let (ticket, publish) = tickets.issue(MessageId::random());
        drop(publish);
        tickets.complete(ticket, Ok((0, 1)));
        assert_eq!(slots(&tickets), 0, "taken, dropped, completed");

        let (ticket, publish) = tickets.issue(MessageId::random());
        tickets.complete(ticket, Ok((0, 1)));
        drop(publish);
        assert_eq!((slots(&tickets), tickets.pending()), (0, 0), "completed, dropped");
    }
}
