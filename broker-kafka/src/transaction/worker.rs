//! The thread that publishes in transactions: which messages share one.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use broker_core::{Error, Message, Receipt, Result, Topic};
use crossbeam_channel::{Receiver, Sender};
use tokio::sync::oneshot;

use super::outcome::{Aborted, Place};
use super::session::Session;
use crate::KafkaConfig;
use crate::admin::Admin;
use crate::process::Process;
use crate::tickets::Tickets;

/// Messages that share a transaction at most, where nothing asks for one of its own.
const TOGETHER: usize = 1_000;

/// The way to the thread.
pub(crate) struct Transactions {
    jobs: Sender<Job>,
}

/// A message on its way.
pub(crate) struct Outgoing {
    pub(crate) ticket: usize,
    pub(crate) topic: Topic,
    pub(crate) message: Message,
}

enum Job {
    Together(Outgoing),
    Alone(Vec<Outgoing>),
    Process(Process, oneshot::Sender<Result<Vec<Receipt>>>),
}

impl Transactions {
    /// Starts the thread, which ends with the last of what holds this.
    pub(crate) fn start(config: &Arc<KafkaConfig>, admin: &Arc<Admin>, tickets: &Arc<Tickets>) -> Result<Self> {
        let (jobs, received) = crossbeam_channel::unbounded();
        let worker = Worker::new(config, admin, tickets);
        let spawned =
            thread::Builder::new().name("broker-kafka-transact".to_owned()).spawn(move || worker.run(&received));
        spawned.map_err(|error| Error::backend("start a thread").with_source(error))?;
        Ok(Self { jobs })
    }

    /// Publishes; whoever holds the tickets hears of it. With `alone` they are one transaction.
    pub(crate) fn publish(&self, messages: Vec<Outgoing>, alone: bool) {
        // The thread lives as long as this does.
        if alone {
            let _ = self.jobs.send(Job::Alone(messages));
        } else {
            messages.into_iter().for_each(|message| drop(self.jobs.send(Job::Together(message))));
        }
    }

    /// Publishes, and commits offsets with it.
    pub(crate) fn process(&self, process: Process) -> oneshot::Receiver<Result<Vec<Receipt>>> {
        let (reply, outcome) = oneshot::channel();
        let _ = self.jobs.send(Job::Process(process, reply));
        outcome
    }
}

struct Worker {
    publish_timeout: Duration,
    tickets: Arc<Tickets>,
    session: Session,
}

impl Worker {
    fn new(config: &Arc<KafkaConfig>, admin: &Arc<Admin>, tickets: &Arc<Tickets>) -> Self {
        let session = Session::new(config, admin);
        Self { publish_timeout: config.publish_timeout, tickets: Arc::clone(tickets), session }
    }

    fn run(mut self, jobs: &Receiver<Job>) {
        let mut next = None;
        while let Some(job) = next.take().or_else(|| jobs.recv().ok()) {
            match job {
                Job::Together(first) => {
                    let mut together = vec![first];
                    while together.len() < TOGETHER {
                        match jobs.try_recv() {
                            Ok(Job::Together(message)) => together.push(message),
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    together.retain(|message| self.tickets.take(message.ticket));
                    self.publish_together(together);
                }
                Job::Alone(batch) => {
                    // Whoever dropped the batch dropped all of it, the first message first.
                    if batch.first().is_none_or(|first| self.tickets.take(first.ticket)) {
                        self.publish_alone(&batch);
                    } else {
                        let withdrawn = Error::closed("the batch was withdrawn");
                        batch.iter().skip(1).for_each(|one| self.tickets.complete(one.ticket, Err(withdrawn.clone())));
                    }
                }
                Job::Process(process, reply) => {
                    let _ = reply.send(self.process(process));
                }
            }
        }
    }

    /// What waited together. One that is refused for what it is fails alone: the others go on without it.
    fn publish_together(&mut self, mut messages: Vec<Outgoing>) {
        while let Err(aborted) = self.publish(&messages) {
            let refused = |own: &Option<Error>| own.as_ref().is_some_and(|own| !own.is_retryable());
            let all_alone = aborted.own.iter().flatten().all(|own| !own.is_retryable());
            if !all_alone || !aborted.own.iter().any(refused) {
                return self.fail(&messages, aborted);
            }
            let mut own = aborted.own.into_iter();
            messages.retain(|message| match own.next().flatten() {
                Some(error) => {
                    self.tickets.complete(message.ticket, Err(error));
                    false
                }
                None => true,
            });
        }
    }

    fn publish_alone(&mut self, messages: &[Outgoing]) {
        if let Err(aborted) = self.publish(messages) {
            self.fail(messages, aborted);
        }
    }

    fn fail(&self, messages: &[Outgoing], aborted: Aborted) {
        messages.iter().zip(aborted.each()).for_each(|(one, error)| self.tickets.complete(one.ticket, Err(error)));
    }

    fn publish(&mut self, messages: &[Outgoing]) -> std::result::Result<(), Aborted> {
        if messages.is_empty() {
            return Ok(());
        }
        let borrowed: Vec<_> = messages.iter().map(|outgoing| (&outgoing.topic, &outgoing.message)).collect();
        let placed = self.session.transact(&borrowed, &[])?;
        messages.iter().zip(placed).for_each(|(message, place)| self.tickets.complete(message.ticket, Ok(place)));
        Ok(())
    }

    fn process(&mut self, mut process: Process) -> Result<Vec<Receipt>> {
        let offsets = process.begin(self.publish_timeout)?;
        let borrowed: Vec<_> = process.messages.iter().map(|(topic, message)| (topic, message)).collect();
        let placed = self.session.transact(&borrowed, &offsets).map_err(Aborted::first)?;
        let receipt = |((_, message), (partition, offset)): (&(Topic, Message), Place)| {
            let mut receipt = Receipt::new(message.id().clone());
            receipt.partition = Some(partition);
            receipt.offset = Some(offset).filter(|offset| *offset >= 0);
            receipt
        };
        let receipts = process.messages.iter().zip(placed).map(receipt).collect();
        process.committed();
        Ok(receipts)
    }
}
