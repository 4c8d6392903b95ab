//! Groups from outside: making, deleting, purging, asking.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    Error, ErrorKind, Group, GroupOptions, GroupSettings, GroupStatus, Result, StartAt, State, Status,
    SubscriptionStatus, TopicFilter,
};
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::types::ShortString;

use crate::AmqpOptions;
use crate::broker::Shared;
use crate::error::{from_lapin, is_queue_limit};
use crate::ladder::{Leads, Rung};
use crate::link::Live;
use crate::management;
use crate::member::Known;
use crate::naming::{GroupNames, Made};
use crate::settings;
use crate::topology::{self, QueueState, on_channel, queue_state, state_on};

/// What is asked for and cannot be kept is refused.
fn check(options: &GroupOptions) -> Result<()> {
    match &options.start {
        None | Some(StartAt::New) => {}
        Some(start) => {
            return Err(Error::unsupported(format!(
                "start {start}: a RabbitMQ queue holds what came since it was declared; start is new"
            )));
        }
    }
    if options.backlog.is_some() {
        return Err(Error::unsupported(
            "a backlog's bound: RabbitMQ neither names the full group nor counts what it drops; leave backlog out",
        ));
    }
    Ok(())
}

/// Makes sure that a group stands, and learns its settings. True if it was not there before.
pub(crate) async fn ensure(shared: &Shared, group: &Group, options: &GroupOptions) -> Result<(Arc<Known>, bool)> {
    check(options)?;
    let names = GroupNames::of(group, &shared.options)?;
    let defaults = options.resolve(Some(&group.name))?;
    if defaults.ordered && names.made == Made::AsGoMicro {
        return Err(Error::unsupported(format!(
            "group {group}: ordered needs a queue with a single active consumer, which Go Micro's queues are not"
        )));
    }
    let live = shared.connection().await?;
    let ensure = async {
        let queues = topology::group_queues(&live, &names).await?;
        let there = Asked { live: &live, group, names: &names, options, defaults: &defaults };
        let is_found = !queues.is_empty();
        if is_found && let Some(known) = there.join(shared, queues).await? {
            return Ok((known, false));
        }
        // What was known of an earlier one of the name is over.
        shared.forget(group);
        if shared.options.passive {
            return Err(Error::not_found(format!("group {group}: there is no queue {}", names.queue)));
        }
        if names.made != Made::ByUs {
            return Ok((there.make(shared).await?, true));
        }
        // One creator at a time: the settings of the first are the group's.
        topology::alone(&live, &names.making, patience(shared), async || {
            let queues = topology::group_queues(&live, &names).await?;
            // One that was found, and deleted meanwhile, may have been declared again by who joined it.
            let is_left = is_found && queue_state(&live, &names.settings).await?.is_none();
            if !queues.is_empty()
                && !is_left
                && let Some(known) = there.join(shared, queues).await?
            {
                return Ok((known, false));
            }
            Ok((there.make(shared).await?, true))
        })
        .await
    };
    let (known, made) = shared.bounded(ensure).await?;
    Ok((shared.know(group, known), made))
}

/// How long somebody else is waited for who makes or deletes the same group: less than all the time there is, so that it is
/// told who is.
fn patience(shared: &Shared) -> Duration {
    shared.options.connect_timeout.mul_f64(0.8)
}

/// A group that is to stand.
struct Asked<'a> {
    live: &'a Live,
    group: &'a Group,
    names: &'a GroupNames,
    options: &'a GroupOptions,
    defaults: &'a GroupSettings,
}

impl Asked<'_> {
    /// There is none: makes it as it is asked for.
    async fn make(&self, shared: &Shared) -> Result<Known> {
        if self.names.made == Made::ByUs {
            on_channel(self.live, async |channel| {
                topology::delete(channel, &self.names.deleted).await?;
                // Of one that was half made: who is bound to it would be sent what nobody reads.
                topology::delete_exchange(channel, &self.names.queue).await
            })
            .await?;
            settings::write(self.live, &shared.writer, self.names, self.defaults).await?;
        }
        let queues = new_queues(self.names, self.defaults.ordered, &shared.options)?;
        self.declare(shared, queues, self.defaults.clone()).await
    }

    /// There is one: goes by its settings, which must be none but those asked for. `None` if it was deleted meanwhile.
    async fn join(&self, shared: &Shared, queues: Vec<ShortString>) -> Result<Option<Known>> {
        let can_go = self.names.made == Made::ByUs && !shared.options.passive;
        match self.joined(shared, queues).await {
            Err(error) if can_go && error.kind() == ErrorKind::NotFound => Ok(None),
            joined => joined.map(Some),
        }
    }

    async fn joined(&self, shared: &Shared, queues: Vec<ShortString>) -> Result<Known> {
        let Self { live, group, names, options, defaults } = self;
        let mut settings = None;
        if names.made == Made::ByUs {
            settings = settings::read(live, &shared.writer, group, names, defaults).await?;
            match &settings {
                Some(settings) => options.check_joins(group, settings)?,
                // Either nobody left any, or they are gone already, and the queues before them: or declared again by one of its
                // members that did not come to notice.
                None if topology::group_queues(live, names).await?.is_empty()
                    || queue_state(live, &names.deleted).await?.is_some() =>
                {
                    return Err(missing(group));
                }
                None => {}
            }
        }
        let had = settings.is_some();
        let known = self.declare(shared, queues, settings.unwrap_or_else(|| (*defaults).clone())).await?;
        // Who deletes a group deletes them after its queues, and then those once more that were declared in between. So with them
        // there it is not deleted yet, and without them a queue that stands is nobody's.
        if had && queue_state(live, &names.settings).await?.is_none() {
            return Err(missing(group));
        }
        Ok(known)
    }

    async fn declare(&self, shared: &Shared, queues: Vec<ShortString>, settings: GroupSettings) -> Result<Known> {
        on_channel(self.live, async |channel| {
            let (filter, ordered) = (&self.group.filter, settings.ordered);
            topology::declare_group(channel, self.names, filter, ordered, &queues, &shared.options).await
        })
        .await
        .map_err(|error| topology::conflict(self.group, error))?;
        Ok(known(self.names.clone(), queues, settings))
    }
}

/// What the queues of a group will be called that is not there yet.
fn new_queues(names: &GroupNames, ordered: bool, options: &AmqpOptions) -> Result<Vec<ShortString>> {
    match options.ordered_queues {
        several if several > 1 && ordered && names.made == Made::ByUs => {
            (0..usize::from(several)).map(|index| names.lane(index)).collect()
        }
        _ => Ok(vec![names.queue.clone()]),
    }
}

fn known(names: GroupNames, queues: Vec<ShortString>, settings: GroupSettings) -> Known {
    Known { names, queues, settings, counts: Default::default(), last_error: Default::default() }
}

/// What a subscription without group goes by.
pub(crate) fn alone(options: &GroupOptions, amqp: &AmqpOptions) -> Result<Known> {
    check(options)?;
    // Its names are never used: nothing of it has one.
    let nobody = Group::new("alone".parse()?, TopicFilter::new("alone")?);
    Ok(known(GroupNames::of(&nobody, amqp)?, Vec::new(), options.resolve(None)?))
}

/// Changes nothing: RabbitMQ fixes a queue's arguments, and members go by the settings they joined with.
pub(crate) async fn alter(shared: &Shared, group: &Group, options: &GroupOptions) -> Result<()> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    shared
        .bounded(async {
            if topology::group_queues(&live, &names).await?.is_empty() {
                return Err(missing(group));
            }
            if options.start.is_some() {
                return Err(Error::conflict(format!("group {group}: start counted when it was created")));
            }
            if *options == GroupOptions::new() {
                return Ok(());
            }
            Err(Error::unsupported(format!(
                "group {group}: on RabbitMQ its settings are fixed when it is created; delete it and create it anew"
            )))
        })
        .await
}

pub(crate) async fn delete(shared: &Shared, group: &Group) -> Result<bool> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    let is_ours = names.made == Made::ByUs && !shared.options.passive;
    let delete = async || {
        let queues = topology::group_queues(&live, &names).await?;
        if !queues.is_empty() {
            if is_ours {
                let marked = on_channel(&live, async |channel| topology::mark_deleted(channel, &names).await).await;
                // Where there is room for no queue more, deleting is what makes some.
                marked.or_else(|error| if is_queue_limit(&error) { Ok(()) } else { Err(error) })?;
            }
            delete_queues(&live, &names, &queues).await?;
        }
        Ok(queues)
    };
    let queues = shared
        .bounded(async {
            shared.forget(group);
            let is_there = !topology::group_queues(&live, &names).await?.is_empty();
            if !is_there || !is_ours {
                return delete().await;
            }
            // Who makes one of the name does so before or after.
            match topology::alone(&live, &names.making, patience(shared), delete).await {
                Err(error) if is_queue_limit(&error) => delete().await,
                deleted => deleted,
            }
        })
        .await?;
    // What becomes due from now on has nowhere to go.
    drop_retries(shared, &live, &queues).await.map_err(|error| {
        error.context(format_args!(
            "group {group} is deleted, and not what waits for its retry: it comes to the next of the name"
        ))
    })?;
    Ok(!queues.is_empty())
}

/// Makes a group again whose queues a member found gone: the server has lost them. False if somebody has deleted it, and
/// perhaps made another of the name.
pub(crate) async fn restore(shared: &Shared, group: &Group, known: &Arc<Known>) -> Result<bool> {
    let Known { names, queues, settings, .. } = &**known;
    let live = shared.connection().await?;
    let restore = async || {
        let there = topology::group_queues(&live, names).await?;
        let is_other = !there.is_empty() && there != *queues;
        if is_other || queue_state(&live, &names.deleted).await?.is_some() {
            return Ok(false);
        }
        // Without its message, which a try before this one may not have come to write, they are as known here.
        match settings::read(&live, &shared.writer, group, names, settings).await? {
            Some(found) => {
                let fixed = |settings: &GroupSettings| (settings.ordered, settings.retry, settings.dead_letter.clone());
                if fixed(&found) != fixed(settings) {
                    return Ok(false);
                }
            }
            None => {
                tracing::warn!(%group, "the server has lost the group; it is made again");
                settings::write(&live, &shared.writer, names, settings).await?;
            }
        }
        on_channel(&live, async |channel| {
            let (filter, ordered) = (&group.filter, settings.ordered);
            topology::declare_group(channel, names, filter, ordered, queues, &shared.options).await
        })
        .await?;
        Ok(true)
    };
    let restored = shared.bounded(topology::alone(&live, &names.making, patience(shared), restore)).await?;
    if restored {
        shared.remember(group, known);
    }
    Ok(restored)
}

/// Whether a group that a member declared just now had been deleted after the member found it, so that this alone made it: then it is
/// deleted again.
pub(crate) async fn was_deleted(shared: &Shared, known: &Known) -> Result<bool> {
    let Known { names, queues, .. } = known;
    if names.made != Made::ByUs || shared.options.passive {
        return Ok(false);
    }
    let live = shared.settling_connection().await?;
    // With its settings there, who deletes it has yet to delete once more what was declared.
    let is_left = async || {
        let has_settings = queue_state(&live, &names.settings).await?.is_some();
        Ok(!has_settings && queue_state(&live, &names.deleted).await?.is_some())
    };
    let delete = async || {
        // Another may have been made of the name.
        let is_left = is_left().await?;
        if is_left {
            delete_queues(&live, names, queues).await?;
        }
        Ok(is_left)
    };
    shared
        .bounded(async {
            Ok(is_left().await? && topology::alone(&live, &names.making, patience(shared), delete).await?)
        })
        .await
}

async fn delete_queues(live: &Live, names: &GroupNames, queues: &[ShortString]) -> Result<()> {
    on_channel(live, async |channel| {
        let delete = async || {
            if names.has_lanes(queues) {
                topology::delete_exchange(channel, &names.queue).await?;
            }
            // The last first: what stands is found by counting from the first.
            for queue in queues.iter().rev() {
                topology::delete(channel, queue).await?;
            }
            Ok(())
        };
        delete().await?;
        topology::delete(channel, &names.settings).await?;
        // Who joined meanwhile, or came back, may have declared them again.
        delete().await
    })
    .await
}

pub(crate) async fn purge(shared: &Shared, group: &Group) -> Result<u64> {
    let names = GroupNames::of(group, &shared.options)?;
    let live = shared.connection().await?;
    let purge = async {
        let queues = shared.bounded(topology::group_queues(&live, &names)).await?;
        // First what is due later: it may become due meanwhile.
        let mut purged = drop_retries(shared, &live, &queues).await?;
        for queue in if queues.is_empty() { std::slice::from_ref(&names.queue) } else { &queues } {
            let purge = on_channel(&live, async |channel| topology::purge(channel, queue).await);
            purged += shared.bounded(purge).await?;
        }
        Ok(purged)
    };
    purge.await.map_err(|error: Error| error.context(format_args!("group {group}")))
}

/// Drops what waits in the delay queues for its retry in `queues`, and tells how many. A delay queue is everybody's: what
/// is another group's goes back where it was, as old as it is.
async fn drop_retries(shared: &Shared, live: &Live, queues: &[ShortString]) -> Result<u64> {
    let mut dropped = 0;
    if queues.is_empty() {
        return Ok(dropped);
    }
    for rung in Rung::all(Leads::ToQueue) {
        let delays = rung.name(&shared.options.exchange)?;
        let Some(state) = shared.bounded(queue_state(live, &delays)).await? else { continue };
        dropped += at_length(shared, live, async |channel| {
            let (mut dropped, mut last) = (0, None);
            // No more than were there: others retry meanwhile.
            for _ in 0..state.ready {
                let Some(delivery) = shared.bounded(get(channel, &delays)).await? else { break };
                if queues.contains(&delivery.routing_key) {
                    let acked = channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
                    shared.bounded(async { acked.await.map_err(from_lapin) }).await?;
                    dropped += 1;
                } else {
                    last = Some(delivery.delivery_tag);
                }
            }
            if let Some(tag) = last {
                give_back(shared, channel, tag).await?;
            }
            // An answer from the queue says that it has heard all of it.
            shared.bounded(state_on(channel, &delays)).await?;
            Ok(dropped)
        })
        .await?;
    }
    Ok(dropped)
}

/// Gives back everything up to a tag that is not settled.
pub(crate) async fn give_back(shared: &Shared, channel: &Channel, tag: u64) -> Result<()> {
    let back = BasicNackOptions { multiple: true, requeue: true };
    shared.bounded(async { channel.basic_nack(tag, back).await.map_err(from_lapin) }).await
}

/// As [`on_channel`], for work of many questions: it takes as long as the server answers each in time.
pub(crate) async fn at_length<T>(
    shared: &Shared,
    live: &Live,
    work: impl AsyncFnOnce(&Channel) -> Result<T>,
) -> Result<T> {
    let channel = shared.bounded(live.channel()).await?;
    let done = work(&channel).await;
    if !channel.status().connected() {
        live.wear();
    } else if done.is_ok() {
        // What it held is back by then. After an error an answer may be due.
        let _ = shared.bounded(async { channel.close(200, "OK".into()).await.map_err(from_lapin) }).await;
    }
    done
}

pub(crate) fn missing(group: &Group) -> Error {
    Error::not_found(format!("group {group} does not exist"))
}

pub(crate) async fn get(channel: &Channel, queue: &ShortString) -> Result<Option<lapin::message::Delivery>> {
    let got = channel.basic_get(queue.clone(), BasicGetOptions::default()).await.map_err(from_lapin)?;
    Ok(got.map(|got| got.delivery))
}

/// Adds every group known and every subscription without group.
pub(crate) async fn status(shared: &Shared, status: &mut Status) -> Result<()> {
    let members = shared.members();
    for member in members.iter().filter(|member| member.group.is_none() && !member.stop.is_cancelled()) {
        let mut one = SubscriptionStatus::new(member.filter.clone(), status.state);
        one.in_flight = Some(member.handed());
        one.counts = *member.known.counts.lock();
        one.last_error = member.known.last_error.lock().clone();
        status.subscriptions.push(one);
    }
    if shared.closing.is_cancelled() {
        return Ok(());
    }
    let groups = shared.groups();
    if groups.is_empty() {
        return Ok(());
    }
    // The server is asked once in vain at most, and so is the management API: each time may take as long as connecting.
    let (live, mut away) = match shared.connection_now().await {
        Ok(live) => (Some(live), None),
        Err(error) => (None, Some(error)),
    };
    let mut unanswered = None;
    for (group, known) in groups {
        let states = match (&live, &away) {
            (Some(live), None) => match shared.bounded(states(live, &known)).await {
                Ok(Some(states)) => Some(states),
                Ok(None) => {
                    shared.forget(&group);
                    continue;
                }
                Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => {
                    away = Some(error);
                    None
                }
                Err(error) => return Err(error),
            },
            _ => None,
        };
        let ours = members.iter().filter(|member| member.group.as_ref() == Some(&group));
        let (unacked, handed) =
            ours.fold((0, 0), |(unacked, handed), member| (unacked + member.unacked(), handed + member.handed()));
        let state = if states.is_some() { State::Active } else { State::Connecting };
        let mut one = GroupStatus::new(group, state);
        one.last_error = known.last_error.lock().clone();
        one.in_flight = Some(handed);
        one.counts = *known.counts.lock();
        let Some((own, dead)) = states else {
            one.last_error = away.as_ref().map(Error::to_string);
            status.groups.push(one);
            continue;
        };
        one.lag = Some(own.ready + unacked);
        let asked = match &unanswered {
            None => all_unacked(shared, &known).await,
            Some(error) => Err(Error::clone(error)),
        };
        match asked {
            // The statistics may be older than what our own members know.
            Ok(Some(all)) => {
                let all = all.max(unacked);
                (one.lag, one.in_flight) = (Some(own.ready + all), Some(all));
            }
            Ok(None) => {}
            Err(error) => {
                one.last_error = Some(error.to_string());
                unanswered = Some(error);
            }
        }
        one.members = Some(own.consumers);
        one.dead_letters = Some(dead.map_or(0, |dead| dead.ready));
        status.groups.push(one);
    }
    if let Some(error) = away {
        status.state = State::Connecting;
        status.last_error.get_or_insert_with(|| error.to_string());
    }
    Ok(())
}

/// The state of a group's queues together, and of what keeps its dead letters; `None` if there is no such group.
async fn states(live: &Live, known: &Known) -> Result<Option<(QueueState, Option<QueueState>)>> {
    let mut own: Option<QueueState> = None;
    for queue in &known.queues {
        let Some(state) = queue_state(live, queue).await? else { return Ok(None) };
        // Every member is at every queue.
        let ready = own.map_or(0, |own| own.ready);
        own = Some(QueueState { ready: ready + state.ready, consumers: state.consumers });
    }
    let Some(own) = own else { return Ok(None) };
    Ok(Some((own, queue_state(live, &known.names.dead).await?)))
}

/// What all members of a group hold, those of other processes included: where the management API's
/// address is given.
async fn all_unacked(shared: &Shared, known: &Known) -> Result<Option<u64>> {
    let options = &shared.options;
    let Some(authority) = &options.management else { return Ok(None) };
    let mut all = 0;
    for queue in &known.queues {
        all += management::unacked(authority, queue.as_str(), options, options.connect_timeout).await?;
    }
    Ok(Some(all))
}
