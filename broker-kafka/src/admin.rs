//! Questions about topics and groups, and their making. Everything here waits for the server, within
//! the connect timeout, and is called on threads that may.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use broker_core::{Error, ErrorKind, Group, Result, Topic, TopicFilter};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::groups::GroupInfo;
use rdkafka::metadata::{Metadata, MetadataTopic};
use rdkafka::{Offset, TopicPartitionList};

use crate::client::{self, Context, MAX_RECORD_BYTES, Role, rest};
use crate::health::Health;
use crate::retry_topics::{self, RetryTopics};
use crate::{KafkaConfig, check_collision, error};

/// A partition of a topic.
pub(crate) type Partition = (Topic, i32);

pub(crate) struct Admin {
    config: Arc<KafkaConfig>,
    health: Arc<Health>,
    /// A consumer without group: asks, and never creates a topic by asking.
    asking: OnceLock<Result<Arc<BaseConsumer<Context>>>>,
    making: OnceLock<Result<Arc<AdminClient<Context>>>>,
}

impl Admin {
    pub(crate) fn new(config: Arc<KafkaConfig>) -> Self {
        Self { config, health: Arc::default(), asking: OnceLock::new(), making: OnceLock::new() }
    }

    pub(crate) fn config(&self) -> &Arc<KafkaConfig> {
        &self.config
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    pub(crate) fn context(&self) -> Context {
        Context { health: Arc::clone(&self.health) }
    }

    fn timeout(&self) -> Duration {
        self.config.connect_timeout
    }

    fn asking(&self) -> Result<&BaseConsumer<Context>> {
        let make = || {
            let mut settings = client::settings(&self.config, &[("allow.auto.create.topics", "false")]);
            // Where the server hangs up on who does not speak as it expects, librdkafka says no more of it than this.
            settings.set_log_level(RDKafkaLogLevel::Info);
            client::hand_on(&mut settings, &self.config, Role::Admin);
            let made = BaseConsumer::from_config_and_context(&settings, self.context());
            made.map(Arc::new).map_err(|error| client::not_made(&error))
        };
        self.asking.get_or_init(make).as_deref().map_err(Clone::clone)
    }

    fn making(&self) -> Result<&AdminClient<Context>> {
        let make = || {
            let mut settings = client::settings(&self.config, &[]);
            client::hand_on(&mut settings, &self.config, Role::Admin);
            let made = AdminClient::from_config_and_context(&settings, self.context());
            made.map(Arc::new).map_err(|error| client::not_made(&error))
        };
        self.making.get_or_init(make).as_deref().map_err(Clone::clone)
    }

    fn options(&self) -> AdminOptions {
        AdminOptions::new().request_timeout(Some(self.timeout())).operation_timeout(Some(self.timeout()))
    }

    /// Serves the client's callbacks: why a connection does not stand is told there alone.
    fn listen(&self, client: &BaseConsumer<Context>) {
        // A line of the log is none of what it answers with, so that more may come after it.
        for _ in 0..EVENTS {
            let _ = client.poll(Duration::ZERO);
        }
    }

    /// Reaches the server.
    pub(crate) fn connect(&self) -> Result<()> {
        self.reach(self.timeout())
    }

    /// Waits until the server has answered for the first time. Who is refused waits no longer than [`MERCY`]: not even
    /// a server that has just started refuses, for longer, whom it lets in later; and another may let us in at once.
    fn reach(&self, patience: Duration) -> Result<()> {
        if self.health.stood() {
            return Ok(());
        }
        let client = self.asking()?;
        let deadline = Instant::now() + patience;
        let mut refused: Option<Instant> = None;
        loop {
            let asked = Instant::now();
            let answer = client.client().fetch_cluster_id(LISTENING.min(patience));
            // Without waiting: it has answered, and has no name.
            if answer.is_some() || asked.elapsed() < LISTENING.min(patience) / 2 {
                self.health.recovered();
                return Ok(());
            }
            self.listen(client);
            match self.health.refusal() {
                Some(refusal) if refused.get_or_insert(asked).elapsed() >= MERCY => return Err(refusal),
                Some(_) => {}
                None => refused = None,
            }
            if Instant::now() >= deadline {
                // A question may have some of its time left: a tenth of a second is near enough.
                let tenths = patience.as_millis().div_ceil(100).try_into().unwrap_or(u32::MAX);
                let within = broker_core::format_duration(Duration::from_millis(100) * tenths);
                let servers = self.config.bootstrap_servers();
                return Err(self
                    .health
                    .explain(Error::unavailable(format!("no answer from {servers} within {within}"))));
            }
        }
    }

    /// Whether the server answers. Where that is not known, or it was lost, it is asked: it may be back, and nobody
    /// has noticed.
    pub(crate) fn answers(&self) -> bool {
        self.health.is_connected() || self.ask_metadata(None, LOOK.min(self.timeout())).is_ok()
    }

    /// The partitions of `topic`; `None` if there is no such topic.
    pub(crate) fn partitions(&self, topic: &Topic) -> Result<Option<Vec<i32>>> {
        let metadata = self.metadata(Some(topic))?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic.as_str()) else {
            return Ok(None);
        };
        match found.error().map(RDKafkaErrorCode::from) {
            None if found.partitions().is_empty() => Ok(None),
            None => Ok(Some(numbers(found))),
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(None),
            Some(code) => Err(error::coded(format_args!("ask for topic {topic}"), code)),
        }
    }

    /// The topics that `filter` matches, and their partitions.
    pub(crate) fn matching(&self, filter: &TopicFilter) -> Result<Vec<Partition>> {
        if let Some(topic) = filter.topic() {
            let partitions = self.partitions(&topic)?.unwrap_or_default();
            return Ok(partitions.into_iter().map(|partition| (topic.clone(), partition)).collect());
        }
        let mut matching = Vec::new();
        self.every_topic(|found| {
            if let Ok(topic) = Topic::new(found.name())
                && filter.matches(&topic)
            {
                matching.extend(numbers(found).into_iter().map(|partition| (topic.clone(), partition)));
            }
        })?;
        Ok(matching)
    }

    /// The partitions that a group reads: those its filter matches, and its retry topics'.
    pub(crate) fn of_group(&self, group: &Group) -> Result<Vec<Partition>> {
        let mut partitions = self.matching(&group.filter)?;
        partitions.extend(self.retry_partitions(group)?);
        Ok(partitions)
    }

    fn retry_partitions(&self, group: &Group) -> Result<Vec<Partition>> {
        let Some(threshold) = self.config.retry_topics else { return Ok(Vec::new()) };
        let topics = RetryTopics::new(group, threshold)?;
        let mut partitions = Vec::new();
        self.every_topic(|found| {
            if topics.contains(found.name())
                && let Ok(topic) = Topic::new(found.name())
            {
                partitions.extend(numbers(found).into_iter().map(|partition| (topic.clone(), partition)));
            }
        })?;
        Ok(partitions)
    }

    /// Deletes a group's retry topics, and what waits there.
    pub(crate) fn delete_retry_topics(&self, group: &Group) -> Result<()> {
        let mut topics: Vec<Topic> = self.retry_partitions(group)?.into_iter().map(|(topic, _)| topic).collect();
        topics.dedup();
        if topics.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = topics.iter().map(Topic::as_str).collect();
        let deleted = pollster::block_on(self.making()?.delete_topics(&names, &self.options()));
        let deleted = deleted.map_err(|error| error::failed("delete retry topics", &error))?;
        match deleted.into_iter().find_map(Result::err) {
            None | Some((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => Ok(()),
            Some((topic, code)) => Err(error::coded(format_args!("delete topic {topic}"), code)),
        }
    }

    fn every_topic(&self, mut seen: impl FnMut(&MetadataTopic)) -> Result<()> {
        self.metadata(None)?.topics().iter().for_each(&mut seen);
        Ok(())
    }

    /// What the server says of a topic, or of all. A server that restarts is waited for.
    fn metadata(&self, topic: Option<&Topic>) -> Result<Metadata> {
        self.patiently(|left| self.ask_metadata(topic, left))
    }

    fn ask_metadata(&self, topic: Option<&Topic>, timeout: Duration) -> Result<Metadata> {
        self.reach(timeout)?;
        let client = self.asking()?;
        let metadata = client.fetch_metadata(topic.map(Topic::as_str), timeout);
        self.listen(client);
        let metadata = metadata.map_err(|error| self.health.explain(error::failed("ask for topics", &error)))?;
        self.health.recovered();
        Ok(metadata)
    }

    /// Finds `topic`, or creates it where that is allowed.
    pub(crate) fn ensure_topic(&self, topic: &Topic) -> Result<()> {
        if self.partitions(topic)?.is_some() {
            return Ok(());
        }
        if !self.config.auto_create {
            return Err(Error::not_found(format!(
                "topic {topic} does not exist, and auto_create=false: create it first"
            )));
        }
        let mut names = Vec::new();
        self.every_topic(|found| names.push(found.name().to_owned()))?;
        check_collision(topic, names.iter().map(String::as_str))?;
        self.create(topic)?;
        // Other brokers hear of a new topic a little later than the one that made it.
        let deadline = Instant::now() + self.timeout();
        while self.partitions(topic)?.is_none() {
            if Instant::now() > deadline {
                return Err(Error::timeout(format!("topic {topic} was created and is not to be seen")));
            }
            rest(Duration::from_millis(20));
        }
        Ok(())
    }

    fn create(&self, topic: &Topic) -> Result<()> {
        // -1 leaves it to the server; a replication factor is never forced.
        let partitions = self.config.partitions.map_or(-1, |count| i32::try_from(count).unwrap_or(i32::MAX));
        let new = NewTopic::new(topic.as_str(), partitions, TopicReplication::Fixed(-1))
            // The server's default is a little less than a message of 1 MiB takes.
            .set("max.message.bytes", MAX_RECORD_BYTES);
        let retention = retry_topics::retention(topic).map(|kept| kept.as_millis().to_string());
        let new = match &retention {
            Some(millis) => new.set("retention.ms", millis),
            None => new,
        };
        let created = pollster::block_on(self.making()?.create_topics([&new], &self.options()));
        let created = created.map_err(|error| error::failed(format_args!("create topic {topic}"), &error))?;
        match created.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) | Some(Ok(_)) | None => Ok(()),
            Some(Err((_, code))) => Err(error::coded(format_args!("create topic {topic}"), code)),
        }
    }

    /// Asks again, within the connect timeout, while the answer is one that passes by itself: a topic
    /// just made has no leader yet, a group's coordinator is just being loaded.
    /// `ask` is told how long it may take.
    pub(crate) fn patiently<T>(&self, mut ask: impl FnMut(Duration) -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + self.timeout();
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
            match ask(left) {
                Err(error) if error.kind() == ErrorKind::Unavailable && Instant::now() < deadline => {
                    rest(Duration::from_millis(20));
                }
                answer => return answer,
            }
        }
    }

    /// Offsets of `partitions`: the end, the beginning, or the first record of a time or later.
    pub(crate) fn offsets(&self, partitions: &[Partition], at: At) -> Result<Vec<(Partition, i64)>> {
        self.patiently(|left| self.ask_offsets(partitions, at, left))
    }

    fn ask_offsets(&self, partitions: &[Partition], at: At, timeout: Duration) -> Result<Vec<(Partition, i64)>> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        let asked = match at {
            At::End => Offset::End,
            At::Beginning => Offset::Beginning,
            At::Time(millis) => Offset::Offset(millis.max(0)),
        };
        let list = list(partitions.iter().map(|partition| (partition, asked)))?;
        let answer = self.asking()?.offsets_for_times(list, timeout);
        let answer = answer.map_err(|error| match error.rdkafka_error_code() {
            // The server that named them is away, and no other has told who has them now.
            Some(RDKafkaErrorCode::UnknownPartition | RDKafkaErrorCode::UnknownTopic) => {
                Error::unavailable("ask for offsets: who leads the partitions is not known")
            }
            _ => self.health.explain(error::failed("ask for offsets", &error)),
        })?;
        let mut offsets = Vec::with_capacity(partitions.len());
        let mut beyond = Vec::new();
        self.health.recovered();
        for element in answer.elements() {
            element.error().map_err(|error| match error.rdkafka_error_code() {
                // It was in the metadata: its leader has not heard of it yet.
                Some(RDKafkaErrorCode::UnknownTopicOrPartition) => {
                    Error::unavailable(format!("ask for offsets: {} is just being made", element.topic()))
                }
                _ => error::failed("ask for offsets", &error),
            })?;
            let partition = (Topic::new(element.topic())?, element.partition());
            match element.offset() {
                Offset::Offset(offset) => offsets.push((partition, offset)),
                // No record is that young.
                _ => beyond.push(partition),
            }
        }
        if !beyond.is_empty() && at != At::End {
            offsets.extend(self.offsets(&beyond, At::End)?);
        }
        Ok(offsets)
    }

    /// Members of a group, as the server counts them; `None` if it knows no such group.
    pub(crate) fn members(&self, id: &str) -> Result<Option<u64>> {
        self.described(id, |group| group.members().len() as u64)
    }

    /// Whether no rebalance of the group is under way.
    pub(crate) fn is_stable(&self, id: &str) -> Result<bool> {
        Ok(self.described(id, |group| !group.state().ends_with("Rebalance"))?.unwrap_or(true))
    }

    fn described<T>(&self, id: &str, read: impl Fn(&GroupInfo) -> T) -> Result<Option<T>> {
        let list = self.asking()?.fetch_group_list(Some(id), self.timeout());
        let list = list.map_err(|error| self.health.explain(error::failed("ask for the group", &error)))?;
        Ok(list.groups().iter().find(|group| group.name() == id && group.state() != "Dead").map(read))
    }

    /// Deletes a group; false if there was none. A member that has just left may still be seen for a
    /// moment.
    pub(crate) fn delete_group(&self, id: &str) -> Result<bool> {
        let deadline = Instant::now() + self.timeout();
        loop {
            let deleted = pollster::block_on(self.making()?.delete_groups(&[id], &self.options()));
            let deleted = deleted.map_err(|error| error::failed(format_args!("delete group {id}"), &error))?;
            match deleted.into_iter().next() {
                None | Some(Ok(_)) => return Ok(true),
                Some(Err((_, RDKafkaErrorCode::GroupIdNotFound))) => return Ok(false),
                Some(Err((_, code))) => {
                    let passing = matches!(code, RDKafkaErrorCode::NonEmptyGroup)
                        || error::code_kind(code) == ErrorKind::Unavailable;
                    if !passing || Instant::now() > deadline {
                        return Err(error::coded(format_args!("delete group {id}"), code));
                    }
                    rest(Duration::from_millis(50));
                }
            }
        }
    }
}

/// Between two looks at what librdkafka has said of its connections, while the first is waited for.
const LISTENING: Duration = Duration::from_millis(50);

/// What is looked at of it at a time.
const EVENTS: usize = 64;

/// How long who is refused tries on: several times, as connections are made anew.
const MERCY: Duration = Duration::from_millis(500);

/// How long the server may take to answer that it is there.
const LOOK: Duration = Duration::from_secs(1);

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Ending a client may wait for its connections.
        let clients = (self.asking.take(), self.making.take());
        let _ = thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(move || drop(clients));
    }
}

fn numbers(topic: &MetadataTopic) -> Vec<i32> {
    topic.partitions().iter().map(rdkafka::metadata::MetadataPartition::id).collect()
}

/// Where in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Beginning,
    End,
    /// Milliseconds since 1970.
    Time(i64),
}

/// A list as librdkafka wants it.
pub(crate) fn list<'a>(offsets: impl IntoIterator<Item = (&'a Partition, Offset)>) -> Result<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for ((topic, partition), offset) in offsets {
        let added = list.add_partition_offset(topic.as_str(), *partition, offset);
        added.map_err(|error| error::failed("make a list of partitions", &error))?;
    }
    Ok(list)
}
