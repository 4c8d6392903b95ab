//! Exchanges, queues and bindings, and what is declared when.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Result, TopicFilter};
use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use crate::error::from_lapin;
use crate::ladder::{Leads, Rung};
use crate::link::Live;
use crate::naming::{GroupNames, Made, binding_key, short};
use crate::{AmqpOptions, QueueType, wire};

/// Dead letters a group's keeping queue has at most; the oldest are dropped.
const MAX_DEAD_LETTERS: i64 = 100_000;
const MAX_DEAD_LETTER_BYTES: i64 = 256 << 20;
/// A limit is there so that the server's default, should it have one, is not ours; ours comes first.
const SERVER_DELIVERY_LIMIT: i64 = 1_000_000;

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

/// The exchange of topics.
pub(crate) async fn declare_exchange(channel: &Channel, options: &AmqpOptions) -> Result<()> {
    let durable = !options.go_micro;
    let declare = ExchangeDeclareOptions { durable, passive: options.passive, ..ExchangeDeclareOptions::default() };
    let exchange = short("exchange", &options.exchange)?;
    channel.exchange_declare(exchange, ExchangeKind::Topic, declare, FieldTable::default()).await.map_err(from_lapin)
}

/// A delay queue and the exchange before it. One that is there under the name serves as it is: it was
/// made by a peer that chose the other queue type.
pub(crate) async fn declare_rung(live: &Live, rung: Rung, options: &AmqpOptions) -> Result<()> {
    let name = rung.name(&options.exchange)?;
    let exchange = match rung.leads {
        Leads::ToQueue => String::new(),
        Leads::ToTopic => options.exchange.clone(),
    };
    let ttl = i64::try_from(rung.ttl().as_millis()).unwrap_or(i64::MAX);
    let arguments = table([
        ("x-queue-type", AMQPValue::LongString(options.queue_type.as_str().into())),
        ("x-message-ttl", AMQPValue::LongLongInt(ttl)),
        ("x-dead-letter-exchange", AMQPValue::LongString(exchange.into())),
    ]);
    let declared = on_channel(live, async |channel| {
        let declared = channel.queue_declare(name.clone(), QueueDeclareOptions::durable(), arguments).await;
        declared.map(drop).map_err(from_lapin)
    });
    match declared.await {
        Err(error) if error.kind() != ErrorKind::Conflict => return Err(error),
        _ => {}
    }
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

/// Runs `work` while nobody else does under this name: of an exclusive queue there is one, and other connections are
/// refused it. It goes with the connection, or a minute after whoever left it there.
pub(crate) async fn alone<T>(live: &Live, name: &ShortString, work: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let claim = async |channel: &Channel| {
        let arguments = table([("x-expires", AMQPValue::LongInt(60_000))]);
        channel.queue_declare(name.clone(), exclusive, arguments).await.map(drop).map_err(from_lapin)
    };
    while let Err(error) = on_channel(live, claim).await {
        if error.kind() != ErrorKind::Conflict {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let done = work().await;
    on_channel(live, async |channel| delete(channel, name).await).await?;
    done
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

/// The queue that keeps a group's dead letters, reached by a key of its own beside the topic's.
pub(crate) async fn declare_keeping(channel: &Channel, names: &GroupNames, options: &AmqpOptions) -> Result<()> {
    let mut arguments = group_arguments(options.queue_type);
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(MAX_DEAD_LETTERS));
    arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(MAX_DEAD_LETTER_BYTES));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("drop-head".into()));
    channel.queue_declare(names.dead.clone(), QueueDeclareOptions::durable(), arguments).await.map_err(from_lapin)?;
    bind(channel, &names.dead, &short("exchange", &options.exchange)?, names.dead_key.clone()).await
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
    let queue =
        channel.queue_declare(ShortString::default(), declare, FieldTable::default()).await.map_err(from_lapin)?;
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
