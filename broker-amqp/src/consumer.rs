//! A subscription's task: a channel, its consumer, and both again when they are lost.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use broker_core::{Consumer, Delivery, Error, Gap, Group, Result, Topic};
use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicGetOptions, BasicNackOptions, BasicQosOptions};
use lapin::{BasicProperties, Channel};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::QueueType;
use crate::acks::Said;
use crate::broker::orphaned;
use crate::channel::OwnChannel;
use crate::error::{from_lapin, is_final};
use crate::intake::{Delivered, Take};
use crate::link::{Wait, closed};
use crate::member::{Member, Undecodable};
use crate::naming::Made;
use crate::{groups, topology, wire};

/// How long acks wait for more of them, so that one frame stands for many.
const COALESCE: Duration = Duration::from_millis(1);

/// The subscriber's end; dropping it ends the subscription.
pub(crate) struct Receiver {
    pub(crate) member: Arc<Member>,
}

impl Consumer for Receiver {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let mut state = self.member.state.lock();
        let count = match &state.ended {
            Some(_) => 0,
            None => self.member.hand_out(&mut state, batch, limit),
        };
        if count > 0 {
            return Poll::Ready(Ok(count));
        }
        if let Some(ended) = &state.ended {
            return Poll::Ready(ended.clone().map(|()| 0));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn gap(&mut self) -> Option<Gap> {
        self.member.take_gap()
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.member.stop.cancel();
        let mut state = self.member.state.lock();
        if state.ended.is_some() {
            return Poll::Ready(Ok(()));
        }
        state.close_waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.member.stop.cancel();
    }
}

/// Runs a subscription until it is stopped; tells `ready` when it first stands, or why it does not.
pub(crate) fn run(member: Arc<Member>, ready: oneshot::Sender<Result<()>>) -> impl Future<Output = ()> + Send {
    // Also where the runtime ends before it has come to this.
    let running = Running(member);
    async move {
        let Running(member) = &running;
        let ended = tokio::select! {
            () = member.shared.closed.cancelled() => Ok(()),
            ended = keep(member, ready) => ended,
        };
        member.lost();
        member.end(ended);
    }
}

/// A subscription that runs, and ends when its task does: with its runtime at the latest.
struct Running(Arc<Member>);

impl Drop for Running {
    fn drop(&mut self) {
        let Self(member) = self;
        member.lost();
        member.end(Err(orphaned()));
        member.shared.leave(member);
    }
}

async fn keep(member: &Arc<Member>, ready: oneshot::Sender<Result<()>>) -> Result<()> {
    let mut ready = Some(ready);
    let mut wait = Wait::new(member.shared.options.max_reconnect_wait);
    loop {
        let opened = tokio::select! {
            () = member.stop.cancelled() => Err(closed()),
            opened = open(member, ready.is_none()) => opened,
        };
        if member.stop.is_cancelled() {
            if let Some(ready) = ready.take() {
                let _ = ready.send(Err(closed()));
            }
            return Ok(());
        }
        let error = match opened {
            Ok((channel, mut consumer)) => {
                wait.reset();
                if let Some(ready) = ready.take()
                    && ready.send(Ok(())).is_err()
                {
                    // Whoever subscribed has gone away.
                    member.stop.cancel();
                }
                match consume(member, &channel, &mut consumer).await {
                    Ended::Stopped => {
                        let _ = channel.close(200, "OK".into()).await;
                        return Ok(());
                    }
                    Ended::Lost(error) => {
                        member.lost();
                        error
                    }
                    Ended::SteppedBack => {
                        // The server takes back what was not handed out, in its place; another member of
                        // the queue is next, and this one comes after all of them.
                        let _ = channel.close(200, "OK".into()).await;
                        member.lost();
                        continue;
                    }
                    Ended::Deleted => {
                        member.deleted();
                        return Err(member.group.as_ref().map_or_else(closed, deleted));
                    }
                    Ended::Cancelled => {
                        member.lost();
                        Error::unavailable("the server cancelled the consumer")
                    }
                }
            }
            Err(error) => {
                member.lost();
                error
            }
        };
        *member.known.last_error.lock() = Some(error.to_string());
        if let Some(ready) = ready.take() {
            let _ = ready.send(Err(error));
            return Ok(());
        }
        if is_final(&error) {
            return Err(error);
        }
        tracing::debug!(filter = %member.filter, %error, "a subscription is lost; it is made again");
        tokio::select! {
            () = member.stop.cancelled() => return Ok(()),
            () = sleep(wait.next()) => {}
        }
    }
}

fn deleted(group: &Group) -> Error {
    Error::not_found(format!("group {group} was deleted: its subscriptions end"))
}

type Opened = (OwnChannel, lapin::Consumer);

async fn open(member: &Arc<Member>, patient: bool) -> Result<Opened> {
    let shared = &member.shared;
    // Once it stood, it waits for the connection as long as it takes.
    let patience = if patient { Duration::from_secs(365 * 24 * 3600) } else { shared.options.connect_timeout };
    let live = shared.consuming.live(Instant::now() + patience, patient).await?;
    let opening = async {
        let mut channel = live.channel().await?;
        let queue = match &member.group {
            Some(group) => {
                let names = &member.known.names;
                let queues = &member.known.queues;
                // Declaring would make it anew. Several are deleted from the last on.
                let last = queues.last().filter(|last| **last != member.queue);
                let asked: Vec<_> = std::iter::once(&member.queue).chain(last).collect();
                if !topology::stand(&channel, names, &asked).await? {
                    let can_be_lost = names.made == Made::ByUs && !shared.options.passive;
                    if !can_be_lost || !groups::restore(shared, group, &member.known).await? {
                        member.deleted();
                        return Err(deleted(group));
                    }
                    channel = live.channel().await?;
                }
                // To its end, though the subscription may end meanwhile: what was made by mistake would be left otherwise.
                let declared = tokio::spawn(declare(Arc::clone(member), group.clone(), channel)).await;
                channel = declared.unwrap_or_else(|_| Err(closed()))?;
                member.queue.clone()
            }
            None => topology::declare_own(&channel, &member.filter, &shared.options).await?,
        };
        channel.basic_qos(member.prefetch, BasicQosOptions { global: false }).await.map_err(from_lapin)?;
        // The first of them come with the answer.
        let epoch = member.begin(queue.clone());
        channel.deliver_to(to(member, epoch));
        let consumer = channel.consume(&queue).await?;
        Ok((channel, consumer))
    };
    match timeout(shared.options.connect_timeout, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(Error::timeout("RabbitMQ did not answer in time")),
    }
}

/// Declares a group that stands.
async fn declare(member: Arc<Member>, group: Group, channel: OwnChannel) -> Result<OwnChannel> {
    let (shared, known) = (&member.shared, &member.known);
    let ordered = known.settings.ordered;
    topology::declare_group(&channel, &known.names, &member.filter, ordered, &known.queues, &shared.options)
        .await
        .map_err(|error| topology::conflict(&group, error))?;
    if groups::was_deleted(shared, known).await? {
        member.deleted();
        return Err(deleted(&group));
    }
    Ok(channel)
}

enum Ended {
    /// So that another member receives.
    SteppedBack,
    /// By ourselves; everything handed out is settled.
    Stopped,
    /// The server ended the consumer.
    Cancelled,
    /// It did because the group was deleted.
    Deleted,
    Lost(Error),
}

async fn consume(member: &Arc<Member>, channel: &OwnChannel, consumer: &mut lapin::Consumer) -> Ended {
    member.resume();
    let telling = tell(member, channel);
    let receiving = async {
        tokio::select! {
            biased;
            () = member.stop.cancelled() => {}
            ended = ended(consumer) => return match ended {
                Ended::Cancelled => cancelled(member).await,
                ended => ended,
            },
            () = member.stepped_back() => {
                member.leave();
                told(member).await;
                return match heard(member, channel).await {
                    Ok(()) => Ended::SteppedBack,
                    Err(error) => Ended::Lost(error),
                };
            }
        }
        match leave(member, channel, consumer).await {
            Ok(()) => Ended::Stopped,
            Err(error) => Ended::Lost(error),
        }
    };
    tokio::select! {
        error = telling => Ended::Lost(error),
        ended = receiving => ended,
    }
}

/// The server ends a consumer when its queue is deleted, or the queue's node goes down. What is settled while it is asked which
/// is told it as ever.
async fn cancelled(member: &Member) -> Ended {
    let queue = member.state.lock().queue.clone();
    match member.shared.queue_state(&queue).await {
        Ok(None) if member.group.is_some() => Ended::Deleted,
        _ => Ended::Cancelled,
    }
}

/// Waits until there are no more deliveries.
async fn ended(consumer: &mut lapin::Consumer) -> Ended {
    match consumer.next().await {
        None => Ended::Cancelled,
        Some(Err(error)) => Ended::Lost(from_lapin(error)),
        Some(Ok(_)) => Ended::Lost(Error::unavailable("a delivery went astray; it comes back with the channel")),
    }
}

/// Takes the deliveries of a channel to its member.
fn to(member: &Arc<Member>, epoch: u64) -> Take {
    let go_micro = member.shared.options.go_micro;
    let member = Arc::downgrade(member);
    Arc::new(move |batch: Vec<Delivered>| {
        if let Some(member) = member.upgrade() {
            member.arrived(epoch, batch.into_iter().map(|delivered| read(delivered, go_micro)).collect());
        }
    })
}

fn read(delivered: Delivered, go_micro: bool) -> (u64, Result<wire::Arrived, Undecodable>) {
    let Delivered { tag, redelivered, routing_key, properties, body } = delivered;
    let (properties, decoded) = match properties {
        Some(properties) => {
            let decoded = wire::decode(&routing_key, &properties, Bytes::clone(&body), go_micro);
            (properties, decoded)
        }
        None => (BasicProperties::default(), Err("its properties cannot be read".to_owned())),
    };
    let arrived = match decoded {
        Ok(mut arrived) => {
            if !redelivered {
                // The count is none of this queue's, but came with the message: whoever moves one between queues may
                // leave it.
                arrived.redeliveries = 0;
            }
            Ok(arrived)
        }
        Err(reason) => {
            let message = wire::salvage(&properties, body);
            Err(Undecodable { reason, message, topic: Topic::new(&routing_key).ok() })
        }
    };
    (tag, arrived)
}

/// Ends the subscription: hands out no more, and waits until what is in anybody's hands is settled.
async fn leave(member: &Arc<Member>, channel: &OwnChannel, consumer: &lapin::Consumer) -> Result<()> {
    if member.is_one_at_a_time() {
        // The server lets the next member receive as soon as this one's consumer is cancelled, whatever this one still
        // holds. So the consumer stays, and ends with the channel: what was not handed out goes back then, in
        // its place, before anybody receives. (Cancelling can also end the process of a classic queue, RabbitMQ 3.10.)
        member.leave();
    } else {
        give_back(member, channel, consumer).await?;
    }
    // The acks and nacks so far are told before anybody hears that this is over.
    told(member).await;
    member.end(Ok(()));
    loop {
        let settled = member.settled.notified();
        if member.handed() == 0 {
            break;
        }
        settled.await;
    }
    told(member).await;
    heard(member, channel).await
}

/// Stops consuming, and gives back what was not handed out.
async fn give_back(member: &Arc<Member>, channel: &Channel, consumer: &lapin::Consumer) -> Result<()> {
    member.leave();
    channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await.map_err(from_lapin)?;
    // What was on its way when the server heard of it has come before its answer.
    let renewed = member.give_back_waiting();
    let publish_timeout = member.shared.options.publish_timeout;
    // What is not sent anew by then goes back with the channel.
    let _ = timeout(publish_timeout, join_all(renewed)).await;
    Ok(())
}

/// Waits until the queue has heard all that it was told, so that the channel can be closed.
///
/// A channel (RabbitMQ 3.10) has 32 commands under way to a quorum queue, keeps the rest until one of those is written, and
/// forgets them when it is closed. What is answered only after it was written itself is answered after they were,
/// and the second such answer comes when the rest is on its way.
async fn heard(member: &Member, channel: &OwnChannel) -> Result<()> {
    if member.group.is_none() || member.shared.options.queue_type != QueueType::Quorum || !member.has_told() {
        return Ok(());
    }
    let queue = &member.queue;
    for _ in 0..2 {
        if member.is_one_at_a_time() {
            // It stands by, behind the consumer that is there already, and receives nothing.
            drop(channel.consume(queue).await?);
        } else {
            // What it may get goes back with the channel.
            channel.basic_get(queue.clone(), BasicGetOptions::default()).await.map_err(from_lapin)?;
        }
    }
    Ok(())
}

async fn told(member: &Member) {
    loop {
        let (acks, nacks) = member.waiting_to_tell();
        if acks == 0 && !nacks && !member.telling() {
            return;
        }
        member.wire.notify_one();
        member.full.notify_one();
        sleep(COALESCE).await;
    }
}

/// Tells the server what is settled, until the channel is lost.
async fn tell(member: &Member, channel: &Channel) -> Error {
    loop {
        member.wire.notified().await;
        let (acks, urgent) = member.waiting_to_tell();
        if acks < member.threshold() && !urgent {
            tokio::select! {
                () = member.full.notified() => {}
                () = sleep(COALESCE) => {}
            }
        }
        let told = member.to_tell().into_iter().map(|said| match said {
            Said::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).boxed(),
            Said::Nack(tag) => channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }).boxed(),
        });
        // They are first polled, and so written, in their order.
        let told = join_all(told).await;
        member.told();
        if let Some(error) = told.into_iter().find_map(Result::err) {
            return from_lapin(error);
        }
    }
}
