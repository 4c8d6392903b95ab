//! Deduplication by key: what was published under a key, for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::Receipt;

/// Keys a topic remembers at most; beyond, the oldest are forgotten early.
const MAX_KEYS: usize = 100_000;

/// The keys published to one topic within the window, and the receipts they got.
#[derive(Default)]
pub(super) struct Window {
    receipts: HashMap<Arc<str>, Receipt>,
    /// Oldest first, with the tick at which the key is forgotten.
    order: VecDeque<(u64, Arc<str>)>,
}

impl Window {
    /// The receipt of the message first published under `key`, marked duplicate.
    pub(super) fn seen(&mut self, key: &str, now: u64) -> Option<Receipt> {
        while self.order.front().is_some_and(|(expiry, _)| *expiry <= now) {
            self.forget_oldest();
        }
        let mut receipt = self.receipts.get(key)?.clone();
        receipt.duplicate = true;
        Some(receipt)
    }

    /// Remembers `key` until tick `until`.
    pub(super) fn remember(&mut self, key: Arc<str>, until: u64, receipt: Receipt) {
        if self.order.len() >= MAX_KEYS {
            self.forget_oldest();
        }
        self.order.push_back((until, Arc::clone(&key)));
        self.receipts.insert(key, receipt);
    }

    /// Whether every key is forgotten by now.
    pub(super) fn is_empty_at(&self, now: u64) -> bool {
        self.order.back().is_none_or(|(expiry, _)| *expiry <= now)
    }

    fn forget_oldest(&mut self) {
        if let Some((_, oldest)) = self.order.pop_front() {
            self.receipts.remove(&oldest);
        }
    }
}
