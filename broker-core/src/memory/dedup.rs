//! Deduplication by key: what was published under a key, for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::Receipt;

/// Keys a topic remembers at most; beyond, its oldest are forgotten early.
const MAX_KEYS: usize = 100_000;
/// Keys that all topics of a broker remember at most, but that each may remember one: some hundred bytes
/// each, the key besides.
const MAX_ALL_KEYS: usize = 1_000_000;
/// Ticks between two looks through all topics for keys that were to be forgotten.
const LOOK: u64 = 1_000;

/// How many keys all topics remember.
#[derive(Debug)]
pub(super) struct AllKeys {
    count: AtomicUsize,
    max: usize,
    /// When the next look through all topics may be.
    look: AtomicU64,
}

impl AllKeys {
    pub(super) fn new() -> Arc<Self> {
        Self::at_most(MAX_ALL_KEYS)
    }

    fn at_most(max: usize) -> Arc<Self> {
        Arc::new(Self { count: AtomicUsize::new(0), max, look: AtomicU64::new(0) })
    }

    fn is_full(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= self.max
    }

    /// Whether topics that are published to no more should be looked through now for keys they need not
    /// remember: at the bound, and now and then.
    pub(super) fn want_look(&self, now: u64) -> bool {
        let look = self.look.load(Ordering::Relaxed);
        let due = self.is_full() && look <= now;
        due && self.look.compare_exchange(look, now + LOOK, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// The keys published to one topic within the window, and the receipts they got.
pub(super) struct Window {
    receipts: HashMap<Arc<str>, Receipt>,
    /// Oldest first, with the tick at which the key is forgotten.
    order: VecDeque<(u64, Arc<str>)>,
    all: Arc<AllKeys>,
}

impl Drop for Window {
    fn drop(&mut self) {
        self.all.count.fetch_sub(self.order.len(), Ordering::Relaxed);
    }
}

impl Window {
    /// One whose keys are counted in `all`.
    pub(super) fn new(all: &Arc<AllKeys>) -> Self {
        Self { receipts: HashMap::new(), order: VecDeque::new(), all: Arc::clone(all) }
    }

    /// The receipt of the message first published under `key`, marked duplicate.
    pub(super) fn seen(&mut self, key: &str, now: u64) -> Option<Receipt> {
        self.forget_old(now);
        let mut receipt = self.receipts.get(key)?.clone();
        receipt.duplicate = true;
        Some(receipt)
    }

    /// Remembers `key` until tick `until`. Where all topics together remember too many, this one forgets
    /// its own oldest, and no other's.
    pub(super) fn remember(&mut self, key: Arc<str>, until: u64, receipt: Receipt) {
        while self.order.len() >= MAX_KEYS || (self.all.is_full() && !self.order.is_empty()) {
            self.forget_oldest();
        }
        self.order.push_back((until, Arc::clone(&key)));
        self.receipts.insert(key, receipt);
        self.all.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether every key is forgotten by now.
    pub(super) fn is_empty_at(&self, now: u64) -> bool {
        self.order.back().is_none_or(|(expiry, _)| *expiry <= now)
    }

    /// Forgets the keys whose time is over.
    pub(super) fn forget_old(&mut self, now: u64) {
        while self.order.front().is_some_and(|(expiry, _)| *expiry <= now) {
            self.forget_oldest();
        }
        if self.order.is_empty() && self.order.capacity() > 1_024 {
            (self.receipts, self.order) = (HashMap::new(), VecDeque::new());
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, oldest)) = self.order.pop_front() {
            self.receipts.remove(&oldest);
            self.all.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MessageId;

    fn receipt() -> Receipt {
        Receipt::new(MessageId::random())
    }

    fn key(number: usize) -> Arc<str> {
        number.to_string().into()
    }

    #[test]
    fn a_key_is_remembered_until_its_window_ends() {
        let mut window = Window::new(&AllKeys::new());
        let first = receipt();
        window.remember(key(1), 100, first.clone());
        let seen = window.seen("1", 99).expect("within the window");
        assert_eq!((seen.id, seen.duplicate), (first.id, true));
        assert!(!window.is_empty_at(99));
        assert!(window.is_empty_at(100));
        assert!(window.seen("1", 100).is_none());
        // Published again, it is remembered anew.
        window.remember(key(1), 200, receipt());
        assert!(window.seen("1", 199).is_some());
    }

    #[test]
    fn a_topic_at_its_bound_forgets_its_oldest() {
        let all = AllKeys::new();
        let mut window = Window::new(&all);
        (0..=MAX_KEYS).for_each(|number| window.remember(key(number), 100, receipt()));
        assert!(window.seen("0", 0).is_none());
        assert!(window.seen("1", 0).is_some());
        assert_eq!((window.receipts.len(), all.count.load(Ordering::Relaxed)), (MAX_KEYS, MAX_KEYS));
    }

    #[test]
    fn all_topics_together_remember_no_more_than_their_bound() {
        let all = AllKeys::at_most(10);
        let (mut quiet, mut busy) = (Window::new(&all), Window::new(&all));
        (0..6).for_each(|number| quiet.remember(key(number), 100, receipt()));
        (0..20).for_each(|number| busy.remember(key(number), 1_000, receipt()));
        assert_eq!((quiet.order.len(), busy.order.len()), (6, 4), "it forgets its own");
        assert!(busy.seen("16", 0).is_some() && busy.seen("15", 0).is_none());
        // Once at a time, and only at the bound, others are looked through.
        assert!(all.want_look(0) && !all.want_look(LOOK - 1) && all.want_look(LOOK));
        quiet.forget_old(100);
        assert!(!all.want_look(10 * LOOK));
        (20..30).for_each(|number| busy.remember(key(number), 1_000, receipt()));
        assert_eq!(busy.order.len(), 10);
        drop(busy);
        assert_eq!(all.count.load(Ordering::Relaxed), 0);
    }
}
