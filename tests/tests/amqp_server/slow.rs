//! A server that is slow to declare, as one whose quorum of nodes is: a proxy that knows frames, and keeps a channel's
//! from its first declaration on. It can repeat itself as well.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// No queue has this name; basic.consume is 60.20.
const CONSUMERS: &str = "\0";

/// Dropping it resets every connection.
pub(crate) struct Slow {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

struct Shared {
    upstream: &'static str,
    /// Declarations of queues whose names begin so are kept.
    prefix: watch::Sender<Option<String>>,
    /// Whether cancelled consumers are confirmed twice.
    stutters: AtomicBool,
    /// How many are kept.
    kept: watch::Sender<usize>,
    accepted: AtomicUsize,
}

impl Slow {
    pub(crate) async fn start(upstream: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            upstream,
            prefix: watch::Sender::new(None),
            kept: watch::Sender::new(0),
            stutters: AtomicBool::new(false),
            accepted: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            // They end with this.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                serving.accepted.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(client, Arc::clone(&serving)));
            }
        });
        Self { address, shared, accepting }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Connections taken so far.
    pub(crate) fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Keeps declarations of queues whose names begin so, and what follows them on their channels.
    pub(crate) fn keep(&self, prefix: &str) {
        self.shared.prefix.send_replace(Some(prefix.to_owned()));
    }

    /// From now on confirms twice that a consumer is cancelled.
    pub(crate) fn stutter(&self) {
        self.shared.stutters.store(true, Ordering::SeqCst);
    }

    /// Keeps whoever is to consume.
    pub(crate) fn keep_consumers(&self) {
        self.shared.prefix.send_replace(Some(CONSUMERS.to_owned()));
    }

    /// Passes on what was kept, and keeps no more.
    pub(crate) fn release(&self) {
        self.shared.prefix.send_replace(None);
    }

    /// Waits until so many declarations are kept.
    pub(crate) async fn kept(&self, count: usize) {
        self.shared.kept.subscribe().wait_for(|kept| *kept >= count).await.unwrap();
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let Ok(server) = TcpStream::connect(shared.upstream).await else { return };
    for socket in [&client, &server] {
        socket.set_nodelay(true).unwrap();
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        _ = pass(from_client, to_server, &shared) => {}
        _ = answer(from_server, to_client, &shared) => {}
    }
}

async fn pass(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, shared: &Shared) -> std::io::Result<()> {
    let mut prefix = shared.prefix.subscribe();
    let (mut read, mut kept, mut channels) = (vec![0; 8], Vec::new(), BTreeSet::new());
    // The protocol's name comes first.
    client.read_exact(&mut read).await?;
    server.write_all(&read).await?;
    read.clear();
    loop {
        while let Some(size) = size(&read).filter(|size| *size <= read.len()) {
            let frame: Vec<u8> = read.drain(..size).collect();
            let channel = frame.get(1..3).unwrap_or_default().to_vec();
            let is_slow = match (&*prefix.borrow_and_update(), declared(&frame)) {
                (Some(prefix), Some(queue)) => queue.starts_with(prefix.as_bytes()),
                (Some(prefix), None) => prefix == CONSUMERS && frame.get(7..11) == Some(&[0, 60, 0, 20]),
                _ => false,
            };
            if is_slow {
                channels.insert(channel.clone());
                shared.kept.send_modify(|kept| *kept += 1);
            }
            if channels.contains(&channel) {
                kept.extend(frame);
            } else {
                server.write_all(&frame).await?;
            }
        }
        tokio::select! {
            count = client.read_buf(&mut read) => if count? == 0 { return Ok(()) },
            () = async { drop(prefix.wait_for(Option::is_none).await) }, if !channels.is_empty() => {
                channels.clear();
                server.write_all(&std::mem::take(&mut kept)).await?;
            }
        }
    }
}

async fn answer(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, shared: &Shared) -> std::io::Result<()> {
    let mut read = Vec::new();
    while server.read_buf(&mut read).await? > 0 {
        while let Some(size) = size(&read).filter(|size| *size <= read.len()) {
            let frame: Vec<u8> = read.drain(..size).collect();
            // 60.31 is basic.cancel-ok.
            let is_cancelled = frame.first() == Some(&1) && frame.get(7..11) == Some(&[0, 60, 0, 31]);
            let times = if is_cancelled && shared.stutters.load(Ordering::SeqCst) { 2 } else { 1 };
            client.write_all(&frame.repeat(times)).await?;
        }
    }
    Ok(())
}

/// Of the frame that comes first, once its length is there.
fn size(bytes: &[u8]) -> Option<usize> {
    let length: [u8; 4] = bytes.get(3..7)?.try_into().ok()?;
    Some(u32::from_be_bytes(length) as usize + 8)
}

/// The queue that a frame declares: type 1 is a method, 50.10 is queue.declare; two reserved bytes, and the name.
fn declared(frame: &[u8]) -> Option<&[u8]> {
    let (kind, rest) = (frame.first()?, frame.get(7..)?);
    let name = rest.strip_prefix(&[0, 50, 0, 10, 0, 0]).filter(|_| *kind == 1)?;
    name.get(1..=usize::from(*name.first()?))
}
