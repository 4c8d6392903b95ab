//! Connections: kept, closed under us, cut, slow.

use std::time::Duration;

use broker_core::Message;
use broker_http::push::{Guard, PushClient};

use crate::support::{Endpoint, QUICK, Reaction, Rig, client, status};

#[tokio::test]
async fn a_connection_is_kept() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    for number in 1..=5 {
        rig.publish_text("42").await;
        let request = endpoint.next().await;
        assert_eq!((request.connection, request.on_connection), (1, number));
        rig.drained().await;
    }
}

#[tokio::test]
async fn a_kept_connection_that_closes_without_an_answer_is_free() {
    // The endpoint answers once per connection and closes when the second request is there: the
    // keep-alive race, every time.
    let mut endpoint =
        Endpoint::new(|request| if request.on_connection > 1 { Reaction::Write("") } else { status(200) }).await;
    // One attempt: a race that counted would dead-letter.
    let rig = Rig::new(&endpoint.url(), r#""retry":{"max_attempts":1},"max_in_flight":1"#).await;
    rig.publish((0..20).map(|number: u32| Message::new(number.to_string()))).await;
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    let requests = endpoint.so_far();
    assert!(requests.iter().all(|request| request.attempt() == 1));
    assert_eq!(requests.iter().filter(|request| request.on_connection == 1).count(), 20);
    assert_eq!(rig.push.attempts().len(), 20, "what is free is not logged either");
}

#[tokio::test]
async fn a_new_connection_that_closes_is_not() {
    let mut endpoint = Endpoint::script([Reaction::Write(""), status(200)]).await;
    let rig = Rig::new(&endpoint.url(), QUICK).await;
    rig.publish_text("42").await;
    rig.drained().await;
    let attempts: Vec<_> = endpoint.so_far().iter().map(|request| request.attempt()).collect();
    assert_eq!(attempts, [1, 2]);
}

#[tokio::test]
async fn a_connection_the_endpoint_closes_is_replaced() {
    let closing = Reaction::Write("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let mut endpoint = Endpoint::always(closing).await;
    let rig = Rig::new(&endpoint.url(), r#""retry":{"max_attempts":1}"#).await;
    for number in 1..=5 {
        rig.publish_text("42").await;
        assert_eq!(endpoint.next().await.connection, number);
        rig.drained().await;
    }
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::with(&endpoint.url(), "", &client().with_idle_timeout(Duration::from_millis(20))).await;
    rig.publish_text("42").await;
    assert_eq!(endpoint.next().await.connection, 1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    rig.publish_text("42").await;
    assert_eq!(endpoint.next().await.connection, 2);
}

#[tokio::test]
async fn connections_are_bounded_over_all_pushes() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let client = PushClient::new(Guard::new().with_development(true)).with_max_connections(2);
    let one = Rig::with(&endpoint.url(), "", &client).await;
    let two = Rig::with(&endpoint.url(), "", &client).await;
    for rig in [&one, &two] {
        rig.publish((0..100).map(|number: u32| Message::new(number.to_string()))).await;
    }
    one.drained().await;
    two.drained().await;
    assert_eq!(endpoint.so_far().len(), 200);
}

#[tokio::test]
async fn an_answer_is_read_to_its_end_or_to_a_bound() {
    // Chunked, interim answers, no body at all, HTTP/1.0: all are answers.
    for reply in [
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\nto the end",
    ] {
        let mut endpoint = Endpoint::always(Reaction::Write(reply)).await;
        let rig = Rig::new(&endpoint.url(), r#""retry":{"max_attempts":1}"#).await;
        rig.publish_text("42").await;
        rig.drained().await;
        assert_eq!(endpoint.so_far().len(), 1, "{reply}");
        assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty(), "{reply}");
    }
    // More than we read: the status counts, and the rest is not waited for.
    let huge = Reaction::Answer(200, "", "x".repeat(10 << 20));
    let mut endpoint = Endpoint::always(huge).await;
    let rig = Rig::new(&endpoint.url(), "").await;
    rig.publish((0..5).map(|number: u32| Message::new(number.to_string()))).await;
    rig.drained().await;
    assert_eq!(endpoint.so_far().len(), 5);
    // An endless head is none.
    let head: &'static str = format!("HTTP/1.1 200 OK\r\nx: {}", "x".repeat(1 << 20)).leak();
    let endpoint = Endpoint::always(Reaction::Hang(head)).await;
    let rig = Rig::new(&endpoint.url(), QUICK).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.contains("head"), "{reason}");
    // Nor are interim answers without end.
    let interim: &'static str = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(50_000).leak();
    let endpoint = Endpoint::always(Reaction::Hang(interim)).await;
    let rig = Rig::new(&endpoint.url(), &format!(r#"{QUICK},"timeout":"5s""#)).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.ends_with("the endpoint sends 1xx without end, and no answer"), "{reason}");
}

#[tokio::test]
async fn a_slow_body_is_under_the_timeout_too() {
    let slow = Reaction::Hang("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome");
    let endpoint = Endpoint::always(slow).await;
    let rig = Rig::new(&endpoint.url(), &format!(r#"{QUICK},"timeout":"100ms""#)).await;
    rig.publish_text("42").await;
    let letter = rig.dead(1).await.remove(0);
    assert!(letter.failure.reason().ends_with("timed out after 100ms"), "{letter:?}");
    assert_eq!(letter.attempts, 3);
}

#[tokio::test]
async fn a_dead_and_a_hanging_endpoint_do_not_hold_up_another() {
    let broken = Rig::new(&crate::support::nobody().await, "").await;
    let hanging = Endpoint::always(Reaction::Hang("")).await;
    let hanging = Rig::new(&hanging.url(), "").await;
    let mut good = Endpoint::always(status(200)).await;
    let rig = Rig::new(&good.url(), "").await;
    for rig in [&broken, &hanging, &rig] {
        rig.publish((0..100).map(|number: u32| Message::new(number.to_string()))).await;
    }
    rig.drained().await;
    assert_eq!(good.so_far().len(), 100);
}
