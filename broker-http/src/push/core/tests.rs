//! The core over a scripted subscription: no socket, no broker, and time only as it is told.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use broker_core::{Consumer, Deliveries, Gap, Message, Result, Settle, Settlement, Topic};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::push::verdict::Decision;

/// What the scripted broker has, and what it was told.
#[derive(Default)]
struct Broker {
    queue: Mutex<VecDeque<Message>>,
    ended: Mutex<bool>,
    handed_out: AtomicUsize,
    acked: AtomicUsize,
    released: AtomicUsize,
    stopped_waiting: AtomicUsize,
    left: AtomicUsize,
}

struct Member(Arc<Broker>);

struct Handed {
    broker: Arc<Broker>,
    topic: Topic,
    messages: Vec<Message>,
}

impl Consumer for Member {
    fn poll_receive(&mut self, _: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        let mut queue = self.0.queue.lock();
        let count = limit.min(queue.len());
        if count == 0 {
            return if *self.0.ended.lock() { Poll::Ready(Ok(0)) } else { Poll::Pending };
        }
        let messages = queue.drain(..count).collect();
        let handed = Handed { broker: Arc::clone(&self.0), topic: Topic::new("orders").unwrap(), messages };
        let handed: Arc<dyn Deliveries> = Arc::new(handed);
        batch.extend((0..count as u32).map(|index| Delivery::new(Arc::clone(&handed), index)));
        self.0.handed_out.fetch_add(count, Ordering::Relaxed);
        Poll::Ready(Ok(count))
    }

    fn gap(&mut self) -> Option<Gap> {
        None
    }

    fn stop_waiting(&mut self) {
        self.0.stopped_waiting.fetch_add(1, Ordering::Relaxed);
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

impl Deliveries for Handed {
    fn message(&self, index: u32) -> &Message {
        &self.messages[index as usize]
    }

    fn topic(&self, _: u32) -> &Topic {
        &self.topic
    }

    fn attempt(&self, _: u32) -> u32 {
        1
    }

    fn settle(&self, index: u32, settlement: Settlement) -> Settle {
        match settlement {
            Settlement::Ack => {
                self.broker.acked.fetch_add(1, Ordering::Relaxed);
            }
            Settlement::Release => {
                self.broker.released.fetch_add(1, Ordering::Relaxed);
                let message = self.messages[index as usize].clone();
                // As the brokers do, which discard what has expired.
                if message.expires_at().is_none_or(|expiry| expiry > Timestamp::now()) {
                    self.broker.queue.lock().push_front(message);
                }
            }
            other => panic!("{other:?}"),
        }
        Settle::done()
    }

    fn abandon(&self, _: u32) {}
}

impl Broker {
    fn publish(&self, count: usize) {
        self.queue.lock().extend((0..count).map(|number| Message::new(number.to_string())));
    }

    fn counted(&self, counter: fn(&Self) -> &AtomicUsize) -> usize {
        counter(self).load(Ordering::Relaxed)
    }
}

/// A core that has subscribed.
fn core(fields: &str, now: Instant) -> (Core, Arc<Broker>) {
    let comma = if fields.is_empty() { "" } else { "," };
    let json = format!(r#"{{"filter":"orders","endpoint":"http://localhost/"{comma}{fields}}}"#);
    let spec = SubscriptionSpec::from_json(json.as_bytes()).unwrap();
    let mut core = Core::new(Arc::new(spec), Holds::default(), 8 << 20, now);
    let broker = Arc::<Broker>::default();
    assert!(matches!(next(&mut core, now), Next::Subscribe));
    core.subscribed(Subscription::new(Member(Arc::clone(&broker))));
    (core, broker)
}

fn next(core: &mut Core, now: Instant) -> Next {
    core.next(&mut Context::from_waker(Waker::noop()), now)
}

/// All that may be sent now, and what is waited for then.
fn all(core: &mut Core, now: Instant) -> (Vec<Parcel>, Next) {
    let mut parcels = Vec::new();
    loop {
        match next(core, now) {
            Next::Send(parcel) => parcels.push(parcel),
            next => return (parcels, next),
        }
    }
}

fn come_back(core: &mut Core, parcel: Parcel, health: Health, now: Instant) {
    let verdict = Verdict { decision: Decision::Ack, health, status: None, reason: "".into() };
    core.came_back(&parcel, &verdict, now);
    let count = parcel.deliveries.len();
    let settled: Vec<_> = parcel.deliveries.into_iter().map(Delivery::ack).collect();
    drop(settled);
    core.settled(count);
}

fn fail_until_open(core: &mut Core, broker: &Broker, now: Instant) {
    broker.publish(100);
    while !core.is_open() {
        let (parcels, _) = all(core, now);
        parcels.into_iter().for_each(|parcel| come_back(core, parcel, Health::Failing, now));
    }
}

#[test]
fn takes_no_more_than_it_can_send() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""max_in_flight":4"#, now);
    broker.publish(100);
    for window in [1, 2, 4, 4] {
        let (parcels, then) = all(&mut core, now);
        assert_eq!(parcels.len(), window);
        assert!(matches!(then, Next::Wait(None)));
        assert_eq!(core.in_flight(), window as u64);
        parcels.into_iter().for_each(|parcel| come_back(&mut core, parcel, Health::Well, now));
    }
    assert_eq!(broker.counted(|broker| &broker.handed_out), 1 + 2 + 4 + 4);
}

#[test]
fn an_open_breaker_takes_one_as_a_probe() {
    let now = Instant::now();
    let (mut core, broker) = core("", now);
    fail_until_open(&mut core, &broker, now);
    let taken = broker.counted(|broker| &broker.handed_out);
    assert_eq!(taken, 10);
    let (parcels, Next::Wait(Some(until))) = all(&mut core, now) else { panic!("it is to wait") };
    assert!(parcels.is_empty());
    let (mut parcels, then) = all(&mut core, until);
    assert_eq!(parcels.len(), 1);
    assert!(matches!(then, Next::Wait(None)), "one probe at a time");
    come_back(&mut core, parcels.remove(0), Health::Failing, until);
    let (parcels, Next::Wait(Some(later))) = all(&mut core, until) else { panic!("it is to wait") };
    assert!(parcels.is_empty() && later - until == Duration::from_secs(2));
    let mut parcels = all(&mut core, later).0;
    come_back(&mut core, parcels.remove(0), Health::Well, later);
    assert_eq!(all(&mut core, later).0.len(), 2, "the window begins again");
}

#[test]
fn who_cannot_take_does_not_wait() {
    let now = Instant::now();
    let (mut core, broker) = core("", now);
    broker.publish(1);
    let mut parcels = all(&mut core, now).0;
    come_back(&mut core, parcels.remove(0), Health::Well, now);
    // The broker was told that we wait; then the window fills up by halving.
    broker.publish(2);
    let parcels = all(&mut core, now).0;
    assert_eq!(parcels.len(), 2);
    for parcel in parcels {
        come_back(&mut core, parcel, Health::Well, now);
    }
    assert!(matches!(next(&mut core, now), Next::Wait(None)));
    assert_eq!(broker.counted(|broker| &broker.stopped_waiting), 0);
    for _ in 0..10 {
        core.breaker.failed(now, false);
    }
    assert!(matches!(next(&mut core, now), Next::Wait(Some(_))));
    assert_eq!(broker.counted(|broker| &broker.stopped_waiting), 1, "another member may take it");
    assert!(matches!(next(&mut core, now), Next::Wait(Some(_))));
    assert_eq!(broker.counted(|broker| &broker.stopped_waiting), 1, "once is enough");
}

#[test]
fn a_batch_is_sent_full_or_in_time() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"50ms"}"#, now);
    broker.publish(7);
    let Next::Wait(Some(due)) = next(&mut core, now) else { panic!("it is to wait for more") };
    assert_eq!(due - now, Duration::from_millis(50));
    broker.publish(1);
    let later = now + Duration::from_millis(30);
    assert!(matches!(next(&mut core, later), Next::Wait(Some(still)) if still == due));
    let (parcels, _) = all(&mut core, due);
    assert_eq!(parcels.iter().map(|parcel| parcel.deliveries.len()).collect::<Vec<_>>(), [8]);
    parcels.into_iter().for_each(|parcel| come_back(&mut core, parcel, Health::Well, due));
    broker.publish(25);
    let (parcels, then) = all(&mut core, due);
    assert_eq!(parcels.iter().map(|parcel| parcel.deliveries.len()).collect::<Vec<_>>(), [10, 10]);
    assert!(matches!(then, Next::Wait(None)), "the window is full");
}

#[test]
fn a_batch_has_bounded_bytes() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"50ms"}"#, now);
    let of = |megabytes: usize| Message::new(vec![0; megabytes << 20]);
    broker.queue.lock().extend([3, 3, 3, 9, 1].map(of));
    assert!(matches!(next(&mut core, now), Next::Wait(Some(_))));
    let due = now + Duration::from_millis(50);
    // What did not fit waits no longer, and what is larger than a batch goes alone.
    let mut sent = Vec::new();
    while let Next::Send(parcel) = next(&mut core, due) {
        sent.push(parcel.deliveries.len());
        come_back(&mut core, parcel, Health::Well, due);
    }
    assert_eq!(sent, [2, 1, 1, 1]);
}

#[test]
fn a_rate_counts_messages_and_tells_when() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":100,"wait":"0s"},"rate_limit":100"#, now);
    broker.publish(100);
    let (mut parcels, _) = all(&mut core, now);
    assert_eq!(parcels.iter().map(|parcel| parcel.deliveries.len()).collect::<Vec<_>>(), [10]);
    come_back(&mut core, parcels.remove(0), Health::Well, now);
    let Next::Wait(Some(refill)) = next(&mut core, now) else { panic!("it is to wait") };
    assert!(refill > now && refill < now + Duration::from_millis(11));
    assert_eq!(all(&mut core, now + Duration::from_millis(55)).0.remove(0).deliveries.len(), 5);
}

/// It is sent again in halves, first and before all else, and the rate counts what is sent again.
#[test]
fn a_batch_that_is_refused_is_divided_and_counts_again() {
    let now = Instant::now();
    let fields = r#""mode":"batch","max_in_flight":1,"batch":{"max":10,"wait":"0s"},"rate_limit":100"#;
    let (mut core, broker) = core(fields, now);
    broker.publish(12);
    let Next::Send(parcel) = next(&mut core, now) else { panic!("it is to be sent") };
    let payload = |parcel: &Parcel| parcel.deliveries[0].message().payload().clone();
    assert_eq!((parcel.deliveries.len(), payload(&parcel)), (10, "0".into()));
    core.refused(10);
    core.settled(10);
    core.send_again(parcel.deliveries);
    let mut sent = Vec::new();
    while let Next::Send(parcel) = next(&mut core, now) {
        sent.push((parcel.deliveries.len(), payload(&parcel)));
        core.accepted(parcel.deliveries.len());
        come_back(&mut core, parcel, Health::Well, now);
    }
    assert_eq!(sent, [(5, "0".into()), (5, "5".into())]);
    // Ten were sent twice: the next two come a tenth of a second later.
    let later = |millis| now + Duration::from_millis(millis);
    assert!(matches!(next(&mut core, later(99)), Next::Wait(Some(_))));
    let Next::Send(parcel) = next(&mut core, later(121)) else { panic!("it is to be sent") };
    assert_eq!((parcel.deliveries.len(), payload(&parcel)), (2, "10".into()));
}

#[test]
fn what_the_filters_do_not_want_is_acked() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""filters":[{"exact":{"kind":"a"}}]"#, now);
    broker.publish(50);
    broker.queue.lock().push_back(Message::new("wanted").with_header("ce-kind", "a").unwrap());
    let (parcels, _) = all(&mut core, now);
    assert_eq!(parcels.len(), 1);
    assert_eq!(parcels[0].deliveries[0].message().payload().as_ref(), b"wanted");
    assert_eq!(broker.counted(|broker| &broker.acked), 50);
}

#[test]
fn who_waits_for_an_operator_leaves_the_group() {
    let now = Instant::now();
    for gone in [false, true] {
        let (mut core, broker) = core("", now);
        broker.publish(10);
        let mut parcels = all(&mut core, now).0;
        let health = if gone { Health::Gone } else { Health::Well };
        if !gone {
            core.pause();
        }
        come_back(&mut core, parcels.remove(0), health, now);
        assert!(matches!(next(&mut core, now), Next::Wait(None)));
        assert_eq!((core.holds().disabled, core.holds().paused), (gone, !gone));
        assert_eq!(broker.counted(|broker| &broker.left), 1);
        core.resume();
        assert!(matches!(next(&mut core, now), Next::Subscribe));
    }
}

/// Another member would wait for it, and it was not tried.
#[test]
fn a_gathered_batch_is_given_back_by_whatever_keeps_it_from_being_sent() {
    let now = Instant::now();
    for how in ["paused", "disabled", "unconsented", "unauthorized", "open", "stopped", "closing"] {
        let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"1m"}"#, now);
        broker.publish(3);
        assert!(matches!(next(&mut core, now), Next::Wait(Some(_))));
        assert_eq!(core.in_flight(), 3);
        match how {
            "paused" => core.pause(),
            "disabled" => core.disable(),
            "unconsented" => core.set_unconsented(true),
            "unauthorized" => core.set_unauthorized(true),
            "stopped" => core.stop(),
            _ => {
                if how == "closing" {
                    core.drain();
                }
                (0..10).for_each(|_| assert_eq!(core.breaker.failed(now, false), core.is_open()));
            }
        }
        let then = next(&mut core, now);
        let ends = ["stopped", "closing"].contains(&how);
        assert_eq!(matches!(then, Next::Over), ends, "{how}: {then:?}");
        assert_eq!((core.in_flight(), broker.counted(|broker| &broker.released)), (0, 3), "{how}");
        let back: Vec<_> = broker.queue.lock().iter().map(|message| message.payload().clone()).collect();
        assert_eq!(back, ["0", "1", "2"], "{how}: in their order");
        if how == "open" {
            assert_eq!(broker.counted(|broker| &broker.stopped_waiting), 1, "it does not take them again");
        }
    }
}

#[test]
fn a_batch_to_be_sent_again_in_smaller_ones_is_given_back_too() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"0s"}"#, now);
    broker.publish(10);
    let Next::Send(parcel) = next(&mut core, now) else { panic!("it is to be sent") };
    core.pause();
    core.refused(10);
    core.settled(10);
    core.send_again(parcel.deliveries);
    assert!(matches!(next(&mut core, now), Next::Wait(None)));
    assert_eq!((core.in_flight(), broker.counted(|broker| &broker.released)), (0, 10));
}

/// One more failure would be its last; it is given back by the end of the push alone.
#[test]
fn what_a_410_came_for_at_the_last_attempt_stays_in_hand() {
    let now = Instant::now();
    for ends in [false, true] {
        let (mut core, broker) = core("", now);
        broker.publish(1);
        let Next::Send(parcel) = next(&mut core, now) else { panic!("it is to be sent") };
        let verdict = Verdict { decision: Decision::Keep, health: Health::Gone, status: Some(410), reason: "".into() };
        assert!(core.came_back(&parcel, &verdict, now));
        core.settled(1);
        core.keep(parcel.deliveries);
        core.pause();
        assert!(matches!(next(&mut core, now), Next::Wait(None)));
        assert_eq!((core.in_flight(), broker.counted(|broker| &broker.released)), (1, 0));
        if ends {
            core.stop();
            assert!(matches!(next(&mut core, now), Next::Over));
            assert_eq!((core.in_flight(), broker.counted(|broker| &broker.released)), (0, 1));
            continue;
        }
        core.resume();
        assert!(matches!(next(&mut core, now), Next::Subscribe));
        core.subscribed(Subscription::new(Member(Arc::clone(&broker))));
        assert!(matches!(next(&mut core, now), Next::Send(_)));
    }
}

#[test]
fn what_expires_while_a_batch_is_gathered_is_not_sent() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"1m"}"#, now);
    let expired = |ago: u64| {
        let millis = Timestamp::now().as_millis() - i64::try_from(ago).unwrap();
        Message::new("expired").with_expires_at(Timestamp::from_millis(millis))
    };
    broker.publish(2);
    broker.queue.lock().push_front(expired(0));
    // The broker gave this one out although it had expired, and had its reasons.
    broker.queue.lock().push_back(expired(3_600_000));
    let Next::Wait(Some(due)) = next(&mut core, now) else { panic!("it is to wait for more") };
    let Next::Send(parcel) = next(&mut core, due) else { panic!("it is to be sent") };
    let sent: Vec<_> = parcel.deliveries.iter().map(|delivery| delivery.message().payload().clone()).collect();
    assert_eq!(sent, ["0", "1", "expired"]);
    assert_eq!(broker.counted(|broker| &broker.released), 1);
    come_back(&mut core, parcel, Health::Well, due);

    broker.queue.lock().push_front(expired(0));
    assert!(matches!(next(&mut core, due), Next::Wait(Some(_))));
    let later = due + Duration::from_secs(60);
    assert!(matches!(next(&mut core, later), Next::Wait(None)), "nothing is left to be sent");
    assert_eq!(core.in_flight(), 0);
    broker.publish(1);
    assert!(matches!(next(&mut core, later), Next::Wait(Some(then)) if then == later + Duration::from_secs(60)));
}

#[test]
fn the_end_waits_for_what_is_in_flight() {
    let now = Instant::now();
    for how in ["stopped", "closed", "open"] {
        let (mut core, broker) = core("", now);
        broker.publish(1);
        let mut parcels = all(&mut core, now).0;
        match how {
            "stopped" => core.stop(),
            "closed" => *broker.ended.lock() = true,
            _ => {
                core.drain();
                for _ in 0..10 {
                    core.breaker.failed(now, false);
                }
            }
        }
        let _ = next(&mut core, now);
        assert!(matches!(next(&mut core, now), Next::Wait(None)), "{how}");
        come_back(&mut core, parcels.remove(0), Health::Failing, now);
        assert!(matches!(next(&mut core, now), Next::Over), "{how}");
        assert_eq!(broker.counted(|broker| &broker.left), 1);
    }
}

#[test]
fn a_drain_goes_on_as_long_as_the_endpoint_takes_messages() {
    let now = Instant::now();
    let (mut core, broker) = core(r#""mode":"batch","batch":{"max":10,"wait":"1m"}"#, now);
    broker.publish(5);
    assert!(matches!(next(&mut core, now), Next::Wait(Some(_))));
    core.drain();
    let mut parcels = all(&mut core, now).0;
    assert_eq!(parcels[0].deliveries.len(), 5, "a drain does not wait for more");
    come_back(&mut core, parcels.remove(0), Health::Well, now);
    assert!(matches!(next(&mut core, now), Next::Wait(None)));
}

#[derive(Clone, Debug)]
enum Step {
    Publish(usize),
    Pass(u64),
    Back(usize, Health),
    Pause,
    Resume,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let health = prop_oneof![
        6 => Just(Health::Well), 6 => Just(Health::Failing), 2 => Just(Health::Overloaded), 1 => Just(Health::Gone)
    ];
    let step = prop_oneof![
        3 => (1_usize..50).prop_map(Step::Publish),
        2 => (0_u64..3_000).prop_map(Step::Pass),
        8 => (0_usize..100, health).prop_map(|(index, health)| Step::Back(index, health)),
        1 => Just(Step::Pause),
        2 => Just(Step::Resume),
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    /// Whatever happens: the window holds, an open breaker sends at most a probe, a paused or
    /// disabled push sends nothing, nothing is taken that is not sent, and what can be sent is.
    #[test]
    fn the_mechanisms_hold_together(steps in steps(), max in 1_u32..20) {
        let mut now = Instant::now();
        let (mut core, broker) = core(&format!(r#""max_in_flight":{max}"#), now);
        let mut out: Vec<Parcel> = Vec::new();
        for step in steps {
            match step {
                Step::Publish(count) => broker.publish(count),
                Step::Pass(millis) => now += Duration::from_millis(millis),
                Step::Back(index, health) if !out.is_empty() => {
                    let parcel = out.swap_remove(index % out.len());
                    come_back(&mut core, parcel, health, now);
                }
                Step::Back(..) => {}
                Step::Pause => core.pause(),
                Step::Resume => core.resume(),
            }
            let was_open = core.is_open();
            let before = out.len();
            loop {
                match next(&mut core, now) {
                    Next::Send(parcel) => out.push(parcel),
                    Next::Subscribe => core.subscribed(Subscription::new(Member(Arc::clone(&broker)))),
                    Next::Wait(_) => break,
                    Next::Over => prop_assert!(false, "nobody stopped it"),
                }
            }
            let sent = out.len() - before;
            prop_assert_eq!(core.in_flight(), out.len() as u64, "all that was taken is on its way");
            prop_assert!(sent == 0 || out.len() <= max as usize);
            prop_assert!(!was_open || sent <= 1);
            prop_assert!(!core.holds().any() || sent == 0);
            let free = !core.is_open() && !core.holds().any();
            let room = out.len() < core.window.size() as usize;
            prop_assert!(!(free && room) || broker.queue.lock().is_empty(), "what can be sent is sent");
        }
    }
}
