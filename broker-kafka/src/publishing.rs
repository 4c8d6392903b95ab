//! Publishing: one idempotent producer for a broker, a queue for each topic.
//!
//! A publish goes straight to librdkafka, which copies it once, and its future is completed from the
//! delivery callback. It waits in its topic's queue, in the order of the calls, only while the topic
//! is looked up for the first time, librdkafka's own queue is full, or the client is being replaced:
//! one that has met a fatal error (a gap in the idempotent producer's numbers, say) takes nothing more for good.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use broker_core::{Error, ErrorKind, Message, Operation, Publish, Result, Topic};
use parking_lot::{Mutex, MutexGuard, RwLock};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _, PurgeConfig};
use rustc_hash::FxHashMap;

use crate::admin::Admin;
use crate::callbacks::Callbacks;
use crate::client::{self, Role, millis, rest};
use crate::record::Travel;
use crate::tickets::Tickets;
use crate::topic_queue::{Lookup, Queued, Refused, TopicQueue, Waiting};
use crate::transaction::{Outgoing, Transactions};
use crate::wire::Written;
use crate::{KafkaConfig, error, record};

/// How long the polling thread stays with librdkafka before it looks whether anybody waits for room. rdkafka asks
/// the clock over and over in the last millisecond of each, so that short ones take a processor for themselves.
const TURN: Duration = Duration::from_millis(20);
/// While publishes wait for room.
const CROWDED_TURN: Duration = Duration::from_millis(2);
/// While nothing is in flight.
const IDLE_TURN: Duration = Duration::from_millis(100);
/// So many turns after the last that waited, none is expected to.
const CROWDED: u32 = 50;
/// The least time between two replacements of the client, and the longest that one waits for what the old one had
/// in flight.
const REPLACING: Duration = Duration::from_secs(1);

/// The raw client of librdkafka that publishes.
pub type RawProducer = BaseProducer<Callbacks>;

/// What a broker's publishers share.
pub(crate) struct Publishing {
    /// For the callbacks, which must not keep it alive.
    this: Weak<Self>,
    pub(crate) config: Arc<KafkaConfig>,
    admin: Arc<Admin>,
    tickets: Arc<Tickets>,
    /// There once it is needed: making a broker does no I/O. Replaced where it meets a fatal error.
    client: ArcSwapOption<RawProducer>,
    /// Held while the first client is made.
    making: Mutex<()>,
    /// Where publishes go that are in transactions.
    transactions: OnceLock<Result<Transactions>>,
    topics: RwLock<FxHashMap<Topic, Arc<TopicQueue>>>,
    /// Messages in the topics' queues.
    queued: AtomicUsize,
    closed: AtomicBool,
    /// Not even the broker's own publishes are taken.
    ended: AtomicBool,
}

impl Publishing {
    pub(crate) fn new(config: Arc<KafkaConfig>, admin: Arc<Admin>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            config,
            admin,
            tickets: Arc::default(),
            client: ArcSwapOption::empty(),
            making: Mutex::default(),
            transactions: OnceLock::new(),
            topics: RwLock::default(),
            queued: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    /// The queue of `topic`. No I/O.
    pub(crate) fn topic(&self, topic: &Topic) -> Arc<TopicQueue> {
        if let Some(queue) = self.topics.read().get(topic) {
            return Arc::clone(queue);
        }
        let mut topics = self.topics.write();
        let queue = topics.entry(topic.clone()).or_insert_with(|| {
            Arc::new(TopicQueue { topic: topic.clone(), direct: AtomicBool::new(false), waiting: Mutex::default() })
        });
        Arc::clone(queue)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Publishes.
    pub(crate) fn publish(&self, topic: &TopicQueue, message: Message) -> Publish {
        if self.is_closed() {
            return Operation::from(closed());
        }
        if self.config.transactional_id.is_some() {
            return self
                .publish_together(vec![(topic.topic.clone(), message)], false)
                .pop()
                .unwrap_or_else(|| closed().into());
        }
        self.begin(topic, message, None)
    }

    /// Publishes for one group alone.
    pub(crate) fn publish_for(&self, topic: &TopicQueue, message: Message, group: &str) -> Publish {
        if self.is_closed() {
            return Operation::from(closed());
        }
        self.begin(topic, message, Some(Travel { for_group: Some(group.to_owned()), retried: None }))
    }

    /// Publishes what the broker itself has to say, while it closes, too: dead letters, retries.
    pub(crate) fn publish_late(&self, topic: &TopicQueue, message: Message, travel: Travel) -> Publish {
        if self.ended.load(Ordering::Acquire) {
            return Operation::from(closed());
        }
        self.begin(topic, message, Some(travel))
    }

    /// Publishes in a transaction: all of them in one of their own if `alone`, else with others that wait.
    pub(crate) fn publish_together(&self, messages: Vec<(Topic, Message)>, alone: bool) -> Vec<Publish> {
        let transactions = match self.transactions() {
            Ok(transactions) => transactions,
            Err(error) => return messages.iter().map(|_| Operation::from(error.clone())).collect(),
        };
        let (mut outgoing, mut publishes) = (Vec::with_capacity(messages.len()), Vec::with_capacity(messages.len()));
        for (topic, message) in messages {
            let (ticket, publish) = self.tickets.issue(message.id().clone());
            self.tickets.queued(ticket);
            outgoing.push(Outgoing { ticket, topic, message });
            publishes.push(publish);
        }
        transactions.publish(outgoing, alone);
        publishes
    }

    /// The thread that publishes in transactions, started when it is first needed.
    pub(crate) fn transactions(&self) -> Result<&Transactions> {
        let start = || Transactions::start(&self.config, &self.admin, &self.tickets);
        self.transactions.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    /// `travel` is what it takes along, if it is one of ours and written natively.
    fn begin(&self, topic: &TopicQueue, message: Message, travel: Option<Travel>) -> Publish {
        let direct = topic.direct.load(Ordering::Acquire);
        if !direct && let Err(error) = self.start() {
            return Operation::from(error);
        }
        let (ticket, publish) = self.tickets.issue(message.id().clone());
        if direct {
            match self.send(&topic.topic, &message, travel.as_ref(), ticket) {
                Ok(()) => return publish,
                Err(Refused::Later | Refused::Missing(_)) => {}
                Err(Refused::Failed(error)) => {
                    self.tickets.complete(ticket, Err(error));
                    return publish;
                }
            }
        }
        self.tickets.queued(ticket);
        self.enqueue(topic, Queued { ticket, message, travel });
        publish
    }

    fn enqueue(&self, topic: &TopicQueue, queued: Queued) {
        let mut waiting = topic.waiting.lock();
        topic.direct.store(false, Ordering::Release);
        waiting.messages.push_back(queued);
        self.queued.fetch_add(1, Ordering::AcqRel);
        if matches!(waiting.state, Lookup::Done) {
            self.drain(topic, &mut waiting);
        }
        self.look_up_if_needed(topic, waiting);
    }

    fn look_up_if_needed(&self, topic: &TopicQueue, mut waiting: MutexGuard<'_, Waiting>) {
        if matches!(waiting.state, Lookup::Needed) && !waiting.messages.is_empty() {
            waiting.state = Lookup::Running;
            drop(waiting);
            self.look_up(topic.topic.clone());
        }
    }

    /// Finds or creates the topic on a thread of its own: it may wait for the server, and neither a
    /// caller nor the delivery callbacks should.
    fn look_up(&self, topic: Topic) {
        let this = Weak::clone(&self.this);
        let name = topic.clone();
        let looking = move || {
            let Some(publishing) = this.upgrade() else { return };
            let found = publishing.admin.ensure_topic(&topic);
            if found.is_ok()
                && let Some(client) = publishing.client.load_full()
            {
                acquaint(&client, &topic, publishing.config.connect_timeout);
            }
            publishing.looked_up(&topic, found);
        };
        let spawned = thread::Builder::new().name("broker-kafka-topic".to_owned()).spawn(looking);
        if let Err(error) = spawned {
            self.looked_up(&name, Err(Error::backend("start a thread").with_source(error)));
        }
    }

    fn looked_up(&self, topic: &Topic, found: Result<()>) {
        let queue = self.topic(topic);
        let mut waiting = queue.waiting.lock();
        match found {
            Ok(()) => {
                waiting.state = Lookup::Done;
                self.drain(&queue, &mut waiting);
                self.look_up_if_needed(&queue, waiting);
            }
            Err(error) => {
                // The next publish tries again.
                waiting.state = Lookup::Needed;
                let failed = std::mem::take(&mut waiting.messages);
                self.queued.fetch_sub(failed.len(), Ordering::AcqRel);
                drop(waiting);
                let error = error.context(format_args!("publish to {topic}"));
                failed.into_iter().for_each(|queued| self.tickets.complete(queued.ticket, Err(error.clone())));
            }
        }
    }

    /// The topic was deleted: what waits looks it up again, or else the next publish.
    pub(crate) fn not_there(&self, topic: &str) {
        if let Some(queue) = Topic::new(topic).ok().and_then(|topic| self.topics.read().get(&topic).cloned()) {
            let mut waiting = queue.waiting.lock();
            if matches!(waiting.state, Lookup::Done) {
                waiting.state = Lookup::Needed;
                queue.direct.store(false, Ordering::Release);
            }
            self.look_up_if_needed(&queue, waiting);
        }
    }

    /// Gives librdkafka what waits, in order, as far as there is room. Where it has heard that the topic was deleted,
    /// looking it up is needed again: what is still refused then is told so.
    fn drain(&self, topic: &TopicQueue, waiting: &mut Waiting) {
        while let Some(queued) = waiting.messages.pop_front() {
            if self.tickets.take(queued.ticket) {
                let travel = queued.travel.as_ref();
                match self.send(&topic.topic, &queued.message, travel, queued.ticket) {
                    Ok(()) => waiting.sought = false,
                    Err(Refused::Missing(_)) if !waiting.sought => {
                        (waiting.sought, waiting.state) = (true, Lookup::Needed);
                        return self.put_back(waiting, queued);
                    }
                    Err(Refused::Later) => return self.put_back(waiting, queued),
                    Err(Refused::Missing(error) | Refused::Failed(error)) => {
                        self.tickets.complete(queued.ticket, Err(error));
                    }
                }
            }
            self.queued.fetch_sub(1, Ordering::AcqRel);
        }
        // Whatever became of those it was looked up for, the next that finds it missing looks again.
        waiting.sought = false;
        topic.direct.store(true, Ordering::Release);
    }

    fn put_back(&self, waiting: &mut Waiting, queued: Queued) {
        self.tickets.queued(queued.ticket);
        waiting.messages.push_front(queued);
    }

    fn send(
        &self,
        topic: &Topic,
        message: &Message,
        travel: Option<&Travel>,
        ticket: usize,
    ) -> std::result::Result<(), Refused> {
        let client = self.client.load();
        let Some(client) = client.as_ref() else { return Err(Refused::Later) };
        let encoded = record::encode::<Written>(topic, message, travel, self.config.format).map_err(Refused::Failed)?;
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic.as_str(), ticket);
        record.payload = encoded.payload.as_deref();
        record.key = encoded.key;
        record.timestamp = encoded.timestamp;
        record.headers = encoded.headers.map(OwnedHeaders::from);
        match client.send(record) {
            Ok(()) => Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull | RDKafkaErrorCode::Fatal), _)) => {
                Err(Refused::Later)
            }
            Err((error, _)) => {
                let failed = error::failed(format_args!("publish to {topic}"), &error);
                Err(if failed.kind() == ErrorKind::NotFound {
                    Refused::Missing(failed)
                } else {
                    Refused::Failed(failed)
                })
            }
        }
    }

    /// Room was made in librdkafka's queue, or there is another client.
    fn drain_all(&self) {
        let full: Vec<Arc<TopicQueue>> = self.topics.read().values().cloned().collect();
        for topic in full {
            let mut waiting = topic.waiting.lock();
            if matches!(waiting.state, Lookup::Done) && !waiting.messages.is_empty() {
                self.drain(&topic, &mut waiting);
                self.look_up_if_needed(&topic, waiting);
            }
        }
    }

    /// The client of now.
    pub(crate) fn client(&self) -> Result<Arc<RawProducer>> {
        self.start()?;
        self.client.load_full().ok_or_else(closed)
    }

    /// Makes the first client, if there is none yet.
    fn start(&self) -> Result<()> {
        if self.client.load().is_none() {
            let _making = self.making.lock();
            if self.client.load().is_none() {
                self.client.store(Some(self.make()?));
            }
        }
        Ok(())
    }

    fn make(&self) -> Result<Arc<RawProducer>> {
        let config = &self.config;
        let mut settings = client::settings(
            config,
            &[
                ("enable.idempotence", "true"),
                ("acks", "all"),
                // A publish on its own waits for no company; under load batches form while requests
                // are on their way.
                ("linger.ms", "0"),
                ("compression.type", config.compression.as_str()),
                ("message.timeout.ms", &millis(config.publish_timeout)),
                ("topic.metadata.propagation.max.ms", client::PROPAGATION_MILLIS),
                // Where Java's own client puts a key.
                ("partitioner", "murmur2_random"),
                ("queue.buffering.max.kbytes", "262144"),
            ],
        );
        client::hand_on(&mut settings, config, Role::Producer);
        let callbacks = Callbacks {
            publishing: Weak::clone(&self.this),
            tickets: Arc::clone(&self.tickets),
            health: Arc::clone(self.admin.health()),
            client: OnceLock::new(),
        };
        let client = BaseProducer::from_config_and_context(&settings, callbacks);
        let client = Arc::new(client.map_err(|error| client::not_made(&error))?);
        let _ = client.context().client.set(Arc::downgrade(&client));
        let (this, polled) = (Weak::clone(&self.this), Arc::clone(&client));
        let spawned =
            thread::Builder::new().name("broker-kafka-publish".to_owned()).spawn(move || poll(&this, &polled));
        spawned.map_err(|error| Error::backend("start a thread").with_source(error))?;
        Ok(client)
    }

    /// Another client takes the place of one that is done for, and what waits goes to it.
    fn replace(&self) -> Result<()> {
        self.client.store(Some(self.make()?));
        self.drain_all();
        Ok(())
    }

    /// Takes no more; waits until `deadline` for what was taken, and gives up the rest. Tells how many
    /// publishes that were.
    pub(crate) fn close(&self, deadline: Instant) -> usize {
        self.stop_intake();
        self.ended.store(true, Ordering::Release);
        while self.tickets.pending() > 0 && Instant::now() < deadline {
            rest(Duration::from_millis(2));
        }
        let left = self.tickets.pending();
        for topic in self.topics.read().values() {
            let queued = std::mem::take(&mut topic.waiting.lock().messages);
            queued.into_iter().for_each(|queued| self.tickets.complete(queued.ticket, Err(closed())));
        }
        if left > 0
            && let Some(client) = self.client.load_full()
        {
            // The callbacks of what is purged complete the futures.
            client.purge(PurgeConfig::default().queue().inflight());
        }
        if left > 0 && self.config.transactional_id.is_some() {
            self.tickets.give_up(&closed());
        }
        left
    }

    /// Takes no more.
    pub(crate) fn stop_intake(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// Has librdkafka hear that `topic` is there. One that it heard was deleted it refuses until then; and of several
/// servers the one that it asks may hear of a new topic a little later.
fn acquaint(client: &RawProducer, topic: &Topic, patience: Duration) {
    let deadline = Instant::now() + patience;
    let hears = |metadata: &Metadata| {
        let mut topics = metadata.topics().iter();
        topics.any(|one| one.name() == topic.as_str() && one.error().is_none() && !one.partitions().is_empty())
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let heard = client.client().fetch_metadata(Some(topic.as_str()), left).is_ok_and(|metadata| hears(&metadata));
        if heard || Instant::now() >= deadline {
            return;
        }
        rest(Duration::from_millis(20));
    }
}

/// Polls `client` as long as there are publishers, or until it is replaced.
fn poll(this: &Weak<Publishing>, client: &Arc<RawProducer>) {
    let made = Instant::now();
    let mut since_waiting = u32::MAX;
    let mut fatal = None;
    while this.strong_count() > 0 && fatal.is_none() {
        // Librdkafka has room again only when it has taken back what it reported, after the
        // callbacks: so those who wait have their turn here.
        let turn = match client.in_flight_count() {
            0 => IDLE_TURN,
            _ if since_waiting < CROWDED => CROWDED_TURN,
            _ => TURN,
        };
        client.poll(turn);
        since_waiting = since_waiting.saturating_add(1);
        fatal = client.context().fatal();
        if let Some(publishing) = this.upgrade()
            && publishing.queued.load(Ordering::Acquire) > 0
        {
            since_waiting = 0;
            publishing.drain_all();
        }
    }
    let Some(fatal) = fatal else { return };
    // What it had in flight is answered, or given up, before anything goes by another way: it must not be written after
    // what was published later.
    let noticed = Instant::now();
    let answers = |client: &RawProducer| client.in_flight_count() > 0 && noticed.elapsed() < REPLACING;
    while this.strong_count() > 0 && (answers(client) || made.elapsed() < REPLACING) {
        client.poll(CROWDED_TURN);
    }
    client.purge(PurgeConfig::default().queue().inflight());
    client.poll(CROWDED_TURN);
    while let Some(publishing) = this.upgrade() {
        match publishing.replace() {
            Ok(()) => {
                tracing::warn!(%fatal, "the client that publishes was replaced");
                break;
            }
            Err(error) => {
                publishing.admin.health().failed(error);
                drop(publishing);
                client.poll(REPLACING);
            }
        }
    }
    // The last to let go of it ends it, which may block: that is to be this thread, not one that publishes.
    while this.strong_count() > 0 && Arc::strong_count(client) > 1 {
        client.poll(IDLE_TURN);
    }
    // What was given to it just as it ended.
    client.purge(PurgeConfig::default().queue().inflight());
    client.poll(CROWDED_TURN);
}

impl fmt::Debug for Publishing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publishing").field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

pub(crate) fn closed() -> Error {
    Error::closed("the broker is closed")
}
