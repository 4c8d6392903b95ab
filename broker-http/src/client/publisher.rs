//! Publishing: a queue per topic with one request under way at a time, so that the order of calls
//! is the order of messages; what queued up meanwhile goes together.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use broker_core::{Confirm, Error, Message, Operation, Producer, Publish, PublishBatch, Receipt, Result, Topic};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::http::Call;
use super::shared::{Shared, runtime};
use super::wire::{self, Accepted, Results};
use crate::event::{BATCH_TYPE, EVENT_TYPE, Envelope, binary, json};

/// Messages of one request at most, and their bytes; one message may have more.
const BATCH_MESSAGES: usize = 1_000;
const BATCH_BYTES: usize = 1 << 20;

/// Messages and bytes a queue holds before it refuses more.
const QUEUE_MESSAGES: usize = 100_000;
const QUEUE_BYTES: usize = 64 << 20;

/// The messages on their way to one topic, whoever publishes them.
pub(super) struct Queue {
    shared: Arc<Shared>,
    topic: Topic,
    /// Path and query of the request.
    path: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    /// Whether a task sends what waits.
    sending: bool,
    /// Operations of the request under way that somebody still waits for.
    heard: Vec<Heard>,
    /// Ends the request under way once nobody waits for any of it: a daemon that was still waiting
    /// for room has then not taken it.
    withdraw: CancellationToken,
}

/// An operation, by its ticket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heard {
    One(u64),
    Batch(u64),
}

struct Waiting {
    message: Message,
    outcome: Outcome,
}

/// Whom to tell what became of a message.
enum Outcome {
    One(u64),
    OfBatch { batch: Arc<Batch>, index: usize },
}

/// A batch whose messages may go in several requests.
struct Batch {
    ticket: u64,
    results: Mutex<Vec<Option<Result<Receipt>>>>,
    left: AtomicUsize,
}

impl Queue {
    pub(super) fn new(shared: Arc<Shared>, topic: Topic, require_route: bool) -> Self {
        let query = if require_route { "?require_route=true" } else { "" };
        let path = format!("/topics/{topic}{query}");
        Self { shared, topic, path, state: Mutex::default() }
    }

    /// Queues messages and sees that they are sent.
    fn push(self: &Arc<Self>, messages: impl ExactSizeIterator<Item = Waiting>) -> Result<()> {
        let mut state = self.state.lock();
        // Looked at under the lock: `close` cuts what it finds, and finds what came before it.
        self.shared.check_open()?;
        if state.waiting.len() >= QUEUE_MESSAGES || state.bytes >= QUEUE_BYTES {
            return Err(Error::unavailable(format!(
                "{} messages wait to be published to {}; await some before publishing more",
                state.waiting.len(),
                self.topic
            )));
        }
        let idle = if state.sending { None } else { Some(runtime()?) };
        state.sending = true;
        state.waiting.reserve(messages.len());
        for waiting in messages {
            state.bytes += waiting.message.size();
            state.waiting.push_back(waiting);
        }
        drop(state);
        if let Some(runtime) = idle {
            let sender = Sender { queue: Arc::clone(self), under_way: Vec::new(), finished: false };
            self.shared.spawn(&runtime, sender.run());
        }
        Ok(())
    }

    /// The next messages to go together, and what ends their request early; none once the queue is
    /// empty, and the sender ends.
    fn next(&self, under_way: &mut Vec<Waiting>) -> CancellationToken {
        let mut state = self.state.lock();
        let mut bytes = 0;
        while under_way.len() < BATCH_MESSAGES
            && let Some(next) = state.waiting.front()
        {
            let size = next.message.size();
            if !under_way.is_empty() && bytes + size > BATCH_BYTES {
                break;
            }
            if let Some(waiting) = state.waiting.pop_front() {
                state.bytes = state.bytes.saturating_sub(size);
                if waiting.outcome.take(&self.shared) {
                    bytes += size;
                    under_way.push(waiting);
                }
            }
        }
        state.sending = !under_way.is_empty();
        state.heard.clear();
        for waiting in under_way.iter() {
            let heard = waiting.outcome.heard();
            if state.heard.last() != Some(&heard) {
                state.heard.push(heard);
            }
        }
        if state.withdraw.is_cancelled() {
            state.withdraw = CancellationToken::new();
        }
        state.withdraw.clone()
    }

    /// Nobody waits for an operation any more.
    fn unheard(&self, dropped: Heard) {
        let mut state = self.state.lock();
        if let Some(index) = state.heard.iter().position(|heard| *heard == dropped) {
            state.heard.swap_remove(index);
            if state.heard.is_empty() {
                state.withdraw.cancel();
            }
        }
    }
}

impl Confirm<Receipt> for Queue {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Receipt>> {
        self.shared.confirms.poll_confirm(ticket, cx)
    }

    fn abandon(&self, ticket: u64) {
        self.shared.confirms.abandon(ticket);
        self.unheard(Heard::One(ticket));
    }
}

impl Confirm<Vec<Result<Receipt>>> for Queue {
    fn poll_confirm(&self, ticket: u64, cx: &mut Context<'_>) -> Poll<Result<Vec<Result<Receipt>>>> {
        self.shared.batches.poll_confirm(ticket, cx)
    }

    fn abandon(&self, ticket: u64) {
        self.shared.batches.abandon(ticket);
        self.unheard(Heard::Batch(ticket));
    }
}

impl Outcome {
    /// Whether it is still wanted.
    fn take(&self, shared: &Shared) -> bool {
        match self {
            Self::One(ticket) => shared.confirms.take(*ticket),
            // A batch is withdrawn as long as none of it was sent.
            Self::OfBatch { batch, .. } => shared.batches.take(batch.ticket),
        }
    }

    fn heard(&self) -> Heard {
        match self {
            Self::One(ticket) => Heard::One(*ticket),
            Self::OfBatch { batch, .. } => Heard::Batch(batch.ticket),
        }
    }

    fn complete(self, shared: &Shared, result: Result<Receipt>) {
        match self {
            Self::One(ticket) => shared.confirms.complete(ticket, result),
            Self::OfBatch { batch, index } => {
                if let Some(slot) = batch.results.lock().get_mut(index) {
                    *slot = Some(result);
                }
                if batch.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let missing = || Err(Error::backend("a message of the batch has no result"));
                    let results = std::mem::take(&mut *batch.results.lock());
                    let results = results.into_iter().map(|result| result.unwrap_or_else(missing)).collect();
                    shared.batches.complete(batch.ticket, Ok(results));
                }
            }
        }
    }
}

/// The task that sends a queue until it is empty.
struct Sender {
    queue: Arc<Queue>,
    under_way: Vec<Waiting>,
    /// Whether it found the queue empty; then another sender may be at work by now.
    finished: bool,
}

impl Sender {
    async fn run(mut self) {
        loop {
            let queue = Arc::clone(&self.queue);
            let withdraw = queue.next(&mut self.under_way);
            let results = match self.under_way.as_slice() {
                [] => {
                    self.finished = true;
                    return;
                }
                [one] => queue.send_one(&one.message, &withdraw).await.map(|receipt| vec![Ok(receipt)]),
                many => queue.send_many(many, &withdraw).await,
            };
            let mut results = match results {
                Ok(results) => results.into_iter(),
                Err(error) => vec![Err(error); self.under_way.len()].into_iter(),
            };
            for Waiting { outcome, .. } in self.under_way.drain(..) {
                let missing = || Err(Error::backend("the daemon answered fewer results than messages"));
                outcome.complete(&queue.shared, results.next().unwrap_or_else(missing));
            }
        }
    }
}

impl Drop for Sender {
    /// Cut short, by `close` at its deadline or by the end of the runtime: nobody is left waiting.
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let shared = &self.queue.shared;
        let name = shared.http.options().name();
        let unknown = Error::closed(format!(
            "the broker {name} was closed before it answered; whether the message was published is unknown"
        ));
        let unsent = Error::closed(format!("the broker {name} was closed before the message was sent"));
        let waiting = {
            let mut state = self.queue.state.lock();
            state.sending = false;
            state.bytes = 0;
            std::mem::take(&mut state.waiting)
        };
        shared.cut_short(self.under_way.len() + waiting.len());
        for Waiting { outcome, .. } in self.under_way.drain(..) {
            outcome.complete(shared, Err(unknown.clone()));
        }
        for Waiting { outcome, .. } in waiting {
            outcome.complete(shared, Err(unsent.clone()));
        }
    }
}

impl Queue {
    async fn send_one(&self, message: &Message, withdraw: &CancellationToken) -> Result<Receipt> {
        let envelope = Envelope::new(&self.topic, message);
        let mut headers = HeaderMap::new();
        let body = if binary::fits(message) {
            binary::encode(envelope, binary::Mode::Raw, &mut headers)
        } else {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_TYPE));
            let mut body = Vec::with_capacity(message.size() * 4 / 3 + 512);
            json::encode(envelope, &mut body);
            body.into()
        };
        let answer = self.post(headers, body, withdraw).await?;
        wire::read::<Accepted>("publish", &answer)?.into_receipt()
    }

    async fn send_many(&self, messages: &[Waiting], withdraw: &CancellationToken) -> Result<Vec<Result<Receipt>>> {
        let size: usize = messages.iter().map(|waiting| waiting.message.size() * 4 / 3 + 400).sum();
        let mut body = Vec::with_capacity(size);
        json::encode_batch(messages.iter().map(|waiting| Envelope::new(&self.topic, &waiting.message)), &mut body);
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(BATCH_TYPE));
        let answer = self.post(headers, body.into(), withdraw).await?;
        let Results { results } = wire::read("publish", &answer)?;
        if results.len() != messages.len() {
            return Err(Error::backend(format!(
                "the daemon answered {} results for {} messages; what became of each is unknown",
                results.len(),
                messages.len()
            )));
        }
        Ok(results.into_iter().map(wire::Outcome::into_result).collect())
    }

    async fn post(&self, headers: HeaderMap, body: Bytes, withdraw: &CancellationToken) -> Result<Bytes> {
        let call = Call::new(Method::POST, &self.path, self.shared.http.options().timeout);
        let answer = self.shared.expect(Call { headers, body, finish: Some(withdraw), ..call }).await;
        Ok(answer.map_err(|error| error.context(format!("publish to {}", self.topic)))?.body)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// What a [`Publisher`](broker_core::Publisher) holds.
pub(super) struct HttpProducer(pub(super) Arc<Queue>);

impl Producer for HttpProducer {
    fn publish(&self, message: Message) -> Publish {
        let shared = &self.0.shared;
        if let Err(error) = check(&message) {
            return Operation::from(error);
        }
        let ticket = shared.confirms.reserve();
        let operation = Operation::confirmed(Arc::<Queue>::clone(&self.0), ticket);
        if let Err(error) = self.0.push(std::iter::once(Waiting { message, outcome: Outcome::One(ticket) })) {
            shared.confirms.complete(ticket, Err(error));
        }
        operation
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        let shared = &self.0.shared;
        if messages.is_empty() {
            return Operation::ready(shared.check_open().map(|()| Vec::new()));
        }
        let mut results = Vec::with_capacity(messages.len());
        results.extend(messages.iter().map(|message| check(message).err().map(Err)));
        let good = results.iter().filter(|result| result.is_none()).count();
        if good == 0 {
            return Operation::ready(Ok(results.into_iter().flatten().collect()));
        }
        let ticket = shared.batches.reserve();
        let operation = Operation::confirmed(Arc::<Queue>::clone(&self.0), ticket);
        let skip: Vec<bool> = results.iter().map(Option::is_some).collect();
        let batch = Arc::new(Batch { ticket, results: Mutex::new(results), left: AtomicUsize::new(good) });
        let waiting: Vec<_> = messages
            .into_iter()
            .zip(skip)
            .enumerate()
            .filter(|(_, (_, skip))| !skip)
            .map(|(index, (message, _))| Waiting {
                message,
                outcome: Outcome::OfBatch { batch: Arc::clone(&batch), index },
            })
            .collect();
        if let Err(error) = self.0.push(waiting.into_iter()) {
            shared.batches.complete(ticket, Err(error));
        }
        operation
    }
}

/// Refuses times that RFC 3339 cannot write: they would arrive as others.
fn check(message: &Message) -> Result<()> {
    for (what, time) in [
        ("timestamp", Some(message.timestamp())),
        ("delivery time", message.deliver_at()),
        ("expiry", message.expires_at()),
    ] {
        if let Some(time) = time.filter(|time| !WRITABLE.contains(&time.as_millis())) {
            return Err(Error::invalid(format!(
                "message {}: its {what} of {} ms is outside of the years 1 to 9999, which is what HTTP can write",
                message.id(),
                time.as_millis()
            )));
        }
    }
    Ok(())
}

/// Milliseconds of the years 1 to 9999, but for the last two days, which need not exist everywhere.
const WRITABLE: std::ops::Range<i64> = -62_135_596_800_000..253_402_128_000_000;
