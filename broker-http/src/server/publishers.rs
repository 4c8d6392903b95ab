//! The topics in use, a bounded number of them: each with its publishing handle, resolved once, and
//! the account of what its messages hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use broker_core::{Broker, Message, Publisher, PublisherOptions, Result, Timestamp, Topic};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::access::Caller;
use super::charge::{Account, Full};
use super::memory::{Ledger, Vain};
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::topics::{Bounds, Topics};

/// How long a publisher waits at most while topics are looked for that need not be known.
const FORGETTING: Duration = Duration::from_millis(10);

/// The handles, and with them the topics known: those lately published to.
#[derive(Debug)]
pub(crate) struct Publishers {
    broker: Arc<dyn Broker>,
    max: AtomicUsize,
    ledger: Ledger,
    topics: RwLock<Topics>,
    kept: RwLock<FxHashMap<Box<str>, Arc<Published>>>,
    vain: Vain,
}

/// One topic published to.
#[derive(Debug)]
pub(crate) struct Published {
    plain: Publisher,
    /// Refuses what nobody gets; the few that want it make it.
    routed: std::sync::OnceLock<Publisher>,
    count: AtomicU64,
    last: AtomicI64,
    account: Arc<Account>,
    bounds: Mutex<Bounds>,
    /// Whose share it is of.
    _first: Option<First>,
}

/// A topic in use counts among those that an identity published to first.
#[derive(Debug)]
struct First(Arc<AtomicUsize>);

impl First {
    fn of(caller: &Caller) -> Self {
        caller.topics().fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(caller.topics()))
    }
}

impl Drop for First {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What is said about a topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(crate) struct TopicSummary {
    name: String,
    published: u64,
    last_published: Timestamp,
    held_bytes: u64,
}

impl TopicSummary {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Publishers {
    pub(crate) fn new(broker: Arc<dyn Broker>, max: usize, ledger: Ledger, topics: Topics) -> Self {
        Self {
            broker,
            max: AtomicUsize::new(max),
            ledger,
            topics: RwLock::new(topics),
            kept: RwLock::default(),
            vain: Vain::default(),
        }
    }

    /// The handle for `topic`, asked for by `caller`.
    ///
    /// # Errors
    ///
    /// That it is no topic, or none to publish to; 429 if as many as may be hold messages, or as many of the caller's as
    /// are free for others.
    pub(crate) fn of(&self, topic: &str, caller: Option<&Caller>) -> Answer<Arc<Published>> {
        if let Some(published) = self.kept.read().get(topic) {
            return Ok(Arc::clone(published));
        }
        let name = Topic::new(topic)?;
        let bounds = self.topics.read().bounds(&name)?;
        let published = Arc::new(Published {
            plain: self.broker.publisher(&name, PublisherOptions::new())?,
            routed: std::sync::OnceLock::new(),
            count: AtomicU64::new(0),
            last: AtomicI64::new(Timestamp::now().as_millis()),
            account: Account::new(&self.ledger, &name),
            bounds: Mutex::new(bounds),
            _first: caller.map(First::of),
        });
        // Those before this one. One always is for who has none.
        let own = || caller.map_or(0, |caller| caller.topics().load(Ordering::Acquire).saturating_sub(1));
        let over = |known: usize| own() > 0 && own() >= self.max().saturating_sub(known);
        let full = |kept: &FxHashMap<Box<str>, Arc<Published>>| {
            (kept.len() >= self.max() || over(kept.len())) && !kept.contains_key(topic)
        };
        let mut kept = self.kept.write();
        if full(&kept) {
            forget_oldest(&mut kept);
        }
        if full(&kept) {
            drop(kept);
            self.forget_history();
            kept = self.kept.write();
            if full(&kept) {
                forget_oldest(&mut kept);
            }
            if full(&kept) {
                let max = self.max();
                let why = match caller.filter(|_| kept.len() < max) {
                    None => format!("there are {max} topics with messages, which is the most"),
                    Some(caller) => format!(
                        "{} has {} of the {max} topics, and no more than that are left, which are for others",
                        caller.name(),
                        own()
                    ),
                };
                return Err(Problem::too_many(format!("{why}; have messages taken out first")).counted(Refusal::Topics));
            }
        }
        Ok(Arc::clone(kept.entry(topic.into()).or_insert(published)))
    }

    /// Has topics published to the longest ago let go of what they only retain, until a sixteenth of all may be forgotten.
    fn forget_history(&self) {
        if self.ledger.is_vain(&self.vain) {
            return;
        }
        let end = Instant::now() + FORGETTING;
        let mut topics: Vec<_> = self.kept.read().values().map(Arc::clone).collect();
        topics.sort_by_cached_key(|topic| topic.last.load(Ordering::Relaxed));
        let wanted = topics.len() / 16 + 1;
        let forgotten = topics.iter().take_while(|_| Instant::now() < end).filter(|topic| topic.account.forget());
        if forgotten.take(wanted).count() == 0 {
            self.ledger.set_vain(&self.vain);
        }
    }

    /// From now on so many topics.
    pub(crate) fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed).max(1)
    }

    /// From now on these rules.
    pub(crate) fn set_topics(&self, topics: Topics) {
        let mut kept = self.kept.write();
        kept.retain(|_, published| match topics.bounds(published.topic()) {
            Ok(bounds) => {
                *published.bounds.lock() = bounds;
                true
            }
            Err(_) => false,
        });
        *self.topics.write() = topics;
    }

    /// Topics in use.
    pub(crate) fn len(&self) -> usize {
        self.kept.read().len()
    }

    /// Topics after `after` in order of name, `limit` at most, and whether there are more.
    pub(crate) fn list(&self, after: Option<&str>, limit: usize) -> (Vec<TopicSummary>, bool) {
        let kept = self.kept.read();
        let mut topics: Vec<_> = kept
            .iter()
            .filter(|(name, topic)| after.is_none_or(|after| &***name > after) && topic.count() > 0)
            .map(|(name, topic)| TopicSummary {
                name: name.to_string(),
                published: topic.count(),
                last_published: Timestamp::from_millis(topic.last.load(Ordering::Relaxed)),
                held_bytes: topic.account.held(),
            })
            .collect();
        drop(kept);
        topics.sort_unstable();
        let more = topics.len() > limit;
        topics.truncate(limit);
        (topics, more)
    }
}

/// Drops of the topics that hold nothing the quarter published to the longest ago, so that the
/// search is paid seldom.
fn forget_oldest(kept: &mut FxHashMap<Box<str>, Arc<Published>>) {
    let idle = |topic: &Published| topic.account.held() == 0;
    let mut times: Vec<_> =
        kept.values().filter(|topic| idle(topic)).map(|topic| topic.last.load(Ordering::Relaxed)).collect();
    if times.is_empty() {
        return;
    }
    let quarter = times.len() / 4;
    let (_, oldest, _) = times.select_nth_unstable(quarter);
    let oldest = *oldest;
    let mut left = quarter + 1;
    kept.retain(|_, topic| {
        let goes = left > 0 && idle(topic) && topic.last.load(Ordering::Relaxed) <= oldest;
        left -= usize::from(goes);
        !goes
    });
}

impl Published {
    /// The handle, with or without the demand that somebody gets the message.
    pub(crate) fn publisher(&self, broker: &dyn Broker, require_route: bool) -> Result<&Publisher> {
        if !require_route {
            return Ok(&self.plain);
        }
        if let Some(routed) = self.routed.get() {
            return Ok(routed);
        }
        let options = PublisherOptions::new().with_require_route(true);
        let routed = broker.publisher(self.plain.topic(), options)?;
        Ok(self.routed.get_or_init(|| routed))
    }

    /// Refuses publishers where the topic, or all of them together, are at their bound.
    pub(crate) fn check_room(&self) -> Answer<()> {
        self.account.check(self.bounds().memory).map_err(|full| full.problem(self.topic()))
    }

    /// The bounds the topic has of its own.
    pub(crate) fn bounds(&self) -> Bounds {
        *self.bounds.lock()
    }

    /// Refuses a message that these bounds of the topic do not let pass, as it came.
    pub(crate) fn check(&self, bounds: &Bounds, message: &Message) -> Result<()> {
        bounds.check(self.topic(), message.size())
    }

    /// Charges a message to the topic, as it is kept: with the trace that it belongs to. The body that it came in is
    /// counted already, as `covered`.
    ///
    /// # Errors
    ///
    /// 429 or 503, where there is no room for it.
    pub(crate) fn charge(&self, message: &mut Message, covered: u64) -> Answer<()> {
        self.account.charge(message, self.bounds().memory, covered).map_err(|full| full.problem(self.topic()))
    }

    /// The same for several, of which those stay for which there is room, the first ones.
    pub(crate) fn charge_all(&self, messages: &mut Vec<Message>, covered: u64) -> std::result::Result<(), Full> {
        self.account.charge_all(messages, self.bounds().memory, covered)
    }

    pub(crate) fn topic(&self) -> &Topic {
        self.plain.topic()
    }

    /// Counts messages the broker has taken.
    pub(crate) fn published(&self, messages: u64) {
        self.count.fetch_add(messages, Ordering::Relaxed);
        self.last.store(Timestamp::now().as_millis(), Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
