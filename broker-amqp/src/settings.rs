//! A group's settings, kept on the server: the one message of a queue of its own.
//!
//! A queue's arguments can be compared, not read, and are not ours to invent: who joins a group by name
//! alone could not know how it retries. So the group's creator leaves its settings in a queue of length
//! one, and who joins takes the message and puts it back.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{Error, Group, GroupSettings, Message, Result, RetryPolicy, StartAt, Topic};
use lapin::Channel;
use lapin::options::{BasicGetOptions, BasicNackOptions, QueueDeclareOptions};
use lapin::types::AMQPValue;
use serde::{Deserialize, Serialize};

use crate::error::from_lapin;
use crate::link::Live;
use crate::naming::GroupNames;
use crate::topology::{on_channel, queue_state, state_on, table};
use crate::wire::Travel;
use crate::writer::{Envelope, Route, Writer};

/// What is written; fields may be added.
#[derive(Serialize, Deserialize)]
struct Stored {
    ordered: bool,
    retry: RetryPolicy,
    dead_letter: Option<Topic>,
}

/// Leaves the settings of a group that is being created.
pub(crate) async fn write(
    live: &Live,
    writer: &Arc<Writer>,
    names: &GroupNames,
    settings: &GroupSettings,
) -> Result<()> {
    on_channel(live, async |channel| {
        let arguments = table([
            ("x-max-length", AMQPValue::LongLongInt(1)),
            ("x-overflow", AMQPValue::LongString("drop-head".into())),
        ]);
        let declared = channel.queue_declare(names.settings.clone(), QueueDeclareOptions::durable(), arguments).await;
        declared.map(drop).map_err(from_lapin)
    })
    .await?;
    let stored = Stored { ordered: settings.ordered, retry: settings.retry, dead_letter: settings.dead_letter.clone() };
    let body = serde_json::to_vec(&stored).map_err(|error| Error::codec("the group's settings").with_source(error))?;
    let message = Message::new(body).with_content_type("application/json")?;
    let route = Route::Queue(names.settings.clone());
    let travel = Travel { kept: true, ..Travel::default() };
    writer.submit(Envelope { route, message, travel, require_route: false }).await.map(drop)
}

/// The settings of a group that is there; `None` if nobody left any (a queue that is not of our making).
/// Lost ones are replaced by `defaults`.
pub(crate) async fn read(
    live: &Live,
    writer: &Arc<Writer>,
    group: &Group,
    names: &GroupNames,
    defaults: &GroupSettings,
) -> Result<Option<GroupSettings>> {
    if queue_state(live, &names.settings).await?.is_none() {
        return Ok(None);
    }
    // Another member may have the message in its hand for a moment.
    for attempt in 0..100_u32 {
        if attempt > 0 {
            tokio::time::sleep(Duration::from_millis(u64::from(attempt.min(20)))).await;
        }
        let body = on_channel(live, async |channel| peek(channel, names).await).await?;
        if let Some(body) = body {
            let stored: Stored = serde_json::from_slice(&body).map_err(|error| {
                Error::codec(format!("group {group}: queue {} holds no settings", names.settings)).with_source(error)
            })?;
            let mut settings = defaults.clone();
            settings.start = StartAt::New;
            settings.ordered = stored.ordered;
            settings.retry = stored.retry;
            settings.dead_letter = stored.dead_letter;
            return Ok(Some(settings));
        }
    }
    // A crash between the queue and its message, or a server that lost it.
    tracing::warn!(%group, queue = %names.settings, "the group's settings are lost; they are written anew");
    write(live, writer, names, defaults).await?;
    Ok(Some(defaults.clone()))
}

async fn peek(channel: &Channel, names: &GroupNames) -> Result<Option<Vec<u8>>> {
    let got = channel.basic_get(names.settings.clone(), BasicGetOptions::default()).await.map_err(from_lapin)?;
    let Some(got) = got else { return Ok(None) };
    let back = BasicNackOptions { requeue: true, multiple: false };
    channel.basic_nack(got.delivery.delivery_tag, back).await.map_err(from_lapin)?;
    // An answer from the queue says that it has the message again.
    state_on(channel, &names.settings).await?;
    Ok(Some(got.delivery.data))
}
