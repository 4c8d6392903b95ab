//! Pull and settle by lease: `POST /subscriptions/{name}/pull` and `/settle`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use broker_core::{
    Broker, Delivery, Failure, Gap, GroupName, Received, Result, Settle, Settlement, Subscribe, Subscription,
};
use futures_util::FutureExt;
use http::{HeaderMap, StatusCode, Uri};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout_at};

use super::access::{Action, Caller, Right};
use super::leases::{Borrower, Hand, Holder, LeaseId, Leases, detach};
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::publish::json_response;
use super::query::{Query, name_in_path};
use super::reader::{Reader, TURN_TO_ANSWER};
use super::registry::Subscribed;
use super::{Shared, body};
use crate::event::{Envelope, json};
use crate::outgoing::Turn;

/// Deliveries a pull may ask for.
pub(crate) const MAX_PULL: usize = 10_000;
const DEFAULT_PULL: usize = 100;
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(300);
pub(crate) const MAX_HOLD: Duration = Duration::from_secs(12 * 3600);

/// Bytes of messages after which an answer is full, and deliveries taken between two looks at that.
pub(crate) const FULL_BYTES: usize = 8 << 20;
const AT_ONCE: usize = 32;

/// How long a pull that does not wait stands behind another that is just taking deliveries.
const TURN: Duration = Duration::from_millis(20);

/// An answer of so many bytes waits for no turn: it is smaller than the request that it answers.
const SMALL_BYTES: u64 = 4 << 10;

/// How long a member nobody pulls through stays in its group, where it may hold deliveries back from
/// the others.
const IDLE_MEMBER: Duration = Duration::from_secs(30);

/// The pulling side of one pull subscription.
#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) holder: Arc<Holder>,
    member: AsyncMutex<Option<Subscription>>,
    /// Pulls at work.
    pulling: AtomicUsize,
    last: Mutex<Instant>,
    /// What the member lost and no puller was told yet.
    gap: Mutex<Option<Gap>>,
}

impl Pull {
    pub(crate) fn new() -> Self {
        Self {
            holder: Arc::default(),
            member: AsyncMutex::new(None),
            pulling: AtomicUsize::new(0),
            last: Mutex::new(Instant::now()),
            gap: Mutex::new(None),
        }
    }

    /// Since when nobody pulls; `None` while somebody does.
    fn idle_since(&self) -> Option<Instant> {
        let last = *self.last.lock();
        (self.pulling.load(Ordering::Acquire) == 0).then_some(last)
    }

    /// When the subscription expires, unless somebody pulls or settles before; while leases are held, or places for
    /// them, its time does not run.
    pub(crate) fn expires(&self, after: Duration) -> Instant {
        let since = self.idle_since().filter(|_| self.holder.leased() == 0);
        since.map_or_else(Instant::now, |since| self.holder.emptied().map_or(since, |emptied| emptied.max(since)))
            + after
    }

    /// It was in use until now.
    pub(crate) fn used(&self) {
        *self.last.lock() = Instant::now();
    }

    /// Leaves the group if nobody pulled for long; the next pull joins again.
    pub(crate) fn leave_if_idle(&self) {
        if self.idle_since().is_some_and(|since| since.elapsed() > IDLE_MEMBER) {
            self.leave();
        }
    }

    /// Leaves the group, unless a pull is at work: it leaves with its answer.
    pub(crate) fn leave(&self) {
        if let Ok(mut member) = self.member.try_lock() {
            member.take();
        }
    }
}

/// Counts a pull at work, however it ends.
struct Pulling<'a>(&'a Pull);

impl<'a> Pulling<'a> {
    fn begin(pull: &'a Pull) -> Self {
        pull.pulling.fetch_add(1, Ordering::AcqRel);
        Self(pull)
    }
}

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.0.used();
        self.0.pulling.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a pull asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Wanted {
    /// Deliveries at most.
    pub(crate) max: usize,
    /// How long to wait for the first of them.
    pub(crate) wait: Duration,
}

impl Wanted {
    /// Of the query parameters `max` and `wait`.
    pub(crate) fn read(uri: &Uri) -> Answer<Self> {
        let mut query = Query::of(uri);
        let max = query.number("max", 1..=MAX_PULL)?.unwrap_or(DEFAULT_PULL);
        let wait = query.duration("wait")?.unwrap_or_default();
        query.finish()?;
        if wait > MAX_WAIT {
            return Err(Problem::invalid("query parameter wait: it is 5m at most"));
        }
        Ok(Self { max, wait })
    }
}

/// `POST /subscriptions/{name}/pull?max=&wait=`
pub(crate) async fn pull(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
) -> Answer {
    let wanted = Wanted::read(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let pull = pulled(&subscribed)?;
    let _pulling = Pulling::begin(pull);
    let right = right(&shared, caller.as_deref(), &subscribed);
    let lent = tokio::select! {
        biased;
        () = right.ended() => {
            right.check()?;
            // Allowed again already; it is asked again soon enough.
            None
        }
        lent = lend(&shared, &subscribed, pull, wanted, (&right, &reader)) => lent?,
    };
    let (leased, turn) = lent.map_or_else(Default::default, |(leased, turn)| (leased, Some(turn)));
    shared.metrics.pulled(leased.len());
    let mut out = encode(&leased, Some(subscribed.name.as_str()));
    if let Some(gap) = pull.gap.lock().take() {
        out.pop();
        // How many, or null where that is not known.
        let lost = gap.lost().map_or_else(|| "null".to_owned(), |lost| lost.to_string());
        out.extend_from_slice(format!(r#","lost":{lost}}}"#).as_bytes());
    }
    let answer = match turn {
        Some(turn) => reader.answer(turn, out),
        None => out.into(),
    };
    Ok(json_response(StatusCode::OK, answer))
}

/// That a caller may take from a subscription and settle.
fn right(shared: &Arc<Shared>, caller: Option<&Caller>, subscribed: &Subscribed) -> Arc<Right> {
    Right::of(shared, caller.cloned(), &[Action::Settle], subscribed.spec.filter.clone())
}

/// What is lent, and the turn to tell of it.
type Lent = (Vec<(LeaseId, Received)>, Turn);

/// Lends what there is, or is in time. Dropped before its end, it has lent nothing.
async fn lend(
    shared: &Arc<Shared>,
    subscribed: &Subscribed,
    pull: &Pull,
    Wanted { max, wait }: Wanted,
    (right, reader): (&Right, &Reader),
) -> Answer<Option<Lent>> {
    let deadline = Instant::now() + wait;
    let borrower = right.borrower();
    loop {
        if subscribed.is_paused() {
            subscribed.resumed(deadline, &shared.draining).await;
            if Instant::now() >= deadline || shared.is_draining() {
                return Ok(None);
            }
            continue;
        }
        let allowed = subscribed.spec.max_in_flight as usize;
        let places = shared.leases.reserve((&pull.holder, &borrower), max, allowed);
        if places.count() == 0 {
            if shared.leases.left(&borrower) == 0 {
                return Err(full(&shared.leases, &borrower, right.name()));
            }
            wait_for_room(subscribed, pull, deadline).await;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            continue;
        }
        let deliveries = receive(shared, subscribed, pull, places.count(), deadline).await?;
        if !deliveries.is_empty() {
            let mut sizes = deliveries.iter().map(|delivery| json::about(delivery.message()));
            let first = sizes.next().unwrap_or_default();
            let all = first + sizes.sum::<u64>();
            // Nothing is lent while nobody can be told: whoever leaves meanwhile has tried nothing.
            let mut hand = Hand::from(deliveries);
            let patience = deadline.max(Instant::now() + TURN_TO_ANSWER);
            let turn = timeout_at(patience, reader.turn(first..=all)).await.map_err(|_| Reader::crowded())?;
            // They may have been published after the rules changed.
            right.check()?;
            // From here to the leases nothing waits, so that no caller gone can lose them.
            let deliveries = hand.take_fitting(turn.bytes());
            let events: Vec<_> = deliveries.iter().map(|delivery| delivery.received().clone()).collect();
            let ids = shared.leases.grant(places, deliveries, subscribed.spec.timeout)?;
            return Ok(Some((ids.into_iter().zip(events).collect(), turn)));
        }
        if Instant::now() >= deadline || shared.is_draining() {
            return Ok(None);
        }
    }
}

fn full(leases: &Leases, borrower: &Borrower, name: Option<&str>) -> Problem {
    let max = leases.max();
    let why = match name.filter(|_| leases.free() > 0) {
        Some(name) => format!(
            "{name} has {} of the {max} leases, and no more than that are left, which are for others",
            borrower.lent()
        ),
        None => format!("there are {max} leases, which is the most"),
    };
    Problem::too_many(format!("{why}; settle some first")).counted(Refusal::Leases)
}

/// What is lent, in JSON.
pub(crate) fn encode(leased: &[(LeaseId, Received)], subscription: Option<&str>) -> Vec<u8> {
    let about: u64 = leased.iter().map(|(_, received)| json::about(received.message())).sum();
    let mut out = Vec::with_capacity(usize::try_from(about).unwrap_or(0));
    out.extend_from_slice(br#"{"deliveries":["#);
    for (index, (lease, received)) in leased.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let attempt = received.attempt();
        out.extend_from_slice(format!(r#"{comma}{{"lease":"{lease}","attempt":{attempt},"event":"#).as_bytes());
        let envelope =
            Envelope { topic: received.topic(), message: received.message(), subscription, attempt: Some(attempt) };
        json::encode(envelope, &mut out);
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    out
}

fn pulled(subscribed: &Subscribed) -> Answer<&Pull> {
    subscribed.pull().ok_or_else(|| {
        Problem::conflict(format!(
            "subscription {} pushes to its endpoint; make one without an endpoint to pull",
            subscribed.name
        ))
    })
}

/// Waits until a lease of this subscription ends.
async fn wait_for_room(subscribed: &Subscribed, pull: &Pull, deadline: Instant) {
    let room = pull.holder.room.notified();
    tokio::pin!(room);
    // A lease that ended before this is seen here, one after it wakes us.
    room.as_mut().enable();
    if pull.holder.leased() >= subscribed.spec.max_in_flight as usize {
        let _ = timeout_at(deadline, room).await;
    }
}

/// Waits for deliveries until the deadline; an empty answer says that there were none in time.
async fn receive(
    shared: &Shared,
    subscribed: &Subscribed,
    pull: &Pull,
    limit: usize,
    deadline: Instant,
) -> Answer<Vec<Delivery>> {
    let turn = deadline.max(Instant::now() + TURN);
    let Ok(mut member) = timeout_at(turn, pull.member.lock()).await else { return Ok(Vec::new()) };
    if shared.is_draining() {
        member.take();
        return Ok(Vec::new());
    }
    if member.is_none() {
        *member = Some(join(&*shared.broker, subscribed).await?);
    }
    let Some(subscription) = member.as_mut() else { return Ok(Vec::new()) };
    let mut batch = Vec::new();
    let mut taken = Vec::new();
    let mut bytes = 0;
    loop {
        let most = (limit - taken.len()).min(AT_ONCE);
        let received = if taken.is_empty() {
            tokio::select! {
                biased;
                received = timeout_at(deadline, subscription.receive(&mut batch, most)) => received.ok(),
                () = shared.draining.cancelled() => Some(Ok(0)),
            }
        } else {
            // What is there beside the first comes along. Nothing waits while deliveries are in
            // our hands: a caller that goes away now could not get them.
            subscription.receive(&mut batch, most).now_or_never()
        };
        match received {
            None => break,
            Some(Ok(0)) => {
                // Closing, or deleted under us: what was taken is still good.
                member.take();
                break;
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                member.take();
                if taken.is_empty() {
                    return Err(error.into());
                }
                break;
            }
        }
        for delivery in batch.drain(..) {
            if subscribed.spec.wants(delivery.topic(), delivery.message()) {
                bytes += delivery.message().size();
                taken.push(delivery);
            } else {
                detach(delivery.ack());
            }
        }
        if taken.len() >= limit || bytes >= FULL_BYTES {
            break;
        }
    }
    if let Some(gap) = member.as_mut().and_then(Subscription::gap) {
        let mut untold = pull.gap.lock();
        *untold = Some(untold.map_or(gap, |before| before.and(gap)));
    }
    Ok(taken)
}

async fn join(broker: &dyn Broker, subscribed: &Subscribed) -> Result<Subscription> {
    let options = Subscribe::group(GroupName::clone(&subscribed.group.name))
        .with_max_in_flight(subscribed.spec.max_in_flight as usize)?;
    broker.subscribe(&subscribed.group.filter, options).await
}

/// What a puller says about its leases.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settlements {
    ack: Vec<String>,
    retry: Vec<Retry>,
    reject: Vec<Reject>,
    /// Given back untried.
    release: Vec<String>,
    extend: Vec<Extend>,
}

impl Settlements {
    /// Leases named.
    pub(crate) fn len(&self) -> usize {
        self.ack.len() + self.retry.len() + self.reject.len() + self.release.len() + self.extend.len()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Retry {
    lease: String,
    delay: Option<String>,
    reason: Option<String>,
    status: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reject {
    lease: String,
    reason: Option<String>,
    status: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extend {
    lease: String,
    r#for: String,
}

/// `POST /subscriptions/{name}/settle`
pub(crate) async fn settle(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    super::query::no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let pull = pulled(&subscribed)?;
    // Who settles is alive, whether it has room to pull or not.
    pull.used();
    // What it names counts until the answer does, which may name all of it.
    let (json, _reservation) = body::collect_json(&headers, body, &shared, caller.as_deref()).await?;
    let settlements: Settlements =
        body::read_json(&json)?.ok_or_else(|| Problem::invalid("a body is expected, as in {\"ack\": [\"lease\"]}"))?;
    // The body may have come slowly.
    right(&shared, caller.as_deref(), &subscribed).check()?;
    let gone = settle_all(&shared.leases, &pull.holder, settlements).await?;
    let told = gone.iter().map(|lease| lease.len() as u64 + 3).sum();
    let json = serde_json::json!({ "gone": gone }).to_string().into_bytes();
    if told <= SMALL_BYTES {
        return Ok(json_response(StatusCode::OK, json));
    }
    // Settled is settled: who does not read what became of it may ask again.
    let turn = reader.soon(told..=told).await?;
    Ok(json_response(StatusCode::OK, reader.answer(turn, json)))
}

/// What is to be done, checked.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Leases that end, and how.
    pub(crate) settle: Vec<(String, Settlement)>,
    /// Leases that go on, and for how long from now.
    pub(crate) extend: Vec<(String, Duration)>,
}

impl Settlements {
    /// Checks all before anything is settled.
    pub(crate) fn plan(self) -> Answer<Plan> {
        let Self { ack, retry, reject, release, extend } = self;
        let mut settle = Vec::with_capacity(ack.len() + retry.len() + reject.len() + release.len());
        settle.extend(ack.into_iter().map(|lease| (lease, Settlement::Ack)));
        settle.extend(release.into_iter().map(|lease| (lease, Settlement::Release)));
        for (index, Retry { lease, delay, reason, status }) in retry.into_iter().enumerate() {
            let after = delay.map(|delay| duration(&format!("retry[{index}].delay"), &delay)).transpose()?;
            settle.push((lease, Settlement::Retry { after, failure: failure(reason, status) }));
        }
        for Reject { lease, reason, status } in reject {
            let failure = failure(Some(reason.unwrap_or_else(|| "rejected".to_owned())), status);
            settle.push((lease, Settlement::Reject(failure.unwrap_or_else(|| Failure::new("rejected")))));
        }
        let mut extensions = Vec::with_capacity(extend.len());
        for (index, Extend { lease, r#for }) in extend.into_iter().enumerate() {
            let hold = duration(&format!("extend[{index}].for"), &r#for)?;
            if hold.is_zero() {
                return Err(Problem::invalid(format!("extend[{index}].for: it is longer than zero")));
            }
            extensions.push((lease, hold));
        }
        Ok(Plan { settle, extend: extensions })
    }
}

/// Settles; tells the leases that no longer held.
pub(crate) async fn settle_all(leases: &Leases, holder: &Arc<Holder>, settlements: Settlements) -> Answer<Vec<String>> {
    let Plan { settle, extend } = settlements.plan()?;
    let mut gone = Vec::new();
    // All begin before the first is awaited: an adapter settles many in one go.
    let mut settling: Vec<(String, bool, Settle)> = Vec::with_capacity(settle.len());
    for (lease, settlement) in settle {
        match lease.parse::<LeaseId>().ok().and_then(|id| leases.take(holder, id)) {
            Some(delivery) => {
                settling.push((lease, matches!(settlement, Settlement::Ack), delivery.settle(settlement)));
            }
            None => gone.push(lease),
        }
    }
    for (lease, hold) in extend {
        let held = lease.parse::<LeaseId>().is_ok_and(|id| leases.extend(holder, id, hold));
        if !held {
            gone.push(lease);
        }
    }
    for (lease, is_ack, settled) in settling {
        match settled.await {
            Ok(()) if is_ack => holder.tally().succeed(),
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "a settlement was not taken; the message comes back");
                gone.push(lease);
            }
        }
    }
    Ok(gone)
}

fn failure(reason: Option<String>, status: Option<String>) -> Option<Failure> {
    let failure = reason.map(Failure::new);
    match status {
        Some(status) => Some(failure.unwrap_or_else(|| Failure::new("no reason given")).with_status(status)),
        None => failure,
    }
}

fn duration(field: &str, text: &str) -> Answer<Duration> {
    let duration =
        broker_core::parse_duration(text).map_err(|error| Problem::invalid(format!("{field}: {}", error.message())))?;
    if duration > MAX_HOLD {
        return Err(Problem::invalid(format!("{field}: it is 12h at most")));
    }
    Ok(duration)
}
