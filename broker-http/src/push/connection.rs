//! One request and its answer on a connection of hyper's own, HTTP/1.1 or HTTP/2.
//!
//! An HTTP/1 connection is driven by whoever uses it, in the same task: nobody is woken twice for
//! one answer. An HTTP/2 connection is shared, and has a task of its own.

use std::error::Error as _;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::client::PushClient;
use super::dial::{Heard, Stream, describe, dial};
use super::target::Target;
use super::verdict::Answer;

/// Bytes of an answer's body that are read.
pub(crate) const ANSWER_BYTES: usize = 64 << 10;
/// Bytes of an answer's head that are read.
const MAX_HEAD_BYTES: usize = 64 << 10;

type Body = Full<Bytes>;

/// What is sent. The rest depends on the connection.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Bytes of the answer's body that are read.
    pub(crate) answer_bytes: usize,
}

/// The way to one endpoint: how to open connections, and the one that all share where it speaks
/// HTTP/2.
pub(crate) struct Route {
    client: PushClient,
    target: Target,
    shared: Mutex<Option<http2::SendRequest<Body>>>,
    /// Held while the protocol of an endpoint is not known, so that a burst opens one HTTP/2
    /// connection and not one a request.
    asking: tokio::sync::Mutex<Option<Protocol>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

impl Route {
    pub(crate) fn new(client: PushClient, target: Target) -> Self {
        Self { client, target, shared: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn client(&self) -> &PushClient {
        &self.client
    }

    /// A connection: the shared one, or a new one on the place that `permit` keeps.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub(crate) async fn open(&self, permit: &mut Option<OwnedSemaphorePermit>) -> Result<Connection, String> {
        if !self.target.may_share() {
            return self.dial(permit).await;
        }
        if let Some(shared) = self.shared() {
            return Ok(shared);
        }
        let mut known = self.asking.lock().await;
        if *known == Some(Protocol::Http1) {
            drop(known);
            return self.dial(permit).await;
        }
        if let Some(shared) = self.shared() {
            return Ok(shared);
        }
        let connection = self.dial(permit).await?;
        *known = Some(if matches!(connection.0, Kind::Shared(_)) { Protocol::Http2 } else { Protocol::Http1 });
        Ok(connection)
    }

    /// The shared connection, if there is one that lives.
    fn shared(&self) -> Option<Connection> {
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(http2::SendRequest::is_closed) {
            *shared = None;
        }
        shared.clone().map(|send| Connection(Kind::Shared(Shared { send, used: true })))
    }

    /// Lets go of the shared connection: it ends when the requests on it do.
    pub(crate) fn forget(&self) {
        *self.shared.lock() = None;
    }

    async fn dial(&self, permit: &mut Option<OwnedSemaphorePermit>) -> Result<Connection, String> {
        let dialled = dial(&self.client, &self.target).await?;
        let io = TokioIo::new(dialled.stream);
        if dialled.h2 {
            let (send, connection) = http2::Builder::new(TokioExecutor::new())
                .max_header_list_size(MAX_HEAD_BYTES as u32)
                .handshake(io)
                .await
                .map_err(|error| explain(&error, false))?;
            let permit = permit.take();
            tokio::spawn(async move {
                // Whoever has a request on it learns how it ended.
                let _ = connection.await;
                drop(permit);
            });
            *self.shared.lock() = Some(send.clone());
            return Ok(Connection(Kind::Shared(Shared { send, used: false })));
        }
        let (send, driver) = http1::Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(io)
            .await
            .map_err(|error| explain(&error, false))?;
        let own = Own { send, driver, heard: dialled.heard, used: false, open: true, permit: permit.take() };
        Ok(Connection(Kind::Own(Box::new(own))))
    }
}

/// An open connection.
pub(crate) struct Connection(Kind);

enum Kind {
    Own(Box<Own>),
    Shared(Shared),
}

struct Own {
    send: http1::SendRequest<Body>,
    driver: http1::Connection<TokioIo<Stream>, Body>,
    heard: Heard,
    /// Whether it has brought an answer before.
    used: bool,
    open: bool,
    permit: Option<OwnedSemaphorePermit>,
}

struct Shared {
    send: http2::SendRequest<Body>,
    used: bool,
}

/// Why there was no answer.
pub(crate) enum Broken {
    /// A connection that was kept from before ended without one byte of an answer: the endpoint had
    /// most likely closed it already, and has not seen the request.
    Stale,
    /// Anything else.
    Failed(String),
}

impl Connection {
    /// Sends a request and reads the answer, up to where we stop reading.
    ///
    /// # Errors
    ///
    /// Why there is no whole answer; the connection is then of no use.
    pub(crate) async fn exchange(&mut self, content: Content, target: &Route) -> Result<Answer, Broken> {
        let target = &target.target;
        match &mut self.0 {
            Kind::Own(own) => own.exchange(content, target).await,
            Kind::Shared(shared) => shared.exchange(content, target).await,
        }
    }

    /// Whether it can take another request.
    pub(crate) fn is_open(&self) -> bool {
        match &self.0 {
            Kind::Own(own) => own.open && !own.send.is_closed(),
            Kind::Shared(shared) => !shared.send.is_closed(),
        }
    }

    /// Ends it, and tells whose place it had.
    pub(crate) fn into_permit(self) -> Option<OwnedSemaphorePermit> {
        match self.0 {
            Kind::Own(own) => own.permit,
            Kind::Shared(_) => None,
        }
    }

    /// Ready when the other side has closed it; to be polled while it is idle.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Kind::Own(own) => own.poll_driver(cx),
            Kind::Shared(shared) if shared.send.is_closed() => Poll::Ready(()),
            Kind::Shared(_) => Poll::Pending,
        }
    }
}

impl Own {
    async fn exchange(&mut self, content: Content, target: &Target) -> Result<Answer, Broken> {
        self.heard.forget();
        let mut headers = content.headers;
        headers.insert(http::header::HOST, target.authority.clone());
        let request = request(content.method, target.origin.clone(), Version::HTTP_11, headers, content.body);
        let Self { send, driver, open, .. } = self;
        let answer = async move {
            send.ready().await?;
            read(send.send_request(request).await?, content.answer_bytes).await
        };
        let mut answer = pin!(answer);
        let result = poll_fn(|cx| {
            // What the request has to say goes into the driver, what the driver hears comes out.
            if let Poll::Ready(result) = answer.as_mut().poll(cx) {
                return Poll::Ready(result);
            }
            if *open && Pin::new(&mut *driver).poll(cx).is_ready() {
                *open = false;
            }
            answer.as_mut().poll(cx)
        })
        .await;
        match result {
            Ok((answer, whole)) => {
                self.open &= whole;
                self.used = true;
                Ok(answer)
            }
            Err(error) => {
                self.open = false;
                let heard = self.heard.anything();
                if self.used && !heard { Err(Broken::Stale) } else { Err(Broken::Failed(explain(&error, heard))) }
            }
        }
    }

    fn poll_driver(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.open && Pin::new(&mut self.driver).poll(cx).is_ready() {
            self.open = false;
        }
        if self.open { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Shared {
    async fn exchange(&mut self, content: Content, target: &Target) -> Result<Answer, Broken> {
        let used = std::mem::replace(&mut self.used, true);
        let Content { method, headers, body, answer_bytes } = content;
        let request = request(method, target.absolute.clone(), Version::HTTP_2, headers, body);
        let broken = |error: hyper::Error, heard: bool| {
            if used && !heard && !refused_by_peer(&error) {
                Broken::Stale
            } else {
                Broken::Failed(explain(&error, heard))
            }
        };
        let response = self.send.send_request(request).await.map_err(|error| broken(error, false))?;
        read(response, answer_bytes).await.map(|(answer, _)| answer).map_err(|error| broken(error, true))
    }
}

fn request(method: Method, uri: http::Uri, version: Version, headers: HeaderMap, body: Bytes) -> Request<Body> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = version;
    *request.headers_mut() = headers;
    request
}

/// The answer, its body up to so many bytes, and whether all of it was read.
async fn read(response: Response<Incoming>, most: usize) -> hyper::Result<(Answer, bool)> {
    let (head, mut body) = response.into_parts();
    let mut answer = Answer { status: head.status.as_u16(), headers: head.headers, body: Vec::new() };
    while !body.is_end_stream() {
        let Some(frame) = body.frame().await else { break };
        let Ok(data) = frame?.into_data() else { continue };
        let room = most - answer.body.len();
        answer.body.extend(data.iter().take(room));
        if data.len() > room {
            return Ok((answer, false));
        }
    }
    Ok((answer, true))
}

/// Whether the endpoint itself ended one request of a shared connection, which would otherwise live
/// on: an answer of a kind. Refusing a stream unseen is not (RFC 9113, section 8.7).
fn refused_by_peer(error: &hyper::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return h2.is_reset() && h2.reason() != Some(h2::Reason::REFUSED_STREAM);
        }
        source = cause.source();
    }
    false
}

/// Why a request failed, in a few words.
fn explain(error: &hyper::Error, heard: bool) -> String {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>()
            && !matches!(io.kind(), std::io::ErrorKind::UnexpectedEof)
        {
            return if heard { format!("{} in mid-answer", describe(io)) } else { describe(io) };
        }
        source = cause.source();
    }
    if error.is_parse_too_large() {
        return format!("the endpoint's answer has a head of more than {} KiB", MAX_HEAD_BYTES >> 10);
    }
    if error.is_parse() {
        return format!("the endpoint's answer is not HTTP: {error}");
    }
    match heard {
        true => "connection closed in mid-answer".to_owned(),
        false if error.is_incomplete_message() || error.is_closed() || error.is_canceled() => {
            "connection closed without an answer".to_owned()
        }
        false => error.to_string(),
    }
}
