//! One HTTP/1.1 connection, driven by the task that has a request on it: no task and no wake-up
//! between the two.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::link::{Link, LinkState};
use crate::tls::MaybeTls;

/// How long an answer may still take once we have said goodbye.
const PARTING: Duration = Duration::from_secs(2);

/// Header fields of an answer at most.
const MAX_HEADERS: usize = 64;
/// Bytes of an answer's head at most.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// A connection to the daemon, with nothing under way.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Gone when it has ended: only its going tells a request that waits in its queue.
    driver: Option<Driver>,
    link: Arc<LinkState>,
    /// Whether the driver has ended, and with it the connection.
    ended: bool,
    /// Whether it has carried a request before.
    pub(super) kept: bool,
    pub(super) idle_since: Instant,
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Whether the request may have been seen before, on a connection that was lost: then this is what became of it the
    /// second time.
    pub(crate) repeated: bool,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Broken {
    /// The connection failed before anything of the request was written.
    Unsent { source: hyper::Error },
    /// The connection failed; `answered` if a part of the answer had come in.
    Lost { answered: bool, source: hyper::Error },
    /// The answer is longer than was allowed for.
    TooLong,
    /// We have said goodbye, and the daemon did not answer in a while.
    Parted,
}

type Driver = Pin<Box<http1::Connection<TokioIo<Link>, Full<Bytes>>>>;

impl Connection {
    /// Connects; speaks TLS if there is a connector for it and the name to expect.
    pub(super) async fn open(
        authority: &str,
        tls: Option<(TlsConnector, ServerName<'static>)>,
    ) -> std::io::Result<Self> {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        Self::over(match tls {
            Some((connector, name)) => MaybeTls::Tls(Box::new(connector.connect(name, stream).await?)),
            None => MaybeTls::Plain(stream),
        })
        .await
    }

    /// Connects to a Unix socket of this machine.
    #[cfg(unix)]
    pub(super) async fn open_unix(path: &std::path::Path) -> std::io::Result<Self> {
        Self::over(MaybeTls::Unix(tokio::net::UnixStream::connect(path).await?)).await
    }

    async fn over(stream: MaybeTls) -> std::io::Result<Self> {
        let (link, state) = Link::new(stream);
        let (sender, driver) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(link))
            .await
            .map_err(std::io::Error::other)?;
        let driver = Some(Box::pin(driver));
        Ok(Self { sender, driver, link: state, ended: false, kept: false, idle_since: Instant::now() })
    }

    /// Whether another request can be tried on it; takes note of what came in while nobody looked.
    pub(super) fn look(&mut self) -> bool {
        drive(&mut self.driver, &mut self.ended, &mut Context::from_waker(Waker::noop()));
        self.is_open()
    }

    /// Whether another request can be tried on it.
    pub(super) fn is_open(&self) -> bool {
        !self.ended && !self.sender.is_closed()
    }

    /// Sends a request and reads the answer, `limit` bytes of body at most. When `finish` is
    /// cancelled our side is closed, and what the daemon had answered by then still counts.
    pub(super) async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
        limit: usize,
        finish: Option<&CancellationToken>,
    ) -> Result<Answer, Broken> {
        let before = self.link.received();
        let link = Arc::clone(&self.link);
        let Self { sender, driver, ended, .. } = self;
        let work = async {
            sender.ready().await.map_err(Failed::Unsent)?;
            let response = sender.try_send_request(request).await.map_err(|mut error| {
                // Nothing was written of what comes back.
                match error.take_message() {
                    Some(_) => Failed::Unsent(error.into_error()),
                    None => Failed::Hyper(error.into_error()),
                }
            })?;
            let (parts, body) = response.into_parts();
            let body = collect(body, limit).await?;
            Ok(Answer { status: parts.status, headers: parts.headers, body, repeated: false })
        };
        let mut work = pin!(work);
        let mut driven = pin!(poll_fn(|cx| {
            // What the work has to send, the driver sends in the same poll; what the driver
            // reads, the work gets in the same poll.
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            drive(driver, ended, cx);
            let done = work.as_mut().poll(cx);
            // Let the driver see that the answer was read: it knows whether the daemon closes now.
            if done.is_ready() {
                drive(driver, ended, cx);
            }
            done
        }));
        let result = match finish {
            None => Some(driven.await),
            Some(finish) => tokio::select! {
                biased;
                result = &mut driven => Some(result),
                () = finish.cancelled() => {
                    link.finish();
                    tokio::time::timeout(PARTING, driven).await.ok()
                }
            },
        };
        if finish.is_some_and(CancellationToken::is_cancelled) {
            self.ended = true;
        }
        match result {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(Failed::TooLong)) => {
                self.ended = true;
                Err(Broken::TooLong)
            }
            Some(Err(Failed::Unsent(source))) => {
                self.ended = true;
                Err(Broken::Unsent { source })
            }
            Some(Err(Failed::Hyper(source))) => {
                self.ended = true;
                Err(Broken::Lost { answered: self.link.received() > before, source })
            }
            None => Err(Broken::Parted),
        }
    }
}

fn drive(driver: &mut Option<Driver>, ended: &mut bool, cx: &mut Context<'_>) {
    if driver.as_mut().is_some_and(|driver| driver.as_mut().poll(cx).is_ready()) {
        *driver = None;
        *ended = true;
    }
}

enum Failed {
    Unsent(hyper::Error),
    Hyper(hyper::Error),
    TooLong,
}

async fn collect(mut body: Incoming, limit: usize) -> Result<Bytes, Failed> {
    if body.size_hint().lower() > limit as u64 {
        return Err(Failed::TooLong);
    }
    let expected = usize::try_from(body.size_hint().lower()).unwrap_or(limit);
    let mut first = Bytes::new();
    let mut collected = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(Failed::Hyper)?.into_data() else { continue };
        if first.len() + collected.len() + data.len() > limit {
            return Err(Failed::TooLong);
        }
        // Most answers are one piece, which is then not copied together.
        if first.is_empty() && collected.is_empty() {
            first = data;
            continue;
        }
        if collected.is_empty() {
            collected.reserve(expected.max(first.len() + data.len()));
            collected.extend_from_slice(&std::mem::take(&mut first));
        }
        collected.extend_from_slice(&data);
    }
    Ok(if collected.is_empty() { first } else { collected.freeze() })
}
