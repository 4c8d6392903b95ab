//! Connections: accepted up to a number, held to times and sizes, drained at the end.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use broker_core::ErrorKind;
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_service::Service as _;

use super::accept::{Accept, Accepted, Accepting};
use super::access::{Peer, Presented};
use super::activity::{Activity, Busy, Head};
use super::guarded::Guarded;
use super::limits::Limits;
use super::metrics::Refusal;
use super::places::Places;
use super::problem::{Answer, Problem};
use super::rest::{Drains, Received};
use super::tls::Tls;
use super::wire::{Socket, Watched, Wire};
use super::{Shared, publish, routes};
use crate::event::Format;

/// What is written to a connection over the limit, without reading from it: a sender that sees it
/// knows more than one whose connection was reset.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/problem+json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 114\r\n\r\n\
    {\"title\":\"Service Unavailable\",\"status\":503,\"detail\":\"too many connections; try again later\",\"kind\":\"unavailable\"}";

/// The connections of a server, over all its listeners.
#[derive(Debug)]
pub(crate) struct Connections {
    /// Ends accepting, and each connection after the request it is at.
    closing: CancellationToken,
    /// Ends every connection at once, after `closing`.
    cut: CancellationToken,
    tasks: TaskTracker,
    places: Places,
    /// Places for telling a connection that it is one too many.
    refusing: Arc<Semaphore>,
}

/// Connections told at a time that they are too many.
const REFUSED_AT_ONCE: usize = 256;

impl Connections {
    pub(crate) fn new() -> Self {
        Self {
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            places: Places::default(),
            refusing: Arc::new(Semaphore::new(REFUSED_AT_ONCE)),
        }
    }

    /// Accepts until the server closes.
    pub(crate) async fn accept<L: Accept>(&self, shared: &Arc<Shared>, listener: L, router: Router, tls: Option<Tls>) {
        let mut accepting = Accepting::new(listener);
        let mut limits = shared.limits.load_full();
        let mut builder = Arc::new(make_builder(&limits));
        loop {
            let accepted = tokio::select! {
                () = self.closing.cancelled() => return,
                accepted = accepting.next(&shared.metrics) => accepted,
            };
            let (stream, address) = match accepted {
                Accepted::One(stream, address) => (stream, address),
                Accepted::Beyond(stream) => {
                    self.refuse(stream, tls.is_none());
                    continue;
                }
            };
            shared.metrics.connection();
            if !Arc::ptr_eq(&limits, &shared.limits()) {
                limits = shared.limits.load_full();
                builder = Arc::new(make_builder(&limits));
            }
            let activity = Arc::<Activity>::default();
            match self.places.take(address, limits.connections, &activity) {
                Some((place, gave_way)) => {
                    if gave_way {
                        shared.metrics.refused(Refusal::GaveWay);
                        tracing::debug!(peer = ?address, "a quiet connection gave way to this one");
                    }
                    let wire = Arc::clone(&activity.wire);
                    let connection = Connection {
                        builder: Arc::clone(&builder),
                        shared: Arc::clone(shared),
                        router: router.clone(),
                        idle: limits.header_timeout.max(Duration::from_millis(2)),
                        patience: limits.body_timeout.max(Duration::from_millis(2)),
                        activity,
                        closing: self.closing.clone(),
                        cut: self.cut.clone(),
                        peer: Peer { address, certificate: None, wire, place: Some(Arc::new(place)) },
                    };
                    let activity = Arc::clone(&connection.activity);
                    let stream = Socket::new(stream, Arc::clone(&activity.wire));
                    let task = match &tls {
                        None => self.tasks.spawn(connection.serve(stream)),
                        Some(tls) => self.tasks.spawn(connection.serve_tls(stream, tls.clone())),
                    };
                    activity.served_by(task.abort_handle());
                }
                None => {
                    shared.metrics.connection_refused();
                    self.refuse(stream, tls.is_none());
                }
            }
        }
    }

    /// In a flood most are just closed; so are all whom a plain answer would only confuse.
    fn refuse<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, plain: bool) {
        if plain && let Ok(place) = Arc::clone(&self.refusing).try_acquire_owned() {
            self.tasks.spawn(refuse(stream, place));
        }
    }

    /// Serves what a connection was upgraded to, until it ends or connections are cut.
    pub(crate) fn serve(&self, wire: &Wire, upgraded: impl Future<Output = ()> + Send + 'static) {
        let cut = self.cut.clone();
        let task = self.tasks.spawn(async move { cut.run_until_cancelled(upgraded).await });
        wire.served_by(task.abort_handle());
    }

    /// Tells when connections are to end.
    pub(crate) fn closing(&self) -> CancellationToken {
        self.closing.clone()
    }

    /// Connections open now.
    pub(crate) fn open(&self) -> usize {
        self.tasks.len()
    }

    /// Ends the connections, each after the request it is at; cuts those that take longer.
    pub(crate) async fn close(&self, patience: Duration) {
        self.closing.cancel();
        self.tasks.close();
        if timeout(patience, self.tasks.wait()).await.is_err() {
            self.cut.cancel();
            self.tasks.wait().await;
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.closing.cancel();
        self.cut.cancel();
    }
}

/// How long the other side has for its end, once a connection has ended for its silence.
const FAREWELL: Duration = Duration::from_secs(1);

/// The parser's own bound of headers, which costs nothing.
const USUAL_HEADERS: usize = 100;

/// Bytes of one stream's body that are on their way, as RFC 9113 has it.
const STREAM_WINDOW: u32 = (1 << 16) - 1;
/// Of all streams of a connection. h2 takes many small frames that nobody has read yet for an attack, from half of this on, 256
/// bytes a frame: a line a frame, as some clients stream NDJSON, is none: the windows of three such
/// streams may be full of lines of fourteen bytes.
const CONNECTION_WINDOW: u32 = 8 << 20;

fn make_builder(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    let mut http1 = builder.http1();
    // Time is kept for the whole connection, once: a timer for every request's headers would cost
    // as much as the headers.
    http1.header_read_timeout(None).half_close(true).max_buf_size(limits.header_bytes.max(8 << 10));
    if limits.headers != USUAL_HEADERS {
        http1.max_headers(limits.headers);
    }
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(limits.streams_per_connection)
        // A peer that opens and resets streams as fast as it can is cut off (CVE-2023-44487).
        .max_pending_accept_reset_streams(64)
        .max_local_error_reset_streams(256)
        .keep_alive_interval(limits.header_timeout)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    builder
}

/// Says so, and takes what was sent for a moment: closing on unread data would reset the connection
/// and with it lose the answer.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, _place: OwnedSemaphorePermit) {
    let told = async {
        stream.write_all(TOO_MANY).await?;
        stream.shutdown().await?;
        let mut dropped = [0; 4096];
        while stream.read(&mut dropped).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    // Whoever does not read it learns nothing; that must not hold anything here.
    let _ = timeout(Duration::from_secs(1), told).await;
}

struct Connection {
    builder: Arc<Builder<TokioExecutor>>,
    shared: Arc<Shared>,
    router: Router,
    idle: Duration,
    /// How long an answer may wait for its reader.
    patience: Duration,
    activity: Arc<Activity>,
    closing: CancellationToken,
    cut: CancellationToken,
    peer: Peer,
}

impl Connection {
    /// Shakes hands first, within the time that headers have.
    async fn serve_tls<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(mut self, stream: S, tls: Tls) {
        // Before the handshake: what changes meanwhile is looked at again.
        let changes = *tls.authorities().borrow();
        let shaken = tokio::select! {
            shaken = timeout(self.idle, tls.acceptor().accept(stream)) => shaken,
            () = self.closing.cancelled() => return,
        };
        match shaken {
            Ok(Ok(stream)) => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                self.peer.certificate = Presented::new(chain, &tls, changes).map(Arc::new);
                self.serve(stream).await;
            }
            failed => {
                self.shared.metrics.refused(Refusal::Tls);
                tracing::debug!(peer = ?self.peer.address, error = ?failed.map(|shaken| shaken.err()), "no TLS");
            }
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let activity = self.activity;
        activity.set_patience(self.patience);
        let address = self.peer.address;
        let (shared, router, active, peer) = (Arc::clone(&self.shared), self.router, Arc::clone(&activity), self.peer);
        let service = service_fn(move |mut request: Request<Incoming>| {
            let busy = Busy::begin(&active);
            let publishes = is_publish(&request);
            // Whoever publishes one message where everybody may needs not be known: there is hardly an answer to read.
            let one = publishes && !matches!(Format::of(request.headers()), Ok(Format::Batch | Format::Lines));
            if !one || !shared.gate.is_open() {
                request.extensions_mut().insert(peer.clone());
            }
            active.wire.set_fleeting(routes::waits(request.uri()));
            let (shared, router, version) = (Arc::clone(&shared), router.clone(), request.version());
            let (parts, body) = request.into_parts();
            let head = (version == Version::HTTP_2).then(|| {
                let uri = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
                Head::begin(&active, uri, &parts.headers)
            });
            let drains = Drains { shared: Arc::clone(&shared), activity: Some(Arc::clone(&active)) };
            let body = Received::new(body, version, &parts.headers, &active.rest, drains);
            let request = Request::from_parts(parts, Body::new(body));
            async move {
                if busy.0.has_given_way() {
                    // The connection is about to end: nothing of the request is done.
                    return std::future::pending().await;
                }
                let mut response = match head.as_ref().and_then(|head| check_heads(head, &shared.limits()).err()) {
                    None => answer(Arc::clone(&shared), router, request, publishes).await,
                    Some(problem) => {
                        let response = routes::refuse(&shared, request.headers(), problem);
                        drop(request);
                        response
                    }
                };
                drop(head);
                let activity = &busy.0;
                activity.wire.answer();
                if response.body().size_hint().exact().is_some() {
                    // It waits no more.
                    activity.wire.set_fleeting(false);
                }
                let (limits, work) = (|| shared.limits.load_full(), || Busy::begin(activity));
                activity.rest.tend(response.headers_mut(), limits, work);
                Ok::<_, Infallible>(response.map(|body| Guarded::new(body, busy, version)))
            }
        });
        let stream = Watched::new(stream, &activity, Arc::clone(&self.shared));
        let serving = self.builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let mut serving = pin!(serving);
        let mut closing = false;
        let period = self.idle.min(self.patience) / 2;
        let mut look = pin!(sleep(period));
        // Since when nothing has begun, and since when an answer waits without getting on.
        let (mut seen, mut quiet) = (activity.life(), Instant::now());
        let mut waits: Option<(usize, Instant)> = None;
        let mut still = quiet;
        let mut idle = self.idle;
        loop {
            tokio::select! {
                biased;
                ended = serving.as_mut() => {
                    if let Err(error) = ended {
                        if let Some(refusal) = refusal(&*error) {
                            self.shared.metrics.refused(refusal);
                        }
                        tracing::debug!(error, "a connection ended");
                    }
                    return;
                }
                () = self.closing.cancelled(), if !closing => {
                    closing = true;
                    serving.as_mut().graceful_shutdown();
                }
                () = self.cut.cancelled(), if closing => return,
                () = look.as_mut() => {
                    let now = Instant::now();
                    waits = activity.waits().map(|at| (at, waits.filter(|was| was.0 == at).map_or(now, |was| was.1)));
                    let stands_still = waits.is_some_and(|(_, since)| now - since >= self.patience);
                    if stands_still || activity.has_late_stream() || activity.wire.owed.is_late() {
                        self.shared.metrics.refused(Refusal::AnswerTimeout);
                        tracing::debug!(peer = ?address, "a connection was cut: its answers are not read");
                        return;
                    }
                    let life = activity.life();
                    let active = activity.is_active();
                    if !active || life != seen {
                        still = now;
                    } else if now - still >= self.patience {
                        // Whoever has closed his side while nothing came of his request is gone by now.
                        activity.wire.set_fleeting(true);
                    }
                    if active || life != seen {
                        (seen, quiet) = (life, now);
                    } else if now - quiet >= idle {
                        if closing {
                            return;
                        }
                        (closing, quiet) = (true, now);
                        idle = period.min(FAREWELL);
                        // What has begun a head and stands still is told so; what is idle just ends.
                        if activity.wire.end_late() {
                            self.shared.metrics.refused(Refusal::HeadTimeout);
                        } else {
                            if activity.wire.is_amid_frame() {
                                // HTTP/2 says goodbye, and would wait for the rest of the frame.
                                self.shared.metrics.refused(Refusal::HeadTimeout);
                                idle = Duration::ZERO;
                            }
                            serving.as_mut().graceful_shutdown();
                        }
                    }
                    // Not later than the time is up where nothing has happened since the last look.
                    let up = (quiet + idle).max(now + Duration::from_millis(1));
                    look.as_mut().reset((now + period).min(up));
                }
            }
        }
    }
}

/// The route everything else waits for is found without the router, whose way there costs about as
/// much as publishing does.
async fn answer(shared: Arc<Shared>, mut router: Router, request: Request<Body>, publishes: bool) -> Response<Body> {
    if request.version() == Version::HTTP_2
        && let Err(problem) = check_headers(&request, shared.limits().headers)
    {
        return routes::refuse(&shared, request.headers(), problem);
    }
    if !publishes {
        let Ok(response) = router.call(request).await;
        return response;
    }
    let response = match routes::check(&shared, request).await {
        Ok(request) => publish::publish(State(Arc::clone(&shared)), request).await,
        Err(problem) => problem.into_response(),
    };
    shared.metrics.answered(&response);
    response
}

fn is_publish<B>(request: &Request<B>) -> bool {
    request.method() == Method::POST
        // A web page's request has more to be said to it.
        && !request.headers().contains_key(header::ORIGIN)
        && request.uri().path().strip_prefix("/topics/").is_some_and(|topic| !topic.is_empty() && !topic.contains('/'))
}

/// As the parser of HTTP/1.1 does by itself.
fn check_headers<B>(request: &Request<B>, max: usize) -> Answer<()> {
    let count = request.headers().len();
    if count <= max {
        return Ok(());
    }
    let detail = format!("the request has {count} headers, and {max} are the most");
    let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    Err(Problem::new(status, ErrorKind::TooLarge, detail).counted(Refusal::HeadTooLarge))
}

/// Times [`Limits::header_bytes`] that the heads of one connection's requests may take together.
const HEADS: usize = 16;

/// Over HTTP/2 requests wait side by side, each with its head.
fn check_heads(head: &Head, limits: &Limits) -> Answer<()> {
    let most = limits.header_bytes.saturating_mul(HEADS);
    if head.all() <= most {
        return Ok(());
    }
    let detail = format!("the requests at work on this connection have {most} bytes of headers at most");
    let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, detail);
    Err(problem.retry_after(Duration::from_secs(1)).counted(Refusal::ConnectionHeaders))
}

/// What the parser of HTTP/1.1 refused.
fn refusal(error: &(dyn std::error::Error + 'static)) -> Option<Refusal> {
    let mut source = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<hyper::Error>() {
            if error.is_parse_too_large() {
                return Some(Refusal::HeadTooLarge);
            }
            if error.is_parse() {
                return Some(Refusal::Malformed);
            }
        }
        source = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{Server, ServerOptions};
    use super::*;

    #[test]
    fn the_answer_to_one_connection_too_many_is_well_formed() {
        let text = std::str::from_utf8(TOO_MANY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length: usize =
            head.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
        assert_eq!(length, body.len());
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["status"], 503);
    }

    /// A connection of its own to a server whose `header_timeout` is ten seconds, without a socket: the time
    /// can be the test's.
    fn connect() -> tokio::io::DuplexStream {
        let limits = Limits { header_timeout: Duration::from_secs(10), ..Limits::default() };
        let options = ServerOptions::new().with_limits(limits.clone()).with_development(true);
        let server = Server::new(Arc::new(broker_core::MemoryBroker::new()), options);
        let connection = Connection {
            builder: Arc::new(make_builder(&limits)),
            shared: Arc::clone(&server.shared),
            router: server.router(),
            idle: limits.header_timeout,
            patience: limits.body_timeout,
            activity: Arc::default(),
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            peer: Peer::default(),
        };
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let _server = server;
            connection.serve(theirs).await;
        });
        ours
    }

    /// Seconds until the other side ends, and what it says before.
    async fn end(stream: &mut tokio::io::DuplexStream) -> (f64, String) {
        let (begin, mut said) = (Instant::now(), String::new());
        stream.read_to_string(&mut said).await.unwrap();
        (begin.elapsed().as_secs_f64(), said)
    }

    /// HEADERS of `:method: GET`, without END_HEADERS.
    const HEAD: &[u8] = &[0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82];

    #[tokio::test(start_paused = true)]
    async fn headers_have_the_whole_of_their_time() {
        // A fresh connection, with nothing said and with half a head.
        for (said, answer) in [("", ""), ("GET /heal", "HTTP/1.1 408")] {
            let mut stream = connect();
            stream.write_all(said.as_bytes()).await.unwrap();
            let (after, heard) = end(&mut stream).await;
            assert!((10.0..10.1).contains(&after), "{said:?}: {after}");
            assert!(heard.starts_with(answer) && heard.is_empty() == answer.is_empty(), "{heard}");
        }
        // Over HTTP/2: half a preface, half a frame, and a head without an end.
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        for said in [&preface[..10], &[&preface[..], b"\0\0"].concat(), &[&preface[..], HEAD].concat()] {
            let mut stream = connect();
            stream.write_all(said).await.unwrap();
            let (begin, mut heard) = (Instant::now(), Vec::new());
            stream.read_to_end(&mut heard).await.unwrap();
            assert!((10.0..10.1).contains(&begin.elapsed().as_secs_f64()), "{said:?}: {:?}", begin.elapsed());
        }
        // A head that is done within its time, however late.
        let mut stream = connect();
        stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
        sleep(Duration::from_millis(9_900)).await;
        stream.write_all(b"host: localhost\r\n\r\n").await.unwrap();
        let (after, heard) = end(&mut stream).await;
        assert!(heard.starts_with("HTTP/1.1 200") && heard.ends_with("ok\n"), "{heard}");
        // What is idle after a request is kept as long, and half as long again at most.
        assert!((10.0..15.1).contains(&after), "{after}");
    }
}
