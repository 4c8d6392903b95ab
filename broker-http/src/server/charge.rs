//! How a message is charged to its topic and to the books of the server.
//!
//! Its payload is wrapped: wherever it goes (a backlog, a push under way, a topic's history, a dead letter), the charge
//! goes with it and ends with its last copy. So it holds over any broker, and nobody has to remember to give it back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use broker_core::{Error, ErrorKind, Message, Topic};
use bytes::Bytes;
use http::StatusCode;

use super::memory::{Ledger, RETRY_AFTER, Vain, at_bound};
use super::metrics::Refusal;
use super::problem::Problem;

/// What a message is charged: bytes that it takes, about.
pub(crate) fn cost(message: &Message) -> u64 {
    message.memory_size() as u64
}

/// What the messages of one topic hold.
#[derive(Debug)]
pub(crate) struct Account {
    topic: Topic,
    books: Ledger,
    held: AtomicU64,
    vain: Vain,
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
            Self::All(max) => at_bound(max),
            Self::Topic(max) => format!(
                "the messages of topic {topic} are at their bound of {max} bytes; try again once some are taken out"
            ),
        }
    }
}

impl Account {
    pub(crate) fn new(books: &Ledger, topic: &Topic) -> Arc<Self> {
        Arc::new(Self { topic: topic.clone(), books: books.clone(), held: AtomicU64::new(0), vain: Vain::default() })
    }

    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Refuses publishers, before their body is read, where the topic or all of them together are at their bound.
    pub(crate) fn check(&self, own: Option<u64>) -> Result<(), Full> {
        let max = self.max(own);
        if self.held() >= max && !(self.make_room(1, max) && self.held() < max) {
            return Err(Full::Topic(max));
        }
        self.books.check().map_err(Full::All)
    }

    /// Has the topic's history go; tells whether it holds nothing any more.
    pub(crate) fn forget(&self) -> bool {
        self.books.make_room(Some(&self.topic), &self.vain, 0, || self.held()) && self.held() == 0
    }

    /// Has the topic's history yield to so many bytes.
    fn make_room(&self, bytes: u64, max: u64) -> bool {
        let missing = || match self.held() {
            0 => 0,
            held => held.saturating_add(bytes).saturating_sub(max),
        };
        self.books.make_room(Some(&self.topic), &self.vain, max, missing)
    }

    /// The topic's bound: `own`, or that of every topic.
    fn max(&self, own: Option<u64>) -> u64 {
        own.unwrap_or_else(|| self.books.topic_max())
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

    /// Takes the bytes of so many messages, unless a bound would be passed; history yields to them. A topic that holds
    /// nothing has room for any one message.
    fn take(&self, bytes: u64, messages: usize, own: Option<u64>, covered: u64) -> Result<(), Full> {
        let max = self.max(own);
        let took = || self.try_take(bytes, messages, max);
        if !(took() || self.make_room(bytes, max) && took()) {
            return Err(Full::Topic(max));
        }
        self.books.take(bytes, covered).map_err(|max| {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            Full::All(max)
        })
    }

    fn try_take(&self, bytes: u64, messages: usize, max: u64) -> bool {
        let before = self.held.fetch_add(bytes, Ordering::Relaxed);
        let passed = (before > 0 || messages > 1) && before.saturating_add(bytes) > max;
        if passed {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
        }
        !passed
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
        account.books.give_back(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a message of so many bytes is charged.
    fn cost_of(bytes: u64) -> u64 {
        cost(&Message::new("")) + bytes
    }

    fn account(ledger: &Ledger) -> Arc<Account> {
        Account::new(ledger, &Topic::new("a").unwrap())
    }

    #[test]
    fn a_charge_ends_with_the_last_copy() {
        let ledger = Ledger::new(1_000, 600);
        let account = account(&ledger);
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
        let account = account(&ledger);
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
    fn publishers_are_refused_at_a_bound() {
        let ledger = Ledger::new(1_000, 300);
        let account = account(&ledger);
        account.check(None).unwrap();
        let mut all = ledger.room();
        all.grow(1_000).unwrap();
        assert_eq!(account.check(None), Err(Full::All(1_000)));
        drop(all);
        let mut held = Message::new(vec![0; 100]);
        account.charge(&mut held, None, 0).unwrap();
        assert_eq!(account.check(None), Err(Full::Topic(300)));
        drop(held);
        account.check(None).unwrap();
    }

    #[test]
    fn who_came_in_below_a_bound_is_held_to_it_when_charged() {
        let ledger = Ledger::new(3_000, 1_000);
        let (account, other) = (account(&ledger), account(&ledger));
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
        let mut body = ledger.room();
        body.grow(2_000).unwrap();
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
}
