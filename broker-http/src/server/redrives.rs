//! Redrives of a group's dead letters: one at a time takes some, and none counts what another has counted.

use std::collections::HashMap;
use std::sync::Arc;

use broker_core::{Broker, Group, Result};
use parking_lot::Mutex;

/// Dead letters that are looked for where a broker does not count its own: they are held until they are counted.
const MAX_COUNTED: usize = 1_000;

/// How many dead letters of each group redrives at a rate have told that they move, and have not moved yet. The lock is
/// held while some are moved: over Kafka two at a time would move the same ones.
#[derive(Debug, Default)]
pub(crate) struct Redrives(Mutex<HashMap<Group, Arc<tokio::sync::Mutex<u64>>>>);

impl Redrives {
    fn of(&self, group: &Group) -> Arc<tokio::sync::Mutex<u64>> {
        let mut groups = self.0.lock();
        groups.retain(|_, claimed| Arc::strong_count(claimed) > 1);
        Arc::clone(groups.entry(group.clone()).or_default())
    }

    /// Moves up to `max` that no other redrive has claimed; tells how many.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub(crate) async fn at_once(&self, broker: &dyn Broker, group: &Group, max: u64) -> Result<u64> {
        let claimed = self.of(group);
        let claimed = claimed.lock().await;
        let max = match *claimed {
            0 => max,
            claimed => max.min(kept(broker, group).await?.saturating_sub(claimed)),
        };
        broker.redrive(group, max).await
    }

    /// Claims up to `max` that no other redrive has claimed, to be moved one after another.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub(crate) async fn claim(&self, broker: &dyn Broker, group: &Group, max: u64) -> Result<Claim> {
        let all = self.of(group);
        let mut claimed = all.lock().await;
        let left = kept(broker, group).await?.saturating_sub(*claimed).min(max);
        *claimed += left;
        drop(claimed);
        Ok(Claim { all, left })
    }
}

/// How many dead letters a group has, as far as they are counted.
async fn kept(broker: &dyn Broker, group: &Group) -> Result<u64> {
    match broker.status().await?.group(group).and_then(|group| group.dead_letters) {
        Some(kept) => Ok(kept),
        None => Ok(broker.dead_letters(group, MAX_COUNTED).await?.len() as u64),
    }
}

/// Dead letters that a redrive has told that it moves.
#[derive(Debug)]
pub(crate) struct Claim {
    all: Arc<tokio::sync::Mutex<u64>>,
    left: u64,
}

impl Claim {
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Moves up to `max` of them; tells how many, none where somebody else has taken them away.
    ///
    /// # Errors
    ///
    /// What the broker says.
    pub(crate) async fn step(&mut self, broker: &dyn Broker, group: &Group, max: u64) -> Result<u64> {
        let mut claimed = self.all.lock().await;
        let moved = broker.redrive(group, self.left.min(max)).await?.min(self.left);
        self.left -= moved;
        *claimed -= moved;
        Ok(moved)
    }

    /// Leaves the rest to others.
    pub(crate) async fn end(self) {
        *self.all.lock().await -= self.left;
    }
}
