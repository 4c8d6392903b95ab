//! Pushes of a real server, in every mode.

use std::sync::Arc;

use axum::Router;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{BrokerExt, Message, Topic};
use broker_http::ServerOptions;
use broker_http::event::Decoded;
use broker_http::webhook::{Pushed, PushedBatch, Verifier, VerifyLayer};
use http::{Method, StatusCode};
use serde_json::json;
use tokio::sync::mpsc;

use crate::support::{Running, SECRET, serve, soon};

/// Anything a message can be, all at once.
fn message(mode: &str) -> Message {
    Message::new("{\"a\": 1}")
        .with_id(format!("Euro € 😀 {mode}").parse().unwrap())
        .with_key(&b"\xff key"[..])
        .with_content_type("application/json")
        .unwrap()
        .with_header("ce-subject", "50% \"off\"")
        .unwrap()
        .with_header("X-Own", &b"\x00\xfe"[..])
        .unwrap()
}

fn receiver(verifier: Verifier) -> (Router, mpsc::UnboundedReceiver<Decoded>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let batches = sender.clone();
    let app = Router::new()
        .route("/hook", post(async move |Pushed(push): Pushed| sender.send(push).unwrap()))
        .route(
            "/batch",
            post(async move |PushedBatch(pushes): PushedBatch| {
                pushes.into_iter().for_each(|push| batches.send(push).unwrap());
            }),
        )
        .with_state(verifier);
    (app, receiver)
}

#[tokio::test]
async fn every_mode_arrives_as_it_was_published() {
    let (app, mut pushes) = receiver(Verifier::new(SECRET).unwrap());
    let service = serve(app).await;
    let running = Running::start(ServerOptions::new()).await;
    for (mode, path) in [("binary", "hook"), ("structured", "hook"), ("raw", "hook"), ("batch", "batch")] {
        let spec = json!({
            "filter": "orders.>", "endpoint": format!("http://{service}/{path}"), "mode": mode,
            "signing": {"secret": SECRET},
        });
        assert_eq!(running.put(mode, spec).await.0, 201);
        let message = message(mode);
        running.broker.publish(&Topic::new("orders.created").unwrap(), message.clone()).await.unwrap();
        let push = soon(pushes.recv()).await.unwrap();
        assert_eq!(push.message, message, "{mode}");
        assert_eq!((push.topic.unwrap().as_str(), push.attempt, push.test), ("orders.created", Some(1), false));
        assert_eq!(push.subscription.as_deref(), Some(mode));
        assert_eq!(running.send(Method::DELETE, &format!("/subscriptions/{mode}"), json!("")).await.0, 204);
    }
}

/// A payload that looks like one of the forms of a push, or of a publish, is still a payload.
#[tokio::test]
async fn a_payload_that_is_an_event_or_lines_arrives_as_it_was_published() {
    let (app, mut pushes) = receiver(Verifier::new(SECRET).unwrap());
    let service = serve(app).await;
    let running = Running::start(ServerOptions::new()).await;
    let event = r#"{"specversion":"1.0","id":"inner","source":"/x","type":"t"}"#;
    for mode in ["binary", "structured", "raw"] {
        let spec = json!({
            "filter": "orders.>", "endpoint": format!("http://{service}/hook"), "mode": mode,
            "signing": {"secret": SECRET}, "retry": {"max_attempts": 1},
        });
        assert_eq!(running.put(mode, spec).await.0, 201);
        for (content_type, payload) in [
            ("application/cloudevents+json", event),
            ("application/cloudevents-batch+json", "[]"),
            ("application/cloudevents+avro", "avro"),
            ("application/x-ndjson", "{\"payload\":1}\n"),
        ] {
            let message = Message::new(payload).with_content_type(content_type).unwrap();
            running.broker.publish(&Topic::new("orders.created").unwrap(), message.clone()).await.unwrap();
            assert_eq!(soon(pushes.recv()).await.unwrap().message, message, "{mode} {content_type}");
        }
        assert_eq!(running.send(Method::DELETE, &format!("/subscriptions/{mode}"), json!("")).await.0, 204);
    }
}

/// More than a server takes of headers.
#[tokio::test]
async fn a_message_of_many_headers_arrives_in_json() {
    let (app, mut pushes) = receiver(Verifier::new(SECRET).unwrap());
    let service = serve(app).await;
    let running = Running::start(ServerOptions::new()).await;
    for (mode, path) in [("structured", "hook"), ("batch", "batch")] {
        let spec = json!({
            "filter": "orders.>", "endpoint": format!("http://{service}/{path}"), "mode": mode,
            "signing": {"secret": SECRET},
        });
        assert_eq!(running.put(mode, spec).await.0, 201);
        let headers = (0..120).map(|number| (format!("x-{number}"), "v"));
        let message =
            headers.fold(Message::new("1"), |message, (name, value)| message.with_header(name, value).unwrap());
        running.broker.publish(&Topic::new("orders.created").unwrap(), message.clone()).await.unwrap();
        assert_eq!(soon(pushes.recv()).await.unwrap().message, message, "{mode}");
        assert_eq!(running.send(Method::DELETE, &format!("/subscriptions/{mode}"), json!("")).await.0, 204);
    }
}

#[tokio::test]
async fn keys_rotate_without_a_push_lost() {
    let ed25519 = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
    let private = format!("whsk_{}", STANDARD.encode(ed25519.to_bytes()));
    let public = format!("whpk_{}", STANDARD.encode(ed25519.verifying_key().to_bytes()));
    let running = Running::start(ServerOptions::new()).await;
    // The receiver knows the old key alone, both, or the new one alone.
    let old = Verifier::new(SECRET).unwrap();
    let both = old.clone().or(&public).unwrap();
    for (number, verifier) in [old, both, Verifier::new(&public).unwrap()].into_iter().enumerate() {
        let (app, mut pushes) = receiver(verifier);
        let service = serve(app).await;
        let spec = json!({
            "filter": "orders.>", "endpoint": format!("http://{service}/hook"), "retry": {"max_attempts": 1},
            "signing": {"secret": private, "previous": SECRET, "until": "2999-01-01T00:00:00Z"},
        });
        assert_eq!(running.put(&format!("s{number}"), spec).await.0, 201);
        running.broker.publish(&Topic::new("orders.created").unwrap(), Message::new("42")).await.unwrap();
        assert_eq!(soon(pushes.recv()).await.unwrap().message.payload(), "42");
        assert_eq!(running.send(Method::DELETE, &format!("/subscriptions/s{number}"), json!("")).await.0, 204);
    }
}

#[tokio::test]
async fn a_test_push_says_so() {
    let (app, mut pushes) = receiver(Verifier::unsigned());
    let service = serve(app).await;
    let running = Running::start(ServerOptions::new()).await;
    for mode in ["binary", "structured", "raw"] {
        let spec = json!({"filter": "orders.>", "endpoint": format!("http://{service}/hook"), "mode": mode});
        assert_eq!(running.put(mode, spec).await.0, 201);
        let (status, view) = running.send(Method::POST, &format!("/subscriptions/{mode}/test"), json!("")).await;
        assert_eq!((status, &view["test"]["status"]), (200, &json!(200)), "{view}");
        assert!(soon(pushes.recv()).await.unwrap().test);
    }
}

/// The extractor takes no push twice, and what comes again is another: it is signed in another second.
#[tokio::test]
async fn a_failed_push_comes_again_to_the_extractor_and_is_taken() {
    for mode in ["binary", "raw", "structured"] {
        let (sender, mut attempts) = mpsc::unbounded_channel();
        let hook = post(async move |Pushed(push): Pushed| {
            let attempt = push.attempt.unwrap();
            sender.send(attempt).unwrap();
            if attempt < 2 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
        });
        let service = serve(Router::new().route("/hook", hook).with_state(Verifier::new(SECRET).unwrap())).await;
        let running = Running::start(ServerOptions::new()).await;
        let spec = json!({
            "filter": "orders.>", "endpoint": format!("http://{service}/hook"), "signing": {"secret": SECRET},
            "mode": mode, "retry": {"initial": "1ms", "max": "2ms", "max_attempts": 2},
        });
        assert_eq!(running.put("billing", spec).await.0, 201);
        running.broker.publish(&Topic::new("orders.created").unwrap(), Message::new("42")).await.unwrap();
        for attempt in 1..=2 {
            assert_eq!(soon(attempts.recv()).await, Some(attempt), "{mode}");
        }
        assert!(running.server.drain(std::time::Duration::from_secs(10)).await.complete);
    }
}

#[tokio::test]
async fn behind_the_layer_a_failed_push_comes_again() {
    let (sender, mut attempts) = mpsc::unbounded_channel();
    let sender = Arc::new(sender);
    let app = Router::new()
        .route(
            "/hook",
            post(async move |Pushed(push): Pushed| {
                let attempt = push.attempt.unwrap();
                sender.send(attempt).unwrap();
                if attempt < 4 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
            }),
        )
        .layer(VerifyLayer::new(Verifier::new(SECRET).unwrap()));
    let service = serve(app).await;
    let running = Running::start(ServerOptions::new()).await;
    let spec = json!({
        "filter": "orders.>", "endpoint": format!("http://{service}/hook"), "signing": {"secret": SECRET},
        "retry": {"initial": "1ms", "max": "2ms"},
    });
    assert_eq!(running.put("billing", spec).await.0, 201);
    running.broker.publish(&Topic::new("orders.created").unwrap(), Message::new("42")).await.unwrap();
    for attempt in 1..=4 {
        assert_eq!(soon(attempts.recv()).await, Some(attempt));
    }
    assert!(running.server.drain(std::time::Duration::from_secs(10)).await.complete);
    assert!(attempts.try_recv().is_err());
}
