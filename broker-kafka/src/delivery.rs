//! What a reader gets: batches of deliveries, and the end of a subscription.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use broker_core::{
    Consumer, Deliveries, Delivery, Error, Failure, Gap, Message, Operation, Result, Settle, Settlement, Topic,
};

use crate::member::{Member, Settled};
use crate::state::Item;

/// Deliveries handed out in one go.
pub(crate) struct Batch {
    pub(crate) member: Arc<Member>,
    items: Vec<Item>,
}

impl Batch {
    // An index is one that was given to `Delivery::new`.
    #[allow(clippy::indexing_slicing)]
    pub(crate) fn item(&self, index: u32) -> &Item {
        &self.items[index as usize]
    }
}

impl Deliveries for Batch {
    fn message(&self, index: u32) -> &Message {
        &self.item(index).entry.message
    }

    fn topic(&self, index: u32) -> &Topic {
        &self.item(index).topic
    }

    fn attempt(&self, index: u32) -> u32 {
        self.item(index).attempt()
    }

    fn settle(&self, index: u32, settlement: Settlement) -> Settle {
        match self.member.settle(self.item(index), settlement) {
            Settled::Done => Settle::done(),
            Settled::Refused(error) => Operation::from(error),
            Settled::Later(arrived) => Operation::boxed(async move {
                arrived.await.unwrap_or_else(|_| Err(Error::closed("the broker is closed; the message comes back")))
            }),
        }
    }

    fn abandon(&self, index: u32) {
        let failure = Some(Failure::new("the delivery was dropped unsettled"));
        // After the end there is nobody to tell.
        let _ = self.member.settle(self.item(index), Settlement::Retry { after: None, failure });
    }
}

/// The reader's side of a subscription.
#[derive(Debug)]
pub(crate) struct Reader {
    member: Arc<Member>,
    drain_timeout: Duration,
}

impl Reader {
    pub(crate) fn new(member: Arc<Member>, drain_timeout: Duration) -> Self {
        Self { member, drain_timeout }
    }

    fn end(&self) {
        self.member.end(Instant::now() + self.drain_timeout, None);
    }
}

impl Consumer for Reader {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let items = std::task::ready!(self.member.poll_take(cx, limit))?;
        let count = items.len();
        let taken: Arc<dyn Deliveries> = Arc::new(Batch { member: Arc::clone(&self.member), items });
        let indices = 0..u32::try_from(count).unwrap_or(u32::MAX);
        batch.extend(indices.map(|index| Delivery::new(Arc::clone(&taken), index)));
        Poll::Ready(Ok(count))
    }

    /// Kafka keeps its records: a connection that was lost loses none.
    fn gap(&mut self) -> Option<Gap> {
        None
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.end();
        self.member.poll_finished(cx).map(Ok)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end();
    }
}
