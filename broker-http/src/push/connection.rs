//! One request and its answer on a connection of hyper's own, HTTP/1.1, or on one that is [shared](super::shared),
//! HTTP/2.
//!
//! An HTTP/1 connection is driven by whoever uses it, in the same task: nobody is woken twice for
//! one answer. An HTTP/2 connection has a task of its own.

use std::error::Error as _;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::client::{Place, PushClient};
use super::dial::{Heard, Stream, describe, dial};
use super::shared::Shared;
use super::target::Target;
use super::verdict::Answer;
use super::wakers::Wakers;

/// Bytes of an answer's body that are read.
pub(crate) const ANSWER_BYTES: usize = 64 << 10;
/// Bytes of an answer's head that are read.
pub(crate) const MAX_HEAD_BYTES: usize = 64 << 10;

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

/// What a request goes over.
pub(crate) enum Way {
    /// A connection that is there.
    Open(Connection),
    /// A new one, on this place.
    Place(Place),
}

/// The way to one endpoint: how to open connections, and the one that all share where it speaks
/// HTTP/2.
pub(crate) struct Route {
    client: PushClient,
    target: Target,
    shared: Mutex<Option<Shared>>,
    /// Told when there is one to share.
    opened: Notify,
    /// How many answers all connections have brought.
    answers: AtomicU64,
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
        Self {
            client,
            target,
            shared: Mutex::default(),
            opened: Notify::new(),
            answers: AtomicU64::new(0),
            asking: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn client(&self) -> &PushClient {
        &self.client
    }

    /// How many answers all connections have brought.
    pub(crate) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// What the next request goes over. Waits where there are as many connections as may be: until there is a place for
    /// one more, or one to this endpoint that all share.
    pub(crate) async fn way(&self) -> Way {
        if !self.target.may_share() {
            return Way::Place(self.client.place().await);
        }
        loop {
            let mut opened = pin!(self.opened.notified());
            // Before the look, so that what is opened in between is not missed.
            opened.as_mut().enable();
            if let Some(shared) = self.shared() {
                return Way::Open(shared);
            }
            tokio::select! {
                biased;
                place = self.client.place() => return Way::Place(place),
                () = opened => {}
            }
        }
    }

    /// A connection: a new one on this place, or the shared one, should somebody have opened it meanwhile.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub(crate) async fn open(&self, place: Place) -> Result<Connection, String> {
        if !self.target.may_share() {
            return self.dial(place).await;
        }
        if let Some(shared) = self.shared() {
            return Ok(shared);
        }
        let mut known = self.asking.lock().await;
        if *known == Some(Protocol::Http1) {
            drop(known);
            return self.dial(place).await;
        }
        if let Some(shared) = self.shared() {
            return Ok(shared);
        }
        let connection = self.dial(place).await?;
        *known = Some(if matches!(connection.0, Kind::Shared(_)) { Protocol::Http2 } else { Protocol::Http1 });
        Ok(connection)
    }

    /// The shared connection, if there is one that lives.
    fn shared(&self) -> Option<Connection> {
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(|shared| !shared.is_open()) {
            *shared = None;
        }
        shared.as_ref().map(|shared| Connection(Kind::Shared(shared.again())))
    }

    /// Lets go of the shared connection: it ends when the requests on it do.
    pub(crate) fn forget(&self) {
        *self.shared.lock() = None;
    }

    async fn dial(&self, place: Place) -> Result<Connection, String> {
        let dialled = dial(&self.client, &self.target).await?;
        if dialled.h2 {
            let shared = Shared::over(dialled.stream, place).await?;
            *self.shared.lock() = Some(shared.clone());
            self.opened.notify_waiters();
            return Ok(Connection(Kind::Shared(shared)));
        }
        let (send, driver) = http1::Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(dialled.stream))
            .await
            .map_err(|error| explain(&error, false))?;
        let own = Own { send, driver, heard: dialled.heard, used: false, open: true, wakers: None, place };
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
    wakers: Option<Wakers>,
    place: Place,
}

/// Why there was no answer.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The endpoint has not processed the request, and that is certain: nothing of it was written, or the endpoint
    /// refused its stream, or ended the connection before it (GOAWAY; RFC 9113, section 8.7).
    Unseen,
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
    pub(crate) async fn exchange(&mut self, content: Content, route: &Route) -> Result<Answer, Broken> {
        let Route { target, answers, .. } = route;
        let answer = match &mut self.0 {
            Kind::Own(own) => own.exchange(content, target).await,
            Kind::Shared(shared) => shared.exchange(content, target).await,
        };
        if answer.is_ok() {
            answers.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }

    /// Whether it can take another request.
    pub(crate) fn is_open(&self) -> bool {
        match &self.0 {
            Kind::Own(own) => own.open && !own.send.is_closed(),
            Kind::Shared(shared) => shared.is_open(),
        }
    }

    /// Ends it, and tells the place it had, if nobody else has the connection.
    pub(crate) fn into_place(self) -> Option<Place> {
        match self.0 {
            Kind::Own(own) => Some(own.place),
            Kind::Shared(_) => None,
        }
    }

    /// Ready when the other side has closed it; to be polled while it is idle.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Kind::Own(own) => own.poll_driver(cx),
            Kind::Shared(shared) if !shared.is_open() => Poll::Ready(()),
            Kind::Shared(_) => Poll::Pending,
        }
    }
}

impl Own {
    async fn exchange(&mut self, content: Content, target: &Target) -> Result<Answer, Broken> {
        self.heard.begin();
        let mut headers = content.headers;
        headers.insert(http::header::HOST, target.authority.clone());
        if content.method == Method::POST && content.body.is_empty() {
            // hyper says nothing of it, and there are servers that ask for it (RFC 9110, section 8.6).
            headers.insert(http::header::CONTENT_LENGTH, http::HeaderValue::from_static("0"));
        }
        let mut request = Request::new(Full::new(content.body));
        *request.method_mut() = content.method;
        *request.uri_mut() = target.origin.clone();
        *request.headers_mut() = headers;
        let heard = &self.heard;
        let Self { send, driver, open, wakers, .. } = self;
        let answer = async move {
            send.ready().await.map_err(|error| (error, true))?;
            let response = send.try_send_request(request).await.map_err(unwritten)?;
            // Of its body nothing was asked for yet.
            heard.head();
            read(response, content.answer_bytes).await.map_err(|error| (error, false))
        };
        let mut answer = pin!(answer);
        let mut is_new = true;
        let result = poll_fn(|cx| {
            if !wakers.as_ref().is_some_and(|wakers| wakers.are_of(cx.waker())) {
                *wakers = None;
            }
            let wakers = wakers.get_or_insert_with(|| Wakers::new(cx.waker()));
            if std::mem::take(&mut is_new) {
                wakers.begin();
            }
            wakers.poll(answer.as_mut(), |cx| {
                if *open && Pin::new(&mut *driver).poll(cx).is_ready() {
                    *open = false;
                }
                if *open { Poll::Pending } else { Poll::Ready(()) }
            })
        })
        .await;
        match result {
            Ok((answer, whole)) => {
                self.open &= whole;
                self.used = true;
                Ok(answer)
            }
            Err((error, unwritten)) => {
                self.open = false;
                let heard = self.heard.anything();
                Err(match (heard, unwritten) {
                    (false, true) => Broken::Unseen,
                    (false, false) if self.used => Broken::Stale,
                    _ => Broken::Failed(explain(&error, heard)),
                })
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

/// The error, and whether nothing of the request was written: hyper hands it back then.
fn unwritten(mut error: TrySendError<Request<Body>>) -> (hyper::Error, bool) {
    let unwritten = error.take_message().is_some();
    (error.into_error(), unwritten)
}

/// Why a request failed, in a few words.
fn explain(error: &hyper::Error, heard: bool) -> String {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>()
            && !matches!(io.kind(), std::io::ErrorKind::UnexpectedEof)
        {
            let in_answer = heard && io.kind() != std::io::ErrorKind::QuotaExceeded;
            return if in_answer { format!("{} in mid-answer", describe(io)) } else { describe(io) };
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
