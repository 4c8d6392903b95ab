//! Deliveries lent to pullers: one table with one timer structure, so that a lease costs an entry
//! and not a task. What is not settled in time goes back as a retry.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use broker_core::{Delivery, Error, Failure, Settle, Settlement, Timestamp};
use futures_util::FutureExt;
use parking_lot::Mutex;
use rustc_hash::FxBuildHasher;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::event::json;

/// Names a lease: 128 random bits, so that nobody settles what was not lent to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LeaseId(u128);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 22];
        let written = URL_SAFE_NO_PAD.encode_slice(self.0.to_be_bytes(), &mut text).unwrap_or(0);
        f.write_str(text.get(..written).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default())
    }
}

impl FromStr for LeaseId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut bytes = [0; 18];
        match URL_SAFE_NO_PAD.decode_slice(text, &mut bytes) {
            Ok(16) => bytes.first_chunk().map(|bytes| Self(u128::from_be_bytes(*bytes))).ok_or(()),
            _ => Err(()),
        }
        .map_err(|()| Error::invalid("it is none of ours"))
    }
}

/// What a subscription has lent to all who take from it, and when one of them last acked.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    lent: AtomicUsize,
    last_success: Mutex<Option<Timestamp>>,
}

impl Tally {
    /// Deliveries lent and not settled.
    pub(crate) fn lent(&self) -> usize {
        self.lent.load(Ordering::Acquire)
    }

    pub(crate) fn last_success(&self) -> Option<Timestamp> {
        *self.last_success.lock()
    }

    pub(crate) fn lend(&self, count: usize) {
        self.lent.fetch_add(count, Ordering::AcqRel);
    }

    pub(crate) fn settle(&self, count: usize) {
        self.lent.fetch_sub(count, Ordering::AcqRel);
    }

    pub(crate) fn succeed(&self) {
        *self.last_success.lock() = Some(Timestamp::now());
    }
}

/// Who may settle a set of leases: one life of one pull subscription, or one socket.
#[derive(Debug, Default)]
pub(crate) struct Holder {
    tally: Arc<Tally>,
    leased: AtomicUsize,
    /// When the last of them ended.
    emptied: Mutex<Option<Instant>>,
    /// Told when a lease ends, for a pull that waits for room.
    pub(crate) room: Notify,
}

impl Holder {
    /// One whose work is counted with that of others.
    pub(crate) fn counted_by(tally: Arc<Tally>) -> Self {
        Self { tally, ..Self::default() }
    }

    pub(crate) fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Leases held, and places kept for leases about to be made.
    pub(crate) fn leased(&self) -> usize {
        self.leased.load(Ordering::Acquire)
    }

    /// When it last had leases, or places for some, if it ever had.
    pub(crate) fn emptied(&self) -> Option<Instant> {
        *self.emptied.lock()
    }

    fn release(&self, places: usize) {
        if places > 0 {
            // Before they are fewer: whether these are the last is not known while others are released.
            *self.emptied.lock() = Some(Instant::now());
            self.leased.fetch_sub(places, Ordering::AcqRel);
            self.room.notify_waiters();
        }
    }
}

/// Every lease of the server.
pub(crate) struct Leases {
    table: Mutex<Table>,
    /// Told when an earlier deadline than all others came in.
    sooner: Arc<Notify>,
    held: AtomicUsize,
    max: AtomicUsize,
    watched: AtomicBool,
}

#[derive(Default)]
struct Table {
    held: HashMap<LeaseId, Lease, FxBuildHasher>,
    due: BTreeSet<(Instant, LeaseId)>,
}

struct Lease {
    delivery: Delivery,
    holder: Arc<Holder>,
    borrower: Borrower,
    deadline: Instant,
}

/// The identity that leases are made for, where there are identities, and what it has of all; a clone is the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Borrower(Option<Arc<AtomicUsize>>);

impl Borrower {
    /// Counts what is its own.
    pub(crate) fn counted_by(lent: &Arc<AtomicUsize>) -> Self {
        Self(Some(Arc::clone(lent)))
    }

    /// Leases, and places kept for leases about to be made.
    pub(crate) fn lent(&self) -> usize {
        self.0.as_ref().map_or(0, |lent| lent.load(Ordering::Acquire))
    }

    fn add(&self, count: usize) {
        if let Some(lent) = &self.0 {
            lent.fetch_add(count, Ordering::AcqRel);
        }
    }

    fn sub(&self, count: usize) {
        if let Some(lent) = &self.0 {
            lent.fetch_sub(count, Ordering::AcqRel);
        }
    }
}

/// Places for leases, kept free while deliveries are awaited; given back when dropped.
pub(crate) struct Places {
    leases: Arc<Leases>,
    holder: Arc<Holder>,
    borrower: Borrower,
    count: usize,
}

impl Leases {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::default(),
            sooner: Arc::default(),
            held: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            watched: AtomicBool::new(false),
        })
    }

    /// From now on so many; those that stand go on.
    pub(crate) fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Deliveries lent in all.
    pub(crate) fn lent(&self) -> usize {
        self.table.lock().held.len()
    }

    /// How many there may be.
    pub(crate) fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// How many more there may be.
    pub(crate) fn free(&self) -> usize {
        self.max().saturating_sub(self.held.load(Ordering::Acquire))
    }

    /// How many more the borrower may have, with the places that are kept: as many as leave to others what it has then.
    /// One always is for who has none.
    pub(crate) fn left(&self, borrower: &Borrower) -> usize {
        let free = self.free();
        if borrower.0.is_some() { free.saturating_sub(borrower.lent()).div_ceil(2) } else { free }
    }

    /// Keeps up to `wanted` places free, of the table's and of the `allowed` ones of the holder.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        (holder, borrower): (&Arc<Holder>, &Borrower),
        wanted: usize,
        allowed: usize,
    ) -> Places {
        let own = take(&holder.leased, wanted.min(self.left(borrower)), allowed);
        let count = take(&self.held, own, self.max());
        holder.release(own - count);
        borrower.add(count);
        Places { leases: Arc::clone(self), holder: Arc::clone(holder), borrower: borrower.clone(), count }
    }

    /// Lends deliveries for `hold`; they must not be more than the places kept.
    pub(crate) fn grant(
        self: &Arc<Self>,
        mut places: Places,
        deliveries: Vec<Delivery>,
        hold: Duration,
    ) -> Result<Vec<LeaseId>, Error> {
        let ids = random_ids(deliveries.len())?;
        places.count = places.count.saturating_sub(deliveries.len());
        places.holder.tally.lend(deliveries.len());
        let deadline = Instant::now() + hold;
        let mut table = self.table.lock();
        let earliest = table.due.first().copied();
        for (id, delivery) in ids.iter().zip(deliveries) {
            let (holder, borrower) = (Arc::clone(&places.holder), places.borrower.clone());
            table.held.insert(*id, Lease { delivery, holder, borrower, deadline });
            table.due.insert((deadline, *id));
        }
        let sooner = table.due.first().copied() != earliest;
        drop(table);
        self.watch();
        if sooner {
            self.sooner.notify_one();
        }
        Ok(ids)
    }

    /// Ends a lease and gives its delivery back to be settled, if it still holds.
    pub(crate) fn take(&self, holder: &Arc<Holder>, id: LeaseId) -> Option<Delivery> {
        let mut table = self.table.lock();
        if !Arc::ptr_eq(&table.held.get(&id)?.holder, holder) {
            return None;
        }
        let lease = table.held.remove(&id)?;
        table.due.remove(&(lease.deadline, id));
        drop(table);
        Some(self.ended(lease))
    }

    /// Lets a lease hold for `hold` from now; false if it holds no longer.
    pub(crate) fn extend(&self, holder: &Arc<Holder>, id: LeaseId, hold: Duration) -> bool {
        let deadline = Instant::now() + hold;
        let mut table = self.table.lock();
        let Some(lease) = table.held.get_mut(&id).filter(|lease| Arc::ptr_eq(&lease.holder, holder)) else {
            return false;
        };
        let before = std::mem::replace(&mut lease.deadline, deadline);
        table.due.remove(&(before, id));
        table.due.insert((deadline, id));
        let sooner = table.due.first() == Some(&(deadline, id));
        drop(table);
        if sooner {
            self.sooner.notify_one();
        }
        true
    }

    /// Ends every lease of a holder that is gone; its messages are due again at once, and that was no
    /// attempt.
    pub(crate) fn release_all(&self, holder: &Arc<Holder>) {
        let mut table = self.table.lock();
        let ended: Vec<_> = table.held.extract_if(|_, lease| Arc::ptr_eq(&lease.holder, holder)).collect();
        for (id, lease) in &ended {
            table.due.remove(&(lease.deadline, *id));
        }
        drop(table);
        for (_, lease) in ended {
            detach(self.ended(lease).settle(Settlement::Release));
        }
    }

    fn ended(&self, lease: Lease) -> Delivery {
        self.held.fetch_sub(1, Ordering::AcqRel);
        lease.borrower.sub(1);
        lease.holder.tally.settle(1);
        lease.holder.release(1);
        lease.delivery
    }

    /// Gives back what is due; tells when the next is.
    fn expire(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut expired = Vec::new();
        let mut table = self.table.lock();
        let next = loop {
            match table.due.first().copied() {
                Some((deadline, id)) if deadline <= now => {
                    table.due.remove(&(deadline, id));
                    expired.extend(table.held.remove(&id));
                }
                next => break next.map(|(deadline, _)| deadline),
            }
        };
        drop(table);
        for lease in expired {
            let failure = Some(Failure::new("lease expired"));
            detach(self.ended(lease).settle(Settlement::Retry { after: None, failure }));
        }
        next
    }

    /// Starts the one task that watches the deadlines, with the first lease: it needs a runtime,
    /// and making a server does not.
    fn watch(self: &Arc<Self>) {
        if self.watched.swap(true, Ordering::AcqRel) {
            return;
        }
        let (leases, sooner) = (Arc::downgrade(self), Arc::clone(&self.sooner));
        tokio::spawn(async move {
            while let Some(next) = leases.upgrade().map(|leases| leases.expire()) {
                match next {
                    Some(deadline) => drop(tokio::time::timeout_at(deadline, sooner.notified()).await),
                    None => sooner.notified().await,
                }
            }
        });
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.sooner.notify_one();
    }
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leases").field("lent", &self.lent()).finish_non_exhaustive()
    }
}

impl Places {
    /// How many places there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// So many of them, by themselves.
    pub(crate) fn part(&mut self, count: usize) -> Self {
        let count = count.min(self.count);
        self.count -= count;
        let (leases, holder) = (Arc::clone(&self.leases), Arc::clone(&self.holder));
        Self { leases, holder, borrower: self.borrower.clone(), count }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.leases.held.fetch_sub(self.count, Ordering::AcqRel);
        self.borrower.sub(self.count);
        self.holder.release(self.count);
    }
}

/// Adds up to `wanted` to a count that is not to pass `max`; tells how many.
fn take(count: &AtomicUsize, wanted: usize, max: usize) -> usize {
    let mut have = count.load(Ordering::Acquire);
    loop {
        let taken = wanted.min(max.saturating_sub(have));
        match count.compare_exchange_weak(have, have + taken, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return taken,
            Err(now) => have = now,
        }
    }
}

/// One call to the system's generator for all of them.
fn random_ids(count: usize) -> Result<Vec<LeaseId>, Error> {
    let mut bytes = vec![0; count * 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::unavailable("the system gives no random numbers for leases").with_source(error))?;
    let (chunks, _) = bytes.as_chunks::<16>();
    Ok(chunks.iter().map(|chunk| LeaseId(u128::from_be_bytes(*chunk))).collect())
}

/// Deliveries taken and neither lent nor written yet; dropped, they are given back untried.
#[derive(Default)]
pub(crate) struct Hand(VecDeque<Delivery>);

impl Hand {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get(&self, index: usize) -> Option<&Delivery> {
        self.0.get(index)
    }

    pub(crate) fn extend(&mut self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.0.extend(deliveries);
    }

    /// The first.
    pub(crate) fn pop(&mut self) -> Option<Delivery> {
        self.0.pop_front()
    }

    /// The first, and as many as have so many bytes together in JSON, about.
    pub(crate) fn take_fitting(&mut self, bytes: usize) -> Vec<Delivery> {
        let mut sum = 0;
        let fits = |delivery: &&Delivery| {
            sum += json::about(delivery.message());
            sum <= bytes as u64
        };
        let count = self.0.iter().take_while(fits).count().max(1).min(self.0.len());
        self.0.drain(..count).collect()
    }
}

impl From<Vec<Delivery>> for Hand {
    fn from(deliveries: Vec<Delivery>) -> Self {
        Self(deliveries.into())
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|delivery| detach(delivery.settle(Settlement::Release)));
    }
}

/// Lets a settlement nobody waits for finish.
pub(crate) fn detach(settle: Settle) {
    let told = |result: Result<(), Error>| {
        if let Err(error) = result {
            tracing::warn!(%error, "a settlement was not taken; the message comes back");
        }
    };
    if settle.is_ready() {
        // In-process it is done already, and no task is needed.
        settle.now_or_never().into_iter().for_each(told);
    } else {
        tokio::spawn(async move { told(settle.await) });
    }
}
