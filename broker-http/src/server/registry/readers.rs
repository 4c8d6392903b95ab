//! The streams that read as members of groups.

use std::collections::HashMap;
use std::sync::Arc;

use broker_core::Group;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::super::Shared;

/// The groups that streams read.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<HashMap<Group, Read>>);

#[derive(Debug, Default)]
struct Read {
    streams: usize,
    /// Told when a subscription of the group is made, paused, resumed or deleted.
    changes: watch::Sender<()>,
}

impl Readers {
    /// Whether a stream reads this group.
    pub(super) fn read(&self, group: &Group) -> bool {
        self.0.lock().contains_key(group)
    }

    /// Tells those who read this group that its subscriptions have changed.
    pub(super) fn tell(&self, group: &Group) {
        if let Some(read) = self.0.lock().get(group) {
            read.changes.send_replace(());
        }
    }
}

/// A stream that reads as a member of a group, for as long as it stands: the subscriptions that are pulled from the group
/// are in use.
pub(crate) struct Reading {
    shared: Arc<Shared>,
    group: Group,
    changes: watch::Receiver<()>,
}

impl Reading {
    pub(crate) fn begin(shared: &Arc<Shared>, group: Group) -> Self {
        let mut readers = shared.registry.readers.0.lock();
        let read = readers.entry(group.clone()).or_default();
        read.streams += 1;
        let changes = read.changes.subscribe();
        drop(readers);
        Self { shared: Arc::clone(shared), group, changes }
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// Told when a subscription of the group is made, paused, resumed or deleted.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.clone()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let registry = &self.shared.registry;
        // Their time begins before they can be seen to be out of use.
        registry.used(&self.group);
        let mut readers = registry.readers.0.lock();
        if let Some(read) = readers.get_mut(&self.group) {
            read.streams -= 1;
            if read.streams == 0 {
                readers.remove(&self.group);
            }
        }
    }
}
