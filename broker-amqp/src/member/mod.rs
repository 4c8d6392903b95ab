//! What a subscription holds: deliveries waiting, handed out and held.

mod settle;

use std::collections::HashMap;
use std::sync::Arc;
use std::task::Waker;

use broker_core::{
    Counts, Deliveries, Delivery, Error, Failure, Gap, Group, GroupSettings, Message, MessageId, Result, Settle,
    Timestamp, Topic, TopicFilter,
};
use bytes::Bytes;
use lapin::types::ShortString;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::acks::{Acks, Said};
use crate::broker::Shared;
use crate::lanes::Lanes;
use crate::naming::GroupNames;
use crate::wire::Arrived;
use settle::{Batch, Handed, Replaced};

/// A message at this member.
#[derive(Clone, Debug)]
pub(crate) struct Inbound {
    pub(crate) message: Message,
    pub(crate) topic: Topic,
    /// This delivery: 1 is the first.
    pub(crate) attempt: u32,
    pub(crate) first: Timestamp,
    pub(crate) redeliveries: u64,
    pub(crate) tag: u64,
    /// When the server handed it over.
    pub(crate) since: Instant,
}

/// What is known of a group as long as the broker lives.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) names: GroupNames,
    /// Its queue; several, of an ordered group that has been given several.
    pub(crate) queues: Vec<ShortString>,
    pub(crate) settings: GroupSettings,
    pub(crate) counts: Mutex<Counts>,
    pub(crate) last_error: Mutex<Option<String>>,
}

pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    pub(crate) group: Option<Group>,
    pub(crate) known: Arc<Known>,
    pub(crate) filter: TopicFilter,
    /// The queue of its group that it consumes.
    pub(crate) queue: ShortString,
    pub(crate) prefetch: u16,
    /// Whether retries wait here rather than on the server.
    held_here: bool,
    pub(crate) state: Mutex<State>,
    /// There is something to tell the server.
    pub(crate) wire: Notify,
    /// There is much to tell it.
    pub(crate) full: Notify,
    /// A delivery was settled.
    pub(crate) settled: Notify,
    /// Another member is to have its turn.
    pub(crate) step_back: Notify,
    /// The subscription is to end.
    pub(crate) stop: CancellationToken,
}

pub(crate) struct State {
    /// Counts the channels this member has had.
    epoch: u64,
    up: bool,
    /// Its group was.
    deleted: bool,
    pub(crate) queue: ShortString,
    acks: Acks,
    lanes: Lanes<Inbound>,
    /// Whether anything came on this channel: of several members of a queue one is active, and nothing
    /// else tells which.
    active: bool,
    /// Nothing is handed out.
    paused: bool,
    /// Nothing is taken any more, and what was is sent anew where it has to be: that is under way.
    leaving: bool,
    renewed: Vec<Settle>,
    /// Handed out and unsettled, on this channel.
    pub(crate) handed: usize,
    remembered: HashMap<MessageId, Remembered>,
    /// How often this member gave messages of an ordered group back that nobody was to have yet: the server counts it as it counts a
    /// lost connection.
    returned: HashMap<MessageId, u64>,
    /// Whether the keeping queue is known to stand.
    kept: bool,
    /// Acks and nacks taken for the wire and not written yet.
    telling: bool,
    /// Whether any were, on this channel.
    has_told: bool,
    gap: Option<Gap>,
    pub(crate) waker: Option<Waker>,
    pub(crate) close_waker: Option<Waker>,
    /// Nothing is delivered any more: the end, or the error that ended it.
    pub(crate) ended: Option<Result<()>>,
}

/// Attempts of held messages that are remembered at most, and returns.
const MAX_REMEMBERED: usize = 65_536;

#[derive(Clone, Copy)]
struct Remembered {
    attempts: u32,
    first: Timestamp,
    due: Timestamp,
}

impl Member {
    pub(crate) fn new(
        shared: Arc<Shared>,
        group: Option<Group>,
        known: Arc<Known>,
        filter: TopicFilter,
        queue: ShortString,
        prefetch: u16,
    ) -> Self {
        let ordered = known.settings.ordered;
        let stop = shared.closing.child_token();
        Self {
            shared,
            held_here: ordered || group.is_none(),
            group,
            known,
            filter,
            queue,
            prefetch,
            state: Mutex::new(State {
                epoch: 0,
                up: false,
                deleted: false,
                queue: ShortString::default(),
                acks: Acks::new(),
                lanes: Lanes::new(ordered),
                active: false,
                paused: false,
                leaving: false,
                renewed: Vec::new(),
                handed: 0,
                remembered: HashMap::new(),
                returned: HashMap::new(),
                kept: false,
                telling: false,
                has_told: false,
                gap: None,
                waker: None,
                close_waker: None,
                ended: None,
            }),
            wire: Notify::new(),
            full: Notify::new(),
            settled: Notify::new(),
            step_back: Notify::new(),
            stop,
        }
    }

    /// A channel stands, and is about to consume `queue`. Nothing is handed out until it [does](Self::resume): its acks would be told to
    /// nobody.
    pub(crate) fn begin(&self, queue: ShortString) -> u64 {
        let mut state = self.state.lock();
        state.epoch += 1;
        state.up = true;
        state.paused = true;
        state.queue = queue;
        state.epoch
    }

    /// Hands out what comes on this channel.
    pub(crate) fn resume(&self) {
        let waker = {
            let mut state = self.state.lock();
            state.paused = false;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The channel is gone: the server gives what was unsettled to others, or to us again.
    pub(crate) fn lost(&self) {
        let mut state = self.state.lock();
        if !std::mem::take(&mut state.up) {
            return;
        }
        state.acks = Acks::new();
        state.lanes = Lanes::new(self.known.settings.ordered);
        state.active = false;
        state.paused = false;
        state.leaving = false;
        state.renewed.clear();
        state.handed = 0;
        state.kept = false;
        state.telling = false;
        state.has_told = false;
        if self.group.is_none() && state.ended.is_none() {
            state.gap = Some(state.gap.map_or(Gap::Unknown, |gap| gap.and(Gap::Unknown)));
        }
        drop(state);
        self.settled.notify_waiters();
    }

    /// Its group was deleted, with all that is held here.
    pub(crate) fn deleted(&self) {
        self.state.lock().deleted = true;
    }

    /// Nothing more will be delivered.
    pub(crate) fn end(&self, with: Result<()>) {
        let wakers = {
            let mut state = self.state.lock();
            if state.ended.is_none() {
                state.ended = Some(with);
            }
            [state.waker.take(), state.close_waker.take()]
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    pub(crate) fn take_gap(&self) -> Option<Gap> {
        self.state.lock().gap.take()
    }

    /// Deliveries at this member, handed out or not.
    pub(crate) fn unacked(&self) -> u64 {
        let state = self.state.lock();
        (state.handed + state.lanes.len()) as u64
    }

    /// Whether one member of its queue receives at a time, as order asks for.
    pub(crate) fn is_one_at_a_time(&self) -> bool {
        self.group.is_some() && self.known.settings.ordered
    }

    /// Hands out nothing more on this channel. What comes from now on goes back; where order is kept it does so with the
    /// channel, in its place.
    pub(crate) fn leave(&self) {
        let mut state = self.state.lock();
        (state.paused, state.leaving) = (true, true);
    }

    /// Whether it is the one that receives from its queue, as far as it can know.
    pub(crate) fn is_active(&self) -> bool {
        self.state.lock().active
    }

    /// Waits until it is asked to step back, and until nothing is in anybody's hands: then another member
    /// may go on without overtaking this one. While retries are held here it stays: their count would be
    /// lost.
    pub(crate) async fn stepped_back(&self) {
        loop {
            self.step_back.notified().await;
            self.state.lock().paused = true;
            loop {
                let settled = self.settled.notified();
                if self.handed() == 0 {
                    break;
                }
                settled.await;
            }
            if self.state.lock().remembered.is_empty() {
                return;
            }
            self.resume();
        }
    }

    pub(crate) fn handed(&self) -> u64 {
        self.state.lock().handed as u64
    }

    /// Messages came, in the order of their tags.
    pub(crate) fn arrived(self: &Arc<Self>, epoch: u64, batch: Vec<(u64, Result<Arrived, Undecodable>)>) {
        let now = Timestamp::now();
        let mut waker = None;
        let mut aside = Vec::new();
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return;
            }
            if state.leaving {
                drop(state);
                return self.refuse(epoch, batch);
            }
            state.active |= !batch.is_empty();
            for (tag, arrived) in batch {
                state.acks.delivered(tag);
                match arrived {
                    Ok(arrived) => {
                        let due = self.due(&state, &arrived);
                        let inbound = self.inbound(&state, tag, arrived, now);
                        if let Some(due) = due.filter(|due| *due > now) {
                            // A retry that was here before comes back: what is behind it must not overtake it now.
                            let holds = self.held_here
                                && state.remembered.contains_key(inbound.message.id())
                                && state.lanes.hold(inbound.message.key());
                            aside.push((inbound, Aside::NotDue { due, holds }));
                        } else if self.group.is_some() && inbound.redeliveries >= self.shared.options.max_redeliveries {
                            aside.push((inbound, Aside::Redelivered));
                        } else {
                            state.lanes.push(inbound.message.key().cloned().as_ref(), inbound);
                        }
                    }
                    Err(undecodable) => {
                        let Undecodable { reason, message, topic } = undecodable;
                        let topic = topic.or_else(|| self.filter.topic()).unwrap_or_else(unknown_topic);
                        // It was delivered to nobody.
                        let inbound = Inbound {
                            message,
                            topic,
                            attempt: 0,
                            first: now,
                            redeliveries: 0,
                            tag,
                            since: Instant::now(),
                        };
                        aside.push((inbound, Aside::Undecodable(reason)));
                    }
                }
            }
            if state.lanes.is_ready() {
                waker = state.waker.take();
            }
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        for (inbound, why) in aside {
            match why {
                Aside::NotDue { due, holds } if self.held_here => self.hold(epoch, inbound, due.since(now), holds),
                Aside::NotDue { due, .. } => {
                    let attempts = inbound.attempt - 1;
                    drop(self.forward(epoch, inbound, attempts, due, Replaced::Renewed(Handed::No)));
                }
                Aside::Redelivered => {
                    let failure = Failure::new("redelivered").with_status("redelivered");
                    drop(self.bury(epoch, inbound, failure, Replaced::Buried(Handed::No)));
                }
                Aside::Undecodable(reason) => {
                    let failure = Failure::new(format!("undecodable: {reason}")).with_status("codec");
                    drop(self.bury(epoch, inbound, failure, Replaced::Buried(Handed::No)));
                }
            }
        }
    }

    fn inbound(&self, state: &State, tag: u64, arrived: Arrived, now: Timestamp) -> Inbound {
        let Arrived { message, topic, attempts, first, redeliveries, due: _ } = arrived;
        let remembered = state.remembered.get(message.id()).filter(|_| self.held_here);
        let returned = state.returned.get(message.id()).copied().unwrap_or(0);
        Inbound {
            attempt: attempts.max(remembered.map_or(0, |one| one.attempts)).saturating_add(1),
            first: remembered.map(|one| one.first).or(first).unwrap_or(now),
            message,
            topic,
            redeliveries: redeliveries.saturating_sub(returned),
            tag,
            since: Instant::now(),
        }
    }

    fn due(&self, state: &State, arrived: &Arrived) -> Option<Timestamp> {
        let remembered = state.remembered.get(arrived.message.id()).filter(|_| self.held_here).map(|one| one.due);
        arrived.due.max(remembered)
    }

    /// Hands out up to `limit` deliveries. What has expired is discarded, and counted.
    pub(crate) fn hand_out(self: &Arc<Self>, state: &mut State, batch: &mut Vec<Delivery>, limit: usize) -> usize {
        if state.paused {
            return 0;
        }
        let mut items = Vec::new();
        let mut now = None;
        let mut expired = 0;
        while items.len() < limit {
            let Some(item) = state.lanes.pop() else { break };
            let over = item.message.expires_at().is_some_and(|at| at <= *now.get_or_insert_with(Timestamp::now));
            if over {
                expired += 1;
                state.acks.ack(item.tag);
                state.lanes.done(item.message.key());
            } else {
                items.push(item);
            }
        }
        if expired > 0 {
            self.known.counts.lock().expired += expired;
            self.wire.notify_one();
        }
        let count = items.len();
        if count > 0 {
            state.handed += count;
            self.known.counts.lock().delivered += count as u64;
            let handed: Arc<dyn Deliveries> =
                Arc::new(Batch { member: Arc::clone(self), epoch: state.epoch, items: items.into_boxed_slice() });
            batch.extend((0..count).map(|index| Delivery::new(Arc::clone(&handed), index as u32)));
        }
        count
    }

    /// Acks that are sent at once; fewer wait a moment for more.
    pub(crate) fn threshold(&self) -> usize {
        usize::from(self.prefetch / 4).clamp(1, 64)
    }

    /// What is to be told to the server, in this order.
    pub(crate) fn to_tell(&self) -> Vec<Said> {
        let mut state = self.state.lock();
        let told = state.acks.flush();
        state.telling = true;
        state.has_told |= !told.is_empty();
        told
    }

    /// It is written.
    pub(crate) fn told(&self) {
        self.state.lock().telling = false;
    }

    /// Whether something is being written.
    pub(crate) fn telling(&self) -> bool {
        self.state.lock().telling
    }

    /// Whether the server was told anything on this channel.
    pub(crate) fn has_told(&self) -> bool {
        self.state.lock().has_told
    }

    /// How many acks wait to be told, and whether anything else does.
    pub(crate) fn waiting_to_tell(&self) -> (usize, bool) {
        let state = self.state.lock();
        (state.acks.pending(), state.acks.gives_back())
    }

    /// Gives back what was not handed out. What is returned is to be awaited: some of it is sent anew.
    pub(crate) fn give_back_waiting(self: &Arc<Self>) -> Vec<Settle> {
        let (epoch, worn, mut renewed) = {
            let mut state = self.state.lock();
            let (worn, fresh): (Vec<_>, Vec<_>) =
                state.lanes.drain().into_iter().partition(|item| self.is_worn(item.redeliveries));
            for item in fresh {
                state.acks.give_back(item.tag);
            }
            (state.epoch, worn, std::mem::take(&mut state.renewed))
        };
        self.wire.notify_one();
        renewed.extend(worn.into_iter().map(|item| self.renew(epoch, item, Timestamp::from_millis(0))));
        renewed
    }

    /// Gives back what comes while this member leaves, likewise.
    fn refuse(self: &Arc<Self>, epoch: u64, batch: Vec<(u64, Result<Arrived, Undecodable>)>) {
        if self.is_one_at_a_time() {
            return;
        }
        let mut worn = Vec::new();
        {
            let mut state = self.state.lock();
            if !state.is(epoch) {
                return;
            }
            for (tag, arrived) in batch {
                state.acks.delivered(tag);
                match arrived {
                    Ok(arrived) if self.is_worn(arrived.redeliveries) => {
                        let due = arrived.due.unwrap_or(Timestamp::from_millis(0));
                        worn.push((self.inbound(&state, tag, arrived, Timestamp::now()), due));
                    }
                    _ => {
                        state.acks.give_back(tag);
                    }
                }
            }
        }
        self.wire.notify_one();
        let renewed: Vec<_> = worn.into_iter().map(|(item, due)| self.renew(epoch, item, due)).collect();
        self.state.lock().renewed.extend(renewed);
    }

    fn renew(self: &Arc<Self>, epoch: u64, item: Inbound, due: Timestamp) -> Settle {
        let attempts = item.attempt - 1;
        self.forward(epoch, item, attempts, due, Replaced::Renewed(Handed::No))
    }
}

impl State {
    fn is(&self, epoch: u64) -> bool {
        self.up && self.epoch == epoch
    }

    /// What settling comes to on a channel that is gone: nothing, where the message is as well.
    fn too_late(&self) -> Result<()> {
        if self.deleted {
            return Ok(());
        }
        Err(Error::unavailable("the connection to RabbitMQ was lost before this was settled: the message comes back"))
    }

    /// A delivery goes back to the queue, and with it what waits here behind it, of this key, and would overtake it.
    fn give_back(&mut self, tag: u64, key: Option<&Bytes>) {
        let behind = self.lanes.give_back(key);
        self.acks.give_back(tag);
        for item in behind {
            self.acks.give_back(item.tag);
            self.gave_back(item.message.id());
        }
    }

    /// A message of an ordered group goes back unread.
    fn gave_back(&mut self, id: &MessageId) {
        if self.returned.len() >= MAX_REMEMBERED {
            self.returned.clear();
        }
        *self.returned.entry(id.clone()).or_insert(0) += 1;
    }

    /// A delivery that was handed out is. Whom to wake, if the next of its key may go now.
    #[must_use]
    fn settled(&mut self, item: &Inbound) -> Option<Waker> {
        self.handed = self.handed.saturating_sub(1);
        self.over(item)
    }

    /// A delivery that was handed out before is over, likewise.
    #[must_use]
    fn over(&mut self, item: &Inbound) -> Option<Waker> {
        // Mostly there is nothing, and an id hashed for nothing is half of what an ack costs.
        if !self.remembered.is_empty() {
            self.remembered.remove(item.message.id());
        }
        if !self.returned.is_empty() {
            self.returned.remove(item.message.id());
        }
        self.lanes.done(item.message.key());
        if self.lanes.is_ready() { self.waker.take() } else { None }
    }
}

/// Why a message does not wait with the others.
enum Aside {
    /// `holds`: it holds its key back.
    NotDue {
        due: Timestamp,
        holds: bool,
    },
    Redelivered,
    Undecodable(String),
}

/// A message that cannot be read, and what there is of it.
pub(crate) struct Undecodable {
    pub(crate) reason: String,
    pub(crate) message: Message,
    pub(crate) topic: Option<Topic>,
}

fn unknown_topic() -> Topic {
    // Its grammar is right.
    "unknown".parse().unwrap_or_else(|_| unreachable!("a plain word is a topic"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use broker_core::{BrokerUrl, GroupOptions};

    use super::*;
    use crate::{AmqpBroker, AmqpOptions};

    fn arrived(message: &Message, redeliveries: u64) -> Arrived {
        let topic = "t".parse().unwrap();
        Arrived { message: message.clone(), topic, attempts: 0, first: None, due: None, redeliveries }
    }

    /// Of a broker that closes when it is dropped.
    fn member() -> (AmqpBroker, Arc<Member>) {
        let url = BrokerUrl::parse("amqp://127.0.0.1:1").unwrap();
        let broker = AmqpBroker::new(AmqpOptions::from_url(url).unwrap());
        let shared = Arc::clone(&broker.shared);
        shared.start().unwrap();
        let group: Group = "g@t".parse().unwrap();
        let known = Known {
            names: GroupNames::of(&group, &shared.options).unwrap(),
            queues: Vec::new(),
            settings: GroupOptions::new().with_ordered(true).resolve(Some(&group.name)).unwrap(),
            counts: Mutex::default(),
            last_error: Mutex::default(),
        };
        let filter = group.filter.clone();
        (broker, Arc::new(Member::new(shared, Some(group), Arc::new(known), filter, "q".into(), 10)))
    }

    #[tokio::test]
    async fn nothing_is_handed_out_before_its_ack_can_be_told_nor_of_another_channel() {
        let (_broker, member) = member();
        let mut batch = Vec::new();
        let mut handed = || member.hand_out(&mut member.state.lock(), &mut batch, 10);
        let first = member.begin("q".into());
        member.arrived(first, vec![(1, Ok(arrived(&Message::new("early"), 0)))]);
        assert_eq!(handed(), 0);
        member.lost();
        let second = member.begin("q".into());
        member.resume();
        member.arrived(first, vec![(2, Ok(arrived(&Message::new("late"), 0)))]);
        assert_eq!(handed(), 0);
        member.arrived(second, vec![(1, Ok(arrived(&Message::new("now"), 0)))]);
        assert_eq!(handed(), 1);
    }

    /// What waits for hours is held a quarter of an hour at a time, and what is behind it as well. The server counts each.
    #[tokio::test]
    async fn what_waits_for_long_in_an_ordered_group_is_not_taken_for_what_breaks_its_readers() {
        let (_broker, member) = member();
        let first = member.begin("q".into());
        member.resume();
        let messages = [Message::new("retried"), Message::new("behind")].map(|message| message.with_key("k"));
        let arrive = |epoch, tag: u64, redeliveries| {
            let batch = messages.iter().zip(tag..).map(|(message, tag)| (tag, Ok(arrived(message, redeliveries))));
            member.arrived(epoch, batch.collect());
        };
        let receive = || {
            let mut batch = Vec::new();
            member.hand_out(&mut member.state.lock(), &mut batch, 10);
            assert_eq!(batch.len(), 1);
            batch.pop().unwrap()
        };
        arrive(first, 1, 0);
        receive().retry_after(Duration::from_secs(24 * 3600)).await.unwrap();
        for round in 1..60 {
            let tag = 2 * round - 1;
            let arrived = arrived(&messages[0], round - 1);
            let item = member.inbound(&member.state.lock(), tag, arrived, Timestamp::now());
            member.held(first, item, true, false);
            assert_eq!(member.to_tell(), [Said::Nack(tag), Said::Nack(tag + 1)], "round {round}");
            arrive(first, tag + 2, round);
        }
        // Somebody else had them as well, and lost its connection.
        member.state.lock().remembered.clear();
        member.lost();
        let second = member.begin("q".into());
        member.resume();
        arrive(second, 1, 59 + 19);
        assert_eq!(receive().message().payload(), "retried");
    }
}
