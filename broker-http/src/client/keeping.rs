//! The task that keeps what was pulled: it settles, extends the leases of what is still held, and
//! gives back what nobody takes. It is at work while something is held or to be told, and as long
//! as a copy of one's own lives, which expires without a sign of life.

use std::collections::{HashSet, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Failure, Result, Settlement, format_duration};
use http::Method;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

use super::backoff::Backoff;
use super::error::refused;
use super::groups::EXPIRES;
use super::http::Call;
use super::lane::{Lane, State, Unsettled};
use super::shared::{Shared, runtime};
use super::wire::{self, Settled};

/// Settlements of one request at most.
const BATCH: usize = 1_000;
/// Extensions of one request at most.
const EXTENSIONS: usize = 5_000;
/// How often a copy of one's own says that it is still wanted, when it holds nothing.
const SIGN_OF_LIFE: Duration = Duration::from_secs(EXPIRES.as_secs() / 4);
/// How long what was pulled waits for somebody to take it, and how often that is looked at.
const UNTAKEN: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(100);

/// Whether the task is to be [started](start), and where: unless it is at work, or has nothing to do.
///
/// # Errors
///
/// That there is no runtime.
pub(super) fn is_wanted(lane: &Lane, state: &mut State) -> Result<Option<Handle>> {
    let idle = state.held == 0 && state.unsettled.is_empty() && (state.deleted || !lane.standing.own);
    if state.keeping || idle {
        return Ok(None);
    }
    let runtime = runtime()?;
    state.keeping = true;
    Ok(Some(runtime))
}

/// Starts the task, if it [is wanted](is_wanted).
pub(super) fn start(lane: &Arc<Lane>, wanted: Option<Handle>) {
    if let Some(runtime) = wanted {
        let keeper = Keeper { lane: Arc::clone(lane), under_way: Vec::new(), finished: false };
        lane.shared.spawn(&runtime, keeper.run());
    }
}

/// Tells whoever waits that settlements failed.
pub(super) fn fail(shared: &Shared, unsettled: impl IntoIterator<Item = Unsettled>, error: &Error) {
    for ticket in unsettled.into_iter().filter_map(|unsettled| unsettled.ticket) {
        shared.settlements.complete(ticket, Err(error.clone()));
    }
}

struct Keeper {
    lane: Arc<Lane>,
    under_way: Vec<Unsettled>,
    /// Whether it found nothing more to do; then another may be at work by now.
    finished: bool,
}

impl Drop for Keeper {
    /// Cut short, by `close` at its deadline or by the end of the runtime: nobody is left waiting.
    fn drop(&mut self) {
        if !self.finished {
            let waiting: VecDeque<_> = {
                let mut state = self.lane.state.lock();
                state.keeping = false;
                std::mem::take(&mut state.unsettled)
            };
            let error =
                Error::closed("the broker was closed before it knew of the settlement; the message may come back");
            fail(&self.lane.shared, self.under_way.drain(..).chain(waiting), &error);
        }
        self.lane.rested.notify_waiters();
    }
}

impl Keeper {
    async fn run(mut self) {
        let lane = Arc::clone(&self.lane);
        let interval = lane.shared.http.options().lease / 3;
        let mut extend_at = Instant::now() + interval;
        let mut held_before = true;
        loop {
            let (deleting, untaken);
            {
                let mut state = lane.state.lock();
                let count = state.unsettled.len().min(BATCH);
                self.under_way.extend(state.unsettled.drain(..count));
                let nothing = self.under_way.is_empty() && state.held == 0;
                if nothing && (state.deleted || !lane.standing.own) {
                    state.keeping = false;
                    self.finished = true;
                    return;
                }
                // A copy of one's own goes with its receiver, once nothing of it is held.
                state.deleted |= nothing && lane.left.is_cancelled();
                deleting = state.deleted;
                untaken = !state.buffer.is_empty();
                // With nothing held there is nothing to extend but the life of the subscription.
                let held = state.held > 0;
                if held != held_before {
                    extend_at = Instant::now() + if held { interval } else { SIGN_OF_LIFE };
                    held_before = held;
                }
            }
            if !self.under_way.is_empty() {
                self.settle(&mut extend_at).await;
                lane.rested.notify_waiters();
                // There may be room again.
                lane.wanted.notify_one();
            } else if deleting {
                self.delete().await;
                continue;
            } else {
                let look_at = if untaken { extend_at.min(Instant::now() + LOOK) } else { extend_at };
                tokio::select! {
                    () = lane.unsettled.notified() => continue,
                    () = sleep_until(look_at) => {}
                }
                if lane.is_untaken() {
                    lane.release_buffer();
                }
            }
            if Instant::now() >= extend_at {
                extend_at = self.extend().await;
            }
        }
    }

    /// Settles what is under way. What is still held is extended meanwhile, however long the daemon takes.
    async fn settle(&mut self, extend_at: &mut Instant) {
        let outcomes = {
            let mut settling = pin!(settle(&self.lane, &self.under_way));
            loop {
                tokio::select! {
                    biased;
                    outcomes = &mut settling => break outcomes,
                    () = sleep_until(*extend_at) => {}
                }
                tokio::select! {
                    biased;
                    outcomes = &mut settling => break outcomes,
                    next = self.extend() => *extend_at = next,
                }
            }
        };
        let settlements = &self.lane.shared.settlements;
        for (unsettled, outcome) in self.under_way.drain(..).zip(outcomes) {
            match (unsettled.ticket, outcome) {
                (Some(ticket), outcome) => settlements.complete(ticket, outcome),
                (None, Err(error)) => {
                    tracing::debug!(subscription = %self.lane.standing.name, %error, "a lease had ended already");
                }
                (None, Ok(())) => {}
            }
        }
    }

    /// Extends every lease held, and with it the life of a copy of one's own. When to do so next: soon, if the daemon does
    /// not know, since a third of the lease has passed and two are left.
    async fn extend(&self) -> Instant {
        let options = self.lane.shared.http.options();
        let interval = options.lease / 3;
        // One that is not answered must not cost all that is left.
        let within = options.timeout.min(interval);
        let hold = format_duration(options.lease);
        let leases = self.lane.leases();
        let mut bodies: Vec<_> = leases
            .chunks(EXTENSIONS)
            .map(|leases| leases.iter().map(|lease| Extend { lease, r#for: &hold }).collect())
            .map(|extend| Body { extend, ..Body::default() })
            .collect();
        if bodies.is_empty() && self.lane.standing.own {
            bodies.push(Body::default());
        }
        for body in bodies {
            // A lease that is gone is found out when it is settled.
            if let Err(error) = post(&self.lane, &body, within).await.1 {
                tracing::debug!(subscription = %self.lane.standing.name, %error, "leases were not extended");
                return Instant::now() + interval / 10;
            }
        }
        Instant::now() + if leases.is_empty() { SIGN_OF_LIFE } else { interval }
    }

    /// Deletes a copy of one's own; should it fail, the daemon deletes it when it expires.
    async fn delete(&self) {
        let shared = &self.lane.shared;
        let path = format!("/subscriptions/{}", self.lane.standing.name);
        let call = Call::new(Method::DELETE, &path, shared.http.options().timeout);
        match shared.expect(call).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::debug!(subscription = %self.lane.standing.name, %error, "a subscription is left to expire");
            }
            _ => {}
        }
    }
}

impl Lane {
    /// Whether there are deliveries that nobody came for in a while.
    fn is_untaken(&self) -> bool {
        let state = self.state.lock();
        !state.buffer.is_empty() && state.idle_since.is_some_and(|since| since.elapsed() > UNTAKEN)
    }
}

/// Settles; the outcome of each, in order. Tried until the leases would have ended by themselves.
async fn settle(lane: &Lane, unsettled: &[Unsettled]) -> Vec<Result<()>> {
    settle_until(Instant::now() + lane.shared.http.options().lease, lane, unsettled).await
}

async fn settle_until(deadline: Instant, lane: &Lane, unsettled: &[Unsettled]) -> Vec<Result<()>> {
    let all = |error: Error| vec![Err(error); unsettled.len()];
    let body = Body::of(unsettled);
    let mut backoff = Backoff::connecting();
    let mut unsure = false;
    loop {
        let (sent, result) = post(lane, &body, lane.shared.http.options().timeout).await;
        let error = match result {
            Ok(gone) => return outcomes(unsettled, &gone, unsure || sent),
            Err(error) => error,
        };
        // One that the daemon refuses must not take the others with it.
        if error.kind() == ErrorKind::Invalid && unsettled.len() > 1 {
            let mut outcomes = Vec::with_capacity(unsettled.len());
            for one in unsettled {
                outcomes.extend(Box::pin(settle_until(deadline, lane, std::slice::from_ref(one))).await);
            }
            return outcomes;
        }
        unsure |= sent;
        let wait = backoff.next().max(error.retry_after().unwrap_or_default());
        // A gateway may say for a while that it finds no daemon.
        let again = error.is_retryable() || error.kind() == ErrorKind::Backend;
        if !again || Instant::now() + wait > deadline {
            return all(error.context("settle"));
        }
        tokio::time::sleep(wait).await;
    }
}

fn outcomes(unsettled: &[Unsettled], gone: &[Box<str>], unsure: bool) -> Vec<Result<()>> {
    let gone: HashSet<&str> = gone.iter().map(|lease| &**lease).collect();
    let outcome = |unsettled: &Unsettled| {
        match gone.contains(&*unsettled.lease) {
        false => Ok(()),
        // An answer was lost on the way: the daemon may have settled it then.
        true if unsure => Err(Error::unavailable(
            "the connection was lost while settling, and the lease has ended; whether it was settled is unknown, the message may come back",
        )
        .with_retryable(false)),
        true => Err(Error::not_found("the lease had ended before it was settled; the message comes back")),
    }
    };
    unsettled.iter().map(outcome).collect()
}

/// Posts to `settle`: whether the daemon may have seen it without our knowing, and the leases that
/// no longer held.
async fn post(lane: &Lane, body: &Body<'_>, within: Duration) -> (bool, Result<Vec<Box<str>>>) {
    let path = format!("/subscriptions/{}/settle", lane.standing.name);
    // Text always serializes.
    let json = serde_json::to_vec(body).unwrap_or_default();
    match lane.shared.call(Call::new(Method::POST, &path, within).json(json)).await {
        Ok(answer) if answer.status.is_success() => {
            (answer.repeated, wire::read::<Settled>("settle", &answer.body).map(|settled| settled.gone))
        }
        // A gateway's word for a daemon that it lost: it may have done it.
        Ok(answer) => (
            answer.repeated || matches!(answer.status.as_u16(), 502 | 504),
            Err(refused(answer.status, &answer.headers, &answer.body)),
        ),
        Err(fault) => (fault.sent, Err(fault.error)),
    }
}

/// Gives everything held back, when the broker closes without its having been settled.
pub(super) async fn release_all(lane: &Lane, within: Duration) {
    let mut leases = lane.leases();
    // Each goes to the front: the last one first, they are in order again.
    leases.reverse();
    for leases in leases.chunks(EXTENSIONS) {
        let body = Body { release: leases.iter().map(|lease| &**lease).collect(), ..Body::default() };
        if post(lane, &body, within).await.1.is_err() {
            return;
        }
    }
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Body<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ack: Vec<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    retry: Vec<Retry<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reject: Vec<Reject<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    release: Vec<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    extend: Vec<Extend<'a>>,
}

#[derive(Debug, Serialize)]
struct Retry<'a> {
    lease: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Reject<'a> {
    lease: &'a str,
    reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Extend<'a> {
    lease: &'a str,
    r#for: &'a str,
}

impl<'a> Body<'a> {
    pub(super) fn of(unsettled: &'a [Unsettled]) -> Self {
        let mut body = Self::default();
        for Unsettled { lease, settlement, .. } in unsettled {
            match settlement {
                Settlement::Release => body.release.push(lease),
                Settlement::Ack => body.ack.push(lease),
                Settlement::Retry { after, failure } => body.retry.push(Retry {
                    lease,
                    delay: after.map(|after| format_duration(at_least(after))),
                    reason: failure.as_ref().map(Failure::reason),
                    status: failure.as_ref().and_then(Failure::status),
                }),
                Settlement::Reject(failure) => {
                    body.reject.push(Reject { lease, reason: failure.reason(), status: failure.status() });
                }
            }
        }
        body
    }
}

/// Rounded up to what the wire can say: a floor stays one.
fn at_least(after: Duration) -> Duration {
    let rest = after.subsec_nanos() % 1_000_000;
    if rest == 0 { after } else { after.saturating_add(Duration::from_nanos(u64::from(1_000_000 - rest))) }
}
