//! The thread behind a subscription: reads, commits, and follows the group's rebalances.
//!
//! Each partition has a queue of its own (librdkafka's "split" queues), so that one that holds enough
//! is left unread while the group's events and the other partitions go on; nothing is paused, which
//! would throw away what was prefetched. A partition that is to go is let go when its deliveries in
//! flight are settled, or after the drain timeout; then its progress is committed. One that is lost
//! is dropped, and nothing said of it.

mod commits;
mod end;
mod records;
mod transfers;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use broker_core::{Error, ErrorKind, Publish, Result, Topic};
use crossbeam_channel::{Receiver, Sender};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};
use rustc_hash::FxHashMap;

use crate::admin::{Admin, Partition, list};
use crate::batch::{BATCH, Batches};
use crate::committer::Committer;
use crate::consumer::{Client, Source, assign, make, unassign};
use crate::group;
use crate::lot::Lot;
use crate::member::{Arrival, Member};
use crate::progress::Progress;
use crate::publishing::Publishing;
use crate::record::Copies;
use crate::retry_topics::RetryTopics;
use crate::state::{Place, Transfer};
use crate::stored::Stored;
use crate::{error, topic_pattern};

/// How long the thread waits at most where it has nothing to do: everything else rouses it.
const IDLE: Duration = Duration::from_millis(200);

/// Events of the group that are served before records have their turn.
const EVENTS: usize = 512;

/// Between tries of what the server did not take.
const AGAIN: Duration = Duration::from_millis(500);

/// Partitions that are to go.
struct Leaving {
    partitions: TopicPartitionList,
    places: Vec<Place>,
    deadline: Instant,
}

pub(crate) struct Poller {
    member: Arc<Member>,
    admin: Arc<Admin>,
    publishing: Arc<Publishing>,
    consumer: Arc<Client>,
    committer: Committer,
    /// The queues of the partitions that are here.
    queues: Vec<(Place, Batches)>,
    places: FxHashMap<Partition, Place>,
    /// Records on their way from a queue to the member: empty between turns.
    arrivals: Vec<Arrival>,
    copies: Copies,
    /// When it began, and whether anything was read since.
    began: Instant,
    has_read: bool,
    roused: Receiver<()>,
    rouse: Sender<()>,
    /// Partitions whose committed offsets could not be read yet.
    assigning: Vec<TopicPartitionList>,
    leaving: Vec<Leaving>,
    moving: Vec<(Transfer, Publish)>,
    /// Dead letters that were not taken where they were sent, and when to try again.
    refused: Vec<Transfer>,
    try_again: Instant,
    next_commit: Instant,
    /// A commit was due while another was not answered: it is made with the answer. Between two rebalances there may be no
    /// other time for it.
    held_back: bool,
    /// Without group: when to look for new partitions, and what was found.
    next_refresh: Instant,
    found: (Sender<Vec<Partition>>, Receiver<Vec<Partition>>),
}

/// Makes the client, joins, and starts the thread.
pub(crate) fn start(
    member: Arc<Member>,
    admin: Arc<Admin>,
    publishing: Arc<Publishing>,
    source: Source,
    wake: (Sender<()>, Receiver<()>),
) -> Result<()> {
    let (rouse, roused) = wake;
    let consumer = Arc::new(make(&admin, &source, member.number, &rouse)?);
    // Set once: a member has one client.
    let _ = member.consumer.set(Arc::downgrade(&consumer));
    let pattern = topic_pattern(&member.filter);
    let retries = member.retry_topics().map(RetryTopics::pattern);
    let now = Instant::now();
    let refresh = admin.config().metadata_refresh;
    let mut poller = Poller {
        member,
        admin,
        publishing,
        committer: Committer::start(&consumer, rouse.clone())?,
        consumer,
        queues: Vec::new(),
        places: FxHashMap::default(),
        arrivals: Vec::with_capacity(BATCH),
        copies: Copies::default(),
        began: now,
        has_read: false,
        roused,
        rouse,
        assigning: Vec::new(),
        leaving: Vec::new(),
        moving: Vec::new(),
        refused: Vec::new(),
        try_again: now,
        next_commit: now,
        held_back: false,
        next_refresh: now + refresh,
        found: crossbeam_channel::bounded(1),
    };
    match source {
        Source::Group(_) => {
            let topics: Vec<&str> = std::iter::once(pattern.as_str()).chain(retries.as_deref()).collect();
            let joined = poller.consumer.subscribe(&topics);
            joined.map_err(|error| error::failed("subscribe", &error))?;
        }
        Source::Alone(offsets) => poller.take_alone(offsets)?,
    }
    let spawned = thread::Builder::new().name("broker-kafka-poll".to_owned()).spawn(move || poller.run());
    spawned.map(drop).map_err(|error| Error::backend("start a thread").with_source(error))
}

impl Poller {
    fn run(mut self) {
        loop {
            let busy = self.turn();
            if let Some(deadline) = self.member.state(|state| state.ending())
                && (self.member.state(|state| state.is_settled()) || Instant::now() >= deadline)
            {
                break;
            }
            if !busy {
                self.wait();
            }
        }
        self.leave();
    }

    /// Does what there is to do; tells whether there may be more.
    fn turn(&mut self) -> bool {
        self.serve_events();
        self.finish_leaving();
        let mut busy = false;
        if self.member.is_open() {
            busy = self.read();
        }
        self.member.bury_unreadable();
        self.transfer();
        self.commit();
        self.refresh();
        busy
    }

    fn wait(&mut self) {
        let now = Instant::now();
        let due = self.member.run_timers(now);
        let mut until = now + IDLE;
        until = due.map_or(until, |due| until.min(due));
        if !self.assigning.is_empty() || !self.refused.is_empty() {
            until = until.min(now + Duration::from_millis(50));
        }
        if due.is_none_or(|due| due > now) {
            let _ = self.roused.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
        self.member.run_timers(Instant::now());
    }

    // --- the group's events -------------------------------------------------------------------------

    fn serve_events(&mut self) {
        // Bounded: events must not keep records waiting.
        for _ in 0..EVENTS {
            let consumer = Arc::clone(&self.consumer);
            match consumer.poll(Duration::ZERO) {
                // Fetched before its partition had a queue of its own.
                Some(Ok(record)) => self.admit_stray(&record),
                Some(Err(error)) => self.failed(&error),
                None => {
                    let rebalances = std::mem::take(&mut *self.consumer.context().rebalances.lock());
                    if rebalances.is_empty() {
                        break;
                    }
                    rebalances.into_iter().for_each(|(what, partitions)| self.rebalance(what, partitions));
                }
            }
        }
        for partitions in std::mem::take(&mut self.assigning) {
            self.assign(partitions);
        }
    }

    fn failed(&self, error: &KafkaError) {
        let fatal = matches!(error, KafkaError::MessageConsumptionFatal(_));
        if !fatal && error.rdkafka_error_code().is_some_and(error::is_of_connection) {
            // The callbacks were told more of it. However we were refused: who was let in before may be again.
            if let Some(cause) = self.admin.health().last_error() {
                self.member.entry.failed(cause.message());
            }
            return;
        }
        let error = error::failed("receive", error);
        self.member.entry.failed(error.message());
        if fatal {
            self.member.end_lost(error);
        } else if error.kind() != ErrorKind::Unauthorized {
            self.admin.health().failed(error);
        } else if !self.stood() {
            self.member.end(Instant::now() + self.admin.config().drain_timeout, Some(error));
        }
        // What one may not read is this subscription's, and says nothing of the connections of the others.
    }

    /// Whether the server has let it read, as far as is known. Who may not any more may be allowed to again; who never might
    /// is told so.
    fn stood(&self) -> bool {
        self.has_read || self.began.elapsed() > self.admin.config().connect_timeout
    }

    fn rebalance(&mut self, what: RDKafkaRespErr, partitions: TopicPartitionList) {
        match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(partitions),
            _ => self.revoke(partitions),
        }
    }

    fn assign(&mut self, partitions: TopicPartitionList) {
        if partitions.count() == 0 {
            self.report(assign(&self.consumer, &partitions));
            return;
        }
        let committed = self.consumer.committed_offsets(partitions.clone(), AGAIN);
        let committed = committed.map_err(|error| error::failed("ask for the group's offsets", &error));
        match committed.and_then(|committed| group::read(&committed)) {
            Ok(committed) => {
                let offsets = committed.into_iter().map(|one| (one.partition, one.progress)).collect();
                let taken = self.take(offsets);
                self.report_error(taken);
            }
            Err(error) => {
                // Where they are is not known, and without that nothing can be read.
                self.member.entry.failed(error.message());
                if self.consumer.assignment_lost() {
                    self.report(unassign(&self.consumer, &partitions));
                } else {
                    self.assigning.push(partitions);
                }
            }
        }
    }

    fn revoke(&mut self, partitions: TopicPartitionList) {
        let places: Vec<Place> =
            named(&partitions).iter().filter_map(|partition| self.places.remove(partition)).collect();
        self.queues.retain(|(place, _)| !places.contains(place));
        let lost = self.consumer.assignment_lost();
        self.member.state(|state| places.iter().for_each(|place| state.let_go(*place)));
        let wait = if lost { Duration::ZERO } else { self.admin.config().drain_timeout };
        self.leaving.push(Leaving { partitions, places, deadline: Instant::now() + wait });
        self.finish_leaving();
    }

    /// Lets go of partitions whose deliveries are settled, or have been waited for long enough.
    fn finish_leaving(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        let lost = self.consumer.assignment_lost();
        let now = Instant::now();
        for leaving in std::mem::take(&mut self.leaving) {
            let quiet = self.member.state(|state| leaving.places.iter().all(|place| state.is_quiet(*place)));
            if !(quiet || lost || now >= leaving.deadline) {
                self.leaving.push(leaving);
                continue;
            }
            let patience = leaving.deadline + REBALANCE;
            let committed = lost || self.commit_now(Some(&leaving.places), patience);
            if !committed && now < patience {
                // The group is just between two generations: a moment later it takes commits again.
                self.member.state(|state| state.unseal(Some(&leaving.places)));
                self.leaving.push(leaving);
                continue;
            }
            self.member.state(|state| leaving.places.iter().for_each(|place| state.remove(*place)));
            self.report(unassign(&self.consumer, &leaving.partitions));
        }
    }

    /// Partitions are ours from now on; `None` is a partition the group has committed nothing for.
    fn take(&mut self, offsets: Vec<(Partition, Option<Progress>)>) -> Result<()> {
        let settings = self.member.entry.settings();
        let capacity = Stored::new(&settings).room()?;
        let mut positions = Vec::with_capacity(offsets.len());
        for (partition, progress) in offsets {
            // What appeared after the group was made is read from its beginning.
            let from = progress.as_ref().map_or(Offset::Beginning, |progress| Offset::Offset(progress.watermark));
            positions.push((partition.clone(), from));
            let lot = |id| Lot::new(id, partition.clone(), progress, capacity, settings.ordered);
            let place = self.member.state(|state| state.add(lot));
            let rouse = self.rouse.clone();
            let roused = move || {
                // Full means that it is roused already.
                let _ = rouse.try_send(());
            };
            // Before the assignment, so that nothing is fetched into the common queue first.
            let queue = Batches::split(&self.consumer, &partition, roused);
            let (topic, number) = &partition;
            let queue = queue.ok_or_else(|| Error::backend(format!("partition {number} of {topic} has no queue")))?;
            self.queues.push((place, queue));
            self.places.insert(partition, place);
        }
        // The group is between two rebalances: in the next one the server takes no commits.
        self.next_commit = Instant::now();
        let positions = list(positions.iter().map(|(partition, offset)| (partition, *offset)))?;
        assign(&self.consumer, &positions).map_err(|error| error::failed("take partitions", &error))
    }

    fn take_alone(&mut self, offsets: Vec<(Partition, i64)>) -> Result<()> {
        let at = |watermark| Some(Progress { watermark, ..Progress::default() });
        self.take(offsets.into_iter().map(|(partition, offset)| (partition, at(offset))).collect())
    }

    /// Without group, nobody tells of new partitions.
    fn refresh(&mut self) {
        if self.member.group.is_some() {
            return;
        }
        if let Ok(found) = self.found.1.try_recv() {
            let new = found.into_iter().filter(|partition| !self.places.contains_key(partition));
            let new: Vec<_> = new.map(|partition| (partition, None)).collect();
            if !new.is_empty() {
                let taken = self.take(new);
                self.report_error(taken);
            }
        }
        let now = Instant::now();
        if now >= self.next_refresh {
            self.next_refresh = now + self.admin.config().metadata_refresh;
            let (admin, filter, found) = (Arc::clone(&self.admin), self.member.filter.clone(), self.found.0.clone());
            // The server may be slow to answer; what is here goes on.
            let ask = move || {
                if let Ok(partitions) = admin.matching(&filter) {
                    let _ = found.try_send(partitions);
                }
            };
            let _ = thread::Builder::new().name("broker-kafka-find".to_owned()).spawn(ask);
        }
    }

    fn report(&self, result: KafkaResult<()>) {
        self.report_error(result.map_err(|error| error::failed("change the assignment", &error)));
    }

    fn report_error(&self, result: Result<()>) {
        if let Err(error) = result {
            tracing::warn!(filter = %self.member.filter, %error, "a subscription to Kafka met an error");
            self.member.entry.failed(error.message());
        }
    }
}

/// How long a member that goes waits for a rebalance under way.
const REBALANCE: Duration = Duration::from_secs(5);

/// The partitions of a list of librdkafka's.
fn named(list: &TopicPartitionList) -> Vec<Partition> {
    let elements = list.elements();
    elements.iter().filter_map(|element| Some((Topic::new(element.topic()).ok()?, element.partition()))).collect()
}
