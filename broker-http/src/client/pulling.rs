//! The task that pulls: it asks the daemon when somebody waits for deliveries, and only then, so
//! that who does not receive keeps nothing from the others of its group.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Failure, Gap, Result, Settlement};
use http::Method;
use tokio::runtime::Handle;

use super::backoff::Backoff;
use super::error::refused;
use super::groups;
use super::http::Call;
use super::lane::{Handed, Item, Lane, State, Unsettled};
use super::shared::runtime;
use super::wire::{self, Leased, Pulled};
use crate::event::{Options, json};

/// Deliveries of a pull at most, for who asks for more than one; for who takes them one by one the
/// number grows from 1 as they are taken.
const MAX_PULL: usize = 1_000;
const MAX_AHEAD: usize = 128;

/// Settlements that wait to be told to the daemon before nothing more is pulled: one that takes none would have us
/// remember them without end.
const MAX_UNTOLD: usize = 10_000;

/// Bytes of messages a pull should bring, and of its answer at most.
const PULL_BYTES: usize = 16 << 20;
const ANSWER_BYTES: usize = 128 << 20;

/// Whether the task is to be [started](start), and where: unless it is at work, or nobody receives.
///
/// # Errors
///
/// That there is no runtime.
pub(super) fn is_wanted(lane: &Lane, state: &mut State) -> Result<Option<Handle>> {
    if state.pulling || lane.left.is_cancelled() {
        return Ok(None);
    }
    let runtime = runtime()?;
    state.pulling = true;
    Ok(Some(runtime))
}

/// Starts the task, if it [is wanted](is_wanted).
pub(super) fn start(lane: &Arc<Lane>, wanted: Option<Handle>) {
    if let Some(runtime) = wanted {
        let mut puller = Puller::new(Arc::clone(lane));
        lane.shared.spawn(&runtime, async move { puller.run().await });
    }
}

struct Puller {
    lane: Arc<Lane>,
    /// How many to pull for who takes one at a time.
    ahead: usize,
    /// Bytes of a delivery, by the last pull.
    size: usize,
    /// How often the daemon may have been away by the time the subscription was last seen standing.
    losses: u64,
    path: String,
}

impl Drop for Puller {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.lane.state.lock();
            state.pulling = false;
            state.waker.take()
        };
        // Cut short by the end of its runtime, it is started again by who still waits.
        waker.into_iter().for_each(Waker::wake);
        self.lane.rested.notify_waiters();
    }
}

impl Puller {
    fn new(lane: Arc<Lane>) -> Self {
        let losses = lane.losses;
        let path = format!("/subscriptions/{}/pull", lane.standing.name);
        Self { lane, ahead: 1, size: 0, losses, path }
    }

    async fn run(&mut self) {
        let mut backoff = Backoff::connecting();
        while let Some(max) = self.wanted().await {
            let error = match self.pull(max).await {
                Ok(()) => {
                    backoff.reset();
                    continue;
                }
                Err(_) if self.lane.left.is_cancelled() => return,
                Err(error) => error,
            };
            let error = match error.kind() {
                ErrorKind::NotFound => match self.stand_again(error).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                _ => error,
            };
            if !error.is_retryable() && error.kind() != ErrorKind::Backend {
                tracing::warn!(subscription = %self.lane.standing.name, %error, "a subscription has ended");
                return self.lane.end(Err(error));
            }
            let wait = backoff.next().max(error.retry_after().unwrap_or_default().min(Duration::from_secs(60)));
            tracing::debug!(subscription = %self.lane.standing.name, %error, ?wait, "pulling failed, trying again");
            tokio::select! {
                () = self.lane.left.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Waits until somebody wants deliveries and may have them; how many. `None` if nobody ever
    /// will.
    async fn wanted(&self) -> Option<usize> {
        let lane = &self.lane;
        loop {
            if lane.left.is_cancelled() {
                return None;
            }
            {
                let state = lane.state.lock();
                let room = match state.unsettled.len() {
                    0..MAX_UNTOLD => lane.max_in_flight.saturating_sub(state.held),
                    _ => 0,
                };
                if state.wanted > 0 && room > 0 {
                    let fit = PULL_BYTES.checked_div(self.size).unwrap_or(MAX_PULL).max(1);
                    return Some(state.wanted.max(self.ahead).min(room).min(fit).min(MAX_PULL));
                }
            }
            tokio::select! {
                () = lane.wanted.notified() => {}
                () = lane.left.cancelled() => return None,
            }
        }
    }

    async fn pull(&mut self, max: usize) -> Result<()> {
        let lane = Arc::clone(&self.lane);
        let options = lane.shared.http.options();
        let path = format!("{}?max={max}&wait={}", self.path, broker_core::format_duration(options.wait));
        let mut call = Call::new(Method::POST, &path, options.wait + options.timeout);
        call.limit = ANSWER_BYTES;
        call.finish = Some(&lane.left);
        call.waits = true;
        let answer = lane.shared.call(call).await?;
        if !answer.status.is_success() {
            return Err(refused(answer.status, &answer.headers, &answer.body));
        }
        self.losses = lane.shared.http.losses();
        let Pulled { deliveries, lost } = wire::read("pull", &answer.body)?;
        self.size = answer.body.len().checked_div(deliveries.len()).unwrap_or(self.size);
        self.ahead = if deliveries.len() >= max { (self.ahead * 2).min(MAX_AHEAD) } else { deliveries.len().max(1) };
        self.hand_out(deliveries, lost);
        Ok(())
    }

    fn hand_out(&self, deliveries: Vec<Leased<'_>>, gap: Option<Gap>) {
        let lane = &self.lane;
        let mut items = Vec::with_capacity(deliveries.len());
        let mut refused = Vec::new();
        for Leased { lease, attempt, event } in deliveries {
            let decoded = json::decode(event.get().as_bytes(), &Options::default(), None)
                .and_then(|decoded| decoded.topic.map(|topic| (decoded.message, topic)).ok_or_else(no_topic));
            match decoded {
                Ok((message, topic)) => items.push(Item::new(message, topic, attempt, lease)),
                Err(error) => {
                    // It would come again and again: the dead letter keeps it as it is.
                    tracing::warn!(subscription = %lane.standing.name, %error, "a message that cannot be read is rejected");
                    let settlement = Settlement::Reject(Failure::new(format!("it cannot be read: {error}")));
                    refused.push(Unsettled { lease, settlement, ticket: None });
                }
            }
        }
        if !refused.is_empty() {
            lane.tell(refused);
        }
        if items.is_empty() {
            lane.state.lock().note_gap(gap);
            return;
        }
        lane.deliver(Arc::new(Handed { lane: Arc::clone(lane), items: items.into() }), gap);
        // Somebody must extend what is held, and give back what nobody takes.
        if lane.left.is_cancelled() {
            lane.release_buffer();
        } else {
            lane.tell([]);
        }
    }

    /// The daemon does not know the subscription. If it was away it may have forgotten, and we make
    /// it again, with a gap; otherwise somebody deleted it.
    async fn stand_again(&mut self, gone: Error) -> Result<()> {
        let lane = &self.lane;
        let losses = lane.shared.http.losses();
        if losses == self.losses {
            return Err(gone);
        }
        groups::stand(&lane.shared, &lane.standing).await?;
        self.losses = losses;
        tracing::warn!(subscription = %lane.standing.name, "the daemon had forgotten a subscription; it was made again");
        lane.state.lock().note_gap(Some(Gap::Unknown));
        Ok(())
    }
}

fn no_topic() -> Error {
    Error::codec("the event has no brokertopic")
}
