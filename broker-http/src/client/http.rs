//! Requests to the daemon: connections kept and bounded, every request with a deadline, every
//! answer with a bound.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker_core::{Error, Result};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::Full;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::sync::{OnceCell, Semaphore};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::config::HttpOptions;
use super::connection::{Answer, Broken, Connection};

/// Idle connections kept.
const MAX_IDLE: usize = 32;
/// How long one is kept: less than the daemon keeps it.
const IDLE: Duration = Duration::from_secs(30);

/// The daemon at the other end.
pub(crate) struct Http {
    options: HttpOptions,
    /// Made with the first connection: root certificates are files.
    tls: OnceCell<TlsConnector>,
    idle: Mutex<Vec<Connection>>,
    permits: Semaphore,
    /// Counts connections lost, and answers of a daemon or a gateway that is not at work: who sees it grow must expect
    /// the daemon to have forgotten.
    losses: AtomicU64,
}

/// A request.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) method: Method,
    /// Path and query, from `/`.
    pub(crate) path: &'a str,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// How long it may take.
    pub(crate) within: Duration,
    /// Bytes of the answer's body at most.
    pub(crate) limit: usize,
    /// Ends the request early, where the daemon has not answered.
    pub(crate) finish: Option<&'a CancellationToken>,
    /// Whether it waits at the daemon; such a request counts towards no limit of connections.
    pub(crate) waits: bool,
}

/// Bytes of an answer that is neither a pull's nor a list's.
const SHORT_ANSWER: usize = 4 << 20;

impl<'a> Call<'a> {
    pub(crate) fn new(method: Method, path: &'a str, within: Duration) -> Self {
        let headers = HeaderMap::new();
        Self { method, path, headers, body: Bytes::new(), within, limit: SHORT_ANSWER, finish: None, waits: false }
    }

    /// Whether it is to end early.
    pub(super) fn is_finished(&self) -> bool {
        self.finish.is_some_and(CancellationToken::is_cancelled)
    }

    pub(super) fn json(mut self, body: impl Into<Bytes>) -> Self {
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.body = body.into();
        self
    }
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Whether the daemon may have seen it: then its outcome is unknown.
    pub(crate) sent: bool,
    pub(crate) error: Error,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        fault.error
    }
}

impl Http {
    pub(crate) fn new(options: HttpOptions) -> Self {
        let permits = Semaphore::new(options.connections.min(Semaphore::MAX_PERMITS));
        Self { options, tls: OnceCell::new(), idle: Mutex::default(), permits, losses: AtomicU64::new(0) }
    }

    pub(super) fn options(&self) -> &HttpOptions {
        &self.options
    }

    /// Sends a request and reads the answer, whatever its status.
    pub(crate) async fn call(&self, call: Call<'_>) -> Result<Answer, Fault> {
        let result = self.call_once(call).await;
        let at_work = result.as_ref().is_ok_and(|answer| !matches!(answer.status.as_u16(), 502..=504));
        if !at_work {
            self.lost();
        }
        result
    }

    /// How often the daemon may have been away so far.
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    fn lost(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }

    async fn call_once(&self, call: Call<'_>) -> Result<Answer, Fault> {
        let within = call.within;
        let mut sent = false;
        let timeout = Error::timeout(format!(
            "{} {}: no answer within {}",
            call.method,
            self.shown(call.path),
            broker_core::format_duration(within)
        ));
        match tokio::time::timeout(within, self.attempt(call, &mut sent)).await {
            Ok(result) => result,
            Err(_) if sent => Err(Fault {
                sent,
                error: Error::timeout(format!("{}; whether it was done is unknown", timeout.message())),
            }),
            Err(_) => Err(Fault { sent, error: timeout }),
        }
    }

    async fn attempt(&self, mut call: Call<'_>, sent: &mut bool) -> Result<Answer, Fault> {
        let _permit = if call.waits { None } else { self.permits.acquire().await.ok() };
        let mut kept = self.take_idle();
        // Whether it may have been seen, on a connection that is lost.
        let mut repeated = false;
        loop {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => self.dial().await.map_err(|error| match repeated {
                    true => Fault { sent: true, error: self.unknown(&call).with_source(error) },
                    false => Fault { sent: false, error },
                })?,
            };
            let was_kept = connection.kept;
            *sent = true;
            // Only a request that may be sent again is kept.
            let headers = if was_kept { call.headers.clone() } else { std::mem::take(&mut call.headers) };
            match connection.exchange(self.request(&call, headers), call.limit, call.finish).await {
                Ok(answer) => {
                    self.give_back(connection);
                    return Ok(Answer { repeated, ..answer });
                }
                // The daemon closed a connection it had kept for long enough, while our request was on its way: most
                // likely it has not begun it. Once, and on a new connection.
                Err(broken @ (Broken::Unsent { .. } | Broken::Lost { answered: false, .. }))
                    if was_kept && !call.is_finished() =>
                {
                    self.lost();
                    self.idle.lock().clear();
                    repeated |= matches!(broken, Broken::Lost { .. });
                    *sent = repeated;
                }
                Err(Broken::Unsent { source }) if !repeated => {
                    let error = Error::unavailable(format!("the connection to {} was lost", self.options.name()));
                    return Err(Fault { sent: false, error: error.with_source(source) });
                }
                Err(broken) => return Err(Fault { sent: true, error: self.broken(&call, broken) }),
            }
        }
    }

    fn broken(&self, call: &Call<'_>, broken: Broken) -> Error {
        let what = format!("{} {}", call.method, self.shown(call.path));
        match broken {
            Broken::Unsent { source } | Broken::Lost { source, .. } => self.unknown(call).with_source(source),
            Broken::TooLong => Error::backend(format!("{what}: the answer is longer than {} bytes", call.limit)),
            Broken::Parted => Error::unavailable(format!("{what}: given up")),
        }
    }

    fn unknown(&self, call: &Call<'_>) -> Error {
        Error::unavailable(format!(
            "{} {}: the connection to {} was lost before the answer was complete; whether it was done is unknown",
            call.method,
            self.shown(call.path),
            self.options.name()
        ))
    }

    fn request(&self, call: &Call<'_>, headers: HeaderMap) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        // The prefix was checked when the options were read, and paths are made of checked names.
        if let Ok(uri) = format!("{}{}", self.options.prefix(), call.path).parse() {
            *request.uri_mut() = uri;
        }
        *request.headers_mut() = headers;
        let headers = request.headers_mut();
        if let Ok(host) = HeaderValue::from_str(self.options.authority()) {
            headers.insert(HOST, host);
        }
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("broker-http/", env!("CARGO_PKG_VERSION"))));
        if let Some(authorization) = self.options.authorization() {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }

    async fn dial(&self) -> Result<Connection> {
        let tls = self.tls().await?;
        let open = async {
            #[cfg(unix)]
            if let Some(path) = self.options.socket() {
                return Connection::open_unix(path).await;
            }
            Connection::open(self.options.authority(), tls).await
        };
        match tokio::time::timeout(self.options.connect_timeout, open).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => {
                Err(Error::unavailable(format!("cannot connect to {}: {error}", self.options.name()))
                    .with_source(error))
            }
            Err(_) => Err(Error::timeout(format!(
                "cannot connect to {} within {}",
                self.options.name(),
                broker_core::format_duration(self.options.connect_timeout)
            ))),
        }
    }

    /// How to speak TLS and with whom, if the URL says `https`.
    async fn tls(&self) -> Result<Option<(TlsConnector, ServerName<'static>)>> {
        let Some(tls) = self.options.tls() else { return Ok(None) };
        let load = async || {
            if let Some(config) = &tls.config {
                return Ok(TlsConnector::from(Arc::clone(config)));
            }
            let files = tls.files.clone();
            let read = tokio::task::spawn_blocking(move || files.client_config()).await;
            match read {
                Ok(Ok(config)) => Ok(TlsConnector::from(Arc::new(config))),
                Ok(Err(why)) => Err(Error::invalid(why)),
                Err(_) => Err(Error::closed("the runtime is shutting down")),
            }
        };
        let connector = self.tls.get_or_try_init(load).await?;
        Ok(Some((connector.clone(), tls.name.clone())))
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.idle.lock();
        idle.retain(|connection| connection.idle_since.elapsed() < IDLE);
        // The last one used is the least likely to be closed by now.
        while let Some(mut connection) = idle.pop() {
            if connection.look() {
                return Some(connection);
            }
        }
        None
    }

    fn give_back(&self, mut connection: Connection) {
        let mut idle = self.idle.lock();
        if connection.is_open() && idle.len() < MAX_IDLE {
            connection.kept = true;
            connection.idle_since = Instant::now();
            idle.push(connection);
        }
    }

    /// Closes the connections nothing is under way on.
    pub(super) fn disconnect(&self) {
        self.idle.lock().clear();
    }

    /// The path without its query.
    fn shown<'p>(&self, path: &'p str) -> &'p str {
        path.split('?').next().unwrap_or_default()
    }
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("options", &self.options).finish_non_exhaustive()
    }
}
