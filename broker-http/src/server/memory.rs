//! What messages and request bodies hold in memory: counted from the first byte of a body to the
//! last reference to its message, for the whole server and for each topic.
//!
//! A message is charged by wrapping its payload: wherever it goes (a backlog, a push under way, a topic's
//! history, a dead letter), the charge goes with it and ends with its last copy. So it holds over any broker, and nobody has to remember to give it back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker_core::{Error, ErrorKind, Message, Topic};
use bytes::Bytes;
use http::StatusCode;

use super::metrics::Refusal;
use super::problem::{Answer, Problem};

/// What a message is charged: bytes that it takes, about.
pub(crate) fn cost(message: &Message) -> u64 {
    message.memory_size() as u64
}

/// How long a refused publisher is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The books of a server.
#[derive(Clone, Debug)]
pub(crate) struct Ledger(Arc<Books>);

#[derive(Debug)]
struct Books {
    held: AtomicU64,
    /// What deliveries of a broker elsewhere hold of it.
    delivered: AtomicU64,
    max: AtomicU64,
    topic_max: AtomicU64,
    /// Since when milliseconds are counted, and when a look for what has expired may be next.
    since: Instant,
    look: AtomicU64,
}

/// What the messages of one topic hold.
#[derive(Debug)]
pub(crate) struct Account {
    books: Ledger,
    held: AtomicU64,
}

impl Ledger {
    pub(crate) fn new(max: u64, topic_max: u64) -> Self {
        Self(Arc::new(Books {
            held: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            max: AtomicU64::new(max),
            topic_max: AtomicU64::new(topic_max),
            since: Instant::now(),
            look: AtomicU64::new(0),
        }))
    }

    /// A publisher was refused. Tells whether it is time to look for messages that have expired: a broker in
    /// this process lets go of them when it is asked for its numbers.
    pub(crate) fn want_look(&self) -> bool {
        let now = u64::try_from(self.0.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let look = self.0.look.load(Ordering::Relaxed);
        let next = now.saturating_add(RETRY_AFTER.as_millis() as u64);
        look <= now && self.0.look.compare_exchange(look, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// From now on these bounds; what is held stays.
    pub(crate) fn set(&self, max: u64, topic_max: u64) {
        self.0.max.store(max, Ordering::Relaxed);
        self.0.topic_max.store(topic_max, Ordering::Relaxed);
    }

    /// Bytes that deliveries of a broker elsewhere may still take: half of all are theirs at most.
    pub(crate) fn room_of_deliveries(&self) -> u64 {
        let own = (self.max() / 2).saturating_sub(self.0.delivered.load(Ordering::Relaxed));
        own.min(self.max().saturating_sub(self.held()))
    }

    /// Such a delivery is in hand.
    pub(crate) fn deliver(&self, bytes: u64) {
        self.0.delivered.fetch_add(bytes, Ordering::Relaxed);
        self.0.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It is no more.
    pub(crate) fn settle(&self, bytes: u64) {
        self.0.delivered.fetch_sub(bytes, Ordering::Relaxed);
        self.0.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// An account for one topic.
    pub(crate) fn account(&self) -> Arc<Account> {
        Arc::new(Account { books: self.clone(), held: AtomicU64::new(0) })
    }

    pub(crate) fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed)
    }

    pub(crate) fn max(&self) -> u64 {
        self.0.max.load(Ordering::Relaxed)
    }

    /// Room for what is about to be read.
    ///
    /// # Errors
    ///
    /// 503 if there is none.
    pub(crate) fn reserve(&self, bytes: u64) -> Answer<Reservation> {
        let mut reservation = Reservation { books: self.clone(), bytes: 0, bounded: true };
        reservation.grow(bytes).map(|()| reservation)
    }

    /// Room for what makes room, or mends what keeps it taken: settlements, subscriptions, redrives. They are small,
    /// and count, and are never refused.
    pub(crate) fn grant(&self, bytes: u64) -> Answer<Reservation> {
        Ok(self.hold(bytes))
    }

    fn hold(&self, bytes: u64) -> Reservation {
        self.0.held.fetch_add(bytes, Ordering::Relaxed);
        Reservation { books: self.clone(), bytes, bounded: false }
    }

    /// An answer with messages in it: it counts until it is sent. It is never refused: it is what takes messages out.
    pub(crate) fn answer(&self, bytes: Vec<u8>) -> Bytes {
        let room = self.hold(bytes.capacity() as u64);
        Bytes::from_owner(Held { bytes, _room: room })
    }
}

/// Bytes that count while they are there.
struct Held {
    bytes: Vec<u8>,
    _room: Reservation,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// What is at its bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Full {
    /// All messages together, at so many bytes.
    All(u64),
    /// Those of the topic.
    Topic(u64),
}

impl Full {
    /// The error of one message of several.
    pub(crate) fn error(self, topic: &Topic) -> Error {
        Error::unavailable(self.detail(topic)).with_retry_after(RETRY_AFTER)
    }

    /// The answer to the publisher of one.
    pub(crate) fn problem(self, topic: &Topic) -> Problem {
        let problem = match self {
            Self::All(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, self.detail(topic)),
            Self::Topic(_) => Problem::too_many(self.detail(topic)),
        };
        problem.retry_after(RETRY_AFTER).counted(self.refusal())
    }

    pub(crate) fn refusal(self) -> Refusal {
        match self {
            Self::All(_) => Refusal::Memory,
            Self::Topic(_) => Refusal::TopicMemory,
        }
    }

    fn detail(self, topic: &Topic) -> String {
        match self {
            Self::All(max) => all_full(max),
            Self::Topic(max) => format!(
                "the messages of topic {topic} are at their bound of {max} bytes; try again once some are taken out"
            ),
        }
    }
}

fn all_full(max: u64) -> String {
    format!("the messages held here are at their bound of {max} bytes; try again once some are taken out")
}

/// Room for a body; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    books: Ledger,
    bytes: u64,
    /// Whether it is refused at the bound.
    bounded: bool,
}

impl Reservation {
    /// Room for more.
    pub(crate) fn grow(&mut self, bytes: u64) -> Answer<()> {
        let (books, max) = (&self.books.0, self.books.max());
        if books.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > max && self.bounded {
            books.held.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, all_full(max))
                .retry_after(RETRY_AFTER)
                .counted(Refusal::Memory));
        }
        self.bytes += bytes;
        Ok(())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Room for so much altogether.
    pub(crate) fn reach(&mut self, bytes: u64) -> Answer<()> {
        self.grow(bytes.saturating_sub(self.bytes))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.books.0.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Account {
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Refuses publishers, before their body is read, where the topic or all of them together are at their bound.
    pub(crate) fn check(&self, own: Option<u64>) -> Result<(), Full> {
        let (topic_max, max) = (self.max(own), self.books.max());
        if self.held() >= topic_max {
            return Err(Full::Topic(topic_max));
        }
        if self.books.held() < max { Ok(()) } else { Err(Full::All(max)) }
    }

    /// The topic's bound: `own`, or that of every topic.
    fn max(&self, own: Option<u64>) -> u64 {
        own.unwrap_or_else(|| self.books.0.topic_max.load(Ordering::Relaxed))
    }

    /// Charges a message until its last copy is dropped. `covered` is what is counted for it already: the body that it
    /// came in.
    ///
    /// # Errors
    ///
    /// That there is no room for it; it is not charged then.
    pub(crate) fn charge(self: &Arc<Self>, message: &mut Message, own: Option<u64>, covered: u64) -> Result<(), Full> {
        let cost = cost(message);
        self.take(cost, 1, own, covered)?;
        charge(message, self, cost);
        Ok(())
    }

    /// The same for several: the books, which whoever settles writes to meanwhile, are opened once. Where there is not
    /// room for all, `messages` is cut to the first ones, for which there is.
    pub(crate) fn charge_all(
        self: &Arc<Self>,
        messages: &mut Vec<Message>,
        own: Option<u64>,
        covered: u64,
    ) -> Result<(), Full> {
        let mut full = Ok(());
        if let Err(why) = self.take(messages.iter().map(cost).sum(), messages.len(), own, covered) {
            let room = messages.iter().take_while(|message| self.take(cost(message), 1, own, covered).is_ok()).count();
            messages.truncate(room);
            full = Err(why);
        }
        let batch = Arc::new(Batch(Arc::clone(self)));
        for message in messages {
            let cost = cost(message);
            charge(message, &batch, cost);
        }
        full
    }

    /// Takes the bytes of so many messages, unless a bound would be passed. A topic that holds nothing has room for
    /// any one message.
    fn take(&self, bytes: u64, messages: usize, own: Option<u64>, covered: u64) -> Result<(), Full> {
        let (topic_max, max) = (self.max(own), self.books.max());
        let before = self.held.fetch_add(bytes, Ordering::Relaxed);
        if (before > 0 || messages > 1) && before.saturating_add(bytes) > topic_max {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Full::Topic(topic_max));
        }
        let books = &self.books.0.held;
        if books.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > max.saturating_add(covered) {
            books.fetch_sub(bytes, Ordering::Relaxed);
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Full::All(max));
        }
        Ok(())
    }
}

/// Makes a message give back what it cost.
fn charge<A: Pays>(message: &mut Message, account: &Arc<A>, cost: u64) {
    // Two small allocations, the payload's and this. As one they would be too large for the bins that glibc's
    // allocator frees into from another thread without a lock: it was measured to take a fifth longer.
    let payload = message.payload_mut();
    let part = std::mem::take(payload);
    *payload = Bytes::from_owner(Charged { part, account: Arc::clone(account), cost });
}

/// Several messages charged at once. They share this and not the account, whose count of references all
/// publishers and all receivers would write to for every message.
struct Batch(Arc<Account>);

/// Who is charged.
trait Pays: Send + Sync + 'static {
    fn account(&self) -> &Account;
}

impl Pays for Account {
    fn account(&self) -> &Account {
        self
    }
}

impl Pays for Batch {
    fn account(&self) -> &Account {
        &self.0
    }
}

/// The part of a message that its charge goes with.
struct Charged<A: Pays> {
    part: Bytes,
    account: Arc<A>,
    /// Of the whole message.
    cost: u64,
}

impl<A: Pays> AsRef<[u8]> for Charged<A> {
    fn as_ref(&self) -> &[u8] {
        &self.part
    }
}

impl<A: Pays> Drop for Charged<A> {
    fn drop(&mut self) {
        let account = self.account.account();
        account.held.fetch_sub(self.cost, Ordering::Relaxed);
        account.books.0.held.fetch_sub(self.cost, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a message of so many bytes is charged.
    fn cost_of(bytes: u64) -> u64 {
        cost(&Message::new("")) + bytes
    }

    #[test]
    fn a_charge_ends_with_the_last_copy() {
        let ledger = Ledger::new(1_000, 600);
        let account = ledger.account();
        let mut message = Message::new("12345678").with_key("k");
        account.charge(&mut message, None, 0).unwrap();
        assert_eq!((account.held(), ledger.held()), (cost_of(9), cost_of(9)));
        let payload = message.payload().slice(2..4);
        drop(message);
        assert_eq!(payload, "34");
        assert_ne!(account.held(), 0);
        drop(payload);
        assert_eq!((account.held(), ledger.held()), (0, 0));
    }

    #[test]
    fn what_has_no_payload_is_charged_too() {
        let ledger = Ledger::new(10_000, 10_000);
        let account = ledger.account();
        let keyed = Message::tombstone().with_key("key").with_header("large", vec![0; 1_000]).unwrap();
        for message in [keyed, Message::tombstone(), Message::new("")] {
            let mut charged = message.clone();
            account.charge(&mut charged, None, 0).unwrap();
            assert_eq!(charged, message, "the message is what it was");
            let bytes = cost(&message);
            assert!(bytes >= message.size() as u64 + message.headers().len() as u64 * 64);
            assert_eq!((account.held(), ledger.held()), (bytes, bytes));
            let copy = charged.clone();
            drop(charged);
            assert_eq!(account.held(), bytes);
            drop(copy);
            assert_eq!((account.held(), ledger.held()), (0, 0));
        }
    }

    #[test]
    fn at_a_bound_publishers_are_refused_and_it_is_never_passed() {
        let ledger = Ledger::new(1_000, 300);
        let mut one = ledger.reserve(900).unwrap();
        assert_eq!(ledger.reserve(101).unwrap_err().status(), 503);
        one.reach(1_000).unwrap();
        assert_eq!(one.grow(1).unwrap_err().status(), 503);
        assert_eq!(ledger.held(), 1_000);
        drop(one);
        assert_eq!(ledger.held(), 0);
        let account = ledger.account();
        account.check(None).unwrap();
        {
            let _all = ledger.reserve(1_000).unwrap();
            assert_eq!(account.check(None), Err(Full::All(1_000)));
        }
        let mut held = Message::new(vec![0; 100]);
        account.charge(&mut held, None, 0).unwrap();
        assert_eq!(account.check(None), Err(Full::Topic(300)));
        drop(held);
        account.check(None).unwrap();
    }

    #[test]
    fn who_came_in_below_a_bound_is_held_to_it_when_charged() {
        let ledger = Ledger::new(3_000, 1_000);
        let (account, other) = (ledger.account(), ledger.account());
        let message = |bytes| Message::new(vec![0; bytes]);
        let mut first = message(700);
        account.charge(&mut first, None, 0).unwrap();
        assert_eq!(account.charge(&mut message(0), None, 0), Err(Full::Topic(1_000)));
        assert_eq!(account.charge(&mut message(0), Some(1), 0), Err(Full::Topic(1)));
        account.charge(&mut message(0), Some(2_000), 0).unwrap();
        // A topic that holds nothing takes one message of any size that all have room for.
        other.charge(&mut message(1_700), None, 0).unwrap();
        assert_eq!(other.charge(&mut message(2_000), None, 0), Err(Full::All(3_000)));
        // The body that it came in is counted already.
        let body = ledger.reserve(2_000).unwrap();
        other.charge(&mut message(1_700), None, body.bytes()).unwrap();
        drop(body);
        assert_eq!((other.held(), ledger.held()), (0, account.held()));
        // Of several the first ones are taken.
        let mut several = vec![message(0), message(0), message(0), message(0)];
        assert_eq!(other.charge_all(&mut several, None, 0), Err(Full::Topic(1_000)));
        assert_eq!((several.len(), other.held()), (3, 3 * cost_of(0)));
        drop((several, first));
        assert_eq!(ledger.held(), 0);
    }

    #[test]
    fn an_answer_counts_until_it_is_sent() {
        let ledger = Ledger::new(1, 1);
        let answer = ledger.answer(vec![0; 100]);
        assert!(ledger.held() >= 100 && answer.len() == 100);
        drop(answer);
        assert_eq!(ledger.held(), 0);
    }
}
