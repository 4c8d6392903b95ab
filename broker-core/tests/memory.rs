//! What the in-process broker does that a suite for all brokers cannot see.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use broker_core::*;
use futures_util::FutureExt;

/// History that is too old neither comes back nor keeps its topic alive.
#[tokio::test]
async fn what_is_retained_grows_too_old() {
    let retention = Retention::messages(10).with_max_age(Duration::from_millis(50));
    let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(retention));
    let topic = Topic::new("orders").unwrap();
    broker.publish(&topic, Message::new("old")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    broker.publish(&topic, Message::new("new")).await.unwrap();

    let earliest = Subscribe::new().with_options(GroupOptions::new().with_start(StartAt::Earliest));
    let mut late = broker.subscribe(&(&topic).into(), earliest).await.unwrap();
    let delivery = late.next().await.unwrap().expect("open");
    assert_eq!(delivery.message().payload().as_ref(), b"new");
    delivery.ack().await.unwrap();
    assert_eq!(broker.status().await.unwrap().subscriptions.first().unwrap().lag, Some(0));
}

/// A full group that waits lets its publishers go on in the order of their calls, and one that is
/// dropped leaves the queue.
#[tokio::test]
async fn publishes_that_wait_keep_their_order_and_can_be_withdrawn() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders").unwrap();
    let backlog = Backlog::default().with_max_messages(2).unwrap();
    let options = Subscribe::new().with_options(GroupOptions::new().with_backlog(backlog));
    let mut orders = broker.subscribe(&(&topic).into(), options).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();

    let mut publishes: Vec<Publish> =
        (0..5).map(|number| publisher.publish(Message::new(number.to_string()))).collect();
    assert_eq!(publishes.iter().map(Operation::is_ready).collect::<Vec<_>>(), [true, true, false, false, false]);
    drop(publishes.remove(3));
    for expected in ["0", "1", "2", "4"] {
        let delivery = orders.next().await.unwrap().expect("open");
        assert_eq!(delivery.message().payload().as_ref(), expected.as_bytes());
        delivery.ack().await.unwrap();
    }
    for publish in publishes {
        publish.await.unwrap();
    }
}

/// A fast reader cuts the log into pieces of many sizes; a slow one finds each message once, in order,
/// and what it settles counts.
#[tokio::test]
async fn pieces_that_a_fast_reader_cuts_are_whole_for_a_slow_one() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders").unwrap();
    let options = Subscribe::new().with_max_in_flight(10_000).unwrap();
    let mut fast = broker.subscribe(&(&topic).into(), options.clone()).await.unwrap();
    let mut slow = broker.subscribe(&(&topic).into(), options).await.unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
    let mut batch = Vec::new();
    let mut published = 0_u32;
    for burst in (1..40).chain([255, 256, 257, 1_000, 1]) {
        for _ in 0..burst {
            publisher.publish(Message::new(published.to_string())).await.unwrap();
            published += 1;
        }
        // One in three bursts stays for the next time.
        if burst % 3 != 0 {
            fast.receive(&mut batch, 10_000).await.unwrap();
        }
    }
    batch.drain(..).for_each(|delivery| drop(delivery.ack()));

    let mut expected = 0..published;
    while !expected.is_empty() {
        assert!(slow.receive(&mut batch, 300).await.unwrap() <= 300);
        // Settled from the back: the broker finds each by its place.
        let texts: Vec<_> = batch.iter().map(|it| it.message().payload().clone()).collect();
        for text in texts {
            assert_eq!(text.as_ref(), expected.next().unwrap().to_string().as_bytes());
        }
        for delivery in batch.drain(..).rev() {
            let retried = delivery.message().payload().ends_with(b"7");
            if retried { delivery.retry_after(Duration::from_secs(60)).await } else { delivery.ack().await }.unwrap();
        }
    }
    let sevens = (0..published).filter(|number| number % 10 == 7).count() as u64;
    let status = broker.status().await.unwrap();
    let lag: u64 = status.subscriptions.iter().filter_map(|it| it.lag).sum();
    assert_eq!(lag, sevens, "what was put back, and nothing else");
}

/// A publisher whose messages have gone to one log all the time finds who came and went since.
#[tokio::test]
async fn a_publisher_finds_who_came_and_went() {
    let broker = MemoryBroker::new();
    let topic = Topic::new("orders.created").unwrap();
    let publisher = broker.publisher(&topic, PublisherOptions::new().with_require_route(true)).unwrap();
    let publish = async |matched| {
        for _ in 0..3 {
            assert_eq!(publisher.publish(Message::new("42")).await.unwrap().matched, Some(matched));
        }
    };
    let exact = broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    publish(1).await;
    let pattern = broker.subscribe(&TopicFilter::new("orders.>").unwrap(), Subscribe::new()).await.unwrap();
    publish(2).await;
    drop(exact);
    publish(1).await;
    drop(pattern);
    assert_eq!(publisher.publish(Message::new("42")).await.unwrap_err().kind(), ErrorKind::Unroutable);
    let mut again = broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap();
    publish(1).await;
    for _ in 0..3 {
        again.next().await.unwrap().expect("open").ack().await.unwrap();
    }
}

/// What was confirmed while the broker closed stands in its report.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_beside_publishers_reports_all_they_were_confirmed() {
    let topic = Topic::new("orders").unwrap();
    let group = Group::new(GroupName::new("billing").unwrap(), (&topic).into());
    for round in 0..500 {
        let broker = MemoryBroker::new();
        broker.create_group(&group, GroupOptions::new()).await.unwrap();
        let publisher = broker.publisher(&topic, PublisherOptions::new()).unwrap();
        publisher.publish(Message::new("first")).await.unwrap();
        // More than there are cores: some are stopped between looking and publishing.
        let publishing = [(); 4].map(|()| {
            let publisher = publisher.clone();
            tokio::task::spawn_blocking(move || {
                let mut confirmed = 0;
                while matches!(publisher.publish(Message::new("42")).now_or_never(), Some(Ok(_))) {
                    confirmed += 1;
                }
                confirmed
            })
        });
        tokio::time::sleep(Duration::from_micros(200)).await;
        let report = broker.close(Duration::from_secs(1)).await;
        let mut confirmed = 1;
        for publisher in publishing {
            confirmed += publisher.await.unwrap();
        }
        assert_eq!(report.undelivered, confirmed, "round {round}");
    }
}

/// A member of group `g` on `orders` that takes one message, tells of it, and keeps it unsettled.
fn holds_one(
    mut member: Subscription,
    told: tokio::sync::mpsc::UnboundedSender<String>,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let delivery = member.next().await.unwrap().expect("open");
        told.send(String::from_utf8_lossy(delivery.message().payload()).into_owned()).unwrap();
        std::future::pending::<()>().await;
    })
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("within ten seconds")
}

/// Three members of a group that hold one message at most.
async fn three(broker: &MemoryBroker, topic: &Topic) -> [Subscription; 3] {
    let one = || Subscribe::group(GroupName::new("g").unwrap()).with_max_in_flight(1).unwrap();
    let join = async || broker.subscribe(&topic.into(), one()).await.unwrap();
    [join().await, join().await, join().await]
}

/// The member that sleeps until a retry is due takes another message meanwhile: a member that is idle
/// sees to the retry.
#[tokio::test]
async fn a_retry_that_is_due_does_not_wait_for_a_busy_member() {
    let (broker, topic) = (MemoryBroker::new(), Topic::new("orders").unwrap());
    let [mut a, b, c] = three(&broker, &topic).await;
    broker.publish(&topic, Message::new("fails")).await.unwrap();
    let failing = a.next().await.unwrap().expect("open");
    let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let members = [a, b, c].map(|member| holds_one(member, told.clone()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    failing.retry_after(Duration::from_millis(200)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    // Whoever looked at the timer so far takes one of these.
    for slow in ["slow 1", "slow 2"] {
        broker.publish(&topic, Message::new(slow)).await.unwrap();
        assert_eq!(soon(hear.recv()).await.as_deref(), Some(slow));
    }
    assert_eq!(soon(hear.recv()).await.as_deref(), Some("fails"), "while the others work on, unsettled");
    members.iter().for_each(tokio::task::JoinHandle::abort);
}

/// The member that sleeps until a retry is due gives up waiting.
#[tokio::test]
async fn a_retry_that_is_due_does_not_wait_for_a_member_that_gave_up() {
    let (broker, topic) = (MemoryBroker::new(), Topic::new("orders").unwrap());
    let [mut a, b, mut c] = three(&broker, &topic).await;
    broker.publish(&topic, Message::new("fails")).await.unwrap();
    let failing = c.next().await.unwrap().expect("open");
    let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let waiting = tokio::spawn(async move {
        let given_up = tokio::time::timeout(Duration::from_millis(200), a.next()).await.is_err();
        (a, given_up)
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let member = holds_one(b, told);
    tokio::time::sleep(Duration::from_millis(20)).await;
    failing.retry_after(Duration::from_millis(500)).await.unwrap();
    let (_a, given_up) = waiting.await.unwrap();
    assert!(given_up);
    assert_eq!(soon(hear.recv()).await.as_deref(), Some("fails"));
    member.abort();
}

/// Nor for one that sleeps until it is due, and is alive and not polled then.
#[tokio::test]
async fn a_retry_that_is_due_does_not_wait_for_a_member_that_is_not_polled() {
    let (broker, topic) = (MemoryBroker::new(), Topic::new("orders").unwrap());
    let [mut a, mut b, c] = three(&broker, &topic).await;
    broker.publish(&topic, Message::new("fails")).await.unwrap();
    let failing = b.next().await.unwrap().expect("open");
    let mut unpolled = Box::pin(a.next());
    assert!((&mut unpolled).now_or_never().is_none(), "it is the first to be told");
    let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let member = holds_one(c, told);
    tokio::time::sleep(Duration::from_millis(20)).await;
    failing.retry_after(Duration::from_millis(200)).await.unwrap();
    assert_eq!(soon(hear.recv()).await.as_deref(), Some("fails"));
    member.abort();
}

/// `select!` keeps a `next()` alive that nobody polls while another arm works.
#[tokio::test]
async fn a_member_that_is_told_and_not_polled_does_not_starve_its_group() {
    let (broker, topic) = (MemoryBroker::new(), Topic::new("orders").unwrap());
    let [mut a, b, c] = three(&broker, &topic).await;
    let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
    let mut unpolled = Box::pin(a.next());
    assert!((&mut unpolled).now_or_never().is_none());
    let members = [b, c].map(|member| holds_one(member, told.clone()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    for number in 0..3 {
        broker.publish(&topic, Message::new(number.to_string())).await.unwrap();
        // Longer than a member that was told has to come.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(soon(hear.recv()).await.as_deref(), Some("0"));
    assert_eq!(soon(hear.recv()).await.as_deref(), Some("1"));
    assert_eq!(soon(unpolled).await.unwrap().expect("open").message().payload().as_ref(), b"2");
    members.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Has group `billing` reject so many messages, whose dead letters group `reader` may have ten of.
async fn reject(broker: &MemoryBroker, messages: usize) {
    let (topic, dead) = (Topic::new("orders").unwrap(), Topic::new("dead").unwrap());
    let full = GroupOptions::new().with_backlog(Backlog::default().with_max_messages(10).unwrap());
    broker.create_group(&"reader@dead".parse().unwrap(), full).await.unwrap();
    let billing =
        Subscribe::group(GroupName::new("billing").unwrap()).with_options(GroupOptions::new().with_dead_letter(dead));
    let mut member = broker.subscribe(&(&topic).into(), billing).await.unwrap();
    for _ in 0..messages {
        broker.publish(&topic, Message::new("")).await.unwrap();
        member.next().await.unwrap().expect("open").reject("bad").await.unwrap();
    }
}

/// Dead letters that nobody takes hold up neither who rejects nor the end.
#[tokio::test]
async fn dead_letters_for_a_full_group_hold_up_nothing() {
    let broker = MemoryBroker::new();
    reject(&broker, 3_000).await;
    let report = soon(broker.close(Duration::from_secs(60))).await;
    assert_eq!(report.unconfirmed, 0, "a dead letter is no publish of anybody's: {report:?}");
}

/// Beside those in the group's backlog a thousand wait for room; all are kept besides.
#[tokio::test]
async fn dead_letters_for_a_full_group_are_bounded() {
    let broker = MemoryBroker::new();
    reject(&broker, 3_000).await;
    let reader = Subscribe::group(GroupName::new("reader").unwrap());
    let mut reader = broker.subscribe(&TopicFilter::new("dead").unwrap(), reader).await.unwrap();
    for _ in 0..1_010 {
        soon(reader.next()).await.unwrap().expect("open").ack().await.unwrap();
    }
    assert!(reader.next().now_or_never().is_none(), "no other waited");
    // What it missed is told it, and counted.
    assert_eq!(reader.gap(), Some(Gap::Lost(1_990)));
    let status = broker.status().await.unwrap();
    assert_eq!(status.group(&"reader@dead".parse().unwrap()).unwrap().counts.dropped, 1_990);
    let kept = broker.dead_letters(&"billing@orders".parse().unwrap(), 10_000).await.unwrap();
    assert_eq!(kept.len(), 3_000);
}

/// A closed broker changes nothing.
#[tokio::test]
async fn what_is_closed_is_not_altered() {
    let (broker, group) = (MemoryBroker::new(), "g@orders".parse().unwrap());
    broker.create_group(&group, GroupOptions::new()).await.unwrap();
    broker.close(Duration::from_secs(1)).await;
    assert_eq!(broker.alter_group(&group, GroupOptions::new()).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(broker.purge_group(&group).await.unwrap_err().kind(), ErrorKind::Closed);
}

fn bounded(messages: u64, overflow: Overflow) -> GroupOptions {
    GroupOptions::new().with_backlog(Backlog::default().with_max_messages(messages).unwrap().with_overflow(overflow))
}

/// Subscriptions that stand still at their bound and drop their oldest, on one filter and on many: each is asked once
/// what it has settled, whatever the others say.
#[test]
fn a_publish_to_many_that_drop_their_oldest_ends() {
    let (ended, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (broker, topic) = (MemoryBroker::new(), Topic::new("a.b.c.d.e").unwrap());
            // All its patterns of single segments, and the topic itself.
            let filters = (0..32_u32).map(|stars| {
                let segment =
                    |place: usize| if stars >> place & 1 == 1 { "*" } else { ["a", "b", "c", "d", "e"][place] };
                (0..5).map(segment).collect()
            });
            let filters: Vec<Vec<&str>> = filters.collect();
            let mut stalled = Vec::new();
            for filter in filters.iter().chain(&filters) {
                let filter: TopicFilter = filter.join(".").parse().unwrap();
                let options = Subscribe::new().with_options(bounded(1, Overflow::DropOldest));
                stalled.push(broker.subscribe(&filter, options).await.unwrap());
            }
            broker.publish(&topic, Message::new("held")).await.unwrap();
            let mut held = Vec::new();
            for subscription in &mut stalled {
                held.push(subscription.next().await.unwrap().expect("open"));
            }
            let receipt = broker.publish(&topic, Message::new("dropped")).await.unwrap();
            assert_eq!(receipt.matched, Some(64));
            ended.send(()).unwrap();
        });
    });
    hear.recv_timeout(Duration::from_secs(20)).expect("a publish that ends");
}

/// Room that something made by expiring is told to whoever waits for it, also if a look at the numbers found it.
#[tokio::test]
async fn dead_letters_that_wait_hear_of_what_expired() {
    let (broker, topic, dead) = (MemoryBroker::new(), Topic::new("a").unwrap(), Topic::new("dead.g").unwrap());
    broker.create_group(&"q@dead.g".parse().unwrap(), bounded(1, Overflow::Wait)).await.unwrap();
    let mut failing = broker.subscribe(&(&topic).into(), Subscribe::group("g".parse().unwrap())).await.unwrap();
    broker.publish(&dead, Message::new("passing").with_ttl(Duration::from_millis(20))).await.unwrap();
    broker.publish(&topic, Message::new("letter")).await.unwrap();
    failing.next().await.unwrap().expect("open").reject("no").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(broker.status().await.unwrap().group(&"q@dead.g".parse().unwrap()).unwrap().counts.expired, 1);
    let mut letters = broker.subscribe(&(&dead).into(), Subscribe::group("q".parse().unwrap())).await.unwrap();
    assert_eq!(soon(letters.next()).await.unwrap().expect("open").message().payload().as_ref(), b"letter");
}

/// The place that a deleted group had in the log is another's: its member is told nothing of that one's losses.
#[tokio::test]
async fn a_member_of_a_deleted_group_is_told_of_no_gap() {
    let (broker, topic) = (MemoryBroker::new(), Topic::new("a").unwrap());
    let (first, second): (Group, Group) = ("g@a".parse().unwrap(), "h@a".parse().unwrap());
    broker.create_group(&first, bounded(1, Overflow::DropOldest)).await.unwrap();
    let mut member = broker.subscribe(&(&topic).into(), Subscribe::group("g".parse().unwrap())).await.unwrap();
    for _ in 0..3 {
        broker.publish(&topic, Message::new("")).await.unwrap();
    }
    assert_eq!(member.gap(), Some(Gap::Lost(2)));
    broker.delete_group(&first).await.unwrap();
    assert_eq!(member.gap(), None);
    broker.create_group(&second, bounded(1, Overflow::DropOldest)).await.unwrap();
    for _ in 0..9 {
        broker.publish(&topic, Message::new("")).await.unwrap();
    }
    assert_eq!(member.gap(), None);
}

/// A group that reads everything reads its own dead letters, and may fail again: each is kept once, and once redriven.
#[tokio::test]
async fn a_group_that_reads_its_own_dead_letters_has_each_of_them_once() {
    let broker = MemoryBroker::new();
    let group: Group = "all@>".parse().unwrap();
    let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap();
    broker.publish(&Topic::new("orders").unwrap(), Message::new("1")).await.unwrap();
    for (topic, reason) in [("orders", "first"), ("dead.all", "second")] {
        let delivery = soon(member.next()).await.unwrap().unwrap();
        assert_eq!(delivery.topic().as_str(), topic);
        delivery.reject(reason).await.unwrap();
    }
    let letters = broker.dead_letters(&group, 10).await.unwrap();
    let told: Vec<_> = letters.iter().map(|letter| (letter.topic.as_str(), letter.failure.reason())).collect();
    assert_eq!(told, [("orders", "first")]);
    assert_eq!(broker.redrive(&group, 10).await.unwrap(), 1);
    let again = soon(member.next()).await.unwrap().unwrap();
    assert_eq!((again.topic().as_str(), again.attempt()), ("orders", 1));
}
