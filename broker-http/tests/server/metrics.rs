//! What `/metrics` counts is what happened.

use std::time::Duration;

use axum::http::StatusCode;
use broker_http::ServerOptions;
use serde_json::json;

use crate::support::{Running, soon};

impl Running {
    /// The value of a line of the page; 0 if it is not there.
    async fn metric(&self, line: &str) -> f64 {
        let page = self.get("/metrics").await.text();
        page.lines().find_map(|have| have.strip_prefix(line)?.strip_prefix(' ')?.parse().ok()).unwrap_or_default()
    }

    async fn until(&self, line: &str, value: f64) {
        soon(async {
            while self.metric(line).await != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// An endpoint that answers this, and counts nothing itself.
async fn answering(status: StatusCode) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let app = axum::Router::new().route("/", axum::routing::post(async move || status));
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

/// A broker that hangs: its port takes connections, and nobody answers.
#[tokio::test]
async fn what_is_counted_here_does_not_wait_for_a_broker_that_hangs() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut connectors = broker_core::Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    let url = format!("http://{}?timeout=60s&connect_timeout=60s", silent.local_addr().unwrap());
    let running = Running::over(connectors.open(&url).unwrap(), ServerOptions::new()).await;
    // The second joins the question of the first.
    for _ in 0..2 {
        let begun = std::time::Instant::now();
        let reply = soon(running.get("/metrics")).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(reply.status, 200);
        let page = reply.text();
        assert!(page.contains("broker_connections ") && !page.contains("broker_groups"), "{page}");
    }
}

/// What a slow broker says is told late, and not never.
#[tokio::test]
async fn what_is_counted_by_a_slow_broker_is_told_by_the_next_scrape() {
    let slow = axum::Router::new().route(
        "/subscriptions",
        axum::routing::get(async || {
            tokio::time::sleep(Duration::from_secs(4)).await;
            axum::Json(json!({ "subscriptions": [], "next": null }))
        }),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut connectors = broker_core::Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    let broker = connectors.open(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    tokio::spawn(async move { axum::serve(listener, slow).await });
    let running = Running::over(broker, ServerOptions::new()).await;
    assert!(!running.get("/metrics").await.text().contains("broker_groups"));
    soon(async { while !running.get("/metrics").await.text().contains("broker_groups 0\n") {} }).await;
}

#[tokio::test]
async fn counters_histograms_and_states_say_what_was_done() {
    let running = Running::with(ServerOptions::new().with_development(true)).await;
    let (good, bad, down) = (
        answering(StatusCode::OK).await,
        answering(StatusCode::BAD_REQUEST).await,
        answering(StatusCode::INTERNAL_SERVER_ERROR).await,
    );
    for (name, topic, endpoint) in [("good", "good", good), ("bad", "bad", bad), ("down", "down", down)] {
        let retry = json!({"max_attempts": 100, "initial": "1ms", "max": "1ms"});
        let spec = json!({"filter": topic, "endpoint": endpoint, "retry": retry, "max_in_flight": 1});
        assert_eq!(running.put(name, &spec.to_string()).await.status, 201);
    }
    assert_eq!(running.put("pulled", r#"{"filter":"pulled"}"#).await.status, 201);
    for (topic, count) in [("good", 7), ("bad", 3), ("pulled", 2)] {
        for _ in 0..count {
            assert_eq!(running.post(&format!("/topics/{topic}"), "x").await.status, 202);
        }
    }
    assert_eq!(running.post("/topics/good?ttl=0s", "x").await.status, 400);
    for (line, value) in [
        ("broker_group_acked_total{group=\"good@good\"}", 7.0),
        ("broker_group_dead_lettered_total{group=\"bad@bad\"}", 3.0),
        ("broker_group_dead_letters{group=\"bad@bad\"}", 3.0),
        ("broker_group_lag{group=\"good@good\"}", 0.0),
        ("broker_group_lag{group=\"pulled@pulled\"}", 2.0),
        ("broker_messages_published_total", 12.0),
        ("broker_publish_requests_total{outcome=\"ok\"}", 12.0),
        ("broker_publish_seconds_count", 13.0),
        ("broker_publish_seconds_bucket{le=\"+Inf\"}", 13.0),
        ("broker_push_attempts_total{outcome=\"ok\"}", 7.0),
        ("broker_push_attempts_total{outcome=\"failed\"}", 3.0),
        ("broker_push_seconds_count", 10.0),
        ("broker_delivery_seconds_count", 7.0),
        ("broker_push_states{state=\"active\"}", 3.0),
        ("broker_subscriptions", 4.0),
        ("broker_topics", 3.0),
        ("broker_messages_pulled_total", 0.0),
        ("broker_leases", 0.0),
    ] {
        running.until(line, value).await;
    }
    assert_eq!(running.pull("pulled", "max=10").await.len(), 2);
    running.until("broker_messages_pulled_total", 2.0).await;
    running.until("broker_leases", 2.0).await;

    // Ten failures in a row open the breaker; the message stays.
    assert_eq!(running.post("/topics/down", "x").await.status, 202);
    running.until("broker_push_states{state=\"open\"}", 1.0).await;
    assert_eq!(running.metric("broker_push_state{subscription=\"down\",state=\"open\"}").await, 1.0);
    assert_eq!(running.metric("broker_push_states{state=\"active\"}").await, 2.0);
    assert_eq!(running.metric("broker_group_lag{group=\"down@down\"}").await, 1.0);
    assert!(running.metric("broker_group_retried_total{group=\"down@down\"}").await >= 9.0);
    running.send("POST /subscriptions/down/pause", &[], "").await;
    running.until("broker_push_states{state=\"paused\"}", 1.0).await;
}
