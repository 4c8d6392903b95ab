//! The contract on Kafka.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use broker_core::{
    BoxFuture, Broker, BrokerUrl, Capabilities, Connector, DeadLetter, DrainReport, Error, ErrorKind, Group,
    GroupOptions, GroupSettings, GroupStatus, Publisher, PublisherOptions, Receipt, Result, State, Status, Subscribe,
    Subscription, SubscriptionStatus, Topic, TopicFilter,
};
use tokio::sync::{OnceCell, oneshot};

use crate::admin::{Admin, At, Partition};
use crate::capabilities::capabilities;
use crate::client::rest;
use crate::consumer::Source;
use crate::dead::Grave;
use crate::delivery::Reader;
use crate::group::{self, GroupClient};
use crate::member::Member;
use crate::poller;
use crate::process::Process;
use crate::producer::KafkaProducer;
use crate::progress::Progress;
use crate::publishing::{Publishing, RawProducer};
use crate::registry::{Entry, Registry};
use crate::retry_topics::RetryTopics;
use crate::state::instant_after;
use crate::stored::Stored;
use crate::{KafkaConfig, Transaction, check_options};

/// A [`Broker`] on Apache Kafka.
///
/// *Dropping* it ends it as [`close`](Broker::close) with no deadline would, on threads of its own.
///
/// ```
/// use broker_core::{Broker, BrokerUrl};
/// use broker_kafka::{KafkaBroker, KafkaConfig};
///
/// let url = BrokerUrl::parse("kafka://app:secret@127.0.0.1:9092")?;
/// let broker = KafkaBroker::new(KafkaConfig::from_url(url)?);
/// assert_eq!(broker.name(), "kafka://127.0.0.1:9092");
/// # Ok::<(), broker_core::Error>(())
/// ```
pub struct KafkaBroker {
    name: String,
    shared: Arc<Shared>,
    report: OnceCell<DrainReport>,
}

struct Shared {
    admin: Arc<Admin>,
    publishing: Arc<Publishing>,
    registry: Registry,
    closed: AtomicBool,
}

/// Opens `kafka:` URLs; for a [`Connectors`](broker_core::Connectors) table.
///
/// ```
/// let mut connectors = broker_core::Connectors::new();
/// connectors.add(["kafka"], broker_kafka::connector());
/// assert!(connectors.open("kafka://127.0.0.1:9092?partitions=12").is_ok());
/// ```
pub fn connector() -> impl Connector {
    |url: BrokerUrl| Ok(Arc::new(KafkaBroker::new(KafkaConfig::from_url(url)?)) as Arc<dyn Broker>)
}

impl KafkaBroker {
    /// A broker with this configuration; does no I/O.
    pub fn new(config: KafkaConfig) -> Self {
        let name = format!("kafka://{}", config.bootstrap_servers());
        let config = Arc::new(config);
        let admin = Arc::new(Admin::new(Arc::clone(&config)));
        let publishing = Publishing::new(config, Arc::clone(&admin));
        let shared = Shared { admin, publishing, registry: Registry::default(), closed: AtomicBool::new(false) };
        Self { name, shared: Arc::new(shared), report: OnceCell::new() }
    }

    /// What it was made with.
    pub fn config(&self) -> &KafkaConfig {
        self.shared.admin.config()
    }

    /// The raw client that publishes, for what the contract has no words for. It is polled by the
    /// broker; records that it is given must have ticket [`usize::MAX`], which is nobody's. One that meets a fatal
    /// error is replaced; the next call gives the new one.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) if librdkafka does not take a setting of the URL.
    pub fn raw_producer(&self) -> Result<Arc<RawProducer>> {
        self.shared.publishing.client()
    }

    /// Publishes messages and acks deliveries, all or nothing: consume, process, produce. Whoever reads what
    /// is committed (`isolation.level=read_committed`, the default here) sees all of it or none, and the group
    /// goes on behind what it acked even if this process dies at once. Receipts are in the order of the
    /// messages. Once begun it ends by itself, whether or not the future is waited for.
    ///
    /// ```no_run
    /// # async fn example() -> broker_core::Result<()> {
    /// use broker_core::{Broker, BrokerUrl, GroupName, Message, Subscribe, Topic};
    /// use broker_kafka::{KafkaBroker, KafkaConfig, Transaction};
    ///
    /// let url = BrokerUrl::parse("kafka://127.0.0.1:9092?transactional_id=invoices-1")?;
    /// let broker = KafkaBroker::new(KafkaConfig::from_url(url)?);
    /// let billing = Subscribe::group(GroupName::new("billing")?);
    /// let mut orders = broker.subscribe(&"orders.created".parse()?, billing).await?;
    /// while let Some(order) = orders.next().await? {
    ///     let invoice = Message::new(order.message().payload().clone());
    ///     broker.transact(Transaction::new().publish(Topic::new("invoices")?, invoice).ack(order)).await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Unsupported`](broker_core::ErrorKind::Unsupported) without `transactional_id`;
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a delivery that came to no group's member of this
    /// broker; [`Unavailable`](broker_core::ErrorKind::Unavailable) if a delivery's partition has moved;
    /// [`Conflict`](broker_core::ErrorKind::Conflict) if another producer has taken the `transactional_id`;
    /// and what publishing says. After an error nothing of it has happened, and the deliveries come again; but one
    /// that says "whether the transaction was committed is not known" means that: the server did not answer in time
    /// (`publish_timeout`, and `connect_timeout` more; [`Timeout`](broker_core::ErrorKind::Timeout)) or was another's
    /// by then. All of it has happened or none, and the deliveries come again in both cases.
    pub fn transact(&self, transaction: Transaction) -> BoxFuture<'static, Result<Vec<Receipt>>> {
        self.blocking(|shared| shared.transact(transaction))
    }

    /// Runs what waits for the server on a thread of its own.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'static, Result<T>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let (done, outcome) = oneshot::channel();
            let run = move || {
                let result = work(&shared);
                // Whoever does not wait any more wants none of it.
                let _ = done.send(result);
            };
            let spawned = thread::Builder::new().name("broker-kafka-ask".to_owned()).spawn(run);
            spawned.map_err(|error| Error::backend("start a thread").with_source(error))?;
            outcome.await.map_err(|_| Error::backend("a question to the server ended without an answer"))?
        })
    }
}

impl Shared {
    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed("the broker is closed"));
        }
        Ok(())
    }

    fn group_id(&self, group: &Group) -> String {
        self.admin.config().group_id(group)
    }

    /// Makes sure that the group stands.
    fn ensure(&self, group: &Group, options: &GroupOptions) -> Result<(bool, Arc<Entry>)> {
        self.open()?;
        check_group_options(options)?;
        let known = self.registry.group(group).map(|entry| entry.settings());
        let standing = group::ensure(&self.admin, group, options, known)?;
        if standing.created {
            // What was known was of another.
            self.registry.forget(group);
        }
        Ok((standing.created, self.registry.enter(group, standing.settings)))
    }

    /// What the group has, as this process or the server knows it.
    fn settings(&self, group: &Group) -> Result<GroupSettings> {
        self.open()?;
        if let Some(entry) = self.registry.group(group) {
            return Ok(entry.settings());
        }
        let partitions = self.admin.matching(&group.filter)?;
        let committed = GroupClient::new(&self.admin, &self.group_id(group))?.committed(&partitions)?;
        group::found(committed, group)
    }

    fn subscribe(&self, filter: &TopicFilter, options: &Subscribe) -> Result<Subscription> {
        self.open()?;
        check_group_options(options.options())?;
        let group = options.group_name().map(|name| Group::new(name.clone(), filter.clone()));
        let (entry, source) = match &group {
            Some(group) => (self.ensure(group, options.options())?.1, Source::Group(self.group_id(group))),
            None => {
                let settings = options.options().resolve(None)?;
                if let Some(topic) = filter.topic() {
                    self.admin.ensure_topic(&topic)?;
                }
                let partitions = self.admin.matching(filter)?;
                let offsets = group::start_offsets(&self.admin, &partitions, &settings.start)?;
                (Arc::new(Entry::new(settings)), Source::Alone(offsets))
            }
        };
        let threshold = self.admin.config().retry_topics;
        let retry_topics = group.as_ref().zip(threshold).map(|(group, threshold)| RetryTopics::new(group, threshold));
        let retry_topics = retry_topics.transpose()?;
        let wake = crossbeam_channel::bounded(1);
        let (max_in_flight, rouse) = (options.max_in_flight(), wake.0.clone());
        let make =
            |number| Member::new(filter.clone(), group.clone(), number, entry, retry_topics, max_in_flight, rouse);
        let member = self.registry.add(group.as_ref(), make);
        let (admin, publishing) = (Arc::clone(&self.admin), Arc::clone(&self.publishing));
        if let Err(error) = poller::start(Arc::clone(&member), admin, publishing, source, wake) {
            member.finish();
            return Err(error);
        }
        let reader = Reader::new(Arc::clone(&member), self.admin.config().drain_timeout);
        if member.group.is_some() {
            // The group keeps what is published from now on; but its members share it only once each has
            // a partition. One that finds no partition left is not waited for for long.
            let deadline = Instant::now() + TAKING_PART.min(self.admin.config().connect_timeout);
            while !member.state(|state| state.takes_part()) && Instant::now() < deadline {
                rest(Duration::from_millis(2));
            }
        }
        // A close that came meanwhile has not seen this member.
        self.open()?;
        Ok(Subscription::new(reader))
    }

    fn transact(&self, transaction: Transaction) -> Result<Vec<Receipt>> {
        // First of all: whatever fails, its deliveries are given back.
        let process = Process::new(transaction, self.registry.members());
        self.open()?;
        if self.admin.config().transactional_id.is_none() {
            return Err(Error::unsupported("transactions: the broker's URL names no transactional_id"));
        }
        process.run(&self.publishing)
    }

    fn alter(&self, group: &Group, options: &GroupOptions) -> Result<()> {
        check_group_options(options)?;
        if options.start.is_some() {
            return Err(Error::conflict("start counted when the group was created; delete it first"));
        }
        if options.ordered.is_some() {
            return Err(Error::unsupported("ordered: on Kafka it is fixed when the group is created"));
        }
        let have = self.settings(group)?;
        let mut wanted = GroupOptions::new().with_start(have.start).with_ordered(have.ordered);
        wanted = wanted.with_retry(options.retry.unwrap_or(have.retry));
        wanted.dead_letter = options.dead_letter.clone().or(have.dead_letter);
        let settings = wanted.resolve(Some(&group.name))?;
        let stored = Stored::new(&settings);
        stored.room()?;
        let own: Vec<_> =
            self.registry.members().into_iter().filter(|member| member.group.as_ref() == Some(group)).collect();
        if own.is_empty() {
            let partitions = self.admin.matching(&group.filter)?;
            let client = GroupClient::new(&self.admin, &self.group_id(group))?;
            let committed = client.committed(&partitions)?;
            let offsets: Vec<_> =
                committed.into_iter().filter_map(|one| Some((one.partition, one.progress?))).collect();
            client.commit(&stored, &offsets)?;
        }
        self.registry.enter(group, settings.clone()).alter(settings);
        // Members write them with their next commit.
        for member in own {
            member.state(|state| state.commit_all());
            member.rouse();
        }
        Ok(())
    }

    fn delete(&self, group: &Group) -> Result<bool> {
        self.open()?;
        let gone = Error::not_found(format!("group {group} was deleted"));
        let own: Vec<_> =
            self.registry.members().into_iter().filter(|member| member.group.as_ref() == Some(group)).collect();
        for member in &own {
            member.end_deleted(gone.clone());
        }
        let deadline = Instant::now() + self.admin.config().connect_timeout;
        while !own.iter().all(|member| member.is_finished()) && Instant::now() < deadline {
            rest(Duration::from_millis(5));
        }
        let known = self.registry.group(group).is_some();
        let deleted = self.admin.delete_group(&self.group_id(group))?;
        self.admin.delete_retry_topics(group)?;
        self.registry.forget(group);
        Ok(deleted || known)
    }

    fn purge(&self, group: &Group) -> Result<u64> {
        let settings = self.settings(group)?;
        let partitions = self.admin.of_group(group)?;
        let end = self.admin.offsets(&partitions, At::End)?;
        let client = GroupClient::new(&self.admin, &self.group_id(group))?;
        let lag = lag(committed_of(&client.committed(&partitions)?), &end);
        let offsets: Vec<_> = end
            .into_iter()
            .map(|(partition, watermark)| (partition, Progress { watermark, ..Progress::default() }))
            .collect();
        client.commit(&Stored::new(&settings), &offsets)?;
        Ok(lag)
    }

    fn grave(&self, group: &Group) -> Result<Option<Grave>> {
        let settings = self.settings(group)?;
        let stored = Stored::new(&settings);
        settings.dead_letter.map(|topic| Grave::new(&self.admin, group, topic, stored)).transpose()
    }

    fn status(&self, name: &str) -> Result<Status> {
        let state = match self.closed.load(Ordering::Acquire) {
            true => State::Closed,
            false if self.admin.answers() => State::Active,
            false => State::Connecting,
        };
        let mut status = Status::new(name, state);
        status.last_error = self.admin.health().last_error().map(|error| error.to_string());
        let members = self.registry.members();
        for member in members.iter().filter(|member| member.group.is_none() && member.is_open()) {
            let mut alone = SubscriptionStatus::new(member.filter.clone(), status.state);
            alone.in_flight = Some(member.in_flight());
            let progress = member.state(|state| state.progress());
            alone.assignment = Some(assignment(progress.iter().map(|(partition, _)| partition)));
            if status.state == State::Active {
                let partitions: Vec<_> = progress.iter().map(|(partition, _)| partition.clone()).collect();
                let end = answered(&mut status, self.admin.offsets(&partitions, At::End))?;
                let progress = progress.iter().map(|(partition, progress)| (partition, Some(progress)));
                alone.lag = end.map(|end| lag(progress, &end));
                alone.state = status.state;
            }
            alone.counts = member.entry.counts.counts();
            alone.last_error = member.entry.last_error();
            status.subscriptions.push(alone);
        }
        for (group, entry) in self.registry.groups() {
            let mut one = GroupStatus::new(group.clone(), status.state);
            let own: Vec<_> = members.iter().filter(|member| member.group.as_ref() == Some(&group)).collect();
            one.in_flight = Some(own.iter().map(|member| member.in_flight()).sum());
            let partitions: Vec<Partition> = own
                .iter()
                .flat_map(|member| member.state(|state| state.partitions().cloned().collect::<Vec<_>>()))
                .collect();
            one.assignment = Some(assignment(&partitions));
            one.counts = entry.counts.counts();
            one.last_error = entry.last_error();
            if status.state == State::Active {
                answered(&mut status, self.ask_server(&group, &mut one))?;
                one.state = status.state;
            }
            status.groups.push(one);
        }
        Ok(status)
    }

    fn ask_server(&self, group: &Group, status: &mut GroupStatus) -> Result<()> {
        let id = self.group_id(group);
        let partitions = self.admin.of_group(group)?;
        let end = self.admin.offsets(&partitions, At::End)?;
        let committed = GroupClient::new(&self.admin, &id)?.committed(&partitions)?;
        status.lag = Some(lag(committed_of(&committed), &end));
        status.members = Some(self.admin.members(&id)?.unwrap_or(0));
        Ok(())
    }

    /// Ends members and publishes by `deadline`.
    fn close(&self, deadline: Instant) -> DrainReport {
        self.closed.store(true, Ordering::Release);
        self.publishing.stop_intake();
        let members = self.registry.members();
        for member in &members {
            member.end(deadline, None);
        }
        while !members.iter().all(|member| member.is_finished()) && Instant::now() < deadline {
            rest(Duration::from_millis(2));
        }
        let mut report = DrainReport::new(true);
        report.complete = members.iter().all(|member| member.is_finished());
        report.in_flight = members.iter().map(|member| member.close() as u64).sum();
        report.unconfirmed = self.publishing.close(deadline) as u64;
        report.complete &= report.unconfirmed == 0 && report.in_flight == 0;
        report
    }
}

/// What the server answered. One that does not is away, and whoever asks how things are is told that.
fn answered<T>(status: &mut Status, answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.is_retryable() => {
            status.state = State::Connecting;
            status.last_error = Some(error.to_string());
            Ok(None)
        }
        // It does not say everything to everybody.
        Err(error) if error.kind() == ErrorKind::Unauthorized => {
            status.last_error = Some(error.to_string());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// How long subscribing waits for a partition, which the other members may have to give up first.
const TAKING_PART: Duration = Duration::from_secs(3);

/// Partitions as a status names them, in order.
fn assignment<'a>(partitions: impl IntoIterator<Item = &'a Partition>) -> Vec<String> {
    let mut names: Vec<_> = partitions.into_iter().map(|(topic, number)| (topic.to_string(), *number)).collect();
    names.sort();
    names.into_iter().map(|(topic, number)| format!("{topic}/{number}")).collect()
}

fn committed_of(committed: &[group::Committed]) -> impl Iterator<Item = (&Partition, Option<&Progress>)> + Clone {
    committed.iter().map(|one| (&one.partition, one.progress.as_ref()))
}

/// Messages between how far a reader is in each partition and its end, what is settled beyond not counted.
fn lag<'a>(
    progress: impl Iterator<Item = (&'a Partition, Option<&'a Progress>)> + Clone,
    end: &[(Partition, i64)],
) -> u64 {
    let of_partition = |(partition, end): &(Partition, i64)| {
        let (_, progress) = progress.clone().find(|(one, _)| *one == partition)?;
        let behind = end.saturating_sub(progress.map_or(0, |progress| progress.watermark));
        let done: i64 = progress.map_or(0, |progress| progress.done.iter().map(|range| range.end - range.start).sum());
        u64::try_from(behind.saturating_sub(done)).ok()
    };
    end.iter().filter_map(of_partition).sum()
}

fn check_group_options(options: &GroupOptions) -> Result<()> {
    if options.backlog.is_some() {
        return Err(Error::unsupported("backlog: a Kafka topic is bounded by its retention, not by a group's backlog"));
    }
    Ok(())
}

impl Broker for KafkaBroker {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(self.config())
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        self.blocking(|shared| {
            shared.open()?;
            shared.admin.connect()
        })
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.shared.open()?;
        check_options(&options)?;
        let publishing = Arc::clone(&self.shared.publishing);
        let max_message_bytes = self.capabilities().max_message_bytes;
        let topic_queue = publishing.topic(topic);
        // Where a batch is atomic, what is too large fails the batch: the producer has to see it.
        let checked = if self.config().transactional_id.is_some() { usize::MAX } else { max_message_bytes };
        let producer = KafkaProducer { topic: topic_queue, max_message_bytes, publishing };
        Publisher::new(topic.clone(), checked, Arc::new(producer))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let filter = filter.clone();
        self.blocking(move |shared| shared.subscribe(&filter, &options))
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        self.blocking(move |shared| Ok(shared.ensure(&group, &options)?.0))
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        let group = group.clone();
        self.blocking(move |shared| shared.alter(&group, &options))
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        self.blocking(move |shared| shared.delete(&group))
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        self.blocking(move |shared| shared.purge(&group))
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        let group = group.clone();
        self.blocking(move |shared| shared.grave(&group)?.map_or(Ok(Vec::new()), |grave| grave.letters(max)))
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        self.blocking(move |shared| shared.grave(&group)?.map_or(Ok(0), |grave| grave.purge()))
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        let redrive = move |shared: &Shared| {
            let grave = shared.grave(&group)?;
            grave.map_or(Ok(0), |grave| grave.redrive(&shared.publishing, max))
        };
        self.blocking(redrive)
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        let name = self.name.clone();
        self.blocking(move |shared| shared.status(&name))
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        Box::pin(async move {
            let at = instant_after(deadline);
            let closing = async {
                match self.blocking(move |shared| Ok(shared.close(at))).await {
                    Ok(report) => report,
                    // No thread could be had: what is to be done is done here.
                    Err(_) => self.shared.close(Instant::now()),
                }
            };
            self.report.get_or_init(|| closing).await.clone()
        })
    }
}

impl Drop for KafkaBroker {
    fn drop(&mut self) {
        if self.report.initialized() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let _ = thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(move || shared.close(Instant::now()));
    }
}

impl fmt::Debug for KafkaBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaBroker").field("name", &self.name).finish_non_exhaustive()
    }
}
