//! What an answer leaves of its request's body.
//!
//! An answer does not wait for a body that it does not need. Over HTTP/2 its stream is then reset without
//! an error. Over HTTP/1.1 the body stands between the answer and the next request: it is read and dropped
//! for a while, and where that is not worth it the connection is closed behind the answer, slowly
//! (RFC 9112, section 9.6; see [`wire`](super::wire)).

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
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::limits::Limits;
use super::wire::Wire;

/// The body of a request.
pub(crate) struct Received<B> {
    /// `None` once it has ended.
    body: Option<B>,
    /// It is the last on its connection.
    last: bool,
    /// Its sender waits to be told to begin.
    asks_first: bool,
    /// Where it goes if it is dropped before its end; over HTTP/2 nowhere.
    rest: Option<Arc<Rest<B>>>,
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Received<B> {
    pub(crate) fn new(body: B, version: Version, headers: &HeaderMap, rest: &Arc<Rest<B>>) -> Self {
        if body.is_end_stream() {
            return Self { body: None, last: false, asks_first: false, rest: None };
        }
        if version > Version::HTTP_11 {
            return Self { body: Some(body), last: false, asks_first: false, rest: None };
        }
        let last = version < Version::HTTP_11 || is_last(headers);
        Self { body: Some(body), last, asks_first: headers.contains_key(header::EXPECT), rest: Some(Arc::clone(rest)) }
    }
}

/// Whether no other message follows on the connection.
fn is_last(headers: &HeaderMap) -> bool {
    let said = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    said.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case("close"))
}

impl<B> Drop for Received<B> {
    fn drop(&mut self) {
        if let (Some(body), Some(rest)) = (self.body.take(), self.rest.take()) {
            *rest.left.lock() = Some(Left { body, last: self.last || self.asks_first });
        }
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Received<B> {
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

/// Where the body of a connection's request is put that nobody reads to its end.
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

impl<B: http_body::Body<Data = Bytes> + Send + Unpin + 'static> Rest<B> {
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
async fn drain<B: http_body::Body<Data = Bytes> + Unpin>(mut body: B, most: u64, patience: Duration) {
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
    let body = Received::new(body, parts.version, &parts.headers, &rest);
    let mut response = next.run(Request::from_parts(parts, Body::new(body))).await;
    rest.tend(response.headers_mut(), || shared.limits.load_full(), || ());
    response
}
