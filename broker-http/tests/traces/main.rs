//! One trace from publish to push: the real daemon, a publisher, an endpoint and a collector, over
//! real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod collector;
#[path = "../daemon/support.rs"]
mod support;

use collector::{Collector, Span};
use serde_json::json;
use support::{Daemon, endpoint, header, run, soon};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PUBLISHER: &str = "b7ad6b7169203331";
const SOON: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "50");

async fn daemon(collector: &Collector, args: &[&str], variables: &[(&str, &str)]) -> Daemon {
    let url = collector.url();
    Daemon::start_with(&[&["--otlp-endpoint", &url], args].concat(), &[&[SOON], variables].concat()).await
}

fn of_kind(spans: &[Span], kind: &str) -> Span {
    spans.iter().find(|span| span.kind == kind).unwrap_or_else(|| panic!("no {kind} span: {spans:#?}")).clone()
}

#[tokio::test]
async fn one_trace_from_publish_to_push() {
    let mut collector = Collector::start().await;
    let (hook, mut told) = endpoint(&[500]).await;
    let secret = [("OTEL_EXPORTER_OTLP_HEADERS", "x-key=s3cret"), ("OTEL_SERVICE_NAME", "orders-broker")];
    let daemon = daemon(&collector, &[], &secret).await;
    let spec = json!({
        "filter": "orders.>", "endpoint": format!("http://{hook}/hook/s3cret?token=s3cret"),
        "headers": {"authorization": "s3cret"}, "retry": {"max_attempts": 3, "initial": "1ms", "max": "1ms"},
    });
    assert_eq!(daemon.send("PUT /subscriptions/billing", &spec.to_string()).await.0, 201);
    let head = format!(
        "POST /topics/orders.created?id=1&key=s3cret HTTP/1.1\r\ntraceparent: 00-{TRACE}-{PUBLISHER}-01\r\ntracestate: acme=1"
    );
    assert_eq!(daemon.raw(&head, "s3cret").await.0, 202);
    let pushes = [soon(told.recv()).await.unwrap(), soon(told.recv()).await.unwrap()];

    // The publish, and for each of two attempts the message and the request.
    let spans = collector.spans(5).await;
    assert!(spans.iter().all(|span| span.trace == TRACE && span.service == "orders-broker"), "{spans:#?}");
    let publish = of_kind(&spans, "producer");
    assert_eq!((publish.name.as_str(), publish.parent.as_str()), ("publish orders.created", PUBLISHER));
    assert_eq!(
        ["system", "operation.type", "destination.name", "message.id", "message.body.size"]
            .map(|name| publish.is(&format!("messaging.{name}")).unwrap()),
        ["broker-http", "send", "orders.created", "1", "6"]
    );
    let processes: Vec<_> = spans.iter().filter(|span| span.kind == "consumer").collect();
    assert_eq!(processes.len(), 2);
    for (process, (attempt, settlement)) in processes.iter().zip([("1", "retry"), ("2", "ack")]) {
        assert_eq!((process.name.as_str(), &process.parent), ("push orders.created", &publish.id));
        assert_eq!((process.is("broker.attempt"), process.is("broker.settlement")), (Some(attempt), Some(settlement)));
        assert_eq!(process.is("messaging.consumer.group.name"), Some("billing"));
        assert_eq!(process.failed, settlement == "retry");
    }
    for ((process, push), status) in processes.iter().zip(&pushes).zip(["500", "200"]) {
        let request = spans.iter().find(|span| span.parent == process.id).unwrap();
        assert_eq!((request.kind, request.name.as_str()), ("client", "POST"));
        assert_eq!(request.is("http.response.status_code"), Some(status));
        assert_eq!(request.is("server.port"), Some(hook.port().to_string().as_str()));
        // The endpoint goes on below the request that it got.
        assert_eq!(header(push, "traceparent"), Some(request.traceparent().as_str()));
        assert_eq!(header(push, "tracestate"), Some("acme=1"));
    }
    assert!(!format!("{spans:?}").contains("s3cret"), "{spans:#?}");
    assert!(collector.head.starts_with("POST /v1/traces HTTP/1.1"), "{}", collector.head);
    assert_eq!(header(&collector.head, "x-key"), Some("s3cret"));
}

#[tokio::test]
async fn many_at_once_keep_their_own_traces_or_begin_one() {
    let mut collector = Collector::start().await;
    let (hook, mut told) = endpoint(&[]).await;
    let daemon = daemon(&collector, &[], &[]).await;
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/"), "mode": "batch", "batch": {"max": 2, "wait": "1m"}});
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec.to_string()).await.0, 201);
    let own = format!("00-{TRACE}-{PUBLISHER}-01");
    let lines = format!("{{\"payload\":1}}\n{}", json!({"payload": 2, "headers": {"traceparent": own}}));
    let head = "POST /topics/a HTTP/1.1\r\ncontent-type: application/x-ndjson";
    assert_eq!(daemon.raw(head, &lines).await.0, 202);
    let request = soon(told.recv()).await.unwrap();

    let spans = collector.spans(3).await;
    let publish = of_kind(&spans, "producer");
    assert_eq!((publish.is("messaging.batch.message_count"), publish.parent.as_str()), (Some("2"), ""));
    let theirs = (TRACE.to_owned(), PUBLISHER.to_owned());
    assert_eq!(publish.links, std::slice::from_ref(&theirs));
    // A request has one context, and two messages in it: they are links.
    let process = of_kind(&spans, "consumer");
    assert_eq!(process.links, [(publish.trace.clone(), publish.id.clone()), theirs]);
    let post = of_kind(&spans, "client");
    assert_eq!((&post.parent, &post.trace), (&process.id, &process.trace));
    assert_eq!(header(&request, "traceparent"), Some(post.traceparent().as_str()));
    assert!(request.contains(&own), "the message's own is in the event: {request}");
}

#[tokio::test]
async fn the_publisher_decides_what_is_kept_and_else_the_share() {
    let mut collector = Collector::start().await;
    let (hook, mut told) = endpoint(&[]).await;
    let daemon = daemon(&collector, &["--otlp-sample", "0"], &[]).await;
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/")}).to_string();
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec).await.0, 201);
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202);
    // What is not kept has a context all the same, which says so to those who come after.
    let parent = header(&soon(told.recv()).await.unwrap(), "traceparent").unwrap().to_owned();
    assert!(parent.ends_with("-00"), "{parent}");
    let head = format!("POST /topics/a HTTP/1.1\r\ntraceparent: 00-{TRACE}-{PUBLISHER}-01");
    assert_eq!(daemon.raw(&head, "x").await.0, 202);
    soon(told.recv()).await.unwrap();
    let spans = collector.spans(3).await;
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");
    assert_eq!(collector.more(), 0);
}

/// Bytes that a daemon holds of the messages that these requests have published, of which nobody takes any.
async fn held(daemon: &Daemon, requests: &[(&str, &str)]) -> Vec<u64> {
    let spec = json!({"filter": "a", "endpoint": "http://127.0.0.1:9/", "retry": {"initial": "1h", "max": "1h"}});
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec.to_string()).await.0, 201);
    let mut before = memory(daemon).await;
    let mut held = Vec::new();
    for (head, body) in requests {
        assert_eq!(daemon.raw(head, body).await.0, 202);
        let now = memory(daemon).await;
        held.push(now - before);
        before = now;
    }
    held
}

async fn memory(daemon: &Daemon) -> u64 {
    let metrics = daemon.send("GET /metrics", "").await.1;
    let value = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes "));
    value.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap()
}

#[tokio::test]
async fn what_a_trace_adds_to_a_message_is_accounted_one_by_one_and_many_at_once() {
    let collector = Collector::start().await;
    let lines = "{\"payload\":1}\n".repeat(100);
    let requests = [
        ("POST /topics/a HTTP/1.1\r\ncontent-type: application/json", "1"),
        ("POST /topics/a HTTP/1.1\r\ncontent-type: application/x-ndjson", lines.as_str()),
    ];
    let traced = held(&daemon(&collector, &[], &[]).await, &requests).await;
    let plain = held(&Daemon::start_with(&[], &[]).await, &requests).await;
    // Its bytes, and what every header takes besides.
    let header = 96 + "traceparent".len() as u64 + format!("00-{TRACE}-{PUBLISHER}-01").len() as u64;
    let added: Vec<_> = traced.iter().zip(&plain).map(|(traced, plain)| traced - plain).collect();
    assert_eq!(added, [header, 100 * header], "{traced:?} {plain:?}");
}

#[tokio::test]
async fn the_last_spans_are_sent_before_the_end() {
    let mut collector = Collector::start().await;
    let (url, hour) = (collector.url(), ("OTEL_BSP_SCHEDULE_DELAY", "3600000"));
    let daemon = Daemon::start_with(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), hour]).await;
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202);
    daemon.signal("-TERM");
    let (code, said) = daemon.finish().await;
    assert_eq!(code, Some(0), "{said}");
    let spans = collector.spans(1).await;
    assert_eq!((spans[0].name.as_str(), spans[0].service.as_str()), ("publish a", "broker-http"));
}

/// Nobody listens there: whoever publishes does not notice, and the end comes in time.
#[tokio::test]
async fn a_collector_that_is_away_costs_nothing_but_traces() {
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (url, queue) = (format!("http://{gone}"), ("OTEL_BSP_MAX_QUEUE_SIZE", "4"));
    let daemon = Daemon::start_with(&["--otlp-endpoint", &url, "--drain", "1s"], &[SOON, queue]).await;
    let lines = "{\"payload\":1}\n".repeat(100);
    for _ in 0..50 {
        let head = "POST /topics/a HTTP/1.1\r\ncontent-type: application/x-ndjson";
        assert_eq!(daemon.raw(head, &lines).await.0, 202);
    }
    daemon.signal("-TERM");
    let (code, said) = daemon.finish().await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn what_cannot_be_a_collector_is_named() {
    for (args, named) in [
        (&["--otlp-endpoint", "grpc://127.0.0.1:4317"][..], "otlp: "),
        (&["--otlp-endpoint", "http://hunter2@:1"], "otlp: "),
        (&["--otlp-sample", "2"], "otlp.sample"),
    ] {
        let (code, said) = run(&[&["check-config"], args].concat()).await;
        assert_eq!(code, Some(1), "{args:?}: {said}");
        assert!(said.contains(named) && !said.contains("hunter2"), "{args:?}: {said}");
    }
}
