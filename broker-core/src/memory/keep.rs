//! Dead letters, kept: bounded for a group, the oldest dropped and counted; and bounded for all groups
//! that were deleted, which together may keep what one group may.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

use crate::{DeadLetter, Group, MessageId};

/// What every group gave up on.
pub(super) struct Keeps {
    max_messages: usize,
    max_bytes: u64,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    groups: HashMap<Group, Keep>,
    /// Those of `groups` that were deleted, in that order; one that was made anew may still be here.
    deleted: VecDeque<Group>,
}

#[derive(Default)]
struct Keep {
    letters: VecDeque<DeadLetter>,
    bytes: u64,
    dropped: u64,
}

impl Keep {
    fn pop(&mut self) -> Option<DeadLetter> {
        let letter = self.letters.pop_front()?;
        self.bytes -= letter.message.size() as u64;
        Some(letter)
    }
}

impl Keeps {
    pub(super) fn new(max_messages: usize, max_bytes: u64) -> Self {
        Self { max_messages, max_bytes, kept: Mutex::default() }
    }

    pub(super) fn push(&self, group: &Group, letter: DeadLetter) {
        let mut kept = self.kept.lock();
        let keep = kept.groups.entry(group.clone()).or_default();
        keep.bytes += letter.message.size() as u64;
        keep.letters.push_back(letter);
        while keep.letters.len() > self.max_messages || keep.bytes > self.max_bytes {
            if keep.pop().is_none() {
                break;
            }
            keep.dropped += 1;
            if keep.dropped.is_power_of_two() {
                tracing::warn!(%group, dropped = keep.dropped, "dead letters are at their bound; the oldest was dropped");
            }
        }
    }

    /// A group was deleted; `stands` tells of others whether they were made anew.
    pub(super) fn deleted(&self, group: &Group, stands: impl Fn(&Group) -> bool) {
        let mut kept = self.kept.lock();
        let Kept { groups, deleted } = &mut *kept;
        if !groups.contains_key(group) {
            return;
        }
        deleted.retain(|other| other != group && groups.contains_key(other) && !stands(other));
        deleted.push_back(group.clone());
        let sizes = deleted.iter().filter_map(|group| groups.get(group)).map(|keep| (keep.letters.len(), keep.bytes));
        let (mut letters, mut bytes) = sizes.fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1));
        while letters > self.max_messages || bytes > self.max_bytes {
            let Some(oldest) = deleted.pop_front() else { return };
            let Some(keep) = groups.remove(&oldest) else { continue };
            letters -= keep.letters.len();
            bytes -= keep.bytes;
            tracing::warn!(group = %oldest, dropped = keep.letters.len(), "dead letters of deleted groups are at their bound; those of the group deleted first were dropped");
        }
    }

    pub(super) fn list(&self, group: &Group, max: usize) -> Vec<DeadLetter> {
        self.kept
            .lock()
            .groups
            .get(group)
            .map_or_else(Vec::new, |keep| keep.letters.iter().take(max).cloned().collect())
    }

    pub(super) fn take(&self, group: &Group, max: u64) -> Vec<DeadLetter> {
        let mut kept = self.kept.lock();
        let Some(keep) = kept.groups.get_mut(group) else { return Vec::new() };
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(keep.letters.len());
        let letters = (0..max).map_while(|_| keep.pop()).collect();
        if keep.letters.is_empty() {
            kept.groups.remove(group);
        }
        letters
    }

    /// Whether a letter of this message is kept for the group.
    pub(super) fn holds(&self, group: &Group, message: &MessageId) -> bool {
        let kept = self.kept.lock();
        kept.groups.get(group).is_some_and(|keep| keep.letters.iter().any(|letter| letter.message.id() == message))
    }

    pub(super) fn count(&self, group: &Group) -> u64 {
        self.kept.lock().groups.get(group).map_or(0, |keep| keep.letters.len() as u64)
    }

    pub(super) fn total(&self) -> u64 {
        self.kept.lock().groups.values().map(|keep| keep.letters.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Failure, Message, Timestamp, Topic};

    fn group(name: &str) -> Group {
        Group::new(name.parse().unwrap(), "a".parse().unwrap())
    }

    #[test]
    fn deleted_groups_keep_together_what_one_may() {
        let keeps = Keeps::new(10, 1_000_000);
        let fill = |name: &str, count: usize| {
            for _ in 0..count {
                keeps.push(&group(name), letter());
            }
        };
        fill("alive", 10);
        for index in 0..100 {
            let name = format!("g{index}");
            fill(&name, 3);
            keeps.deleted(&group(&name), |_| false);
        }
        let counts = |names: &[&str]| names.iter().map(|name| keeps.count(&group(name))).collect::<Vec<_>>();
        assert_eq!(counts(&["alive", "g95", "g96", "g97", "g98", "g99"]), [10, 0, 0, 3, 3, 3]);
        assert_eq!((keeps.total(), keeps.kept.lock().deleted.len()), (19, 3));
        // One that was made anew has its own bound again, and one without letters takes no place.
        keeps.deleted(&group("none"), |_| false);
        fill("h", 4);
        keeps.deleted(&group("h"), |other| other == &group("g97"));
        assert_eq!(counts(&["g97", "g98", "g99", "h"]), [3, 3, 3, 4]);
        let bytes = letter().message.size() as u64;
        let keeps = Keeps::new(10, bytes * 2);
        for name in ["a", "b", "c"] {
            keeps.push(&group(name), letter());
            keeps.deleted(&group(name), |_| false);
        }
        assert_eq!(["a", "b", "c"].map(|name| keeps.count(&group(name))), [0, 1, 1]);
    }

    fn letter() -> DeadLetter {
        let now = Timestamp::now();
        let (topic, failure) = (Topic::new("a").unwrap(), Failure::new("no"));
        let message = Message::new("x");
        DeadLetter { message, topic, group: None, failure, attempts: 1, first: now, last: now }
    }
}
