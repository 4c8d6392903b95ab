//! Consume, process, produce: deliveries acked in the transaction that publishes what came of them.
//!
//! The transaction commits the progress that its partitions have when its deliveries are settled. Until it
//! has ended the members' own commits say nothing of these partitions: one that the server takes in between
//! would count over it, and what the transaction acked would come again after a crash (in Kafka the later
//! of two commits stands, whatever it says). For the same reason all of it, from the look at the partitions to the acks,
//! is done on the transactions' one thread: the next transaction has to know what this one has acked.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{Delivery, Error, Message, Receipt, Result, Topic};
use rdkafka::consumer::Consumer as _;

use crate::client::rest;
use crate::delivery::Batch;
use crate::group;
use crate::member::Member;
use crate::publishing::Publishing;
use crate::state::{Item, Place};
use crate::stored::Stored;
use crate::transaction::Offsets;
use crate::{Transaction, check_message};

/// A transaction under way.
pub(crate) struct Process {
    pub(crate) messages: Vec<(Topic, Message)>,
    deliveries: Untried,
    members: Vec<Arc<Member>>,
    held: Vec<Held>,
}

impl Process {
    /// `transaction`, whose deliveries came to some of `members`.
    pub(crate) fn new(transaction: Transaction, members: Vec<Arc<Member>>) -> Self {
        let (messages, deliveries) = transaction.into_parts();
        Self { messages, deliveries: Untried(deliveries), members, held: Vec::new() }
    }

    /// Runs it, and waits for its outcome.
    pub(crate) fn run(self, publishing: &Publishing) -> Result<Vec<Receipt>> {
        for (topic, message) in &self.messages {
            if topic.is_reserved() {
                return Err(Error::invalid(format!("topic {topic}: it is the broker's own; publish to another")));
            }
            check_message(message)?;
        }
        let outcome = publishing.transactions()?.process(self);
        pollster::block_on(outcome).map_err(|_| Error::backend("a transaction ended without an answer")).flatten()
    }

    /// What it says of groups; their members' own commits are held back until it ends, and those under way are waited for.
    pub(crate) fn begin(&mut self, patience: Duration) -> Result<Vec<Offsets>> {
        let mut by_member: Vec<(&Arc<Member>, Vec<&Item>)> = Vec::new();
        for delivery in &self.deliveries.0 {
            let Some((batch, index)) = delivery.batch::<Batch>() else { return Err(strange()) };
            let ours = self.members.iter().find(|member| Arc::ptr_eq(member, &batch.member) && member.group.is_some());
            let member = ours.ok_or_else(strange)?;
            match by_member.iter_mut().find(|(known, _)| Arc::ptr_eq(known, member)) {
                Some((_, items)) => items.push(batch.item(index)),
                None => by_member.push((member, vec![batch.item(index)])),
            }
        }
        let (mut offsets, mut held) = (Vec::new(), Vec::new());
        for (member, items) in by_member {
            let (said, guard) = begin(member, &items, patience)?;
            offsets.push(said);
            held.push(guard);
        }
        self.held = held;
        Ok(offsets)
    }

    /// It is committed: in memory, too, as the server was told.
    pub(crate) fn committed(mut self) {
        for delivery in std::mem::take(&mut self.deliveries.0) {
            let _ = pollster::block_on(delivery.ack());
        }
    }
}

/// Deliveries that are given back untried, unless they were taken out.
struct Untried(Vec<Delivery>);

impl Drop for Untried {
    fn drop(&mut self) {
        for delivery in std::mem::take(&mut self.0) {
            let _ = pollster::block_on(delivery.release());
        }
    }
}

fn strange() -> Error {
    Error::invalid("transactions: a delivery came to no group's member of this broker")
}

/// Holds back the members' own commits of some partitions.
struct Held {
    member: Arc<Member>,
    places: Vec<Place>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.member.end_transaction(&self.places);
    }
}

fn begin(member: &Arc<Member>, items: &[&Item], patience: Duration) -> Result<(Offsets, Held)> {
    let consumer = member.consumer.get().and_then(std::sync::Weak::upgrade);
    let consumer = consumer.ok_or_else(|| Error::unavailable("the subscription has ended; the message comes back"))?;
    // Before the partitions are looked at: should one of them move in between, this is of a generation that
    // the server takes no offsets from.
    let generation = consumer.group_metadata();
    let generation = generation.ok_or_else(|| Error::unavailable("the member is in no group yet"))?;
    let held = Held { member: Arc::clone(member), places: member.begin_transaction(items)? };
    let deadline = Instant::now() + patience;
    while member.is_committing(&held.places) {
        if Instant::now() > deadline {
            return Err(Error::timeout("a commit before the transaction is not answered"));
        }
        rest(Duration::from_millis(1));
    }
    let commits = member.progress_with(&held.places, items)?;
    let list = group::commit_list(&Stored::new(&member.entry.settings()), &commits)?;
    Ok(((list, generation), held))
}
