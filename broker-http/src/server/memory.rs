//! What messages and bodies hold in memory, for the whole server: the books that everything is counted in.
//!
//! Nobody is refused for what is only history: at a bound, what the topics of a broker in this process retain yields first.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use broker_core::{Broker, ErrorKind, MemoryBroker, Topic};
use http::StatusCode;
use parking_lot::Mutex;

use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use crate::outgoing::Outgoing;

/// How long a refused publisher is told to wait.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The part of a bound that history frees at least when it yields, so that it is asked seldom.
const AT_ONCE: u64 = 64;

/// The books of a server.
#[derive(Clone, Debug)]
pub(crate) struct Ledger(Arc<Books>);

#[derive(Debug)]
struct Books {
    held: AtomicU64,
    /// What deliveries of a broker elsewhere hold of it.
    delivered: AtomicU64,
    /// Counted by themselves, and a part of what is held. Readers that do not read keep no push waiting, nor endpoints
    /// that do not answer a reader.
    answers: Outgoing,
    pushes: Outgoing,
    max: AtomicU64,
    topic_max: AtomicU64,
    /// Since when milliseconds are counted, and when a look for what has expired may be next.
    since: Instant,
    look: AtomicU64,
    /// The broker whose topics retain what is counted here. It holds the messages, and they the books.
    broker: OnceLock<Weak<dyn Broker>>,
    /// Held by who has history yield, with how often it did.
    yielded: Mutex<u64>,
    vain: Vain,
}

/// Until when, in milliseconds of the books, no history need be asked to yield: none could when it was last.
#[derive(Debug, Default)]
pub(super) struct Vain(AtomicU64);

impl Ledger {
    pub(crate) fn new(max: u64, topic_max: u64) -> Self {
        Self(Arc::new(Books {
            held: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            answers: Outgoing::new(share(max)),
            pushes: Outgoing::new(share(max)),
            max: AtomicU64::new(max),
            topic_max: AtomicU64::new(topic_max),
            since: Instant::now(),
            look: AtomicU64::new(0),
            broker: OnceLock::new(),
            yielded: Mutex::new(0),
            vain: Vain::default(),
        }))
    }

    /// From now on the history of this broker's topics yields, if it is one in this process.
    pub(crate) fn retained_by(&self, broker: &Arc<dyn Broker>) {
        let _ = self.0.broker.set(Arc::downgrade(broker));
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.0.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether history was asked in vain a moment ago.
    pub(super) fn is_vain(&self, vain: &Vain) -> bool {
        self.millis() < vain.0.load(Ordering::Relaxed)
    }

    /// It was now. Who is refused is told to come again when this is over.
    pub(super) fn set_vain(&self, vain: &Vain) {
        vain.0.store(self.millis().saturating_add(RETRY_AFTER.as_millis() as u64), Ordering::Relaxed);
    }

    /// So many bytes are `missing` at the bound `max`, of `topic` or of all: has what is retained yield. Tells whether that
    /// may have made room.
    pub(super) fn make_room(&self, topic: Option<&Topic>, vain: &Vain, max: u64, missing: impl Fn() -> u64) -> bool {
        if self.is_vain(vain) {
            return false;
        }
        let Some(broker) = self.0.broker.get().and_then(Weak::upgrade) else { return false };
        let broker: &dyn Any = &*broker;
        let Some(broker) = broker.downcast_ref::<MemoryBroker>() else { return false };
        // One at a time, so that many who are refused at once take no more than is missing.
        let mut yielded = self.0.yielded.lock();
        let mut bytes = 0;
        // Mostly the first part is enough. What a dead letter shares is free with its last copy only.
        for part in 0..=AT_ONCE.ilog2() {
            let missing = missing();
            if missing == 0 {
                break;
            }
            let freed = broker.forget(topic, missing.max((max / AT_ONCE) << part));
            if freed == 0 {
                self.set_vain(vain);
                break;
            }
            bytes += freed;
        }
        if bytes == 0 {
            return missing() == 0;
        }
        *yielded += 1;
        if yielded.is_power_of_two() {
            let of = topic.map_or("all topics", Topic::as_str);
            tracing::warn!(
                of,
                bytes,
                times = *yielded,
                "a bound is reached: the oldest messages that were only retained for who comes later were forgotten"
            );
        }
        true
    }

    /// A publisher was refused. Tells whether it is time to look for messages that have expired: a broker in
    /// this process lets go of them when it is asked for its numbers.
    pub(crate) fn want_look(&self) -> bool {
        let now = self.millis();
        let look = self.0.look.load(Ordering::Relaxed);
        let next = now.saturating_add(RETRY_AFTER.as_millis() as u64);
        look <= now && self.0.look.compare_exchange(look, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// From now on these bounds; what is held stays, but for history, which yields to who publishes.
    pub(crate) fn set(&self, max: u64, topic_max: u64) {
        self.0.max.store(max, Ordering::Relaxed);
        self.0.answers.set_max(share(max));
        self.0.pushes.set_max(share(max));
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

    pub(crate) fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed) + self.0.encoded()
    }

    pub(crate) fn max(&self) -> u64 {
        self.0.max.load(Ordering::Relaxed)
    }

    pub(crate) fn topic_max(&self) -> u64 {
        self.0.topic_max.load(Ordering::Relaxed)
    }

    /// Takes so many bytes, `covered` of which are counted already. History yields to them.
    ///
    /// # Errors
    ///
    /// The bound, if they would pass it.
    pub(super) fn take(&self, bytes: u64, covered: u64) -> Result<(), u64> {
        let missing = || self.held().saturating_add(bytes).saturating_sub(self.max().saturating_add(covered));
        self.try_take(bytes, covered).or_else(|max| {
            // Nothing makes room for what is larger than all there is.
            let fits = bytes <= max.saturating_add(covered);
            if fits && self.make_room(None, &self.0.vain, max, missing) {
                self.try_take(bytes, covered)
            } else {
                Err(max)
            }
        })
    }

    /// Whether there is room for any more.
    ///
    /// # Errors
    ///
    /// The bound, if there is none.
    pub(super) fn check(&self) -> Result<(), u64> {
        let missing = || (self.held() + 1).saturating_sub(self.max());
        let max = self.max();
        if missing() == 0 || self.make_room(None, &self.0.vain, max, missing) && missing() == 0 {
            Ok(())
        } else {
            Err(max)
        }
    }

    fn try_take(&self, bytes: u64, covered: u64) -> Result<(), u64> {
        let max = self.max();
        let held = self.0.held.fetch_add(bytes, Ordering::Relaxed) + self.0.encoded();
        if held.saturating_add(bytes) > max.saturating_add(covered) {
            self.give_back(bytes);
            return Err(max);
        }
        Ok(())
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.0.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Room for what is about to be read: none yet, and as much as there is.
    pub(crate) fn room(&self) -> Reservation {
        Reservation { books: self.clone(), bytes: 0, bounded: true, share: None }
    }

    /// Room for what makes room, or mends what keeps it taken: settlements, subscriptions, redrives. They are small,
    /// and count, and no bound refuses them but that of their sender's own bodies.
    pub(crate) fn grant(&self) -> Reservation {
        Reservation { books: self.clone(), bytes: 0, bounded: false, share: None }
    }

    /// What begun heads may hold that have no end yet.
    pub(crate) fn room_of_heads(&self) -> u64 {
        share(self.max())
    }

    /// What is encoded of messages for whoever asked.
    pub(crate) fn answers(&self) -> &Outgoing {
        &self.0.answers
    }

    /// What is encoded of messages to be pushed.
    pub(crate) fn pushes(&self) -> &Outgoing {
        &self.0.pushes
    }
}

impl Books {
    fn encoded(&self) -> u64 {
        self.answers.bytes() + self.pushes.bytes()
    }
}

/// Of all that may be held: what may be encoded of messages for readers, for endpoints, what begun heads hold, and what the bodies of one identity
/// hold that are under way.
fn share(max: u64) -> u64 {
    (max / 8).max(1)
}

/// Room for a body; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    books: Ledger,
    bytes: u64,
    /// Whether it is refused at the bound.
    bounded: bool,
    share: Option<Share>,
}

/// What the bodies of one identity hold that are under way: no identity keeps the others out by sending slowly.
#[derive(Clone, Debug, Default)]
pub(crate) struct Share(Arc<AtomicU64>);

impl Reservation {
    /// Counts it as a part of what its sender may hold.
    pub(crate) fn of(mut self, share: Option<Share>) -> Self {
        self.share = share;
        self
    }

    /// What is announced is not there yet: it neither counts nor has history yield. But what could never fit is not waited for.
    ///
    /// # Errors
    ///
    /// 413.
    pub(crate) fn expect(&self, bytes: u64) -> Answer<()> {
        if self.bounded && bytes > self.books.max() { Err(never(self.books.max())) } else { Ok(()) }
    }

    /// Room for more.
    ///
    /// # Errors
    ///
    /// 503 if there is none, 413 where there never is so much, 429 where its sender holds too much already.
    pub(crate) fn grow(&mut self, bytes: u64) -> Answer<()> {
        if let Some(Share(held)) = &self.share {
            let most = share(self.books.max());
            let before = held.fetch_add(bytes, Ordering::Relaxed);
            // One body alone may be as large as any.
            if before > self.bytes && before.saturating_add(bytes) > most {
                held.fetch_sub(bytes, Ordering::Relaxed);
                return Err(Problem::too_many(format!(
                    "bodies of this identity that are under way hold {most} bytes, which is the most; finish some first"
                ))
                .retry_after(RETRY_AFTER)
                .counted(Refusal::Bodies));
            }
        }
        self.take(bytes).inspect_err(|_| {
            if let Some(Share(held)) = &self.share {
                held.fetch_sub(bytes, Ordering::Relaxed);
            }
        })?;
        self.bytes += bytes;
        Ok(())
    }

    fn take(&self, bytes: u64) -> Answer<()> {
        if !self.bounded {
            self.books.0.held.fetch_add(bytes, Ordering::Relaxed);
            return Ok(());
        }
        self.books.take(bytes, 0).map_err(|max| {
            if self.bytes.saturating_add(bytes) > max {
                return never(max);
            }
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Unavailable, at_bound(max))
                .retry_after(RETRY_AFTER)
                .counted(Refusal::Memory)
        })
    }

    /// The same of what is never refused.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.books.0.held.fetch_add(bytes, Ordering::Relaxed);
        if let Some(Share(held)) = &self.share {
            held.fetch_add(bytes, Ordering::Relaxed);
        }
        self.bytes += bytes;
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back what is beyond so many bytes.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let beyond = self.bytes.saturating_sub(bytes);
        self.books.give_back(beyond);
        if let Some(Share(held)) = &self.share {
            held.fetch_sub(beyond, Ordering::Relaxed);
        }
        self.bytes -= beyond;
    }

    /// Room for so much altogether.
    pub(crate) fn reach(&mut self, bytes: u64) -> Answer<()> {
        self.grow(bytes.saturating_sub(self.bytes))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

/// What is said of more than there ever is.
fn never(max: u64) -> Problem {
    Problem::too_large(format!(
        "it takes more than the {max} bytes that all messages here may hold together; send less at a time"
    ))
}

/// What is said at the bound.
pub(super) fn at_bound(max: u64) -> String {
    format!("the messages held here are at their bound of {max} bytes; try again once some are taken out")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outgoing::Part;

    #[test]
    fn at_the_bound_bodies_are_refused_and_it_is_never_passed() {
        let ledger = Ledger::new(1_000, 300);
        let mut one = ledger.room();
        one.grow(900).unwrap();
        assert_eq!(ledger.room().grow(101).unwrap_err().status(), 503);
        assert_eq!(ledger.room().grow(1_001).unwrap_err().status(), 413);
        one.reach(1_000).unwrap();
        assert_eq!(one.grow(1).unwrap_err().status(), 413);
        assert_eq!(ledger.held(), 1_000);
        ledger.grant().grow(1).unwrap();
        drop(one);
        assert_eq!(ledger.held(), 0);
    }

    #[test]
    fn one_sender_does_not_take_the_room_of_all() {
        let ledger = Ledger::new(800, 800);
        let share = Share::default();
        // One body is as large as any; beside it there is no second one.
        let mut large = ledger.room().of(Some(share.clone()));
        large.grow(300).unwrap();
        large.grow(100).unwrap();
        let problem = ledger.grant().of(Some(share.clone())).grow(1).unwrap_err();
        assert_eq!((problem.status(), ledger.held()), (StatusCode::TOO_MANY_REQUESTS, 400));
        ledger.room().of(Some(Share::default())).grow(100).unwrap();
        drop(large);
        let mut small: Vec<_> = (0..4).map(|_| ledger.room().of(Some(share.clone()))).collect();
        small.iter_mut().for_each(|body| body.grow(25).unwrap());
        assert_eq!(small[0].grow(1).unwrap_err().status(), StatusCode::TOO_MANY_REQUESTS);
        small[1].shrink(24);
        small[0].grow(1).unwrap();
        // What is announced counts when it is there.
        drop(small);
        let announced = ledger.room().of(Some(share.clone()));
        announced.expect(800).unwrap();
        assert_eq!((ledger.held(), announced.expect(801).unwrap_err().status().as_u16()), (0, 413));
        assert_eq!((ledger.held(), share.0.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn an_answer_counts_until_it_is_sent() {
        let ledger = Ledger::new(1, 1);
        let answer = ledger.answers().carry(&Part::default(), vec![0; 100]);
        assert!(ledger.held() >= 100 && answer.len() == 100);
        assert_eq!(ledger.room().grow(1).unwrap_err().status(), 503);
        drop(answer);
        assert_eq!(ledger.held(), 0);
    }
}
