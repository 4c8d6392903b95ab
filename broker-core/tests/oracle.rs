//! The in-process broker against a simple oracle: a list of messages per group.
//!
//! Random sequences of publish (with key, delay, expiry, deduplication key; waiting, refused, withdrawn),
//! subscribe (new, or from what is retained), receive, settle, drop, purge, delete and the passing of
//! time run on both; after each step the broker may have handed out only what the oracle allows, and
//! at the end everything published is accounted for: received to the last message, or named by the
//! report of a close. Time is paused and moves only by a step, so that what the system's clock decides
//! is far from it: expiry is long past or far away, and a delay is known up to some seconds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use broker_core::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Publish {
        topic: usize,
        key: Option<u8>,
        extra: Extra,
    },
    /// Drops a publish that waits.
    Withdraw {
        waiting: usize,
    },
    PublishBatch {
        topic: usize,
        count: usize,
    },
    Subscribe {
        group: usize,
        max_in_flight: usize,
    },
    /// A subscription without group, to this group's filter.
    Solo {
        group: usize,
    },
    /// One that begins with what is retained.
    Late {
        filter: usize,
    },
    Receive {
        member: usize,
        limit: usize,
    },
    Settle {
        delivery: usize,
        how: How,
    },
    Leave {
        member: usize,
    },
    Purge {
        group: usize,
    },
    Delete {
        group: usize,
    },
    Pass {
        millis: u64,
    },
}

#[derive(Clone, Copy, Debug)]
enum How {
    Ack,
    Retry { after: u64 },
    Reject,
    Release,
    Drop,
}

/// What a message has beside its key. Delays only on topic `b`, whose groups have no bound that matters.
#[derive(Clone, Copy, Debug)]
enum Extra {
    None,
    Delay {
        seconds: u64,
    },
    /// Before it is published.
    Expired,
    ExpiresIn {
        hours: u64,
    },
    Dedup {
        key: u8,
    },
}

const TOPICS: [&str; 5] = ["a.x", "a.y", "b", "c", "d"];
/// The topic where publishes wait.
const WAITING: usize = 4;
/// Filters of which nothing is delayed, so that what is retained is in the order of publishing.
const LATE: [&str; 3] = ["a.x", "a.>", "c"];
/// Name, filter, whether it is ordered, its bound and what happens at it.
const GROUPS: [(&str, &str, bool, u64, Overflow); 11] = [
    ("one", "a.x", false, u64::MAX, Overflow::Wait),
    ("two", "a.x", true, u64::MAX, Overflow::Wait),
    ("all", "a.>", false, u64::MAX, Overflow::Wait),
    ("keys", "a.*", true, u64::MAX, Overflow::Wait),
    ("b", "b", false, u64::MAX, Overflow::Wait),
    ("bkeys", "b", true, u64::MAX, Overflow::Wait),
    ("oldest", "c", false, 7, Overflow::DropOldest),
    ("tight", "c", false, 10, Overflow::Reject),
    ("slow", "d", false, 5, Overflow::Wait),
    ("slower", "*", true, 3_000, Overflow::DropOldest),
    ("older", "c", false, 5, Overflow::DropOldest),
];
/// Messages a topic retains, where it does.
const RETAINED: usize = 30;
const DEDUP_WINDOW: u64 = 12_000;
/// Milliseconds by which a delay may seem short: the real time that passed meanwhile.
const SLACK: u64 = 5_000;
const MAX_ATTEMPTS: u32 = 3;
/// Milliseconds a retry without a delay of its own waits at most.
const BACKOFF: u64 = 20;

fn step() -> impl Strategy<Value = Step> {
    let how = prop_oneof![
        4 => Just(How::Ack),
        1 => (0_u64..40).prop_map(|after| How::Retry { after }),
        1 => Just(How::Reject),
        1 => Just(How::Release),
        1 => Just(How::Drop),
    ];
    let extra = prop_oneof![
        4 => Just(Extra::None),
        2 => (1_u64..20).prop_map(|seconds| Extra::Delay { seconds }),
        1 => Just(Extra::Expired),
        1 => (1_u64..9).prop_map(|hours| Extra::ExpiresIn { hours }),
        1 => (0_u8..3).prop_map(|key| Extra::Dedup { key }),
    ];
    let publish = (0..TOPICS.len(), proptest::option::of(0_u8..3), extra);
    prop_oneof![
        12 => publish.prop_map(|(topic, key, extra)| Step::Publish { topic, key, extra }),
        1 => any::<usize>().prop_map(|waiting| Step::Withdraw { waiting }),
        1 => (0..LATE.len()).prop_map(|filter| Step::Late { filter }),
        2 => (0..WAITING, 1_usize..400).prop_map(|(topic, count)| Step::PublishBatch { topic, count }),
        3 => (0..GROUPS.len(), 1_usize..400).prop_map(|(group, max_in_flight)| Step::Subscribe { group, max_in_flight }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Solo { group }),
        8 => (any::<usize>(), 1_usize..400).prop_map(|(member, limit)| Step::Receive { member, limit }),
        12 => (any::<usize>(), how).prop_map(|(delivery, how)| Step::Settle { delivery, how }),
        1 => any::<usize>().prop_map(|member| Step::Leave { member }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Purge { group }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Delete { group }),
        3 => (1_u64..60).prop_map(|millis| Step::Pass { millis }),
        1 => (1_000_u64..9_000).prop_map(|millis| Step::Pass { millis }),
    ]
}

/// What a group should hold.
#[derive(Default)]
struct Oracle {
    ordered: bool,
    /// By place, in the order in which they were taken.
    messages: BTreeMap<u64, Held>,
    /// The last message that was handed out for the first time: these come in order.
    fresh: Option<u64>,
    dead: u64,
    expired: u64,
    dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    key: Option<u8>,
    attempts: u32,
    /// Whether it was handed out before; one given back has no attempt and is not new either.
    seen: bool,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Waiting,
    /// Not before this time.
    Until(u64),
    /// By this time at the latest: the backoff is drawn by the broker.
    By(u64),
    /// Not before this time, less the slack, and at some time after.
    Delayed(u64),
    InFlight,
}

/// A publish that waits, or did until it was admitted.
struct Waiting {
    number: u64,
    key: Option<u8>,
    publish: Publish,
}

struct Member {
    oracle: usize,
    filter: &'static str,
    solo: bool,
    max_in_flight: usize,
    /// Of the past it began with.
    gaps: usize,
    in_flight: usize,
    subscription: Option<Subscription>,
}

struct InHand {
    member: usize,
    number: u64,
    delivery: Delivery,
}

#[derive(Default)]
struct World {
    broker: MemoryBroker,
    now: u64,
    published: u64,
    /// The place of each message by its number: where it was taken, which for one that waited is later.
    places: HashMap<u64, u64>,
    /// By topic, if the broker retains.
    retained: Option<[VecDeque<(u64, Held)>; TOPICS.len()]>,
    /// By topic and key: until when, and the number and copies of the first.
    dedup: HashMap<(usize, u8), (u64, MessageId)>,
    waiting: VecDeque<Waiting>,
    oracles: Vec<Oracle>,
    /// The oracle of each group that exists.
    groups: [Option<usize>; GROUPS.len()],
    members: Vec<Member>,
    in_hand: Vec<InHand>,
}

fn group(index: usize) -> Group {
    let (name, filter, ..) = GROUPS[index];
    Group::new(name.parse().unwrap(), filter.parse().unwrap())
}

fn bounded(index: usize) -> GroupOptions {
    let (_, _, ordered, bound, overflow) = GROUPS[index];
    let backlog = Backlog::default().with_overflow(overflow);
    options(ordered).with_backlog(if bound < u64::MAX { backlog.with_max_messages(bound).unwrap() } else { backlog })
}

fn options(ordered: bool) -> GroupOptions {
    let retry = RetryPolicy::default().with_max_attempts(MAX_ATTEMPTS).unwrap();
    let backoff = Duration::from_millis(BACKOFF);
    GroupOptions::new().with_ordered(ordered).with_retry(retry.with_backoff(backoff, backoff, 1.0).unwrap())
}

fn poll(subscription: &mut Subscription, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
    // Much to look at without result makes a subscription come back later.
    for _ in 0..20 {
        match subscription.poll_receive(&mut Context::from_waker(Waker::noop()), batch, limit) {
            Poll::Pending => {}
            ready => return ready,
        }
    }
    Poll::Pending
}

impl World {
    fn new(retains: bool) -> Self {
        let options = MemoryOptions::new().with_dedup_window(Duration::from_millis(DEDUP_WINDOW));
        let options = if retains { options.with_retention(Retention::messages(RETAINED)) } else { options };
        let broker = MemoryBroker::with_options(options);
        Self { broker, retained: retains.then(Default::default), ..Self::default() }
    }

    async fn run(&mut self, step: &Step) {
        match *step {
            Step::Publish { topic: WAITING, key, .. } => self.publish_patiently(key),
            Step::Publish { topic, key, extra } => self.publish(topic, key, extra, 1).await,
            Step::PublishBatch { topic, count } => self.publish(topic, None, Extra::None, count).await,
            Step::Withdraw { waiting } => self.withdraw(waiting),
            Step::Subscribe { group, max_in_flight } => self.subscribe(group, max_in_flight).await,
            Step::Solo { group } => self.subscribe_alone(group).await,
            Step::Late { filter } => self.subscribe_late(LATE[filter]).await,
            Step::Receive { member, limit } => self.receive(member, limit),
            Step::Settle { delivery, how } => self.settle(delivery, how).await,
            Step::Leave { member } => self.leave(member),
            Step::Purge { group } => self.purge(group).await,
            Step::Delete { group } => self.delete(group).await,
            Step::Pass { millis } => self.pass(millis).await,
        }
        self.admit_waiting().await;
        self.check_status().await;
    }

    async fn pass(&mut self, millis: u64) {
        tokio::time::advance(Duration::from_millis(millis)).await;
        self.now += millis;
    }

    /// The oracles of the groups and subscriptions that get a copy.
    fn matching(&self, topic: usize) -> Vec<usize> {
        let topic: Topic = TOPICS[topic].parse().unwrap();
        let matches = |filter: &str| TopicFilter::new(filter).unwrap().matches(&topic);
        let named = (0..GROUPS.len()).filter(|index| matches(GROUPS[*index].1)).filter_map(|index| self.groups[index]);
        let solos = self.members.iter().filter(|member| member.solo && member.subscription.is_some());
        named.chain(solos.filter(|member| matches(member.filter)).map(|member| member.oracle)).collect()
    }

    /// The oracle of a named group, if it exists and is at its bound.
    fn full(&self, index: usize) -> Option<usize> {
        self.groups[index].filter(|oracle| self.oracles[*oracle].messages.len() as u64 >= GROUPS[index].3)
    }

    async fn publish(&mut self, topic: usize, key: Option<u8>, extra: Extra, count: usize) {
        let (name, b, c): (Topic, _, _) = (TOPICS[topic].parse().unwrap(), topic == 2, topic == 3);
        let numbers = self.published..self.published + count as u64;
        self.published = numbers.end;
        let message = |number: u64| {
            let message = Message::new(number.to_string());
            let message = match key {
                Some(key) => message.with_key(vec![key]),
                None => message,
            };
            match extra {
                Extra::Delay { seconds } if b => message.with_delay(Duration::from_secs(seconds)),
                Extra::Expired => message.with_expires_at(Timestamp::from_millis(1)),
                Extra::ExpiresIn { hours } => message.with_ttl(Duration::from_secs(3_600 * hours)),
                Extra::Dedup { key } => message.with_dedup_key(key.to_string()).unwrap(),
                Extra::None | Extra::Delay { .. } => message,
            }
        };
        let results = self.broker.publish_batch(&name, numbers.clone().map(message).collect()).await.unwrap();
        let matched = self.matching(topic);
        for (number, result) in numbers.zip(results) {
            if let Extra::Dedup { key } = extra
                && let Some((_, first)) = self.dedup.get(&(topic, key)).filter(|(until, _)| *until > self.now)
            {
                let receipt = result.unwrap();
                assert!(receipt.duplicate && receipt.id == *first, "{number} is a duplicate: {receipt:?}");
                continue;
            }
            if c && self.full(7).is_some() {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable, "{number} has no room");
                continue;
            }
            let receipt = result.unwrap();
            assert_eq!((receipt.matched, receipt.duplicate), (Some(matched.len() as u64), false), "copies made");
            if let Extra::Dedup { key } = extra {
                self.dedup.insert((topic, key), (self.now + DEDUP_WINDOW, receipt.id));
            }
            let place = match extra {
                Extra::Delay { seconds } if b => Place::Delayed(self.now + 1_000 * seconds),
                _ => Place::Waiting,
            };
            self.append(topic, number, Held { key, attempts: 0, seen: false, place }, matches!(extra, Extra::Expired));
        }
    }

    /// A message is taken: every group that matches has it, and drops its oldest for it where it must.
    fn append(&mut self, topic: usize, number: u64, held: Held, expired: bool) {
        let place = self.places.len() as u64;
        self.places.insert(number, place);
        let dropping: Vec<usize> = [6, 9, 10].into_iter().filter_map(|index| self.full(index)).collect();
        for oracle in self.matching(topic) {
            let drops = dropping.contains(&oracle);
            let oracle = &mut self.oracles[oracle];
            if drops {
                oracle.dropped += 1;
                match oracle.messages.iter().find(|(_, held)| !held.seen).map(|(number, _)| *number) {
                    Some(oldest) => drop(oracle.messages.remove(&oldest)),
                    // All of the bound is in hand.
                    None => continue,
                }
            }
            if expired {
                oracle.expired += 1;
            } else {
                oracle.messages.insert(place, held);
            }
        }
        if let Some(retained) = &mut self.retained {
            let retained = &mut retained[topic];
            // A place that nobody has stands for one that has expired.
            retained.push_back((if expired { u64::MAX } else { place }, held));
            if retained.len() > RETAINED {
                retained.pop_front();
            }
        }
    }

    /// To the topic whose group makes publishers wait.
    fn publish_patiently(&mut self, key: Option<u8>) {
        let number = self.published;
        self.published += 1;
        let message = Message::new(number.to_string());
        let message = match key {
            Some(key) => message.with_key(vec![key]),
            None => message,
        };
        let publish = self.broker.publish(&TOPICS[WAITING].parse().unwrap(), message);
        self.waiting.push_back(Waiting { number, key, publish });
    }

    fn withdraw(&mut self, waiting: usize) {
        if !self.waiting.is_empty() {
            self.waiting.remove(waiting % self.waiting.len());
        }
    }

    /// Those at the front of the queue have got room, in order; the others wait still.
    async fn admit_waiting(&mut self) {
        // Looks for settlements that were not told.
        self.broker.status().await.unwrap();
        while self.full(8).is_none()
            && let Some(Waiting { number, key, publish }) = self.waiting.pop_front()
        {
            let matched = self.matching(WAITING).len() as u64;
            match now(publish) {
                Poll::Ready(receipt) => assert_eq!(receipt.unwrap().matched, Some(matched)),
                Poll::Pending => panic!("{number} waits though there is room"),
            }
            self.append(WAITING, number, Held { key, attempts: 0, seen: false, place: Place::Waiting }, false);
        }
        for Waiting { number, publish, .. } in &mut self.waiting {
            assert!(now(publish).is_pending(), "{number} does not wait though there is no room");
        }
    }

    async fn subscribe(&mut self, index: usize, max_in_flight: usize) {
        let (name, filter, ordered, ..) = GROUPS[index];
        let subscribe = Subscribe::group(name.parse().unwrap()).with_options(bounded(index));
        let subscribe = subscribe.with_max_in_flight(max_in_flight).unwrap();
        let subscription = self.broker.subscribe(&filter.parse().unwrap(), subscribe).await.unwrap();
        let oracle = *self.groups[index].get_or_insert_with(|| {
            self.oracles.push(Oracle { ordered, ..Oracle::default() });
            self.oracles.len() - 1
        });
        let subscription = Some(subscription);
        self.members.push(Member { oracle, filter, solo: false, max_in_flight, in_flight: 0, gaps: 0, subscription });
    }

    async fn subscribe_alone(&mut self, index: usize) {
        let filter = GROUPS[index].1;
        self.subscribe_from(filter, options(false), Oracle::default()).await;
    }

    async fn subscribe_late(&mut self, filter: &'static str) {
        let Some(retained) = &self.retained else { return };
        let mut oracle = Oracle::default();
        for (topic, retained) in TOPICS.iter().zip(retained) {
            if TopicFilter::new(filter).unwrap().matches(&topic.parse().unwrap()) {
                oracle.messages.extend(retained.iter().filter(|(number, _)| *number < u64::MAX).copied());
            }
        }
        self.subscribe_from(filter, options(false).with_start(StartAt::Earliest), oracle).await;
    }

    async fn subscribe_from(&mut self, filter: &'static str, options: GroupOptions, oracle: Oracle) {
        let subscribe = Subscribe::new().with_options(options);
        let max_in_flight = subscribe.max_in_flight();
        let subscription = Some(self.broker.subscribe(&filter.parse().unwrap(), subscribe).await.unwrap());
        self.oracles.push(oracle);
        let oracle = self.oracles.len() - 1;
        self.members.push(Member { oracle, filter, solo: true, max_in_flight, in_flight: 0, gaps: 0, subscription });
    }

    fn receive(&mut self, member: usize, limit: usize) {
        if self.members.is_empty() {
            return;
        }
        let index = member % self.members.len();
        let member = &mut self.members[index];
        let Some(subscription) = &mut member.subscription else { return };
        let mut batch = Vec::new();
        let polled = poll(subscription, &mut batch, limit);
        let oracle = &mut self.oracles[member.oracle];
        let (sure, perhaps) = oracle.available(self.now);
        let window = limit.min(member.max_in_flight - member.in_flight);
        let received = match polled {
            Poll::Pending => 0,
            Poll::Ready(result) => result.unwrap(),
        };
        assert_eq!(received, batch.len());
        // A batch of the past ends where the past has its gap, once.
        let ends = subscription.gap() == Some(Gap::Unknown);
        let least = if ends { 1 } else { usize::MAX };
        assert!(received >= sure.min(window).min(least), "{received} received, {sure} available, window {window}");
        member.gaps += usize::from(ends);
        assert!(member.gaps <= 1, "told of one gap {} times", member.gaps);
        assert!(received <= (sure + perhaps).min(window), "{received} received, {sure} + {perhaps}, window {window}");
        for delivery in batch {
            let number = oracle.hand_out(&delivery, self.now, &self.places);
            member.in_flight += 1;
            self.in_hand.push(InHand { member: index, number, delivery });
        }
    }

    async fn settle(&mut self, delivery: usize, how: How) {
        if self.in_hand.is_empty() {
            return;
        }
        let InHand { member, number, delivery } = self.in_hand.swap_remove(delivery % self.in_hand.len());
        let member = &mut self.members[member];
        member.in_flight -= 1;
        let (now, oracle) = (self.now, &mut self.oracles[member.oracle]);
        match how {
            How::Ack => drop(oracle.messages.remove(&number)),
            How::Reject => oracle.bury(number),
            How::Retry { after: 0 } => oracle.retry(number, Place::Waiting),
            How::Retry { after } => oracle.retry(number, Place::Until(now + after)),
            How::Drop => oracle.retry(number, Place::By(now + BACKOFF)),
            How::Release => {
                if let Some(held) = oracle.messages.get_mut(&number) {
                    (held.attempts, held.place) = (held.attempts - 1, Place::Waiting);
                }
            }
        }
        let settle = match how {
            How::Ack => delivery.ack(),
            How::Retry { after } => delivery.retry_after(Duration::from_millis(after)),
            How::Reject => delivery.reject("no"),
            How::Release => delivery.release(),
            How::Drop => return drop(delivery),
        };
        settle.await.unwrap();
    }

    fn leave(&mut self, member: usize) {
        if self.members.is_empty() {
            return;
        }
        let index = member % self.members.len();
        let member = &mut self.members[index];
        if member.subscription.take().is_some() && member.solo {
            self.oracles[member.oracle].messages.clear();
        }
    }

    async fn purge(&mut self, index: usize) {
        let Some(oracle) = self.groups[index] else { return };
        let messages = &mut self.oracles[oracle].messages;
        let before = messages.len();
        messages.retain(|_, held| held.place == Place::InFlight);
        let gone = (before - messages.len()) as u64;
        assert_eq!(self.broker.purge_group(&group(index)).await.unwrap(), gone, "purged");
    }

    async fn delete(&mut self, index: usize) {
        let existed = self.groups[index].take();
        assert_eq!(self.broker.delete_group(&group(index)).await.unwrap(), existed.is_some());
        let Some(oracle) = existed else { return };
        self.oracles[oracle].messages.clear();
        for member in self.members.iter_mut().filter(|member| member.oracle == oracle) {
            if let Some(mut subscription) = member.subscription.take() {
                let ended = poll(&mut subscription, &mut Vec::new(), 1);
                assert!(matches!(ended, Poll::Ready(Err(error)) if error.kind() == ErrorKind::NotFound));
            }
        }
    }

    async fn check_status(&self) {
        let status = self.broker.status().await.unwrap();
        for (index, oracle) in self.groups.iter().enumerate() {
            let seen = status.group(&group(index));
            assert_eq!(seen.is_some(), oracle.is_some());
            if let (Some(seen), Some(oracle)) = (seen, oracle) {
                let oracle = &self.oracles[*oracle];
                let in_flight = oracle.messages.values().filter(|held| held.place == Place::InFlight).count();
                assert_eq!(seen.lag, Some(oracle.messages.len() as u64), "lag");
                assert_eq!(seen.in_flight, Some(in_flight as u64), "in flight");
                assert_eq!(seen.counts.dead_lettered, oracle.dead, "dead letters");
                assert_eq!(seen.counts.expired, oracle.expired, "expired");
                assert_eq!(seen.counts.dropped, oracle.dropped, "dropped");
            }
        }
    }

    /// Whatever is left is received and acked: nothing was lost on the way.
    async fn finish(&mut self) {
        self.waiting.clear();
        self.ack_all().await;
        for index in 0..GROUPS.len() {
            if self.groups[index].is_some() {
                self.subscribe(index, 1000).await;
                let member = self.members.len() - 1;
                self.drain(member).await;
                // Several members of one group would find the same in its oracle.
                self.members[member].subscription = None;
            }
        }
        let solo = |member: &usize| self.members[*member].solo && self.members[*member].subscription.is_some();
        let solos: Vec<usize> = (0..self.members.len()).filter(solo).collect();
        for member in solos {
            self.drain(member).await;
        }
        self.check_status().await;
        assert!(self.broker.close(Duration::ZERO).await.in_flight == 0);
    }

    async fn ack_all(&mut self) {
        for in_hand in std::mem::take(&mut self.in_hand) {
            let member = &mut self.members[in_hand.member];
            member.in_flight -= 1;
            self.oracles[member.oracle].messages.remove(&in_hand.number);
            in_hand.delivery.ack().await.unwrap();
        }
    }

    async fn drain(&mut self, member: usize) {
        // One delayed message of a key after another: each waits from when the one before it is gone.
        for _ in 0..200 {
            loop {
                self.receive(member, 1000);
                if self.in_hand.is_empty() {
                    break;
                }
                self.ack_all().await;
            }
            if self.oracles[self.members[member].oracle].messages.is_empty() {
                return;
            }
            self.pass(60_000).await;
        }
        panic!("lost: {:?}", self.oracles[self.members[member].oracle].messages);
    }

    /// A close with much left says what, and is the end.
    async fn close(mut self) {
        let standing: Vec<usize> = self.groups.iter().copied().flatten().collect();
        let solos = self.members.iter().filter(|member| member.solo && member.subscription.is_some());
        let standing: Vec<usize> = solos.map(|member| member.oracle).chain(standing).collect();
        let held = standing.iter().flat_map(|oracle| self.oracles[*oracle].messages.values());
        let (in_flight, undelivered): (Vec<Held>, Vec<Held>) = held.partition(|held| held.place == Place::InFlight);
        let report = self.broker.close(Duration::ZERO).await;
        assert_eq!(report.in_flight, in_flight.len() as u64, "in flight at the end");
        assert_eq!(report.undelivered, undelivered.len() as u64, "undelivered at the end");
        assert_eq!(report.unconfirmed, self.waiting.len() as u64, "waiting at the end");
        assert_eq!(self.broker.close(Duration::from_secs(60)).await, report, "twice is fine");
        let is_closed = |error: Error| assert_eq!(error.kind(), ErrorKind::Closed);
        for Waiting { publish, .. } in self.waiting.drain(..) {
            is_closed(publish.await.unwrap_err());
        }
        for in_hand in self.in_hand.drain(..) {
            let member = &self.members[in_hand.member];
            if standing.contains(&member.oracle) {
                is_closed(in_hand.delivery.ack().await.unwrap_err());
            }
        }
        is_closed(self.broker.publish(&TOPICS[0].parse().unwrap(), Message::new("")).await.unwrap_err());
        is_closed(self.broker.subscribe(&"a.x".parse().unwrap(), Subscribe::new()).await.unwrap_err());
        for member in &mut self.members {
            if let Some(subscription) = &mut member.subscription {
                assert!(matches!(poll(subscription, &mut Vec::new(), 1), Poll::Ready(Ok(0))), "it ends");
            }
        }
    }
}

/// What a future has come to.
fn now<F: Future + Unpin>(mut future: F) -> Poll<F::Output> {
    Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop()))
}

impl Oracle {
    /// How many deliveries there must be now, and how many more there may be.
    fn available(&self, now: u64) -> (usize, usize) {
        let (mut sure, mut perhaps, mut keys) = (0, 0, Vec::new());
        for held in self.messages.values() {
            if let Some(key) = held.key.filter(|_| self.ordered) {
                if keys.contains(&key) {
                    continue;
                }
                keys.push(key);
            }
            match held.place {
                Place::Waiting => sure += 1,
                Place::Until(time) | Place::By(time) if time <= now => sure += 1,
                Place::By(_) => perhaps += 1,
                Place::Delayed(time) if time <= now + SLACK => perhaps += 1,
                Place::Delayed(_) => {}
                Place::Until(_) | Place::InFlight => {}
            }
        }
        (sure, perhaps)
    }

    fn hand_out(&mut self, delivery: &Delivery, now: u64, places: &HashMap<u64, u64>) -> u64 {
        let number: u64 = std::str::from_utf8(delivery.message().payload()).unwrap().parse().unwrap();
        let number = places[&number];
        let mut held = *self.messages.get(&number).expect("a message this group should not have");
        match held.place {
            Place::InFlight => panic!("{number} is in flight already"),
            Place::Until(time) => assert!(time <= now, "{number} came before its time"),
            Place::Delayed(time) => assert!(time <= now + SLACK, "{number} came before its time"),
            Place::Waiting | Place::By(_) => {}
        }
        let delayed = matches!(held.place, Place::Delayed(_));
        if self.ordered && held.key.is_some() {
            let before = self.messages.iter().find(|(_, other)| other.key == held.key).map(|(number, _)| *number);
            assert_eq!(before, Some(number), "an earlier message of the key is not settled");
        } else if !held.seen && !delayed {
            assert!(self.fresh.is_none_or(|fresh| fresh < number), "{number} came after {:?}", self.fresh);
            self.fresh = Some(number);
        }
        held.seen = true;
        held.attempts += 1;
        assert_eq!(delivery.attempt(), held.attempts, "attempt");
        held.place = Place::InFlight;
        self.messages.insert(number, held);
        number
    }

    fn retry(&mut self, number: u64, place: Place) {
        match self.messages.get_mut(&number) {
            Some(held) if held.attempts >= MAX_ATTEMPTS => self.bury(number),
            Some(held) => held.place = place,
            None => {}
        }
    }

    fn bury(&mut self, number: u64) {
        self.dead += u64::from(self.messages.remove(&number).is_some());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_broker_does_what_a_list_per_group_would(
        steps in proptest::collection::vec(step(), 1..120),
        retains in any::<bool>(),
        to_the_end in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new(retains);
            for step in &steps {
                world.run(step).await;
            }
            if to_the_end { world.finish().await } else { world.close().await }
        });
    }
}
