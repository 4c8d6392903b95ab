//! What lapin connects with: tokio's sockets, each behind a [`Sieve`].

use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio, TokioRuntime};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::AsyncTcpStream;

use crate::intake::Intakes;
use crate::sieve::Sieve;

/// A connection with TLS or without, as it is before the sieve.
pub(crate) type Bare = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// The runtime of the caller, with connections that are sifted, and without.
pub(crate) fn runtimes() -> (Runtime<RuntimeParts<Tokio, Sifting>>, TokioRuntime) {
    let tokio = Tokio::current();
    let sifting = RuntimeParts::new(tokio.clone(), Sifting(tokio.clone()));
    (Runtime::new(sifting), Runtime::new(tokio))
}

/// Hands a connection over to lapin, its deliveries to `intakes`.
pub(crate) fn sifted(stream: Bare, intakes: Intakes) -> AsyncTcpStream<Sieve<Bare>> {
    AsyncTcpStream::Plain(Sieve::new(stream, intakes))
}

#[derive(Clone, Debug)]
pub(crate) struct Sifting(Tokio);

impl Reactor for Sifting {
    type TcpStream = Sieve<Bare>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        // lapin has no socket to register: it connects.
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(
        &self,
        _address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        // Connections are made by the link, which may have to encrypt them.
        ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
