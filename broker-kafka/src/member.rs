//! A subscription's deliveries, shared between its reader, its settlements and its polling thread.

use std::cmp::Reverse;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use broker_core::{
    DeadLetter, Error, Failure, Group, GroupSettings, Message, Result, Settlement, Timestamp, Topic, TopicFilter,
};
use crossbeam_channel::Sender;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::admin::Partition;
use crate::consumer::Client;
use crate::dead::burial;
use crate::lot::Entry;
use crate::progress::Progress;
use crate::record::{Retried, Travel};
use crate::registry::Entry as GroupEntry;
use crate::retry_topics::RetryTopics;
use crate::state::{Ending, Item, Place, State, Timer, Transfer, TransferKind, instant_after};

pub(crate) struct Member {
    pub(crate) filter: TopicFilter,
    pub(crate) group: Option<Group>,
    /// Which of the group's members in this broker value it is, from 0.
    pub(crate) number: usize,
    /// What the members of the group in this process share.
    pub(crate) entry: Arc<GroupEntry>,
    /// Where a retry goes that waits for long.
    retry_topics: Option<RetryTopics>,
    /// Who speaks to the group's coordinator, once it was made; its thread ends it.
    pub(crate) consumer: OnceLock<Weak<Client>>,
    max_in_flight: usize,
    state: Mutex<State>,
    /// Rouses the polling thread.
    wake: Sender<()>,
}

/// What a letter was.
enum Origin {
    /// A delivery; whoever settled it waits to hear.
    Delivery(oneshot::Sender<Result<()>>),
    /// A record that could not be delivered.
    Unreadable,
}

/// What became of a settlement.
pub(crate) enum Settled {
    Done,
    /// When the dead letter has arrived.
    Later(oneshot::Receiver<Result<()>>),
    Refused(Error),
}

/// What a commit says.
pub(crate) type Commits = Vec<(Partition, Progress)>;

/// A record that was read, for [`Member::admit`].
pub(crate) struct Arrival {
    pub(crate) offset: i64,
    pub(crate) decoded: crate::record::Decoded,
}

impl Member {
    pub(crate) fn new(
        filter: TopicFilter,
        group: Option<Group>,
        number: usize,
        entry: Arc<GroupEntry>,
        retry_topics: Option<RetryTopics>,
        max_in_flight: usize,
        wake: Sender<()>,
    ) -> Self {
        let consumer = OnceLock::new();
        Self { filter, group, number, entry, retry_topics, consumer, max_in_flight, state: Mutex::default(), wake }
    }

    pub(crate) fn retry_topics(&self) -> Option<&RetryTopics> {
        self.retry_topics.as_ref()
    }

    fn settings(&self) -> GroupSettings {
        self.entry.settings()
    }

    // --- the reader ---------------------------------------------------------------------------------

    /// Deliveries, as many as there are, at most `limit`; none if the subscription has ended.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>, limit: usize) -> Poll<Result<Vec<Item>>> {
        let mut state = self.state.lock();
        if let Some(ending) = &state.ending {
            return Poll::Ready(ending.error.clone().map_or_else(|| Ok(Vec::new()), Err));
        }
        let room = limit.min(self.max_in_flight.saturating_sub(state.out));
        let items = state.hand_out(room, &self.entry);
        if items.is_empty() {
            match &mut state.reader {
                Some(waker) => waker.clone_from(cx.waker()),
                None => state.reader = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let rouse = std::mem::take(&mut state.starved);
        drop(state);
        self.entry.counts.delivered.fetch_add(items.len() as u64, Ordering::Relaxed);
        if rouse {
            self.rouse();
        }
        Poll::Ready(Ok(items))
    }

    // --- settlements --------------------------------------------------------------------------------

    pub(crate) fn settle(&self, item: &Item, settlement: Settlement) -> Settled {
        let mut state = self.state.lock();
        if state.closed {
            return Settled::Refused(Error::closed("the broker is closed; the message comes back"));
        }
        let Some(lot) = state.open_lot(item.place) else {
            return self.too_late(&state);
        };
        lot.out -= 1;
        let counts = &self.entry.counts;
        let settled = match settlement {
            Settlement::Ack => {
                lot.finish(item.entry.seq, &item.entry.message);
                counts.acked.fetch_add(1, Ordering::Relaxed);
                Settled::Done
            }
            Settlement::Release => {
                lot.tracker.give_back(item.entry.seq, false);
                lot.ready.come_back(item.entry.clone());
                Settled::Done
            }
            Settlement::Retry { after, failure } => {
                let settings = self.settings();
                if settings.retry.is_exhausted(item.attempt()) {
                    let failure = failure.unwrap_or_else(|| Failure::new("no attempt is left"));
                    self.bury(&mut state, item, &settings, failure)
                } else {
                    lot.tracker.give_back(item.entry.seq, true);
                    // The attempts are committed, too.
                    lot.dirty = true;
                    counts.retried.fetch_add(1, Ordering::Relaxed);
                    if let Some(failure) = &failure {
                        self.entry.failed(failure.reason());
                    }
                    let wait = after.unwrap_or_else(|| settings.retry.backoff(item.attempt()));
                    let held = lot.keeps_order(&item.entry.message);
                    let topic = self.retry_topics.as_ref().filter(|_| !held).and_then(|topics| topics.topic(wait));
                    let entry = Entry { failed: item.entry.failed.saturating_add(1), ..item.entry.clone() };
                    if let Some(topic) = topic {
                        self.set_aside(&mut state, item, entry, topic, wait);
                        state.out -= 1;
                        self.after_settling(&mut state);
                        return Settled::Done;
                    }
                    let soonest = state.timers.peek().map(|Reverse(timer)| timer.due);
                    let due = instant_after(wait);
                    state.timers.push(Reverse(Timer { due, lot: item.place, entry }));
                    if soonest.is_none_or(|soonest| due < soonest) {
                        self.rouse();
                    }
                    Settled::Done
                }
            }
            Settlement::Reject(failure) => {
                let settings = self.settings();
                self.bury(&mut state, item, &settings, failure)
            }
        };
        state.out -= 1;
        self.after_settling(&mut state);
        settled
    }

    /// Nobody waits any more for what the delivery's partition was.
    fn too_late(&self, state: &State) -> Settled {
        let deleted = state.ending.as_ref().is_some_and(|ending| ending.deleted);
        if deleted {
            return Settled::Done;
        }
        Settled::Refused(moved())
    }

    /// Sends a retry to where it does not take room from the others.
    fn set_aside(&self, state: &mut State, item: &Item, entry: Entry, topic: Topic, wait: Duration) {
        let now = Timestamp::now();
        let retried = Retried {
            topic: item.topic.clone(),
            failed: entry.failed,
            due: Timestamp::past(wait),
            first: entry.first.unwrap_or(now),
        };
        let kind = TransferKind::Retry(Box::new(retried));
        let (message, copy, seq) = (entry.message.clone(), entry.message, entry.seq);
        let (place, kept_for) = (item.place, None);
        self.transfer(state, Transfer { place, seq, message, unreadable: false, topic, copy, kept_for, kind });
    }

    /// A message goes to another topic; the polling thread publishes it.
    fn transfer(&self, state: &mut State, transfer: Transfer) {
        if let Some(lot) = state.lot(transfer.place) {
            lot.moving += 1;
            state.moving += 1;
            state.transfers.push(transfer);
            self.rouse();
        }
    }

    fn bury(&self, state: &mut State, item: &Item, settings: &GroupSettings, failure: Failure) -> Settled {
        self.entry.failed(failure.reason());
        let now = Timestamp::now();
        let letter = DeadLetter {
            message: item.entry.message.clone(),
            topic: item.topic.clone(),
            group: self.group.clone(),
            failure,
            attempts: item.attempt(),
            first: item.entry.first.unwrap_or(now),
            last: now,
        };
        let (sender, receiver) = oneshot::channel();
        if self.bury_letter(state, item.place, item.entry.seq, letter, settings, Origin::Delivery(sender)) {
            Settled::Later(receiver)
        } else {
            Settled::Done
        }
    }

    /// False if it is not to be sent anywhere: then its record is settled.
    fn bury_letter(
        &self,
        state: &mut State,
        place: Place,
        seq: u64,
        letter: DeadLetter,
        settings: &GroupSettings,
        origin: Origin,
    ) -> bool {
        let Some(lot) = state.lot(place) else { return false };
        let message = letter.message.clone();
        let Some((topic, kept_for)) = burial(&letter, settings.dead_letter.as_ref()) else {
            match origin {
                Origin::Delivery(_) => lot.finish(seq, &message),
                Origin::Unreadable => lot.finish_apart(seq, &message),
            }
            self.entry.counts.dead_lettered.fetch_add(1, Ordering::Relaxed);
            let reason = letter.failure.reason();
            tracing::warn!(topic = %letter.topic, id = %message.id(), reason, "a message failed for good and is written nowhere");
            return false;
        };
        let copy = letter.into_message();
        let (unreadable, reply) = match origin {
            Origin::Delivery(reply) => (false, Some(reply)),
            Origin::Unreadable => (true, None),
        };
        let kind = TransferKind::Dead(reply);
        self.transfer(state, Transfer { place, seq, message, unreadable, topic, copy, kept_for, kind });
        true
    }

    fn after_settling(&self, state: &mut State) {
        if state.ending.is_some() {
            if state.out == 0 {
                self.rouse();
            }
        } else if state.has_ready() {
            if let Some(reader) = state.reader.take() {
                reader.wake();
            }
        } else if std::mem::take(&mut state.starved) {
            self.rouse();
        }
        if state.can_let_go() {
            self.rouse();
        }
    }

    // --- the polling thread -------------------------------------------------------------------------

    /// Rouses the polling thread.
    pub(crate) fn rouse(&self) {
        // Full means that it is roused already.
        let _ = self.wake.try_send(());
    }

    pub(crate) fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock())
    }

    /// Records of one partition have arrived. One that lies before those of earlier is not admitted, nor what follows it,
    /// and its offset is the answer: the log was cut there.
    pub(crate) fn admit(&self, place: Place, arrivals: impl IntoIterator<Item = Arrival>) -> Option<i64> {
        let own = self.group.as_ref().map(ToString::to_string);
        let mut state = self.state.lock();
        for Arrival { offset, decoded } in arrivals {
            let lot = state.lot(place)?;
            if lot.tracker.is_behind(offset) {
                return Some(offset);
            }
            if let Some(problem) = decoded.problem {
                let topic = lot.partition.0.clone();
                lot.admit_apart(offset, |failed| self.unreadable(topic, decoded.message, failed, &problem));
                continue;
            }
            let Travel { for_group, retried } = decoded.travel.map(|travel| *travel).unwrap_or_default();
            match retried.filter(|_| lot.partition.0.is_reserved()) {
                Some(retried) => {
                    let due = retried.due;
                    if let Some(entry) = lot.admit_retried(offset, decoded.message, *retried) {
                        let due = instant_after(due.since(Timestamp::now()));
                        state.timers.push(Reverse(Timer { due, lot: place, entry }));
                    }
                }
                None if for_group.is_none() || for_group == own => drop(lot.admit(offset, decoded.message)),
                None => lot.pass_over(offset),
            }
        }
        if state.has_ready()
            && let Some(reader) = state.reader.take()
        {
            drop(state);
            reader.wake();
        }
        None
    }

    /// What cannot be delivered goes to the dead letters' topic, as far as commits have room to say so.
    pub(crate) fn bury_unreadable(&self) {
        let mut state = self.state.lock();
        if state.ending.is_some() {
            return;
        }
        let mut settings = None;
        while let Some((place, seq, letter)) = state.next_unreadable() {
            let settings = settings.get_or_insert_with(|| self.settings());
            self.bury_letter(&mut state, place, seq, letter, settings, Origin::Unreadable);
        }
    }

    fn unreadable(&self, topic: Topic, message: Message, attempts: u32, problem: &str) -> DeadLetter {
        self.entry.failed(problem);
        let now = Timestamp::now();
        let failure = Failure::new(format!("it could not be decoded: {problem}"));
        DeadLetter { message, topic, group: self.group.clone(), failure, attempts, first: now, last: now }
    }

    /// Makes ready what is due; tells when the next is.
    pub(crate) fn run_timers(&self, now: Instant) -> Option<Instant> {
        let mut state = self.state.lock();
        let mut any = false;
        let next = loop {
            let Some(Reverse(timer)) = state.timers.peek() else { break None };
            if timer.due > now {
                break Some(timer.due);
            }
            let Some(Reverse(Timer { lot: place, entry, .. })) = state.timers.pop() else { break None };
            if let Some(lot) = state.lot(place) {
                lot.ready.come_back(entry);
                any = true;
            }
        };
        if any && let Some(reader) = state.reader.take() {
            drop(state);
            reader.wake();
        }
        next
    }

    /// A message has arrived where it was sent, or not: then it may be to be sent again.
    pub(crate) fn transferred(&self, transfer: Transfer, result: Result<()>) -> Option<Transfer> {
        let mut state = self.state.lock();
        let Some(lot) = state.lot(transfer.place) else {
            state.moving -= 1;
            if let TransferKind::Dead(Some(reply)) = transfer.kind {
                let _ = reply.send(result);
            }
            return None;
        };
        if let Err(error) = result {
            return self.not_transferred(&mut state, transfer, error);
        }
        lot.moving -= 1;
        match transfer.unreadable {
            false => lot.finish(transfer.seq, &transfer.message),
            true => lot.finish_apart(transfer.seq, &transfer.message),
        }
        state.moving -= 1;
        if matches!(transfer.kind, TransferKind::Dead(_)) {
            self.entry.counts.dead_lettered.fetch_add(1, Ordering::Relaxed);
        }
        self.after_settling(&mut state);
        drop(state);
        if let TransferKind::Dead(Some(reply)) = transfer.kind {
            let _ = reply.send(Ok(()));
        }
        None
    }

    /// A retry is held here, as it would be without retry topics. A dead letter is to be sent again until it is taken; but if
    /// that is up to somebody else, such as a topic that may not be made, whoever waits for it waits no longer.
    fn not_transferred(&self, state: &mut State, mut transfer: Transfer, error: Error) -> Option<Transfer> {
        let error = error.context(format_args!("publish to {}", transfer.topic));
        self.entry.failed(error.message());
        let Transfer { place, seq, message, kind, .. } = &mut transfer;
        match kind {
            TransferKind::Dead(reply) => {
                if let Some(reply) = reply.take_if(|_| !error.is_retryable()) {
                    let _ = reply.send(Err(error));
                }
                Some(transfer)
            }
            TransferKind::Retry(retried) => {
                let (failed, first, origin) = (retried.failed, Some(retried.first), Some(retried.topic.clone()));
                let entry = Entry { seq: *seq, message: message.clone(), failed, first, origin };
                let due = instant_after(retried.due.since(Timestamp::now()));
                state.lot(*place)?.moving -= 1;
                state.moving -= 1;
                state.timers.push(Reverse(Timer { due, lot: *place, entry }));
                self.after_settling(state);
                None
            }
        }
    }

    // --- transactions -------------------------------------------------------------------------------

    /// The partitions of these deliveries, for which other commits are held back until
    /// [`end_transaction`](Self::end_transaction).
    pub(crate) fn begin_transaction(&self, items: &[&Item]) -> Result<Vec<Place>> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::closed("the broker is closed; the messages come back"));
        }
        let mut places: Vec<Place> = Vec::new();
        for item in items {
            state.open_lot(item.place).ok_or_else(moved)?;
            if !places.contains(&item.place) {
                places.push(item.place);
            }
        }
        for place in &places {
            if let Some(lot) = state.lot(*place) {
                lot.transactions += 1;
            }
        }
        Ok(places)
    }

    /// Whether a commit of these partitions is still under way.
    pub(crate) fn is_committing(&self, places: &[Place]) -> bool {
        self.state.lock().is_committing(Some(places))
    }

    /// What a commit of these partitions says when these deliveries, which are theirs, are settled, too.
    pub(crate) fn progress_with(&self, places: &[Place], items: &[&Item]) -> Result<Commits> {
        let mut state = self.state.lock();
        let mut commits = Vec::with_capacity(places.len());
        for place in places {
            let lot = state.open_lot(*place).ok_or_else(moved)?;
            let mut settling: Vec<u64> =
                items.iter().filter(|item| item.place == *place).map(|item| item.entry.seq).collect();
            settling.sort_unstable();
            commits.extend(lot.tracker.progress_with(&settling).map(|progress| (lot.partition.clone(), progress)));
        }
        Ok(commits)
    }

    /// The transaction has ended, one way or the other, and its deliveries are settled.
    pub(crate) fn end_transaction(&self, places: &[Place]) {
        let mut state = self.state.lock();
        for place in places {
            if let Some(lot) = state.lot(*place) {
                lot.transactions = lot.transactions.saturating_sub(1);
                lot.dirty = true;
            }
        }
        drop(state);
        self.rouse();
    }

    // --- the end ------------------------------------------------------------------------------------

    /// Hands out no more, waits until `deadline` for what is in flight, then leaves. The reader sees
    /// `error`, or a quiet end.
    pub(crate) fn end(&self, deadline: Instant, error: Option<Error>) {
        self.begin_ending(Ending { deadline, error, deleted: false });
    }

    /// Its group is deleted: what is settled from now on is settled for good.
    pub(crate) fn end_deleted(&self, error: Error) {
        self.begin_ending(Ending { deadline: Instant::now(), error: Some(error), deleted: true });
    }

    /// It is out of its group for good: nothing that it holds is its own any more, and what is settled from now on would be in
    /// no commit.
    pub(crate) fn end_lost(&self, error: Error) {
        self.state.lock().lose();
        self.begin_ending(Ending { deadline: Instant::now(), error: Some(error), deleted: false });
    }

    fn begin_ending(&self, new: Ending) {
        let mut state = self.state.lock();
        match &mut state.ending {
            Some(ending) => {
                ending.deadline = ending.deadline.min(new.deadline);
                ending.deleted |= new.deleted;
            }
            None => state.ending = Some(new),
        }
        let reader = state.reader.take();
        drop(state);
        self.rouse();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// The broker was closed: from now on settling is `Closed`. Tells how many deliveries are left.
    pub(crate) fn close(&self) -> usize {
        let mut state = self.state.lock();
        state.closed = true;
        state.out + state.moving
    }

    /// The polling thread is gone.
    pub(crate) fn finish(&self) {
        let mut state = self.state.lock();
        state.finished = true;
        state.clear();
        let mut wakers = std::mem::take(&mut state.closers);
        wakers.extend(state.reader.take());
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.state.lock().finished
    }

    pub(crate) fn poll_finished(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.finished {
            return Poll::Ready(());
        }
        state.closers.push(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn in_flight(&self) -> u64 {
        let state = self.state.lock();
        (state.out + state.moving) as u64
    }

    /// Whether it still takes part.
    pub(crate) fn is_open(&self) -> bool {
        self.state.lock().ending.is_none()
    }
}

fn moved() -> Error {
    Error::unavailable(
        "the partition has moved to another member, or the subscription has ended; the message comes back",
    )
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("filter", &self.filter).field("group", &self.group).finish_non_exhaustive()
    }
}
