//! Whether anything happens on a connection: the requests at work on it, and how its answers get on.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::HeaderMap;
use hyper::body::Incoming;
use tokio::task::AbortHandle;

use super::rest::Rest;
use super::wire::Wire;

/// The connection ends for another's sake: a request that begins from then on comes too late.
const GAVE_WAY: usize = 1 << (usize::BITS - 1);

/// What happens on a connection.
#[derive(Debug)]
pub(crate) struct Activity {
    /// Requests at work, and [`GAVE_WAY`].
    active: AtomicUsize,
    opened: Instant,
    /// Microseconds from then to when no request was at work any more.
    quiet: AtomicU64,
    /// Requests begun.
    pub(crate) begun: AtomicUsize,
    /// Bytes of the heads of requests at work over HTTP/2.
    heads: AtomicUsize,
    /// How long an answer may wait for its reader.
    patience: OnceLock<Duration>,
    /// Bodies over HTTP/2 of which a piece is there that nobody has taken, by the half of that time in which it was offered.
    offered: [AtomicUsize; HALVES],
    pub(crate) wire: Arc<Wire>,
    /// What was left of a request's body.
    pub(crate) rest: Arc<Rest<Incoming>>,
}

impl Default for Activity {
    fn default() -> Self {
        let wire = Arc::<Wire>::default();
        Self {
            active: AtomicUsize::default(),
            opened: Instant::now(),
            quiet: AtomicU64::default(),
            begun: AtomicUsize::default(),
            heads: AtomicUsize::default(),
            patience: OnceLock::new(),
            offered: Default::default(),
            rest: Arc::new(Rest::new(Arc::clone(&wire))),
            wire,
        }
    }
}

/// Halves told apart: those of which nothing is late, and as many again in which it is noticed.
const HALVES: usize = 8;
const LATE: usize = 3;

impl Activity {
    /// Changes while requests come; over HTTP/1 also while an answer is being read, where over HTTP/2
    /// answers to pings are written.
    pub(crate) fn life(&self) -> (usize, usize) {
        let written = if self.wire.is_http2() { 0 } else { self.wire.written() };
        (self.begun.load(Ordering::Acquire), written)
    }

    /// Whether a request is at work.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// The task that ends with the connection; before it is known the connection does not give way.
    pub(crate) fn served_by(&self, task: AbortHandle) {
        self.wire.served_by(task);
    }

    /// Since when it has been at no request, if it may give way: nothing said yet, a head or a handshake begun, or idle.
    /// An answer that is still to be read belongs to its request.
    pub(crate) fn quiet_since(&self) -> Option<Instant> {
        let answers = self.wire.is_blocked() && self.begun.load(Ordering::Acquire) > 0;
        if self.is_active() || answers || self.wire.task().is_none() {
            return None;
        }
        Some(self.opened + Duration::from_micros(self.quiet.load(Ordering::Acquire)))
    }

    /// Ends the connection for another's sake, unless a request is at work: none is cut for it.
    pub(crate) fn give_way(&self) -> bool {
        let Some(task) = self.wire.task() else { return false };
        let gives_way = self.active.compare_exchange(0, GAVE_WAY, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if gives_way {
            task.abort();
        }
        gives_way
    }

    pub(crate) fn has_given_way(&self) -> bool {
        self.active.load(Ordering::Acquire) & GAVE_WAY != 0
    }

    /// Whether answers wait for the socket to take something: the bytes it took before.
    pub(crate) fn waits(&self) -> Option<usize> {
        self.wire.is_blocked().then(|| self.wire.written())
    }

    /// How long an answer may wait for its reader; said once, before the first.
    pub(crate) fn set_patience(&self, patience: Duration) {
        let _ = self.patience.set(patience);
    }

    fn half(&self) -> usize {
        let half = self.patience.get().map_or(1, |patience| patience.as_micros() / 2).max(1);
        usize::try_from(self.opened.elapsed().as_micros() / half).unwrap_or(usize::MAX)
    }

    /// Whether a body has waited for its stream's window for too long, whatever the others do. To be asked in every half.
    pub(crate) fn has_late_stream(&self) -> bool {
        let now = self.half();
        (LATE..HALVES - 1)
            .filter_map(|before| self.offered.get(now.checked_sub(before)? % HALVES))
            .any(|offered| offered.load(Ordering::Acquire) > 0)
    }
}

/// Something of a body is there to be taken, until it is: by the half of its patience in which that began.
pub(crate) struct Offered {
    activity: Arc<Activity>,
    half: usize,
}

impl Offered {
    pub(crate) fn begin(activity: &Arc<Activity>) -> Self {
        let half = activity.half() % HALVES;
        if let Some(offered) = activity.offered.get(half) {
            offered.fetch_add(1, Ordering::AcqRel);
        }
        Self { activity: Arc::clone(activity), half }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(offered) = self.activity.offered.get(self.half) {
            offered.fetch_sub(1, Ordering::AcqRel);
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
        let quiet = u64::try_from(self.0.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.0.quiet.store(quiet, Ordering::Release);
        self.0.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a header takes besides its name and value (RFC 9113, section 10.5.1).
const HEADER: usize = 32;

/// The head of a request over HTTP/2, until the request is answered: many are at work on a connection.
pub(crate) struct Head {
    activity: Arc<Activity>,
    bytes: usize,
    /// All of the connection, with this one.
    all: usize,
}

impl Head {
    pub(crate) fn begin(activity: &Arc<Activity>, uri: usize, headers: &HeaderMap) -> Self {
        let fields = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER);
        let bytes = uri + fields.sum::<usize>();
        let all = activity.heads.fetch_add(bytes, Ordering::AcqRel) + bytes;
        Self { activity: Arc::clone(activity), bytes, all }
    }

    /// Bytes of the connection's heads when this one came.
    pub(crate) fn all(&self) -> usize {
        self.all
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        self.activity.heads.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}
