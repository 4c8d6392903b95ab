//! How a delivery is settled: acked, given back, sent round again, or buried.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use broker_core::{
    DeadLetter, Deliveries, Error, ErrorKind, Failure, Message, Operation, Result, Settle, Settlement, Timestamp, Topic,
};
use parking_lot::MutexGuard;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::{Inbound, MAX_REMEMBERED, Member, Remembered, State};
use crate::error::is_final;
use crate::link::{Wait, closed};
use crate::topology;
use crate::wire::{self, Travel};
use crate::writer::{Envelope, Route};

/// The server takes back what is unacked for half an hour: what the client holds longer than this goes
/// back first, and is held again when it comes.
const MAX_HOLD: Duration = Duration::from_secs(15 * 60);
/// With what its reader held it before, or it was held for another retry.
const MAX_HELD: Duration = Duration::from_secs(25 * 60);
/// A message that nobody wanted yet, and that has been round this often, is sent anew: the server's count of redeliveries
/// would otherwise be taken for that of a message which breaks its readers.
const RENEW_AFTER: u64 = 8;
/// How long a delivery is kept, about, before it goes back whose settlement was refused.
const REFUSED: Duration = Duration::from_secs(1);
/// How long at most until what nobody is to have any more is tried again, whose place nothing could take.
const MAX_REFUSED: Duration = Duration::from_secs(60);
/// The writer knows better why a message was not confirmed, and may be late by that much.
const GRACE: Duration = Duration::from_millis(250);

/// How long a delivery may be held from now on.
fn longest_hold(item: &Inbound) -> Duration {
    MAX_HOLD.min(MAX_HELD.saturating_sub(item.since.elapsed()))
}

impl Member {
    pub(super) fn settle(self: &Arc<Self>, epoch: u64, item: &Inbound, settlement: Settlement) -> Settle {
        if self.shared.closed.is_cancelled() {
            return Operation::from(closed());
        }
        match settlement {
            Settlement::Ack => {
                let (full, next) = {
                    let mut state = self.state.lock();
                    if !state.is(epoch) {
                        return Operation::from(state.too_late());
                    }
                    state.acks.ack(item.tag);
                    let next = state.settled(item);
                    (state.acks.pending() >= self.threshold(), next)
                };
                self.known.counts.lock().acked += 1;
                self.tell(full, next);
                Settle::done()
            }
            Settlement::Release => self.release(epoch, item),
            Settlement::Retry { after, failure } => self.retry(epoch, item, after, failure),
            Settlement::Reject(failure) => {
                *self.known.last_error.lock() = Some(failure.reason().to_owned());
                self.bury(epoch, item.clone(), failure, Replaced::Buried(Handed::Yes))
            }
        }
    }

    /// Something is to be told to the server; `next` waits for what may be handed out now.
    fn tell(&self, full: bool, next: Option<Waker>) {
        if let Some(next) = next {
            next.wake();
        }
        self.wire.notify_one();
        if full {
            self.full.notify_one();
        }
        self.settled.notify_waiters();
    }

    fn release(self: &Arc<Self>, epoch: u64, item: &Inbound) -> Settle {
        if self.is_worn(item.redeliveries) {
            let anew = Timestamp::from_millis(0);
            return self.forward(epoch, item.clone(), item.attempt - 1, anew, Replaced::Renewed(Handed::Yes));
        }
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return Operation::from(state.too_late());
            }
            state.handed = state.handed.saturating_sub(1);
            if self.known.settings.ordered {
                // The queue would hand it to its active consumer, which is this: and what is on its way meanwhile would
                // overtake it. Here it waits before all others of its key, and counts as no redelivery; a member that leaves
                // gives it back with its channel.
                self.again(state, item.clone());
                return Settle::done();
            }
            state.give_back(item.tag, item.message.key());
        }
        self.tell(true, None);
        Settle::done()
    }

    /// It waits here again, before all others of its key.
    fn again(&self, mut state: MutexGuard<'_, State>, item: Inbound) {
        state.lanes.again(item);
        let next = state.waker.take();
        drop(state);
        self.tell(false, next);
    }

    /// Whether a message that is given back has been round so often that it is better sent anew. Order forbids
    /// that.
    pub(super) fn is_worn(&self, redeliveries: u64) -> bool {
        let often = RENEW_AFTER.min(self.shared.options.max_redeliveries - 1);
        self.group.is_some() && !self.known.settings.ordered && redeliveries >= often
    }

    fn retry(
        self: &Arc<Self>,
        epoch: u64,
        item: &Inbound,
        after: Option<Duration>,
        failure: Option<Failure>,
    ) -> Settle {
        let failure = failure.unwrap_or_else(|| Failure::new("retried, no reason given"));
        *self.known.last_error.lock() = Some(failure.reason().to_owned());
        let policy = self.known.settings.retry;
        if policy.is_exhausted(item.attempt) {
            return self.bury(epoch, item.clone(), failure, Replaced::Exhausted);
        }
        let wait = after.unwrap_or_else(|| policy.backoff(item.attempt));
        let due = Timestamp::past(wait);
        if item.message.expires_at().is_some_and(|expires| expires <= due) {
            self.known.counts.lock().expired += 1;
            return self.finish(epoch, item);
        }
        if !self.held_here {
            return self.forward(epoch, item.clone(), item.attempt, due, Replaced::Retried);
        }
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return Operation::from(state.too_late());
            }
            state.handed = state.handed.saturating_sub(1);
            if state.remembered.len() >= MAX_REMEMBERED {
                state.remembered.clear();
            }
            let remembered = Remembered { attempts: item.attempt, first: item.first, due };
            state.remembered.insert(item.message.id().clone(), remembered);
        }
        self.known.counts.lock().retried += 1;
        self.settled.notify_waiters();
        let again = Inbound { attempt: item.attempt.saturating_add(1), ..item.clone() };
        // As long as was asked for, to the part of a millisecond that a time stamp cuts off.
        self.hold(epoch, again, wait, true);
        Settle::done()
    }

    /// Keeps a delivery here, unacked, until it is due. One that `holds` its key back comes before all others of it.
    pub(super) fn hold(self: &Arc<Self>, epoch: u64, item: Inbound, wait: Duration, holds: bool) {
        let member = Arc::clone(self);
        let longest = longest_hold(&item);
        self.shared.spawn(async move {
            tokio::select! {
                () = member.stop.cancelled() => return,
                () = tokio::time::sleep(wait.min(longest)) => {}
            }
            member.held(epoch, item, holds, wait <= longest);
        });
    }

    /// What was held is due, or has been held for as long as it may: then it goes back.
    pub(super) fn held(&self, epoch: u64, item: Inbound, holds: bool, is_due: bool) {
        let waker = {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return;
            }
            if !is_due {
                state.give_back(item.tag, item.message.key().filter(|_| holds));
                state.gave_back(item.message.id());
            } else if holds {
                state.lanes.again(item);
            } else {
                state.lanes.push(item.message.key().cloned().as_ref(), item);
            }
            state.waker.take()
        };
        self.wire.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Done with, at once.
    fn finish(&self, epoch: u64, item: &Inbound) -> Settle {
        let next = {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return Operation::from(state.too_late());
            }
            state.acks.ack(item.tag);
            state.settled(item)
        };
        self.tell(true, next);
        Settle::done()
    }

    /// Sends a copy through the delay queues to this group alone, then acks the original.
    pub(super) fn forward(
        self: &Arc<Self>,
        epoch: u64,
        item: Inbound,
        attempts: u32,
        due: Timestamp,
        replaced: Replaced,
    ) -> Settle {
        let envelope = Envelope {
            route: Route::Queue(self.state.lock().queue.clone()),
            message: item.message.clone(),
            travel: Travel {
                attempts,
                first: Some(item.first),
                topic: Some(item.topic.clone()),
                due: Some(due),
                kept: false,
            },
            require_route: false,
        };
        self.replace(epoch, item, Some(envelope), replaced)
    }

    /// Sends the message to the dead-letter topic, then acks it. What is a dead letter already goes to
    /// the keeping queue alone, or is there; what has no dead-letter topic is discarded.
    pub(super) fn bury(self: &Arc<Self>, epoch: u64, item: Inbound, failure: Failure, replaced: Replaced) -> Settle {
        let names = &self.known.names;
        let dead = DeadLetter::is_dead(&item.message);
        let letter = DeadLetter {
            message: item.message.clone(),
            topic: item.topic.clone(),
            group: self.group.clone(),
            failure,
            attempts: item.attempt,
            first: item.first,
            last: Timestamp::now(),
        };
        let route = match (&self.known.settings.dead_letter, &self.group) {
            (Some(topic), Some(group)) if *topic == item.topic && DeadLetter::is_of(&item.message, group) => {
                tracing::warn!(topic = %item.topic, id = %item.message.id(), reason = letter.failure.reason(), "a group failed at its own dead letter, which is kept");
                return self.replace(epoch, item, None, replaced);
            }
            (_, Some(_)) if dead => Route::Queue(names.dead.clone()),
            (Some(topic), Some(_)) => Route::Dead { keeping: names.dead.clone(), topic: topic.clone() },
            (Some(topic), None) if !dead => Route::Topic(topic.clone()),
            _ => {
                tracing::warn!(topic = %item.topic, id = %item.message.id(), reason = letter.failure.reason(), "a message is discarded: there is no dead-letter topic");
                return self.replace(epoch, item, None, replaced);
            }
        };
        let message = letter.into_message();
        let travel = Travel { kept: true, ..Travel::default() };
        self.replace(epoch, item, Some(Envelope { route, message, travel, require_route: false }), replaced)
    }

    /// Publishes what takes a delivery's place, and acks the delivery once that is confirmed. If it is not, whoever settled is
    /// told, and the delivery goes back; one that nobody is to have any more stays, and it is tried again.
    fn replace(self: &Arc<Self>, epoch: u64, item: Inbound, by: Option<Envelope>, replaced: Replaced) -> Settle {
        {
            let state = self.state.lock();
            if !state.is(epoch) {
                return Operation::from(state.too_late());
            }
        }
        let by = by.map(|mut envelope| {
            wire::fit(&mut envelope.message, self.shared.writer.frame_max());
            envelope
        });
        let (done, outcome) = oneshot::channel();
        let member = Arc::clone(self);
        self.shared.spawn(async move {
            let Err(error) = member.published(epoch, by.as_ref()).await else {
                let _ = done.send(member.replaced(epoch, &item, replaced));
                return;
            };
            member.refused(epoch, &item, replaced, &error);
            let is_gone = member.state.lock().deleted;
            let _ = done.send(if is_gone { Ok(()) } else { Err(error) });
            match replaced.by_itself() {
                Some(replaced) => member.replace_at_last(epoch, item, by, replaced).await,
                None => member.take_back(epoch, item).await,
            }
        });
        Operation::boxed(async move { outcome.await.unwrap_or_else(|_| Err(closed())) })
    }

    /// Goes on publishing what takes a delivery's place: as long as the delivery can be kept.
    async fn replace_at_last(&self, epoch: u64, item: Inbound, by: Option<Envelope>, replaced: Replaced) {
        let until = Instant::now() + longest_hold(&item);
        let mut wait = Wait::new(MAX_REFUSED);
        while Instant::now() < until && !self.stop.is_cancelled() {
            tokio::select! {
                () = self.stop.cancelled() => break,
                () = tokio::time::sleep(wait.next()) => {}
            }
            if !self.state.lock().is(epoch) {
                return;
            }
            match self.published(epoch, by.as_ref()).await {
                Ok(()) => return drop(self.replaced(epoch, &item, replaced)),
                Err(error) => self.refused(epoch, &item, replaced, &error),
            }
        }
        if self.stop.is_cancelled() && self.is_one_at_a_time() {
            // It goes with the channel, in its place.
            return;
        }
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return;
            }
            let is_first = matches!(replaced.handed(), Handed::Before);
            state.give_back(item.tag, item.message.key().filter(|_| is_first));
        }
        self.tell(true, None);
    }

    /// Publishes until it is confirmed: for the publish timeout at most, and not again what the server will go on to refuse.
    async fn published(&self, epoch: u64, envelope: Option<&Envelope>) -> Result<()> {
        let Some(envelope) = envelope else { return Ok(()) };
        let deadline = Instant::now() + self.shared.options.publish_timeout;
        let mut wait = Wait::new(Duration::from_secs(5));
        let mut last = None;
        loop {
            let error = match timeout_at(deadline + GRACE, self.publish(envelope)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => return Err(last.unwrap_or_else(|| self.shared.writer.too_late())),
            };
            let is_over = Instant::now() >= deadline || !self.state.lock().is(epoch);
            match error.kind() {
                // Somebody deleted the keeping queue; nobody else has it: it is made again.
                ErrorKind::NotFound if self.goes_to_keeping(envelope) => self.state.lock().kept = false,
                // The group was deleted: so is its message. It may as well be a delay queue that is missing.
                ErrorKind::NotFound if self.is_deleted(envelope).await => return Ok(()),
                ErrorKind::NotFound => {}
                ErrorKind::Closed => return Err(error),
                _ if is_final(&error) || !error.is_retryable() => return Err(error),
                _ => {}
            }
            if is_over {
                return Err(error);
            }
            *self.known.last_error.lock() = Some(error.to_string());
            self.shared.pause(wait.next().min(deadline.saturating_duration_since(Instant::now()))).await?;
            last = Some(error);
        }
    }

    async fn publish(&self, envelope: &Envelope) -> Result<()> {
        self.keep_first(envelope).await?;
        self.shared.writer.submit(envelope.clone()).await.map(drop)
    }

    /// Whether the queue that a message goes to is known to be no more.
    async fn is_deleted(&self, envelope: &Envelope) -> bool {
        let Route::Queue(queue) = &envelope.route else { return false };
        matches!(self.shared.queue_state(queue).await, Ok(None))
    }

    fn goes_to_keeping(&self, envelope: &Envelope) -> bool {
        match &envelope.route {
            Route::Dead { .. } => true,
            Route::Queue(queue) => *queue == self.known.names.dead,
            Route::Topic(_) | Route::Lanes(_) => false,
        }
    }

    /// Makes sure of the keeping queue before the first dead letter goes there.
    async fn keep_first(&self, envelope: &Envelope) -> Result<()> {
        if !self.goes_to_keeping(envelope) || self.state.lock().kept {
            return Ok(());
        }
        let live = self.shared.settling_connection().await?;
        let names = &self.known.names;
        let options = &self.shared.options;
        let declare =
            topology::on_channel(&live, async |channel| topology::declare_keeping(channel, names, options).await);
        self.shared.bounded(declare).await.map_err(|error| match error.kind() {
            ErrorKind::Conflict => error.context(format_args!(
                "queue {}, which keeps dead letters, is not as it would be made here; redrive or purge them and delete it, or \
                 go by its settings",
                names.dead
            )),
            _ => error.context(format_args!("queue {}, which keeps dead letters", names.dead)),
        })?;
        self.state.lock().kept = true;
        Ok(())
    }

    fn replaced(&self, epoch: u64, item: &Inbound, replaced: Replaced) -> Result<()> {
        let mut state = self.state.lock();
        if !state.is(epoch) {
            return state.too_late();
        }
        state.acks.ack(item.tag);
        let next = match replaced.handed() {
            Handed::Yes => state.settled(item),
            Handed::Before => state.over(item),
            Handed::No => None,
        };
        drop(state);
        {
            let mut counts = self.known.counts.lock();
            match replaced {
                Replaced::Retried => counts.retried += 1,
                Replaced::Buried(_) | Replaced::Exhausted => counts.dead_lettered += 1,
                Replaced::Renewed(_) => {}
            }
        }
        self.tell(true, next);
        Ok(())
    }

    /// Nothing takes a delivery's place: it is in nobody's hands any more.
    fn refused(&self, epoch: u64, item: &Inbound, replaced: Replaced, error: &Error) {
        let mut state = self.state.lock();
        if !state.is(epoch) {
            tracing::debug!(%error, id = %item.message.id(), "a settlement is not done; the message comes back");
            return;
        }
        tracing::warn!(%error, id = %item.message.id(), "a settlement is refused; the message comes back, or it is tried again");
        if matches!(replaced.handed(), Handed::Yes) {
            state.handed = state.handed.saturating_sub(1);
        }
        drop(state);
        *self.known.last_error.lock() = Some(error.to_string());
        self.settled.notify_waiters();
    }

    /// Lets a delivery wait for its next reader, after a while: what is refused at once would come and go as fast as it can. It
    /// stays here, where it is counted, since a classic queue counts nothing, and in an ordered group it would be overtaken.
    async fn take_back(self: &Arc<Self>, epoch: u64, mut item: Inbound) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(REFUSED.mul_f64(0.5 + fastrand::f64())) => {}
        }
        item.redeliveries += 1;
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return;
            }
            if self.stop.is_cancelled() {
                // In an ordered group it goes with the channel, in its place.
                if !self.is_one_at_a_time() {
                    state.give_back(item.tag, None);
                }
                drop(state);
                return self.tell(true, None);
            }
            if item.redeliveries < self.shared.options.max_redeliveries {
                return self.again(state, item);
            }
        }
        let failure = Failure::new("redelivered").with_status("redelivered");
        drop(self.bury(epoch, item, failure, Replaced::Buried(Handed::Before)));
    }
}

/// What becomes of a delivery whose place another message takes.
#[derive(Clone, Copy)]
pub(super) enum Replaced {
    /// It was in a caller's hands, who wants it again.
    Retried,
    /// The same attempt goes on: nobody wanted it yet.
    Renewed(Handed),
    Buried(Handed),
    /// The same, from a caller's hands, since it may not be delivered any more often.
    Exhausted,
}

impl Replaced {
    fn handed(self) -> Handed {
        match self {
            Self::Retried | Self::Exhausted => Handed::Yes,
            Self::Renewed(handed) | Self::Buried(handed) => handed,
        }
    }

    /// What becomes of it where nothing took its place and no reader is to have it again.
    fn by_itself(self) -> Option<Self> {
        match self {
            Self::Exhausted => Some(Self::Buried(Handed::Before)),
            _ if matches!(self.handed(), Handed::Yes) => None,
            _ => Some(self),
        }
    }
}

/// Whether a delivery is in a caller's hands.
#[derive(Clone, Copy)]
pub(super) enum Handed {
    Yes,
    /// It was, and others of its key wait behind it.
    Before,
    No,
}

pub(super) struct Batch {
    pub(super) member: Arc<Member>,
    pub(super) epoch: u64,
    pub(super) items: Box<[Inbound]>,
}

impl Batch {
    fn item(&self, index: u32) -> &Inbound {
        // Indices are those that were made with the batch.
        #[expect(clippy::indexing_slicing, reason = "the contract of `Deliveries`: an index that was given out")]
        &self.items[index as usize]
    }
}

impl Deliveries for Batch {
    fn message(&self, index: u32) -> &Message {
        &self.item(index).message
    }

    fn topic(&self, index: u32) -> &Topic {
        &self.item(index).topic
    }

    fn attempt(&self, index: u32) -> u32 {
        self.item(index).attempt
    }

    fn settle(&self, index: u32, settlement: Settlement) -> Settle {
        self.member.settle(self.epoch, self.item(index), settlement)
    }

    fn abandon(&self, index: u32) {
        let failure = Some(Failure::new("dropped unsettled"));
        drop(self.member.settle(self.epoch, self.item(index), Settlement::Retry { after: None, failure }));
    }
}
