//! Exchanges, queues and bindings, and what is declared when.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Result, TopicFilter};
use lapin::options::{
    BasicConsumeOptions, ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer, ExchangeKind};
use tokio::time::Instant;

use crate::channel::OwnChannel;
use crate::error::from_lapin;
use crate::ladder::{Leads, Rung};
use crate::link::{Live, Wait, closed};
use crate::naming::{GroupNames, Made, binding_key, short};
use crate::{AmqpOptions, QueueType, wire};

/// Dead letters a group's keeping queue has at most; the oldest are dropped.
const MAX_DEAD_LETTERS: i64 = 100_000;
const MAX_DEAD_LETTER_BYTES: i64 = 256 << 20;
/// A limit is there so that the server's default, should it have one, is not ours; ours comes first.
const SERVER_DELIVERY_LIMIT: i64 = 1_000_000;

/// Milliseconds after which a queue goes that was to have a consumer, and has none.
const UNUSED: i32 = 60_000;

/// What a passive declaration tells of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueState {
    /// Messages that wait for a consumer.
    pub(crate) ready: u64,
    pub(crate) consumers: u64,
}

/// Runs `work` on a channel of its own, since the server answers a mistake by closing the channel.
pub(crate) async fn on_channel<T>(live: &Live, work: impl AsyncFnOnce(&Channel) -> Result<T>) -> Result<T> {
    let channel = live.channel().await?;
    let done = work(&channel).await;
    if channel.status().connected() {
        // What it held goes back; that it may have been lost meanwhile changes nothing.
        let _ = channel.close(200, "OK".into()).await;
    } else {
        live.wear();
    }
    done
}

/// The state of a queue; `None` if there is no such queue.
pub(crate) async fn queue_state(live: &Live, queue: &ShortString) -> Result<Option<QueueState>> {
    let state = on_channel(live, async |channel| state_on(channel, queue).await).await;
    match state {
        Ok(state) => Ok(Some(state)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// As [`queue_state`], on a channel that a missing queue will close.
pub(crate) async fn state_on(channel: &Channel, queue: &ShortString) -> Result<QueueState> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.clone(), options, FieldTable::default()).await.map_err(from_lapin)?;
    Ok(QueueState { ready: declared.message_count().into(), consumers: declared.consumer_count().into() })
}

/// Whether all of a group's `queues` are there that who made them would not make again. Asks on a channel that a missing one will close.
pub(crate) async fn stand(channel: &Channel, names: &GroupNames, queues: &[&ShortString]) -> Result<bool> {
    if names.made == Made::AsGoMicro {
        // They go with their last consumer, and come with the next.
        return Ok(true);
    }
    for queue in queues {
        match state_on(channel, queue).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// How long it is known of a group that it was deleted: a member that is away for longer makes it again, as one does whose
/// server has lost it.
const KNOWN_DELETED: Duration = Duration::from_secs(15 * 60);

/// Leaves a mark that a group was deleted, for its members that are away.
pub(crate) async fn mark_deleted(channel: &Channel, names: &GroupNames) -> Result<()> {
    let expires = i64::try_from(KNOWN_DELETED.as_millis()).unwrap_or(i64::MAX);
    let arguments = table([("x-expires", AMQPValue::LongLongInt(expires))]);
    let declared = channel.queue_declare(names.deleted.clone(), QueueDeclareOptions::durable(), arguments).await;
    declared.map(drop).map_err(from_lapin)
}

/// The exchange of topics.
pub(crate) async fn declare_exchange(channel: &Channel, options: &AmqpOptions) -> Result<()> {
    let durable = !options.go_micro;
    let declare = ExchangeDeclareOptions { durable, passive: options.passive, ..ExchangeDeclareOptions::default() };
    let exchange = short("exchange", &options.exchange)?;
    channel.exchange_declare(exchange, ExchangeKind::Topic, declare, FieldTable::default()).await.map_err(from_lapin)
}

/// A delay queue and the exchange before it. One of the other queue type serves as it is: a peer chose that. One that
/// differs in anything else keeps what comes, or hands it on at the wrong time or to nobody.
pub(crate) async fn declare_rung(live: &Live, rung: Rung, options: &AmqpOptions) -> Result<()> {
    let name = rung.name(&options.exchange)?;
    let exchange = match rung.leads {
        Leads::ToQueue => String::new(),
        Leads::ToTopic => options.exchange.clone(),
    };
    let ttl = i64::try_from(rung.ttl().as_millis()).unwrap_or(i64::MAX);
    let declare = async |queue_type: QueueType| {
        let arguments = table([
            ("x-queue-type", AMQPValue::LongString(queue_type.as_str().into())),
            ("x-message-ttl", AMQPValue::LongLongInt(ttl)),
            ("x-dead-letter-exchange", AMQPValue::LongString(exchange.as_str().into())),
        ]);
        on_channel(live, async |channel| {
            let declared = channel.queue_declare(name.clone(), QueueDeclareOptions::durable(), arguments).await;
            declared.map(drop).map_err(from_lapin)
        })
        .await
    };
    let mut declared = declare(options.queue_type).await;
    // The server names one argument that differs; with this one right, it names another if there is one.
    if declared.as_ref().is_err_and(|error| error.message().contains("x-queue-type")) {
        declared = declare(options.queue_type.other()).await;
    }
    declared.map_err(|error| match error.kind() {
        ErrorKind::Conflict => error.context(format_args!(
            "delay queue {name} exists and is not as it is needed: delete it once it is empty, and it is made anew"
        )),
        _ => error.context(format_args!("delay queue {name}")),
    })?;
    on_channel(live, async |channel| {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(name.clone(), ExchangeKind::Fanout, durable, FieldTable::default())
            .await
            .map_err(from_lapin)?;
        bind(channel, &name, &name, ShortString::default()).await
    })
    .await
}

/// Runs `work` while nobody else does under this name, here or elsewhere: a queue has one exclusive consumer. It goes with
/// that one, so that who dies or gives up is in nobody's way; where it had none yet, with the connection or after a minute.
///
/// # Errors
///
/// What `work` says; [`Unavailable`](ErrorKind::Unavailable) if somebody else still has the name after `patience`.
pub(crate) async fn alone<T>(
    live: &Live,
    name: &ShortString,
    patience: Duration,
    work: impl AsyncFnOnce() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    let mut wait = Wait::new(Duration::from_millis(500));
    let (channel, _consumer) = loop {
        // To its end, though nobody may wait for it any more: a queue without consumer would be left otherwise.
        let (own, named) = (live.clone(), name.clone());
        let claimed = tokio::spawn(async move { claim(&own, &named).await }).await;
        match claimed.unwrap_or_else(|_| Err(closed())) {
            Ok(claimed) => break claimed,
            Err(error) if is_claimed(&error) && Instant::now() < deadline => tokio::time::sleep(wait.next()).await,
            Err(error) if is_claimed(&error) => {
                return Err(Error::unavailable(format!(
                    "somebody else has been making or deleting the group for {patience:?}, and has the queue {name}: try again"
                ))
                .with_source(error));
            }
            Err(error) => return Err(error),
        }
    };
    let done = work().await;
    // That it may have been lost meanwhile changes nothing.
    let _ = channel.close(200, "OK".into()).await;
    done
}

async fn claim(live: &Live, name: &ShortString) -> Result<(OwnChannel, Consumer)> {
    let channel = live.channel().await?;
    let claimed = async {
        let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let arguments = table([("x-expires", AMQPValue::LongInt(UNUSED))]);
        channel.queue_declare(name.clone(), declare, arguments).await.map_err(from_lapin)?;
        let consume = BasicConsumeOptions { exclusive: true, no_ack: true, ..BasicConsumeOptions::default() };
        let consumed = channel.basic_consume(name.clone(), ShortString::default(), consume, FieldTable::default());
        consumed.await.map_err(from_lapin)
    };
    match claimed.await {
        Ok(consumer) => Ok((channel, consumer)),
        Err(error) => {
            if !channel.status().connected() {
                live.wear();
            }
            Err(error)
        }
    }
}

/// Whether somebody else has the queue: on another connection, on this one, or until a moment ago.
fn is_claimed(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Conflict | ErrorKind::NotFound => true,
        ErrorKind::Unauthorized => error.message().contains("in exclusive use"),
        _ => false,
    }
}

/// A group's queue and its binding. Declaring what is there is a comparison.
pub(crate) async fn declare_group(
    channel: &Channel,
    names: &GroupNames,
    filter: &TopicFilter,
    ordered: bool,
    queues: &[ShortString],
    options: &AmqpOptions,
) -> Result<()> {
    declare_exchange(channel, options).await?;
    if names.has_lanes(queues) {
        return declare_lanes(channel, names, filter, queues, options).await;
    }
    match names.made {
        _ if options.passive => return state_on(channel, &names.queue).await.map(drop),
        Made::Before => drop(state_on(channel, &names.queue).await?),
        Made::AsGoMicro => {
            let declare = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(names.queue.clone(), declare, FieldTable::default()).await.map_err(from_lapin)?;
        }
        Made::ByUs => {
            let mut arguments = group_arguments(options.queue_type);
            if ordered {
                arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
            }
            let durable = QueueDeclareOptions::durable();
            channel.queue_declare(names.queue.clone(), durable, arguments).await.map_err(from_lapin)?;
        }
    }
    bind(channel, &names.queue, &short("exchange", &options.exchange)?, binding_key(filter)?).await
}

/// Several queues of an ordered group: an exchange hands each key to one of them.
async fn declare_lanes(
    channel: &Channel,
    names: &GroupNames,
    filter: &TopicFilter,
    queues: &[ShortString],
    options: &AmqpOptions,
) -> Result<()> {
    if options.passive {
        for queue in queues {
            state_on(channel, queue).await?;
        }
        return Ok(());
    }
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let by_key = table([("hash-header", AMQPValue::LongString(wire::KEY.into()))]);
    let kind = ExchangeKind::Custom("x-consistent-hash".to_owned());
    channel.exchange_declare(names.queue.clone(), kind, durable, by_key).await.map_err(from_lapin)?;
    // The last first: what stands is found by counting from the first, which so tells of all.
    for queue in queues.iter().rev() {
        let mut arguments = group_arguments(options.queue_type);
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        let durable = QueueDeclareOptions::durable();
        channel.queue_declare(queue.clone(), durable, arguments).await.map_err(from_lapin)?;
        // To this exchange a routing key is a weight.
        bind(channel, queue, &names.queue, "1".into()).await?;
    }
    let (from, key, bind) =
        (short("exchange", &options.exchange)?, binding_key(filter)?, ExchangeBindOptions::default());
    channel.exchange_bind(names.queue.clone(), from, key, bind, FieldTable::default()).await.map_err(from_lapin)
}

/// The queues of a group that stands; none if it does not.
pub(crate) async fn group_queues(live: &Live, names: &GroupNames) -> Result<Vec<ShortString>> {
    if queue_state(live, &names.queue).await?.is_some() {
        return Ok(vec![names.queue.clone()]);
    }
    let mut lanes = Vec::new();
    if names.made != Made::ByUs {
        return Ok(lanes);
    }
    loop {
        let lane = names.lane(lanes.len())?;
        if queue_state(live, &lane).await?.is_none() {
            return Ok(lanes);
        }
        lanes.push(lane);
    }
}

/// The queue that keeps a group's dead letters, and the exchange before it, which leads to the exchange of topics, too: one
/// publish reaches both. No key on the exchange of topics could lead to that queue alone, since some filter matches any.
pub(crate) async fn declare_keeping(channel: &Channel, names: &GroupNames, options: &AmqpOptions) -> Result<()> {
    let mut arguments = group_arguments(options.queue_type);
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(MAX_DEAD_LETTERS));
    arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(MAX_DEAD_LETTER_BYTES));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
    let (dead, none) = (&names.dead, FieldTable::default());
    channel.queue_declare(dead.clone(), QueueDeclareOptions::durable(), arguments).await.map_err(from_lapin)?;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(dead.clone(), ExchangeKind::Fanout, durable, none.clone()).await;
    declared.map_err(from_lapin)?;
    bind(channel, dead, dead, ShortString::default()).await?;
    let (topics, any) = (short("exchange", &options.exchange)?, ShortString::default());
    let bound = channel.exchange_bind(topics, dead.clone(), any, ExchangeBindOptions::default(), none).await;
    bound.map_err(from_lapin)
}

fn group_arguments(queue_type: QueueType) -> FieldTable {
    let mut arguments = table([("x-queue-type", AMQPValue::LongString(queue_type.as_str().into()))]);
    if queue_type == QueueType::Quorum {
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(SERVER_DELIVERY_LIMIT));
    }
    arguments
}

/// A queue of one subscription's own, which goes with the connection.
pub(crate) async fn declare_own(channel: &Channel, filter: &TopicFilter, options: &AmqpOptions) -> Result<ShortString> {
    declare_exchange(channel, options).await?;
    let declare = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    // It goes with its consumer, and else with the connection: one that was given up before it had any would fill.
    let arguments = table([("x-expires", AMQPValue::LongInt(UNUSED))]);
    let queue = channel.queue_declare(ShortString::default(), declare, arguments).await.map_err(from_lapin)?;
    let queue = queue.name().clone();
    bind(channel, &queue, &short("exchange", &options.exchange)?, binding_key(filter)?).await?;
    Ok(queue)
}

pub(crate) async fn bind(
    channel: &Channel,
    queue: &ShortString,
    exchange: &ShortString,
    key: ShortString,
) -> Result<()> {
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.clone(), exchange.clone(), key, options, FieldTable::default()).await.map_err(from_lapin)
}

/// Deletes a queue and what is in it. Deleting what is not there is fine.
pub(crate) async fn delete(channel: &Channel, queue: &ShortString) -> Result<u64> {
    let deleted = channel.queue_delete(queue.clone(), QueueDeleteOptions::default()).await;
    deleted.map(u64::from).map_err(from_lapin)
}

/// Deletes the exchange before several queues. Deleting what is not there is fine.
pub(crate) async fn delete_exchange(channel: &Channel, exchange: &ShortString) -> Result<()> {
    channel.exchange_delete(exchange.clone(), ExchangeDeleteOptions::default()).await.map_err(from_lapin)
}

/// Drops what waits in a queue, and tells how many.
pub(crate) async fn purge(channel: &Channel, queue: &ShortString) -> Result<u64> {
    let purged = channel.queue_purge(queue.clone(), QueuePurgeOptions::default()).await;
    purged.map(u64::from).map_err(from_lapin)
}

pub(crate) fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    FieldTable::from(
        entries.into_iter().map(|(name, value)| (ShortString::from(name), value)).collect::<BTreeMap<_, _>>(),
    )
}

/// The server's word on a declaration that differs, as the group's conflict.
pub(crate) fn conflict(group: &impl std::fmt::Display, error: Error) -> Error {
    match error.kind() {
        ErrorKind::Conflict => error.context(format_args!("group {group} exists with another setting")),
        _ if error.message().contains("invalid exchange type") => Error::unsupported(format!(
            "group {group}: several queues need the server's plugin rabbitmq_consistent_hash_exchange; enable it, \
             or leave ordered_queues out"
        ))
        .with_source(error),
        _ => error.context(format_args!("group {group}")),
    }
}
