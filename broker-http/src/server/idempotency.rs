//! `Idempotency-Key`: a request sent again is answered with the stored answer, byte for byte (IETF
//! draft "The Idempotency-Key HTTP Header Field").

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::response::Response;
use broker_core::ErrorKind;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::problem::{Answer, Problem};
use super::publish::json_response;

/// How long an answer is kept at most; room for newer ones may end it sooner.
const KEPT: Duration = Duration::from_secs(24 * 3600);

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What an entry costs beside its key and its answer.
const OVERHEAD: usize = 200;

/// A key, and the resource it was sent to: the same key elsewhere is another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(Arc<str>);

impl Key {
    /// The key of a request, if it has one.
    pub(crate) fn of(parts: &http::request::Parts) -> Answer<Option<Self>> {
        let mut values = parts.headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(value) = values.next() else { return Ok(None) };
        // The draft has a quoted string; many senders leave the quotes out.
        let text = value.to_str().unwrap_or_default();
        let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        if text.is_empty() || text.len() > 255 || values.next().is_some() {
            return Err(Problem::invalid("idempotency-key: it is one value of 1 to 255 visible ASCII characters"));
        }
        let resource = parts.uri.path_and_query().map_or("", |path| path.as_str());
        Ok(Some(Self(format!("{resource}\n{text}").into())))
    }
}

/// Tells a request sent again from another one under the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of the body and of what else makes the message.
    pub(crate) fn of(headers: &HeaderMap, body: &[u8]) -> Self {
        let mut hash = Sha256::new();
        for (name, value) in headers {
            let name = name.as_str();
            if name == "content-type" || name.starts_with("ce-") || name.starts_with("broker-") {
                hash.update((name.len() as u64).to_be_bytes());
                hash.update(name);
                hash.update((value.len() as u64).to_be_bytes());
                hash.update(value);
            }
        }
        hash.update([0; 8]);
        hash.update(body);
        Self(hash.finalize().into())
    }
}

/// The answers kept: bounded in bytes, the oldest goes first.
#[derive(Clone, Debug)]
pub(crate) struct Answers(Arc<Store>);

#[derive(Debug)]
struct Store {
    max_bytes: AtomicUsize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<Key, Entry>,
    /// Answered keys, the oldest first.
    order: VecDeque<(Instant, Key)>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    fingerprint: Fingerprint,
    /// `None` while the first request is at work.
    answer: Option<(StatusCode, Bytes)>,
}

/// What a key's owner is to do.
#[derive(Debug)]
pub(crate) enum Slot {
    /// Answer this.
    Answered(Response),
    /// Do the work.
    Ours(Running),
}

/// The first request under a key, at work; dropped unfinished, the key is free again.
#[derive(Debug)]
pub(crate) struct Running {
    store: Arc<Store>,
    key: Key,
}

impl Answers {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Store { max_bytes: AtomicUsize::new(max_bytes), table: Mutex::default() }))
    }

    /// From now on so many bytes.
    pub(crate) fn set_max(&self, max_bytes: usize) {
        self.0.max_bytes.store(max_bytes, Ordering::Relaxed);
        self.0.table.lock().forget(None, max_bytes);
    }

    /// Looks a key up.
    ///
    /// # Errors
    ///
    /// 409 while the first request is at work, 422 if that was another request.
    pub(crate) fn begin(&self, key: Key, fingerprint: Fingerprint) -> Answer<Slot> {
        let mut table = self.0.table.lock();
        table.forget(Instant::now().checked_sub(KEPT), usize::MAX);
        match table.entries.get(&key) {
            Some(entry) if entry.fingerprint != fingerprint => Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ErrorKind::Invalid,
                "idempotency-key: it was used for another request; take a new key for a new message",
            )),
            Some(Entry { answer: Some((status, json)), .. }) => Ok(Slot::Answered(replayed(*status, json))),
            Some(Entry { answer: None, .. }) => {
                Err(Problem::conflict("idempotency-key: the first request with it is still at work")
                    .retry_after(Duration::from_secs(1)))
            }
            None => {
                table.entries.insert(key.clone(), Entry { fingerprint, answer: None });
                Ok(Slot::Ours(Running { store: Arc::clone(&self.0), key }))
            }
        }
    }
}

fn replayed(status: StatusCode, json: &Bytes) -> Response {
    let mut response = Response::new(Body::from(json.clone()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl Running {
    /// Keeps an answer that says what became of the messages; any other leaves the key free for
    /// another try.
    pub(crate) async fn finish(self, answer: Answer) -> Answer {
        let response = answer?;
        let (parts, body) = response.into_parts();
        let json = to_bytes(body, usize::MAX).await.map_err(|_| Problem::draining())?;
        let bytes = self.key.0.len() + json.len() + OVERHEAD;
        let max_bytes = self.store.max_bytes.load(Ordering::Relaxed);
        if bytes <= max_bytes {
            let mut table = self.store.table.lock();
            table.forget(None, max_bytes - bytes);
            if let Some(entry) = table.entries.get_mut(&self.key) {
                entry.answer = Some((parts.status, json.clone()));
                table.bytes += bytes;
                table.order.push_back((Instant::now(), self.key.clone()));
            }
        }
        Ok(json_response(parts.status, json.to_vec()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut table = self.store.table.lock();
        if table.entries.get(&self.key).is_some_and(|entry| entry.answer.is_none()) {
            table.entries.remove(&self.key);
        }
    }
}

impl Table {
    /// Forgets the oldest answers: those from before `since`, and what is over `bytes`.
    fn forget(&mut self, since: Option<Instant>, bytes: usize) {
        while let Some((time, _)) = self.order.front()
            && (self.bytes > bytes || since.is_some_and(|since| *time < since))
            && let Some((_, key)) = self.order.pop_front()
        {
            if let Some(Entry { answer: Some((_, json)), .. }) = self.entries.remove(&key) {
                self.bytes -= key.0.len() + json.len() + OVERHEAD;
            }
        }
    }
}
