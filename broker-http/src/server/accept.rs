//! Accepting connections, also where no descriptor is left for one.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use super::metrics::{Metrics, Refusal};

/// How long is waited after a failure: descriptors are given back by those who are served meanwhile.
const PAUSE: Duration = Duration::from_millis(50);

/// The log has one line in so long of it.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Where connections come from.
pub(crate) trait Accept: Send + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, and the address at its other end: none on this machine's own sockets.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Io, Option<IpAddr>)>> + Send;
}

impl Accept for TcpListener {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        let (stream, address) = Self::accept(self).await?;
        // An answer is small: waiting for more of it helps nobody.
        let _ = stream.set_nodelay(true);
        Ok((stream, Some(address.ip())))
    }
}

#[cfg(unix)]
impl Accept for tokio::net::UnixListener {
    type Io = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Io, Option<IpAddr>)> {
        Ok((Self::accept(self).await?.0, None))
    }
}

/// A connection.
pub(crate) enum Accepted<S> {
    /// To be served.
    One(S, Option<IpAddr>),
    /// Taken with the last descriptor, to be told that there is no other.
    Beyond(S),
}

/// A listener that goes on whatever happens.
pub(crate) struct Accepting<L> {
    listener: L,
    /// A descriptor to let go of where there is no other: with it whoever waits is told, instead of
    /// hanging in the kernel's queue.
    spare: Option<File>,
    told: Option<Instant>,
}

impl<L: Accept> Accepting<L> {
    pub(crate) fn new(listener: L) -> Self {
        Self { listener, spare: spare(), told: None }
    }

    pub(crate) async fn next(&mut self, metrics: &Metrics) -> Accepted<L::Io> {
        loop {
            let error = match self.listener.accept().await {
                Ok((stream, address)) => return Accepted::One(stream, address),
                Err(error) if is_the_peers(&error) => continue,
                Err(error) => error,
            };
            metrics.refused(Refusal::Descriptors);
            if self.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
                self.told = Some(Instant::now());
                tracing::error!(%error, "connections cannot be accepted; raise the number of open files (ulimit -n)");
            }
            if self.spare.take().is_some()
                // Whoever waited may be gone.
                && let Ok(Ok((stream, _))) = timeout(PAUSE, self.listener.accept()).await
            {
                return Accepted::Beyond(stream);
            }
            sleep(PAUSE).await;
            self.spare = spare();
        }
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Whether the connection alone failed, before it was accepted.
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::DuplexStream;

    use super::*;

    /// Fails so often, then has a connection.
    struct Failing(AtomicUsize, io::ErrorKind);

    impl Accept for Failing {
        type Io = DuplexStream;

        async fn accept(&self) -> io::Result<(DuplexStream, Option<IpAddr>)> {
            match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)) {
                Ok(_) => Err(self.1.into()),
                Err(_) => Ok((tokio::io::duplex(1).0, None)),
            }
        }
    }

    fn counted(metrics: &Metrics) -> u64 {
        let text = metrics.render(Default::default(), &[], None);
        let line = "broker_refused_total{reason=\"descriptors\"} ";
        text.lines().find_map(|have| have.strip_prefix(line)).unwrap().parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_counted_and_tried_again_after_a_pause() {
        let metrics = Metrics::default();
        // Once without a spare descriptor, then twice a round.
        let mut accepting = Accepting::new(Failing(AtomicUsize::new(21), io::ErrorKind::Other));
        accepting.spare = None;
        let begun = Instant::now();
        assert!(matches!(accepting.next(&metrics).await, Accepted::One(..)));
        assert_eq!(counted(&metrics), 11);
        assert!(begun.elapsed() >= PAUSE * 11, "it spins");
        assert!(accepting.spare.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn with_the_spare_descriptor_one_is_told() {
        let metrics = Metrics::default();
        let mut accepting = Accepting::new(Failing(AtomicUsize::new(1), io::ErrorKind::Other));
        assert!(matches!(accepting.next(&metrics).await, Accepted::Beyond(_)));
        assert_eq!(counted(&metrics), 1);
        assert!(accepting.spare.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_peer_broke_off_waits_for_nothing() {
        let metrics = Metrics::default();
        let mut accepting = Accepting::new(Failing(AtomicUsize::new(20), io::ErrorKind::ConnectionAborted));
        let begun = Instant::now();
        assert!(matches!(accepting.next(&metrics).await, Accepted::One(..)));
        assert_eq!((counted(&metrics), begun.elapsed()), (0, Duration::ZERO));
    }
}
