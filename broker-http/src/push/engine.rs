//! One push at work: a driver task that waits for the broker, the clock and the operator, and lanes
//! that carry requests.
//!
//! A lane is a task with a connection. When its request is done it asks the core itself for the
//! next message, so that under load no task wakes another: the driver is there for what comes while
//! lanes have nothing to do. Lanes are made when all others are busy, and end when they have been
//! idle for a while, and their connection with them.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use broker_core::{Broker, ErrorKind, Group, GroupName, GroupOptions, RetryPolicy, Subscribe, Subscription};
use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::connection::Route;
use super::core::{Core, Holds, Next, Parcel};
use super::encode::Encoder;
use super::{PushObserver, lane};
use crate::{Mode, SubscriptionSpec};

/// Waits between two tries to subscribe.
const RESUBSCRIBE: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];

/// What the driver, the lanes and the handle share.
pub(crate) struct Engine {
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) name: GroupName,
    pub(crate) group: Group,
    pub(crate) spec: Arc<SubscriptionSpec>,
    pub(crate) policy: RetryPolicy,
    pub(crate) encoder: Encoder,
    pub(crate) route: Route,
    pub(crate) observer: Option<Arc<dyn PushObserver>>,
    /// No more intake: also while a subscription is being made.
    pub(crate) stopped: CancellationToken,
    /// The driver has ended.
    over: CancellationToken,
    state: Mutex<State>,
}

/// What is under the lock.
pub(crate) struct State {
    pub(crate) core: Core,
    /// The driver's; the broker wakes it, whoever polled.
    driver: Waker,
    /// Until when the driver sleeps.
    sleeps_until: Option<Instant>,
    lanes: Slab<Lane>,
    /// Lanes without work, the one that worked last at the end.
    idle: Vec<usize>,
    over: bool,
}

#[derive(Default)]
struct Lane {
    parcel: Option<Parcel>,
    waker: Option<Waker>,
}

/// What is to be done once the lock is released.
#[derive(Default)]
struct After {
    wake: Vec<Waker>,
    spawn: Vec<(usize, Parcel)>,
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        let Parts { broker, name, group, spec, encoder, route, observer, holds } = parts;
        let core = Core::new(Arc::clone(&spec), holds, encoder.parcel_bytes(), Instant::now());
        let state = State {
            core,
            driver: Waker::noop().clone(),
            sleeps_until: None,
            lanes: Slab::new(),
            idle: Vec::new(),
            over: false,
        };
        let engine = Self {
            policy: spec.retry.unwrap_or_default(),
            broker,
            name,
            group,
            spec,
            encoder,
            route,
            observer,
            stopped: CancellationToken::new(),
            over: CancellationToken::new(),
            state: Mutex::new(state),
        };
        Arc::new(engine)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Changes the core and lets the driver look at it.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Core)) {
        let mut state = self.lock();
        change(&mut state.core);
        let driver = state.driver.clone();
        drop(state);
        driver.wake();
    }

    /// The driver: runs until the push is over.
    pub(crate) async fn drive(self: Arc<Self>) {
        let mut sleep = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let mut patience = RESUBSCRIBE[0];
        loop {
            let step = std::future::poll_fn(|cx| {
                loop {
                    let mut state = self.lock();
                    if !state.driver.will_wake(cx.waker()) {
                        state.driver = cx.waker().clone();
                    }
                    let (step, until) = match self.fill(state, None).1 {
                        Next::Subscribe => (Poll::Ready(Step::Subscribe), None),
                        Next::Over => (Poll::Ready(Step::Over), None),
                        Next::Wait(until) => (Poll::Pending, until),
                        // Sending is done.
                        Next::Send(_) => continue,
                    };
                    let Some(until) = until else { return step };
                    if sleep.deadline() != until {
                        sleep.as_mut().reset(until);
                    }
                    if sleep.as_mut().poll(cx).is_pending() {
                        return step;
                    }
                }
            })
            .await;
            match step {
                Step::Over => break,
                Step::Subscribe => self.subscribe(&mut patience).await,
            }
        }
        self.finish();
    }

    /// Sends all that may be sent now: the first parcel by the lane that asks, if one does, the
    /// others by idle lanes or new ones. Tells what to wait for then.
    fn fill(self: &Arc<Self>, mut state: MutexGuard<'_, State>, own: Option<usize>) -> (Option<Parcel>, Next) {
        let mut after = After::default();
        let mut mine = None;
        let driver = state.driver.clone();
        let mut cx = Context::from_waker(&driver);
        let now = Instant::now();
        let next = loop {
            match state.core.next(&mut cx, now) {
                Next::Send(parcel) if own.is_some() && mine.is_none() => mine = Some(parcel),
                Next::Send(parcel) => state.hand_out(parcel, &mut after),
                next => break next,
            }
        };
        if let Some(lane) = own.filter(|_| mine.is_none()) {
            state.idle.push(lane);
        }
        // A lane cannot sleep, subscribe or end for the driver.
        let until = if let Next::Wait(until) = next { until } else { None };
        let later = match (until, state.sleeps_until) {
            (Some(until), Some(sleeps)) => until < sleeps,
            (until, None) => until.is_some(),
            (None, Some(_)) => false,
        };
        if own.is_none() {
            state.sleeps_until = until;
        } else if later || matches!(next, Next::Subscribe | Next::Over) {
            after.wake.push(driver.clone());
        }
        drop(state);
        after.wake.into_iter().for_each(Waker::wake);
        for (id, parcel) in after.spawn {
            tokio::spawn(lane::run(Arc::clone(self), id, parcel));
        }
        (mine, next)
    }

    async fn subscribe(&self, patience: &mut Duration) {
        let subscribed = tokio::select! {
            subscribed = self.try_subscribe() => subscribed,
            () = self.stopped.cancelled() => return,
        };
        match subscribed {
            Ok(subscription) => {
                *patience = RESUBSCRIBE[0];
                self.lock().core.subscribed(subscription);
            }
            Err(error) => {
                tracing::warn!(subscription = %self.name, %error, "a push cannot subscribe");
                self.lock().core.not_subscribed(error);
                tokio::select! {
                    () = tokio::time::sleep(*patience) => {}
                    () = self.stopped.cancelled() => {}
                }
                *patience = (*patience * 2).min(RESUBSCRIBE[1]);
            }
        }
    }

    /// Joins the group as it stands; one that does not is made as the subscription says.
    async fn try_subscribe(&self) -> broker_core::Result<Subscription> {
        let batch = if self.spec.mode == Mode::Batch { self.spec.batch.max.get() as usize } else { 1 };
        let most = self.broker.capabilities().max_in_flight.max(1);
        let in_flight = (self.spec.max_in_flight as usize).saturating_mul(batch).min(most);
        let member = Subscribe::group(self.group.name.clone()).with_max_in_flight(in_flight)?;
        let asked = member.clone().with_options(asked(&self.spec));
        match self.broker.subscribe(&self.group.filter, asked).await {
            Err(error) if error.kind() == ErrorKind::Conflict => {
                self.broker.subscribe(&self.group.filter, member).await
            }
            subscribed => subscribed,
        }
    }

    /// Ends the lanes that are idle; all are.
    fn finish(&self) {
        let mut state = self.lock();
        state.over = true;
        let wakers: Vec<_> = state.lanes.iter_mut().filter_map(|(_, lane)| lane.waker.take()).collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        self.route.forget();
        self.over.cancel();
    }

    /// Ends when the driver has.
    pub(crate) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// A lane's request is done; tells what it sends next. Without a parcel it is idle.
    pub(crate) fn next_for(self: &Arc<Self>, id: usize, state: MutexGuard<'_, State>) -> Option<Parcel> {
        self.fill(state, Some(id)).0
    }

    /// What an idle lane waits for: a parcel, or the end.
    pub(crate) fn poll_idle(&self, id: usize, cx: &mut Context<'_>) -> Poll<Option<Parcel>> {
        let mut state = self.lock();
        let over = state.over;
        let Some(lane) = state.lanes.get_mut(id) else { return Poll::Ready(None) };
        match lane.parcel.take() {
            Some(parcel) => Poll::Ready(Some(parcel)),
            None if over => Poll::Ready(None),
            None => {
                if lane.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    lane.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    /// An idle lane ends, unless it was given a parcel meanwhile.
    pub(crate) fn leave(&self, id: usize) -> Option<Parcel> {
        let mut state = self.lock();
        if let Some(parcel) = state.lanes.get_mut(id).and_then(|lane| lane.parcel.take()) {
            return Some(parcel);
        }
        state.idle.retain(|idle| *idle != id);
        state.lanes.try_remove(id);
        let last = state.lanes.is_empty();
        drop(state);
        if last {
            self.route.forget();
        }
        None
    }
}

enum Step {
    Subscribe,
    Over,
}

/// What an engine is made of.
pub(crate) struct Parts {
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) name: GroupName,
    pub(crate) group: Group,
    pub(crate) spec: Arc<SubscriptionSpec>,
    pub(crate) encoder: Encoder,
    pub(crate) route: Route,
    pub(crate) observer: Option<Arc<dyn PushObserver>>,
    pub(crate) holds: Holds,
}

impl State {
    /// Gives a parcel to the idle lane that worked last, whose connection is the warmest, or to a
    /// new one.
    fn hand_out(&mut self, parcel: Parcel, after: &mut After) {
        if let Some(lane) = self.idle.pop().and_then(|id| self.lanes.get_mut(id)) {
            lane.parcel = Some(parcel);
            after.wake.extend(lane.waker.take());
        } else {
            let id = self.lanes.insert(Lane::default());
            after.spawn.push((id, parcel));
        }
    }
}

fn asked(spec: &SubscriptionSpec) -> GroupOptions {
    let mut options = GroupOptions::new();
    options.start.clone_from(&spec.start);
    options.ordered = spec.ordered;
    options.backlog = spec.backlog;
    options.retry = spec.retry;
    options.dead_letter.clone_from(&spec.dead_letter);
    options
}
