//! A connection that comes back: one loop makes it, watches it, and makes it again.
//!
//! lapin's own recovery is not used: what must be replayed (topology, consumers, unconfirmed publishes)
//! is known above, and so is the order.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{Error, Result};
use futures_util::StreamExt;
use lapin::protocol::AMQPErrorKind;
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::types::LongString;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{Connection, ConnectionProperties, Event};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::AmqpOptions;
use crate::advice::advised;
use crate::channel::OwnChannel;
use crate::error::{from_lapin, is_final};
use crate::intake::Intakes;
use crate::reactor::{runtimes, sifted};

/// Channels that the server closed on a connection after which it is replaced: lapin (4.12) gives the number of such a
/// channel to no other, and RabbitMQ has 2,047 of them for a connection.
const WORN: usize = 1_000;

/// A connection that stands.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) connection: Arc<Connection>,
    socket: Socket,
    /// Who takes the deliveries of its channels.
    pub(crate) intakes: Intakes,
    /// Channels that the server has closed.
    closed: Arc<AtomicUsize>,
}

impl Live {
    /// Whether it is of any use still.
    pub(crate) fn is_up(&self) -> bool {
        self.connection.status().connected()
    }

    /// A channel.
    ///
    /// lapin (4.12) keeps what the server closed a channel for under the channel's number, and fails whoever is given
    /// that number next with it. The number is of no use from then on, so that another one is tried.
    pub(crate) async fn channel(&self) -> Result<OwnChannel> {
        loop {
            match self.connection.create_channel().await {
                Ok(channel) => return Ok(OwnChannel::new(channel, self.clone())),
                // Each time there is one number less, so that this ends. Whoever opens channels otherwise than to ask
                // learns here alone that some are lost.
                Err(error) if of_another(&error) && self.is_up() => self.wear(),
                Err(error) if matches!(error.kind(), lapin::ErrorKind::ChannelsLimitReached) => {
                    if self.is_worn() {
                        // There are numbers enough on a new one.
                        self.kill();
                    }
                    return Err(Error::unavailable(
                        "the connection has as many channels as RabbitMQ allows one (channel_max): raise that, or take \
                         another broker value for more subscriptions",
                    ));
                }
                Err(error) => return Err(from_lapin(error)),
            }
        }
    }

    /// The server has closed one of its channels, or a number is found that is of no use since it did.
    pub(crate) fn wear(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    fn is_worn(&self) -> bool {
        self.closed.load(Ordering::Relaxed) >= WORN
    }

    /// Closes it once nobody uses it.
    async fn retire(self, closed: CancellationToken) {
        while Arc::strong_count(&self.connection) > 1 && self.is_up() {
            tokio::select! {
                () = closed.cancelled() => break,
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
        let _ = timeout(GOODBYE, self.connection.close(200, "OK".into())).await;
        self.kill();
    }

    /// Breaks it at once, whatever it is waiting for.
    pub(crate) fn kill(&self) {
        self.socket.shutdown();
    }
}

/// How long a connection may take to be closed that nobody uses.
const GOODBYE: Duration = Duration::from_secs(5);

/// Whether an error is none of a channel that is opened: the server refuses no such thing, but what others do.
fn of_another(error: &lapin::Error) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(said) => matches!(said.kind(), AMQPErrorKind::Soft(_)),
        lapin::ErrorKind::InvalidChannelState(..) => true,
        _ => false,
    }
}

/// A second handle on the connection's socket, since lapin's own waits cannot be cut short.
#[derive(Clone, Default)]
struct Socket(Arc<Mutex<Option<std::net::TcpStream>>>);

impl Socket {
    fn shutdown(&self) {
        if let Some(socket) = self.0.lock().take() {
            // Gone already is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(unix)]
fn duplicate(socket: &impl std::os::fd::AsFd) -> std::io::Result<std::net::TcpStream> {
    socket.as_fd().try_clone_to_owned().map(Into::into)
}

#[cfg(windows)]
fn duplicate(socket: &impl std::os::windows::io::AsSocket) -> std::io::Result<std::net::TcpStream> {
    socket.as_socket().try_clone_to_owned().map(Into::into)
}

#[derive(Clone, Default)]
pub(crate) struct LinkState {
    pub(crate) live: Option<Live>,
    /// How often every host was tried in vain.
    failures: u64,
    pub(crate) last_error: Option<Error>,
    /// Why the server takes nothing from publishers, while it does not.
    pub(crate) blocked: Option<String>,
}

/// Why a connection is made anew.
enum End {
    Lost(Error),
    /// It stands, and is replaced.
    Worn,
}

/// One connection of a broker's three.
pub(crate) struct Link {
    /// What it is for, as the server's listing shows it.
    purpose: &'static str,
    /// Whether another takes its place once it is worn: nothing on it lasts.
    is_replaced: bool,
    /// Whether its loop was started.
    is_run: AtomicBool,
    options: Arc<AmqpOptions>,
    state: watch::Sender<LinkState>,
    closed: CancellationToken,
}

impl Link {
    pub(crate) fn new(purpose: &'static str, options: Arc<AmqpOptions>, closed: CancellationToken) -> Self {
        let state = watch::Sender::new(LinkState::default());
        Self { purpose, is_replaced: false, is_run: AtomicBool::new(false), options, state, closed }
    }

    /// The same, for what does not last: it is replaced before the server has closed too many of its channels.
    pub(crate) fn replaced(mut self) -> Self {
        self.is_replaced = true;
        self
    }

    pub(crate) fn state(&self) -> LinkState {
        self.state.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// The connection, as soon as it stands. With `patient` false, the first round of failures ends
    /// the wait.
    ///
    /// # Errors
    ///
    /// Why there is none, at the deadline at the latest.
    pub(crate) async fn live(&self, deadline: Instant, patient: bool) -> Result<Live> {
        let mut state = self.state.subscribe();
        let failures = state.borrow().failures;
        let ready = |state: &LinkState| {
            let failed = state.failures > failures && !patient;
            let hopeless = state.last_error.as_ref().is_some_and(is_final) && state.failures > failures;
            state.live.is_some() || failed || hopeless
        };
        let waited = tokio::select! {
            () = self.closed.cancelled() => return Err(closed()),
            waited = timeout_at(deadline, state.wait_for(ready)) => waited,
        };
        let state = match waited {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => return Err(closed()),
            Err(_) => self.state(),
        };
        state
            .live
            .ok_or_else(|| state.last_error.unwrap_or_else(|| Error::timeout("the connection did not stand in time")))
    }

    /// The connection, which nobody needed before the first to ask.
    ///
    /// # Errors
    ///
    /// As [`live`](Self::live), which is not patient here, and waits as long as connecting may take.
    pub(crate) async fn on_demand(self: &Arc<Self>, runtime: &Handle) -> Result<Live> {
        if !self.is_run.swap(true, Ordering::AcqRel) {
            runtime.spawn(Arc::clone(self).run());
        }
        self.live(Instant::now() + self.options.connect_timeout, false).await
    }

    /// Makes the connection, and again, until the broker closes.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut made = 0;
        let mut wait = Wait::new(self.options.max_reconnect_wait);
        let mut worn: Option<Live> = None;
        while !self.closed.is_cancelled() {
            match self.connect_any(made).await {
                Ok(live) => {
                    made += 1;
                    wait.reset();
                    let events = live.connection.events_listener();
                    self.state.send_modify(|state| {
                        state.live = Some(live.clone());
                        state.last_error = None;
                        state.blocked = None;
                    });
                    if let Some(worn) = worn.take() {
                        tokio::spawn(worn.retire(self.closed.clone()));
                    }
                    match self.end(&live, events).await {
                        End::Worn => {
                            tracing::debug!(
                                purpose = self.purpose,
                                "a connection has had its channels; it is replaced"
                            );
                            worn = Some(live);
                        }
                        End::Lost(error) => {
                            live.kill();
                            if self.closed.is_cancelled() {
                                break;
                            }
                            tracing::warn!(
                                purpose = self.purpose, %error,
                                "the connection to RabbitMQ is lost; it is made again"
                            );
                            self.state.send_modify(|state| {
                                state.live = None;
                                state.last_error = Some(error);
                            });
                        }
                    }
                }
                Err(error) => {
                    let wait = wait.next();
                    tracing::debug!(purpose = self.purpose, %error, ?wait, "RabbitMQ is not reached");
                    self.state.send_modify(|state| {
                        state.failures += 1;
                        state.last_error = Some(error);
                    });
                    tokio::select! {
                        () = self.closed.cancelled() => break,
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
        if let Some(live) = self.state().live {
            live.kill();
        }
        self.state.send_modify(|state| state.live = None);
    }

    /// Waits until the connection is of no more use, and tells why.
    async fn end(&self, live: &Live, events: impl futures_util::Stream<Item = Event>) -> End {
        let mut events = std::pin::pin!(events);
        loop {
            if live.is_worn() && self.is_replaced {
                return End::Worn;
            }
            let event = tokio::select! {
                () = self.closed.cancelled() => return End::Lost(closed()),
                // An event lost would be a connection lost unseen.
                event = timeout(Duration::from_secs(1), events.next()) => event,
            };
            match event {
                Ok(Some(Event::ConnectionBlocked(reason))) => {
                    tracing::warn!(%reason, "RabbitMQ blocks publishers");
                    self.state.send_modify(|state| state.blocked = Some(reason));
                }
                Ok(Some(Event::ConnectionUnblocked)) => self.state.send_modify(|state| state.blocked = None),
                // A channel's error comes this way as well; the connection then still stands.
                Ok(Some(Event::Error(error))) if !live.is_up() => return End::Lost(from_lapin(error)),
                Ok(None) => return End::Lost(Error::unavailable("the connection is lost")),
                _ if !live.is_up() => return End::Lost(Error::unavailable("the connection is lost")),
                _ => {}
            }
        }
    }

    /// Tries the hosts in turn, another one first each time.
    async fn connect_any(&self, first: usize) -> Result<Live> {
        let hosts = &self.options.hosts;
        let mut last = None;
        for (host, port) in hosts.iter().cycle().skip(first % hosts.len().max(1)).take(hosts.len()) {
            let socket = Socket::default();
            let connecting = timeout(self.options.connect_timeout, self.connect(host, *port, socket.clone()));
            let connected = tokio::select! {
                () = self.closed.cancelled() => Ok(Err(closed())),
                connected = connecting => connected,
            };
            let error = match connected {
                Ok(Ok(live)) => return Ok(live),
                Ok(Err(error)) => error,
                Err(_) => Error::timeout(format!("no answer within {:?}", self.options.connect_timeout)),
            };
            // What lapin is still waiting for on it would never end.
            socket.shutdown();
            let error = advised(error, host, &self.options).context(format_args!("{host}:{port}"));
            // A host that says no says more than one that is not there.
            if last.as_ref().is_none_or(|last| !is_final(last)) {
                last = Some(error);
            }
        }
        Err(last.unwrap_or_else(|| Error::unavailable("no host is given")))
    }

    async fn connect(&self, host: &str, port: u16, socket: Socket) -> Result<Live> {
        let options = &self.options;
        let uri = AMQPUri {
            scheme: if options.tls { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo { username: options.username.clone(), password: options.password.clone() },
                host: host.to_owned(),
                port,
            },
            vhost: options.vhost.clone(),
            query: AMQPQueryString {
                heartbeat: Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX)),
                ..AMQPQueryString::default()
            },
        };
        let tls = if options.tls { tls_config(options).await? } else { OwnedTLSConfig::default() };
        let name = format!("{} ({})", options.service, self.purpose);
        let properties = ConnectionProperties::default()
            .with_connection_name(LongString::from(name))
            .with_client_property("product".into(), "broker-amqp".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        let secure = options.tls;
        let (runtime, bare_runtime) = runtimes();
        let intakes = Intakes::default();
        let live = (socket.clone(), intakes.clone());
        let connect = async move |uri: AMQPUri, _| -> lapin::Result<_> {
            // The bare connection first, since encryption hides the socket.
            let bare = AMQPUri { scheme: AMQPScheme::AMQP, ..uri };
            let stream = bare.connect_async(&bare_runtime).await?;
            if let AsyncTcpStream::Plain(plain) = &stream {
                *socket.0.lock() = Some(duplicate(plain.get_ref())?);
            }
            let host = &bare.authority.host;
            let stream = if secure { stream.into_tls(host, tls.as_ref()).await? } else { stream };
            Ok(sifted(stream, intakes.clone()))
        };
        let connection = Connection::connector(uri, runtime, connect, properties).await.map_err(from_lapin)?;
        let (socket, intakes) = live;
        Ok(Live { connection: Arc::new(connection), socket, intakes, closed: Arc::default() })
    }

    /// Says goodbye, for `patience` at most.
    pub(crate) async fn goodbye(&self, patience: Duration) {
        let Some(live) = self.state().live else { return };
        let closing = live.connection.close(200, "OK".into());
        let _ = timeout(patience, closing).await;
        live.kill();
    }
}

async fn tls_config(options: &AmqpOptions) -> Result<OwnedTLSConfig> {
    let read = |path: std::path::PathBuf| {
        tokio::task::spawn_blocking(move || {
            std::fs::read(&path).map_err(|error| Error::invalid(format!("{} cannot be read: {error}", path.display())))
        })
    };
    let load = async |path: &Option<std::path::PathBuf>| match path {
        Some(path) => read(path.clone()).await.map_err(|_| closed())?.map(Some),
        None => Ok(None),
    };
    let cert_chain = match load(&options.ca).await? {
        Some(pem) => Some(String::from_utf8(pem).map_err(|_| Error::invalid("the ca file is no PEM"))?),
        None => None,
    };
    let identity = load(&options.cert).await?.zip(load(&options.key).await?);
    Ok(OwnedTLSConfig { identity: identity.map(|(pem, key)| OwnedIdentity::PKCS8 { pem, key }), cert_chain })
}

pub(crate) fn closed() -> Error {
    Error::closed("the broker is closed")
}

/// Waits between tries: doubling up to a cap, and at random between half and whole.
pub(crate) struct Wait {
    next: Duration,
    max: Duration,
}

impl Wait {
    pub(crate) fn new(max: Duration) -> Self {
        Self { next: Duration::from_millis(50).min(max), max }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.max);
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_vary() {
        let max = Duration::from_secs(1);
        let mut wait = Wait::new(max);
        let waits: Vec<_> = (0..20).map(|_| wait.next()).collect();
        assert!(waits.iter().all(|wait| *wait <= max));
        assert!(waits.iter().skip(10).all(|wait| *wait >= max / 2));
        wait.reset();
        assert!(wait.next() <= Duration::from_millis(50));
    }
}
