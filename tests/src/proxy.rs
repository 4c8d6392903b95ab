//! A scripted TCP proxy: what a network does to a connection, on command.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What the proxy does to every connection, those that stand included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: bytes pass.
    #[default]
    None,
    /// New connections are reset.
    Refuse,
    /// Connections are taken and kept; no byte passes in either direction until this is over.
    Stall,
    /// Every chunk of bytes waits so long.
    Delay(Duration),
    /// The server's side is gone and the client is not told: what it sends disappears.
    HalfOpen,
    /// After so many bytes of answers, the connection is reset.
    CutAnswer(usize),
}

/// A proxy on a loopback port of its own, in front of one server. Dropping it resets every connection.
///
/// ```
/// # #[tokio::main] async fn main() -> std::io::Result<()> {
/// use broker_tests::{Fault, Proxy};
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// let server = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let proxy = Proxy::start(server.local_addr()?.to_string()).await?;
/// let mut client = tokio::net::TcpStream::connect(proxy.address()).await?;
/// let (mut peer, _) = server.accept().await?;
/// peer.write_all(b"hello").await?;
/// assert_eq!(client.read(&mut [0; 16]).await?, 5);
/// proxy.cut();
/// assert!(matches!(client.read(&mut [0; 16]).await, Ok(0) | Err(_)));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _ended: DropGuard,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    fault: watch::Sender<Fault>,
    cuts: watch::Sender<u64>,
    accepted: AtomicU64,
}

impl Proxy {
    /// Starts one in front of `upstream` (`host:port`), which need not be there yet.
    ///
    /// # Errors
    ///
    /// If no port can be had.
    pub async fn start(upstream: impl Into<String>) -> std::io::Result<Self> {
        Self::start_at("127.0.0.1:0", upstream).await
    }

    /// Starts one that listens on `address`, for servers that tell their clients where to come back to.
    ///
    /// # Errors
    ///
    /// If the address cannot be had.
    pub async fn start_at(address: &str, upstream: impl Into<String>) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            fault: watch::Sender::new(Fault::None),
            cuts: watch::Sender::new(0),
            accepted: AtomicU64::new(0),
        });
        let ended = CancellationToken::new();
        tokio::spawn(accept(listener, Arc::clone(&shared), ended.clone()));
        Ok(Self { address, shared, _ended: ended.drop_guard() })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections taken so far, refused ones included.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// From now on does this to every connection.
    pub fn set(&self, fault: Fault) {
        self.shared.fault.send_replace(fault);
    }

    /// Resets every connection that stands.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, ended: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = ended.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((client, _)) = accepted else {
            // Out of descriptors, most likely: a moment later there are some.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        shared.accepted.fetch_add(1, Ordering::SeqCst);
        let (shared, ended) = (Arc::clone(&shared), ended.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = serve(client, &shared) => {}
            }
        });
    }
}

/// Closing then sends a reset, not an orderly end.
fn abort_on_close(stream: &TcpStream) {
    // Where this cannot be set the end is orderly, which a client must bear as well.
    let _ = stream.set_zero_linger();
    let _ = stream.set_nodelay(true);
}

async fn serve(client: TcpStream, shared: &Shared) {
    abort_on_close(&client);
    let mut cuts = shared.cuts.subscribe();
    let mut fault = shared.fault.subscribe();
    if *fault.borrow() == Fault::Refuse {
        return;
    }
    let cut = async { drop(cuts.changed().await) };
    let relayed = async {
        // A stalled connection is taken, and its server not even called.
        let _ = fault.wait_for(|fault| *fault != Fault::Stall).await;
        let Ok(server) = TcpStream::connect(&shared.upstream).await else { return };
        abort_on_close(&server);
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            () = relay(from_client, to_server, shared, false) => {}
            () = relay(from_server, to_client, shared, true) => {}
        }
    };
    tokio::select! {
        () = cut => {}
        () = relayed => {}
    }
}

/// Passes bytes on until one side ends; `answers` says that they come from the server.
async fn relay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared, answers: bool) {
    let mut fault = shared.fault.subscribe();
    let mut buffer = vec![0; 16 * 1024];
    let mut passed = 0;
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(count) if count > 0 => count,
            // The server's end is not told to the client of a half-open connection.
            _ if answers && *fault.borrow() == Fault::HalfOpen => std::future::pending().await,
            _ => return,
        };
        let Ok(now) = fault.wait_for(|fault| *fault != Fault::Stall).await.map(|fault| *fault) else { return };
        let mut count = count;
        match now {
            Fault::None | Fault::Stall | Fault::Refuse => {}
            Fault::Delay(time) => tokio::time::sleep(time).await,
            Fault::HalfOpen => continue,
            Fault::CutAnswer(most) if answers => {
                count = count.min(most.saturating_sub(passed));
                passed += count;
            }
            Fault::CutAnswer(_) => {}
        }
        let sent = to.write_all(buffer.get(..count).unwrap_or_default()).await;
        let cut = matches!(now, Fault::CutAnswer(most) if answers && passed >= most);
        if sent.is_err() || cut {
            return;
        }
    }
}
