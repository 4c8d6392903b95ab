//! Pulling from a peer that misbehaves, and settling with it.

use std::time::Duration;

use broker_core::{Broker, ErrorKind, Gap, GroupName, Message, Subscribe, TopicFilter};
use parking_lot::Mutex;

use super::peer::{Peer, Seen, Then, answer};
use super::{broker, soon, topic};
use crate::event::{Envelope, json};

fn filter() -> TopicFilter {
    TopicFilter::new("t").unwrap()
}

fn group() -> Subscribe {
    Subscribe::group(GroupName::new("g").unwrap())
}

/// The answer of a pull: these messages, each with its lease.
fn pulled(leases: &[(&str, &str)]) -> Then {
    let topic = topic("t");
    let deliveries: Vec<_> = leases
        .iter()
        .map(|(lease, payload)| {
            let message = Message::new((*payload).to_owned());
            let mut event = Vec::new();
            json::encode(Envelope::new(&topic, &message), &mut event);
            format!(r#"{{"lease":"{lease}","attempt":1,"event":{}}}"#, String::from_utf8(event).unwrap())
        })
        .collect();
    answer(200, &format!(r#"{{"deliveries":[{}]}}"#, deliveries.join(",")))
}

/// Answers what is not a pull or a settlement as a daemon would that has the subscription.
fn standing(seen: &Seen) -> Option<Then> {
    let view = r#"{"name":"g","filter":"t","group":"g","status":{}}"#;
    match seen.line.split(' ').next() {
        Some("GET") => Some(answer(200, view)),
        Some("PUT") => Some(answer(201, view)),
        Some("DELETE") => Some(answer(204, "")),
        _ => None,
    }
}

/// A peer whose pulls are answered by `pulls`, one after another, and then with nothing; whose
/// settlements by `settle`.
async fn peer(pulls: Vec<Then>, settle: impl Fn(&Seen) -> Then + Send + Sync + 'static) -> Peer {
    let pulls = Mutex::new(pulls.into_iter());
    Peer::start(move |_, seen| match standing(seen) {
        Some(then) => then,
        None if seen.line.contains("/pull") => pulls.lock().next().unwrap_or(Then::Hang),
        None => settle(seen),
    })
    .await
}

fn settled(_: &Seen) -> Then {
    answer(200, r#"{"gone":[]}"#)
}

fn settlements(peer: &Peer) -> Vec<serde_json::Value> {
    peer.seen().iter().filter(|seen| seen.line.contains("/settle")).map(Seen::json).collect()
}

#[tokio::test]
async fn what_goes_wrong_with_a_pull_is_tried_again() {
    let pulls = vec![
        Then::Close,
        answer(503, r#"{"detail":"busy"}"#),
        answer(200, "{oops"),
        answer(200, r#"{"deliveries":[],"lost":2}"#),
        answer(502, ""),
        pulled(&[("l1", "1")]),
    ];
    let peer = peer(pulls, settled).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let delivery = soon(subscription.next()).await.unwrap().unwrap();
    assert_eq!(delivery.message().payload().as_ref(), b"1");
    assert_eq!(subscription.gap(), Some(Gap::Lost(2)));
    soon(delivery.ack()).await.unwrap();
    assert_eq!(settlements(&peer), [serde_json::json!({ "ack": ["l1"] })]);
}

#[tokio::test]
async fn a_refusal_ends_the_subscription() {
    let peer = peer(vec![answer(401, r#"{"detail":"who are you"}"#)], settled).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    for _ in 0..2 {
        let error = soon(subscription.next()).await.unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Unauthorized, "who are you"));
    }
}

#[tokio::test]
async fn a_subscription_that_is_gone_was_deleted_or_is_made_again() {
    // Never away: somebody deleted it.
    let gone = answer(404, r#"{"detail":"no such subscription"}"#);
    let deleted = peer(vec![gone.clone()], settled).await;
    let first = broker(deleted.address, "");
    let mut subscription = soon(first.subscribe(&filter(), group())).await.unwrap();
    assert_eq!(soon(subscription.next()).await.unwrap_err().kind(), ErrorKind::NotFound);

    // Away in between, as itself tells or a gateway: it may have forgotten.
    for away in [Then::Close, answer(502, "<html>"), answer(503, ""), answer(504, "")] {
        let forgotten = peer(vec![away, gone.clone(), pulled(&[("l1", "1")])], settled).await;
        let second = broker(forgotten.address, "");
        let mut subscription = soon(second.subscribe(&filter(), group())).await.unwrap();
        assert!(soon(subscription.next()).await.unwrap().is_some());
        assert_eq!(subscription.gap(), Some(Gap::Unknown));
    }
}

#[tokio::test]
async fn a_lease_that_had_ended_is_told() {
    let peer = peer(vec![pulled(&[("l1", "1"), ("l2", "2")])], |_| answer(200, r#"{"gone":["l1"]}"#)).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let mut batch = Vec::new();
    soon(subscription.receive(&mut batch, 10)).await.unwrap();
    let second = batch.pop().unwrap();
    let first = batch.pop().unwrap();
    let (first, second) = (first.ack(), second.ack());
    assert_eq!(soon(first).await.unwrap_err().kind(), ErrorKind::NotFound);
    soon(second).await.unwrap();
}

#[tokio::test]
async fn a_settlement_that_was_lost_and_is_gone_the_second_time_is_unknown() {
    let tries = Mutex::new(0);
    let settle = move |_: &Seen| {
        let mut tries = tries.lock();
        *tries += 1;
        // Done, as far as anybody knows, and the answer lost with the connection that was kept.
        if *tries == 1 { Then::Close } else { answer(200, r#"{"gone":["l1"]}"#) }
    };
    let peer = peer(vec![pulled(&[("l1", "1")])], settle).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let delivery = soon(subscription.next()).await.unwrap().unwrap();
    let error = soon(delivery.ack()).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Unavailable, false), "{error}");
    assert!(error.message().contains("unknown"), "{error}");
}

#[tokio::test]
async fn a_settlement_outlives_a_gateway_that_finds_no_daemon() {
    let tries = Mutex::new(0);
    let settle = move |_: &Seen| {
        let mut tries = tries.lock();
        *tries += 1;
        match *tries {
            1 => answer(502, "<html>"),
            2 => answer(503, ""),
            _ => answer(200, r#"{"gone":[]}"#),
        }
    };
    let peer = peer(vec![pulled(&[("l1", "1")])], settle).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    soon(soon(subscription.next()).await.unwrap().unwrap().ack()).await.unwrap();
    assert_eq!(settlements(&peer).len(), 3);
}

#[tokio::test]
async fn what_is_held_is_extended_while_a_settlement_is_not_answered() {
    let settle = |seen: &Seen| if seen.json().get("ack").is_some() { Then::Hang } else { settled(seen) };
    let peer = peer(vec![pulled(&[("l1", "1"), ("l2", "2")])], settle).await;
    let broker = broker(peer.address, "lease=1s&timeout=1m");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let mut batch = Vec::new();
    soon(subscription.receive(&mut batch, 10)).await.unwrap();
    let ack = batch.remove(0).ack();
    soon(async {
        while !settlements(&peer).iter().any(|told| told["extend"][0]["lease"] == "l2") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop((ack, batch));
}

#[tokio::test]
async fn a_daemon_that_takes_no_settlement_is_not_asked_for_ever_more_deliveries() {
    const PULLS: usize = 30;
    let many: Vec<_> = (0..1_000).map(|number| (format!("l{number}"), "1")).collect();
    let many: Vec<_> = many.iter().map(|(lease, payload)| (lease.as_str(), *payload)).collect();
    let peer = peer(vec![pulled(&many); PULLS], |_| Then::Hang).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group().with_max_in_flight(1_000).unwrap())).await.unwrap();
    let mut batch = Vec::new();
    let mut received = 0;
    while let Ok(got) = tokio::time::timeout(Duration::from_millis(500), subscription.receive(&mut batch, 1_000)).await
    {
        received += got.unwrap();
        // Without a look at what becomes of them.
        batch.drain(..).for_each(|delivery| drop(delivery.ack()));
    }
    assert!((10_000..20_000).contains(&received), "{received} were taken");
}

#[tokio::test]
async fn a_settlement_is_tried_again_and_one_refused_does_not_take_others_along() {
    let tries = Mutex::new(0);
    let settle = move |seen: &Seen| {
        let mut tries = tries.lock();
        *tries += 1;
        let many = seen.json().as_object().unwrap().len() > 1;
        match *tries {
            1 => Then::Close,
            _ if many => answer(400, r#"{"kind":"invalid","detail":"retry[0].delay: it is 12h at most"}"#),
            _ if seen.json().get("retry").is_some() => answer(400, r#"{"kind":"invalid","detail":"delay"}"#),
            _ => answer(200, r#"{"gone":[]}"#),
        }
    };
    let peer = peer(vec![pulled(&[("l1", "1"), ("l2", "2")])], settle).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let mut batch = Vec::new();
    soon(subscription.receive(&mut batch, 10)).await.unwrap();
    let retry = batch.pop().unwrap().retry_after(Duration::from_secs(1_000_000));
    let ack = batch.pop().unwrap().ack();
    soon(ack).await.unwrap();
    assert_eq!(soon(retry).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn what_cannot_be_read_is_rejected_and_wedges_nobody() {
    let broken = r#"{"deliveries":[{"lease":"l1","attempt":1,"event":{"specversion":"9"}}]}"#;
    let peer = peer(vec![answer(200, broken), pulled(&[("l2", "2")])], settled).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let delivery = soon(subscription.next()).await.unwrap().unwrap();
    assert_eq!(delivery.message().payload().as_ref(), b"2");
    soon(delivery.ack()).await.unwrap();
    let rejected = settlements(&peer)[0]["reject"][0].clone();
    assert_eq!(rejected["lease"], "l1");
    assert!(rejected["reason"].as_str().unwrap().contains("cannot be read"), "{rejected}");
}

#[tokio::test]
async fn what_nobody_takes_is_given_back_and_what_is_held_is_extended() {
    let peer = peer(vec![pulled(&[("l1", "1"), ("l2", "2")])], settled).await;
    let broker = broker(peer.address, "lease=1s&wait=1s");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let held = soon(subscription.next()).await.unwrap().unwrap();
    soon(async {
        loop {
            let told = settlements(&peer);
            let released = told.iter().any(|told| told["release"] == serde_json::json!(["l2"]));
            let extended = |told: &serde_json::Value| {
                told["extend"].as_array().is_some_and(|all| all.iter().any(|one| one["lease"] == "l1"))
            };
            if released && told.iter().filter(|told| extended(told)).count() >= 2 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    soon(held.ack()).await.unwrap();
}

#[tokio::test]
async fn closing_with_something_held_gives_it_back() {
    let peer = peer(vec![pulled(&[("l1", "1"), ("l2", "2")])], settled).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), group())).await.unwrap();
    let held = soon(subscription.next()).await.unwrap().unwrap();
    let report = soon(broker.close(Duration::from_millis(200))).await;
    assert_eq!((report.complete, report.in_flight), (false, 1));
    assert!(soon(subscription.next()).await.unwrap().is_none());
    assert_eq!(soon(held.ack()).await.unwrap_err().kind(), ErrorKind::Closed);
    let released: Vec<_> = settlements(&peer).iter().map(|told| told["release"].clone()).collect();
    assert_eq!(released, [serde_json::json!(["l2"]), serde_json::json!(["l1"])]);
}

#[tokio::test]
async fn a_copy_of_ones_own_is_deleted_with_its_subscription() {
    let peer = peer(vec![pulled(&[("l1", "1")])], settled).await;
    let broker = broker(peer.address, "");
    let mut subscription = soon(broker.subscribe(&filter(), Subscribe::new())).await.unwrap();
    let delivery = soon(subscription.next()).await.unwrap().unwrap();
    let deleted = |peer: &Peer| peer.seen().iter().filter(|seen| seen.line.starts_with("DELETE")).count();
    soon(subscription.close()).await.unwrap();
    assert_eq!(deleted(&peer), 0, "what is held can still be settled");
    soon(delivery.ack()).await.unwrap();
    soon(async {
        while deleted(&peer) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let put = peer.seen().into_iter().find(|seen| seen.line.starts_with("PUT /subscriptions/copy-")).unwrap();
    assert!(put.head.contains("if-none-match: *") && put.json()["expires"].is_string());
}
