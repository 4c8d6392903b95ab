//! The in-process broker against a simple oracle: a list of messages per group.
//!
//! Random sequences of publish, subscribe, receive, settle, drop, purge, delete and the passing of
//! time run on both; after each step the broker may have handed out only what the oracle allows, and
//! at the end everything published is accounted for. Time is paused and moves only by a step.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use broker_core::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Publish {
        topic: usize,
        key: Option<u8>,
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

const TOPICS: [&str; 3] = ["a.x", "a.y", "b"];
/// Name, filter, whether it is ordered.
const GROUPS: [(&str, &str, bool); 5] =
    [("one", "a.x", false), ("two", "a.x", true), ("all", "a.>", false), ("keys", "a.*", true), ("b", "b", false)];
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
    prop_oneof![
        8 => (0..TOPICS.len(), proptest::option::of(0_u8..3)).prop_map(|(topic, key)| Step::Publish { topic, key }),
        2 => (0..TOPICS.len(), 1_usize..400).prop_map(|(topic, count)| Step::PublishBatch { topic, count }),
        3 => (0..GROUPS.len(), 1_usize..400).prop_map(|(group, max_in_flight)| Step::Subscribe { group, max_in_flight }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Solo { group }),
        8 => (any::<usize>(), 1_usize..400).prop_map(|(member, limit)| Step::Receive { member, limit }),
        12 => (any::<usize>(), how).prop_map(|(delivery, how)| Step::Settle { delivery, how }),
        1 => any::<usize>().prop_map(|member| Step::Leave { member }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Purge { group }),
        1 => (0..GROUPS.len()).prop_map(|group| Step::Delete { group }),
        3 => (1_u64..60).prop_map(|millis| Step::Pass { millis }),
    ]
}

/// What a group should hold.
#[derive(Default)]
struct Oracle {
    ordered: bool,
    /// By number, in the order of publishing.
    messages: BTreeMap<u64, Held>,
    /// The last message that was handed out for the first time: these come in order.
    fresh: Option<u64>,
    dead: u64,
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
    InFlight,
}

struct Member {
    oracle: usize,
    filter: &'static str,
    solo: bool,
    max_in_flight: usize,
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
    oracles: Vec<Oracle>,
    /// The oracle of each group that exists.
    groups: [Option<usize>; GROUPS.len()],
    members: Vec<Member>,
    in_hand: Vec<InHand>,
}

fn group(index: usize) -> Group {
    let (name, filter, _) = GROUPS[index];
    Group::new(name.parse().unwrap(), filter.parse().unwrap())
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
    async fn run(&mut self, step: &Step) {
        match *step {
            Step::Publish { topic, key } => self.publish(topic, key, 1).await,
            Step::PublishBatch { topic, count } => self.publish(topic, None, count).await,
            Step::Subscribe { group, max_in_flight } => self.subscribe(group, max_in_flight).await,
            Step::Solo { group } => self.subscribe_alone(group).await,
            Step::Receive { member, limit } => self.receive(member, limit),
            Step::Settle { delivery, how } => self.settle(delivery, how).await,
            Step::Leave { member } => self.leave(member),
            Step::Purge { group } => self.purge(group).await,
            Step::Delete { group } => self.delete(group).await,
            Step::Pass { millis } => {
                tokio::time::advance(Duration::from_millis(millis)).await;
                self.now += millis;
            }
        }
        self.check_status().await;
    }

    async fn publish(&mut self, topic: usize, key: Option<u8>, count: usize) {
        let topic: Topic = TOPICS[topic].parse().unwrap();
        let numbers = self.published..self.published + count as u64;
        self.published = numbers.end;
        let message = |number: u64| {
            let message = Message::new(number.to_string());
            match key {
                Some(key) => message.with_key(vec![key]),
                None => message,
            }
        };
        let results = self.broker.publish_batch(&topic, numbers.clone().map(message).collect()).await.unwrap();
        let matches = |filter: &str| TopicFilter::new(filter).unwrap().matches(&topic);
        let named = (0..GROUPS.len()).filter(|index| matches(GROUPS[*index].1)).filter_map(|index| self.groups[index]);
        let solos = self.members.iter().filter(|member| member.solo && member.subscription.is_some());
        let solos = solos.filter(|member| matches(member.filter)).map(|member| member.oracle);
        let matched: Vec<usize> = named.chain(solos).collect();
        for result in results {
            assert_eq!(result.unwrap().matched, Some(matched.len() as u64), "copies made");
        }
        for oracle in matched {
            let held = Held { key, attempts: 0, seen: false, place: Place::Waiting };
            self.oracles[oracle].messages.extend(numbers.clone().map(|number| (number, held)));
        }
    }

    async fn subscribe(&mut self, index: usize, max_in_flight: usize) {
        let (name, filter, ordered) = GROUPS[index];
        let subscribe = Subscribe::group(name.parse().unwrap()).with_options(options(ordered));
        let subscribe = subscribe.with_max_in_flight(max_in_flight).unwrap();
        let subscription = self.broker.subscribe(&filter.parse().unwrap(), subscribe).await.unwrap();
        let oracle = *self.groups[index].get_or_insert_with(|| {
            self.oracles.push(Oracle { ordered, ..Oracle::default() });
            self.oracles.len() - 1
        });
        let subscription = Some(subscription);
        self.members.push(Member { oracle, filter, solo: false, max_in_flight, in_flight: 0, subscription });
    }

    async fn subscribe_alone(&mut self, index: usize) {
        let filter = GROUPS[index].1;
        let subscribe = Subscribe::new().with_options(options(false));
        let max_in_flight = subscribe.max_in_flight();
        let subscription = Some(self.broker.subscribe(&filter.parse().unwrap(), subscribe).await.unwrap());
        self.oracles.push(Oracle::default());
        let oracle = self.oracles.len() - 1;
        self.members.push(Member { oracle, filter, solo: true, max_in_flight, in_flight: 0, subscription });
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
        assert!(received >= sure.min(window), "{received} received, {sure} available, window {window}");
        assert!(received <= (sure + perhaps).min(window), "{received} received, {sure} + {perhaps}, window {window}");
        for delivery in batch {
            let number = oracle.hand_out(&delivery, self.now);
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
            }
        }
    }

    /// Whatever is left is received and acked: nothing was lost on the way.
    async fn finish(&mut self) {
        for in_hand in self.in_hand.drain(..) {
            self.members[in_hand.member].in_flight -= 1;
            self.oracles[self.members[in_hand.member].oracle].messages.remove(&in_hand.number);
            in_hand.delivery.ack().await.unwrap();
        }
        tokio::time::advance(Duration::from_millis(1000)).await;
        self.now += 1000;
        for index in 0..GROUPS.len() {
            if self.groups[index].is_none() {
                continue;
            }
            self.subscribe(index, 1000).await;
            let member = self.members.len() - 1;
            loop {
                self.receive(member, 1000);
                if self.in_hand.is_empty() {
                    break;
                }
                for in_hand in std::mem::take(&mut self.in_hand) {
                    self.members[member].in_flight -= 1;
                    self.oracles[self.members[member].oracle].messages.remove(&in_hand.number);
                    in_hand.delivery.ack().await.unwrap();
                }
            }
            assert!(self.oracles[self.members[member].oracle].messages.is_empty(), "messages were lost");
        }
        self.check_status().await;
        assert!(self.broker.close(Duration::ZERO).await.in_flight == 0);
    }
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
                Place::Until(_) | Place::InFlight => {}
            }
        }
        (sure, perhaps)
    }

    fn hand_out(&mut self, delivery: &Delivery, now: u64) -> u64 {
        let number: u64 = std::str::from_utf8(delivery.message().payload()).unwrap().parse().unwrap();
        let mut held = *self.messages.get(&number).expect("a message this group should not have");
        match held.place {
            Place::InFlight => panic!("{number} is in flight already"),
            Place::Until(time) => assert!(time <= now, "{number} came before its time"),
            Place::Waiting | Place::By(_) => {}
        }
        if self.ordered && held.key.is_some() {
            let before = self.messages.iter().find(|(_, other)| other.key == held.key).map(|(number, _)| *number);
            assert_eq!(before, Some(number), "an earlier message of the key is not settled");
        } else if !held.seen {
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
    fn the_broker_does_what_a_list_per_group_would(steps in proptest::collection::vec(step(), 1..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::default();
            for step in &steps {
                world.run(step).await;
            }
            world.finish().await;
        });
    }
}
