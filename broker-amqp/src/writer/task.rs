//! The task that publishes: hands messages to lapin, completes them as confirms come, and begins again
//! on another channel with what is not confirmed.

use std::collections::{BTreeMap, VecDeque};
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Receipt, Result, Timestamp};
use bytes::Bytes;
use futures_util::FutureExt;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, Confirmation};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::flight::Flight;
use super::rungs::{Declared, Rungs};
use super::{DEFAULT_FRAME_MAX, Entry, Envelope, Route, Writer};
use crate::channel::OwnChannel;
use crate::error::{from_lapin, is_final};
use crate::ladder::{Leads, Rung};
use crate::link::{Live, Wait};
use crate::naming::short;
use crate::returns::{Decided, Identity, Returns};
use crate::{topology, wire};

/// Publishes handed to lapin at a time, and bytes.
const BATCH: usize = 64;
/// Unconfirmed on the channel at most; beyond, they wait in the queue. More would only lie in lapin.
const MAX_UNDER_WAY: usize = 8192;
const BATCH_BYTES: usize = 1 << 20;
/// How often deadlines are looked at: a twentieth of the publish timeout, within these.
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_millis(100);

/// What the task owns.
pub(super) struct Task {
    writer: Arc<Writer>,
    /// To be sent, the oldest first, before what is in the queue.
    unsent: VecDeque<Entry>,
    /// Those that wait for a delay queue.
    rungs: Rungs,
    /// Sent on this channel and not confirmed, by the order of sending.
    sent: BTreeMap<u64, Entry>,
    number: u64,
}

type Resolved = (u64, lapin::Result<Confirmation>);

impl Task {
    pub(super) fn new(writer: Arc<Writer>) -> Self {
        Self {
            rungs: Rungs::new(Arc::clone(&writer)),
            writer,
            unsent: VecDeque::new(),
            sent: BTreeMap::new(),
            number: 0,
        }
    }

    pub(super) async fn run(&mut self) {
        let mut wait = Wait::new(self.writer.options.max_reconnect_wait);
        loop {
            let live = self.connected().await;
            let writer = Arc::clone(&self.writer);
            let opened = self.expiring(timeout(writer.options.connect_timeout, open(&writer, &live))).await;
            let error = match opened {
                Ok(Ok(channel)) => {
                    wait.reset();
                    let error = self.session(&channel).await;
                    // A channel closed on a connection that stands was closed over a message.
                    if live.is_up() && is_final(&error) && self.blame(&error) {
                        self.lost();
                        continue;
                    }
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
            self.expiring(sleep(wait.next())).await;
        }
    }

    /// What was sent and not confirmed is sent again, first.
    fn lost(&mut self) {
        let mut again: VecDeque<Entry> = std::mem::take(&mut self.sent).into_values().collect();
        again.append(&mut self.unsent);
        self.unsent = again;
    }

    /// The server refused a message by closing the channel, and does not say which: the one that was
    /// under way alone, or one of those that from now on go alone. False if there was none.
    fn blame(&mut self, error: &Error) -> bool {
        let alone = self.sent.first_entry().filter(|first| first.get().alone);
        if let Some(guilty) = alone {
            let guilty = guilty.remove();
            self.writer.finish(&guilty, Err(refused(error)));
            return true;
        }
        self.sent.values_mut().for_each(|entry| entry.alone = true);
        !self.sent.is_empty()
    }

    fn fail_all(&mut self, error: &Error) {
        let (queued, mut beyond) = self.writer.take_waiting();
        for entry in self.rungs.take_waiting().into_iter().chain(self.unsent.drain(..)).chain(queued) {
            self.writer.finish(&entry, Err(error.clone()));
        }
        while let Some(entry) = beyond.pop() {
            self.writer.turn_away(&entry, error.clone());
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let sent = self.sent.values().next().map(|entry| entry.deadline);
        let unsent = self.unsent.front().map(|entry| entry.deadline);
        let (queued, beyond) = {
            let queue = self.writer.queue.lock();
            (queue.waiting.front().map(|entry| entry.deadline), queue.beyond.next_deadline())
        };
        [sent, unsent, queued, beyond, self.rungs.next_deadline()].into_iter().flatten().min()
    }

    /// Ends what is past its deadline. All have the same timeout, so that the oldest go first.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.sent.first_entry().filter(|first| first.get().deadline <= now) {
            let entry = first.remove();
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
        while let Some(entry) = self.unsent.pop_front_if(|entry| entry.deadline <= now) {
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
        self.rungs.expire(now);
        loop {
            let entry = self.writer.queue.lock().waiting.pop_front_if(|entry| entry.deadline <= now);
            let Some(entry) = entry else { break };
            self.writer.finish(&entry, Err(self.writer.too_late()));
        }
        loop {
            let entry = self.writer.queue.lock().beyond.pop_late(now);
            let Some(entry) = entry else { break };
            self.writer.turn_away(&entry, self.writer.full());
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

    /// Does `work`, whose answer may take longer than publishes wait (the server stalls, or blocks us): they end
    /// at their deadlines all the same.
    async fn expiring<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            self.expire();
            // Others may come meanwhile.
            let soon = Instant::now() + TICK_MAX;
            tokio::select! {
                done = &mut work => return done,
                () = sleep_until(self.next_deadline().unwrap_or(soon).min(soon)) => {}
            }
        }
    }

    /// Sends and confirms until the channel is lost; tells why.
    async fn session(&mut self, channel: &Channel) -> Error {
        let mut returns = Returns::new();
        let mut flight = Flight::new();
        self.rungs.doubt();
        // Deadlines are looked at now and then: a timer per message would cost more than the message.
        let mut tick = interval((self.writer.options.publish_timeout / 20).clamp(TICK_MIN, TICK_MAX));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let error = loop {
            self.batch(flight.len()).into_iter().for_each(|one| flight.push(one.deliver(channel)));
            tokio::select! {
                ended = poll_fn(|cx| flight.poll_ended(cx)) => {
                    if let Some(error) = self.confirmed(ended, &mut flight, &mut returns, channel) {
                        break error;
                    }
                }
                declared = self.rungs.declared() => self.declared(declared),
                () = self.writer.wake.notified() => {}
                _ = tick.tick(), if !self.sent.is_empty() || self.rungs.are_awaited() => self.expire(),
            }
        };
        for Decided { item, returned } in returns.end() {
            self.acked(item, returned);
        }
        // A publish that came after only tells that the channel is closed; others may tell why.
        let errors = flight.drain().into_iter().filter_map(|(_, result)| result.err());
        errors.map(from_lapin).find(is_final).unwrap_or(error)
    }

    /// The next messages to send, their properties written.
    fn batch(&mut self, under_way: usize) -> Vec<Outgoing> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() + under_way < MAX_UNDER_WAY && batch.len() < BATCH && bytes < BATCH_BYTES {
            // One that goes alone waits for all before it, and all behind it wait for it.
            let is_alone = |entry: &Entry| entry.alone;
            if self.sent.values().next().is_some_and(is_alone)
                || self.unsent.front().is_some_and(is_alone) && !self.sent.is_empty()
            {
                break;
            }
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
            if let Some(rung) = outgoing.rung.filter(|rung| !self.rungs.stands(*rung)) {
                // It is prepared again.
                self.rungs.wait_for(rung, entry);
                continue;
            }
            bytes += entry.bytes();
            self.sent.insert(outgoing.number, entry);
            batch.push(outgoing);
        }
        batch
    }

    /// What waited for a delay queue is sent first, or fails.
    fn declared(&mut self, Declared { mut waited, result }: Declared) {
        match result {
            Ok(()) => {
                waited.append(&mut self.unsent);
                // Deadlines are looked at from the front.
                waited.make_contiguous().sort_by_key(|entry| entry.deadline);
                self.unsent = waited;
            }
            Err(error) => waited.into_iter().for_each(|entry| self.writer.finish(&entry, Err(error.clone()))),
        }
    }

    fn prepare(&mut self, entry: &mut Entry) -> Result<Outgoing> {
        let options = &self.writer.options;
        let Envelope { route, message, travel, .. } = &entry.envelope;
        let due = travel.due.or(message.deliver_at());
        let now = Timestamp::now();
        let wait = due.map(|due| due.since(now)).filter(|wait| !wait.is_zero());
        let (exchange, key, leads) = match route {
            Route::Topic(topic) => {
                (short("exchange", &options.exchange)?, short("topic", topic.as_str())?, Leads::ToTopic)
            }
            Route::Queue(queue) => (ShortString::default(), queue.clone(), Leads::ToQueue),
            Route::Lanes(exchange) => (exchange.clone(), ShortString::default(), Leads::ToQueue),
            Route::Dead { keeping, topic } => (keeping.clone(), short("topic", topic.as_str())?, Leads::ToTopic),
        };
        // No delay queue leads to several.
        let wait = wait.filter(|_| matches!(route, Route::Topic(_) | Route::Queue(_)));
        // A millisecond more: times are cut to whole ones.
        let left = message.expires_at().map_or(Duration::MAX, |time| time.since(now));
        let rung = wait.map(|wait| Rung::before(leads, wait + Duration::from_millis(1), left));
        let exchange = match rung {
            Some(rung) => rung.name(&options.exchange)?,
            None => exchange,
        };
        entry.key = key.clone();
        entry.rung = rung;
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

    /// Completes what is confirmed: `resolved`, and whatever else is by now.
    fn confirmed<F: Future<Output = Resolved>>(
        &mut self,
        mut resolved: Vec<Resolved>,
        flight: &mut Flight<F>,
        returns: &mut Returns<Entry>,
        channel: &Channel,
    ) -> Option<Error> {
        while !resolved.is_empty() {
            // lapin resolves all that one ack confirms under a lock; this takes it once, so that all
            // are resolved that could bring a return of these.
            // With nothing else under way all are here already.
            let later = match flight.len() {
                0 => Vec::new(),
                _ => {
                    if let Some(Ok(dropped)) = channel.wait_for_confirms().now_or_never() {
                        dropped.iter().for_each(|message| returns.seen(identity(message)));
                    }
                    flight.drain()
                }
            };
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
                                self.acked(entry, false);
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
                for Decided { item, returned } in returns.confirmed(batch, flight.len() + later.len()) {
                    self.acked(item, returned);
                }
            }
            resolved = later;
        }
        None
    }

    fn acked(&mut self, entry: Entry, returned: bool) {
        if let Some(rung) = entry.rung.filter(|_| returned) {
            // Somebody has deleted the delay queue, and not the exchange before it: the message is nowhere.
            self.rungs.is_gone(rung);
            return self.rungs.wait_for(rung, entry);
        }
        let message = &entry.envelope.message;
        let result = match &entry.envelope.route {
            Route::Topic(topic) if returned && entry.envelope.require_route => {
                Err(Error::unroutable(format!("no group or subscription matches topic {topic}")))
            }
            Route::Queue(gone) | Route::Lanes(gone) | Route::Dead { keeping: gone, .. } if returned => {
                Err(Error::not_found(format!("queue {gone} is gone")))
            }
            _ => {
                let mut receipt = Receipt::new(message.id().clone());
                // Where a message goes when its delay is over is known then.
                receipt.routed = entry.rung.is_none().then_some(!returned);
                Ok(receipt)
            }
        };
        self.writer.finish(&entry, result);
    }
}

/// However it ends, with the broker or with its runtime: nobody waits any longer.
impl Drop for Task {
    fn drop(&mut self) {
        let sent = std::mem::take(&mut self.sent).into_values();
        let left = sent.chain(self.rungs.take_waiting()).chain(self.unsent.drain(..)).collect();
        self.writer.end(left);
    }
}

/// A channel with confirms, and the exchange.
async fn open(writer: &Writer, live: &Live) -> Result<OwnChannel> {
    let options = &writer.options;
    let channel = live.channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(from_lapin)?;
    topology::declare_exchange(&channel, options).await?;
    let frame_max = live.connection.configuration().frame_max() as usize;
    writer.frame_max.store(if frame_max == 0 { DEFAULT_FRAME_MAX } else { frame_max }, Ordering::Relaxed);
    Ok(channel)
}

/// What the server said when it closed the channel over a message, as the message's error.
fn refused(error: &Error) -> Error {
    let kind = match error.kind() {
        // PRECONDITION_FAILED says both that it is too large, and that a property is not in order.
        ErrorKind::Conflict if error.message().contains("larger than") => ErrorKind::TooLarge,
        ErrorKind::Conflict => ErrorKind::Invalid,
        kind => kind,
    };
    Error::new(kind, error.message()).with_source(error.clone())
}

fn nacked() -> Error {
    Error::unavailable("RabbitMQ refused the message: a queue it goes to is full, or not available")
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
    /// Sends it, and waits until it is confirmed.
    async fn deliver(self, channel: &Channel) -> Resolved {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let sent = channel.basic_publish(self.exchange, self.key, options, &self.payload, self.properties).await;
        let confirmed = match sent {
            Ok(confirm) => confirm.await,
            Err(error) => Err(error),
        };
        (self.number, confirmed)
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
