//! `Idempotency-Key`: a request sent again is answered with the stored answer, byte for byte (IETF
//! draft "The Idempotency-Key HTTP Header Field").

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::to_bytes;
use axum::response::Response;
use broker_core::ErrorKind;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::access::Caller;
use super::item;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::publish::json_response;

/// How long an answer is kept at most.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// How long an answer is kept at least: a sender that goes on trying, with waits that grow to minutes
/// between, comes back within it. Where there is no room otherwise, new keys are refused: a key that
/// was forgotten while it is in use would publish again without a word.
const YOUNG: Duration = Duration::from_secs(10 * 60);

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What an entry costs beside its answer: it has two places in tables that are up to half empty.
const OVERHEAD: usize = 220;

/// What is set aside for a request at work: most answers are shorter.
const ROOM: usize = OVERHEAD + 512;

/// A key, whose it is, and the topic it was sent to: the same key of somebody else or elsewhere is
/// another. It is half of a SHA-256, so that long ones take no more room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    hash: [u8; 16],
    owner: Owner,
}

/// An identity, by the hash of its name; where there are none, nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Owner(Option<NonZeroU64>);

impl Owner {
    fn of(caller: Option<&Caller>) -> Self {
        let hash = |caller: &Caller| {
            let hash = Sha256::digest(caller.name());
            u64::from_be_bytes(hash.first_chunk().copied().unwrap_or_default())
        };
        Self(caller.and_then(|caller| NonZeroU64::new(hash(caller))))
    }
}

impl Key {
    /// The key of a request, if it has one.
    pub(crate) fn of(headers: &HeaderMap, topic: &str, caller: Option<&Caller>) -> Answer<Option<Self>> {
        let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(value) = values.next() else { return Ok(None) };
        let text = value.to_str().ok().filter(|_| values.next().is_none()).and_then(item::read);
        let Some(text) = text.filter(|text| (1..=255).contains(&text.len())) else {
            return Err(Problem::invalid(
                "idempotency-key: it is one value of 1 to 255 visible ASCII characters, in quotes or without; without, it has \
                 no space and no double quote; in double quotes, as in \"8e03978e\", a backslash is before each double \
                 quote and each backslash, and parameters may follow",
            ));
        };
        let mut hash = Sha256::new();
        for part in [caller.map_or("", Caller::name), topic, &text] {
            add(&mut hash, part.as_bytes());
        }
        Ok(Some(Self { hash: half(hash), owner: Owner::of(caller) }))
    }
}

/// Tells a request sent again from another one under the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint([u8; 16]);

impl Fingerprint {
    /// Of the body and of what else makes the message: options in any order.
    pub(crate) fn of(query: Option<&str>, headers: &HeaderMap, body: &[u8]) -> Self {
        let says = |name: &str| name == "content-type" || name.starts_with("ce-") || name.starts_with("broker-");
        let headers = headers.iter().filter(|(name, _)| says(name.as_str()));
        let headers = headers.map(|(name, value)| (Cow::from(name.as_str().as_bytes()), Cow::from(value.as_bytes())));
        let query = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let query = query.map(|(name, value)| (bytes_of(name), bytes_of(value)));
        let mut hash = Sha256::new();
        for mut options in [headers.collect::<Vec<_>>(), query.collect()] {
            options.sort();
            hash.update((options.len() as u64).to_be_bytes());
            for (name, value) in options {
                add(&mut hash, &name);
                add(&mut hash, &value);
            }
        }
        hash.update(body);
        Self(half(hash))
    }
}

fn bytes_of(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => text.as_bytes().into(),
        Cow::Owned(text) => text.into_bytes().into(),
    }
}

/// With its length, so that no two lists of parts are the same bytes.
fn add(hash: &mut Sha256, part: &[u8]) {
    hash.update((part.len() as u64).to_be_bytes());
    hash.update(part);
}

fn half(hash: Sha256) -> [u8; 16] {
    let mut half = [0; 16];
    half.iter_mut().zip(hash.finalize()).for_each(|(byte, hashed)| *byte = hashed);
    half
}

/// Marks an answer that says of some message that another try may do better: it is not kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TryAgain;

/// The answers kept: bounded in bytes, the oldest goes first, and none that is young.
///
/// An identity has room for another while it holds no more than is free: one alone takes half of all,
/// two take a third each, and however many there are, none fills it for the next (dynamic thresholds,
/// Choudhury and Hahne 1998). Where there are no identities, whoever comes takes all.
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
    /// With what is set aside for requests at work.
    bytes: usize,
    /// Of them, those of each identity.
    held: HashMap<Owner, usize>,
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

    /// From now on so many bytes: the next key finds its room by it.
    pub(crate) fn set_max(&self, max_bytes: usize) {
        self.0.max_bytes.store(max_bytes, Ordering::Relaxed);
    }

    /// Looks a key up.
    ///
    /// # Errors
    ///
    /// 409 while the first request is at work, 422 if that was another request, 503 where there is
    /// room for no other key.
    pub(crate) fn begin(&self, key: Key, fingerprint: Fingerprint) -> Answer<Slot> {
        self.begin_at(Instant::now(), key, fingerprint)
    }

    fn begin_at(&self, now: Instant, key: Key, fingerprint: Fingerprint) -> Answer<Slot> {
        let mut table = self.0.table.lock();
        while table.forget_oldest(now, KEPT) {}
        match table.entries.get(&key) {
            Some(entry) if entry.fingerprint != fingerprint => Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ErrorKind::Invalid,
                "idempotency-key: it was used for another request; take a new key for a new message",
            )),
            Some(Entry { answer: Some((status, json)), .. }) => {
                Ok(Slot::Answered(json_response(*status, json.clone())))
            }
            Some(Entry { answer: None, .. }) => {
                Err(Problem::conflict("idempotency-key: the first request with it is still at work")
                    .retry_after(Duration::from_secs(1)))
            }
            None => {
                let most = self.0.max_bytes.load(Ordering::Relaxed).saturating_sub(ROOM);
                while !table.has_room(key.owner, most) {
                    if !table.forget_oldest(now, YOUNG) {
                        return Err(full(table.order.front().map(|(kept, _)| YOUNG.saturating_sub(now - *kept))));
                    }
                }
                table.add(key.owner, ROOM);
                table.entries.insert(key, Entry { fingerprint, answer: None });
                Ok(Slot::Ours(Running { store: Arc::clone(&self.0), key }))
            }
        }
    }
}

/// The wait is until the oldest answer may go.
fn full(wait: Option<Duration>) -> Problem {
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Unavailable,
        "idempotency-key: there is no room to keep one more answer, and the oldest is not yet 10 minutes old; \
         try again later, or publish without a key",
    )
    .retry_after(wait.unwrap_or(Duration::from_secs(1)))
    .counted(Refusal::Idempotency)
}

impl Running {
    /// Keeps an answer that says what became of the messages; any other leaves the key free for
    /// another try.
    pub(crate) async fn finish(self, answer: Answer) -> Answer {
        let response = answer?;
        if response.extensions().get::<TryAgain>().is_some() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let json = to_bytes(body, usize::MAX).await.map_err(|_| Problem::draining())?;
        // Longer than what was set aside it is kept too: its messages are published. New keys wait.
        self.store.table.lock().keep(Instant::now(), self.key, parts.status, &json);
        Ok(json_response(parts.status, json))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut table = self.store.table.lock();
        if table.entries.get(&self.key).is_some_and(|entry| entry.answer.is_none()) {
            table.entries.remove(&self.key);
            table.give_back(self.key.owner, ROOM);
        }
    }
}

impl Table {
    fn keep(&mut self, now: Instant, key: Key, status: StatusCode, json: &[u8]) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        // A copy: what is sent counts with what is encoded for readers until it is.
        entry.answer = Some((status, Bytes::copy_from_slice(json)));
        self.give_back(key.owner, ROOM);
        self.add(key.owner, OVERHEAD + json.len());
        self.order.push_back((now, key));
    }

    /// Whether one more of this identity's is kept, so that `most` is not passed.
    fn has_room(&self, owner: Owner, most: usize) -> bool {
        let Some(free) = most.checked_sub(self.bytes) else { return false };
        owner.0.is_none() || self.held.get(&owner).is_none_or(|held| *held <= free)
    }

    fn add(&mut self, owner: Owner, bytes: usize) {
        self.bytes += bytes;
        *self.held.entry(owner).or_default() += bytes;
    }

    fn give_back(&mut self, owner: Owner, bytes: usize) {
        self.bytes -= bytes;
        if let Some(held) = self.held.get_mut(&owner) {
            *held -= bytes;
            if *held == 0 {
                self.held.remove(&owner);
            }
        }
    }

    /// Forgets the oldest answer if it has at least this age.
    fn forget_oldest(&mut self, now: Instant, age: Duration) -> bool {
        let old = |(time, _): &mut (Instant, Key)| now.saturating_duration_since(*time) >= age;
        let Some((_, key)) = self.order.pop_front_if(old) else { return false };
        if let Some(Entry { answer: Some((_, json)), .. }) = self.entries.remove(&key) {
            self.give_back(key.owner, OVERHEAD + json.len());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const FINGERPRINT: Fingerprint = Fingerprint([0; 16]);
    const JSON: &[u8] = &[b'x'; 100];

    fn answer(answers: &Answers, now: Instant, key: u8) -> Answer<()> {
        match answers.begin_at(now, key_of(key), FINGERPRINT)? {
            Slot::Ours(running) => {
                answers.0.table.lock().keep(now, running.key, StatusCode::ACCEPTED, JSON);
                Ok(())
            }
            Slot::Answered(_) => panic!("{key} was answered before"),
        }
    }

    fn key_of(key: u8) -> Key {
        Key { hash: [key; 16], owner: Owner(None) }
    }

    #[test]
    fn no_identity_fills_the_room_of_another() {
        const ANSWER: usize = OVERHEAD + JSON.len();
        let answers = Answers::new(ROOM + 60 * ANSWER);
        let begin = Instant::now();
        let fill = |owner: u64, now: Instant| {
            let owner = Owner(NonZeroU64::new(owner));
            let keys = (0..u8::MAX).map(|hash| Key { hash: [hash; 16], owner });
            let mut kept = 0;
            for key in keys {
                let Ok(Slot::Ours(running)) = answers.begin_at(now, key, FINGERPRINT) else { continue };
                answers.0.table.lock().keep(now, running.key, StatusCode::ACCEPTED, JSON);
                kept += 1;
            }
            kept
        };
        // Half, then half of what is left, and so on: there is room for the next always.
        let kept: Vec<usize> = (1..=5).map(|owner| fill(owner, begin)).collect();
        assert_eq!(kept, [31, 15, 8, 4, 2]);
        // What is old makes room, and nothing is counted twice.
        assert!(fill(6, begin + YOUNG) > 20);
        let table = answers.0.table.lock();
        assert_eq!(table.held.values().sum::<usize>(), table.bytes);
        assert_eq!(table.entries.len() * ANSWER, table.bytes);
    }

    fn is_kept(answers: &Answers, key: u8) -> bool {
        answers.0.table.lock().entries.contains_key(&key_of(key))
    }

    #[test]
    fn where_answers_fill_the_room_new_keys_are_refused_and_no_young_one_is_forgotten() {
        let answers = Answers::new(ROOM + 2 * (OVERHEAD + JSON.len()));
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        for key in 0..3 {
            answer(&answers, after(u64::from(key)), key).unwrap();
        }
        let problem = answer(&answers, after(60), 3).unwrap_err();
        assert_eq!(problem.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(full(Some(YOUNG - Duration::from_secs(60))).detail(), problem.detail());
        assert!((0..3).all(|key| is_kept(&answers, key)));
        // Once the oldest is ten minutes old it goes, and no other.
        answer(&answers, after(600), 3).unwrap();
        assert!(!is_kept(&answers, 0) && (1..4).all(|key| is_kept(&answers, key)));
        // With room, it is kept for a day.
        answers.set_max(1 << 20);
        answer(&answers, after(86_400), 4).unwrap();
        assert!((2..5).all(|key| is_kept(&answers, key)));
        answer(&answers, after(86_402), 5).unwrap();
        assert!(!is_kept(&answers, 2) && is_kept(&answers, 3));
        assert_eq!(answers.0.table.lock().bytes, 3 * (OVERHEAD + JSON.len()));
    }

    #[test]
    fn requests_at_work_have_their_room_set_aside_and_give_it_back() {
        let answers = Answers::new(2 * ROOM);
        let now = Instant::now();
        let one = answers.begin_at(now, key_of(1), FINGERPRINT).unwrap();
        let other = answers.begin_at(now, key_of(2), FINGERPRINT).unwrap();
        answers.begin_at(now, key_of(3), FINGERPRINT).unwrap_err();
        drop((one, other));
        assert_eq!(answers.0.table.lock().bytes, 0);
        answer(&answers, now, 3).unwrap();
    }

    #[test]
    fn a_request_is_told_from_another_by_its_options_and_not_by_their_order() {
        let headers = |names: &[&'static str]| {
            names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))).collect()
        };
        let of = |query: &str, names: &[&'static str]| Fingerprint::of(Some(query), &headers(names), b"x");
        let first = of("key=a&ttl=1h", &["ce-id", "broker-key"]);
        assert_eq!(first, of("ttl=1h&key=%61", &["broker-key", "ce-id", "traceparent"]));
        for other in [
            of("key=a", &["ce-id", "broker-key"]),
            of("key=a&ttl=1m", &["ce-id", "broker-key"]),
            of("key=a&ttl=1h", &["ce-id"]),
            of("", &["ce-id", "broker-key"]),
        ] {
            assert_ne!(first, other);
        }
        assert_eq!(of("", &[]), Fingerprint::of(None, &HeaderMap::new(), b"x"));
    }
}
