//! The in-process broker.
//!
//! A message is appended once to the log of each filter that matches its topic (`log`), whatever
//! the number of groups; each group reads with a cursor (`group`), hands out runs of entries
//! (`batch`), and keeps beside the log only what was retried, delayed or ordered behind its key
//! (`wheel`, `lanes`). What has expired is taken out of both where somebody asks for its room, or for
//! numbers (`log::expiry`, `group::expiry`). A topic knows the logs it is appended to and the
//! publishes that wait for room (`topics`).
//!
//! Locks are taken in this order and no other: registry, topic, group, log. What topics retain yields where
//! somebody needs its memory (`forget`).

mod batch;
mod broker;
mod clock;
mod dedup;
mod entry;
mod forget;
mod group;
mod history;
mod keep;
mod lanes;
mod log;
mod member;
mod options;
mod queue;
mod registry;
mod run;
mod tally;
mod topics;
mod trie;
mod wheel;

/// The atomics of `tally`; its model replaces them by shuttle's.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

pub use self::broker::MemoryBroker;
pub(crate) use self::broker::open;
pub use self::history::Retention;
pub use self::options::MemoryOptions;

use self::clock::Clock;
use self::dedup::AllKeys;
use self::entry::Place;
use self::keep::Keeps;
use self::log::Log;
use self::registry::Registry;
use self::trie::Trie;
use crate::{DeadLetter, DrainReport, Group as GroupId, Message, Timestamp, Topic};

/// What every handle, publisher and subscription of one broker shares.
struct Shared {
    name: String,
    options: MemoryOptions,
    clock: Clock,
    life: AtomicU8,
    /// The logs of patterns, and a number that changes with them: a topic looks here only then.
    patterns: RwLock<Trie<Arc<Log>>>,
    patterns_version: AtomicU64,
    registry: Mutex<Registry>,
    keeps: Keeps,
    /// Keys that all topics remember.
    keys: Arc<AllKeys>,
    /// How much topics retain now; whether they do at all, the options say.
    retention: RwLock<Option<Retention>>,
    /// Bytes that all topics retain.
    retained: Arc<AtomicU64>,
    /// Messages that topics retained so far.
    sequence: AtomicU64,
    /// Something a drain may wait for has happened.
    progress: Notify,
    report: OnceLock<DrainReport>,
}

const OPEN: u8 = 0;
const CLOSING: u8 = 1;
const CLOSED: u8 = 2;

impl Shared {
    fn new(name: String, options: MemoryOptions) -> Arc<Self> {
        Arc::new(Self {
            name,
            clock: Clock::new(),
            life: AtomicU8::new(OPEN),
            patterns: RwLock::default(),
            patterns_version: AtomicU64::new(0),
            registry: Mutex::default(),
            keeps: Keeps::new(options.max_dead_letters, options.max_dead_letter_bytes),
            keys: AllKeys::new(),
            retention: RwLock::new(options.retention.clone()),
            retained: Arc::default(),
            sequence: AtomicU64::new(0),
            progress: Notify::new(),
            report: OnceLock::new(),
            options,
        })
    }

    /// The place of a message that is retained: taken with its logs locked, so that each log has its
    /// messages in the order of their places.
    fn place(&self, message: &Message) -> Place {
        let wait = message.deliver_at().map(|time| time.since(Timestamp::now()));
        let tick = match wait.filter(|wait| !wait.is_zero()) {
            Some(wait) => self.clock.tick_after(wait),
            None => self.clock.tick(),
        };
        Place { tick, sequence: self.sequence.fetch_add(1, Ordering::Relaxed) }
    }

    fn life(&self) -> u8 {
        self.life.load(Ordering::Acquire)
    }

    fn is_open(&self) -> bool {
        self.life() == OPEN
    }

    fn is_closing(&self) -> bool {
        self.life() == CLOSING
    }

    fn is_closed(&self) -> bool {
        self.life() == CLOSED
    }

    /// Keeps a dead letter and publishes it to the group's dead-letter topic.
    fn bury(self: &Arc<Self>, letter: DeadLetter, topic: Option<&Topic>) {
        let (id, reason) = (letter.message.id().clone(), letter.failure.reason());
        let Some(topic) = topic else {
            tracing::warn!(topic = %letter.topic, %id, reason, "a message was given up and discarded: its subscription has no dead-letter topic");
            return;
        };
        tracing::info!(topic = %letter.topic, %id, reason, dead_letter = %topic, "a message was given up");
        let dead_before = DeadLetter::is_dead(&letter.message);
        // A group that reads its own dead-letter topic may fail at what is kept for it already.
        let is_kept = |group: &&GroupId| {
            letter.topic == *topic && DeadLetter::is_of(&letter.message, group) && self.keeps.holds(group, &id)
        };
        if let Some(group) = letter.group.as_ref().filter(|group| !is_kept(group)) {
            self.keeps.push(group, letter.clone().undated());
            // It may have been deleted meanwhile.
            if self.find_group(group).is_err() {
                self.bound_letters(group);
            }
        }
        if !dead_before {
            self.topic(topic).append_unheard(self, letter.into_message());
        }
    }
}
