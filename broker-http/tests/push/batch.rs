//! Batch mode, the other modes, and signatures.

use std::sync::Arc;

use broker_core::{BrokerExt, Message};
use serde_json::Value;
use tokio::sync::Notify;

use crate::support::{Endpoint, QUICK, Reaction, Rig, answer, status};

fn numbered(count: u32) -> impl Iterator<Item = Message> {
    (0..count).map(|number| Message::new(number.to_string()).with_id(format!("m{number}").parse().unwrap()))
}

fn ids(body: &[u8]) -> Vec<String> {
    let events: Vec<Value> = serde_json::from_slice(body).unwrap();
    events.iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_backlog_goes_in_full_batches_and_the_rest_after_a_wait() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""mode":"batch","batch":{"max":40,"wait":"20ms"}"#).await;
    rig.push.pause();
    rig.publish(numbered(100)).await;
    rig.push.resume();
    rig.drained().await;
    let sizes: Vec<_> = endpoint.so_far().iter().map(|request| ids(&request.body).len()).collect();
    assert_eq!(sizes, [40, 40, 20]);
}

#[tokio::test]
async fn max_in_flight_counts_requests() {
    let gate = Arc::new(Notify::new());
    let mut endpoint = Endpoint::always(Reaction::Hold(Arc::clone(&gate))).await;
    let fields = r#""mode":"batch","max_in_flight":2,"batch":{"max":10,"wait":"10ms"}"#;
    let rig = Rig::new(&endpoint.url(), fields).await;
    rig.push.pause();
    rig.publish(numbered(40)).await;
    rig.push.resume();
    // Ten messages each, of which two may be in flight: so it is not they that are counted.
    for _ in 0..4 {
        assert_eq!(ids(&endpoint.next().await.body).len(), 10);
        assert!(rig.push.status().in_flight <= 20);
        gate.notify_one();
    }
    rig.until(async || {
        gate.notify_one();
        rig.lag().await == 0
    })
    .await;
}

#[tokio::test]
async fn items_are_judged_one_by_one() {
    let mut endpoint = Endpoint::new(|request| {
        let statuses: Vec<_> = ids(&request.body)
            .into_iter()
            .filter(|id| id != "m3")
            .map(|id| {
                let status = match id.as_str() {
                    "m1" => "RETRY",
                    "m2" => "DROP",
                    _ => "SUCCESS",
                };
                serde_json::json!({ "id": id, "status": status })
            })
            .collect();
        answer(serde_json::json!({ "statuses": statuses }).to_string())
    })
    .await;
    let rig = Rig::new(&endpoint.url(), &format!(r#"{QUICK},"mode":"batch""#)).await;
    rig.publish(numbered(6)).await;
    let mut dead: Vec<_> = rig
        .dead(3)
        .await
        .into_iter()
        .map(|letter| (letter.message.id().to_string(), letter.attempts, letter.failure.reason().to_owned()))
        .collect();
    dead.sort();
    assert_eq!((dead[0].0.as_str(), dead[0].1), ("m1", 3), "{dead:?}");
    assert_eq!((dead[1].0.as_str(), dead[1].1), ("m2", 1), "{dead:?}");
    assert_eq!((dead[2].0.as_str(), dead[2].1), ("m3", 3), "{dead:?}");
    assert!(dead[0].2.contains("RETRY") && dead[1].2.contains("DROP") && dead[2].2.contains("left"), "{dead:?}");
    rig.drained().await;
    let first = endpoint.next().await;
    assert_eq!(ids(&first.body), ["m0", "m1", "m2", "m3", "m4", "m5"]);
    let acked = endpoint.so_far().iter().all(|request| !ids(&request.body).iter().any(|id| id == "m0"));
    assert!(acked, "what was acked does not come back");
}

#[tokio::test]
async fn the_answer_to_a_large_batch_is_read_to_its_end() {
    let mut endpoint = Endpoint::new(|request| {
        let statuses: Vec<_> =
            ids(&request.body).iter().map(|id| serde_json::json!({ "id": id, "status": "SUCCESS" })).collect();
        answer(serde_json::json!({ "statuses": statuses }).to_string())
    })
    .await;
    let rig = Rig::new(&endpoint.url(), r#""mode":"batch","batch":{"max":5000},"retry":{"max_attempts":1}"#).await;
    rig.push.pause();
    rig.publish(numbered(5_000)).await;
    rig.push.resume();
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    assert_eq!(endpoint.so_far().iter().map(|request| ids(&request.body).len()).sum::<usize>(), 5_000);
}

#[tokio::test]
async fn items_are_judged_whatever_answer_of_success_says_them() {
    let body = r#"{"statuses":[{"id":"m0","status":"SUCCESS"},{"id":"m1","status":"DROP"}]}"#;
    let endpoint = Endpoint::always(Reaction::Answer(207, "content-type: application/json\r\n", body.into())).await;
    let rig = Rig::new(&endpoint.url(), r#""mode":"batch","retry":{"max_attempts":1}"#).await;
    rig.publish(numbered(2)).await;
    assert_eq!(rig.dead(1).await.remove(0).message.id().to_string(), "m1");
    rig.drained().await;
}

/// Events are told apart by source and id, so that a batch may have one id twice.
#[tokio::test]
async fn messages_with_one_id_are_settled_each_by_its_own_entry() {
    let endpoint = Endpoint::new(|request| {
        let events: Vec<Value> = serde_json::from_slice(&request.body).unwrap();
        let statuses: Vec<_> = events
            .iter()
            .map(|event| {
                let status = if event["source"] == "/topics/orders.created" { "SUCCESS" } else { "DROP" };
                serde_json::json!({ "id": event["id"], "status": status })
            })
            .collect();
        answer(serde_json::json!({ "statuses": statuses }).to_string())
    })
    .await;
    let rig = Rig::new(&endpoint.url(), &format!(r#"{QUICK},"mode":"batch""#)).await;
    let message = || Message::new("x").with_id("1".parse().unwrap());
    rig.push.pause();
    rig.publish([message()]).await;
    rig.broker.publish(&"orders.changed".parse().unwrap(), message()).await.unwrap();
    rig.push.resume();
    assert_eq!(rig.dead(1).await.remove(0).topic.as_str(), "orders.changed");
    rig.drained().await;
}

#[tokio::test]
async fn what_expires_while_a_batch_is_gathered_is_not_pushed() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""mode":"batch","batch":{"max":10,"wait":"2s"}"#).await;
    let short = Message::new("x").with_id("short".parse().unwrap()).with_ttl(std::time::Duration::from_millis(500));
    rig.publish(numbered(1).chain([short])).await;
    rig.drained().await;
    assert_eq!(ids(&endpoint.next().await.body), ["m0"]);
    assert!(endpoint.so_far().is_empty());
    rig.until(async || {
        let status = rig.broker.status().await.unwrap();
        status.group(&rig.group).unwrap().counts.expired == 1
    })
    .await;
}

#[tokio::test]
async fn a_batch_fails_as_a_whole() {
    let mut endpoint = Endpoint::script([status(500), answer(r#"{"status":"RETRY"}"#), status(200)]).await;
    let rig = Rig::new(&endpoint.url(), &format!(r#"{QUICK},"mode":"batch""#)).await;
    rig.publish(numbered(10)).await;
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    assert_eq!(ids(&endpoint.next().await.body).len(), 10);
}

#[tokio::test]
async fn a_batch_that_is_too_large_for_its_endpoint_is_sent_in_smaller_ones() {
    let mut endpoint = Endpoint::new(|request| status(if ids(&request.body).len() > 7 { 413 } else { 200 })).await;
    let fields = r#""mode":"batch","max_in_flight":1,"batch":{"max":100,"wait":"10ms"},"retry":{"max_attempts":1}"#;
    let rig = Rig::new(&endpoint.url(), fields).await;
    rig.push.pause();
    rig.publish(numbered(200)).await;
    rig.push.resume();
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    let requests = endpoint.so_far();
    let sizes: Vec<_> = requests.iter().map(|request| ids(&request.body).len()).collect();
    assert_eq!(sizes[..5], [100, 50, 25, 12, 6]);
    assert!(requests.iter().all(|request| String::from_utf8_lossy(&request.body).contains("\"brokerattempt\":1")));
}

#[tokio::test]
async fn one_message_that_is_refused_takes_none_of_its_batch_along() {
    for refusal in [400, 413, 415, 422] {
        let endpoint = Endpoint::new(move |request| {
            status(if ids(&request.body).iter().any(|id| id == "m33") { refusal } else { 200 })
        })
        .await;
        let fields = r#""mode":"batch","batch":{"max":50,"wait":"10ms"},"retry":{"max_attempts":1}"#;
        let rig = Rig::new(&endpoint.url(), fields).await;
        rig.push.pause();
        rig.publish(numbered(100)).await;
        rig.push.resume();
        rig.drained().await;
        let dead = rig.broker.dead_letters(&rig.group, 100).await.unwrap();
        let dead: Vec<_> = dead.iter().map(|dead| dead.message.id().to_string()).collect();
        assert_eq!(dead, ["m33"], "{refusal}");
    }
}

#[tokio::test]
async fn a_signed_batch_resent_unchanged_has_its_id() {
    let mut endpoint = Endpoint::script([status(500), status(200)]).await;
    let signing = r#""signing":{"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}"#;
    let fields = format!(r#"{QUICK},{signing},"mode":"batch","batch":{{"wait":"200ms"}}"#);
    let rig = Rig::new(&endpoint.url(), &fields).await;
    rig.publish(numbered(1)).await;
    let (first, second) = (endpoint.next().await, endpoint.next().await);
    assert_eq!(first.header("webhook-id"), second.header("webhook-id"));
    assert!(first.header("webhook-signature").starts_with("v1,"));
}

#[tokio::test]
async fn a_message_has_its_webhook_id_on_every_attempt() {
    let mut endpoint = Endpoint::script([status(500), status(200)]).await;
    let signing = r#""signing":{"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}"#;
    let rig = Rig::new(&endpoint.url(), &format!("{QUICK},{signing}")).await;
    rig.publish(numbered(1)).await;
    for attempt in 1..=2 {
        let request = endpoint.next().await;
        assert_eq!((request.header("webhook-id"), request.attempt()), ("m0", attempt));
    }
}

#[tokio::test]
async fn structured_and_raw() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""mode":"structured""#).await;
    rig.publish(numbered(1)).await;
    let request = endpoint.next().await;
    assert_eq!(request.header("content-type"), "application/cloudevents+json");
    assert_eq!(request.header("broker-topic"), "orders.created");
    let event: Value = serde_json::from_slice(&request.body).unwrap();
    assert_eq!((&event["id"], &event["brokerattempt"]), (&"m0".into(), &1.into()));

    let rig = Rig::new(&endpoint.url(), r#""mode":"raw""#).await;
    rig.publish(numbered(1)).await;
    let request = endpoint.next().await;
    assert_eq!((request.header("broker-id"), request.text()), ("m0", "0"));
    assert!(!request.headers.contains_key("ce-id"));
}
