//! The concrete future of the contract: what can be done at once costs no allocation.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::task::coop;

use crate::{Error, Receipt, Result};

/// A boxed future, for what must wait.
///
/// ```
/// let future: broker_core::BoxFuture<'_, u32> = Box::pin(async { 7 });
/// # drop(future);
/// ```
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What [`Publisher::publish`](crate::Publisher::publish) returns.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{BrokerExt, MemoryBroker, Message, Publish, Topic};
///
/// let publish: Publish = MemoryBroker::new().publish(&Topic::new("orders")?, Message::new("42"));
/// assert!(publish.is_ready());
/// # Ok(()) }
/// ```
pub type Publish = Operation<Receipt>;

/// What [`Publisher::publish_batch`](crate::Publisher::publish_batch) returns: one result per
/// message, in order.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{BrokerExt, MemoryBroker, Message, PublishBatch, Topic};
///
/// let batch = vec![Message::new("1"), Message::new("2")];
/// let publish: PublishBatch = MemoryBroker::new().publish_batch(&Topic::new("orders")?, batch);
/// assert!(publish.await?.iter().all(Result::is_ok));
/// # Ok(()) }
/// ```
pub type PublishBatch = Operation<Vec<Result<Receipt>>>;

/// What a settlement of a [`Delivery`](crate::Delivery) returns.
///
/// ```
/// assert!(broker_core::Settle::done().is_ready());
/// ```
pub type Settle = Operation<()>;

/// An operation under way: ready, confirmed later, or boxed.
///
/// It is *eager*: it began when it was made, in the order of the calls, and goes on whether or
/// not it is polled. Awaiting it tells the outcome. It is *drop-safe*: dropping it withdraws what
/// the broker has not taken yet; what is taken is done wholly, its outcome unknown to the caller.
/// Through `dyn` it costs no allocation where it is ready, nor where an adapter confirms from a
/// table of its own.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, MemoryBroker, Message, Topic};
///
/// let broker = MemoryBroker::new();
/// let publish = broker.publish(&Topic::new("orders")?, Message::new("1"));
/// // Already taken: the in-process broker had room.
/// assert_eq!(publish.await?.matched, Some(0));
/// # Ok(()) }
/// ```
#[must_use = "await it to learn the outcome; dropping it may withdraw the operation"]
pub struct Operation<T: 'static>(State<T>);

enum State<T: 'static> {
    Ready(Result<T>),
    /// Ready, and spends the task's cooperative budget.
    Cooperative(Result<T>),
    Confirmed {
        by: Arc<dyn Confirm<T>>,
        ticket: u64,
    },
    Boxed(BoxFuture<'static, Result<T>>),
    Finished,
}

/// Where an adapter keeps the operations it has yet to confirm: one table for many, so that a
/// pending operation is a pointer and a number. [`Confirms`](crate::Confirms) is one ready made.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::sync::Arc;
/// use std::task::{Context, Poll};
/// use broker_core::{Confirm, Operation, Result};
///
/// /// Confirms every ticket with its number.
/// struct Echo;
///
/// impl Confirm<u64> for Echo {
///     fn poll_confirm(&self, ticket: u64, _: &mut Context<'_>) -> Poll<Result<u64>> {
///         Poll::Ready(Ok(ticket))
///     }
///     fn abandon(&self, _: u64) {}
/// }
///
/// assert_eq!(Operation::confirmed(Arc::new(Echo), 7).await.unwrap(), 7);
/// # }
/// ```
pub trait Confirm<T>: Send + Sync + 'static {
    /// The outcome of `ticket`, once; wakes the task when it is known.
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<T>>;

    /// Nobody waits for `ticket` any more: withdraw it if it was not taken yet.
    fn abandon(&self, ticket: u64);
}

impl<T> Operation<T> {
    /// Done already.
    pub fn ready(result: Result<T>) -> Self {
        Self(State::Ready(result))
    }

    /// Done already; a task that awaits one after another lets others run when its cooperative budget
    /// is spent, as with tokio's own channels.
    pub(crate) fn cooperative(result: Result<T>) -> Self {
        Self(State::Cooperative(result))
    }

    /// To be confirmed by `by` under `ticket`.
    pub fn confirmed(by: Arc<dyn Confirm<T>>, ticket: u64) -> Self {
        Self(State::Confirmed { by, ticket })
    }

    /// Waiting for `future`, which must have begun its work in the order of the calls already.
    pub fn boxed(future: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self(State::Boxed(Box::pin(future)))
    }

    /// The outcome, if it is known without waiting.
    pub(crate) fn into_ready(mut self) -> Option<Result<T>> {
        match std::mem::replace(&mut self.0, State::Finished) {
            State::Ready(result) | State::Cooperative(result) => Some(result),
            other => {
                self.0 = other;
                None
            }
        }
    }

    /// Whether the outcome is known without waiting.
    ///
    /// ```
    /// use broker_core::Operation;
    /// assert!(Operation::ready(Ok(1)).is_ready());
    /// ```
    pub fn is_ready(&self) -> bool {
        matches!(self.0, State::Ready(_) | State::Cooperative(_))
    }
}

impl<T: Unpin> Future for Operation<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::Cooperative(_) = &self.0 {
            std::task::ready!(coop::poll_proceed(cx)).made_progress();
        }
        let result = match &mut self.0 {
            State::Confirmed { by, ticket } => std::task::ready!(by.poll_confirm(*ticket, cx)),
            State::Boxed(future) => std::task::ready!(future.as_mut().poll(cx)),
            State::Ready(_) | State::Cooperative(_) => match std::mem::replace(&mut self.0, State::Finished) {
                State::Ready(result) | State::Cooperative(result) => return Poll::Ready(result),
                _ => return Poll::Pending,
            },
            State::Finished => {
                return Poll::Ready(Err(Error::invalid("an operation was polled after it had finished")));
            }
        };
        self.0 = State::Finished;
        Poll::Ready(result)
    }
}

impl<T> Drop for Operation<T> {
    fn drop(&mut self) {
        if let State::Confirmed { by, ticket } = &self.0 {
            by.abandon(*ticket);
        }
    }
}

impl<T> From<Result<T>> for Operation<T> {
    fn from(result: Result<T>) -> Self {
        Self::ready(result)
    }
}

impl<T> From<Error> for Operation<T> {
    fn from(error: Error) -> Self {
        Self::ready(Err(error))
    }
}

impl<T> fmt::Debug for Operation<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            State::Ready(Ok(_)) | State::Cooperative(Ok(_)) => "Operation(ok)",
            State::Ready(Err(_)) | State::Cooperative(Err(_)) => "Operation(failed)",
            State::Confirmed { .. } | State::Boxed(_) => "Operation(waiting)",
            State::Finished => "Operation(finished)",
        })
    }
}
