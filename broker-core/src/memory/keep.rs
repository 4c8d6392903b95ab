//! Dead letters, kept: bounded, the oldest dropped and counted.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

use crate::{DeadLetter, Group};

/// What every group gave up on.
pub(super) struct Keeps {
    max_messages: usize,
    max_bytes: u64,
    groups: Mutex<HashMap<Group, Keep>>,
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
        Self { max_messages, max_bytes, groups: Mutex::default() }
    }

    pub(super) fn push(&self, group: &Group, letter: DeadLetter) {
        let mut groups = self.groups.lock();
        let keep = groups.entry(group.clone()).or_default();
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

    pub(super) fn list(&self, group: &Group, max: usize) -> Vec<DeadLetter> {
        self.groups.lock().get(group).map_or_else(Vec::new, |keep| keep.letters.iter().take(max).cloned().collect())
    }

    pub(super) fn take(&self, group: &Group, max: u64) -> Vec<DeadLetter> {
        let mut groups = self.groups.lock();
        let Some(keep) = groups.get_mut(group) else { return Vec::new() };
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(keep.letters.len());
        let letters = (0..max).map_while(|_| keep.pop()).collect();
        if keep.letters.is_empty() {
            groups.remove(group);
        }
        letters
    }

    pub(super) fn count(&self, group: &Group) -> u64 {
        self.groups.lock().get(group).map_or(0, |keep| keep.letters.len() as u64)
    }

    pub(super) fn total(&self) -> u64 {
        self.groups.lock().values().map(|keep| keep.letters.len() as u64).sum()
    }
}
