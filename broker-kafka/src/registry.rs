//! What this process knows of the groups it works with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use broker_core::{Counts, Group, GroupSettings};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use crate::member::Member;

/// Groups and subscriptions of one broker value.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    groups: Mutex<FxHashMap<Group, Arc<Entry>>>,
    members: Mutex<Vec<Arc<Member>>>,
}

/// What the members of a group in this process share; a subscription without group has its own.
#[derive(Debug)]
pub(crate) struct Entry {
    settings: RwLock<GroupSettings>,
    pub(crate) counts: Counters,
    last_error: Mutex<Option<String>>,
}

/// [`Counts`] that many count.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) delivered: AtomicU64,
    pub(crate) acked: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) expired: AtomicU64,
}

impl Counters {
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        counts.delivered = self.delivered.load(Ordering::Relaxed);
        counts.acked = self.acked.load(Ordering::Relaxed);
        counts.retried = self.retried.load(Ordering::Relaxed);
        counts.dead_lettered = self.dead_lettered.load(Ordering::Relaxed);
        counts.expired = self.expired.load(Ordering::Relaxed);
        counts
    }
}

impl Entry {
    pub(crate) fn new(settings: GroupSettings) -> Self {
        Self { settings: RwLock::new(settings), counts: Counters::default(), last_error: Mutex::default() }
    }

    pub(crate) fn settings(&self) -> GroupSettings {
        self.settings.read().clone()
    }

    pub(crate) fn alter(&self, settings: GroupSettings) {
        *self.settings.write() = settings;
    }

    pub(crate) fn failed(&self, error: &str) {
        *self.last_error.lock() = Some(error.to_owned());
    }

    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }
}

impl Registry {
    pub(crate) fn group(&self, group: &Group) -> Option<Arc<Entry>> {
        self.groups.lock().get(group).cloned()
    }

    pub(crate) fn groups(&self) -> Vec<(Group, Arc<Entry>)> {
        let mut groups: Vec<_> =
            self.groups.lock().iter().map(|(group, entry)| (group.clone(), Arc::clone(entry))).collect();
        groups.sort_by(|(one, _), (two, _)| one.cmp(two));
        groups
    }

    /// The group's entry, which begins with `settings`.
    pub(crate) fn enter(&self, group: &Group, settings: GroupSettings) -> Arc<Entry> {
        Arc::clone(self.groups.lock().entry(group.clone()).or_insert_with(|| Arc::new(Entry::new(settings))))
    }

    pub(crate) fn forget(&self, group: &Group) {
        self.groups.lock().remove(group);
    }

    /// Adds a member, made with its number: the lowest that no other member of its group has here, so that a
    /// process that starts again gives the same numbers.
    pub(crate) fn add(&self, group: Option<&Group>, make: impl FnOnce(usize) -> Member) -> Arc<Member> {
        let mut members = self.members.lock();
        members.retain(|member| !member.is_finished());
        let taken =
            |number: &usize| members.iter().any(|member| member.group.as_ref() == group && member.number == *number);
        let number = (0..).find(|number| !taken(number)).unwrap_or_default();
        let member = Arc::new(make(number));
        members.push(Arc::clone(&member));
        member
    }

    /// Members whose thread still runs.
    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        self.members.lock().iter().filter(|member| !member.is_finished()).cloned().collect()
    }
}
