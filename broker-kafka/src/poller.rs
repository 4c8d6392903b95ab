//! The thread behind a subscription: reads, commits, and follows the group's rebalances.
//!
//! Each partition has a queue of its own (librdkafka's "split" queues), so that one that holds enough
//! is left unread while the group's events and the other partitions go on; nothing is paused, which
//! would throw away what was prefetched. A partition that is to go is let go when its deliveries in
//! flight are settled, or after the drain timeout; then its progress is committed. One that is lost
//! is dropped, and nothing said of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use broker_core::{Error, ErrorKind, Publish, Result, Topic};
use crossbeam_channel::{Receiver, Sender};
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message as RdMessage};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};
use rustc_hash::FxHashMap;

use crate::admin::{Admin, Partition, list};
use crate::batch::{BATCH, Batches, Record};
use crate::committer::{Answer, Committer};
use crate::consumer::{Client, Source, assign, make, unassign};
use crate::group;
use crate::lot::Lot;
use crate::member::{Arrival, Member};
use crate::producer::Publishing;
use crate::progress::Progress;
use crate::record::{Copies, Format, Travel};
use crate::retry_topics::RetryTopics;
use crate::state::{Place, Transfer, TransferKind};
use crate::stored::Stored;
use crate::{error, topic_pattern, wire};

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
        let error = error::failed("receive", error);
        self.member.entry.failed(error.message());
        if fatal {
            self.member.end_lost(error);
        } else if error.kind() == ErrorKind::Unauthorized {
            self.member.end(Instant::now() + self.admin.config().drain_timeout, Some(error));
        } else {
            self.admin.health().failed(error);
        }
    }

    fn admit_stray(&mut self, record: &BorrowedMessage<'_>) {
        let Ok(topic) = Topic::new(record.topic()) else { return };
        if let Some(place) = self.places.get(&(topic, record.partition())) {
            let Some(record) = Record::of(record) else { return };
            let arrival = arrival(&record, self.admin.config().format, &mut self.copies);
            if let Some(end) = self.member.admit(*place, [arrival]) {
                self.cut(*place, end);
            }
        }
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

    // --- records ------------------------------------------------------------------------------------

    fn read(&mut self) -> bool {
        let mut busy = false;
        let format = self.admin.config().format;
        let (mut arrivals, mut copies) = (std::mem::take(&mut self.arrivals), std::mem::take(&mut self.copies));
        let mut cut = Vec::new();
        for (place, queue) in &self.queues {
            if !self.member.state(|state| state.has_room(*place)) {
                continue;
            }
            let read = queue.read(|record| match record {
                Ok(record) => arrivals.push(arrival(&record, format, &mut copies)),
                Err(error) => self.failed(&error),
            });
            busy |= read == BATCH;
            if !arrivals.is_empty() {
                let end = self.member.admit(*place, arrivals.drain(..));
                cut.extend(end.map(|end| (*place, end)));
            }
        }
        (self.arrivals, self.copies) = (arrivals, copies);
        cut.into_iter().for_each(|(place, end)| self.cut(place, end));
        busy
    }

    /// The log of a partition does not go on where it was read to, but earlier: its topic was deleted and made again, or its
    /// leader had not all of it (KIP-320). What is there now under the offsets of before are other records, to be delivered.
    /// librdkafka reads on at the end it found, or at the beginning; we go back as far as something is not settled.
    fn cut(&mut self, place: Place, end: i64) {
        let Some((anew, partition, from)) = self.member.state(|state| state.cut(place, end)) else { return };
        let (topic, number) = &partition;
        self.report_error(Err(Error::backend(format!("partition {number} of {topic}: its log was cut at {end}"))));
        // Without waiting: what was read before is left out from now on.
        let sought = self.consumer.seek(topic.as_str(), *number, Offset::Offset(from), Duration::ZERO);
        self.report(sought);
        for (of_queue, _) in &mut self.queues {
            if *of_queue == place {
                *of_queue = anew;
            }
        }
        self.places.insert(partition, anew);
    }

    // --- to other topics ----------------------------------------------------------------------------

    fn transfer(&mut self) {
        let now = Instant::now();
        let mut fresh = self.member.state(|state| state.take_transfers());
        if now >= self.try_again {
            fresh.append(&mut self.refused);
        }
        for transfer in fresh {
            let topic = self.publishing.topic(&transfer.topic);
            let travel = match &transfer.kind {
                TransferKind::Dead(_) => Travel::default(),
                TransferKind::Retry(retried) => Travel { for_group: None, retried: Some(retried.clone()) },
            };
            let publish = self.publishing.publish_late(&topic, transfer.copy.clone(), travel);
            self.moving.push((transfer, publish));
        }
        if self.moving.is_empty() {
            return;
        }
        let waker = Waker::from(Arc::new(Rouse(self.rouse.clone())));
        let mut cx = TaskContext::from_waker(&waker);
        for (transfer, mut publish) in std::mem::take(&mut self.moving) {
            match std::pin::Pin::new(&mut publish).poll(&mut cx) {
                Poll::Pending => self.moving.push((transfer, publish)),
                Poll::Ready(result) => {
                    if let Some(transfer) = self.member.transferred(transfer, result.map(drop)) {
                        self.refused.push(transfer);
                        self.try_again = now + AGAIN;
                    }
                }
            }
        }
    }

    // --- commits ------------------------------------------------------------------------------------

    fn commit(&mut self) {
        if self.member.group.is_none() {
            return;
        }
        self.hear_answers();
        let now = Instant::now();
        if now < self.next_commit {
            return;
        }
        self.next_commit = now + self.admin.config().commit_interval;
        let (commits, held_back) = self.member.state(|state| (state.commits(), state.is_held_back()));
        self.held_back = held_back;
        if commits.is_empty() {
            return;
        }
        let partitions = carried(&commits);
        match self.commit_list(&commits) {
            Ok(list) => self.committer.commit(partitions, list),
            Err(error) => {
                self.member.state(|state| state.answered(&partitions));
                self.not_committed(&partitions, error);
            }
        }
    }

    fn hear_answers(&mut self) {
        let answers: Vec<Answer> = self.committer.answers().collect();
        if self.held_back && !answers.is_empty() {
            self.next_commit = Instant::now();
        }
        for Answer { partitions, result } in answers {
            self.member.state(|state| state.answered(&partitions));
            match result {
                Ok(()) => self.admin.health().recovered(),
                Err(error) => self.not_committed(&partitions, error),
            }
        }
    }

    /// Commits for the last time, and waits until the server has it; false if it may have it a moment later, and who
    /// tries again unseals what is to be in it. Until `patience` it waits for what was sent in the background.
    fn commit_now(&mut self, places: Option<&[Place]>, patience: Instant) -> bool {
        if self.member.group.is_none() {
            return true;
        }
        self.hear_answers();
        if Instant::now() < patience && self.member.state(|state| state.is_committing(places)) {
            return false;
        }
        let commits = self.member.state(|state| state.last_commits(places));
        if commits.is_empty() {
            return true;
        }
        let sent = self.commit_list(&commits).and_then(|list| {
            self.consumer.commit(&list, CommitMode::Sync).map_err(|error| error::failed("commit", &error))
        });
        let Err(error) = sent else { return true };
        let passing = error.kind() == ErrorKind::Unavailable;
        self.not_committed(&carried(&commits), error);
        !passing
    }

    fn commit_list(&self, commits: &[(Partition, Progress)]) -> Result<TopicPartitionList> {
        group::commit_list(&Stored::new(&self.member.entry.settings()), commits)
    }

    /// The server has not taken a commit of these: it is to be said again.
    fn not_committed(&self, partitions: &[Partition], error: Error) {
        self.member.state(|state| state.not_committed(partitions));
        self.report_error(Err(error));
    }

    // --- the end ------------------------------------------------------------------------------------

    /// Takes part in a rebalance that is under way. To go in the middle of one would cost the others a
    /// session timeout: the server reads no goodbye while it holds back its answer to our joining.
    fn await_rebalance(&mut self) {
        let Some(group) = &self.member.group else { return };
        let id = self.admin.config().group_id(group);
        let deadline = Instant::now() + REBALANCE;
        while Instant::now() < deadline && matches!(self.admin.is_stable(&id), Ok(false)) {
            self.serve_events();
            self.finish_leaving();
            let _ = self.roused.recv_timeout(Duration::from_millis(20));
        }
    }

    fn leave(mut self) {
        self.await_rebalance();
        self.member.state(|state| self.queues.iter().for_each(|(place, _)| state.let_go(*place)));
        // Acks of before are committed whatever comes after; between two generations the group takes no
        // commit, and what comes next in its rebalance is for this thread to do.
        let deadline = Instant::now() + REBALANCE;
        while !self.commit_now(None, deadline) && Instant::now() < deadline && !self.consumer.assignment_lost() {
            self.member.state(|state| state.unseal(None));
            self.serve_events();
            self.finish_leaving();
            let _ = self.roused.recv_timeout(Duration::from_millis(20));
        }
        self.queues.clear();
        for leaving in std::mem::take(&mut self.leaving) {
            self.report(unassign(&self.consumer, &leaving.partitions));
        }
        for partitions in std::mem::take(&mut self.assigning) {
            self.report(assign(&self.consumer, &partitions));
        }
        self.consumer.context().closing.store(true, Ordering::Release);
        for (what, partitions) in std::mem::take(&mut *self.consumer.context().rebalances.lock()) {
            self.report(match what {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => assign(&self.consumer, &partitions),
                _ => unassign(&self.consumer, &partitions),
            });
        }
        self.unsubscribe();
        let Self { member, consumer, committer, .. } = self;
        drop(committer);
        // Ending a client may take long, or forever; whoever waits for this member does not wait for that.
        let (ended, end) = crossbeam_channel::bounded(1);
        let ending = move || {
            drop(consumer);
            let _ = ended.send(());
        };
        if thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(ending).is_ok() {
            let _ = end.recv_timeout(REBALANCE);
        }
        member.finish();
    }

    /// Leaves the group while the client is as alive as ever: where partitions are taken from one that is being
    /// closed, librdkafka has been seen to wait for itself forever, still a member, its partitions nobody's.
    fn unsubscribe(&self) {
        // A static member does not leave: it is to come back.
        if self.member.group.is_none() || self.admin.config().instance_id.is_some() {
            return;
        }
        self.consumer.unsubscribe();
        let deadline = Instant::now() + REBALANCE;
        while Instant::now() < deadline {
            // Partitions that are taken are let go in the callback.
            let _ = self.consumer.poll(Duration::from_millis(5));
            if self.consumer.assignment().is_ok_and(|assignment| assignment.count() == 0) {
                break;
            }
        }
    }
}

/// How long a member that goes waits for a rebalance under way.
const REBALANCE: Duration = Duration::from_secs(5);

fn carried(commits: &[(Partition, Progress)]) -> Vec<Partition> {
    commits.iter().map(|(partition, _)| partition.clone()).collect()
}

/// The partitions of a list of librdkafka's.
fn named(list: &TopicPartitionList) -> Vec<Partition> {
    let elements = list.elements();
    elements.iter().filter_map(|element| Some((Topic::new(element.topic()).ok()?, element.partition()))).collect()
}

fn arrival(record: &Record<'_>, format: Format, copies: &mut Copies) -> Arrival {
    Arrival { offset: record.offset(), decoded: wire::decode(record, format, copies) }
}

/// Rouses the polling thread when a message has arrived where it was sent.
struct Rouse(Sender<()>);

impl Wake for Rouse {
    fn wake(self: Arc<Self>) {
        let _ = self.0.try_send(());
    }
}
