//! A lane: one task, one connection, one request at a time.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use broker_core::{Delivery, Message, Settlement, Timestamp};
use smallvec::SmallVec;
use tokio::time::Instant;

use super::Attempt;
use super::connection::{Broken, Connection, Content, Way};
use super::core::Parcel;
use super::encode::{RouteHeaders, envelope};
use super::engine::Engine;
use super::resend::Resends;
use super::timer::Timer;
use super::verdict::{self, Decision, Item, Outcome, Verdict};
use crate::traces::Processing;
use crate::{Mode, SubscriptionSpec};

/// Carries parcels until there has been none for a while.
pub(crate) async fn run(engine: Arc<Engine>, id: usize, parcel: Parcel) {
    let mut line = Line::new(&engine);
    let mut next = Some(parcel);
    while let Some(parcel) = next {
        let name = engine.name.as_str();
        let processing = engine.route.client().traces().process(name, &engine.group, &parcel.deliveries);
        let pushing = processing.push(engine.route.target());
        let encode = |route: &mut RouteHeaders| {
            let envelopes = parcel.deliveries.iter().map(|delivery| envelope(delivery, name));
            let mut content = engine.encoder.encode(envelopes, route);
            pushing.inject(&mut content.headers);
            content
        };
        let exchange = exchange(&engine, &mut line, parcel.deliveries.iter().map(Delivery::message), encode).await;
        pushing.over(&exchange.outcome);
        next = settle(&engine, id, parcel, &exchange, processing).await;
        if next.is_none() {
            next = idle(&engine, id, &mut line).await;
        }
    }
}

/// What a lane keeps from one request to the next.
pub(crate) struct Line {
    connection: Option<Connection>,
    /// How often the client's rules had changed when it was made.
    changes: u64,
    timer: Timer,
    headers: RouteHeaders,
}

impl Line {
    pub(crate) fn new(engine: &Engine) -> Self {
        let changes = engine.route.client().changes();
        Self { connection: None, changes, timer: Timer::new(), headers: RouteHeaders::default() }
    }
}

/// One push, and how it went.
pub(crate) struct Exchange {
    pub(crate) outcome: Outcome,
    pub(crate) time: Timestamp,
    pub(crate) latency: Duration,
}

/// Sends a request for these messages on the connection that is kept, or on a new one, and waits for the answer within
/// the subscription's time. A connection of no further use is closed.
pub(crate) async fn exchange<'a>(
    engine: &Engine,
    line: &mut Line,
    messages: impl Iterator<Item = &'a Message>,
    encode: impl Fn(&mut RouteHeaders) -> Content,
) -> Exchange {
    let Line { connection, changes, timer, headers } = line;
    let (route, client) = (&engine.route, engine.route.client());
    let now = client.changes();
    if *changes != now {
        *changes = now;
        *connection = None;
        route.forget();
    }
    // Waiting for one's turn is no fault of the endpoint: the time does not run yet.
    let mut way = match connection.take().filter(Connection::is_open) {
        Some(open) => Way::Open(open),
        None => route.way().await,
    };
    let mut turn = engine.encoder.turn(messages).await;
    let (time, mut latency) = (Timestamp::now(), Duration::ZERO);
    let mut resends = Resends::new(route.answers());
    let outcome = loop {
        let began = Instant::now();
        let sending = async {
            let open = match way {
                Way::Open(open) => open,
                Way::Place(place) => route.open(place).await.map_err(Broken::Failed)?,
            };
            let open = connection.insert(open);
            let content = encode(headers);
            drop(turn.take());
            open.exchange(content, route).await
        };
        let sent = timer.until(began + engine.spec.timeout.saturating_sub(latency), sending).await;
        latency += began.elapsed();
        match sent {
            Some(Ok(answer)) => break Outcome::Answer(answer),
            Some(Err(broken)) if resends.is_free(&broken, route.answers()) => {
                // The time does not run here either.
                way = match connection.take().and_then(Connection::into_place) {
                    Some(place) => Way::Place(place),
                    None => route.way().await,
                };
            }
            Some(Err(Broken::Unseen | Broken::Stale)) => {
                route.forget();
                let reason = "the endpoint refused the request again and again without an answer";
                break Outcome::Failed(reason.to_owned());
            }
            Some(Err(Broken::Failed(reason))) => break Outcome::Failed(reason),
            None => {
                *connection = None;
                // Who shares it may be waiting in vain too.
                route.forget();
                break Outcome::TimedOut(engine.spec.timeout);
            }
        }
    };
    if client.is_waited_for() {
        *connection = None;
        // One that is shared ends when the requests on it do.
        route.forget();
    } else if !connection.as_ref().is_some_and(Connection::is_open) {
        *connection = None;
    }
    Exchange { outcome, time, latency }
}

/// Settles what was pushed, and asks for more.
async fn settle(
    engine: &Arc<Engine>,
    id: usize,
    parcel: Parcel,
    exchange: &Exchange,
    mut processing: Processing,
) -> Option<Parcel> {
    let verdict = verdict::judge(&exchange.outcome, &engine.spec.verdicts, SystemTime::now);
    processing.judged(&verdict);
    let items = judge_items(engine, &parcel, &exchange.outcome, &verdict);
    let messages = parcel.deliveries.len();
    // None of them is dead for what another is, or for their number.
    let divided = messages > 1 && verdict.decision == Decision::Reject && !verdict.is_asked_for();
    let disabled = {
        let mut state = engine.lock();
        let disabled = state.core.came_back(&parcel, &verdict, Instant::now());
        match verdict.decision {
            _ if divided => state.core.refused(messages),
            Decision::Ack => state.core.accepted(messages),
            _ => {}
        }
        for (index, delivery) in parcel.deliveries.iter().enumerate() {
            let reason = items.as_ref().and_then(|items| items.get(index)).map_or(&*verdict.reason, |item| item.reason);
            state.core.log(Attempt {
                id: delivery.message().id().clone(),
                attempt: delivery.attempt(),
                status: verdict.status,
                latency: exchange.latency,
                error: (!reason.is_empty()).then(|| reason.into()),
                time: exchange.time,
            });
        }
        disabled
    };
    if let Some(observer) = &engine.observer {
        observer.pushed(verdict.decision == Decision::Ack, exchange.latency);
        if disabled {
            observer.disabled();
        }
    }
    if disabled {
        tracing::warn!(subscription = %engine.name, "the endpoint is gone; the subscription is disabled until it is resumed");
    }
    let now = Timestamp::now();
    let least = least_wait(&engine.spec);
    let mut kept = Vec::new();
    let mut settling = SmallVec::new();
    for (index, delivery) in parcel.deliveries.into_iter().enumerate() {
        let item = items.as_ref().and_then(|items| items.get(index));
        let (decision, reason) =
            item.map_or((&verdict.decision, &*verdict.reason), |item| (&item.decision, item.reason));
        if divided {
            kept.push(delivery);
            continue;
        }
        match verdict::settlement(decision, verdict.status, reason, &engine.policy, delivery.attempt(), least) {
            Some(settlement) => {
                if let (Some(observer), Decision::Ack) = (&engine.observer, decision) {
                    observer.delivered(now.since(delivery.message().timestamp()));
                }
                begin(engine, delivery, settlement, &mut settling);
            }
            None => kept.push(delivery),
        }
    }
    for settle in settling {
        if let Err(error) = settle.await {
            tracing::debug!(subscription = %engine.name, %error, "a push was not settled; its message comes back");
        }
    }
    processing.over();
    let mut state = engine.lock();
    state.core.settled(messages);
    if divided {
        state.core.send_again(kept)
    } else {
        state.core.keep(kept)
    }
    engine.next_for(id, state)
}

/// How long a message is not pushed again. Where no attempt is in the body, nothing but the second tells two signed pushes
/// of it apart: within one they are the same to whoever refuses what he has seen (Standard Webhooks, "Replay attacks").
fn least_wait(spec: &SubscriptionSpec) -> Option<Duration> {
    let alike = spec.signing.is_some() && matches!(spec.mode, Mode::Binary | Mode::Raw);
    alike.then_some(Duration::from_secs(1))
}

/// Settles a delivery. What the broker took at once costs nothing more.
fn begin(
    engine: &Engine,
    delivery: Delivery,
    settlement: Settlement,
    settling: &mut SmallVec<[broker_core::Settle; 1]>,
) {
    if let Settlement::Reject(failure) = &settlement {
        let id = delivery.message().id();
        tracing::debug!(subscription = %engine.name, %id, reason = failure.reason(), "a message is dead-lettered");
    }
    settling.push(delivery.settle(settlement));
}

/// What the answer to a batch says of its messages one by one.
fn judge_items(engine: &Engine, parcel: &Parcel, outcome: &Outcome, verdict: &Verdict) -> Option<Vec<Item>> {
    let Outcome::Answer(answer) = outcome else { return None };
    if engine.spec.mode != Mode::Batch || verdict.decision != Decision::Ack {
        return None;
    }
    let ids = parcel.deliveries.iter().map(|delivery| delivery.message().id().to_string().into());
    verdict::judge_items(&answer.body, ids)
}

/// Keeps the connection until there is a parcel, the endpoint closes it, or it has been idle for
/// too long; without a connection there is nothing to keep.
async fn idle(engine: &Engine, id: usize, line: &mut Line) -> Option<Parcel> {
    let Line { connection, timer, .. } = line;
    if let Some(open) = connection {
        let parcel = poll_fn(|cx| match engine.poll_idle(id, cx) {
            Poll::Pending => open.poll_closed(cx).map(|()| None),
            ready => ready,
        });
        let deadline = Instant::now() + engine.route.client().idle_timeout();
        if let Some(Some(parcel)) = timer.until(deadline, parcel).await {
            return Some(parcel);
        }
        *connection = None;
    }
    engine.leave(id)
}
