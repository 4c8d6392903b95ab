//! What a topic retains for who comes later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::entry::{Entry, Place};
use crate::{DeadLetter, Timestamp, Topic};

/// How much of its past every topic retains, so that a group can start earlier than now. The first
/// bound that is reached counts. By default a broker retains nothing.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, GroupOptions, MemoryBroker, MemoryOptions, Message, Retention, StartAt, Subscribe, Topic};
///
/// let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(100)));
/// let topic = Topic::new("orders")?;
/// broker.publish(&topic, Message::new("before anybody came")).await?;
///
/// let earliest = GroupOptions::new().with_start(StartAt::Earliest);
/// let mut late = broker.subscribe(&(&topic).into(), Subscribe::new().with_options(earliest)).await?;
/// let delivery = late.next().await?.expect("open");
/// assert_eq!(delivery.message().payload().as_ref(), b"before anybody came");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retention {
    /// Messages a topic retains at most.
    pub max_messages: usize,
    /// Bytes that what a topic retains takes at most, as of [`Message::memory_size`](crate::Message::memory_size).
    pub max_bytes: u64,
    /// How long a message is retained at most.
    pub max_age: Duration,
    /// The same of all topics together; at it a topic retains nothing new until others let go of theirs.
    pub max_total_bytes: u64,
}

impl Retention {
    /// So many messages a topic, 16 MiB and any age at most, and any number of bytes over all topics.
    pub fn messages(max_messages: usize) -> Self {
        Self { max_messages, max_bytes: 16 << 20, max_age: Duration::MAX, max_total_bytes: u64::MAX }
    }

    /// Sets how many bytes what a topic retains takes at most.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// Sets how many bytes what all topics together retain takes at most.
    #[must_use]
    pub fn with_max_total_bytes(mut self, max_total_bytes: u64) -> Self {
        self.max_total_bytes = max_total_bytes;
        self
    }

    /// Sets how long a message is retained at most.
    #[must_use]
    pub fn with_max_age(mut self, max_age: Duration) -> Self {
        self.max_age = max_age;
        self
    }
}

/// One topic's past in the order of places, with the time at which each message became visible.
pub(super) struct History {
    entries: VecDeque<(Timestamp, Arc<Entry>)>,
    /// What is delayed and not due yet.
    pending: BTreeMap<Place, (Timestamp, Arc<Entry>)>,
    /// The highest place of what is retained no longer. Of several topics one keeps longer than another:
    /// a reader of both that goes on after an earlier place misses something.
    dropped: Option<Place>,
    bytes: u64,
    /// How many of them are dead letters.
    letters: usize,
    max_age: Duration,
    /// Bytes that all topics retain.
    total: Arc<AtomicU64>,
}

impl Drop for History {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl History {
    /// One that is counted in `total`.
    pub(super) fn new(total: &Arc<AtomicU64>) -> Self {
        let (entries, pending) = (VecDeque::new(), BTreeMap::new());
        Self { entries, pending, dropped: None, bytes: 0, letters: 0, max_age: Duration::MAX, total: Arc::clone(total) }
    }

    /// Adds a message at its place; `tick` is the present, at or after that of a message not delayed.
    pub(super) fn push(&mut self, entry: Arc<Entry>, retention: &Retention, tick: u64) {
        let now = Timestamp::now();
        self.bytes += taken(&entry);
        self.letters += usize::from(DeadLetter::is_dead(&entry.message));
        self.total.fetch_add(taken(&entry), Ordering::Relaxed);
        self.max_age = retention.max_age;
        match (entry.place(), entry.message.deliver_at()) {
            (Some(place), Some(due)) if place.tick > tick => {
                self.pending.insert(place, (now.max(due), entry));
            }
            (place, due) => {
                // What became due before it stands before it.
                self.settle(place.map_or(tick, |place| place.tick));
                self.entries.push_back((due.map_or(now, |due| now.max(due)), entry));
            }
        }
        drop(self.trim(retention));
    }

    /// Brings it within its bounds. What was dropped is the caller's, to be let go of where nobody waits for it.
    pub(super) fn trim(&mut self, retention: &Retention) -> Vec<Arc<Entry>> {
        let now = Timestamp::now();
        let mut gone = Vec::new();
        while self.entries.len() + self.pending.len() > retention.max_messages
            || self.bytes > retention.max_bytes
            || self.total.load(Ordering::Relaxed) > retention.max_total_bytes
            || self.entries.front().is_some_and(|(time, _)| now.since(*time) > retention.max_age)
        {
            let Some(oldest) = self.pop() else { break };
            gone.push(oldest);
        }
        gone
    }

    /// Drops its oldest until they were `bytes` of what `frees` says, after `looks` entries at the latest. If none of so many
    /// is, they are dropped all the same: they hide what comes after them. Tells those bytes, and what was dropped.
    pub(super) fn forget(&mut self, bytes: u64, frees: Frees<'_>, looks: &mut usize) -> (u64, Vec<Arc<Entry>>) {
        let (mut freed, mut seen, mut count) = (0, 0, 0);
        for (_, entry) in self.entries.iter().chain(self.pending.values()).take(*looks) {
            if freed >= bytes {
                break;
            }
            seen += 1;
            if frees.counts(entry) {
                freed += taken(entry);
                count = seen;
            }
        }
        *looks -= seen;
        if *looks == 0 && freed == 0 {
            count = seen;
        }
        (freed, (0..count).map_while(|_| self.pop()).collect())
    }

    /// Drops the oldest. What nobody could have seen yet goes last.
    fn pop(&mut self) -> Option<Arc<Entry>> {
        let (_, oldest) = self.entries.pop_front().or_else(|| self.pending.pop_first().map(|(_, pending)| pending))?;
        self.dropped = self.dropped.max(oldest.place());
        self.bytes -= taken(&oldest);
        self.letters -= usize::from(DeadLetter::is_dead(&oldest.message));
        self.total.fetch_sub(taken(&oldest), Ordering::Relaxed);
        Some(oldest)
    }

    /// Whether any of it is a dead letter.
    pub(super) fn has_letters(&self) -> bool {
        self.letters > 0
    }

    /// The place of its oldest, and bytes of all it has.
    pub(super) fn oldest(&self) -> Option<(Place, u64)> {
        let pending = || self.pending.keys().next().copied();
        let oldest = self.entries.front().map_or_else(pending, |(_, entry)| entry.place());
        oldest.map(|place| (place, self.bytes))
    }

    /// What is due by `tick` takes its place.
    fn settle(&mut self, tick: u64) {
        while let Some(first) = self.pending.first_entry().filter(|first| first.key().tick <= tick) {
            self.entries.push_back(first.remove());
        }
    }

    /// What became visible at `time` or later, or will, and is not too old.
    pub(super) fn since(&self, time: Timestamp) -> impl Iterator<Item = &Arc<Entry>> {
        let now = Timestamp::now();
        let all = self.entries.iter().chain(self.pending.values());
        let asked = move |(visible, _): &&(Timestamp, _)| *visible >= time && now.since(*visible) <= self.max_age;
        all.filter(asked).map(|(_, entry)| entry)
    }

    /// The highest place of what was dropped or is too old.
    pub(super) fn missing(&self) -> Option<Place> {
        let now = Timestamp::now();
        let old = self.entries.iter().filter(|(visible, _)| now.since(*visible) > self.max_age);
        self.dropped.max(old.filter_map(|(_, entry)| entry.place()).max())
    }

    /// The highest place of all it ever had.
    pub(super) fn highest(&self) -> Option<Place> {
        let newest = self.entries.back().and_then(|(_, entry)| entry.place());
        self.dropped.max(newest).max(self.pending.keys().next_back().copied())
    }

    /// Whether everything in it is too old by now: age is looked at when a message comes.
    pub(super) fn is_past(&self) -> bool {
        let now = Timestamp::now();
        let mut newest = self.entries.back().into_iter().chain(self.pending.values().next_back());
        newest.all(|(visible, _)| now.since(*visible) > self.max_age)
    }
}

/// Which retained messages free what they take.
#[derive(Clone, Copy)]
pub(super) enum Frees<'a> {
    /// All.
    Everything,
    /// Those that are in no backlog and not in flight.
    WhatIsAlone,
    /// Of those, dead letters that were published to this topic: they share its messages' payloads.
    LettersOf(&'a Topic),
}

impl Frees<'_> {
    fn counts(self, entry: &Arc<Entry>) -> bool {
        let alone = || Arc::strong_count(entry) == 1;
        match self {
            Self::Everything => true,
            Self::WhatIsAlone => alone(),
            Self::LettersOf(topic) => alone() && DeadLetter::is_from(&entry.message, topic),
        }
    }
}

/// Bytes that a retained message takes.
fn taken(entry: &Entry) -> u64 {
    entry.message.memory_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    fn entry(bytes: usize) -> Arc<Entry> {
        let overhead = Message::new("").memory_size();
        Entry::new("a".parse().unwrap(), Message::new(vec![0; bytes - overhead]))
    }

    #[test]
    fn all_topics_together_never_retain_more_than_their_bound() {
        let total = Arc::new(AtomicU64::new(0));
        let retention = Retention::messages(100).with_max_total_bytes(1_000);
        let (mut one, mut two) = (History::new(&total), History::new(&total));
        for _ in 0..5 {
            one.push(entry(300), &retention, 0);
            assert!(total.load(Ordering::Relaxed) <= 1_000);
        }
        assert_eq!(one.entries.len(), 3);
        drop(one);
        // Another topic gets what is left, and its newest rather than its oldest.
        let mut one = History::new(&total);
        one.push(entry(400), &retention, 0);
        two.push(entry(350), &retention, 0);
        two.push(entry(300), &retention, 0);
        assert_eq!((two.entries.len(), total.load(Ordering::Relaxed)), (1, 700));
        two.push(entry(650), &retention, 0);
        assert_eq!((two.entries.len(), total.load(Ordering::Relaxed)), (0, 400));
        drop(one);
        two.push(entry(650), &retention, 0);
        assert_eq!(total.load(Ordering::Relaxed), 650);
        drop(two);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_forgotten_frees_what_nobody_else_holds() {
        let total = Arc::new(AtomicU64::new(0));
        let retention = Retention::messages(100);
        let mut history = History::new(&total);
        let entries: Vec<_> = (0..6).map(|_| entry(300)).collect();
        entries.iter().for_each(|entry| history.push(Arc::clone(entry), &retention, 0));
        let mut looks = 100;
        // All of it is in a backlog: it stays.
        let (freed, gone) = history.forget(300, Frees::WhatIsAlone, &mut looks);
        assert!(freed == 0 && gone.is_empty());
        assert_eq!((history.entries.len(), looks), (6, 94));
        // The first and the last are; what stands between goes, and what is before it.
        let (first, held) = (Arc::clone(&entries[0]), [Arc::clone(&entries[4]), Arc::clone(&entries[5])]);
        drop(entries);
        let (freed, gone) = history.forget(u64::MAX, Frees::WhatIsAlone, &mut looks);
        assert_eq!((freed, gone.len(), history.entries.len(), looks), (900, 4, 2, 88));
        assert!(Arc::ptr_eq(&gone[0], &first));
        drop(held);
        // No more than is asked for.
        assert_eq!(history.forget(1, Frees::WhatIsAlone, &mut looks).0, 300);
        assert_eq!((history.entries.len(), total.load(Ordering::Relaxed)), (1, 300));
    }

    #[test]
    fn what_is_held_elsewhere_hides_nothing_for_ever() {
        let mut history = History::new(&Arc::default());
        let retention = Retention::messages(100);
        let held: Vec<_> = (0..5).map(|_| entry(300)).collect();
        held.iter().for_each(|entry| history.push(Arc::clone(entry), &retention, 0));
        history.push(entry(300), &retention, 0);
        let looks = |history: &mut History| history.forget(300, Frees::WhatIsAlone, &mut 2).0;
        assert_eq!([looks(&mut history), looks(&mut history), looks(&mut history)], [0, 0, 300]);
        assert!(history.entries.is_empty());
    }
}
