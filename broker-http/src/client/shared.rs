//! What the parts of a client broker have in common: the daemon, the tasks, and where in its life
//! it is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use broker_core::{Capabilities, Confirms, Error, Receipt, Result, Topic};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::backoff::Backoff;
use super::connection::Answer;
use super::error::refused;
use super::http::{Call, Fault, Http};
use super::lane::Lane;
use super::publisher::Queue;

/// The runtime to run tasks on.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid) outside of one.
pub(super) fn runtime() -> Result<Handle> {
    Handle::try_current()
        .map_err(|_| Error::invalid("there is no tokio runtime here; the HTTP broker is used from inside of one"))
}

/// The state of a client broker.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) http: Http,
    pub(super) tasks: TaskTracker,
    /// Cancelled when `close` begins: nothing new is taken in.
    pub(super) closing: CancellationToken,
    /// Cancelled when `close` ends: whatever still runs is cut.
    pub(super) closed: CancellationToken,
    pub(super) confirms: Arc<Confirms<Receipt>>,
    pub(super) batches: Arc<Confirms<Vec<Result<Receipt>>>>,
    pub(super) settlements: Arc<Confirms<()>>,
    pub(super) queues: Mutex<HashMap<(Topic, bool), Weak<Queue>>>,
    pub(super) lanes: Mutex<Vec<Weak<Lane>>>,
    /// Whether the daemon has ever answered: then a lost connection is made again, and before that
    /// it is an error to be told at once.
    connected: AtomicBool,
    unconfirmed: AtomicU64,
    last_error: Mutex<Option<Error>>,
    /// What the daemon can do, once it was asked.
    pub(super) able: Mutex<Option<Capabilities>>,
}

impl Shared {
    pub(super) fn new(http: Http) -> Self {
        Self {
            http,
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            closed: CancellationToken::new(),
            confirms: Arc::default(),
            batches: Arc::default(),
            settlements: Arc::default(),
            queues: Mutex::default(),
            lanes: Mutex::default(),
            connected: AtomicBool::new(false),
            unconfirmed: AtomicU64::new(0),
            last_error: Mutex::default(),
            able: Mutex::default(),
        }
    }

    /// Fails once `close` has begun.
    pub(super) fn check_open(&self) -> Result<()> {
        if self.closing.is_cancelled() { Err(self.closed_error()) } else { Ok(()) }
    }

    pub(super) fn closed_error(&self) -> Error {
        Error::closed(format!("the broker {} was closed", self.http.options().name()))
    }

    /// Runs a task that `close` waits for and, in the end, cuts. A runtime that is shutting down
    /// drops it here and now: never call this with a lock held that dropping the task takes.
    pub(super) fn spawn(&self, runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) {
        let closed = self.closed.clone();
        self.tasks.spawn_on(async move { closed.run_until_cancelled(task).await.unwrap_or_default() }, runtime);
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    pub(super) fn last_error(&self) -> Option<Error> {
        self.last_error.lock().clone()
    }

    /// Sends a request and takes note of how the connection is.
    pub(super) async fn call(&self, call: Call<'_>) -> Result<Answer, Fault> {
        let result = self.http.call(call).await;
        match &result {
            Ok(_) => {
                if !self.connected.swap(true, Ordering::AcqRel) {
                    tracing::debug!(broker = %self.http.options().name(), "connected");
                }
                *self.last_error.lock() = None;
            }
            Err(fault) => {
                *self.last_error.lock() = Some(fault.error.clone());
            }
        }
        result
    }

    /// As [`call`](Self::call); what did not reach the daemon is tried again until `call.within` is
    /// over, if it was ever connected.
    pub(super) async fn patient(&self, call: Call<'_>) -> Result<Answer> {
        let deadline = tokio::time::Instant::now() + call.within;
        let mut backoff = Backoff::connecting();
        let mut left = call.within;
        loop {
            let Call { ref method, ref headers, ref body, .. } = call;
            let attempt =
                Call { method: method.clone(), headers: headers.clone(), body: body.clone(), within: left, ..call };
            let fault = match self.call(attempt).await {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            let wait = backoff.next();
            left = deadline.saturating_duration_since(tokio::time::Instant::now()).saturating_sub(wait);
            if fault.sent || !self.is_connected() || left.is_zero() || call.is_finished() {
                return Err(fault.error);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// As [`patient`](Self::patient); an answer outside 2xx is the error it tells of.
    pub(super) async fn expect(&self, call: Call<'_>) -> Result<Answer> {
        let answer = self.patient(call).await?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        Err(refused(answer.status, &answer.headers, &answer.body))
    }

    /// Counts publishes whose outcome nobody will know.
    pub(super) fn cut_short(&self, publishes: usize) {
        self.unconfirmed.fetch_add(publishes as u64, Ordering::AcqRel);
    }

    pub(super) fn unconfirmed(&self) -> u64 {
        self.unconfirmed.load(Ordering::Acquire)
    }
}
