//! The socket under a connection: it counts what came in, and can say goodbye while it still
//! listens.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tls::MaybeTls;

/// A connection with its [`LinkState`].
#[derive(Debug)]
pub(super) struct Link {
    stream: MaybeTls,
    state: Arc<LinkState>,
    finished: bool,
}

/// What is known of a connection, and asked of it, from outside.
#[derive(Debug, Default)]
pub(super) struct LinkState {
    received: AtomicU64,
    finish: AtomicBool,
}

impl LinkState {
    /// Bytes received so far: a request is answered in no part while this stands still.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Closes our side, at the next poll: a server that is waiting gives up waiting, and what it
    /// had answered already still comes in.
    pub(super) fn finish(&self) {
        self.finish.store(true, Ordering::Release);
    }
}

impl Link {
    pub(super) fn new(stream: MaybeTls) -> (Self, Arc<LinkState>) {
        let state = Arc::<LinkState>::default();
        (Self { stream, state: Arc::clone(&state), finished: false }, state)
    }
}

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.finished && self.state.finish.load(Ordering::Acquire) {
            // Whether it worked does not matter: then the connection is gone already.
            self.finished = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let received = buf.filled().len().saturating_sub(before);
        self.state.received.fetch_add(received as u64, Ordering::AcqRel);
        read
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
