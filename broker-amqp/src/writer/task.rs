//! The task that publishes: hands messages to lapin, completes them as confirms come, and begins again
//! on another channel with what is not confirmed.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use broker_core::{Error, Receipt, Result, Timestamp};
use bytes::Bytes;
use futures_util::future::{Either, join_all, pending};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, PublisherConfirm};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::{DEFAULT_FRAME_MAX, Entry, Envelope, Route, Writer};
use crate::error::{from_lapin, is_final};
use crate::ladder::{Leads, Rung};
use crate::link::{Live, Wait};
use crate::naming::short;
use crate::returns::{Decided, Identity, Returns};
use crate::{topology, wire};

/// Publishes handed to lapin at a time, and bytes.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 1 << 20;
/// How often deadlines are looked at: a twentieth of the publish timeout, within these.
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_millis(100);

/// What the task owns.
pub(super) struct Task {
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
    pub(super) fn new(writer: Arc<Writer>) -> Self {
        Self { writer, unsent: VecDeque::new(), sent: BTreeMap::new(), number: 0 }
    }

    /// What is left of it, in order.
    pub(super) fn unconfirmed(self) -> Vec<Entry> {
        self.sent.into_values().chain(self.unsent).collect()
    }

    pub(super) async fn run(&mut self) {
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
        // Deadlines are looked at now and then: a timer per message would cost more than the message.
        let mut tick = interval((self.writer.options.publish_timeout / 20).clamp(TICK_MIN, TICK_MAX));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let error = loop {
            if sending.is_none() {
                match self.batch(live, &mut rungs).await {
                    Ok(batch) if batch.is_empty() => {}
                    Ok(batch) => sending = Some(Box::pin(join_all(batch.into_iter().map(|one| one.send(channel))))),
                    Err(error) => break error,
                }
            }
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
                _ = tick.tick(), if !self.sent.is_empty() => self.expire(),
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
            Route::Topic(topic) => {
                (short("exchange", &options.exchange)?, short("topic", topic.as_str())?, Leads::ToTopic)
            }
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
            properties: wire::encode(message, travel, options.style())?,
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
