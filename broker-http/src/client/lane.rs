//! A subscription's inner life, shared by who receives, who settles and the two tasks that talk to
//! the daemon: one [pulls](super::pulling), the other [keeps](super::keeping) what was pulled.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use broker_core::{
    BoxFuture, Consumer, Counts, Deliveries, Delivery, Gap, Message, Operation, Result, Settle, Settlement, Topic,
    TopicFilter,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::groups::Standing;
use super::shared::Shared;
use super::{keeping, pulling};

/// One pull subscription of ours.
pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) standing: Standing,
    pub(super) max_in_flight: usize,
    /// How often the daemon may have been away by the time it was made.
    pub(super) losses: u64,
    pub(super) state: Mutex<State>,
    /// Told when somebody wants deliveries, or there is room for more.
    pub(super) wanted: Notify,
    /// Told when there is something to settle.
    pub(super) unsettled: Notify,
    /// Told when the pulling or the keeping has come to a rest.
    pub(super) rested: Notify,
    /// Cancelled when nobody receives any more.
    pub(super) left: CancellationToken,
}

#[derive(Default)]
pub(super) struct State {
    /// Pulled and not handed out.
    pub(super) buffer: VecDeque<(Arc<Handed>, u32)>,
    /// Deliveries that somebody waits for; zero if nobody does.
    pub(super) wanted: usize,
    pub(super) waker: Option<Waker>,
    /// Pulled and not settled, those in the buffer included.
    pub(super) held: usize,
    /// What was pulled and may still be held.
    pub(super) handed: Vec<std::sync::Weak<Handed>>,
    pub(super) unsettled: VecDeque<Unsettled>,
    pub(super) gap: Option<Gap>,
    ended: Option<Result<()>>,
    pub(super) pulling: bool,
    pub(super) keeping: bool,
    /// Whether a copy of one's own was deleted at the daemon.
    pub(super) deleted: bool,
    /// Since when nobody waits for deliveries.
    pub(super) idle_since: Option<Instant>,
    pub(super) counts: Counts,
}

/// Something to tell the daemon about a lease.
#[derive(Debug)]
pub(super) struct Unsettled {
    pub(super) lease: Box<str>,
    pub(super) settlement: Settlement,
    /// Whom to tell; nobody for what was never handed out.
    pub(super) ticket: Option<u64>,
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, standing: Standing, max_in_flight: usize) -> Arc<Self> {
        let left = shared.closing.child_token();
        let losses = shared.http.losses();
        let lane = Arc::new(Self {
            losses,
            shared,
            standing,
            max_in_flight,
            state: Mutex::default(),
            wanted: Notify::new(),
            unsettled: Notify::new(),
            rested: Notify::new(),
            left,
        });
        let mut lanes = lane.shared.lanes.lock();
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(&lane));
        drop(lanes);
        lane
    }

    pub(super) fn filter(&self) -> &TopicFilter {
        &self.standing.group.filter
    }

    /// Ends the subscription for who receives; the first reason stands.
    pub(super) fn end(&self, reason: Result<()>) {
        let mut state = self.state.lock();
        state.ended.get_or_insert(reason);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Hands deliveries to who waits for them.
    pub(super) fn deliver(&self, handed: Arc<Handed>, gap: Option<Gap>) {
        let mut state = self.state.lock();
        let count = handed.items.len();
        state.held += count;
        state.counts.delivered += count as u64;
        state.handed.retain(|handed| handed.strong_count() > 0);
        state.handed.push(Arc::downgrade(&handed));
        state.buffer.extend((0..count).map(|index| (Arc::clone(&handed), u32::try_from(index).unwrap_or(u32::MAX))));
        state.note_gap(gap);
        state.wanted = 0;
        state.idle_since.get_or_insert_with(Instant::now);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Takes note of what is to be told to the daemon, and sees that it is.
    pub(super) fn tell(self: &Arc<Self>, unsettled: impl IntoIterator<Item = Unsettled>) {
        let mut state = self.state.lock();
        state.unsettled.extend(unsettled);
        self.see_to_it(state);
    }

    fn see_to_it(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        match keeping::is_wanted(self, &mut state) {
            Ok(keep) => {
                drop(state);
                keeping::start(self, keep);
                self.unsettled.notify_one();
            }
            Err(error) => {
                let unsettled = std::mem::take(&mut state.unsettled);
                drop(state);
                keeping::fail(&self.shared, unsettled, &error);
            }
        }
    }

    /// Gives back what was pulled and not handed out.
    pub(super) fn release_buffer(self: &Arc<Self>) {
        let mut state = self.state.lock();
        let buffer = std::mem::take(&mut state.buffer);
        state.held = state.held.saturating_sub(buffer.len());
        drop(state);
        // Each goes to the front: the last one first, they are in order again.
        let released: Vec<_> = buffer.iter().rev().filter_map(|(handed, index)| handed.release(*index)).collect();
        if !released.is_empty() {
            self.tell(released);
        }
    }

    /// Nobody receives any more: what is held is kept until it is settled.
    pub(super) fn leave(self: &Arc<Self>) {
        self.left.cancel();
        self.end(Ok(()));
        self.release_buffer();
        // With nothing held, a copy of one's own can be deleted now.
        self.tell([]);
    }

    /// Waits until the daemon knows that nobody receives any more.
    async fn has_left(self: Arc<Self>) {
        loop {
            let rested = self.rested.notified();
            tokio::pin!(rested);
            rested.as_mut().enable();
            {
                let state = self.state.lock();
                let settled = if state.held > 0 { state.unsettled.is_empty() } else { !state.keeping };
                if !state.pulling && settled {
                    return;
                }
            }
            rested.await;
        }
    }

    /// Leases held, in what was handed out and in what was not.
    pub(super) fn leases(&self) -> Vec<Box<str>> {
        let handed = self.state.lock().handed.clone();
        let held = handed.iter().filter_map(std::sync::Weak::upgrade);
        held.flat_map(|handed| {
            handed.items.iter().filter(|item| item.is_held()).map(|item| item.lease.clone()).collect::<Vec<_>>()
        })
        .collect()
    }
}

impl State {
    pub(super) fn note_gap(&mut self, gap: Option<Gap>) {
        if let Some(gap) = gap {
            self.gap = Some(self.gap.map_or(gap, |before| before.and(gap)));
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("standing", &self.standing).finish_non_exhaustive()
    }
}

/// The receiving end.
pub(super) struct HttpConsumer {
    lane: Arc<Lane>,
    closing: Option<BoxFuture<'static, ()>>,
}

impl HttpConsumer {
    pub(super) fn new(lane: Arc<Lane>) -> Self {
        Self { lane, closing: None }
    }
}

impl Consumer for HttpConsumer {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let lane = &self.lane;
        let mut state = lane.state.lock();
        if !state.buffer.is_empty() {
            let count = limit.min(state.buffer.len());
            state.idle_since = Some(Instant::now());
            batch.extend(state.buffer.drain(..count).map(|(handed, index)| Delivery::new(handed, index)));
            return Poll::Ready(Ok(count));
        }
        if let Some(ended) = &state.ended {
            return Poll::Ready(ended.clone().map(|()| 0));
        }
        let pull = pulling::is_wanted(lane, &mut state)?;
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => state.waker = Some(cx.waker().clone()),
        }
        state.wanted = limit;
        state.idle_since = None;
        drop(state);
        pulling::start(lane, pull);
        lane.wanted.notify_one();
        Poll::Pending
    }

    fn stop_waiting(&mut self) {
        let mut state = self.lane.state.lock();
        // A pull under way goes on: who receives in turns with something else is soon back. What it
        // brings is given back otherwise.
        state.wanted = 0;
        state.idle_since = Some(Instant::now());
    }

    fn gap(&mut self) -> Option<Gap> {
        self.lane.state.lock().gap.take()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let closing = self.closing.get_or_insert_with(|| {
            self.lane.leave();
            Box::pin(Arc::clone(&self.lane).has_left())
        });
        closing.as_mut().poll(cx).map(Ok)
    }
}

impl Drop for HttpConsumer {
    fn drop(&mut self) {
        self.lane.leave();
    }
}

/// Deliveries of one pull.
pub(super) struct Handed {
    pub(super) lane: Arc<Lane>,
    pub(super) items: Box<[Item]>,
}

pub(super) struct Item {
    pub(super) message: Message,
    pub(super) topic: Topic,
    pub(super) attempt: u32,
    pub(super) lease: Box<str>,
    /// Whether it was settled or given back.
    settled: AtomicBool,
}

impl Item {
    pub(super) fn new(message: Message, topic: Topic, attempt: u32, lease: Box<str>) -> Self {
        Self { message, topic, attempt, lease, settled: AtomicBool::new(false) }
    }

    fn is_held(&self) -> bool {
        !self.settled.load(Ordering::Acquire)
    }
}

impl Handed {
    #[expect(clippy::indexing_slicing, reason = "an index is one that was given to Delivery::new")]
    fn item(&self, index: u32) -> &Item {
        &self.items[index as usize]
    }

    /// What to tell the daemon to have it back, unless it was settled.
    fn release(&self, index: u32) -> Option<Unsettled> {
        let item = self.item(index);
        let held = !item.settled.swap(true, Ordering::AcqRel);
        held.then(|| Unsettled { lease: item.lease.clone(), settlement: Settlement::Release, ticket: None })
    }

    /// Settles an item; `ticket` says whom to tell the outcome.
    fn settle(&self, index: u32, settlement: Settlement, ticket: Option<u64>) {
        let item = self.item(index);
        item.settled.store(true, Ordering::Release);
        // In one step: held no more and not yet to be told, it would be nobody's.
        let mut state = self.lane.state.lock();
        state.held = state.held.saturating_sub(1);
        match &settlement {
            Settlement::Ack => state.counts.acked += 1,
            Settlement::Retry { .. } => state.counts.retried += 1,
            Settlement::Reject(_) => state.counts.dead_lettered += 1,
            Settlement::Release => {}
        }
        state.unsettled.push_back(Unsettled { lease: item.lease.clone(), settlement, ticket });
        self.lane.see_to_it(state);
        self.lane.wanted.notify_one();
    }
}

impl Deliveries for Handed {
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
        let shared = &self.lane.shared;
        if shared.closed.is_cancelled() {
            return Operation::from(shared.closed_error());
        }
        let (ticket, operation) = shared.settlements.issue();
        // It has begun: dropping the future withdraws nothing.
        shared.settlements.take(ticket);
        self.settle(index, settlement, Some(ticket));
        operation
    }

    fn abandon(&self, index: u32) {
        if !self.lane.shared.closed.is_cancelled() {
            self.settle(index, Settlement::Retry { after: None, failure: None }, None);
        }
    }
}
