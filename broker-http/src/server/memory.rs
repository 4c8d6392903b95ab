//! What messages and request bodies hold in memory: counted from the first byte of a body to the
//! last reference to its message, for the whole server and for each topic.
//!
//! A message is charged by wrapping its payload (a tombstone's key or largest header): wherever it goes
//! (a backlog, a push under way, a topic's history, a dead letter), the charge goes with it and ends with
//! its last copy. So it holds over any broker, and nobody has to remember to give it back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use broker_core::{ErrorKind, Message};
use bytes::Bytes;
use http::StatusCode;

use super::metrics::Refusal;
use super::problem::{Answer, Problem};

/// What a message takes besides its bytes, about: its fields, its place in a log, its charge.
pub(crate) const OVERHEAD: u64 = 256;

/// What a header takes besides its bytes, about: an empty one is two handles on shared bytes.
const HEADER_OVERHEAD: u64 = 96;

/// What a message is charged: bytes that it takes, about.
pub(crate) fn cost(message: &Message) -> u64 {
    message.size() as u64 + OVERHEAD + message.headers().len() as u64 * HEADER_OVERHEAD
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
        let mut reservation = Reservation { books: self.clone(), bytes: 0, bounded: false };
        reservation.grow(bytes).map(|()| reservation)
    }
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
            let detail =
                format!("the messages held here are at their bound of {max} bytes; try again once some are taken out");
            return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, detail)
                .retry_after(RETRY_AFTER)
                .counted(Refusal::Memory));
        }
        self.bytes += bytes;
        Ok(())
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

    /// Refuses publishers where the topic, or all of them together, hold too much.
    pub(crate) fn check(&self, topic: &str, own: Option<u64>) -> Answer<()> {
        let max = own.unwrap_or_else(|| self.books.0.topic_max.load(Ordering::Relaxed));
        if self.held() < max {
            return self.books.reserve(1).map(drop);
        }
        let detail = format!(
            "the messages of topic {topic} are at their bound of {max} bytes; try again once some are taken out"
        );
        Err(Problem::too_many(detail).retry_after(RETRY_AFTER).counted(Refusal::TopicMemory))
    }

    /// Charges a message until the part of it that is always there is dropped for the last time.
    pub(crate) fn charge(self: &Arc<Self>, message: &mut Message) {
        let bytes = charge(message, self);
        self.add(bytes);
    }

    /// The same for several: the books, which whoever settles writes to meanwhile, are opened once.
    pub(crate) fn charge_all(self: &Arc<Self>, messages: &mut [Message]) {
        let batch = Arc::new(Batch(Arc::clone(self)));
        let bytes = messages.iter_mut().map(|message| charge(message, &batch)).sum();
        self.add(bytes);
    }

    fn add(&self, bytes: u64) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.books.0.held.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Makes a message give back what it costs, and tells how much that is.
fn charge<A: Pays>(message: &mut Message, account: &Arc<A>) -> u64 {
    let cost = cost(message);
    // Two small allocations, the part's and this. As one they would be too large for the bins that glibc's
    // allocator frees into from another thread without a lock: it was measured to take a fifth longer.
    let charged = |part| Bytes::from_owner(Charged { part, account: Arc::clone(account), cost });
    if let Some(payload) = message.payload_mut() {
        *payload = charged(std::mem::take(payload));
    } else if let Some(key) = message.key().cloned() {
        // No payload to go with. The key stays for life; of headers the largest is what is held.
        *message = message.clone().with_key(charged(key));
    } else {
        let all = std::mem::take(message.headers_mut());
        let largest = all.iter().enumerate().max_by_key(|(_, (_, value))| value.len()).map(|(index, _)| index);
        for (index, (name, value)) in all.iter().enumerate() {
            let value = if Some(index) == largest { charged(value.clone()) } else { value.clone() };
            message.headers_mut().push(name.clone(), value);
        }
        if largest.is_none() {
            // It holds next to nothing, and its group's backlog bounds how many there are.
            return 0;
        }
    }
    cost
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

    #[test]
    fn a_charge_ends_with_the_last_copy() {
        let ledger = Ledger::new(1_000, 600);
        let account = ledger.account();
        let mut message = Message::new("12345678").with_key("k");
        account.charge(&mut message);
        assert_eq!((account.held(), ledger.held()), (8 + 1 + OVERHEAD, 8 + 1 + OVERHEAD));
        let payload = message.payload().slice(2..4);
        drop(message);
        assert_eq!(payload, "34");
        assert_ne!(account.held(), 0);
        drop(payload);
        assert_eq!((account.held(), ledger.held()), (0, 0));
        // An empty one is a message too.
        let mut empty = Message::new("");
        account.charge(&mut empty);
        assert_eq!(account.held(), OVERHEAD);
        drop(empty);
        assert_eq!(account.held(), 0);
    }

    #[test]
    fn a_tombstone_is_charged_by_its_key_or_its_headers() {
        let ledger = Ledger::new(10_000, 10_000);
        let account = ledger.account();
        let keyed = Message::tombstone().with_key("key").with_header("large", vec![0; 1_000]).unwrap();
        let headed = Message::tombstone().with_header("a", "1").unwrap().with_header("b", vec![0; 1_000]).unwrap();
        let empty = Message::tombstone().with_key("");
        for message in [keyed, headed, empty] {
            let mut charged = message.clone();
            account.charge(&mut charged);
            assert_eq!(charged, message, "the message is what it was");
            let bytes = cost(&message);
            assert!(bytes >= message.size() as u64 + OVERHEAD + message.headers().len() as u64 * 64);
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
        account.check("a", None).unwrap();
        {
            let _all = ledger.reserve(1_000).unwrap();
            assert_eq!(account.check("a", None).unwrap_err().status(), 503);
        }
        let mut held = Message::new(vec![0; 100]);
        account.charge(&mut held);
        assert_eq!(account.check("a", None).unwrap_err().status(), 429);
        drop(held);
        account.check("a", None).unwrap();
    }
}
