//! The publishes of a topic that wait for room, in the order of their calls, and what became of those that did.

use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};

use rustc_hash::FxHashMap;

use super::topics::closed;
use crate::{Message, Receipt, Result};

/// Dead letters that wait at most; further ones are in their group's keep alone.
const MAX_UNHEARD: usize = 1_000;

#[derive(Default)]
pub(super) struct Queue {
    waiting: BTreeMap<u64, Waiting>,
    last_ticket: u64,
    /// Of those that wait, dead letters of which nobody hears.
    unheard: usize,
    /// Outcomes of those that waited, not heard yet.
    done: FxHashMap<u64, Result<Receipt>>,
}

/// A publish that waits.
pub(super) struct Waiting {
    /// There until it is appended.
    pub(super) message: Option<Message>,
    pub(super) require_route: bool,
    waker: Option<Waker>,
    /// Whether somebody will ask for the outcome.
    pub(super) heard: bool,
}

impl Queue {
    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether nobody waits, nor has an outcome to hear.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.done.is_empty()
    }

    /// Whether any waits of which somebody will hear. Dead letters are kept besides.
    pub(super) fn has_heard(&self) -> bool {
        self.waiting.len() > self.unheard
    }

    /// Whether dead letters wait: nobody looks for them whether something has expired.
    pub(super) fn has_unheard(&self) -> bool {
        self.unheard > 0
    }

    /// A publish waits; the ticket by which its outcome is asked for.
    pub(super) fn wait(&mut self, message: Message, require_route: bool) -> u64 {
        self.add(Waiting { message: Some(message), require_route, waker: None, heard: true })
    }

    /// A dead letter waits of which nobody hears; false if there are too many.
    pub(super) fn wait_unheard(&mut self, message: Option<Message>) -> bool {
        if self.unheard >= MAX_UNHEARD {
            return false;
        }
        self.unheard += 1;
        self.add(Waiting { message, require_route: false, waker: None, heard: false });
        true
    }

    fn add(&mut self, waiting: Waiting) -> u64 {
        self.last_ticket += 1;
        self.waiting.insert(self.last_ticket, waiting);
        self.last_ticket
    }

    /// Takes the first out: it is to be put back or done.
    pub(super) fn pop(&mut self) -> Option<(u64, Waiting)> {
        self.waiting.pop_first()
    }

    /// It waits on.
    pub(super) fn put_back(&mut self, ticket: u64, waiting: Waiting) {
        self.waiting.insert(ticket, waiting);
    }

    /// It waits no more; who is to be woken.
    pub(super) fn done(&mut self, ticket: u64, waiting: Waiting, result: Result<Receipt>) -> Option<Waker> {
        if waiting.heard {
            self.done.insert(ticket, result);
        } else {
            self.unheard -= 1;
        }
        waiting.waker
    }

    /// All that wait have failed: how many of which somebody hears, and who is to be woken.
    pub(super) fn fail_all(&mut self) -> (u64, Vec<Waker>) {
        let mut failed = 0;
        let mut wakers = Vec::new();
        while let Some((ticket, waiting)) = self.pop() {
            failed += u64::from(waiting.heard);
            wakers.extend(self.done(ticket, waiting, Err(closed())));
        }
        (failed, wakers)
    }

    /// What became of a publish that waits, once it is told.
    pub(super) fn poll(&mut self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Receipt>> {
        if let Some(waiting) = self.waiting.get_mut(&ticket) {
            waiting.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(self.done.remove(&ticket).unwrap_or_else(|| Err(closed())))
    }

    /// Nobody will ask what becomes of it; one that has waited in vain.
    pub(super) fn abandon(&mut self, ticket: u64) -> Option<Waiting> {
        self.done.remove(&ticket);
        self.waiting.remove(&ticket)
    }
}
