//! From an endpoint to an open connection: resolve, check every address, connect, TLS.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Host;

use super::client::PushClient;
use super::connection::MAX_HEAD_BYTES;
use super::target::Target;
use crate::tls::MaybeTls;

/// Addresses of a name that are tried.
const MAX_ADDRESSES: usize = 16;
/// How long an address has to itself before the next one is tried beside it (RFC 8305).
const HEAD_START: Duration = Duration::from_millis(250);
/// How long to wait where this process has run out of sockets: no fault of the endpoint.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Bytes that are read of an HTTP/1 connection before the head of an answer is known: one as long as may be, what hyper
/// reads of a body ahead, and a few of 1xx.
const MAX_HEADLESS_BYTES: usize = 4 * MAX_HEAD_BYTES;

/// An open connection, and what was agreed on it.
pub(crate) struct Dialled {
    pub(crate) stream: Stream,
    pub(crate) heard: Heard,
    /// Whether HTTP/2 is spoken: agreed on, or known before.
    pub(crate) h2: bool,
}

/// Connects to `target`.
///
/// # Errors
///
/// Why not, in a few words.
pub(crate) async fn dial(client: &PushClient, target: &Target) -> Result<Dialled, String> {
    let addresses = resolve(client, target).await?;
    let stream = loop {
        match connect(&addresses).await {
            Ok(stream) => break stream,
            Err(error) if is_exhausted(&error) => tokio::time::sleep(EXHAUSTED_PAUSE).await,
            Err(error) => return Err(describe(&error)),
        }
    };
    // A request is one write; nothing is gained by waiting for more.
    let _ = stream.set_nodelay(true);
    let heard = Heard::default();
    let Some(name) = &target.tls else {
        return Ok(Dialled {
            stream: Stream { inner: MaybeTls::Plain(stream), heard: heard.clone() },
            heard,
            h2: target.h2,
        });
    };
    let connector = TlsConnector::from(client.tls().await?);
    let stream = connector.connect(name.clone(), stream).await.map_err(|error| format!("TLS: {}", describe(&error)))?;
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let stream = Stream { inner: MaybeTls::Tls(Box::new(stream)), heard: heard.clone() };
    Ok(Dialled { stream, heard, h2 })
}

/// The addresses that may be dialled: at least one, or the reason why not.
async fn resolve(client: &PushClient, target: &Target) -> Result<Vec<SocketAddr>, String> {
    let host = target.host.to_string();
    let check = |address: IpAddr| client.guard().check(&host, address).map_err(|error| error.message().to_owned());
    let literal = match &target.host {
        Host::Ipv4(address) => Some(IpAddr::from(*address)),
        Host::Ipv6(address) => Some(IpAddr::from(*address)),
        Host::Domain(_) => None,
    };
    if let Some(address) = literal {
        return check(address).map(|()| vec![SocketAddr::new(address, target.port)]);
    }
    let found = look_up(client, host.clone(), target.port)
        .await
        .map_err(|error| format!("{host} cannot be resolved: {}", describe(&error)))?;
    let mut refused = None;
    let mut allowed = Vec::new();
    for address in found {
        match check(address.ip()) {
            Ok(()) => allowed.push(address),
            Err(reason) => refused = refused.or(Some(reason)),
        }
    }
    if allowed.is_empty() {
        return Err(refused.unwrap_or_else(|| format!("{host} has no address")));
    }
    Ok(allowed)
}

/// The addresses of a name. The thread that looks it up may outlive the wait for it.
async fn look_up(client: &PushClient, host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let permit = client.lookup().await;
    let resolver = Arc::clone(client.resolver());
    let look_up = move || {
        let found = resolver.resolve(&host, port);
        drop(permit);
        found.map(|mut found| {
            found.truncate(MAX_ADDRESSES);
            found
        })
    };
    tokio::task::spawn_blocking(look_up).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The first of the addresses to answer; each has a head start on the next.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut waiting = addresses.iter();
    let mut trying = FuturesUnordered::new();
    let mut failure = None;
    loop {
        match waiting.next() {
            Some(address) => trying.push(TcpStream::connect(*address)),
            None if trying.is_empty() => {
                return Err(failure.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()));
            }
            None => {}
        }
        let outcome = if waiting.len() == 0 {
            trying.next().await
        } else {
            // The time is over: try the next beside it.
            tokio::time::timeout(HEAD_START, trying.next()).await.unwrap_or(None)
        };
        match outcome {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(error)) => failure = Some(failure.filter(|earlier| !is_no_way(earlier)).unwrap_or(error)),
            None => {}
        }
    }
}

/// Whether there is no way from here to an address at all: IPv6 where there is none. What another
/// address of the name says tells more.
fn is_no_way(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::NetworkUnreachable)
}

/// Whether this process or machine may open no more files (`EMFILE`, `ENFILE`).
fn is_exhausted(error: &io::Error) -> bool {
    cfg!(unix) && matches!(error.raw_os_error(), Some(23 | 24))
}

/// An I/O error in a few words, without the numbers of the operating system.
pub(crate) fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
        io::ErrorKind::ConnectionAborted => "connection aborted".to_owned(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => "connection closed".to_owned(),
        io::ErrorKind::HostUnreachable => "host unreachable".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
        io::ErrorKind::TimedOut => "the connection timed out".to_owned(),
        _ => error.to_string(),
    }
}

/// What was heard on a connection since a request began on it.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Since>);

#[derive(Default)]
struct Since {
    bytes: AtomicUsize,
    /// Whether the head of the answer is still to come.
    headless: AtomicBool,
}

impl Heard {
    /// A request begins: until its answer [has a head](Self::head) only so much is read.
    pub(crate) fn begin(&self) {
        self.0.bytes.store(0, Ordering::Relaxed);
        self.0.headless.store(true, Ordering::Relaxed);
    }

    pub(crate) fn head(&self) {
        self.0.headless.store(false, Ordering::Relaxed);
    }

    pub(crate) fn anything(&self) -> bool {
        self.0.bytes.load(Ordering::Relaxed) > 0
    }

    /// hyper bounds a head, and not how many answers of 1xx come before it: a core has enough to do with them.
    fn check(&self) -> io::Result<()> {
        if self.0.headless.load(Ordering::Relaxed) && self.0.bytes.load(Ordering::Relaxed) >= MAX_HEADLESS_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "the endpoint sends 1xx without end, and no answer",
            ));
        }
        Ok(())
    }
}

/// A connection that notices what comes back on it.
pub(crate) struct Stream {
    inner: MaybeTls,
    heard: Heard,
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.heard.check()?;
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.heard.0.bytes.fetch_add(buf.filled().len() - before, Ordering::Relaxed);
        poll
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
