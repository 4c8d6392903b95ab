//! A group as the server keeps it: offsets, and in their metadata what is [stored](crate::stored).

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use broker_core::{Error, Group, GroupOptions, GroupSettings, Result, StartAt, Topic};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use crate::admin::{Admin, At, Partition, list};
use crate::client::{self, Context, Role};
use crate::error;
use crate::metadata::metadata;
use crate::progress::Progress;
use crate::stored::Stored;

/// What a group had committed in one partition.
pub(crate) struct Committed {
    pub(crate) partition: Partition,
    pub(crate) progress: Option<Progress>,
    stored: Option<Stored>,
}

/// Reads committed offsets.
pub(crate) fn read(list: &TopicPartitionList) -> Result<Vec<Committed>> {
    let mut committed = Vec::with_capacity(list.count());
    for (metadata, element) in metadata(list).iter().zip(list.elements()) {
        element.error().map_err(|error| error::failed("ask for the group's offsets", &error))?;
        let stored = Stored::read(metadata);
        let progress = match element.offset() {
            Offset::Offset(offset) => {
                let bare = || Progress { watermark: offset, ..Progress::default() };
                Some(stored.as_ref().map_or_else(bare, |stored| stored.progress(offset)))
            }
            _ => None,
        };
        committed.push(Committed { partition: (Topic::new(element.topic())?, element.partition()), progress, stored });
    }
    Ok(committed)
}

/// A client that speaks for a group without being a member.
pub(crate) struct GroupClient {
    admin: Arc<Admin>,
    id: String,
    consumer: Option<BaseConsumer<Context>>,
}

impl GroupClient {
    pub(crate) fn new(admin: &Arc<Admin>, id: &str) -> Result<Self> {
        let mut settings = client::settings(admin.config(), &[("group.id", id), ("enable.auto.commit", "false")]);
        client::hand_on(&mut settings, admin.config(), Role::Admin);
        let consumer = BaseConsumer::from_config_and_context(&settings, admin.context());
        let consumer = consumer.map_err(|error| client::not_made(&error))?;
        Ok(Self { admin: Arc::clone(admin), id: id.to_owned(), consumer: Some(consumer) })
    }

    fn consumer(&self) -> Result<&BaseConsumer<Context>> {
        self.consumer.as_ref().ok_or_else(|| Error::closed("the client has ended"))
    }

    pub(crate) fn committed(&self, partitions: &[Partition]) -> Result<Vec<Committed>> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        self.admin.patiently(|left| self.ask_committed(partitions, left))
    }

    fn ask_committed(&self, partitions: &[Partition], timeout: Duration) -> Result<Vec<Committed>> {
        let list = list(partitions.iter().map(|partition| (partition, Offset::Invalid)))?;
        let answer = self.consumer()?.committed_offsets(list, timeout);
        let explain = |error| self.admin.health().explain(error::failed("ask for the group's offsets", &error));
        read(&answer.map_err(explain)?)
    }

    /// Commits as nobody: the server takes it only while the group has no members.
    pub(crate) fn commit(&self, stored: &Stored, offsets: &[(Partition, Progress)]) -> Result<()> {
        let list = commit_list(stored, offsets)?;
        if list.count() == 0 {
            return Ok(());
        }
        self.admin.patiently(|_| self.send(&list))
    }

    fn send(&self, list: &TopicPartitionList) -> Result<()> {
        match self.consumer()?.commit(list, CommitMode::Sync) {
            Ok(()) => Ok(()),
            Err(KafkaError::ConsumerCommit(
                RDKafkaErrorCode::UnknownMemberId | RDKafkaErrorCode::IllegalGeneration,
            )) => Err(Error::conflict(format!("group {} has members: stop them first", self.id))),
            Err(error) => Err(self.admin.health().explain(error::failed("commit", &error))),
        }
    }
}

impl Drop for GroupClient {
    fn drop(&mut self) {
        let consumer = self.consumer.take();
        let _ = thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(move || drop(consumer));
    }
}

/// The offsets of a commit, with their metadata.
pub(crate) fn commit_list(stored: &Stored, offsets: &[(Partition, Progress)]) -> Result<TopicPartitionList> {
    let mut out = TopicPartitionList::with_capacity(offsets.len());
    for ((topic, partition), progress) in offsets {
        let mut element = out.add_partition(topic.as_str(), *partition);
        let set = element.set_offset(Offset::Offset(progress.watermark));
        set.map_err(|error| error::failed("make a commit", &error))?;
        element.set_metadata(stored.metadata(progress)?);
    }
    Ok(out)
}

/// A group that stands.
pub(crate) struct Standing {
    pub(crate) created: bool,
    pub(crate) settings: GroupSettings,
}

/// Finds the group, or creates it by committing where it starts. `known` are the settings, if this
/// process knows them.
pub(crate) fn ensure(
    admin: &Arc<Admin>,
    group: &Group,
    options: &GroupOptions,
    known: Option<GroupSettings>,
) -> Result<Standing> {
    let settings = options.resolve(Some(&group.name))?;
    let stored = Stored::new(&settings);
    stored.room()?;
    if let Some(topic) = group.filter.topic() {
        admin.ensure_topic(&topic)?;
    }
    let partitions = admin.matching(&group.filter)?;
    // The start is looked up before the group is looked for: should another create it in between, and
    // ours be taken last, ours is the earlier one, and nothing is lost.
    let start = start_offsets(admin, &partitions, &settings.start)?;
    let client = GroupClient::new(admin, &admin.config().group_id(group))?;
    let committed = client.committed(&partitions)?;
    let existing = committed.iter().any(|one| one.progress.is_some());
    // A pattern's group stands before there is a topic for it to be anywhere in. Another that is nowhere was deleted by somebody
    // else, or has expired, whatever this process knows.
    if existing || (known.is_some() && group.filter.is_pattern()) {
        let stored = committed.iter().find_map(|one| one.stored.as_ref()).map(Stored::settings).transpose()?;
        return match known.or(stored) {
            Some(have) => {
                options.check_joins(group, &have)?;
                Ok(Standing { created: false, settings: have })
            }
            // Somebody else's group, adopted: it has what the first member asks for.
            None => Ok(Standing { created: false, settings }),
        };
    }
    let offsets: Vec<_> = start
        .into_iter()
        .map(|(partition, watermark)| (partition, Progress { watermark, ..Progress::default() }))
        .collect();
    match client.commit(&stored, &offsets) {
        Ok(()) => Ok(Standing { created: true, settings }),
        // It has members already, who created it meanwhile.
        Err(error) if error.kind() == broker_core::ErrorKind::Conflict => Ok(Standing { created: false, settings }),
        Err(error) => Err(error),
    }
}

/// The settings of a group that has committed; the defaults if it is somebody else's.
///
/// # Errors
///
/// [`NotFound`](broker_core::ErrorKind::NotFound) if it has committed nothing.
pub(crate) fn found(committed: Vec<Committed>, group: &Group) -> Result<GroupSettings> {
    if committed.iter().all(|one| one.progress.is_none()) {
        return Err(Error::not_found(format!("group {group} does not exist")));
    }
    match committed.iter().find_map(|one| one.stored.as_ref()) {
        Some(stored) => stored.settings(),
        None => GroupOptions::new().resolve(Some(&group.name)),
    }
}

/// Where `start` is in each partition.
pub(crate) fn start_offsets(admin: &Admin, partitions: &[Partition], start: &StartAt) -> Result<Vec<(Partition, i64)>> {
    match start {
        StartAt::New => admin.offsets(partitions, At::End),
        StartAt::Earliest => admin.offsets(partitions, At::Beginning),
        StartAt::Time(time) => admin.offsets(partitions, At::Time(time.as_millis())),
        StartAt::Position(positions) => {
            if let Some((_, offset)) = positions.iter().find(|(_, offset)| *offset < 0) {
                return Err(Error::invalid(format!("start position {offset}: an offset is 0 or more")));
            }
            // Of a pattern no topic of which is there yet nothing can be told.
            let there = |number: i32| partitions.is_empty() || partitions.iter().any(|(_, one)| *one == number);
            if let Some((number, _)) = positions.iter().find(|(number, _)| !there(*number)) {
                let count = partitions.iter().map(|(_, one)| one + 1).max().unwrap_or(0);
                let why = format!("start position in partition {number}: there are {count} partitions, from 0 on");
                return Err(Error::invalid(why));
            }
            // A partition that is not named is read from its beginning: nothing is skipped unasked.
            let mut offsets = admin.offsets(partitions, At::Beginning)?;
            let ends = admin.offsets(partitions, At::End)?;
            for (partition, offset) in &mut offsets {
                let Some((_, wanted)) = positions.iter().find(|(number, _)| *number == partition.1) else { continue };
                // To Kafka an offset that is not there yet is a mistake, and what it was to mean is lost.
                if let Some((_, end)) = ends.iter().find(|(one, end)| one == partition && end < wanted) {
                    let (topic, number) = partition;
                    let why = format!("start position {wanted}: partition {number} of {topic} ends at {end}");
                    return Err(Error::invalid(why));
                }
                *offset = *wanted;
            }
            Ok(offsets)
        }
        _ => Err(Error::unsupported(format!("start {start}: Kafka has new, earliest, a time and positions"))),
    }
}
