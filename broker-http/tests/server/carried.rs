//! What a publisher says of a message reaches its receiver, in whichever form it is said.

use serde_json::{Value, json};

use crate::support::{Reply, Running};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

const EVENT: [(&str, &str); 4] =
    [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/here"), ("ce-type", "com.acme.order")];

/// The one message that comes, once its delay is over.
async fn arrives(running: &Running) -> Value {
    let mut leases = running.pull("q", "max=10&wait=20s").await;
    assert_eq!(leases.len(), 1, "{leases:?}");
    leases.remove(0).event
}

/// Sends the request twice: the second is a duplicate, and the first arrives with all four.
async fn all_four(running: &Running, what: &str, again: &str, headers: &[(&str, &str)], body: &str) {
    let result = |reply: &Reply| {
        let json = reply.json();
        json.get("results").map_or_else(|| json.clone(), |results| results[0].clone())
    };
    let first = running.send(&format!("POST {what}"), headers, body).await;
    assert_eq!(first.status, 202, "{what} {headers:?}: {}", first.text());
    let second = running.send(&format!("POST {again}"), headers, body).await;
    assert_eq!(result(&second)["duplicate"], true, "{what}: {}", second.text());
    let event = arrives(running).await;
    assert_eq!(event["id"], result(&first)["id"], "{what}");
    let said = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
    assert_eq!((&*said("partitionkey"), &*said("brokerdedup")), ("käy", "once"), "{event}");
    // Points in time: the delay is over, the expiry is an hour away.
    assert!(said("brokerdelay") > said("time") && said("brokerttl") > said("brokerdelay"), "{event}");
}

#[tokio::test]
async fn key_delay_ttl_and_dedup_together() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":">"}"#).await.status, 201);
    let query = "key=k%C3%A4y&delay=50ms&ttl=1h&dedup=once";
    let (with_query, options) = (|topic| format!("/topics/{topic}?{query}"), |topic| format!("/topics/{topic}"));
    let headers =
        [("broker-key", "k%C3%A4y"), ("broker-delay", "50ms"), ("broker-ttl", "1h"), ("broker-dedup", "once")];

    all_four(&running, &with_query("plain"), &with_query("plain"), &[], "x").await;
    all_four(&running, &options("headers"), &options("headers"), &headers, "x").await;
    all_four(&running, &with_query("binary"), &with_query("binary"), &EVENT, "x").await;
    let both = [&EVENT[..], &headers[..]].concat();
    all_four(&running, &options("both"), &options("both"), &both, "x").await;

    let event = json!({"specversion": "1.0", "id": "1", "source": "/here", "type": "t", "data": 1}).to_string();
    let structured = [("content-type", "application/cloudevents+json")];
    all_four(&running, &with_query("structured"), &with_query("structured"), &structured, &event).await;
    let said = json!([{
        "specversion": "1.0", "id": "1", "source": "/here", "type": "t", "data": 1,
        "partitionkey": "käy", "brokerdelay": "50ms", "brokerttl": "1h", "brokerdedup": "once",
    }]);
    let batch = [("content-type", "application/cloudevents-batch+json")];
    all_four(&running, &options("batch"), &options("batch"), &batch, &said.to_string()).await;
    let line = json!({"payload": 1, "key": "käy", "delay": "50ms", "ttl": "1h", "dedup": "once"});
    let lines = [("content-type", "application/x-ndjson")];
    all_four(&running, &options("lines"), &options("lines"), &lines, &line.to_string()).await;
}

#[tokio::test]
async fn the_trace_goes_on() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":">"}"#).await.status, 201);
    let trace = [("traceparent", PARENT), ("tracestate", "acme=1")];
    let event = json!({"specversion": "1.0", "id": "1", "source": "/here", "type": "t", "data": 1}).to_string();
    for (headers, body) in [
        (trace.to_vec(), "x"),
        ([&trace[..], &EVENT[..]].concat(), "x"),
        ([&trace[..], &[("content-type", "application/cloudevents+json")]].concat(), event.as_str()),
    ] {
        assert_eq!(running.send("POST /topics/a", &headers, body).await.status, 202);
        let event = arrives(&running).await;
        let headers = event["brokerheaders"].as_str().unwrap();
        assert_eq!(headers, format!("traceparent={PARENT}&tracestate=acme%3D1"), "{event}");
    }
    // Several of one list are one.
    let many = [trace[0], ("tracestate", "acme=1, b=2"), ("tracestate", "c=3")];
    assert_eq!(running.send("POST /topics/a", &many, "x").await.status, 202);
    let headers = arrives(&running).await["brokerheaders"].as_str().unwrap().to_owned();
    assert_eq!(headers, format!("traceparent={PARENT}&tracestate=acme%3D1%2Cb%3D2%2Cc%3D3"));
    // What is malformed is no context.
    let zeros = "0".repeat(32);
    for malformed in [
        "00-xyz".to_owned(),
        format!("ff{}", &PARENT[2..]),
        format!("{PARENT}-and-more"),
        PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &zeros),
        PARENT.replace("00f067aa0ba902b7", &zeros[16..]),
    ] {
        let headers = [("traceparent", malformed.as_str()), trace[1]];
        assert_eq!(running.send("POST /topics/a", &headers, "x").await.status, 202);
        assert_eq!(arrives(&running).await.get("brokerheaders"), None, "{malformed}");
    }
}

#[tokio::test]
async fn matched_counts_groups_and_streams_before_attribute_filters() {
    let running = Running::start().await;
    for (name, spec) in [
        ("a", r#"{"filter":"orders.>"}"#),
        ("b", r#"{"filter":"orders.>"}"#),
        ("c", r#"{"filter":"orders.>","group":"b"}"#),
        ("d", r#"{"filter":"orders.*","filters":[{"exact":{"type":"never"}}]}"#),
        ("e", r#"{"filter":"invoices.>"}"#),
    ] {
        assert_eq!(running.put(name, spec).await.status, 201);
    }
    let mut stream = running.connect().await;
    let request = b"GET /topics/orders.%3E/stream HTTP/1.1\r\nhost: localhost\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.unwrap();
    crate::support::read_until(&mut stream, ": connected").await;
    let receipt = running.post("/topics/orders.created", "x").await.json();
    // The groups a, b (of two subscriptions) and d, and the stream.
    assert_eq!(receipt["matched"], 4, "{receipt}");
}
