//! A handler per delivery.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{Delivery, Failure, Received, Result, Settlement, Subscription};

/// What a handler's result does to its delivery.
///
/// `()` and `Ok(())` ack; a [`Settlement`] is taken as it is; an error retries and is kept as the
/// reason. To reject, return a settlement:
///
/// ```
/// use broker_core::{Failure, IntoSettlement, Settlement};
///
/// fn handle(amount: i64) -> Result<Settlement, std::io::Error> {
///     if amount < 0 {
///         return Ok(Settlement::Reject(Failure::new("a negative amount")));
///     }
///     Ok(Settlement::Ack)
/// }
/// assert_eq!(handle(1).into_settlement(), Settlement::Ack);
/// assert!(matches!(handle(-1).into_settlement(), Settlement::Reject(_)));
/// ```
pub trait IntoSettlement {
    /// The settlement.
    fn into_settlement(self) -> Settlement;
}

impl IntoSettlement for () {
    fn into_settlement(self) -> Settlement {
        Settlement::Ack
    }
}

impl IntoSettlement for Settlement {
    fn into_settlement(self) -> Settlement {
        self
    }
}

impl<S: IntoSettlement, E: fmt::Display> IntoSettlement for Result<S, E> {
    fn into_settlement(self) -> Settlement {
        match self {
            Ok(settlement) => settlement.into_settlement(),
            Err(error) => Settlement::Retry { after: None, failure: Some(Failure::new(error.to_string())) },
        }
    }
}

/// A handler at work; made by [`BrokerExt::handle`](crate::BrokerExt::handle).
///
/// *Dropping* it changes nothing: the handler goes on until the broker closes.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{BrokerExt, MemoryBroker, Subscribe, TopicFilter};
///
/// let broker = MemoryBroker::new();
/// let handling = broker.handle(&TopicFilter::new("orders.>")?, Subscribe::new(), async |_order| ()).await?;
/// handling.stop().await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Handling {
    stop: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Handling {
    pub(crate) fn start<F, Fut>(subscription: Subscription, handler: F) -> Self
    where
        F: Fn(Received) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: IntoSettlement> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(subscription, Arc::new(handler), stop.clone()));
        Self { stop, task }
    }

    /// Ends the subscription and waits for the handlers that run.
    ///
    /// # Errors
    ///
    /// What had ended the subscription before.
    pub async fn stop(self) -> Result<()> {
        self.stop.cancel();
        self.finished().await
    }

    /// Waits until the subscription has ended and the last handler with it: the broker closed, or
    /// the group was deleted.
    ///
    /// # Errors
    ///
    /// What ended the subscription, if it was not the broker's `close`.
    pub async fn finished(self) -> Result<()> {
        // The task neither panics nor is aborted, unless its runtime ends; then so do we.
        self.task.await.unwrap_or(Ok(()))
    }
}

async fn run<F, Fut>(mut subscription: Subscription, handler: Arc<F>, stop: CancellationToken) -> Result<()>
where
    F: Fn(Received) -> Fut + Send + Sync + 'static,
    Fut: Future<Output: IntoSettlement> + Send + 'static,
{
    let handlers = TaskTracker::new();
    let mut batch = Vec::new();
    let ended = loop {
        let received = tokio::select! {
            biased;
            () = stop.cancelled() => break Ok(()),
            received = subscription.receive(&mut batch, 256) => received,
        };
        match received {
            Ok(0) => break Ok(()),
            Ok(_) => {}
            Err(error) => break Err(error),
        }
        for delivery in batch.drain(..) {
            handlers.spawn(handle_one(delivery, Arc::clone(&handler)));
        }
    };
    drop(subscription);
    handlers.close();
    handlers.wait().await;
    ended
}

async fn handle_one<F, Fut>(delivery: Delivery, handler: Arc<F>)
where
    F: Fn(Received) -> Fut,
    Fut: Future<Output: IntoSettlement>,
{
    let received = delivery.received().clone();
    let mut handling = pin!(async move { handler(received).await.into_settlement() });
    // Unwind safety: the future is never polled again after a panic, and the handler is shared by
    // tasks that could have panicked on their own.
    let settlement = std::future::poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| handling.as_mut().poll(cx))) {
        Ok(poll) => poll,
        Err(panic) => Poll::Ready(Settlement::Retry { after: None, failure: Some(describe(panic.as_ref())) }),
    })
    .await;
    let (topic, id) = (delivery.topic().clone(), delivery.message().id().clone());
    if let Err(error) = delivery.settle(settlement).await {
        tracing::warn!(%topic, %id, %error, "a handler's settlement was not taken; the message comes back");
    }
}

fn describe(panic: &(dyn Any + Send)) -> Failure {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Failure::new(format!("the handler panicked: {}", text.unwrap_or("no message")))
}
