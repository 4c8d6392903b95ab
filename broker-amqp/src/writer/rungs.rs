//! Delay queues: which of them stand, and the messages that wait until one does.
//!
//! A declaration takes seconds where a quorum of nodes is slow to agree. So it has a channel of another connection,
//! and holds up those messages alone that need the queue: a message with a delay keeps no order with others.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use broker_core::{BoxFuture, Error, Result};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};

use super::{Entry, Writer};
use crate::error::{is_final, is_queue_limit};
use crate::ladder::Rung;
use crate::link::Wait;
use crate::topology;

pub(super) struct Rungs {
    writer: Arc<Writer>,
    standing: HashSet<Rung>,
    /// By what is being declared, in the order of their deadlines.
    waiting: HashMap<Rung, VecDeque<Entry>>,
    declaring: FuturesUnordered<BoxFuture<'static, (Rung, Result<()>)>>,
}

/// A delay queue is declared, or never will be; these waited for it.
pub(super) struct Declared {
    pub(super) waited: VecDeque<Entry>,
    pub(super) result: Result<()>,
}

impl Rungs {
    pub(super) fn new(writer: Arc<Writer>) -> Self {
        Self { writer, standing: HashSet::new(), waiting: HashMap::new(), declaring: FuturesUnordered::new() }
    }

    /// Takes none for standing any more: what ended the channel may have been that one is gone.
    pub(super) fn doubt(&mut self) {
        self.standing.clear();
    }

    /// One was found gone.
    pub(super) fn is_gone(&mut self, rung: Rung) {
        self.standing.remove(&rung);
    }

    pub(super) fn stands(&self, rung: Rung) -> bool {
        self.standing.contains(&rung)
    }

    /// Whether messages may wait for one.
    pub(super) fn are_awaited(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Keeps a message until its delay queue stands.
    pub(super) fn wait_for(&mut self, rung: Rung, entry: Entry) {
        let waiting = self.waiting.entry(rung).or_insert_with(|| {
            self.declaring.push(Box::pin(declare(Arc::clone(&self.writer), rung)));
            VecDeque::new()
        });
        // One that was sent already, and came back, is older than those that wait.
        let at = waiting.partition_point(|one| one.deadline <= entry.deadline);
        waiting.insert(at, entry);
    }

    /// The next declaration to end; never, while there is none.
    pub(super) async fn declared(&mut self) -> Declared {
        let Some((rung, result)) = self.declaring.next().await else { return std::future::pending().await };
        if result.is_ok() {
            self.standing.insert(rung);
        }
        Declared { waited: self.waiting.remove(&rung).unwrap_or_default(), result }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.values().filter_map(|waiting| waiting.front()).map(|entry| entry.deadline).min()
    }

    /// Ends what is past its deadline.
    pub(super) fn expire(&mut self, now: Instant) {
        for waiting in self.waiting.values_mut() {
            while let Some(entry) = waiting.pop_front_if(|entry| entry.deadline <= now) {
                let late =
                    || Error::timeout("RabbitMQ did not declare a delay queue in time: the message was not sent");
                self.writer.finish(&entry, Err(self.writer.out_of_reach().unwrap_or_else(late)));
            }
        }
    }

    /// All that wait, whose declarations go on.
    pub(super) fn take_waiting(&mut self) -> Vec<Entry> {
        self.waiting.values_mut().flat_map(std::mem::take).collect()
    }
}

/// Declares a delay queue, again until the server has answered.
async fn declare(writer: Arc<Writer>, rung: Rung) -> (Rung, Result<()>) {
    let mut wait = Wait::new(writer.options.max_reconnect_wait);
    loop {
        let asking = async {
            let live = writer.asking.on_demand(&Handle::current()).await?;
            topology::declare_rung(&live, rung, &writer.options).await
        };
        match timeout(writer.options.connect_timeout, asking).await {
            Ok(Ok(())) => return (rung, Ok(())),
            Ok(Err(error)) if is_final(&error) || is_queue_limit(&error) => return (rung, Err(error)),
            Ok(Err(error)) => tracing::debug!(%error, "a delay queue is not declared; it is tried again"),
            Err(_) => tracing::debug!("RabbitMQ does not declare a delay queue in time; it is tried again"),
        }
        sleep(wait.next()).await;
    }
}
