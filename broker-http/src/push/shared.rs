//! One connection that all requests to an endpoint share: HTTP/2.
//!
//! It is h2's own and not hyper's, which hands requests to the connection's task over a queue: what came in while the
//! endpoint ended the connection could stay in that queue, unanswered until its time was over, and one that was being
//! written then was said to have failed like one that was never sent. Here whoever sends opens the stream.

use std::io;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderValue, Request, Response, Version};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::client::Place;
use super::connection::{Broken, Content, MAX_HEAD_BYTES};
use super::dial::{Stream, describe};
use super::target::Target;
use super::verdict::Answer;

/// Bytes of one answer's body, and of all answers at a time, that may be on their way.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// How long the end of a connection may take that nobody uses any more: an endpoint that reads nothing would never let
/// it come.
const PARTING: Duration = Duration::from_secs(2);

/// A share in the connection, which ends with the last one.
#[derive(Clone)]
pub(crate) struct Shared {
    send: SendRequest<Bytes>,
    used: bool,
    _wanted: Arc<DropGuard>,
}

impl Shared {
    /// Begins to speak HTTP/2 on `stream`, which has `place` until it is closed.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(crate) async fn over(stream: Stream, place: Place) -> Result<Self, String> {
        let (send, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .handshake(stream)
            .await
            .map_err(|error| explain(&error, "without an answer"))?;
        let unwanted = CancellationToken::new();
        let wanted = Arc::new(unwanted.clone().drop_guard());
        tokio::spawn(async move {
            tokio::select! {
                // Whoever has a request on it learns how it ended.
                _ = connection => {}
                () = async { unwanted.cancelled().await; tokio::time::sleep(PARTING).await } => {}
            }
            drop(place);
        });
        Ok(Self { send, used: false, _wanted: wanted })
    }

    /// As one more request has it.
    pub(crate) fn again(&self) -> Self {
        Self { used: true, ..self.clone() }
    }

    /// Whether it can take another request.
    pub(crate) fn is_open(&self) -> bool {
        let ready = self.send.clone().poll_ready(&mut Context::from_waker(Waker::noop()));
        !matches!(ready, std::task::Poll::Ready(Err(_)))
    }

    pub(crate) async fn exchange(&mut self, content: Content, target: &Target) -> Result<Answer, Broken> {
        let used = std::mem::replace(&mut self.used, true);
        let Content { method, mut headers, body, answer_bytes } = content;
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = target.absolute.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = headers;
        let mut send = self.send.clone().ready().await.map_err(|error| unsent(&error))?;
        let (response, mut stream) = send.send_request(request, body.is_empty()).map_err(|error| unsent(&error))?;
        if !body.is_empty() {
            // As much goes at a time as the endpoint gives room for. Should the stream have ended, the answer says so.
            let _ = stream.send_data(body, true);
        }
        let response = response.await.map_err(|error| {
            // GOAWAY comes to a stream as an error only where it is above the last one that the endpoint took.
            let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
            match error.is_remote() && (error.is_go_away() || refused) {
                true => Broken::Unseen,
                // Its own end is an answer of a kind; the connection goes on.
                false if used && !error.is_reset() => Broken::Stale,
                false => Broken::Failed(explain(&error, "without an answer")),
            }
        })?;
        read(response, answer_bytes).await.map_err(|error| Broken::Failed(explain(&error, "in mid-answer")))
    }
}

/// Why a request has no stream.
fn unsent(error: &h2::Error) -> Broken {
    match error.is_io() || error.is_go_away() {
        // The connection has ended.
        true => Broken::Unseen,
        false => Broken::Failed(explain(error, "without an answer")),
    }
}

/// The answer, its body up to so many bytes.
async fn read(response: Response<RecvStream>, most: usize) -> Result<Answer, h2::Error> {
    let (head, mut body) = response.into_parts();
    let mut answer = Answer { status: head.status.as_u16(), headers: head.headers, body: Vec::new() };
    while let Some(data) = body.data().await {
        let data = match data {
            Ok(data) => data,
            // The endpoint has said what it had to say.
            Err(error) if matches!(error.reason(), Some(Reason::NO_ERROR | Reason::CANCEL)) => break,
            Err(error) => return Err(error),
        };
        let room = most - answer.body.len();
        answer.body.extend(data.iter().take(room));
        if data.len() > room {
            break;
        }
        let _ = body.flow_control().release_capacity(data.len());
    }
    Ok(answer)
}

/// Why a request failed, in a few words; `when` it did.
fn explain(error: &h2::Error, when: &str) -> String {
    match error.get_io() {
        Some(io) if matches!(io.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof) => {
            format!("connection closed {when}")
        }
        Some(io) => format!("{} {when}", describe(io)),
        None => format!("HTTP/2: {error}"),
    }
}
