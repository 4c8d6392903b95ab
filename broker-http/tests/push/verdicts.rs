//! The verdict table, row by row, end to end.

use std::time::Duration;

use broker_core::Message;
use broker_http::push::PushState;

use crate::support::{Endpoint, QUICK, Reaction, Rig, answer, nobody, status};

/// Pushes one message to an endpoint that reacts so the first time and acks from then on.
async fn pushed_again(reaction: Reaction, fields: &str) -> Vec<u32> {
    let mut endpoint = Endpoint::script([reaction, status(204)]).await;
    let fields = format!(r#"{QUICK},"timeout":"500ms"{fields}"#);
    let rig = Rig::new(&endpoint.url(), &fields).await;
    rig.publish_text("42").await;
    rig.drained().await;
    endpoint.so_far().iter().map(|request| request.attempt()).collect()
}

/// Pushes one message to an endpoint that always reacts so; the dead letter's attempts, status and
/// reason.
async fn dead(reaction: Reaction) -> (u32, Option<String>, String) {
    let endpoint = Endpoint::always(reaction).await;
    dead_at(&endpoint.url()).await
}

async fn dead_at(url: &str) -> (u32, Option<String>, String) {
    let rig = Rig::new(url, &format!(r#"{QUICK},"timeout":"200ms""#)).await;
    rig.publish([Message::new("42").with_id("order-42".parse().unwrap())]).await;
    let letter = rig.dead(1).await.remove(0);
    assert_eq!((letter.message.id().to_string().as_str(), letter.topic.as_str()), ("order-42", "orders.created"));
    assert_eq!(letter.group, Some(rig.group.clone()));
    assert!(letter.first <= letter.last);
    // The broker says before it why it gave up.
    let reason = letter.failure.reason().trim_start_matches("max_attempts (3): ").to_owned();
    (letter.attempts, letter.failure.status().map(str::to_owned), reason)
}

#[tokio::test]
async fn a_2xx_acks() {
    for code in [200, 201, 202, 204, 299] {
        assert_eq!(pushed_again(status(code), "").await, [1], "{code}");
    }
    assert_eq!(pushed_again(answer(r#"{"status":"SUCCESS"}"#), "").await, [1]);
}

#[tokio::test]
async fn a_push_says_what_it_is() {
    let mut endpoint = Endpoint::always(status(200)).await;
    let rig = Rig::new(&endpoint.url(), r#""headers":{"x-api-key":"secret"}"#).await;
    let message = Message::new("42").with_id("order-42".parse().unwrap()).with_key("c 7");
    rig.publish([message.with_content_type("text/plain").unwrap().with_header("Größe", "ü").unwrap()]).await;
    let request = endpoint.next().await;
    assert_eq!(request.line, "POST /hook?a=b HTTP/1.1");
    assert!(endpoint.url().contains(request.header("host")));
    assert_eq!(request.text(), "42");
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-id", "order-42"),
        ("ce-source", "/topics/orders.created"),
        ("ce-type", "orders.created"),
        ("content-type", "text/plain"),
        ("broker-topic", "orders.created"),
        ("broker-subscription", "billing"),
        ("broker-attempt", "1"),
        ("broker-key", "c%207"),
        ("x-api-key", "secret"),
        ("content-length", "2"),
    ] {
        assert_eq!(request.header(name), value, "{name}");
    }
    assert!(request.header("user-agent").starts_with("broker-http/"));
    rig.drained().await;
    let attempts = rig.push.attempts();
    assert_eq!(
        (attempts[0].id.to_string().as_str(), attempts[0].status, &attempts[0].error),
        ("order-42", Some(200), &None)
    );
    assert!(rig.push.status().last_success.is_some());
}

#[tokio::test]
async fn a_body_of_a_200_may_ask_for_more() {
    assert_eq!(pushed_again(answer(r#"{"status":"RETRY"}"#), "").await, [1, 2]);
    let (attempts, status, reason) = dead(answer(r#"{"status":"DROP"}"#)).await;
    assert_eq!((attempts, status.as_deref()), (1, Some("200")));
    assert!(reason.contains("DROP"), "{reason}");
}

#[tokio::test]
async fn what_is_retried() {
    for code in [300, 304, 307, 401, 403, 404, 402, 405, 408, 409, 425, 429, 499, 500, 502, 503, 504, 599] {
        assert_eq!(pushed_again(status(code), "").await, [1, 2], "{code}");
    }
    for reaction in [
        Reaction::Write(""),
        Reaction::Write("HTTP/1.1 200 OK\r\ncontent-len"),
        Reaction::Write("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345"),
        Reaction::Write("SSH-2.0-OpenSSH_9.7\r\n"),
        Reaction::Hang(""),
        Reaction::Hang("HTTP/1.1 200 OK\r\n"),
        Reaction::Hang("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345"),
    ] {
        assert_eq!(pushed_again(reaction, "").await, [1, 2]);
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let mut elsewhere = Endpoint::always(status(200)).await;
    let location: &'static str = format!("location: {}\r\n", elsewhere.url()).leak();
    let redirect = Reaction::Answer(308, location, String::new());
    let (attempts, status, reason) = dead(redirect).await;
    assert_eq!((attempts, status.as_deref()), (3, Some("308")));
    assert!(reason.contains("not followed"), "{reason}");
    assert!(elsewhere.so_far().is_empty());
}

#[tokio::test]
async fn what_is_dead_at_once() {
    for code in [400, 413, 415, 422] {
        let expected = (1, Some(code.to_string()), format!("the endpoint answered {code}"));
        assert_eq!(dead(status(code)).await, expected);
    }
}

#[tokio::test]
async fn a_subscription_may_see_an_answer_otherwise() {
    assert_eq!(pushed_again(status(422), r#","verdicts":{"422":"retry"}"#).await, [1, 2]);
    assert_eq!(pushed_again(status(404), r#","verdicts":{"404":"ack"}"#).await, [1]);
}

#[tokio::test]
async fn what_goes_on_failing_is_dead_with_its_reason() {
    let reason = |text: &str| text.to_owned();
    assert_eq!(dead(status(500)).await, (3, Some("500".into()), reason("the endpoint answered 500")));
    assert_eq!(dead(Reaction::Hang("")).await, (3, None, reason("timed out after 200ms")));
    assert_eq!(dead(Reaction::Write("")).await, (3, None, reason("connection closed without an answer")));
    let cut = Reaction::Write("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345");
    assert_eq!(dead(cut).await, (3, None, reason("connection closed in mid-answer")));
    assert_eq!(dead_at(&nobody().await).await, (3, None, reason("connection refused")));
    let (attempts, status, text) = dead(Reaction::Write("SSH-2.0-OpenSSH_9.7\r\n")).await;
    assert_eq!((attempts, status), (3, None));
    assert!(text.contains("not HTTP"), "{text}");
}

#[tokio::test]
async fn unauthorized_and_missing_wait_at_the_slow_end() {
    for code in [401, 403, 404] {
        let mut endpoint = Endpoint::script([status(code), status(200)]).await;
        let retry = r#""retry":{"initial":"1ms","max":"600ms","multiplier":1e9}"#;
        let rig = Rig::new(&endpoint.url(), retry).await;
        rig.publish_text("42").await;
        let (first, second) = (endpoint.next().await, endpoint.next().await);
        assert!(second.at - first.at >= Duration::from_millis(290), "{code}: {:?}", second.at - first.at);
    }
}

#[tokio::test]
async fn retry_after_is_a_floor() {
    let asked_twice = async |reaction| {
        let mut endpoint = Endpoint::script([reaction, status(200)]).await;
        let rig = Rig::new(&endpoint.url(), QUICK).await;
        rig.publish_text("42").await;
        (endpoint.next().await.at, endpoint.next().await.at)
    };
    let (first, second) = asked_twice(Reaction::Answer(503, "retry-after: 1\r\n", String::new())).await;
    assert!(second - first >= Duration::from_millis(990), "{:?}", second - first);
    let date = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3));
    let header: &'static str = format!("retry-after: {date}\r\n").leak();
    asked_twice(Reaction::Answer(429, header, String::new())).await;
    assert!(std::time::SystemTime::now() >= httpdate::parse_http_date(&date).unwrap(), "{date} is not over");
}

#[tokio::test]
async fn a_410_disables_and_keeps() {
    let mut endpoint = Endpoint::always(status(410)).await;
    // One attempt only: even so the message is kept.
    let rig = Rig::new(&endpoint.url(), r#""retry":{"max_attempts":1}"#).await;
    rig.publish_text("1").await;
    assert_eq!(endpoint.next().await.text(), "1");
    rig.until(async || rig.push.status().state == PushState::Disabled).await;
    assert!(rig.push.is_disabled());
    assert!(rig.push.status().last_error.unwrap().contains("410"));
    rig.publish_text("2").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(endpoint.so_far().is_empty(), "nothing is pushed while it is disabled");
    assert_eq!(rig.lag().await, 2);
    endpoint.change(status(200));
    rig.push.resume();
    rig.drained().await;
    let mut texts: Vec<_> = endpoint.so_far().iter().map(|request| request.text().to_owned()).collect();
    texts.sort();
    assert_eq!(texts, ["1", "2"]);
    assert_eq!(rig.push.status().state, PushState::Active);
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
}
