//! The handle on a running push.

use std::fmt;
use std::iter::once;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, Error, Group, GroupName, Message, Result, Timestamp, Topic};
use serde::Serialize;

use super::connection::Route;
use super::core::{Core, Holds};
use super::encode::{Encoder, test_message};
use super::engine::{Engine, Parts};
use super::target::Target;
use super::verdict::{Decision, judge};
use super::{Attempt, PushClient, lane};
use crate::SubscriptionSpec;
use crate::event::Envelope;

/// What a push is started with.
///
/// ```
/// use broker_http::{SubscriptionSpec, push::PushOptions};
///
/// let spec = SubscriptionSpec::from_json(br#"{"filter": "orders.>", "endpoint": "http://localhost:8080/"}"#)?;
/// let options = PushOptions::new("billing".parse()?, spec).with_paused(true);
/// assert_eq!(options.group.to_string(), "billing@orders.>");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct PushOptions {
    /// What the subscription is called.
    pub name: GroupName,
    /// The group it is a member of; by default what the settings say.
    pub group: Group,
    /// Its settings.
    pub spec: Arc<SubscriptionSpec>,
    /// Whether it waits for [`Push::resume`].
    pub paused: bool,
    /// Who is told of pushes.
    pub observer: Option<Arc<dyn PushObserver>>,
    /// Whether the endpoint said that it is gone, before.
    pub(crate) disabled: bool,
    /// Whether the endpoint has yet to consent.
    pub(crate) unconsented: bool,
    /// Whether whoever had it pushed may no longer.
    pub(crate) unauthorized: bool,
}

impl PushOptions {
    /// A push of the subscription `name`, at work from the start.
    pub fn new(name: GroupName, spec: impl Into<Arc<SubscriptionSpec>>) -> Self {
        let spec = spec.into();
        let group = Group::new(spec.group.clone().unwrap_or_else(|| name.clone()), spec.filter.clone());
        let (paused, disabled, unconsented, unauthorized) = (false, false, false, false);
        Self { name, group, spec, paused, observer: None, disabled, unconsented, unauthorized }
    }

    /// Sets whether it waits for [`Push::resume`].
    #[must_use]
    pub fn with_paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// Sets who is told of pushes.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn PushObserver>) -> Self {
        self.observer = Some(observer);
        self
    }
}

impl fmt::Debug for PushOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushOptions")
            .field("name", &self.name)
            .field("group", &self.group)
            .field("spec", &self.spec)
            .field("paused", &self.paused)
            .finish_non_exhaustive()
    }
}

/// Who is told of pushes: for metrics, and to keep in mind what was disabled. Called in the task
/// that pushed, so that it must not take long.
pub trait PushObserver: Send + Sync {
    /// A request was answered, or failed; a test is none.
    fn pushed(&self, _acked: bool, _took: Duration) {}

    /// A message was acked, so long after it was published (to the millisecond, as messages say it).
    fn delivered(&self, _after: Duration) {}

    /// The endpoint answered 410: nothing is pushed before [`Push::resume`].
    fn disabled(&self) {}
}

/// A running push: the deliveries of one subscription, POSTed to its endpoint.
///
/// It joins its group as the group stands; one that does not stand yet is made as the settings say.
/// To be sure that the group keeps what is published from now on, make it first, with
/// [`Broker::create_group`]. What ends a push for good (a deleted group, a broker that closes) is
/// its [state](Push::status) and last error; everything else is tried again.
///
/// While it is paused or disabled it is no member of its group: its backlog is kept, nothing is
/// counted, and nobody waits for it. Deliveries are taken from the broker only when they can be
/// sent; what is being gathered for a batch is given back untried by a pause.
///
/// *Dropping* it is [`stop`](Self::stop). When the broker closes, a push delivers what can be
/// delivered before the deadline and ends by itself; call [`drain`](Self::drain) first, so that an
/// endpoint that is away is not waited for.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use std::sync::Arc;
/// use broker_core::{Broker, MemoryBroker};
/// use broker_http::SubscriptionSpec;
/// use broker_http::push::{Guard, Push, PushClient, PushOptions, PushState};
///
/// let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
/// let client = PushClient::new(Guard::new().with_development(true));
/// let spec = SubscriptionSpec::from_json(br#"{"filter": "orders.>", "endpoint": "http://localhost:8080/hook"}"#)?;
/// let push = Push::start(broker, PushOptions::new("billing".parse()?, spec), &client)?;
/// push.pause();
/// assert_eq!(push.status().state, PushState::Paused);
/// push.stop();
/// push.stopped().await;
/// # Ok(()) }
/// ```
pub struct Push {
    engine: Arc<Engine>,
    /// What a test is published to, as it were.
    test_topic: Topic,
}

/// What a push is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PushState {
    /// At work.
    Active,
    /// Paused by an operator.
    Paused,
    /// Disabled by the endpoint's 410.
    Disabled,
    /// The endpoint has not said yet that it wants pushes, and the server asks for that.
    Unconsented,
    /// The identity that had it pushed may no longer subscribe so.
    Unauthorized,
    /// The breaker is open: the endpoint only fails, and is probed now and then.
    Open,
    /// Over: stopped, the broker closed or the group was deleted.
    Ended,
}

impl PushState {
    /// The state in the words of the HTTP interface.
    ///
    /// ```
    /// assert_eq!(broker_http::push::PushState::Open.as_str(), "open");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Disabled => "disabled",
            Self::Unconsented => "unconsented",
            Self::Unauthorized => "unauthorized",
            Self::Open => "open",
            Self::Ended => "ended",
        }
    }
}

/// A push's status; see [`Push::status`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PushStatus {
    /// What it is doing.
    pub state: PushState,
    /// Messages in hand.
    pub in_flight: u64,
    /// The last failure of a push, or error of the broker.
    pub last_error: Option<String>,
    /// When the last push that was acked began.
    pub last_success: Option<Timestamp>,
}

impl Push {
    /// Starts pushing. To be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for settings without an endpoint, or with an
    /// endpoint, header or key that cannot be used.
    pub fn start(broker: Arc<dyn Broker>, options: PushOptions, client: &PushClient) -> Result<Self> {
        let PushOptions { name, group, spec, paused, observer, disabled, unconsented, unauthorized } = options;
        let endpoint = spec
            .endpoint
            .as_ref()
            .ok_or_else(|| Error::invalid(format!("subscription {name} has no endpoint to push to; give it one")))?;
        let route = Route::new(client.for_spec(&spec)?, Target::new(endpoint)?.with_h2(spec.http2));
        let encoder = Encoder::new(&spec, client.outgoing())?;
        let test_topic = test_topic(&group)?;
        let holds = Holds { paused, disabled, unconsented, unauthorized };
        let engine = Engine::new(Parts { broker, name, group, spec, encoder, route, observer, holds });
        tokio::spawn(Arc::clone(&engine).drive());
        Ok(Self { engine, test_topic })
    }

    /// Pushes nothing more until [`resume`](Self::resume); what is in flight is finished.
    pub fn pause(&self) {
        self.engine.change(Core::pause);
    }

    /// Pushes again, after a pause or a 410, as to an endpoint never seen before.
    pub fn resume(&self) {
        self.engine.change(Core::resume);
    }

    /// Does what a 410 of the endpoint does: pushes nothing more until [`resume`](Self::resume).
    pub fn disable(&self) {
        self.engine.change(Core::disable);
    }

    /// Whether it is disabled.
    pub fn is_disabled(&self) -> bool {
        self.engine.lock().core.holds().disabled
    }

    /// Pushes nothing more until the endpoint consents, or goes on.
    pub(crate) fn set_unconsented(&self, unconsented: bool) {
        self.engine.change(|core| core.set_unconsented(unconsented));
    }

    pub(crate) fn is_unconsented(&self) -> bool {
        self.engine.lock().core.holds().unconsented
    }

    /// Pushes nothing more until its owner may have it pushed, or goes on.
    pub(crate) fn set_unauthorized(&self, unauthorized: bool) {
        self.engine.change(|core| core.set_unauthorized(unauthorized));
    }

    pub(crate) fn is_unauthorized(&self) -> bool {
        self.engine.lock().core.holds().unauthorized
    }

    /// Remembers why it does not push.
    pub(crate) fn note(&self, why: &str) {
        self.engine.lock().core.note(why);
    }

    /// Ends it: it leaves its group, and what is in flight is finished and settled. See
    /// [`stopped`](Self::stopped).
    pub fn stop(&self) {
        self.engine.change(Core::stop);
        self.engine.stopped.cancel();
    }

    /// The broker is about to close: goes on as long as the endpoint takes messages, and ends at
    /// once where it waits for an operator or for an endpoint that is away.
    pub fn drain(&self) {
        self.engine.change(Core::drain);
    }

    /// Waits until it has ended: everything that was in flight is settled.
    pub async fn stopped(&self) {
        self.engine.over().await;
    }

    /// How it is doing.
    pub fn status(&self) -> PushStatus {
        let state = self.engine.lock();
        let core = &state.core;
        PushStatus {
            state: if core.is_ending() {
                PushState::Ended
            } else if core.holds().unauthorized {
                PushState::Unauthorized
            } else if core.holds().disabled {
                PushState::Disabled
            } else if core.holds().unconsented {
                PushState::Unconsented
            } else if core.holds().paused {
                PushState::Paused
            } else if core.is_open() {
                PushState::Open
            } else {
                PushState::Active
            },
            in_flight: core.in_flight(),
            last_error: core.last_error().map(str::to_owned),
            last_success: core.last_success(),
        }
    }

    /// The last pushes, the newest first.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.engine.lock().core.attempts()
    }

    /// Pushes one message of our own, marked by the header `broker-test: true`, and tells how it
    /// went. Nothing is counted, retried or settled, and it is sent in every state.
    pub async fn test(&self) -> Attempt {
        let engine = &self.engine;
        let message = test_message();
        let encode = |_: &mut _| engine.encoder.encode_test(self.marked(&message));
        let exchange = lane::exchange(engine, &mut lane::Line::new(engine), once(&message), encode).await;
        let verdict = judge(&exchange.outcome, &engine.spec.verdicts, std::time::SystemTime::now);
        Attempt {
            id: message.id().clone(),
            attempt: 1,
            status: verdict.status,
            latency: exchange.latency,
            error: (verdict.decision != Decision::Ack).then(|| verdict.reason.into()),
            time: exchange.time,
        }
    }

    fn marked<'a>(&'a self, message: &'a Message) -> Envelope<'a> {
        Envelope { topic: &self.test_topic, message, subscription: Some(self.engine.name.as_str()), attempt: Some(1) }
    }
}

/// A topic that the subscription could get: `x` for what its filter leaves open.
fn test_topic(group: &Group) -> Result<Topic> {
    let segment = |segment| if matches!(segment, "*" | ">") { "x" } else { segment };
    group.filter.as_str().split('.').map(segment).collect::<Vec<_>>().join(".").parse()
}

impl Drop for Push {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Push {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Push").field("name", &self.engine.name).field("status", &self.status()).finish_non_exhaustive()
    }
}
