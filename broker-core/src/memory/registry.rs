//! Every topic, log and group by name.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Shared;
use super::entry::{Entry, Place};
use super::group::Group;
use super::log::Log;
use super::topics::{TopicState, closed};
use super::trie::HasFilter;
use crate::{
    Error, Group as GroupId, GroupName, GroupOptions, GroupSettings, Result, StartAt, Timestamp, Topic, TopicFilter,
};

/// Topics are forgotten when nothing depends on them; looked at when there are twice as many as
/// after the last look, and no sooner than this.
const FIRST_SWEEP: usize = 1024;

#[derive(Default)]
pub(super) struct Registry {
    topics: HashMap<Topic, Arc<TopicState>>,
    sweep_at: usize,
    /// The highest place in the past of topics that were forgotten.
    forgotten: Option<Place>,
    /// The logs of patterns; that of a topic is the topic's.
    patterns: HashMap<TopicFilter, Arc<Log>>,
    last_log: u64,
    groups: HashMap<GroupId, Arc<Group>>,
    /// Subscriptions without group, by address.
    solos: HashMap<usize, Arc<Group>>,
}

impl HasFilter for Arc<Log> {
    fn filter(&self) -> &TopicFilter {
        &self.filter
    }
}

impl Shared {
    /// The topic called `name`, made on first use.
    pub(super) fn topic(&self, name: &Topic) -> Arc<TopicState> {
        self.registry.lock().topic(name, self.clock.tick())
    }

    /// The topic called `name`, if it was used.
    pub(super) fn known_topic(&self, name: &Topic) -> Option<Arc<TopicState>> {
        self.registry.lock().topics.get(name).map(Arc::clone)
    }

    /// Joins a group or makes it, whichever it is; tells whether it was made. Without a name it is
    /// always made.
    pub(super) fn group(
        self: &Arc<Self>,
        name: Option<&GroupName>,
        filter: &TopicFilter,
        options: &GroupOptions,
    ) -> Result<(Arc<Group>, bool)> {
        let settings = options.resolve(name)?;
        self.check_start(&settings.start)?;
        let id = name.map(|name| GroupId::new(name.clone(), filter.clone()));
        let mut registry = self.registry.lock();
        // Under the lock: after `close` has listed the groups, none is added.
        if !self.is_open() {
            return Err(closed());
        }
        if let Some((id, group)) = id.as_ref().and_then(|id| Some((id, registry.groups.get(id)?))) {
            options.check_joins(id, &group.settings())?;
            return Ok((Arc::clone(group), false));
        }
        let group = registry.make_group(self, id, filter, settings);
        Ok((group, true))
    }

    fn check_start(&self, start: &StartAt) -> Result<()> {
        match start {
            StartAt::New => Ok(()),
            StartAt::Position(_) => Err(Error::unsupported(
                "the in-process broker has no positions to start at: use new, earliest or a time",
            )),
            _ if self.options.retention.is_none() => Err(Error::unsupported(format!(
                "start {start}: this broker retains nothing; open it as memory:?retain=MESSAGES, or start at new"
            ))),
            _ => Ok(()),
        }
    }

    /// The group called `id`.
    pub(super) fn find_group(&self, id: &GroupId) -> Result<Arc<Group>> {
        let registry = self.registry.lock();
        let group = registry.groups.get(id).map(Arc::clone);
        group.ok_or_else(|| Error::not_found(format!("group {id} does not exist")))
    }

    /// The group called `id`, to change it: a closed broker changes nothing.
    pub(super) fn open_group(&self, id: &GroupId) -> Result<Arc<Group>> {
        if self.is_open() { self.find_group(id) } else { Err(closed()) }
    }

    /// Deletes the group called `id`; false if there is none.
    pub(super) fn remove_group(&self, id: &GroupId) -> bool {
        let Some(group) = self.registry.lock().groups.remove(id) else { return false };
        self.retire(&group);
        self.bound_letters(id);
        true
    }

    /// Has the dead letters of a group that is no more count among those of all such groups.
    pub(super) fn bound_letters(&self, id: &GroupId) {
        self.keeps.deleted(id, |other| self.registry.lock().groups.contains_key(other));
    }

    /// A subscription without group has ended.
    pub(super) fn remove_solo(&self, group: &Arc<Group>) {
        self.registry.lock().solos.remove(&address(group));
        self.retire(group);
    }

    fn retire(&self, group: &Arc<Group>) {
        if !group.delete() || !group.filter().is_pattern() {
            return;
        }
        let mut registry = self.registry.lock();
        // Another group may have come to the same filter since.
        let filter = group.filter();
        if registry.patterns.get(filter).is_some_and(|log| log.lock().readers() == 0) {
            registry.patterns.remove(filter);
            self.patterns.write().remove(filter);
            self.patterns_version.fetch_add(1, Ordering::Release);
        }
    }

    /// Every group, those of subscriptions without group included.
    pub(super) fn all_groups(&self) -> Vec<Arc<Group>> {
        let registry = self.registry.lock();
        registry.groups.values().chain(registry.solos.values()).map(Arc::clone).collect()
    }

    /// Every topic.
    pub(super) fn all_topics(&self) -> Vec<Arc<TopicState>> {
        self.registry.lock().topics.values().map(Arc::clone).collect()
    }

    /// Forgets everything: groups, logs and topics refer to each other.
    pub(super) fn clear(&self) {
        let registry = std::mem::take(&mut *self.registry.lock());
        *self.patterns.write() = Default::default();
        for group in registry.groups.values().chain(registry.solos.values()) {
            group.delete();
        }
    }
}

impl Registry {
    fn topic(&mut self, name: &Topic, now: u64) -> Arc<TopicState> {
        if let Some(topic) = self.topics.get(name) {
            return Arc::clone(topic);
        }
        if self.topics.len() >= self.sweep_at.max(FIRST_SWEEP) {
            self.topics.retain(|_, topic| {
                let kept = Arc::strong_count(topic) > 1 || !topic.is_idle(now);
                if !kept {
                    self.forgotten = self.forgotten.max(topic.highest_place());
                }
                kept
            });
            self.sweep_at = self.topics.len() * 2;
        }
        let topic = TopicState::new(name.clone());
        self.topics.insert(name.clone(), Arc::clone(&topic));
        topic
    }

    fn make_group(
        &mut self,
        shared: &Arc<Shared>,
        id: Option<GroupId>,
        filter: &TopicFilter,
        settings: GroupSettings,
    ) -> Arc<Group> {
        let start = settings.start.clone();
        let log = self.log(filter, shared.clock.tick());
        let group = Group::new(shared, id.clone(), settings, &log);
        if filter.is_pattern() && !self.patterns.contains_key(filter) {
            // It has a reader now: what is published from here on has somewhere to go.
            self.patterns.insert(filter.clone(), Arc::clone(&log));
            shared.patterns.write().insert(filter, log);
            shared.patterns_version.fetch_add(1, Ordering::Release);
        }
        if start != StartAt::New {
            self.replay(shared, &group, &start);
        }
        match id {
            Some(id) => self.groups.insert(id, Arc::clone(&group)),
            None => self.solos.insert(address(&group), Arc::clone(&group)),
        };
        group
    }

    /// The log of `filter`, made on first use.
    fn log(&mut self, filter: &TopicFilter, now: u64) -> Arc<Log> {
        if let Some(log) = self.patterns.get(filter) {
            return Arc::clone(log);
        }
        self.last_log += 1;
        let id = self.last_log;
        let make = || Log::new(id, filter.clone());
        match filter.topic() {
            Some(topic) => Arc::clone(self.topic(&topic, now).own(make)),
            None => make(),
        }
    }

    /// Gives a new group what matching topics retain. Each topic is linked first, so that nothing
    /// falls between; what comes twice, the group tells apart.
    fn replay(&self, shared: &Arc<Shared>, group: &Group, start: &StartAt) {
        let since = match start {
            StartAt::Time(time) => *time,
            _ => Timestamp::from_millis(i64::MIN),
        };
        let mut past: Vec<Arc<Entry>> = Vec::new();
        let filter = group.filter();
        // A topic that comes again has nothing from before it was forgotten; others may.
        let mut missing = self.forgotten.filter(|_| filter.is_pattern());
        let exact = filter.topic().and_then(|topic| self.topics.get(&topic));
        let many = self.topics.values().filter(|topic| filter.is_pattern() && filter.matches(&topic.topic));
        for topic in exact.into_iter().chain(many) {
            topic.link(shared, |history| {
                past.extend(history.since(since).map(Arc::clone));
                missing = missing.max(history.missing());
            });
        }
        group.replay(past, missing);
    }
}

fn address(group: &Arc<Group>) -> usize {
    Arc::as_ptr(group) as usize
}
