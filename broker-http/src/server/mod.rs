//! The server: the HTTP interface and the push engine over any broker.

// What a request meets first.
mod accept;
mod acceptable;
mod access;
mod activity;
pub(crate) mod body;
mod charge;
mod chatter;
mod codings;
mod frames;
mod guarded;
mod heads;
mod inflate;
mod limits;
mod listen;
mod member;
mod memory;
mod metered;
mod origin;
mod owed;
mod places;
pub(crate) mod problem;
mod query;
mod reader;
mod rest;
mod tls;
mod told;
mod topics;
mod upgrade;
mod wire;
mod zstd;

// Publishing.
mod idempotency;
mod item;
mod lines;
pub(crate) mod publish;
mod publishers;

// Subscribing.
mod asked;
mod consent;
mod groups;
mod leases;
pub(crate) mod pull;
mod redrives;
mod registry;
mod socket;
mod state;
mod stream;
mod subscriptions;

// Watching.
mod metrics;
mod ops;
mod ready;

mod options;
mod routes;

#[cfg(fuzzing)]
pub(crate) mod fuzzing;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use axum::Router;
use broker_core::{Broker, DrainReport, GroupName, Result};
use http::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use access::{Access, Action, Allow, CertificateName, Identity, Token, TokenHash};
pub use limits::Limits;
pub use options::ServerOptions;
pub use tls::{Tls, TlsFiles};
pub use topics::{TopicRule, Topics};

use crate::push::{Push, PushClient, PushObserver, PushOptions};
use crate::traces::Traces;
use crate::{Endpoint, SubscriptionSpec};
use access::Gate;
use asked::Asked;
use heads::Heads;
use idempotency::Answers;
use leases::Leases;
use listen::Connections;
use memory::Ledger;
use metered::Metered;
use metrics::Metrics;
use problem::{Answer, Problem};
use publishers::Publishers;
use reader::Readers;
use ready::Readiness;
use redrives::Redrives;
use registry::Registry;
use state::StateFile;
use told::Told;

/// The HTTP interface over a broker: the routes and the push engine, in a process of its own or
/// inside a service.
///
/// Cloning is cheap, and every clone is the same server. Making one does no I/O. *Dropping* the last
/// clone ends its pushes and cuts its connections, as [`drain`](Self::drain) with no patience would;
/// the broker goes on if somebody else holds it.
///
/// ```
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{sync::Arc, time::Duration};
/// use broker_core::{Broker, MemoryBroker};
/// use broker_http::{Server, ServerOptions};
///
/// let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
/// let server = Server::new(broker, ServerOptions::new().with_development(true));
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let serving = tokio::spawn({ let server = server.clone(); async move { server.serve(listener).await } });
///
/// assert!(server.drain(Duration::from_secs(20)).await.complete);
/// serving.await??;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What every request and every connection has in common.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The broker, its deliveries charged.
    pub(crate) broker: Arc<dyn Broker>,
    /// The broker as it was given.
    given: Arc<dyn Broker>,
    options: ArcSwap<ServerOptions>,
    limits: ArcSwap<Limits>,
    pub(crate) gate: Gate,
    pub(crate) ledger: Ledger,
    readers: Readers,
    heads: Heads,
    pub(crate) publishers: Publishers,
    pub(crate) idempotency: Answers,
    pub(crate) registry: Registry,
    pub(crate) redrives: Redrives,
    pub(crate) asked: Asked,
    readiness: Readiness,
    told: Told,
    /// Standing subscriptions whose endpoints are asked at a time.
    pub(crate) asking: Semaphore,
    pub(crate) leases: Arc<Leases>,
    pub(crate) streams: Arc<AtomicUsize>,
    pub(crate) connections: Connections,
    pub(crate) metrics: Arc<Metrics>,
    /// No more intake: the drain has begun.
    pub(crate) draining: CancellationToken,
    pub(crate) traces: Traces,
    push_client: PushClient,
    observer: Arc<Observer>,
    state: Option<StateFile>,
    restored: AtomicBool,
    /// Whether the declared subscriptions were made.
    declared: AtomicBool,
}

impl Server {
    /// A server over `broker`.
    pub fn new(broker: Arc<dyn Broker>, options: ServerOptions) -> Self {
        let metrics = Arc::<Metrics>::default();
        let limits = options.limits().within();
        let ledger = Ledger::new(limits.memory_bytes, limits.topic_memory_bytes);
        let given = broker;
        ledger.retained_by(&given);
        let broker = Metered::over(Arc::clone(&given), &ledger);
        let shared = Arc::new_cyclic(|shared| Shared {
            gate: Gate::new(options.access()),
            publishers: Publishers::new(Arc::clone(&broker), limits.topics, ledger.clone(), options.topics().clone()),
            push_client: options.push_client().with_outgoing(ledger.pushes().clone()),
            ledger,
            readers: Readers::default(),
            heads: Heads::default(),
            idempotency: Answers::new(limits.idempotency_bytes),
            registry: Registry::default(),
            redrives: Redrives::default(),
            asked: Asked::default(),
            readiness: Readiness::default(),
            told: Told::default(),
            asking: Semaphore::new(consent::MAX_ASKING),
            leases: Leases::new(limits.leases),
            streams: Arc::default(),
            connections: Connections::new(),
            observer: Arc::new(Observer { metrics: Arc::clone(&metrics), shared: Weak::clone(shared) }),
            metrics,
            draining: CancellationToken::new(),
            traces: options.traces().clone(),
            state: options.state().map(|path| StateFile::new(path.to_owned())),
            restored: AtomicBool::new(false),
            declared: AtomicBool::new(false),
            broker,
            given,
            limits: ArcSwap::from_pointee(limits),
            options: ArcSwap::from_pointee(options),
        });
        Self { shared }
    }

    /// The broker behind it.
    #[expect(clippy::misnamed_getters, reason = "whoever gave a broker gets it back, not the one that charges")]
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.shared.given
    }

    /// The routes, to be nested into a router of one's own. Subscriptions of a state file are not
    /// there before [`restore`](Self::restore).
    pub fn router(&self) -> Router {
        let tend = axum::middleware::from_fn_with_state(Arc::clone(&self.shared), rest::elsewhere);
        routes::router(&self.shared).layer(tend)
    }

    /// Brings the subscriptions of the state file back, if there is one; once is enough, and
    /// [`serve`](Self::serve) does it.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) if the file is broken, and what the broker says.
    pub async fn restore(&self) -> Result<()> {
        if let Some(state) = &self.shared.state
            && !self.shared.restored.swap(true, std::sync::atomic::Ordering::AcqRel)
        {
            let options = self.shared.options.load_full();
            let declared = options.subscriptions();
            let mut kept = state.load().await?;
            // What was declared and is no more is gone; what is declared otherwise is made below.
            kept.retain_mut(|kept| match declared.get(&kept.name) {
                None => !kept.declared,
                Some(spec) if spec.filter == kept.spec.filter && spec.group == kept.spec.group => {
                    kept.consent = kept.consent.take().filter(|_| spec.endpoint == kept.spec.endpoint);
                    // It is the operator's now, whoever made it.
                    kept.owner = None;
                    kept.spec = SubscriptionSpec { start: kept.spec.start.clone(), ..spec.clone() };
                    true
                }
                Some(_) => false,
            });
            self.shared.registry.restore(&self.shared, kept).await?;
        }
        if !self.shared.declared.swap(true, std::sync::atomic::Ordering::AcqRel) {
            self.set_subscriptions(self.shared.options.load_full().subscriptions()).await?;
        }
        Ok(())
    }

    /// Replaces the declared subscriptions: one that is new is made, one that changed is replaced,
    /// one that is left out goes and leaves its backlog. Those made over the interface stay.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming each that could not be brought to what is
    /// declared, and why; the others are.
    pub async fn set_subscriptions(&self, subscriptions: &BTreeMap<GroupName, SubscriptionSpec>) -> Result<()> {
        let failed = self.shared.registry.declare(&self.shared, subscriptions).await;
        self.shared.save().await;
        if failed.is_empty() {
            return Ok(());
        }
        let failed: Vec<_> =
            failed.iter().map(|(name, problem)| format!("subscription {name}: {}", problem.detail())).collect();
        Err(broker_core::Error::invalid(failed.join("; ")))
    }

    /// Checks that the subscriptions which these options declare could be set, now and at the next start: that none would
    /// change the filter, the group or the start of one that stands, that those of one group want the same of it, and that
    /// they are no more than the options' limit. The broker is not asked, so that this is good before it is connected, too.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the first that could not.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use std::collections::BTreeMap;
    /// use std::sync::Arc;
    /// use broker_core::{GroupName, MemoryBroker};
    /// use broker_http::{Server, ServerOptions, SubscriptionSpec};
    ///
    /// let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new());
    /// let declared = |filter: &str| -> broker_core::Result<_> {
    ///     Ok(BTreeMap::from([(GroupName::new("billing")?, SubscriptionSpec::new(filter.parse()?))]))
    /// };
    /// let options = |filter: &str| -> broker_core::Result<_> {
    ///     Ok(ServerOptions::new().with_subscriptions(declared(filter)?))
    /// };
    /// server.set_subscriptions(&declared("orders.>")?).await?;
    /// assert!(server.check_options(&options("orders.>")?).is_ok());
    /// assert!(server.check_options(&options("invoices.>")?).is_err());
    /// # Ok(()) }
    /// ```
    pub fn check_options(&self, options: &ServerOptions) -> Result<()> {
        let Shared { registry, given, .. } = &*self.shared;
        registry
            .check_declared(&**given, options.subscriptions(), options.limits().subscriptions)
            .map_err(|problem| broker_core::Error::invalid(problem.detail()))
    }

    /// Replaces what is declared of topics: the next publish is held to it.
    pub fn set_topics(&self, topics: Topics) {
        self.shared.publishers.set_topics(topics);
    }

    /// Serves connections until the server is drained: HTTP/1.1, and HTTP/2 with prior knowledge.
    /// Several listeners may be served at a time.
    ///
    /// # Errors
    ///
    /// That the state file cannot be restored.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        self.restore().await.map_err(io::Error::other)?;
        self.shared.connections.accept(&self.shared, listener, routes::router(&self.shared), None).await;
        Ok(())
    }

    /// As [`serve`](Self::serve), over TLS: HTTP/2 and HTTP/1.1 are offered, and a certificate that
    /// changes on disk is taken up within seconds, without losing a connection.
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    pub async fn serve_tls(&self, listener: TcpListener, tls: Tls) -> io::Result<()> {
        self.restore().await.map_err(io::Error::other)?;
        let watching = tls.watch();
        self.shared.connections.accept(&self.shared, listener, routes::router(&self.shared), Some(tls)).await;
        watching.abort();
        Ok(())
    }

    /// As [`serve`](Self::serve), on a Unix socket.
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    #[cfg(unix)]
    pub async fn serve_unix(&self, listener: tokio::net::UnixListener) -> io::Result<()> {
        self.restore().await.map_err(io::Error::other)?;
        self.shared.connections.accept(&self.shared, listener, routes::router(&self.shared), None).await;
        Ok(())
    }

    /// Replaces the identities and their rules: the next request is held to the new ones, and so are streams
    /// (of events, lines or a WebSocket) and pulls that wait: they end where their token or certificate is no
    /// longer their identity's, or the rules no longer allow what they do. Other requests under way finish.
    /// Pushes of an identity that may no longer have them are held, and lose nothing of their backlog, until it may
    /// again or another takes them over. Whoever stays, with the same rate, has left of it what was left.
    pub fn set_access(&self, access: Access) {
        self.shared.gate.set(&access);
        self.shared.registry.reauthorize(&self.shared);
    }

    /// Takes up what can change while a server is at work: limits, identities, topics, development mode,
    /// allowed origins, the name for the web-hook handshake, and of pushes the guard and TLS, which hold from
    /// the next connection on; none that was made before is used again. Under a new name for the handshake
    /// every endpoint is asked anew, and pushes wait for its consent. The state file and traces stay as they
    /// were; [`set_subscriptions`](Self::set_subscriptions) is apart, since it takes time.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use broker_core::MemoryBroker;
    /// use broker_http::{Limits, Server, ServerOptions};
    ///
    /// let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new());
    /// let mut limits = Limits::default();
    /// limits.connections = 100;
    /// server.set_options(ServerOptions::new().with_limits(limits));
    /// ```
    pub fn set_options(&self, options: ServerOptions) {
        let shared = &self.shared;
        let limits = options.limits().within();
        shared.ledger.set(limits.memory_bytes, limits.topic_memory_bytes);
        shared.publishers.set_max(limits.topics);
        shared.idempotency.set_max(limits.idempotency_bytes);
        shared.leases.set_max(limits.leases);
        shared.limits.store(Arc::new(limits));
        shared.gate.set(&options.access());
        shared.registry.reauthorize(shared);
        shared.publishers.set_topics(options.topics().clone());
        options.instruct(&shared.push_client);
        let before = shared.options.swap(Arc::new(options));
        let now = shared.options.load();
        if (before.origin(), before.webhook_callback()) != (now.origin(), now.webhook_callback()) {
            shared.registry.reconsider(shared);
        }
    }

    /// Shuts down: publishing and subscribing are refused from now on; until `deadline` what is in
    /// flight is finished, leases can be settled, and the broker is closed, as
    /// [`Broker::close`] says; then connections end after the request they are at.
    pub async fn drain(&self, deadline: Duration) -> DrainReport {
        let end = Instant::now() + deadline;
        self.shared.draining.cancel();
        self.shared.registry.prepare_close();
        let report = self.shared.broker.close(deadline).await;
        // Answers under way are short by now.
        let patience = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        self.shared.connections.close(patience.min(Duration::from_secs(5))).await;
        report
    }
}

impl Shared {
    /// To be held for a request at most.
    pub(crate) fn limits(&self) -> Guard<Arc<Limits>> {
        self.limits.load()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Refuses an endpoint that could never be dialled, where that is known ahead; a name is looked
    /// up when it is dialled.
    pub(crate) fn check_endpoint(&self, endpoint: &Endpoint) -> Answer<()> {
        self.push_client.guard().check_endpoint(endpoint).map_err(|error| {
            Problem::new(StatusCode::FORBIDDEN, error.kind(), format!("endpoint: {}", error.message()))
        })
    }

    /// Starts pushing; the group stands already.
    pub(crate) fn start_push(&self, options: PushOptions) -> Result<Push> {
        let observer = Arc::clone(&self.observer) as Arc<dyn PushObserver>;
        Push::start(Arc::clone(&self.broker), options.with_observer(observer), &self.push_client)
    }

    /// Writes the state file, if there is one.
    pub(crate) async fn try_save(&self) -> Answer<()> {
        let Some(state) = &self.state else { return Ok(()) };
        state.save(self.registry.change(), || self.registry.snapshot()).await.map_err(|error| {
            // Where the file is, is nobody's business but the operator's.
            tracing::error!(%error, "a change of the subscriptions was not kept");
            let detail = "the change is made, and could not be kept over a restart: the state file cannot be written; \
                the same request writes it again";
            Problem::from(broker_core::Error::unavailable(detail))
        })
    }

    /// As [`try_save`](Self::try_save), where nobody waits for the outcome.
    pub(crate) async fn save(&self) {
        // What fails is logged.
        let _ = self.try_save().await;
    }
}

/// Hears of every push.
#[derive(Debug)]
struct Observer {
    metrics: Arc<Metrics>,
    shared: Weak<Shared>,
}

impl PushObserver for Observer {
    fn pushed(&self, acked: bool, took: Duration) {
        self.metrics.pushed(acked, took);
    }

    fn delivered(&self, after: Duration) {
        self.metrics.delivered(after);
    }

    /// A restart must not push to an endpoint that said it is gone.
    fn disabled(&self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.registry.changed();
            tokio::spawn(async move { shared.save().await });
        }
    }
}
