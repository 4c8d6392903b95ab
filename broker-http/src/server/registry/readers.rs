//! The streams that read as members of groups.

use std::collections::HashMap;
use std::sync::Arc;

use broker_core::Group;
use parking_lot::Mutex;

use super::super::Shared;

/// How many streams read each group, by those that are read.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<HashMap<Group, usize>>);

impl Readers {
    /// Whether a stream reads this group.
    pub(super) fn read(&self, group: &Group) -> bool {
        self.0.lock().contains_key(group)
    }
}

/// A stream that reads as a member of a group, for as long as it stands: the subscriptions that are pulled from the group
/// are in use.
pub(crate) struct Reading {
    shared: Arc<Shared>,
    group: Group,
}

impl Reading {
    pub(crate) fn begin(shared: &Arc<Shared>, group: Group) -> Self {
        *shared.registry.readers.0.lock().entry(group.clone()).or_default() += 1;
        Self { shared: Arc::clone(shared), group }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let registry = &self.shared.registry;
        // Their time begins before they can be seen to be out of use.
        registry.used(&self.group);
        let mut readers = registry.readers.0.lock();
        if let Some(count) = readers.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.group);
            }
        }
    }
}
