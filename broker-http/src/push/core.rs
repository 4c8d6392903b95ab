//! What a push does next: the mechanisms of `window`, `breaker` and `rate` put together over one
//! subscription of the broker. Moved by the driver and the lanes, under one lock; waits for nothing.
//!
//! No delivery is taken out of the broker that cannot be sent at once, so that a pause, an open
//! breaker or a full window leaves nothing in hand: what was not attempted counts as nothing. A batch
//! being gathered is given back untried when something keeps it from being sent, so that no other
//! member of the group waits for it; all that stays in hand is a last attempt that met 410.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use broker_core::{Delivery, Error, ErrorKind, Settle, Subscription, Timestamp};
use smallvec::SmallVec;
use tokio::time::Instant;

use super::attempts::{Attempt, Attempts};
use super::breaker::{Admission, Breaker};
use super::rate::Rate;
use super::verdict::{Health, Verdict};
use super::window::{Ticket, Window};
use crate::{Mode, SubscriptionSpec};

/// Deliveries taken from the broker in one go.
const MAX_TAKEN: usize = 256;

/// The state of one push.
#[derive(Debug)]
pub(crate) struct Core {
    spec: Arc<SubscriptionSpec>,
    holds: Holds,
    /// No more intake: finish what is in flight.
    stopping: bool,
    /// The broker is closing: push what can be pushed, and wait for nothing else.
    draining: bool,
    /// The subscription ended for good.
    ended: bool,
    subscription: Option<Subscription>,
    /// Whether the broker was told that we wait.
    waiting: bool,
    /// Taken and to be sent: a batch being gathered, or one that is sent again in smaller ones.
    held: Vec<Delivery>,
    /// What a 410 came for at the last attempt: it stays in hand until the push is enabled again.
    kept: Vec<Delivery>,
    gathering_since: Option<Instant>,
    window: Window,
    breaker: Breaker,
    rate: Option<Rate>,
    /// Requests.
    in_flight: u32,
    /// Messages of these requests.
    messages_in_flight: u64,
    /// Of messages in a parcel at most, unless it is one message.
    parcel_bytes: usize,
    /// Messages in a parcel at most: as the batch is set, and fewer while the endpoint refuses such.
    parcel_messages: usize,
    attempts: Attempts,
    last_error: Option<Arc<str>>,
    last_success: Option<Timestamp>,
}

/// What keeps a push from pushing; each is lifted by somebody else.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Holds {
    /// The operator paused it.
    pub(crate) paused: bool,
    /// The endpoint said that it is gone.
    pub(crate) disabled: bool,
    /// The endpoint has not said yet that it wants pushes.
    pub(crate) unconsented: bool,
    /// Whoever had it pushed may no longer.
    pub(crate) unauthorized: bool,
}

impl Holds {
    fn any(self) -> bool {
        self.paused || self.disabled || self.unconsented || self.unauthorized
    }
}

/// Messages for one request.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) deliveries: SmallVec<[Delivery; 1]>,
    ticket: Ticket,
    probe: bool,
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Send this.
    Send(Parcel),
    /// Nothing before something happens, or before this time.
    Wait(Option<Instant>),
    /// Subscribe, and hand the subscription over.
    Subscribe,
    /// Nothing ever again.
    Over,
}

impl Core {
    pub(crate) fn new(spec: Arc<SubscriptionSpec>, holds: Holds, parcel_bytes: usize, now: Instant) -> Self {
        Self {
            holds,
            stopping: false,
            draining: false,
            ended: false,
            subscription: None,
            waiting: false,
            held: Vec::new(),
            kept: Vec::new(),
            gathering_since: None,
            window: Window::new(spec.max_in_flight),
            breaker: Breaker::new(),
            rate: spec.rate_limit.map(|per_second| Rate::new(per_second, now)),
            in_flight: 0,
            messages_in_flight: 0,
            parcel_bytes,
            parcel_messages: largest(&spec),
            attempts: Attempts::default(),
            last_error: None,
            last_success: None,
            spec,
        }
    }

    /// What to do next. `cx` is woken when the broker has more.
    pub(crate) fn next(&mut self, cx: &mut Context<'_>, now: Instant) -> Next {
        self.leave_if_idle();
        if self.stopping || self.ended {
            return self.finish(now);
        }
        if self.holds.any() {
            return Next::Wait(None);
        }
        if self.subscription.is_none() {
            return Next::Subscribe;
        }
        let (most, probe) = match self.breaker.admits(now) {
            Admission::Free => (usize::MAX, false),
            Admission::Probe => (1, true),
            Admission::Until(until) => return self.leave_alone(Some(until)),
            Admission::Busy => return self.leave_alone(None),
        };
        let room = most.min(self.window.size().saturating_sub(self.in_flight) as usize);
        if room == 0 {
            return self.wait(None);
        }
        let size = self.parcel_size();
        let refill = self.take((room * size).min(MAX_TAKEN.max(size)), cx, now);
        if self.ended {
            return self.finish(now);
        }
        if self.held.is_empty() {
            return Next::Wait(refill);
        }
        let due = *self.gathering_since.get_or_insert(now) + self.gathering_time();
        if self.held.len() < size && now < due {
            return Next::Wait(Some(refill.map_or(due, |refill| refill.min(due))));
        }
        if self.drop_expired(now) && self.held.is_empty() {
            // Nothing is as old as that any more.
            return self.next(cx, now);
        }
        Next::Send(self.parcel(size, probe))
    }

    /// Fills `held` up to `wanted`; tells when the rate allows more, if it is what is in the way.
    fn take(&mut self, wanted: usize, cx: &mut Context<'_>, now: Instant) -> Option<Instant> {
        while self.held.len() < wanted {
            let mut limit = wanted - self.held.len();
            if let Some(rate) = &mut self.rate {
                match rate.available(now) {
                    Ok(allowed) => limit = limit.min(allowed),
                    Err(refill) => {
                        self.stop_waiting();
                        return Some(refill);
                    }
                }
            }
            let before = self.held.len();
            let Some(subscription) = &mut self.subscription else { return None };
            match subscription.poll_receive(cx, &mut self.held, limit) {
                Poll::Pending => {
                    self.waiting = true;
                    return None;
                }
                Poll::Ready(Ok(count)) if count > 0 => self.waiting = false,
                Poll::Ready(ended) => {
                    self.end(ended.err());
                    return None;
                }
            }
            self.drop_unwanted(before);
            if let Some(rate) = &mut self.rate {
                rate.take(self.held.len() - before);
            }
        }
        None
    }

    /// Acks what came in from `from` on and the attribute filters do not want.
    fn drop_unwanted(&mut self, from: usize) {
        if self.spec.filters.is_empty() {
            return;
        }
        let mut index = from;
        while let Some(delivery) = self.held.get(index) {
            if self.spec.wants(delivery.topic(), delivery.message()) {
                index += 1;
            } else {
                detach(self.held.remove(index).ack());
            }
        }
    }

    /// Gives back what has expired while a batch was gathered, for the broker to discard and count; tells whether
    /// there was any. What had expired before the broker gave it out (a dead letter redriven, for one) is to be sent.
    fn drop_expired(&mut self, now: Instant) -> bool {
        let gathered = self.gathering_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if gathered.is_zero() {
            return false;
        }
        let time = Timestamp::now();
        let expired = |delivery: &mut Delivery| {
            let expiry = delivery.message().expires_at();
            expiry.is_some_and(|expiry| expiry <= time && time.since(expiry) < gathered)
        };
        let before = self.held.len();
        self.held.extract_if(.., expired).for_each(|delivery| detach(delivery.release()));
        if self.held.is_empty() {
            self.gathering_since = None;
        }
        self.held.len() < before
    }

    fn parcel(&mut self, size: usize, probe: bool) -> Parcel {
        let count = self.fitting(size);
        let deliveries: SmallVec<_> = self.held.drain(..count).collect();
        // What did not fit has waited long enough.
        if count == size || self.held.is_empty() {
            self.gathering_since = None;
        }
        self.in_flight += 1;
        self.messages_in_flight += deliveries.len() as u64;
        if probe {
            self.breaker.probe();
        }
        Parcel { deliveries, ticket: self.window.sent(self.in_flight), probe }
    }

    /// Messages of a parcel of so many at most: what they take, the body and the requests in flight with it, is
    /// bounded in bytes too.
    fn fitting(&self, size: usize) -> usize {
        let mut bytes = 0;
        let fits = |delivery: &&Delivery| {
            bytes += delivery.message().size();
            bytes <= self.parcel_bytes
        };
        self.held.iter().take(size).take_while(fits).count().max(1).min(self.held.len())
    }

    fn parcel_size(&self) -> usize {
        self.parcel_messages
    }

    fn gathering_time(&self) -> Duration {
        if self.spec.mode == Mode::Batch && !self.draining { self.spec.batch.wait } else { Duration::ZERO }
    }

    /// Nothing can be taken now: a message we would be woken for goes to another member.
    fn wait(&mut self, until: Option<Instant>) -> Next {
        self.stop_waiting();
        Next::Wait(until)
    }

    /// The endpoint is left alone for a while: what was gathered for it may go to another member meanwhile.
    fn leave_alone(&mut self, until: Option<Instant>) -> Next {
        self.stop_waiting();
        self.give_back();
        Next::Wait(until)
    }

    /// Gives back untried what was gathered.
    fn give_back(&mut self) {
        self.gathering_since = None;
        // The first last: a broker puts each before what waits.
        self.held.drain(..).rev().for_each(|delivery| detach(delivery.release()));
    }

    fn stop_waiting(&mut self) {
        if std::mem::take(&mut self.waiting)
            && let Some(subscription) = &mut self.subscription
        {
            subscription.stop_waiting();
        }
    }

    /// A push that waits for an operator, or for its endpoint while the broker closes, is no member
    /// of its group: nobody waits for it.
    fn leave_if_idle(&mut self) {
        if self.draining && (self.holds.any() || self.breaker.is_open()) {
            self.stopping = true;
        }
        if self.stopping || self.holds.any() {
            self.subscription = None;
            self.waiting = false;
            self.give_back();
        }
    }

    /// The end: what was gathered is sent if it can be, what is in flight is waited for.
    fn finish(&mut self, now: Instant) -> Next {
        let free = self.in_flight < self.window.size() && self.breaker.admits(now) == Admission::Free;
        if free && !self.holds.any() && !self.held.is_empty() {
            return Next::Send(self.parcel(self.parcel_size(), false));
        }
        if self.in_flight == 0 {
            self.held.append(&mut self.kept);
            self.give_back();
            return Next::Over;
        }
        Next::Wait(None)
    }

    fn end(&mut self, error: Option<Error>) {
        self.subscription = None;
        self.waiting = false;
        self.ended = true;
        if let Some(error) = error.filter(|error| error.kind() != ErrorKind::Closed) {
            self.note(&error.to_string());
        }
    }

    /// The subscription asked for by [`Next::Subscribe`].
    pub(crate) fn subscribed(&mut self, subscription: Subscription) {
        self.subscription = Some(subscription);
    }

    /// Subscribing failed, for good or not.
    pub(crate) fn not_subscribed(&mut self, error: Error) {
        if error.is_retryable() { self.note(&error.to_string()) } else { self.end(Some(error)) }
    }

    pub(crate) fn note(&mut self, why: &str) {
        self.last_error = Some(why.into());
    }

    /// What came of a request. To be called before its messages are settled: a message that goes
    /// back must not be pushed again to an endpoint that is gone. True if it disabled the push.
    pub(crate) fn came_back(&mut self, parcel: &Parcel, verdict: &Verdict, now: Instant) -> bool {
        let was_open = self.breaker.is_open();
        let mut disabled = false;
        match verdict.health {
            Health::Well => {
                self.breaker.succeeded();
                self.window.succeeded(parcel.ticket);
            }
            Health::Gone => {
                self.breaker.succeeded();
                disabled = !std::mem::replace(&mut self.holds.disabled, true);
            }
            Health::Failing | Health::Overloaded => {
                if verdict.health == Health::Overloaded {
                    self.window.overloaded(parcel.ticket);
                }
                if self.breaker.failed(now, parcel.probe) && !was_open {
                    self.window.restart();
                }
            }
        }
        disabled
    }

    /// Remembers the push of one message.
    pub(crate) fn log(&mut self, attempt: Attempt) {
        match &attempt.error {
            Some(error) => self.last_error = Some(Arc::clone(error)),
            None => self.last_success = Some(attempt.time),
        }
        self.attempts.push(attempt);
    }

    /// The endpoint refused a parcel of so many messages as a whole: for what one of them is, or because they are too
    /// many for it. Whichever it is, halves tell. They are sent again, which the rate counts.
    pub(crate) fn refused(&mut self, messages: usize) {
        if let Some(rate) = &mut self.rate {
            rate.take(messages);
        }
        self.parcel_messages = self.parcel_messages.min(messages / 2).max(1);
    }

    /// The endpoint took as many as a parcel may have: they may be more again, by a quarter. One message that was refused
    /// is forgotten soon, and where there is a bound a try beyond it is one of several requests.
    pub(crate) fn accepted(&mut self, messages: usize) {
        if messages == self.parcel_messages {
            self.parcel_messages = (messages + messages.div_ceil(4)).min(largest(&self.spec));
        }
    }

    /// A request is over and its messages are settled, but for those that are sent again before all else or kept.
    pub(crate) fn settled(&mut self, messages: usize) {
        self.in_flight -= 1;
        self.messages_in_flight -= messages as u64;
    }

    /// These are sent again, before all else.
    pub(crate) fn send_again(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.held.splice(0..0, deliveries);
    }

    /// These stay in hand until the push is enabled again: given back, they would be dead by one more failure.
    pub(crate) fn keep(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        if self.holds.disabled {
            self.kept.extend(deliveries);
        } else {
            self.send_again(deliveries);
        }
    }

    pub(crate) fn pause(&mut self) {
        self.holds.paused = true;
    }

    pub(crate) fn disable(&mut self) {
        self.holds.disabled = true;
    }

    /// Begins anew, as with an endpoint never seen before.
    pub(crate) fn resume(&mut self) {
        self.holds.paused = false;
        self.holds.disabled = false;
        let kept = std::mem::take(&mut self.kept);
        self.send_again(kept);
        self.breaker = Breaker::new();
        self.window.restart();
    }

    /// Nothing is pushed before the endpoint consents.
    pub(crate) fn set_unconsented(&mut self, unconsented: bool) {
        self.holds.unconsented = unconsented;
    }

    /// Nothing is pushed while its owner may not have it pushed.
    pub(crate) fn set_unauthorized(&mut self, unauthorized: bool) {
        self.holds.unauthorized = unauthorized;
    }

    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether what is there now is all there will be.
    pub(crate) fn is_ending(&self) -> bool {
        self.stopping || self.ended
    }

    pub(crate) fn holds(&self) -> Holds {
        self.holds
    }

    pub(crate) fn is_open(&self) -> bool {
        self.breaker.is_open()
    }

    /// Messages in hand.
    pub(crate) fn in_flight(&self) -> u64 {
        self.messages_in_flight + (self.held.len() + self.kept.len()) as u64
    }

    pub(crate) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    pub(crate) fn last_success(&self) -> Option<Timestamp> {
        self.last_success
    }

    pub(crate) fn attempts(&self) -> Vec<Attempt> {
        self.attempts.newest_first()
    }
}

/// Lets a settlement finish: dropping it might withdraw it, and nobody needs to know the outcome.
fn detach(settle: Settle) {
    if !settle.is_ready() {
        tokio::spawn(settle);
    }
}

/// Messages in a parcel at most.
fn largest(spec: &SubscriptionSpec) -> usize {
    if spec.mode == Mode::Batch { spec.batch.max.get() as usize } else { 1 }
}

#[cfg(test)]
mod tests;
