//! What an answer leaves of its request's body.
//!
//! An answer does not wait for a body that it does not need. The body is read and dropped for a while, so that its sender
//! gets to see the answer. Over HTTP/1.1 it stands between that and the next request: where it is not worth reading the
//! connection is closed behind the answer, slowly (RFC 9112, section 9.6; see [`wire`](super::wire)). Over HTTP/2 its
//! stream is reset without an error then (RFC 9113, section 8.1), and not before: there are clients, curl among them,
//! that take that for an error and drop the answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Version, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::activity::{Activity, Busy};
use super::limits::Limits;
use super::wire::Wire;

/// The body of a request.
pub(crate) struct Received<B: Unread> {
    /// `None` once it has ended.
    body: Option<B>,
    /// It is the last on its connection.
    last: bool,
    /// Its sender waits to be told to begin.
    asks_first: bool,
    /// What happens to it if it is dropped before its end.
    then: Then<B>,
}

/// What happens to a body that is dropped before its end.
enum Then<B: Unread> {
    /// Over HTTP/1.1, where the connection goes on behind it: whoever has the answer sees to it.
    Left(Arc<Rest<B>>),
    /// Over HTTP/2, where it is in nobody's way.
    Drained(Drains),
    /// There is none.
    Nothing,
}

/// A body that can be read on its own.
pub(crate) trait Unread: http_body::Body<Data = Bytes> + Send + Unpin + 'static {}

impl<B: http_body::Body<Data = Bytes> + Send + Unpin + 'static> Unread for B {}

/// How bodies over HTTP/2 are read that nobody needs.
pub(crate) struct Drains {
    pub(crate) shared: Arc<Shared>,
    /// Of a connection of ours, on which it is a request's work.
    pub(crate) activity: Option<Arc<Activity>>,
}

impl Drains {
    fn drain(self, body: impl Unread) {
        // Without a runtime there is no sender to read from either.
        let Ok(runtime) = Handle::try_current() else { return };
        let limits = self.shared.limits.load_full();
        let work = self.activity.as_ref().map(Busy::begin);
        runtime.spawn(async move {
            drain(body, limits.refused_body_bytes, patience(&limits)).await;
            drop(work);
        });
    }
}

impl<B: Unread> Received<B> {
    pub(crate) fn new(body: B, version: Version, headers: &HeaderMap, rest: &Arc<Rest<B>>, drains: Drains) -> Self {
        if body.is_end_stream() {
            return Self { body: None, last: false, asks_first: false, then: Then::Nothing };
        }
        let last = version < Version::HTTP_11 || is_last(headers);
        let then = if version > Version::HTTP_11 { Then::Drained(drains) } else { Then::Left(Arc::clone(rest)) };
        Self { body: Some(body), last, asks_first: headers.contains_key(header::EXPECT), then }
    }
}

/// Whether no other message follows on the connection.
fn is_last(headers: &HeaderMap) -> bool {
    let said = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    said.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case("close"))
}

impl<B: Unread> Drop for Received<B> {
    fn drop(&mut self) {
        let Some(body) = self.body.take() else { return };
        match std::mem::replace(&mut self.then, Then::Nothing) {
            Then::Left(rest) => *rest.left.lock() = Some(Left { body, last: self.last || self.asks_first }),
            // Whoever asked first does not begin.
            Then::Drained(drains) if !self.asks_first => drains.drain(body),
            Then::Drained(_) | Then::Nothing => {}
        }
    }
}

impl<B: Unread> http_body::Body for Received<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        this.asks_first = false;
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) || body.is_end_stream() {
            this.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), B::size_hint)
    }
}

/// Where the body of an HTTP/1.1 connection's request is put that nobody reads to its end.
#[derive(Debug)]
pub(crate) struct Rest<B> {
    left: Mutex<Option<Left<B>>>,
    wire: Arc<Wire>,
}

/// A body dropped before its end.
#[derive(Debug)]
struct Left<B> {
    body: B,
    /// There will be no other request, or it has not begun: there is nothing to read it for.
    last: bool,
}

impl<B: Unread> Rest<B> {
    pub(crate) fn new(wire: Arc<Wire>) -> Self {
        Self { left: Mutex::new(None), wire }
    }

    /// Sees to what was left of a request that has this answer; `work` is told how long it takes.
    pub(crate) fn tend<W: Send + 'static>(
        &self,
        headers: &mut HeaderMap,
        limits: impl FnOnce() -> Arc<Limits>,
        work: impl FnOnce() -> W,
    ) {
        let Some(left) = self.left.lock().take() else { return };
        let limits = limits();
        let most = limits.refused_body_bytes;
        if left.last || left.body.size_hint().lower() > most || is_last(headers) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            self.wire.set_unread();
        } else {
            let work = work();
            tokio::spawn(async move {
                drain(left.body, most, patience(&limits)).await;
                drop(work);
            });
        }
    }

    /// An answer under way left it: the connection ends behind that.
    pub(crate) fn leave(&self) {
        if self.left.lock().take().is_some() {
            self.wire.set_unread();
        }
    }
}

/// How long a body that nobody needs is read.
pub(crate) fn patience(limits: &Limits) -> Duration {
    limits.body_timeout.min(Duration::from_secs(10))
}

/// Reads and drops, up to so many bytes and so long; dropped before its end, the body ends its connection.
async fn drain(mut body: impl Unread, most: u64, patience: Duration) {
    let deadline = Instant::now() + patience;
    let mut dropped = 0;
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, body.frame()).await {
        dropped += frame.data_ref().map_or(0, |data| data.len() as u64);
        if dropped > most {
            return;
        }
    }
}

/// The same for routes in somebody else's server, whose connections are not ours to close slowly.
pub(crate) async fn elsewhere(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let rest = Arc::new(Rest::new(Arc::default()));
    let (parts, body) = request.into_parts();
    let drains = Drains { shared: Arc::clone(&shared), activity: None };
    let body = Received::new(body, parts.version, &parts.headers, &rest, drains);
    let mut response = next.run(Request::from_parts(parts, Body::new(body))).await;
    rest.tend(response.headers_mut(), || shared.limits.load_full(), || ());
    response
}
