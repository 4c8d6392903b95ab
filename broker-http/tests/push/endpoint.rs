//! What an endpoint is spared: window, breaker, rate, pause; and how a push ends.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker as _, Message};
use broker_http::push::{Guard, PushClient, PushState};
use tokio::sync::Notify;

use crate::support::{Endpoint, QUICK, Reaction, Rig, nobody, status, within};

fn numbered(count: u32) -> impl Iterator<Item = Message> {
    (0..count).map(|number| Message::new(number.to_string()))
}

#[tokio::test]
async fn an_empty_payload_has_its_length() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    for message in [Message::new(""), Message::tombstone()] {
        rig.publish([message]).await;
        assert_eq!(endpoint.next().await.headers["content-length"], "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_once() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.publish(numbered(5_000)).await;
    rig.drained().await;
    let requests = endpoint.so_far();
    assert_eq!(requests.len(), 5_000);
    let texts: BTreeSet<_> = requests.iter().map(|request| request.text().to_owned()).collect();
    assert_eq!(texts.len(), 5_000);
    let connections = requests.iter().map(|request| request.connection).max().unwrap();
    assert!(connections <= 64, "{connections} connections for a window of 64");
}

#[tokio::test]
async fn no_more_than_max_in_flight() {
    let gate = Arc::new(Notify::new());
    let mut endpoint = Endpoint::always(Reaction::Hold(Arc::clone(&gate))).await;
    let rig = Rig::new(&endpoint.url(), r#""max_in_flight":3"#).await;
    rig.publish(numbered(50)).await;
    let mut seen = 0;
    while seen < 50 {
        let _ = endpoint.next().await;
        seen += 1;
        seen += endpoint.so_far().len();
        assert!(rig.push.status().in_flight <= 3);
        gate.notify_one();
    }
    within(async {
        while rig.lag().await > 0 {
            gate.notify_one();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_open_breaker_makes_and_counts_no_attempt() {
    let mut endpoint = Endpoint::always(status(500)).await;
    let retry = r#""retry":{"max_attempts":20,"initial":"1ms","max":"2ms"}"#;
    let rig = Rig::new(&endpoint.url(), retry).await;
    rig.publish_text("42").await;
    for attempt in 1..=10 {
        assert_eq!(endpoint.next().await.attempt(), attempt);
    }
    rig.until(async || rig.push.status().state == PushState::Open).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(endpoint.so_far().is_empty(), "the breaker is open");
    // The first probe fails, the second finds the endpoint back.
    assert_eq!(endpoint.next().await.attempt(), 11);
    assert_eq!(rig.push.status().state, PushState::Open);
    endpoint.change(status(200));
    assert_eq!(endpoint.next().await.attempt(), 12);
    rig.drained().await;
    assert_eq!(rig.push.status().state, PushState::Active);
}

#[tokio::test]
async fn a_rate_limit_holds() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""rate_limit":100"#).await;
    rig.publish(numbered(60)).await;
    let first = endpoint.next().await.at;
    let mut last = first;
    for _ in 1..60 {
        last = endpoint.next().await.at;
    }
    // A burst of 10, then one in 10 ms.
    assert!(last - first >= Duration::from_millis(480), "{:?}", last - first);
}

#[tokio::test]
async fn attribute_filters_choose() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""filters":[{"prefix":{"type":"com.acme."}}]"#).await;
    let typed = |kind: &str| Message::new(kind.to_owned()).with_header("ce-type", kind.to_owned()).unwrap();
    rig.publish(["com.acme.a", "org.acme.b", "com.acme.c"].map(typed)).await;
    rig.publish(numbered(100)).await;
    rig.drained().await;
    let texts: BTreeSet<_> = endpoint.so_far().iter().map(|request| request.text().to_owned()).collect();
    assert_eq!(texts.into_iter().collect::<Vec<_>>(), ["com.acme.a", "com.acme.c"]);
}

#[tokio::test]
async fn ordered_means_one_of_a_key_at_a_time() {
    let fail = std::sync::atomic::AtomicU32::new(0);
    let mut endpoint = Endpoint::new(move |_| {
        let fails = fail.fetch_add(1, std::sync::atomic::Ordering::Relaxed).is_multiple_of(3);
        status(if fails { 500 } else { 200 })
    })
    .await;
    let retry = r#""ordered":true,"retry":{"initial":"1ms","max":"2ms"}"#;
    let rig = Rig::new(&endpoint.url(), retry).await;
    rig.publish((0..60).map(|number| Message::new(format!("{number:03}")).with_key(format!("key{}", number % 3))))
        .await;
    rig.drained().await;
    let mut last = std::collections::HashMap::new();
    for request in endpoint.so_far() {
        let before = last.insert(request.header("broker-key").to_owned(), request.text().to_owned());
        assert!(before.is_none_or(|before| before.as_str() <= request.text()), "out of order");
    }
}

#[tokio::test]
async fn pause_and_resume() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.publish_text("1").await;
    assert_eq!(endpoint.next().await.text(), "1");
    rig.drained().await;
    rig.push.pause();
    assert_eq!(rig.push.status().state, PushState::Paused);
    rig.publish_text("2").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(endpoint.so_far().is_empty());
    rig.push.resume();
    let request = endpoint.next().await;
    assert_eq!((request.text(), request.attempt()), ("2", 1), "a pause is no attempt");
}

#[tokio::test]
async fn stopping_finishes_what_is_in_flight() {
    let gate = Arc::new(Notify::new());
    let mut endpoint = Endpoint::always(Reaction::Hold(Arc::clone(&gate))).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.publish(numbered(10)).await;
    let _ = endpoint.next().await;
    rig.push.stop();
    gate.notify_one();
    within(rig.push.stopped()).await;
    assert_eq!(rig.push.status().state, PushState::Ended);
    assert_eq!(rig.lag().await, 9, "one was acked, the others were not touched");
    assert!(endpoint.so_far().is_empty());
}

#[tokio::test]
async fn closing_delivers_what_can_be_delivered() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.publish(numbered(500)).await;
    let _ = endpoint.next().await;
    rig.push.drain();
    let report = rig.broker.close(Duration::from_secs(20)).await;
    assert!(report.complete);
    assert_eq!((report.undelivered, report.in_flight), (0, 0));
    assert_eq!(endpoint.so_far().len(), 499);
    within(rig.push.stopped()).await;
}

#[tokio::test]
async fn closing_does_not_wait_for_who_is_away() {
    for how in ["paused", "gone", "open"] {
        let endpoint = Endpoint::always(status(if how == "gone" { 410 } else { 500 })).await;
        let rig = Rig::new(&endpoint.url(), r#""retry":{"initial":"1ms","max":"2ms"}"#).await;
        if how == "paused" {
            rig.push.pause();
        }
        rig.publish(numbered(30)).await;
        let state = match how {
            "paused" => PushState::Paused,
            "gone" => PushState::Disabled,
            _ => PushState::Open,
        };
        rig.until(async || rig.push.status().state == state).await;
        rig.push.drain();
        let report = within(rig.broker.close(Duration::from_secs(60))).await;
        assert!(report.complete, "{how}: {report:?}");
        assert_eq!(report.undelivered, 30, "{how}");
        assert_eq!(report.dead_letters, 0, "{how}");
    }
}

#[tokio::test]
async fn what_must_not_be_dialled_is_not() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::with(&endpoint.url(), QUICK, &PushClient::new(Guard::new())).await;
    rig.publish_text("42").await;
    let letter = rig.dead(1).await.remove(0);
    assert!(letter.failure.reason().contains("loopback"), "{}", letter.failure.reason());
    assert!(endpoint.so_far().is_empty());
    // A name is checked by what it resolves to.
    let url = endpoint.url().replace("127.0.0.1", "localhost");
    let rig = Rig::with(&url, QUICK, &PushClient::new(Guard::new())).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.contains("of localhost may not be dialled"), "{reason}");
}

#[tokio::test]
async fn a_test_tells_its_outcome_in_every_state() {
    let mut endpoint = Endpoint::always(status(503)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.push.pause();
    let outcome = within(rig.push.test()).await;
    assert_eq!((outcome.status, outcome.error.as_deref()), (Some(503), Some("the endpoint answered 503")));
    let request = endpoint.next().await;
    assert_eq!((request.header("broker-test"), request.header("ce-id")), ("true", outcome.id.to_string().as_str()));
    endpoint.change(status(200));
    assert_eq!(within(rig.push.test()).await.error, None);
    assert!(rig.push.attempts().is_empty());
    let rig = Rig::new(&nobody().await, "").await;
    let outcome = within(rig.push.test()).await;
    assert_eq!((outcome.status, outcome.error.as_deref()), (None, Some("connection refused")));
}
