//! The dead letters of a group: listed, dropped, given to it again.
//!
//! They lie on the dead-letter topic, which groups of one name share, so that none can be deleted for
//! one group alone. What a group has dropped or redriven is remembered as the offsets of a second
//! consumer group, which never has members: `dead-letters:NAME@FILTER`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{DeadLetter, Error, Group, Result, Topic, TopicFilter};
use rdkafka::Offset;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::Message as _;
use rustc_hash::FxHashMap;

use crate::admin::{Admin, At, Partition, list};
use crate::batch::Record;
use crate::client::{self, Context, Role};
use crate::group::GroupClient;
use crate::progress::Progress;
use crate::publishing::Publishing;
use crate::record::{Copies, Format};
use crate::stored::Stored;
use crate::{error, wire};

/// Where a letter goes, and the one reader that it is for there; `None` if there is nowhere to send it, or it is there.
///
/// One that fails again is kept, not sent round. So it is written for its group's list alone, which shows every letter of
/// the group; whoever reads the topic passes over it. A group that reads its own dead-letter topic has it in its list.
pub(crate) fn burial(letter: &DeadLetter, topic: Option<&Topic>) -> Option<(Topic, Option<String>)> {
    let topic = topic?;
    if !DeadLetter::is_dead(&letter.message) && *topic != letter.topic {
        return Some((topic.clone(), None));
    }
    let group = letter.group.as_ref()?;
    let is_its_own = |before: DeadLetter| before.group.as_ref() == Some(group);
    let is_listed = *topic == letter.topic && DeadLetter::from_message(letter.message.clone()).is_ok_and(is_its_own);
    // No group has a name like that.
    (!is_listed).then(|| (topic.clone(), Some(format!("dead-letters:{group}"))))
}

/// Where a group's dead letters are.
pub(crate) struct Grave {
    admin: Arc<Admin>,
    group: Group,
    topic: Topic,
    stored: Stored,
    keeper: GroupClient,
}

/// A dead letter and where it lies.
struct Kept {
    partition: i32,
    offset: i64,
    letter: DeadLetter,
}

/// What is not read yet, each partition to where it ended when somebody asked: a letter that is redriven and dies again
/// comes after that.
struct Left {
    from: FxHashMap<Partition, i64>,
    end: Vec<(Partition, i64)>,
}

/// Letters of one partition.
#[derive(Default)]
struct Found {
    letters: VecDeque<Kept>,
    bytes: usize,
    /// There may be more.
    cut: bool,
}

/// So many bytes of dead letters are in memory at a time, and of each partition a message more, however many are
/// asked for.
const PAGE: usize = 16 * 1024 * 1024;

impl Grave {
    /// `stored` are the group's settings, `topic` the dead-letter topic among them.
    pub(crate) fn new(admin: &Arc<Admin>, group: &Group, topic: Topic, stored: Stored) -> Result<Self> {
        let keeper = GroupClient::new(admin, &format!("dead-letters:{}", admin.config().group_id(group)))?;
        Ok(Self { admin: Arc::clone(admin), group: group.clone(), topic, stored, keeper })
    }

    /// The oldest `max`; fewer, but one, where they are large.
    pub(crate) fn letters(&self, max: usize) -> Result<Vec<DeadLetter>> {
        let page = self.page(&mut self.kept()?, max)?;
        Ok(page.into_iter().map(|kept| kept.letter).collect())
    }

    /// Forgets all there are now; tells how many.
    pub(crate) fn purge(&self) -> Result<u64> {
        let (kept, mut count) = (self.kept()?, 0);
        self.scan(&kept, |_| {
            count += 1;
            true
        })?;
        self.forget(kept.end)?;
        Ok(count)
    }

    /// Publishes the oldest `max` of those there are now to where they came from, for the group alone; tells how many.
    pub(crate) fn redrive(&self, publishing: &Publishing, max: u64) -> Result<u64> {
        let (mut kept, mut redriven) = (self.kept()?, 0);
        while redriven < max {
            let room = usize::try_from(max - redriven).unwrap_or(usize::MAX);
            let failed = match self.page(&mut kept, room) {
                Ok(page) if page.is_empty() => break,
                Ok(page) => {
                    let (of_page, failed) = self.give(publishing, page)?;
                    redriven += of_page;
                    failed
                }
                Err(error) => Some(error),
            };
            if let Some(error) = failed {
                return if redriven == 0 { Err(error) } else { Ok(redriven) };
            }
        }
        Ok(redriven)
    }

    /// Publishes these, and forgets them; tells how many, and why one is not among them.
    fn give(&self, publishing: &Publishing, letters: Vec<Kept>) -> Result<(u64, Option<Error>)> {
        let group = self.group.to_string();
        let mut publishes = Vec::with_capacity(letters.len());
        for Kept { partition, offset, letter } in letters {
            let topic = publishing.topic(&letter.topic);
            publishes.push((partition, offset, publishing.publish_for(&topic, letter.message, &group)));
        }
        let (mut redriven, mut failed) = (0, None);
        let mut forgotten: FxHashMap<i32, i64> = FxHashMap::default();
        let mut stopped = Vec::new();
        for (partition, offset, publish) in publishes {
            match pollster::block_on(publish) {
                // What comes after one that failed is kept, and may come twice: none is lost.
                Ok(_) if stopped.contains(&partition) => redriven += 1,
                Ok(_) => {
                    redriven += 1;
                    forgotten.insert(partition, offset + 1);
                }
                Err(error) => {
                    stopped.push(partition);
                    failed = Some(error);
                }
            }
        }
        self.forget(forgotten.into_iter().map(|(number, offset)| ((self.topic.clone(), number), offset)).collect())?;
        Ok((redriven, failed))
    }

    /// The oldest of what is left, `max` at most and about [`PAGE`] bytes, which are then not left any more.
    fn page(&self, left: &mut Left, max: usize) -> Result<Vec<Kept>> {
        let unread = left.end.iter().filter(|(partition, end)| left.from.get(partition).is_some_and(|from| from < end));
        let share = PAGE / unread.count().max(1);
        let mut found: FxHashMap<i32, Found> = FxHashMap::default();
        if max > 0 {
            self.scan(left, |kept| {
                let found = found.entry(kept.partition).or_default();
                found.bytes += kept.letter.message.size();
                found.letters.push_back(kept);
                found.cut = found.bytes >= share || found.letters.len() >= max;
                !found.cut
            })?;
        }
        // Merged by time, each partition in its order: what is taken is the beginning of each.
        let mut page = Vec::new();
        while page.len() < max {
            // What comes next in a partition that was not read to its end may be older than all others.
            if found.values().any(|found| found.cut && found.letters.is_empty()) {
                break;
            }
            let first = found
                .values_mut()
                .filter_map(|found| found.letters.front().map(|kept| kept.letter.last).map(|last| (last, found)))
                .min_by_key(|(last, _)| *last);
            let Some(kept) = first.and_then(|(_, found)| found.letters.pop_front()) else { break };
            left.from.insert((self.topic.clone(), kept.partition), kept.offset + 1);
            page.push(kept);
        }
        if found.values().all(|found| !found.cut && found.letters.is_empty()) {
            left.from = left.end.iter().cloned().collect();
        }
        Ok(page)
    }

    fn forget(&self, offsets: Vec<(Partition, i64)>) -> Result<()> {
        let offsets: Vec<_> = offsets
            .into_iter()
            .map(|(partition, watermark)| (partition, Progress { watermark, ..Progress::default() }))
            .collect();
        self.keeper.commit(&self.stored, &offsets)
    }

    /// What is kept now.
    fn kept(&self) -> Result<Left> {
        let partitions = self.admin.matching(&TopicFilter::from(&self.topic))?;
        let end = self.admin.offsets(&partitions, At::End)?;
        let mut from: FxHashMap<Partition, i64> = self.admin.offsets(&partitions, At::Beginning)?.into_iter().collect();
        for committed in self.keeper.committed(&partitions)? {
            if let (Some(from), Some(progress)) = (from.get_mut(&committed.partition), committed.progress) {
                *from = progress.watermark.max(*from);
            }
        }
        Ok(Left { from, end })
    }

    /// Shows every letter of the group that is left to `visit`, each partition in order, until it says false for the
    /// partition.
    fn scan(&self, left: &Left, mut visit: impl FnMut(Kept) -> bool) -> Result<()> {
        let Left { from, end } = left;
        let mut open: FxHashMap<i32, i64> = end
            .iter()
            .filter(|(partition, end)| from.get(partition).is_some_and(|from| from < end))
            .map(|((_, number), end)| (*number, *end))
            .collect();
        if open.is_empty() {
            return Ok(());
        }
        let consumer = self.consumer()?;
        let assigned = from.iter().filter(|((_, number), _)| open.contains_key(number));
        let assigned = list(assigned.map(|(partition, offset)| (partition, Offset::Offset(*offset))))?;
        consumer.assign(&assigned).map_err(|error| error::failed("read the dead letters", &error))?;
        let patience = self.admin.config().connect_timeout;
        let mut deadline = Instant::now() + patience;
        while !open.is_empty() {
            if Instant::now() > deadline {
                return Err(Error::timeout("the dead letters could not be read"));
            }
            match consumer.poll(Duration::from_millis(100)) {
                None => continue,
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(open.remove(&partition)),
                Some(Err(error)) => return Err(error::failed("read the dead letters", &error)),
                Some(Ok(record)) => {
                    let (partition, offset) = (record.partition(), record.offset());
                    let Some(end) = open.get(&partition).copied() else { continue };
                    let more = offset >= end
                        || self.letter(&record).is_none_or(|letter| visit(Kept { partition, offset, letter }));
                    if !more || offset + 1 >= end {
                        open.remove(&partition);
                    }
                }
            }
            deadline = Instant::now() + patience;
        }
        Ok(())
    }

    /// The dead letter that a record is, if it is one of the group's.
    fn letter(&self, record: &rdkafka::message::BorrowedMessage<'_>) -> Option<DeadLetter> {
        let decoded = wire::decode(&*Record::of(record)?, Format::Native, &mut Copies::default());
        let letter = DeadLetter::from_message(decoded.message).ok()?;
        (decoded.problem.is_none() && letter.group.as_ref() == Some(&self.group)).then_some(letter)
    }

    fn consumer(&self) -> Result<BaseConsumer<Context>> {
        let mut settings = client::settings(
            self.admin.config(),
            &[
                ("group.id", "broker-no-group"),
                ("enable.auto.commit", "false"),
                ("enable.partition.eof", "true"),
                ("auto.offset.reset", "earliest"),
                ("fetch.wait.max.ms", "50"),
                // What is fetched ahead lies in memory, too.
                ("queued.max.messages.kbytes", "16384"),
            ],
        );
        client::hand_on(&mut settings, self.admin.config(), Role::Consumer);
        let consumer = BaseConsumer::from_config_and_context(&settings, self.admin.context());
        consumer.map_err(|error| client::not_made(&error))
    }
}

#[cfg(test)]
mod tests {
    use broker_core::{Failure, Message, Timestamp};

    use super::*;

    #[test]
    fn a_letter_is_sent_to_its_topic_once_and_kept_there_if_it_fails_again() {
        let letter = |group: Option<&str>, topic: &str, message: Message| DeadLetter {
            message,
            topic: topic.parse().unwrap(),
            group: group.map(|group| group.parse().unwrap()),
            failure: Failure::new("no"),
            attempts: 1,
            first: Timestamp::from_millis(1),
            last: Timestamp::from_millis(2),
        };
        let (billing, ops) = (Some("billing@>"), Some("ops@dead.billing"));
        let plain = || Message::new("1");
        let dead = || letter(billing, "orders", plain()).into_message();
        let marked = || plain().with_header("broker-dead-reason", "elsewhere").unwrap();
        let (of_billing, of_ops) = (Some("dead-letters:billing@>"), Some("dead-letters:ops@dead.billing"));
        for (letter, topic, expected) in [
            (letter(billing, "orders", plain()), "dead.billing", Some(None)),
            (letter(None, "orders", plain()), "dead.billing", Some(None)),
            // Of another group, or marked by nobody we know: it is not in the list.
            (letter(ops, "dead.billing", dead()), "dead.ops", Some(of_ops)),
            (letter(billing, "orders", marked()), "dead.billing", Some(of_billing)),
            (letter(billing, "dead.billing", marked()), "dead.billing", Some(of_billing)),
            (letter(billing, "dead.billing", plain()), "dead.billing", Some(of_billing)),
            (letter(ops, "dead.billing", dead()), "dead.billing", Some(of_ops)),
            // It is.
            (letter(billing, "dead.billing", dead()), "dead.billing", None),
            // Nobody could list it.
            (letter(None, "dead.billing", dead()), "dead.ops", None),
        ] {
            let topic: Topic = topic.parse().unwrap();
            let burial = burial(&letter, Some(&topic));
            let expected = expected.map(|to: Option<&str>| (topic.clone(), to.map(str::to_owned)));
            assert_eq!(burial, expected, "{letter:?}");
        }
        assert_eq!(burial(&letter(billing, "orders", plain()), None), None);
    }
}
