//! Whether anything happens on a connection: the requests at work on it, and how its answers get on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::body::Incoming;

use super::rest::Rest;
use super::wire::Wire;

/// What happens on a connection.
#[derive(Debug)]
pub(crate) struct Activity {
    /// Requests at work.
    pub(crate) active: AtomicUsize,
    /// Requests begun.
    pub(crate) begun: AtomicUsize,
    /// Bodies over HTTP/2 of which a piece is there that nobody has taken.
    pub(crate) offered: AtomicUsize,
    /// Pieces taken.
    pub(crate) taken: AtomicUsize,
    pub(crate) wire: Arc<Wire>,
    /// What was left of a request's body.
    pub(crate) rest: Arc<Rest<Incoming>>,
}

impl Default for Activity {
    fn default() -> Self {
        let wire = Arc::<Wire>::default();
        Self {
            active: AtomicUsize::default(),
            begun: AtomicUsize::default(),
            offered: AtomicUsize::default(),
            taken: AtomicUsize::default(),
            rest: Arc::new(Rest::new(Arc::clone(&wire))),
            wire,
        }
    }
}

/// How far answers have come that wait for their reader.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Waits {
    /// The socket takes nothing: bytes it took before.
    Socket(usize),
    /// No stream has room: pieces taken before.
    Streams(usize),
}

impl Activity {
    /// Changes while requests come; over HTTP/1 also while an answer is being read, where over HTTP/2
    /// answers to pings are written.
    pub(crate) fn life(&self) -> (usize, usize) {
        let written = if self.wire.is_http2() { 0 } else { self.wire.written() };
        (self.begun.load(Ordering::Acquire), written)
    }

    /// Whether an answer waits for its reader.
    pub(crate) fn waits(&self) -> Option<Waits> {
        if self.wire.is_blocked() {
            Some(Waits::Socket(self.wire.written()))
        } else if self.offered.load(Ordering::Acquire) > 0 {
            Some(Waits::Streams(self.taken.load(Ordering::Acquire)))
        } else {
            None
        }
    }
}

/// A request at work, until its answer is written.
pub(crate) struct Busy(pub(crate) Arc<Activity>);

impl Busy {
    pub(crate) fn begin(activity: &Arc<Activity>) -> Self {
        activity.active.fetch_add(1, Ordering::AcqRel);
        activity.begun.fetch_add(1, Ordering::AcqRel);
        activity.wire.forget();
        Self(Arc::clone(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.wire.forget();
        self.0.active.fetch_sub(1, Ordering::AcqRel);
    }
}
