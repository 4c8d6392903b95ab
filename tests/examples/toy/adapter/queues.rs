//! What stands behind the lock: a queue for each group, and for each subscription without one.

use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;
use std::time::{Duration, Instant};

use broker_core::{
    Counts, DeadLetter, Error, Failure, Group, GroupOptions, GroupSettings, Message, Result, Settlement, Timestamp,
    Topic, TopicFilter,
};

/// Where the broker is in its life.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Open,
    Closing,
    Closed,
}

/// A message kept for a queue.
pub(super) struct Item {
    pub(super) message: Message,
    pub(super) topic: Topic,
    /// Deliveries so far.
    pub(super) attempts: u32,
    /// When it was first delivered.
    pub(super) first: Option<Timestamp>,
    /// Not before this.
    due: Option<Instant>,
}

/// The backlog of a group, or of a subscription without one.
pub(super) struct Queue {
    pub(super) group: Option<Group>,
    pub(super) filter: TopicFilter,
    pub(super) settings: GroupSettings,
    pub(super) waiting: VecDeque<Item>,
    /// Unsettled deliveries by member; those of members that left stay until they are settled.
    pub(super) in_flight: BTreeMap<u64, usize>,
    pub(super) members: Vec<u64>,
    pub(super) counts: Counts,
}

impl Queue {
    pub(super) fn unsettled(&self) -> usize {
        self.in_flight.values().sum()
    }

    /// The next item that is due, or when the first one is.
    pub(super) fn next(&mut self, now: Instant) -> Result<Item, Option<Instant>> {
        let due = self.waiting.iter().position(|item| item.due.is_none_or(|due| due <= now));
        due.and_then(|place| self.waiting.remove(place))
            .ok_or_else(|| self.waiting.iter().filter_map(|item| item.due).min())
    }

    fn is_drained(&self, now: Instant) -> bool {
        let deliverable = self.waiting.iter().any(|item| item.due.is_none_or(|due| due <= now));
        self.unsettled() == 0 && (self.members.is_empty() || !deliverable)
    }
}

/// Everything, under one lock.
pub(super) struct Queues {
    pub(super) life: Life,
    pub(super) queues: BTreeMap<u64, Queue>,
    last_id: u64,
    /// Receivers that wait; any change wakes all, which is what makes this a toy.
    wakers: Vec<Waker>,
}

impl Queues {
    pub(super) fn new() -> Self {
        Self { life: Life::Open, queues: BTreeMap::new(), last_id: 0, wakers: Vec::new() }
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.life == Life::Open { Ok(()) } else { Err(Error::closed("the broker was closed")) }
    }

    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn wait(&mut self, waker: &Waker) {
        self.wakers.push(waker.clone());
    }

    pub(super) fn wake_all(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
    }

    /// Puts a message into every queue that wants it; how many.
    pub(super) fn append(&mut self, topic: &Topic, message: &Message) -> u64 {
        let mut matched = 0;
        for queue in self.queues.values_mut().filter(|queue| queue.filter.matches(topic)) {
            let (message, topic) = (message.clone(), topic.clone());
            queue.waiting.push_back(Item { message, topic, attempts: 0, first: None, due: None });
            matched += 1;
        }
        self.wake_all();
        matched
    }

    pub(super) fn find(&self, group: &Group) -> Option<u64> {
        self.queues.iter().find(|(_, queue)| queue.group.as_ref() == Some(group)).map(|(id, _)| *id)
    }

    /// The queue of a group, made if there is none; whether it was made.
    pub(super) fn join(
        &mut self,
        group: Option<Group>,
        filter: &TopicFilter,
        options: &GroupOptions,
    ) -> Result<(u64, bool)> {
        self.check_open()?;
        let settings = options.resolve(group.as_ref().map(|group| &group.name))?;
        if let Some(group) = &group
            && let Some(id) = self.find(group)
        {
            let settings = self.queues.get(&id).map(|queue| &queue.settings).unwrap_or(&settings);
            options.check_joins(group, settings)?;
            return Ok((id, false));
        }
        let id = self.next_id();
        let queue = Queue {
            group,
            filter: filter.clone(),
            settings,
            waiting: VecDeque::new(),
            in_flight: BTreeMap::new(),
            members: Vec::new(),
            counts: Counts::default(),
        };
        self.queues.insert(id, queue);
        Ok((id, true))
    }

    /// Settles a delivery that `member` of queue `id` holds. A queue that is gone has nothing to settle.
    pub(super) fn settle(&mut self, id: u64, member: u64, mut item: Item, settlement: Settlement) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        if let Some(held) = queue.in_flight.get_mut(&member) {
            *held -= 1;
        }
        let failed = match settlement {
            Settlement::Ack => {
                queue.counts.acked += 1;
                None
            }
            Settlement::Retry { after, failure } if !queue.settings.retry.is_exhausted(item.attempts) => {
                queue.counts.retried += 1;
                let wait: Duration = after.unwrap_or_else(|| queue.settings.retry.backoff(item.attempts));
                item.due = Some(Instant::now() + wait);
                let _ = failure;
                queue.waiting.push_back(item);
                None
            }
            Settlement::Retry { failure, .. } => {
                Some((item, failure.unwrap_or_else(|| Failure::new("no attempt is left"))))
            }
            Settlement::Reject(failure) => Some((item, failure)),
            Settlement::Release => {
                item.attempts -= 1;
                queue.waiting.push_front(item);
                None
            }
        };
        if let Some((item, failure)) = failed {
            queue.counts.dead_lettered += 1;
            let (group, topic) = (queue.group.clone(), queue.settings.dead_letter.clone());
            self.bury(item, failure, group, topic);
        }
        self.wake_all();
    }

    fn bury(&mut self, item: Item, failure: Failure, group: Option<Group>, dead_letter: Option<Topic>) {
        let Some(dead_letter) = dead_letter.filter(|_| !DeadLetter::is_dead(&item.message)) else { return };
        let now = Timestamp::now();
        let Item { message, topic, attempts, first, .. } = item;
        let letter = DeadLetter { message, topic, group, failure, attempts, first: first.unwrap_or(now), last: now };
        self.append(&dead_letter, &letter.into_message());
    }

    pub(super) fn is_drained(&self) -> bool {
        let now = Instant::now();
        self.queues.values().all(|queue| queue.is_drained(now))
    }
}
