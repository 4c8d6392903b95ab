//! Receiving and settling.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use broker_core::{
    Consumer, Deliveries, Delivery, Error, Gap, Message, Operation, Result, Settle, Settlement, Timestamp, Topic,
};
use parking_lot::Mutex;
use tokio::time::Sleep;

use super::queues::{Item, Life, Queues};

/// A member of a queue.
pub(super) struct ToyConsumer {
    queues: Arc<Mutex<Queues>>,
    queue: u64,
    member: u64,
    max_in_flight: usize,
    /// Until the first retry is due.
    timer: Option<Pin<Box<Sleep>>>,
}

impl ToyConsumer {
    pub(super) fn new(queues: Arc<Mutex<Queues>>, queue: u64, member: u64, max_in_flight: usize) -> Self {
        Self { queues, queue, member, max_in_flight, timer: None }
    }

    fn leave(&self) {
        let mut queues = self.queues.lock();
        let alone = match queues.queues.get_mut(&self.queue) {
            None => return,
            Some(queue) => {
                queue.members.retain(|member| *member != self.member);
                queue.group.is_none()
            }
        };
        if alone {
            // A copy of one's own lives and dies with the subscription.
            queues.queues.remove(&self.queue);
        }
        // What it might have taken is another's now.
        queues.wake_all();
    }
}

impl Consumer for ToyConsumer {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let due = {
            let mut queues = self.queues.lock();
            if queues.life == Life::Closed {
                return Poll::Ready(Ok(0));
            }
            let Some(queue) = queues.queues.get_mut(&self.queue) else {
                return Poll::Ready(Err(Error::not_found("the group was deleted")));
            };
            let held = queue.in_flight.get(&self.member).copied().unwrap_or(0);
            let room = self.max_in_flight.saturating_sub(held).min(limit);
            let (now, before, mut due) = (Instant::now(), batch.len(), None);
            while batch.len() - before < room {
                let mut item = match queue.next(now) {
                    Ok(item) => item,
                    Err(first) => {
                        due = first;
                        break;
                    }
                };
                item.attempts += 1;
                item.first.get_or_insert_with(Timestamp::now);
                queue.counts.delivered += 1;
                *queue.in_flight.entry(self.member).or_insert(0) += 1;
                batch.push(Delivery::new(Arc::new(ToyDelivery::new(self, item)), 0));
            }
            if batch.len() > before {
                return Poll::Ready(Ok(batch.len() - before));
            }
            queues.wait(cx.waker());
            due
        };
        // The timer wakes this task, which then looks again.
        self.timer = due.map(|due| Box::pin(tokio::time::sleep_until(due.into())));
        match self.timer.as_mut().map(|timer| timer.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => self.poll_receive(cx, batch, limit),
            _ => Poll::Pending,
        }
    }

    fn gap(&mut self) -> Option<Gap> {
        None
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        self.leave();
        Poll::Ready(Ok(()))
    }
}

impl Drop for ToyConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}

/// One message handed out; a batch of one, since this is a toy.
struct ToyDelivery {
    queues: Arc<Mutex<Queues>>,
    queue: u64,
    member: u64,
    message: Message,
    topic: Topic,
    attempts: u32,
    /// Taken by whoever settles.
    item: Mutex<Option<Item>>,
}

impl ToyDelivery {
    fn new(consumer: &ToyConsumer, item: Item) -> Self {
        Self {
            queues: Arc::clone(&consumer.queues),
            queue: consumer.queue,
            member: consumer.member,
            message: item.message.clone(),
            topic: item.topic.clone(),
            attempts: item.attempts,
            item: Mutex::new(Some(item)),
        }
    }

    fn settle_now(&self, settlement: Settlement) -> Result<()> {
        let mut queues = self.queues.lock();
        if queues.life == Life::Closed {
            return Err(Error::closed("the broker was closed"));
        }
        if let Some(item) = self.item.lock().take() {
            queues.settle(self.queue, self.member, item, settlement);
        }
        Ok(())
    }
}

impl Deliveries for ToyDelivery {
    fn message(&self, _: u32) -> &Message {
        &self.message
    }

    fn topic(&self, _: u32) -> &Topic {
        &self.topic
    }

    fn attempt(&self, _: u32) -> u32 {
        self.attempts
    }

    fn settle(&self, _: u32, settlement: Settlement) -> Settle {
        Operation::ready(self.settle_now(settlement))
    }

    fn abandon(&self, _: u32) {
        // After close this does nothing: shutting down is no failure of the message.
        let _ = self.settle_now(Settlement::Retry { after: None, failure: None });
    }
}
