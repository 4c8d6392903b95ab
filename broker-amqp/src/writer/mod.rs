//! Publishing: one task, one channel, confirms always.
//!
//! Callers push envelopes into a queue and get a ticket; the task hands them to lapin, many at a time,
//! and completes the tickets as confirms arrive, many at a time again ([`flight`] says how). What is unconfirmed when the channel is lost is sent again, in order and
//! before anything newer, until its own deadline.

mod flight;
mod room;
mod rungs;
mod task;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use broker_core::{Confirms, Error, ErrorKind, Message, Operation, Publish, Receipt, Result, Topic};
use lapin::types::ShortString;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::AmqpOptions;
use crate::ladder::Rung;
use crate::link::{Link, closed};
use crate::returns::Identity;
use crate::wire::{self, Travel};
use room::Line;
use task::Task;

/// Bytes that wait for their confirm at most; beyond, publishes wait for room.
const MAX_PENDING_BYTES: usize = 512 << 20;
/// What is held beside each message, about; it counts among them.
const BESIDE: usize = 512;
/// What RabbitMQ negotiates unless it is told otherwise.
const DEFAULT_FRAME_MAX: usize = 131_072;

/// Where a message goes.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// To whoever is bound to the exchange.
    Topic(Topic),
    /// To one queue alone.
    Queue(ShortString),
    /// To the exchange before a group's several queues.
    Lanes(ShortString),
    /// To a dead-letter topic, and to the group's keeping queue, by the exchange before that.
    Dead { keeping: ShortString, topic: Topic },
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
    /// The delay queue that it was sent to, if it was.
    rung: Option<Rung>,
    /// Was under way when the server closed the channel over a message: it is sent again with nothing
    /// beside it, so that the next time it is clear whose fault it was.
    alone: bool,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.envelope.message.size() + BESIDE
    }

    fn identity(&self) -> Identity {
        (self.key.to_string(), self.envelope.message.id().to_string())
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Entry>,
    /// Those for which there is no room yet.
    beyond: Line,
    ended: bool,
}

/// The queue, shared by every publisher of a broker.
pub(crate) struct Writer {
    options: Arc<AmqpOptions>,
    link: Arc<Link>,
    /// Where delay queues are declared: who waits for that holds up no confirm.
    asking: Arc<Link>,
    queue: Mutex<Queue>,
    wake: Notify,
    confirms: Arc<Confirms<Receipt>>,
    pending: AtomicUsize,
    /// Of those that have room.
    pending_bytes: AtomicUsize,
    max_pending_bytes: usize,
    /// Told when `pending` comes to nothing.
    idle: Notify,
    frame_max: AtomicUsize,
    stop: CancellationToken,
}

impl Writer {
    pub(crate) fn new(options: Arc<AmqpOptions>, link: Arc<Link>, asking: Arc<Link>, stop: CancellationToken) -> Self {
        Self {
            options,
            link,
            asking,
            queue: Mutex::default(),
            wake: Notify::new(),
            confirms: Arc::new(Confirms::new()),
            pending: AtomicUsize::new(0),
            pending_bytes: AtomicUsize::new(0),
            max_pending_bytes: MAX_PENDING_BYTES,
            idle: Notify::new(),
            frame_max: AtomicUsize::new(DEFAULT_FRAME_MAX),
            stop,
        }
    }

    /// Bytes that a frame may have.
    pub(crate) fn frame_max(&self) -> usize {
        self.frame_max.load(Ordering::Relaxed)
    }

    /// Takes a message; what is returned ends when the server has confirmed it, or at the publish
    /// timeout. The order of calls is the order of sending.
    pub(crate) fn submit(self: &Arc<Self>, envelope: Envelope) -> Publish {
        if let Err(error) = wire::check(&envelope.message, self.frame_max()) {
            return Operation::from(error);
        }
        let deadline = Instant::now() + self.options.publish_timeout;
        let mut queue = self.queue.lock();
        if queue.ended {
            return Operation::from(closed());
        }
        let (ticket, publish) = self.confirms.issue();
        let entry = Entry { ticket, deadline, envelope, key: ShortString::default(), rung: None, alone: false };
        self.pending.fetch_add(1, Ordering::Relaxed);
        let publish = if queue.beyond.is_empty() && self.has_room() {
            self.admit(&mut queue, entry);
            publish
        } else {
            let place = queue.beyond.push(entry);
            room::in_line(self, place, publish)
        };
        drop(queue);
        self.wake.notify_one();
        publish
    }

    fn has_room(&self) -> bool {
        self.pending_bytes.load(Ordering::Relaxed) < self.max_pending_bytes
    }

    fn admit(&self, queue: &mut Queue, entry: Entry) {
        self.pending_bytes.fetch_add(entry.bytes(), Ordering::Relaxed);
        queue.waiting.push_back(entry);
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

    /// The next to be sent. Those that wait for room have it as soon as there is.
    fn next(&self) -> Option<Entry> {
        let mut queue = self.queue.lock();
        while !queue.beyond.is_empty() && self.has_room() {
            let Some(entry) = queue.beyond.pop() else { break };
            self.admit(&mut queue, entry);
        }
        queue.waiting.pop_front()
    }

    fn finish(&self, entry: &Entry, result: Result<Receipt>) {
        self.forget(entry);
        self.confirms.complete(entry.ticket, result);
    }

    fn forget(&self, entry: &Entry) {
        self.pending_bytes.fetch_sub(entry.bytes(), Ordering::Relaxed);
        self.one_less();
    }

    /// Ends one that had no room.
    fn turn_away(&self, entry: &Entry, error: Error) {
        self.one_less();
        self.confirms.complete(entry.ticket, Err(error));
    }

    fn one_less(&self) {
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.idle.notify_waiters();
        }
    }

    /// Why a message had no room until its time was over.
    fn full(&self) -> Error {
        let full = format!(
            "{} MiB of publishes wait for RabbitMQ to confirm them, and there was no room for this one within {:?}: it was not sent",
            self.max_pending_bytes >> 20,
            self.options.publish_timeout
        );
        match self.out_of_reach() {
            Some(why) => Error::unavailable(format!("{full}; {}", why.message())).with_source(why),
            None => Error::unavailable(full),
        }
    }

    /// Why a message whose time is over was not confirmed.
    pub(crate) fn too_late(&self) -> Error {
        self.out_of_reach().unwrap_or_else(|| {
            Error::timeout(format!(
                "RabbitMQ did not confirm within {:?}: whether it has the message is unknown",
                self.options.publish_timeout
            ))
        })
    }

    /// Why the server takes nothing, where that is known.
    fn out_of_reach(&self) -> Option<Error> {
        if let Some(blocked) = self.blocked() {
            return Some(blocked);
        }
        let state = self.link.state();
        let error = state.last_error.filter(|error| state.live.is_none() && error.kind() != ErrorKind::Timeout)?;
        Some(Error::unavailable(format!("RabbitMQ is not reached: {}", error.message())).with_source(error))
    }

    /// What the server said when it stopped taking messages, while it does not.
    fn blocked(&self) -> Option<Error> {
        let reason = self.link.state().blocked?;
        Some(Error::unavailable(format!("RabbitMQ blocks publishers ({reason}): publish again later")))
    }

    /// All that nobody has begun to send, and all without room.
    fn take_waiting(&self) -> (VecDeque<Entry>, Line) {
        let mut queue = self.queue.lock();
        (std::mem::take(&mut queue.waiting), queue.beyond.take())
    }

    /// The task. What waits for it is ended with it, also where the runtime ends before it has come to this.
    pub(crate) fn run(self: Arc<Self>) -> impl Future<Output = ()> + Send {
        let mut task = Task::new(Arc::clone(&self));
        async move {
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = task.run() => {}
            }
        }
    }

    /// The end: of `left`, which the task had, and of all that it had not come to.
    fn end(&self, left: Vec<Entry>) {
        self.queue.lock().ended = true;
        let (waiting, mut beyond) = self.take_waiting();
        let why = if self.stop.is_cancelled() { "the broker closed" } else { "the broker's runtime ended" };
        for entry in left.into_iter().chain(waiting) {
            let unknown = Error::closed(format!("{why} before RabbitMQ confirmed: the outcome is unknown"));
            self.finish(&entry, Err(unknown));
        }
        while let Some(entry) = beyond.pop() {
            self.turn_away(&entry, Error::closed(format!("{why} before there was room for this: it was not sent")));
        }
    }
}
