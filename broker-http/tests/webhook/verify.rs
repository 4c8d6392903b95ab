//! What is let through and what is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::post;
use broker_core::{ErrorKind, Timestamp};
use broker_http::webhook::{Pushed, Verifier, VerifyLayer};
use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::sync::Notify;

use crate::support::{SECRET, send, serve, signature, signed, with, without};

fn verifier() -> Verifier {
    Verifier::new(SECRET).unwrap()
}

const OTHER: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

/// A service on each: the extractor alone, and the layer before a handler that looks at nothing.
async fn services(verifier: impl Fn() -> Verifier) -> [std::net::SocketAddr; 2] {
    let extractor = Router::new()
        .route("/hook", post(async |Pushed(push): Pushed| push.message.id().to_string()))
        .with_state(verifier());
    let layer = Router::new().route("/hook", post(async |body: Bytes| body)).layer(VerifyLayer::new(verifier()));
    [serve(extractor).await, serve(layer).await]
}

#[tokio::test]
async fn what_is_not_verified_is_401_and_says_why() {
    for service in services(verifier).await {
        let cases = [
            (signed(OTHER, "1", 0, "42"), "webhook-signature"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-id", "2"), "webhook-signature"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-timestamp", "1"), "too old"),
            (signed(SECRET, "1", 302, "42"), "too old"),
            // However long it is on its way here.
            (signed(SECRET, "1", -360, "42"), "future"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-timestamp", "99999999999999999999"), "webhook-timestamp"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-timestamp", "-1"), "webhook-timestamp"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-signature", "v1,"), "webhook-signature"),
            (with(signed(SECRET, "1", 0, "42"), "webhook-signature", "v2,aGk= v1a,aGk= , v1"), "webhook-signature"),
            (without(signed(SECRET, "1", 0, "42"), "webhook-id"), "webhook-id: it is missing"),
            (without(signed(SECRET, "1", 0, "42"), "webhook-timestamp"), "webhook-timestamp: it is missing"),
            (without(signed(SECRET, "1", 0, "42"), "webhook-signature"), "webhook-signature: it is missing"),
            (signed(SECRET, "1", 0, "42").map(|_| Bytes::from("43")), "webhook-signature"),
        ];
        for (request, named) in cases {
            let answer = send(service, request).await;
            let text = String::from_utf8_lossy(answer.body()).into_owned();
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{named}: {text}");
            assert_eq!(answer.headers()["content-type"], "application/problem+json");
            assert!(text.contains(named) && !text.contains("MfKQ"), "{text}");
        }
        // Nothing of that counts as seen.
        assert_eq!(send(service, signed(SECRET, "1", 0, "42")).await.status(), StatusCode::OK);
        assert_eq!(send(service, signed(SECRET, "2", 240, "42")).await.status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn one_good_signature_of_several_is_enough_within_a_bound() {
    let [service, _] = services(verifier).await;
    let among = |others: usize| {
        let request = signed(SECRET, &format!("{others}"), 0, "42");
        let good = request.headers()["webhook-signature"].to_str().unwrap().to_owned();
        let bad = format!("{} ", signature(OTHER, "1", 0, "42")).repeat(others);
        with(request, "webhook-signature", &format!("{bad}{good}"))
    };
    assert_eq!(send(service, among(9)).await.status(), StatusCode::OK);
    assert_eq!(send(service, among(10)).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn the_message_is_the_one_that_was_signed() {
    let [service, _] = services(verifier).await;
    let forged = with(signed(SECRET, "1", 0, "42"), "broker-id", "2");
    assert_eq!(send(service, forged).await.status(), StatusCode::UNAUTHORIZED);
    let encoded = with(signed(SECRET, "a%20b", 0, "42"), "broker-id", "a%20b");
    assert_eq!(send(service, encoded).await.body(), "a b");
}

#[tokio::test]
async fn the_extractor_takes_no_push_twice() {
    let [service, _] = services(verifier).await;
    let push = signed(SECRET, "1", 10, "42");
    assert_eq!(send(service, push.clone()).await.status(), StatusCode::OK);
    let again = send(service, push.clone()).await;
    assert_eq!(again.status(), StatusCode::CONFLICT);
    assert_eq!(again.headers()["retry-after"], "2");
    // Another signature of the same is the same.
    let stripped = push;
    let more = format!("v1,aGk= {}", stripped.headers()["webhook-signature"].to_str().unwrap());
    assert_eq!(send(service, with(stripped, "webhook-signature", &more)).await.status(), StatusCode::CONFLICT);
    // The same message, pushed at another time.
    assert_eq!(send(service, signed(SECRET, "1", 9, "42")).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_layer_knows_what_became_of_a_push() {
    let (calls, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let app = Router::new()
        .route(
            "/hook",
            post({
                let (calls, gate) = (Arc::clone(&calls), Arc::clone(&gate));
                async move |body: Bytes| {
                    calls.fetch_add(1, Ordering::AcqRel);
                    match &*body {
                        b"fail" => StatusCode::INTERNAL_SERVER_ERROR,
                        b"wait" => {
                            gate.notified().await;
                            StatusCode::OK
                        }
                        _ => StatusCode::OK,
                    }
                }
            }),
        )
        .layer(VerifyLayer::new(verifier()));
    let service = serve(app).await;
    // Each is signed once: a second later it would be another.
    let done = signed(SECRET, "1", 10, "42");
    assert_eq!(send(service, done.clone()).await.status(), StatusCode::OK);
    assert_eq!(send(service, done.clone()).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(calls.load(Ordering::Acquire), 1);
    let failing = signed(SECRET, "2", 10, "fail");
    for _ in 0..2 {
        assert_eq!(send(service, failing.clone()).await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
    assert_eq!(calls.load(Ordering::Acquire), 3);

    let waiting = signed(SECRET, "3", 10, "wait");
    let first = tokio::spawn(send(service, waiting.clone()));
    while calls.load(Ordering::Acquire) < 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(send(service, waiting.clone()).await.status(), StatusCode::CONFLICT);
    gate.notify_one();
    assert_eq!(first.await.unwrap().status(), StatusCode::OK);
    assert_eq!(send(service, waiting.clone()).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(calls.load(Ordering::Acquire), 4);
}

#[tokio::test]
async fn what_is_malformed_is_400_and_what_is_too_large_413() {
    let [service, layer] = services(|| verifier().with_max_body_bytes(100)).await;
    let one_of = |id, body| without(signed(SECRET, id, 0, body), "broker-id");
    let events = with(one_of("1", "[]"), "content-type", "application/cloudevents-batch+json");
    assert_eq!(send(service, events).await.status(), StatusCode::BAD_REQUEST);
    let event = with(one_of("2", "{}"), "content-type", "application/cloudevents+json");
    assert_eq!(send(service, event).await.status(), StatusCode::BAD_REQUEST);
    for service in [service, layer] {
        let large = signed(SECRET, "3", 0, &"x".repeat(101));
        assert_eq!(send(service, large).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
}

#[tokio::test]
async fn without_a_key_nothing_passes_unless_it_is_said() {
    let app: Router = Router::new().route("/hook", post(async |_: Pushed| ()));
    let service = serve(app).await;
    assert_eq!(send(service, signed(SECRET, "1", 0, "42")).await.status(), StatusCode::BAD_GATEWAY);
    let [service, layer] = services(Verifier::unsigned).await;
    for service in [service, layer, service] {
        let plain = Request::post("/hook").body(Bytes::from("42")).unwrap();
        assert_eq!(send(service, plain).await.status(), StatusCode::OK);
    }
}

/// The vector that the libraries of Standard Webhooks test themselves with.
#[test]
fn the_published_vector() {
    let mut headers = http::HeaderMap::new();
    for (name, value) in [
        ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek"),
        ("webhook-timestamp", "1614265330"),
        ("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
    ] {
        headers.insert(name, value.parse().unwrap());
    }
    let body = br#"{"test": 2432232314}"#;
    let verify = |second: i64| verifier().verify_at(&headers, body, Timestamp::from_millis(second * 1000));
    for second in [1_614_265_330, 1_614_265_630, 1_614_265_030] {
        verify(second).unwrap();
    }
    for second in [1_614_265_632, 1_614_265_028] {
        assert_eq!(verify(second).unwrap_err().kind(), ErrorKind::Unauthorized);
    }
    verifier().verify(&headers, body).unwrap_err();
}

#[test]
fn keys_that_are_none_are_refused_and_not_repeated() {
    for bad in
        ["", "hunter2", "whsec_", "whsec_aHVudGVyMg==", "whpk_aHVudGVyMg==", "whsk_aHVudGVyMg==", "whsec_hunter2!"]
    {
        let error = Verifier::new(bad).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(bad.len() < 7 || !error.to_string().contains(bad), "{error}");
    }
    assert!(!format!("{:?}", Verifier::new(SECRET).unwrap()).contains("MfKQ"));
}
