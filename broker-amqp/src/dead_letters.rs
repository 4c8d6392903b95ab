//! A group's dead letters from outside: showing, purging, redriving what its keeping queue has.

use std::time::Duration;

use broker_core::{DeadLetter, Error, Group, Result};
use bytes::Bytes;
use lapin::options::BasicAckOptions;

use crate::broker::Shared;
use crate::error::from_lapin;
use crate::groups::{at_length, get, give_back, missing};
use crate::link::Live;
use crate::naming::GroupNames;
use crate::topology::{self, on_channel, queue_state, state_on};
use crate::wire::{self, Travel};
use crate::writer::{Envelope, Route};

/// Of dead letters that are shown at a time, more or less: they are all in memory.
const MAX_SHOWN: usize = 16 << 20;
/// How often, and after how long each time, it is looked whether dead letters that were shown are back.
const LOOKS: u32 = 100;
const LOOK: Duration = Duration::from_millis(10);

/// The first of them, as many as are to be shown at a time.
pub(crate) async fn show(shared: &Shared, group: &Group, max: usize) -> Result<Vec<DeadLetter>> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    if !shared.bounded(keeps(&live, group, &names)).await? {
        return Ok(Vec::new());
    }
    at_length(shared, &live, async |channel| {
        let mut letters = Vec::new();
        let (mut last, mut taken, mut bytes) = (None, 0, 0);
        while letters.len() < max && bytes < MAX_SHOWN {
            let Some(mut delivery) = shared.bounded(get(channel, &names.dead)).await? else { break };
            last = Some(delivery.delivery_tag);
            bytes += delivery.data.len();
            taken += 1;
            match letter(&mut delivery) {
                Ok(letter) => letters.push(letter),
                Err(error) => tracing::warn!(%group, %error, "the keeping queue holds what is no dead letter"),
            }
        }
        // They go back to where they were.
        if let Some(tag) = last {
            give_back(shared, channel, tag).await?;
            // A quorum queue has them again a moment later, and whoever redrives next is to find them; unless
            // somebody takes them just now.
            for _ in 0..LOOKS {
                if shared.bounded(state_on(channel, &names.dead)).await?.ready >= taken {
                    break;
                }
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(letters)
    })
    .await
}

/// Purges the keeping queue; with the group gone, deletes it.
pub(crate) async fn purge(shared: &Shared, group: &Group) -> Result<u64> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    shared
        .bounded(async {
            if !keeps(&live, group, &names).await? {
                return Ok(0);
            }
            let gone = topology::group_queues(&live, &names).await?.is_empty();
            on_channel(&live, async |channel| {
                let purged = topology::purge(channel, &names.dead).await?;
                if gone {
                    topology::delete_exchange(channel, &names.dead).await?;
                    topology::delete(channel, &names.dead).await?;
                }
                Ok(purged)
            })
            .await
        })
        .await
}

/// Sends dead letters to the group's queue, each acked after the copy is confirmed.
pub(crate) async fn redrive(shared: &Shared, group: &Group, max: u64) -> Result<u64> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    let (queues, kept) = shared
        .bounded(async {
            let queues = topology::group_queues(&live, &names).await?;
            if queues.is_empty() {
                return Err(missing(group));
            }
            let kept = queue_state(&live, &names.dead).await?;
            Ok((queues, kept.map_or(0, |state| state.ready)))
        })
        .await?;
    let group_alone =
        if names.has_lanes(&queues) { Route::Lanes(names.queue.clone()) } else { Route::Queue(names.queue.clone()) };
    if kept == 0 {
        return Ok(0);
    }
    at_length(shared, &live, async |channel| {
        let mut redriven = 0;
        // No more than were there: one that dies again at once is not sent round.
        for _ in 0..kept {
            if redriven == max {
                break;
            }
            let Some(mut delivery) = shared.bounded(get(channel, &names.dead)).await? else { break };
            let letter = match letter(&mut delivery) {
                Ok(letter) => letter,
                // Somebody else put it there; it goes back with the channel, and is in nobody's way.
                Err(error) => {
                    tracing::warn!(%group, %error, "the keeping queue holds what is no dead letter");
                    continue;
                }
            };
            let envelope = Envelope {
                route: group_alone.clone(),
                message: letter.message,
                travel: Travel { topic: Some(letter.topic), ..Travel::default() },
                require_route: false,
            };
            shared.writer.submit(envelope).await?;
            let acked = channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
            shared.bounded(async { acked.await.map_err(from_lapin) }).await?;
            redriven += 1;
        }
        Ok(redriven)
    })
    .await
}

/// Whether there is a keeping queue; an error if there is no group either.
async fn keeps(live: &Live, group: &Group, names: &GroupNames) -> Result<bool> {
    if queue_state(live, &names.dead).await?.is_some() {
        return Ok(true);
    }
    if topology::group_queues(live, names).await?.is_empty() { Err(missing(group)) } else { Ok(false) }
}

fn letter(delivery: &mut lapin::message::Delivery) -> Result<DeadLetter> {
    let body = Bytes::from(std::mem::take(&mut delivery.data));
    let arrived =
        wire::decode(delivery.routing_key.as_str(), &delivery.properties, body.clone(), false).or_else(|_| {
            // Reached by name: the routing key is no topic, and the story tells the real one.
            wire::decode("unknown", &delivery.properties, body, false)
        });
    DeadLetter::from_message(arrived.map_err(Error::codec)?.message)
}
