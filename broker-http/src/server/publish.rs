//! `POST /topics/{topic}`: a body becomes one message or many, and the answer says what became of
//! each.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use broker_core::{Error, ErrorKind, Message, Operation, Receipt, Timestamp, Topic};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use serde::Serialize;
use tokio::time::sleep;

use super::access::Caller;
use super::idempotency::{Fingerprint, Key, Slot, TryAgain};
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::publishers::Published;
use super::query::name_in_path;
use super::reader::Reader;
use super::topics::Bounds;
use super::{Shared, body, lines};
use crate::event::{Decoded, Format, Options, binary, json, ndjson};
use crate::outgoing::Turn;
use crate::traces::Parent;

/// How long a shutdown waits for a publish before it takes it for one that waits for room: a broker behind another daemon
/// confirms each.
const CONFIRMING: Duration = Duration::from_millis(100);

#[derive(Serialize)]
struct Refused<'a> {
    error: &'a Problem,
}

/// Handles the request; counts it and how long it took.
pub(crate) async fn publish(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    let begun = Instant::now();
    let (parts, body) = request.into_parts();
    let answer = match prepare(&shared, &parts) {
        Ok(prepared) => answer(&shared, prepared, &parts, body).await,
        Err(problem) => Err(problem),
    };
    let mut response = answer.unwrap_or_else(IntoResponse::into_response);
    if let Some(caller) = Caller::of(&parts.extensions) {
        caller.tell(response.headers_mut());
    }
    shared.metrics.published(response.status(), begun.elapsed());
    if let Some(Refusal::Memory | Refusal::TopicMemory) = response.extensions().get() {
        look_for_expired(&shared);
    }
    response
}

/// A publisher found no room: a broker in this process lets go of what has expired when it is asked for its numbers.
fn look_for_expired(shared: &Shared) {
    if shared.ledger.want_look() {
        let broker = Arc::clone(&shared.broker);
        tokio::spawn(async move { broker.status().await });
    }
}

/// What the head of the request says.
struct Prepared {
    published: Arc<Published>,
    options: Options,
    format: Format,
    key: Option<Key>,
    caller: Option<Caller>,
    /// Who reads the results of several; that of one is hardly an answer.
    reader: Option<Reader>,
}

fn prepare(shared: &Shared, parts: &http::request::Parts) -> Answer<Prepared> {
    if shared.is_draining() {
        return Err(Problem::draining());
    }
    let topic = name_in_path(&parts.uri)?;
    let caller = Caller::of(&parts.extensions);
    let published = shared.publishers.of(&topic, caller.as_ref())?;
    published.check_room()?;
    let options = Options::parse(parts.uri.query(), &parts.headers)?;
    let format = Format::of(&parts.headers)?;
    let key = Key::of(&parts.headers, &topic, caller.as_ref())?;
    let several = matches!(format, Format::Batch | Format::Lines);
    let reader = several.then(|| Reader::of(shared, &parts.extensions));
    Ok(Prepared { published, options, format, key, caller, reader })
}

async fn answer(shared: &Arc<Shared>, prepared: Prepared, parts: &http::request::Parts, body: Body) -> Answer {
    let headers = &parts.headers;
    let limits = shared.limits();
    if prepared.format == Format::Lines && lines::wants_stream(headers) {
        let Prepared { published, options, key, caller, .. } = prepared;
        return lines::stream(shared, published, options, caller, headers, body, key.is_some()).await;
    }
    let limit = match prepared.format {
        Format::Batch | Format::Lines => limits.batch_body_bytes,
        // Base64 and JSON take more than what they carry.
        Format::Structured => limits.message_body_bytes * 2,
        Format::Single => limits.message_body_bytes,
    };
    let (body, reservation) = body::collect(headers, body, limit, shared, prepared.caller.as_ref()).await?;
    let mut prepared = prepared;
    let Some(key) = prepared.key.take() else {
        return publish_body(shared, &prepared, headers, body, reservation.bytes()).await;
    };
    let fingerprint = Fingerprint::of(parts.uri.query(), headers, &body);
    match shared.idempotency.begin(key, fingerprint)? {
        Slot::Answered(response) => Ok(response),
        // In a task of its own: a sender that goes away and comes back finds the answer.
        Slot::Ours(running) => {
            let (shared, headers) = (Arc::clone(shared), headers.clone());
            let run = async move {
                let covered = reservation.bytes();
                let answer = publish_body(&shared, &prepared, &headers, body, covered).await;
                drop(reservation);
                running.finish(answer).await
            };
            tokio::spawn(run).await.unwrap_or_else(|_| Err(Problem::draining()))
        }
    }
}

/// Publishes what a body says; `covered` bytes are counted for it.
async fn publish_body(shared: &Shared, prepared: &Prepared, headers: &HeaderMap, body: Bytes, covered: u64) -> Answer {
    let Prepared { published, options, caller, reader, .. } = prepared;
    let (topic, caller) = (published.topic(), caller.as_ref());
    match prepared.format {
        Format::Single => {
            one(shared, published, options, binary::decode(headers, options, body, Some(topic))?, covered).await
        }
        Format::Structured => {
            let mut decoded = json::decode(&body, options, Some(topic))?;
            binary::take_trace_context(headers, &mut decoded.message)?;
            one(shared, published, options, decoded, covered).await
        }
        Format::Batch => {
            let max = shared.limits().batch_messages;
            let Some(decoded) = json::decode_batch_of(&body, options, Some(topic), max)? else {
                return Err(too_many_messages(max));
            };
            let mut outgoing = Outgoing::to(published, covered);
            decoded.into_iter().for_each(|decoded| outgoing.push(decoded.map(|decoded| decoded.message)));
            let mut answer = Results::begin(reader.as_ref(), topic, outgoing.len()).await?;
            let parent = shared.traces.parent(headers);
            answer.extend(topic, publish_all(shared, options, caller, &parent, outgoing).await?);
            Ok(answer.finish())
        }
        Format::Lines => collected(shared, prepared, &shared.traces.parent(headers), &body, covered).await,
    }
}

fn check_count(shared: &Shared, count: usize) -> Answer<()> {
    let max = shared.limits().batch_messages;
    if count <= max { Ok(()) } else { Err(too_many_messages(max)) }
}

fn too_many_messages(max: usize) -> Problem {
    Problem::too_large(format!(
        "a batch whose results are collected has at most {max} messages; stream more as application/x-ndjson with the header accept: application/x-ndjson"
    ))
}

/// Publishes a message a line, and answers for all of them together.
async fn collected(shared: &Shared, prepared: &Prepared, parent: &Parent, body: &[u8], covered: u64) -> Answer {
    let Prepared { published, options, caller, reader, .. } = prepared;
    options.check_many()?;
    let count = lines::of(body).count();
    if count == 0 {
        return Err(Problem::invalid("the body has no line; one message a line is expected"));
    }
    check_count(shared, count)?;
    let mut answer = Results::begin(reader.as_ref(), published.topic(), count).await?;
    let mut lines = lines::of(body).peekable();
    while lines.peek().is_some() {
        // A few at a time stay in the processor's cache, and their readers need not wait for all.
        let mut outgoing = Outgoing::to(published, covered);
        outgoing.reserve(lines::AT_ONCE.min(count));
        let some = lines.by_ref().take(lines::AT_ONCE);
        some.for_each(|(number, line)| outgoing.push_line(number, line, options));
        let count = outgoing.len();
        let results = match publish_all(shared, options, caller.as_ref(), parent, outgoing).await {
            Err(error) if answer.is_empty() => return Err(error.into()),
            Err(error) => vec![Err(error); count],
            Ok(results) => results,
        };
        answer.extend(published.topic(), results);
    }
    Ok(answer.finish())
}

async fn one(shared: &Shared, published: &Published, options: &Options, decoded: Decoded, covered: u64) -> Answer {
    let publisher = published.publisher(&*shared.broker, options.require_route)?;
    let mut message = decoded.message;
    published.check(&published.bounds(), &message)?;
    let mut span = shared.traces.publish(published.topic(), &mut message);
    published.charge(&mut message, covered)?;
    let receipt = outcome(shared, publisher.publish(message)).await.inspect_err(|error| span.failed(error))?;
    published.published(1);
    shared.metrics.accepted(1);
    let mut json = Vec::with_capacity(128);
    write_receipt(&mut json, published.topic(), &receipt);
    Ok(json_response(StatusCode::ACCEPTED, json))
}

/// The outcome of a publish. Of one that waits for room in a full group that of a shutdown, which would wait for it as
/// long as it may: withdrawn, it is not published, and its sender may find another server.
async fn outcome<T: Unpin>(shared: &Shared, mut publish: Operation<T>) -> Result<T, Error> {
    if publish.is_ready() {
        return publish.await;
    }
    let withdraw = async {
        shared.draining.cancelled().await;
        // Elsewhere it is on its way to a server, which may have taken it.
        if !shared.broker.capabilities().overflow_wait.is_some() {
            std::future::pending::<()>().await;
        }
        sleep(CONFIRMING).await;
    };
    tokio::select! {
        biased;
        outcome = &mut publish => outcome,
        () = withdraw => Err(Error::closed(
            "the server is shutting down, and a full group had no room for all of it; try another server, which may \
             repeat what had room, or this one later",
        )),
    }
}

/// Messages to publish; and why, where one could not be read or is not taken.
pub(crate) struct Outgoing<'a> {
    published: &'a Published,
    bounds: Bounds,
    messages: Vec<Message>,
    refused: Vec<(usize, Error)>,
    /// Those of the lines, where they are lines.
    numbers: Vec<u64>,
    /// When they came.
    now: Timestamp,
    /// Bytes that are counted for them already.
    covered: u64,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn to(published: &'a Published, covered: u64) -> Self {
        Self {
            published,
            bounds: published.bounds(),
            messages: Vec::new(),
            refused: Vec::new(),
            numbers: Vec::new(),
            now: Timestamp::now(),
            covered,
        }
    }

    fn push(&mut self, message: Result<Message, Error>) {
        match message {
            Ok(message) => match self.published.check(&self.bounds, &message) {
                Ok(()) => self.messages.push(message),
                Err(error) => self.refused.push((self.len(), error)),
            },
            Err(error) => self.refused.push((self.len(), error)),
        }
    }

    /// Makes room for so many at once: growing would copy them.
    pub(crate) fn reserve(&mut self, lines: usize) {
        self.messages.reserve(lines);
        self.numbers.reserve(lines);
    }

    /// Reads a line; what goes wrong with it is said of its number.
    pub(crate) fn push_line(&mut self, number: u64, line: &[u8], options: &Options) {
        self.numbers.push(number);
        self.push(ndjson::decode_at(line, options, self.now));
    }

    pub(crate) fn len(&self) -> usize {
        self.messages.len() + self.refused.len()
    }
}

/// Publishes what is taken, in order; what is not keeps its place among the results.
pub(crate) async fn publish_all(
    shared: &Shared,
    options: &Options,
    caller: Option<&Caller>,
    parent: &Parent,
    outgoing: Outgoing<'_>,
) -> Result<Vec<Result<Receipt, Error>>, Error> {
    let Outgoing { published, mut messages, refused, numbers, covered, .. } = outgoing;
    let publisher = published.publisher(&*shared.broker, options.require_route)?;
    let mut span = shared.traces.publish_many(published.topic(), parent, &mut messages);
    if let Some(caller) = caller {
        // What is refused was work too.
        caller.overdraw(messages.len() + refused.len());
    }
    let count = messages.len();
    let full = published.charge_all(&mut messages, covered).err();
    let mut results = if messages.is_empty() {
        Vec::new()
    } else {
        outcome(shared, publisher.publish_batch(messages)).await.inspect_err(|error| span.failed(error))?
    };
    if let Some(full) = full {
        shared.metrics.refused(full.refusal());
        look_for_expired(shared);
        results.resize(count, Err(full.error(published.topic())));
    }
    let accepted = results.iter().filter(|result| result.is_ok()).count() as u64;
    if let Some(Err(error)) = results.iter().find(|result| result.is_err()) {
        span.failed(error);
    }
    published.published(accepted);
    shared.metrics.accepted(accepted);
    if !refused.is_empty() {
        results = merged(results, refused);
    }
    for (result, number) in results.iter_mut().zip(numbers) {
        if let Err(error) = result {
            *error = error.clone().context(format_args!("line {number}"));
        }
    }
    Ok(results)
}

/// All results in order; each of `refused` is at its index.
fn merged(good: Vec<Result<Receipt, Error>>, refused: Vec<(usize, Error)>) -> Vec<Result<Receipt, Error>> {
    let mut all = Vec::with_capacity(good.len() + refused.len());
    let mut good = good.into_iter();
    for (index, error) in refused {
        all.extend(good.by_ref().take(index - all.len()));
        all.push(Err(error));
    }
    all.extend(good);
    all
}

/// The answer to a batch in the making.
struct Results {
    /// Whose they are, and that they may be.
    turn: Option<(Reader, Turn)>,
    json: Vec<u8>,
    failed: bool,
    /// Another try may do better.
    retryable: bool,
}

impl Results {
    /// Before anything is published there is room for what is to be told of it: whoever publishes and reads no answer is
    /// a reader like any other.
    async fn begin(reader: Option<&Reader>, topic: &Topic, count: usize) -> Answer<Self> {
        let bytes = 16 + count * (RESULT_BYTES + topic.as_str().len());
        // Errors are longer.
        let about = bytes as u64 * 2;
        let turn = match reader {
            Some(reader) => Some((reader.clone(), reader.soon(about..=about).await?)),
            None => None,
        };
        let mut json = Vec::with_capacity(bytes);
        json.extend_from_slice(br#"{"results":["#);
        Ok(Self { turn, json, failed: false, retryable: false })
    }

    fn is_empty(&self) -> bool {
        self.json.ends_with(b"[")
    }

    fn extend(&mut self, topic: &Topic, results: Vec<Result<Receipt, Error>>) {
        for result in results {
            if !self.is_empty() {
                self.json.push(b',');
            }
            self.failed |= result.is_err();
            self.retryable |= result.as_ref().is_err_and(Error::is_retryable);
            write_result(&mut self.json, topic, result);
        }
    }

    fn finish(mut self) -> Response {
        self.json.extend_from_slice(b"]}");
        let status = if self.failed { StatusCode::MULTI_STATUS } else { StatusCode::ACCEPTED };
        let json = match self.turn {
            Some((reader, turn)) => reader.answer(turn, self.json),
            None => self.json.into(),
        };
        let mut response = json_response(status, json);
        if self.retryable {
            response.extensions_mut().insert(TryAgain);
        }
        response
    }
}

/// What a result takes besides its topic, about.
pub(crate) const RESULT_BYTES: usize = 80;

/// Appends what became of one message of several.
pub(crate) fn write_result(json: &mut Vec<u8>, topic: &Topic, result: Result<Receipt, Error>) {
    match result {
        Ok(receipt) => write_receipt(json, topic, &receipt),
        Err(error) => write_problem(json, &error.into()),
    }
}

pub(crate) fn write_problem(json: &mut Vec<u8>, problem: &Problem) {
    // Text and numbers always serialize, and a vector takes them.
    let _ = serde_json::to_writer(json, &Refused { error: problem });
}

/// By hand, since this is on the way of every publish: a topic needs no escaping, and an id, which has
/// no control characters, seldom.
pub(crate) fn write_receipt(json: &mut Vec<u8>, topic: &Topic, receipt: &Receipt) {
    json.extend_from_slice(b"{\"id\":\"");
    let begin = json.len();
    // Writing to a vector cannot fail.
    let _ = write!(json, "{}", receipt.id);
    if json.iter().skip(begin).any(|byte| matches!(byte, b'"' | b'\\')) {
        json.truncate(begin - 1);
        let _ = serde_json::to_writer(&mut *json, &receipt.id);
    } else {
        json.push(b'"');
    }
    json.extend_from_slice(b",\"topic\":\"");
    json.extend_from_slice(topic.as_str().as_bytes());
    json.push(b'"');
    if let Some(matched) = receipt.matched {
        let _ = write!(json, ",\"matched\":{matched}");
    }
    if receipt.duplicate {
        json.extend_from_slice(b",\"duplicate\":true");
    }
    if let Some(partition) = receipt.partition {
        let _ = write!(json, ",\"partition\":{partition}");
    }
    if let Some(offset) = receipt.offset {
        let _ = write!(json, ",\"offset\":{offset}");
    }
    json.push(b'}');
}

pub(crate) fn json_response(status: StatusCode, json: impl Into<Body>) -> Response {
    let mut response = Response::new(json.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Kinds that end a stream of publishes: the next would fail the same.
pub(crate) fn ends_stream(error: &Error) -> bool {
    error.kind() == ErrorKind::Closed
}
