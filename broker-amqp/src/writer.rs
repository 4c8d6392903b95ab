//! Publishing: one task, one channel, confirms always.
//!
//! Callers push envelopes into a queue and get a ticket; the task hands them to lapin up to
//! [`BATCH`] at a time, which costs it a third of what one awaited after another does, and completes the
//! tickets as confirms arrive. What is unconfirmed when the channel is lost is sent again, in order and
//! before anything newer, until its own deadline.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{Confirms, Error, ErrorKind, Message, Operation, Publish, Receipt, Result, Timestamp, Topic};
use bytes::Bytes;
use futures_util::future::{Either, join_all, pending};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, PublisherConfirm};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::AmqpOptions;
use crate::error::{from_lapin, is_final};
use crate::ladder::{Leads, Rung};
use crate::link::{Link, Live, Wait, closed};
use crate::returns::{Decided, Identity, Returns};
use crate::topology;
use crate::wire::{self, Travel};

/// Publishes handed to lapin at a time, and bytes.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 1 << 20;
/// Publishes and bytes that wait for their confirm at most; beyond, the caller has to await some.
const MAX_PENDING: usize = 100_000;
const MAX_PENDING_BYTES: usize = 512 << 20;
/// What RabbitMQ negotiates unless it is told otherwise.
const DEFAULT_FRAME_MAX: usize = 131_072;

/// Where a message goes.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// To whoever is bound to the exchange.
    Topic(Topic),
    /// To one queue alone.
    Queue(ShortString),
}

/// A message to publish.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    pub(crate) route: Route,
    pub(crate) message: Message,
    pub(crate) travel: Travel,
    pub(crate) require_route: bool,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    deadline: Instant,
    envelope: Envelope,
    /// Where it was last sent to.
    key: ShortString,
    delayed: bool,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.envelope.message.size() + 256
    }

    fn identity(&self) -> Identity {
        (self.key.to_string(), self.envelope.message.id().to_string())
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Entry>,
    ended: bool,
}

/// The queue, shared by every publisher of a broker.
pub(crate) struct Writer {
    options: Arc<AmqpOptions>,
    link: Arc<Link>,
    queue: Mutex<Queue>,
    wake: Notify,
    confirms: Arc<Confirms<Receipt>>,
    pending: AtomicUsize,
    pending_bytes: AtomicUsize,
    /// Told when `pending` comes to nothing.
    idle: Notify,
    frame_max: AtomicUsize,
    stop: CancellationToken,
}

impl Writer {
    pub(crate) fn new(options: Arc<AmqpOptions>, link: Arc<Link>, stop: CancellationToken) -> Self {
        Self {
            options,
            link,
            queue: Mutex::default(),
            wake: Notify::new(),
            confirms: Arc::new(Confirms::new()),
            pending: AtomicUsize::new(0),
            pending_bytes: AtomicUsize::new(0),
            idle: Notify::new(),
            frame_max: AtomicUsize::new(DEFAULT_FRAME_MAX),
            stop,
        }
    }

    /// Takes a message; what is returned ends when the server has confirmed it, or at the publish
    /// timeout. The order of calls is the order of sending.
    pub(crate) fn submit(&self, envelope: Envelope) -> Publish {
        if let Err(error) = wire::check(&envelope.message, self.frame_max.load(Ordering::Relaxed)) {
            return Operation::from(error);
        }
        let deadline = Instant::now() + self.options.publish_timeout;
        let mut queue = self.queue.lock();
        if queue.ended {
            return Operation::from(closed());
        }
        let bytes = self.pending_bytes.load(Ordering::Relaxed);
        if self.pending.load(Ordering::Relaxed) >= MAX_PENDING || bytes >= MAX_PENDING_BYTES {
            return Operation::from(Error::unavailable(format!(
                "{MAX_PENDING} publishes or {} MiB wait for RabbitMQ: await some of them first",
                MAX_PENDING_BYTES >> 20
            )));
        }
        let (ticket, publish) = self.confirms.issue();
        let entry = Entry { ticket, deadline, envelope, key: ShortString::default(), delayed: false };
        self.pending.fetch_add(1, Ordering::Relaxed);
        self.pending_bytes.fetch_add(entry.bytes(), Ordering::Relaxed);
        queue.waiting.push_back(entry);
        drop(queue);
        self.wake.notify_one();
        publish
    }

    /// Publishes not confirmed yet.
    pub(crate) fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    /// Waits until everything is confirmed or failed.
    pub(crate) async fn flushed(&self) {
        loop {
            let idle = self.idle.notified();
            if self.pending() == 0 {
                return;
            }
            idle.await;
        }
    }

    fn next(&self) -> Option<Entry> {
        self.queue.lock().waiting.pop_front()
    }

    fn finish(&self, entry: &Entry, result: Result<Receipt>) {
        self.forget(entry);
        self.confirms.complete(entry.ticket, result);
    }

    fn forget(&self, entry: &Entry) {
        self.pending_bytes.fetch_sub(entry.bytes(), Ordering::Relaxed);
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.idle.notify_waiters();
        }
    }

    /// Why a message whose time is over was not confirmed.
    fn too_late(&self) -> Error {
        let state = self.link.state();
        if let Some(reason) = state.blocked {
            return Error::unavailable(format!("RabbitMQ blocks publishers ({reason}): publish again later"));
        }
        match state.last_error {
            Some(error) if state.live.is_none() && error.kind() != ErrorKind::Timeout => {
                Error::unavailable(format!("RabbitMQ is not reached: {}", error.message())).with_source(error)
            }
            _ => Error::timeout(format!(
                "RabbitMQ did not confirm within {:?}: whether it has the message is unknown",
                self.options.publish_timeout
            )),
        }
    }

    /// The task.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut task = Task { writer: Arc::clone(&self), unsent: VecDeque::new(), sent: BTreeMap::new(), number: 0 };
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = task.run() => {}
        }
        let left = {
            let mut queue = self.queue.lock();
            queue.ended = true;
            std::mem::take(&mut queue.waiting)
        };
        for entry in task.sent.into_values().chain(task.unsent).chain(left) {
            self.finish(
                &entry,
                Err(Error::closed("the broker closed before RabbitMQ confirmed: the outcome is unknown")),
            );
        }
    }
}

/// What the task owns.
struct Task {
    writer: Arc<Writer>,
    /// To be sent, the oldest first, before what is in the queue.
    unsent: VecDeque<Entry>,
    /// Sent on this channel and not confirmed, by the order of sending.
    sent: BTreeMap<u64, Entry>,
    number: u64,
}

type Resolved = (u64, lapin::Result<Confirmation>);

async fn resolved((number, confirm): (u64, PublisherConfirm)) -> Resolved {
    (number, confirm.await)
}

impl Task {
    async fn run(&mut self) {
        let mut wait = Wait::new(self.writer.options.max_reconnect_wait);
        loop {
            let live = self.connected().await;
            let opened = timeout(self.writer.options.connect_timeout, self.open(&live)).await;
            let error = match opened {
                Ok(Ok(channel)) => {
                    wait.reset();
                    let error = self.session(&live, &channel).await;
                    self.lost();
                    error
                }
                Ok(Err(error)) => {
                    if is_final(&error) {
                        self.fail_all(&error);
                    }
                    error
                }
                Err(_) => {
                    live.kill();
                    Error::timeout("RabbitMQ did not open a channel in time")
                }
            };
            tracing::debug!(%error, unconfirmed = self.unsent.len(), "the publishing channel is lost; it is opened again");
            let again = Instant::now() + wait.next();
            while Instant::now() < again {
                self.expire();
                sleep_until(self.next_deadline().unwrap_or(again).min(again)).await;
            }
        }
    }

    /// What was sent and not confirmed is sent again, first.
    fn lost(&mut self) {
        let mut again: VecDeque<Entry> = std::mem::take(&mut self.sent).into_values().collect();
        again.append(&mut self.unsent);
        self.unsent = again;
    }

    fn fail_all(&mut self, error: &Error) {
        let queued = std::mem::take(&mut self.writer.queue.lock().waiting);
        for entry in self.unsent.drain(..).chain(queued) {
            self.writer.finish(&entry, Err(error.clone()));
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let sent = self.sent.values().next().map(|entry| entry.deadline);
        let unsent = self.unsent.front().map(|entry| entry.deadline);
        let queued = self.writer.queue.lock().waiting.front().map(|entry| entry.deadline);
        [sent, unsent, queued].into_iter().flatten().min()
    }

    /// Ends what is past its deadline. All have the same timeout, so that the oldest go first.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.sent.first_entry().filter(|first| first.get().deadline <= now) {
            let entry = first.remove();
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
        while let Some(entry) = self.unsent.pop_front_if(|entry| entry.deadline <= now) {
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
        loop {
            let entry = self.writer.queue.lock().waiting.pop_front_if(|entry| entry.deadline <= now);
            let Some(entry) = entry else { break };
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
    }

    /// Waits for the connection, ending what cannot wait so long.
    async fn connected(&mut self) -> Live {
        let mut state = self.writer.link.watch();
        loop {
            let (live, hopeless) = {
                let state = state.borrow_and_update();
                (state.live.clone().filter(Live::is_up), state.last_error.clone().filter(is_final))
            };
            if let Some(live) = live {
                return live;
            }
            if let Some(error) = hopeless {
                self.fail_all(&error);
            }
            self.expire();
            let deadline = self.next_deadline();
            tokio::select! {
                _ = state.changed() => {}
                () = self.writer.wake.notified() => {}
                () = until(deadline) => {}
            }
        }
    }

    async fn open(&mut self, live: &Live) -> Result<Channel> {
        let options = &self.writer.options;
        let channel = live.connection.create_channel().await.map_err(from_lapin)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(from_lapin)?;
        topology::declare_exchange(&channel, options).await?;
        let frame_max = live.connection.configuration().frame_max() as usize;
        self.writer.frame_max.store(if frame_max == 0 { DEFAULT_FRAME_MAX } else { frame_max }, Ordering::Relaxed);
        Ok(channel)
    }

    /// Sends and confirms until the channel is lost; tells why.
    async fn session(&mut self, live: &Live, channel: &Channel) -> Error {
        let mut returns = Returns::new();
        let mut confirms = FuturesUnordered::new();
        let mut rungs = HashSet::new();
        let mut sending = None;
        let error = loop {
            if sending.is_none() {
                match self.batch(live, &mut rungs).await {
                    Ok(batch) if batch.is_empty() => {}
                    Ok(batch) => sending = Some(Box::pin(join_all(batch.into_iter().map(|one| one.send(channel))))),
                    Err(error) => break error,
                }
            }
            let deadline = self.next_deadline();
            let idle = sending.is_none();
            let sent = match &mut sending {
                Some(sending) => Either::Left(sending.as_mut()),
                None => Either::Right(pending()),
            };
            tokio::select! {
                sent = sent => {
                    sending = None;
                    let mut failed = None;
                    for (number, sent) in sent {
                        match sent {
                            Ok(confirm) => confirms.push(resolved((number, confirm))),
                            Err(error) => failed = Some(error),
                        }
                    }
                    if let Some(error) = failed {
                        break from_lapin(error);
                    }
                }
                Some(first) = confirms.next(), if !confirms.is_empty() => {
                    if let Some(error) = self.confirmed(first, &mut confirms, &mut returns, channel).await {
                        break error;
                    }
                }
                () = self.writer.wake.notified(), if idle => {}
                () = until(deadline) => self.expire(),
            }
        };
        for Decided { item, returned } in returns.end() {
            self.acked(&item, returned);
        }
        error
    }

    /// The next messages to send, their properties written.
    async fn batch(&mut self, live: &Live, rungs: &mut HashSet<Rung>) -> Result<Vec<Outgoing>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < BATCH && bytes < BATCH_BYTES {
            let Some(mut entry) = self.unsent.pop_front().or_else(|| self.writer.next()) else { break };
            if !self.writer.confirms.take(entry.ticket) {
                self.writer.forget(&entry);
                continue;
            }
            let outgoing = match self.prepare(&mut entry) {
                Ok(outgoing) => outgoing,
                Err(error) => {
                    self.writer.finish(&entry, Err(error));
                    continue;
                }
            };
            bytes += entry.bytes();
            let rung = outgoing.rung;
            self.sent.insert(outgoing.number, entry);
            batch.push(outgoing);
            // Should this fail, all of them are in `sent`, and are sent again.
            if let Some(rung) = rung.filter(|rung| !rungs.contains(rung)) {
                let declaring = topology::declare_rung(&live.connection, rung, &self.writer.options);
                timeout(self.writer.options.connect_timeout, declaring)
                    .await
                    .map_err(|_| Error::timeout("RabbitMQ did not declare a delay queue in time"))??;
                rungs.insert(rung);
            }
        }
        Ok(batch)
    }

    fn prepare(&mut self, entry: &mut Entry) -> Result<Outgoing> {
        let options = &self.writer.options;
        let Envelope { route, message, travel, .. } = &entry.envelope;
        let due = travel.due.or(message.deliver_at());
        let wait = due.map(|due| due.since(Timestamp::now())).filter(|wait| !wait.is_zero());
        let (exchange, key, leads) = match route {
            Route::Topic(topic) => (
                crate::naming::short("exchange", &options.exchange)?,
                crate::naming::short("topic", topic.as_str())?,
                Leads::ToTopic,
            ),
            Route::Queue(queue) => (ShortString::default(), queue.clone(), Leads::ToQueue),
        };
        // A millisecond more: times are cut to whole ones.
        let rung = wait.map(|wait| Rung::of(leads, wait + Duration::from_millis(1)));
        let exchange = match rung {
            Some(rung) => rung.name(&options.exchange)?,
            None => exchange,
        };
        entry.key = key.clone();
        entry.delayed = rung.is_some();
        self.number += 1;
        Ok(Outgoing {
            number: self.number,
            exchange,
            key,
            rung,
            payload: Bytes::clone(message.payload()),
            properties: wire::encode(message, travel, options.persistent)?,
        })
    }

    /// Completes what is confirmed: `first`, and whatever else is by now.
    async fn confirmed<F: Future<Output = Resolved>>(
        &mut self,
        first: Resolved,
        confirms: &mut FuturesUnordered<F>,
        returns: &mut Returns<Entry>,
        channel: &Channel,
    ) -> Option<Error> {
        let mut resolved = vec![first];
        drain(confirms, &mut resolved);
        while !resolved.is_empty() {
            // lapin resolves all that one ack confirms under a lock; this takes it once, so that all
            // are resolved that could bring a return of these.
            if let Some(Ok(dropped)) = channel.wait_for_confirms().now_or_never() {
                dropped.iter().for_each(|message| returns.seen(identity(message)));
            }
            let mut later = Vec::new();
            drain(confirms, &mut later);
            resolved.iter().chain(&later).filter_map(|(_, result)| carried(result)).for_each(|one| returns.seen(one));
            let mut batch = Vec::new();
            for (number, result) in std::mem::take(&mut resolved) {
                let carried = carried(&result).is_some();
                match result {
                    // Past its deadline otherwise: nobody waits for it.
                    Ok(Confirmation::Nack(_)) => {
                        if let Some(entry) = self.sent.remove(&number) {
                            self.writer.finish(&entry, Err(nacked()));
                        }
                    }
                    Ok(_) => {
                        if let Some(entry) = self.sent.remove(&number) {
                            if returns.is_idle() && !carried {
                                self.acked(&entry, false);
                            } else {
                                batch.push((entry.identity(), carried, entry));
                            }
                        }
                    }
                    Err(error) => {
                        // It stays in `sent`. What of the others is confirmed is lost with it: sent
                        // again, as is everything whose confirm did not arrive.
                        for (_, _, entry) in batch {
                            self.number += 1;
                            self.sent.insert(self.number, entry);
                        }
                        return Some(from_lapin(error));
                    }
                }
            }
            if !batch.is_empty() || self.sent.is_empty() {
                for Decided { item, returned } in returns.confirmed(batch, confirms.len() + later.len()) {
                    self.acked(&item, returned);
                }
            }
            resolved = later;
        }
        None
    }

    fn acked(&self, entry: &Entry, returned: bool) {
        let message = &entry.envelope.message;
        let result = match &entry.envelope.route {
            Route::Topic(topic) if returned && entry.envelope.require_route => {
                Err(Error::unroutable(format!("no group or subscription matches topic {topic}")))
            }
            Route::Queue(queue) if returned => Err(Error::not_found(format!("queue {queue} is gone"))),
            _ => {
                let mut receipt = Receipt::new(message.id().clone());
                // Where a message goes when its delay is over is known then.
                receipt.routed = (!entry.delayed).then_some(!returned);
                Ok(receipt)
            }
        };
        self.writer.finish(entry, result);
    }
}

fn nacked() -> Error {
    Error::unavailable("RabbitMQ refused the message: a queue it goes to is full, or not available")
}

fn drain<F: Future<Output = Resolved>>(confirms: &mut FuturesUnordered<F>, into: &mut Vec<Resolved>) {
    while let Some(Some(resolved)) = confirms.next().now_or_never() {
        into.push(resolved);
    }
}

fn carried(result: &lapin::Result<Confirmation>) -> Option<Identity> {
    match result {
        Ok(Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message))) => Some(identity(message)),
        _ => None,
    }
}

fn identity(message: &lapin::message::BasicReturnMessage) -> Identity {
    let id = message.delivery.properties.message_id().as_ref().map_or("", ShortString::as_str);
    (message.delivery.routing_key.to_string(), id.to_owned())
}

/// A message as lapin gets it.
struct Outgoing {
    number: u64,
    exchange: ShortString,
    key: ShortString,
    rung: Option<Rung>,
    payload: Bytes,
    properties: lapin::BasicProperties,
}

impl Outgoing {
    async fn send(self, channel: &Channel) -> (u64, lapin::Result<PublisherConfirm>) {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let sent = channel.basic_publish(self.exchange, self.key, options, &self.payload, self.properties).await;
        (self.number, sent)
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
