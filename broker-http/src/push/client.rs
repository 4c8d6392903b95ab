//! What all pushes of a daemon share: which addresses may be dialled, how TLS is spoken, and how
//! many connections there are.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ClientConfig;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use super::{Guard, PushTls};
use crate::SubscriptionSpec;
use crate::outgoing::Outgoing;
use crate::traces::Traces;

/// How the addresses of a name are found.
///
/// ```
/// use std::{io, net::SocketAddr};
/// use broker_http::push::{Guard, PushClient};
///
/// let fixed = |_: &str, port: u16| Ok::<_, io::Error>(vec![SocketAddr::from(([93, 184, 215, 14], port))]);
/// let client = PushClient::new(Guard::new()).with_resolver(fixed);
/// # let _ = client;
/// ```
pub trait Resolve: Send + Sync {
    /// The addresses of `host`; called on a thread where it may block.
    ///
    /// # Errors
    ///
    /// Why there are none.
    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

impl<F: Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync> Resolve for F {
    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        self(host, port)
    }
}

/// As this machine looks names up.
struct OfThisMachine;

impl Resolve for OfThisMachine {
    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        (host, port).to_socket_addrs().map(Iterator::collect)
    }
}

/// Shared by all pushes: which addresses may be dialled, how TLS is spoken, and how many connections
/// there are at most. Cloning shares it.
///
/// Making one connects to nothing; the machine's root certificates are read when the first `https`
/// endpoint is dialled.
///
/// ```
/// use std::time::Duration;
/// use broker_http::push::{Guard, PushClient};
///
/// let client = PushClient::new(Guard::new().with_development(true))
///     .with_max_connections(1_000)
///     .with_idle_timeout(Duration::from_secs(5));
/// # let _ = client;
/// ```
#[derive(Clone)]
pub struct PushClient {
    /// What all pushes are held to, which may change.
    guard: Arc<ArcSwap<Guard>>,
    trust: Arc<ArcSwap<Trust>>,
    /// Counts its changes: a connection made before is not used again.
    changes: Arc<AtomicU64>,
    /// What a subscription has of its own.
    own: Option<Arc<Own>>,
    connections: Arc<Semaphore>,
    max_connections: usize,
    /// Pushes that wait for a connection.
    waiting: Arc<AtomicUsize>,
    lookups: Arc<Semaphore>,
    resolver: Arc<dyn Resolve>,
    idle_timeout: Duration,
    traces: Traces,
    /// Requests encoded and not sent yet.
    outgoing: Outgoing,
}

/// Connections at most, unless it is said otherwise.
const MAX_CONNECTIONS: usize = 4_096;
/// Names looked up at a time. A lookup holds a thread, and a name server that hangs must not hold
/// all of them.
const MAX_LOOKUPS: usize = 64;
/// Bytes of requests that are encoded at a time, of all pushes together.
const MAX_ENCODED: u64 = 256 << 20;
/// How long a connection is kept without a request, unless it is said otherwise.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

impl PushClient {
    /// Dials what `guard` lets pass, with the root certificates of this machine; half as many
    /// connections as this process may have files open and 4,096 at most, kept for 15 seconds
    /// without a request.
    pub fn new(guard: Guard) -> Self {
        let max_connections = open_files().map_or(MAX_CONNECTIONS, |files| (files / 2).clamp(1, MAX_CONNECTIONS));
        Self {
            guard: Arc::new(ArcSwap::from_pointee(guard)),
            trust: Arc::new(ArcSwap::from_pointee(Trust::default())),
            changes: Arc::default(),
            own: None,
            connections: Arc::new(Semaphore::new(max_connections)),
            max_connections,
            waiting: Arc::default(),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            resolver: Arc::new(OfThisMachine),
            idle_timeout: IDLE_TIMEOUT,
            traces: Traces::default(),
            outgoing: Outgoing::new(MAX_ENCODED),
        }
    }

    /// Speaks TLS like this instead: other roots, a client certificate. HTTP/2 and HTTP/1.1 are
    /// offered unless the configuration says what to offer.
    #[must_use]
    pub fn with_tls(mut self, mut config: ClientConfig) -> Self {
        if config.alpn_protocols.is_empty() {
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        }
        let config = OnceCell::new_with(Some(Arc::new(config)));
        self.trust = Arc::new(ArcSwap::from_pointee(Trust { tls: PushTls::default(), config }));
        self
    }

    /// Trusts and shows this instead; what the system has is read when it is first needed.
    ///
    /// # Errors
    ///
    /// As [`PushTls::check`].
    pub fn with_trust(mut self, trust: PushTls) -> broker_core::Result<Self> {
        trust.check()?;
        self.trust = Arc::new(ArcSwap::from_pointee(Trust::of(trust)));
        Ok(self)
    }

    /// From now on dials what this guard lets pass, and trusts and shows this, which was checked: of
    /// every clone, from its next connection on.
    pub(crate) fn set(&self, guard: Guard, trust: PushTls) {
        self.guard.store(Arc::new(guard));
        if self.trust.load().tls != trust {
            self.trust.store(Arc::new(Trust::of(trust)));
        }
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// How often that was changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// As a subscription wants it: with its own trust, if it has one.
    pub(crate) fn for_spec(&self, spec: &SubscriptionSpec) -> broker_core::Result<Self> {
        let mut client = self.clone();
        if let Some(tls) = &spec.tls {
            let own = Own { tls: tls.clone(), made: Mutex::default() };
            own.over(&self.trust.load_full()).tls.check()?;
            client.own = Some(Arc::new(own));
        }
        Ok(client)
    }

    /// Sets how many connections there are at most, of all pushes together (at least one). At the
    /// limit a push waits for one before its time begins to run.
    #[must_use]
    pub fn with_max_connections(mut self, max: usize) -> Self {
        self.max_connections = max.clamp(1, Semaphore::MAX_PERMITS);
        self.connections = Arc::new(Semaphore::new(self.max_connections));
        self
    }

    /// Sets how long a connection is kept without a request.
    #[must_use]
    pub fn with_idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Looks names up like this instead of as the machine does. A name is looked up once for each
    /// connection: the addresses that were checked are those that are dialled.
    #[must_use]
    pub fn with_resolver(mut self, resolver: impl Resolve + 'static) -> Self {
        self.resolver = Arc::new(resolver);
        self
    }

    /// Tells of every push here: a span for the messages, and one for the request.
    ///
    /// ```
    /// use broker_http::Traces;
    /// use broker_http::push::{Guard, PushClient};
    ///
    /// let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
    /// let client = PushClient::new(Guard::new()).with_traces(Traces::new(provider));
    /// # let _ = client;
    /// ```
    #[cfg(feature = "otlp")]
    #[must_use]
    pub fn with_traces(mut self, traces: Traces) -> Self {
        self.traces = traces;
        self
    }

    /// Counts what it encodes with what a server does.
    pub(crate) fn with_outgoing(mut self, outgoing: Outgoing) -> Self {
        self.outgoing = outgoing;
        self
    }

    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    pub(crate) fn traces(&self) -> &Traces {
        &self.traces
    }

    pub(crate) fn resolver(&self) -> &Arc<dyn Resolve> {
        &self.resolver
    }

    pub(crate) fn guard(&self) -> Arc<Guard> {
        self.guard.load_full()
    }

    /// How long to keep a connection that has nothing to do: not at all where they run short.
    pub(crate) fn idle_timeout(&self) -> Duration {
        let short = self.connections.available_permits() <= self.max_connections / 8;
        if short { Duration::ZERO } else { self.idle_timeout }
    }

    /// Whether somebody waits for a connection: who has one gives it up after its request, so that
    /// a busy endpoint does not keep the others out.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The right to one connection, in the order of asking.
    pub(crate) async fn place(&self) -> Place {
        if let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() {
            return Place(permit);
        }
        let _waiting = Waiting::new(&self.waiting);
        match Arc::clone(&self.connections).acquire_owned().await {
            Ok(permit) => Place(permit),
            // It is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// The right to look one name up.
    pub(crate) async fn lookup(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.lookups).acquire_owned().await.ok()
    }

    /// How TLS is spoken; read from the machine the first time.
    pub(crate) async fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        let trust = self.trust.load_full();
        match &self.own {
            None => trust.config().await,
            Some(own) => own.over(&trust).config().await,
        }
    }
}

/// The right to one connection, as long as it is kept.
#[derive(Debug)]
pub(crate) struct Place(
    #[expect(dead_code, reason = "it is held, and given back when it is dropped")] OwnedSemaphorePermit,
);

/// Whom pushes trust and what they show, and TLS made of it when it is first spoken.
#[derive(Default)]
struct Trust {
    tls: PushTls,
    config: OnceCell<Arc<ClientConfig>>,
}

impl Trust {
    fn of(tls: PushTls) -> Self {
        Self { tls, config: OnceCell::new() }
    }

    async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        let load = || async {
            let tls = self.tls.clone();
            match tokio::task::spawn_blocking(move || tls.client_config()).await {
                Ok(config) => config.map(Arc::new).map_err(|error| error.message().to_owned()),
                Err(_) => Err("the root certificates could not be read".to_owned()),
            }
        };
        self.config.get_or_try_init(load).await.map(Arc::clone)
    }
}

/// What a subscription says itself of TLS; what it leaves out is the daemon's.
struct Own {
    tls: PushTls,
    /// The daemon's, and the two together.
    made: Mutex<Option<(Arc<Trust>, Arc<Trust>)>>,
}

impl Own {
    fn over(&self, daemon: &Arc<Trust>) -> Arc<Trust> {
        let mut made = self.made.lock();
        if let Some((of, both)) = &*made
            && Arc::ptr_eq(of, daemon)
        {
            return Arc::clone(both);
        }
        let own = self.tls.clone();
        let ca = own.ca.or_else(|| daemon.tls.ca.clone());
        let both = match own.certificate {
            Some(_) => PushTls { ca, ..self.tls.clone() },
            None => PushTls { ca, ..daemon.tls.clone() },
        };
        let both = Arc::new(Trust::of(both));
        *made = Some((Arc::clone(daemon), Arc::clone(&both)));
        both
    }
}

/// Counts somebody who waits, for as long as they do.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for PushClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushClient")
            .field("guard", &*self.guard.load())
            .field("max_connections", &self.max_connections)
            .field("idle_timeout", &self.idle_timeout)
            .finish_non_exhaustive()
    }
}

/// How many files this process may have open, where the system tells (Linux).
fn open_files() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}
