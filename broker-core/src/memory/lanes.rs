//! Order by key: at most one message of a key is out, the others wait behind it.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

use super::entry::Queued;
use super::group::take_expired;
use crate::Timestamp;

/// The keys with a message out (ready, due later, or in flight), and what waits behind each. Keys
/// come from outside, so that the map's hash is keyed.
#[derive(Default)]
pub(super) struct Lanes(HashMap<Bytes, Lane>);

#[derive(Default)]
struct Lane {
    behind: VecDeque<Queued>,
    /// Whether the one that is out was handed to a member.
    in_flight: bool,
}

impl Lanes {
    /// A message arrives: it comes back if nothing of its key is out, and waits otherwise. A message
    /// without key has no order to keep.
    pub(super) fn arrive(&mut self, queued: Queued) -> Option<Queued> {
        let Some(key) = queued.entry.message.key() else { return Some(queued) };
        match self.0.get_mut(key) {
            Some(lane) => {
                lane.behind.push_back(queued);
                None
            }
            None => {
                self.0.insert(key.clone(), Lane::default());
                Some(queued)
            }
        }
    }

    /// The message that was out has been handed to a member, or has come back from it.
    pub(super) fn set_in_flight(&mut self, queued: &Queued, in_flight: bool) {
        if let Some(lane) = queued.entry.message.key().and_then(|key| self.0.get_mut(key)) {
            lane.in_flight = in_flight;
        }
    }

    /// The message with this key that was out is done: the next of its key.
    pub(super) fn leave(&mut self, key: Option<&Bytes>) -> Option<Queued> {
        let key = key?;
        let lane = self.0.get_mut(key)?;
        lane.in_flight = false;
        let next = lane.behind.pop_front();
        if next.is_none() {
            self.0.remove(key);
            // What a burst of keys took is given back once nothing is out.
            if self.0.is_empty() && self.0.capacity() > 1_024 {
                self.0 = HashMap::new();
            }
        }
        next
    }

    /// What waits behind another message.
    pub(super) fn behind(&self) -> impl Iterator<Item = &Queued> {
        self.0.values().flat_map(|lane| &lane.behind)
    }

    /// Takes what has expired of it.
    pub(super) fn take_expired(&mut self, now: Timestamp) -> Vec<Queued> {
        self.0.values_mut().flat_map(|lane| take_expired(&mut lane.behind, now)).collect()
    }

    /// Forgets what waits, and every key that is not in flight.
    pub(super) fn purge(&mut self) {
        self.0.retain(|_, lane| {
            lane.behind.clear();
            lane.in_flight
        });
    }
}
