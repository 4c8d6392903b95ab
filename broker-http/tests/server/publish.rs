//! `POST /topics/{topic}`.

use serde_json::{Value, json};

use crate::support::Running;

/// What a subscriber of its own sees of one publish.
async fn event(running: &Running) -> Value {
    let mut leases = running.pull("q", "max=10&wait=10s").await;
    assert_eq!(leases.len(), 1, "{leases:?}");
    leases.remove(0).event
}

async fn subscribed() -> Running {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":">"}"#).await.status, 201);
    running
}

#[tokio::test]
async fn any_body_is_a_message_and_the_receipt_says_what_became_of_it() {
    let running = subscribed().await;
    let reply =
        running.send("POST /topics/orders.created", &[("content-type", "application/json")], "{\"id\":42}").await;
    assert_eq!(reply.status, 202);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let receipt = reply.json();
    assert_eq!((&receipt["topic"], &receipt["matched"]), (&json!("orders.created"), &json!(1)));
    let event = event(&running).await;
    assert_eq!(event["id"], receipt["id"]);
    assert_eq!(event["data"], json!({"id": 42}));
    assert_eq!((&event["brokertopic"], &event["brokersubscription"]), (&json!("orders.created"), &json!("q")));

    let reply = running.send("POST /topics/a", &[], [0xff, 0x00]).await;
    assert_eq!(reply.status, 202);
    let event = self::event(&running).await;
    assert_eq!((&event["data_base64"], event.get("datacontenttype")), (&json!("/wA="), None));
}

#[tokio::test]
async fn options_come_as_query_or_as_headers() {
    let running = subscribed().await;
    let headers = [("broker-header-X-Via", "one%20two"), ("broker-header-x-via", "three"), ("broker-key", "k%C3%A4y")];
    let reply = running.send("POST /topics/a?id=order-42&ttl=1h&dedup=once", &headers, "x").await;
    assert_eq!((reply.status, &reply.json()["id"]), (202, &json!("order-42")));
    let event = event(&running).await;
    assert_eq!(event["partitionkey"], "käy");
    assert_eq!(event["brokerheaders"], "x-via=one+two&x-via=three");

    let again = running.post("/topics/a?id=order-43&dedup=once", "x").await.json();
    assert_eq!((&again["duplicate"], &again["id"]), (&json!(true), &json!("order-42")));
    assert!(running.pull("q", "").await.is_empty());

    let reply = running.post("/topics/a?require_route=true", "x").await;
    assert_eq!(reply.status, 202);
    let empty = Running::start().await;
    empty.post("/topics/a?require_route=true", "x").await.is_problem(422, "a");
    assert_eq!(empty.post("/topics/a", "x").await.json()["matched"], 0);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let running = Running::start().await;
    for (request, header, detail) in [
        ("POST /topics/orders..created", "x-none: 1", "a segment is empty"),
        ("POST /topics/a*", "x-none: 1", "not allowed"),
        ("POST /topics/%ff", "x-none: 1", "UTF-8"),
        ("POST /topics/%zz", "x-none: 1", "topic"),
        ("POST /topics/broker-x", "x-none: 1", "broker-"),
        ("POST /topics/a?colour=red", "x-none: 1", "colour"),
        ("POST /topics/a?ttl=0s", "x-none: 1", "ttl"),
        ("POST /topics/a?delay=-1s", "x-none: 1", "delay"),
        ("POST /topics/a?delay=999999d", "x-none: 1", "delay"),
        ("POST /topics/a?id=", "x-none: 1", "id"),
        ("POST /topics/a?key=1&key=2", "x-none: 1", "key"),
        ("POST /topics/a", "broker-colour: red", "broker-colour"),
        ("POST /topics/a", "broker-header-a: %zz", "broker-header-a"),
        ("POST /topics/a", "ce-specversion: 0.3", "specversion"),
        ("POST /topics/a", "ce-specversion: 1.0", "missing"),
        ("POST /topics/a", "content-type: application/cloudevents+avro", "avro"),
        ("POST /topics/a", "content-type: application/cloudevents+json", "JSON"),
        ("POST /topics/a", "content-type: application/cloudevents-batch+json", "array"),
        ("POST /topics/a", "idempotency-key: ", "idempotency-key"),
        ("POST /topics/a", "idempotency-key: \"half", "in quotes or without"),
    ] {
        let (name, value) = header.split_once(": ").unwrap();
        running.send(request, &[(name, value)], "not json").await.is_problem(400, detail);
    }
    running.send("POST /topics/a", &[("content-encoding", "br")], "x").await.is_problem(415, "gzip or zstd");
    running.send("POST /topics/a", &[("content-encoding", "gzip")], "x").await.is_problem(400, "gzip");
}

#[tokio::test]
async fn cloud_events_come_in_binary_structured_and_batched_mode() {
    let running = subscribed().await;
    let binary = [
        ("ce-specversion", "1.0"),
        ("ce-id", "1"),
        ("ce-source", "/here"),
        ("ce-type", "com.acme.order"),
        ("ce-subject", "Euro%20%E2%82%AC"),
        ("content-type", "text/plain"),
    ];
    assert_eq!(running.send("POST /topics/a", &binary, "hi").await.json()["id"], "1");
    let seen = event(&running).await;
    assert_eq!(
        (&seen["type"], &seen["subject"], &seen["source"]),
        (&json!("com.acme.order"), &json!("Euro €"), &json!("/here"))
    );

    let structured = json!({"specversion": "1.0", "id": "2", "source": "/here", "type": "t", "data": {"a": 1}});
    let headers = [("content-type", "application/cloudevents+json; charset=utf-8")];
    assert_eq!(running.send("POST /topics/a", &headers, structured.to_string()).await.json()["id"], "2");
    let seen = event(&running).await;
    assert_eq!((&seen["id"], &seen["data"]), (&json!("2"), &json!({"a": 1})));

    let batch =
        json!([structured, {"specversion": "1.0"}, {"specversion": "1.0", "id": "3", "source": "/", "type": "t"}]);
    let headers = [("content-type", "application/cloudevents-batch+json")];
    let reply = running.send("POST /topics/a", &headers, batch.to_string()).await;
    assert_eq!(reply.status, 207);
    let results = reply.json()["results"].clone();
    assert_eq!(
        (&results[0]["id"], &results[1]["error"]["status"], &results[2]["id"]),
        (&json!("2"), &json!(400), &json!("3"))
    );
    assert_eq!(running.pull("q", "").await.len(), 2);
    let reply = running.send("POST /topics/a", &headers, "[]").await;
    assert_eq!((reply.status, reply.json()), (202, json!({"results": []})));
}

const LINES: &str = "{\"payload\": {\"a\":1}, \"key\": \"k\"}\n\n{\"payload\": null}\n{\"payload\": 1, \"colour\": 2}\n{\"payload_base64\": \"aGk=\", \"content_type\": \"text/plain\"}";

#[tokio::test]
async fn lines_are_answered_together() {
    let running = subscribed().await;
    let reply = running.send("POST /topics/a", &[("content-type", "application/x-ndjson")], LINES).await;
    assert_eq!(reply.status, 207);
    let results = reply.json()["results"].as_array().unwrap().clone();
    assert_eq!(results.len(), 4);
    assert!(results[2]["error"]["detail"].as_str().unwrap().contains("colour"), "{results:?}");
    let events = running.pull("q", "").await;
    let ids: Vec<_> = events.iter().map(|lease| &lease.event["id"]).collect();
    assert_eq!(ids, [&results[0]["id"], &results[1]["id"], &results[3]["id"]]);
    assert_eq!(events[1].event["data"], Value::Null);
    assert_eq!((&events[2].event["data"], &events[2].event["datacontenttype"]), (&json!("hi"), &json!("text/plain")));

    let many = "{\"payload\":1}\n".repeat(10_001);
    let reply = running.send("POST /topics/b", &[("content-type", "application/x-ndjson")], many).await;
    reply.is_problem(413, "accept: application/x-ndjson");
    running
        .send("POST /topics/b", &[("content-type", "application/x-ndjson")], "\n\n")
        .await
        .is_problem(400, "no line");
}

#[tokio::test]
async fn lines_are_answered_one_by_one() {
    let running = subscribed().await;
    let headers = [("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson")];
    let reply = running.send("POST /topics/a", &headers, LINES).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/x-ndjson")));
    let results: Vec<Value> = reply.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 4);
    assert_eq!(results[2]["error"]["status"], 400);
    assert_eq!(running.pull("q", "").await.len(), 3);

    // Far beyond what is collected, and results in the order of the lines.
    let many: String = (0..25_000).map(|line| format!("{{\"payload\":{line},\"id\":\"{line}\"}}\n")).collect();
    let reply = running.send("POST /topics/elsewhere", &headers, many).await;
    let ids: Vec<String> = reply
        .text()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids, (0..25_000).map(|line| line.to_string()).collect::<Vec<_>>());

    // A line that is too long is passed over, the next one counts again.
    let long = format!("{{\"payload\":\"{}\"}}\n{{\"payload\":1}}\n", "x".repeat(5 << 20));
    let reply = running.send("POST /topics/elsewhere", &headers, long).await;
    let results: Vec<Value> = reply.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((results.len(), &results[0]["error"]["status"]), (2, &json!(413)));
    assert!(results[1]["id"].is_string());
}

#[tokio::test]
async fn a_compressed_stream_of_lines_is_answered_as_it_is_flushed() {
    use std::io::Write;
    use tokio::io::AsyncWriteExt;
    let running = Running::start().await;
    let head = format!(
        "POST /topics/a HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\n\
         accept: application/x-ndjson\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n",
        running.address
    );
    let chunk = |data: &[u8]| [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat();
    let mut stream = running.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for id in ["first", "second"] {
        encoder.write_all(format!("{{\"payload\":1,\"id\":\"{id}\"}}\n").as_bytes()).unwrap();
        encoder.flush().unwrap();
        stream.write_all(&chunk(&std::mem::take(encoder.get_mut()))).await.unwrap();
        // Before the body goes on.
        crate::support::read_until(&mut stream, &format!("\"id\":\"{id}\"")).await;
    }
    // A second member, and much in little: a line that is too long, far beyond what is held.
    let mut rest = encoder.finish().unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![b' '; 24 << 20]).unwrap();
    encoder.write_all(b"x\n{\"payload\":1,\"id\":\"third\"}").unwrap();
    rest.extend(encoder.finish().unwrap());
    stream.write_all(&chunk(&rest)).await.unwrap();
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let heard = crate::support::read_until(&mut stream, "third").await;
    assert!(heard.contains("line 3 is over"), "{heard}");

    // What breaks off or goes on as something else is told at the end; what came before is published.
    let headers =
        [("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson"), ("content-encoding", "gzip")];
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(b"{\"payload\":1}\n").unwrap();
    encoder.flush().unwrap();
    let flushed = encoder.get_ref().clone();
    let whole = encoder.finish().unwrap();
    for bad in [flushed, [&whole[..], b"garbage"].concat()] {
        let answer = running.send("POST /topics/a", &headers, bad).await.text();
        let lines: Vec<&str> = answer.lines().collect();
        assert!(lines.len() == 2 && lines[0].contains("\"id\"") && lines[1].contains("gzip"), "{answer}");
    }
}

#[tokio::test]
async fn a_stream_of_lines_may_be_zstd() {
    let running = Running::start().await;
    let headers =
        [("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson"), ("content-encoding", "zstd")];
    let body: String = (0..20_000).map(|id| format!("{{\"payload\":{{\"number\":{id}}},\"id\":\"{id}\"}}\n")).collect();
    let whole = ruzstd::encoding::compress_to_vec(body.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
    let answer = running.send("POST /topics/a", &headers, whole.clone()).await.text();
    let ids: Vec<String> = answer
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().into())
        .collect();
    assert!(ids.len() == 20_000 && ids.iter().enumerate().all(|(number, id)| *id == number.to_string()));

    // What breaks off or goes on as something else is told at the end; what came before is published.
    for bad in [whole[..whole.len() - 1].to_vec(), [&whole[..], b"garbage"].concat()] {
        let answer = running.send("POST /topics/a", &headers, bad).await.text();
        assert!(answer.lines().last().unwrap().contains("zstd"), "{:?}", answer.lines().last());
    }
    // A window of 8 MiB is not held where there is no memory for it.
    let mut limits = broker_http::Limits::default();
    (limits.memory_bytes, limits.topic_memory_bytes) = (4 << 20, 4 << 20);
    let small = Running::with(broker_http::ServerOptions::new().with_limits(limits)).await;
    let greedy = [0x28, 0xb5, 0x2f, 0xfd, 0, 13 << 3].to_vec();
    let answer = small.send("POST /topics/a", &headers, greedy).await.text();
    assert!(answer.contains("\"status\":413"), "{answer}");
}

/// What is wrong with each line of a body, in both forms.
async fn errors_of_lines(running: &Running, query: &str, body: &str) -> [Vec<String>; 2] {
    let request = format!("POST /topics/a{query}");
    let collected = running.send(&request, &[("content-type", "application/x-ndjson")], body).await.json();
    let headers = [("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson")];
    let streamed = running.send(&request, &headers, body).await.text();
    let streamed: Vec<Value> = streamed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    [collected["results"].as_array().unwrap().clone(), streamed].map(|results| {
        results.iter().filter_map(|result| Some(result["error"]["detail"].as_str()?.to_owned())).collect()
    })
}

#[tokio::test]
async fn an_error_says_the_number_of_its_line() {
    let running = Running::start().await;
    // Empty lines count, as an editor counts them.
    let bad =
        "{\"payload\":1}\n\n{\"payload\":\n{\"payload\":1,\"ttl\":\"x\"}\n{}\r\n{\"payload\":1,\"colour\":1}\n[1]";
    for query in ["", "?key=k&ttl=1h"] {
        for errors in errors_of_lines(&running, query, bad).await {
            let starts =
                ["line 3: column ", "line 4: ttl: ", "line 5: payload ", "line 6: column ", "line 7: an object"];
            assert_eq!(errors.len(), starts.len(), "{errors:?}");
            for (error, start) in errors.iter().zip(starts) {
                assert!(error.starts_with(start) && !error.contains("line 1"), "{start:?}: {error}");
            }
        }
    }

    // In the middle of a body that takes many reads, and a line that is too long after it.
    let good = "{\"payload\":1}\n".repeat(4_000);
    let body = format!("{good}{{\"payload\" 1}}\n{good}");
    for errors in errors_of_lines(&running, "", &body).await {
        assert!(matches!(&*errors, [one] if one.starts_with("line 4001: column 12: ")), "{errors:?}");
    }
    let long = format!("{good}{{\"payload\":\"{}\"}}\n{{}}", "x".repeat(1 << 20));
    let longer = format!("{{}}\n{{\"payload\":\"{}\"}}", "x".repeat(5 << 20));
    let headers = [("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson")];
    let answer = running.send("POST /topics/a", &headers, long).await.text();
    let last: Vec<&str> = answer.lines().skip(4_000).collect();
    assert!(last[0].contains("line 4001: message ") && last[1].contains("line 4002: payload"), "{last:?}");
    let answer = running.send("POST /topics/a", &headers, longer).await.text();
    assert!(answer.contains("line 2 is over"), "{answer}");
}

#[tokio::test]
async fn compressed_bodies_are_inflated_within_the_limit() {
    use std::io::Write;
    let gzip = |body: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(body).unwrap();
        encoder.finish().unwrap()
    };
    let running = subscribed().await;
    let headers = [("content-encoding", "gzip"), ("content-type", "application/json")];
    assert_eq!(running.send("POST /topics/a", &headers, gzip(b"{\"a\":1}")).await.status, 202);
    assert_eq!(event(&running).await["data"], json!({"a": 1}));
    let zstd = ruzstd::encoding::compress_to_vec(&b"42"[..], ruzstd::encoding::CompressionLevel::Fastest);
    let headers = [("content-encoding", "zstd"), ("content-type", "application/json")];
    assert_eq!(running.send("POST /topics/a", &headers, zstd).await.status, 202);
    assert_eq!(event(&running).await["data"], 42);
    // A hundred megabytes of zeros in a hundred kilobytes.
    let bomb = gzip(&vec![0; 100 << 20]);
    running.send("POST /topics/a", &[("content-encoding", "gzip")], bomb).await.is_problem(413, "inflates");
    // Lines have no end together, but what says nothing has: empty lines, and what follows of a line that is too long.
    let mut limits = broker_http::Limits::default();
    (limits.message_body_bytes, limits.batch_body_bytes) = (1_000, 10_000);
    let running = Running::with(broker_http::ServerOptions::new().with_limits(limits)).await;
    let headers =
        [("content-encoding", "gzip"), ("content-type", "application/x-ndjson"), ("accept", "application/x-ndjson")];
    for (nothing, told_of_its_length) in [(b'\n', 0), (b'x', 1)] {
        for (bytes, too_many) in [(9_000, false), (20_000, true)] {
            let body = gzip(&[b"{}\n", &vec![nothing; bytes][..], b"\n{}\n"].concat());
            let answer = running.send("POST /topics/a", &headers, body).await.text();
            let told: Vec<_> = answer.lines().collect();
            let last = told.last().unwrap().contains("say nothing");
            assert_eq!((told.len(), last), (2 + told_of_its_length, too_many), "{answer}");
        }
    }
}

#[tokio::test]
async fn a_content_encoding_that_is_not_understood_is_told_those_that_are() {
    let running = Running::start().await;
    for encoding in ["br", "gzip, gzip"] {
        let reply = running.send("POST /topics/a", &[("content-encoding", encoding)], "x").await;
        reply.is_problem(415, "gzip or zstd");
        assert_eq!(reply.header("accept-encoding"), Some("gzip, zstd"));
    }
}

#[tokio::test]
async fn a_transfer_coding_other_than_chunked_is_refused_and_its_body_published_as_nothing() {
    let running = subscribed().await;
    let send = async |headers: &[(&str, &str)], path: &str| {
        running.send(&format!("POST {path}"), headers, "3\r\nabc\r\n0\r\n\r\n").await
    };
    for codings in ["gzip, chunked", "x-own;a=b,chunked", "GZIP , Chunked"] {
        send(&[("transfer-encoding", codings)], "/topics/a").await.is_problem(501, "chunked");
    }
    let two = [("transfer-encoding", "deflate"), ("transfer-encoding", "chunked")];
    send(&two, "/topics/a").await.is_problem(501, "chunked");
    let lines = [("transfer-encoding", "gzip, chunked"), ("content-type", "application/x-ndjson")];
    send(&lines, "/topics/a").await.is_problem(501, "chunked");
    send(&lines[..1], "/subscriptions/q/pull").await.is_problem(501, "chunked");
    send(&[("transfer-encoding", "chunked, chunked")], "/topics/a").await.is_problem(400, "once");
    assert!(running.pull("q", "").await.is_empty());
    for codings in ["chunked", " , Chunked"] {
        assert_eq!(send(&[("transfer-encoding", codings)], "/topics/a").await.status, 202, "{codings}");
        assert_eq!(event(&running).await["data_base64"], "YWJj");
    }
}

#[tokio::test]
async fn results_of_lines_are_not_streamed_to_who_refuses_them() {
    let running = Running::start().await;
    for (accept, status) in [("application/x-ndjson", 200), ("*/*, application/x-ndjson;q=0", 202), ("*/*", 202)] {
        let headers = [("content-type", "application/x-ndjson"), ("accept", accept)];
        assert_eq!(running.send("POST /topics/a", &headers, "{\"payload\":1}").await.status, status, "{accept}");
    }
}

#[tokio::test]
async fn the_time_of_an_event_is_passed_on_as_it_was_written() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":">"}"#).await;
    let exact = |time: &str| json!({"filter": ">", "filters": [{"exact": {"time": time}}]}).to_string();
    let times = [
        "2026-01-02T03:04:05.678901Z",
        "2026-01-02T03:04:05Z",
        "2026-01-02T05:04:05.678+02:00",
        "2026-01-02T03:04:05.678Z",
    ];
    for (index, time) in times.into_iter().enumerate() {
        running.put(&format!("exact{index}"), &exact(time)).await;
    }
    for (index, time) in times.into_iter().enumerate() {
        let headers =
            [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t"), ("ce-time", time)];
        assert_eq!(running.send("POST /topics/a", &headers, "x").await.status, 202);
        let structured =
            json!({"specversion": "1.0", "id": "2", "source": "/s", "type": "t", "time": time}).to_string();
        let headers = [("content-type", "application/cloudevents+json")];
        assert_eq!(running.send("POST /topics/a", &headers, structured).await.status, 202);
        for name in ["q", &format!("exact{index}")] {
            let leases = running.pull(name, "max=10&wait=10s").await;
            assert_eq!(leases.len(), 2, "{name}: {leases:?}");
            for lease in leases {
                assert_eq!((&lease.event["time"], lease.event.get("brokerheaders")), (&json!(time), None), "{name}");
            }
        }
    }
    for index in 0..times.len() {
        assert!(running.pull(&format!("exact{index}"), "").await.is_empty());
    }
    // What is no RFC 3339 is passed on as it.
    let headers = [("content-type", "application/cloudevents+json")];
    let odd = r#"{"specversion":"1.0","id":"2","source":"/s","type":"t","time":"20260102T030405Z"}"#;
    assert_eq!(running.send("POST /topics/a", &headers, odd).await.status, 202);
    assert_eq!(event(&running).await["time"], "2026-01-02T03:04:05.000Z");
}

#[tokio::test]
async fn names_of_message_headers_differ_in_case() {
    let running = subscribed().await;
    let lines = [("content-type", "application/x-ndjson")];
    let line = r#"{"payload":1,"headers":{"Foo":"1","foo":"2"}}"#;
    assert_eq!(running.send("POST /topics/a", &lines, line).await.status, 202);
    assert_eq!(event(&running).await["brokerheaders"], "Foo=1&foo=2");
    assert_eq!(
        running.send("POST /topics/a", &[("broker-header-%46oo", "1"), ("broker-header-foo", "2")], "x").await.status,
        202
    );
    assert_eq!(event(&running).await["brokerheaders"], "Foo=1&foo=2");
    // An attribute's name has no capitals.
    let line = r#"{"payload":1,"headers":{"ce-Foo":"1","ce-foo":"2"}}"#;
    assert_eq!(running.send("POST /topics/a", &lines, line).await.status, 202);
    let event = event(&running).await;
    assert_eq!((&event["foo"], &event["brokerheaders"]), (&json!("2"), &json!("ce-Foo=1&ce-foo=2")));
    let structured = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","Foo":"1","foo":"2"}"#;
    let headers = [("content-type", "application/cloudevents+json")];
    running.send("POST /topics/a", &headers, structured).await.is_problem(400, "attribute Foo");
}

#[tokio::test]
async fn an_idempotency_key_repeats_the_answer() {
    let running = subscribed().await;
    let key = [("idempotency-key", "\"7\"")];
    let first = running.send("POST /topics/a", &key, "x").await;
    let second = running.send("POST /topics/a", &[("idempotency-key", "7")], "x").await;
    assert_eq!((first.status, &first.body), (second.status, &second.body));
    assert_eq!(running.pull("q", "").await.len(), 1);
    running.send("POST /topics/a", &key, "y").await.is_problem(422, "another request");
    running.send("POST /topics/a", &[key[0], ("broker-key", "k")], "x").await.is_problem(422, "another request");
    // Elsewhere it is another key, and what was refused may be tried again.
    assert_eq!(running.send("POST /topics/b", &key, "x").await.status, 202);
    running
        .send("POST /topics/c?require_route=true&delay=1h", &[("idempotency-key", "8"), ("ce-id", "1")], "x")
        .await
        .is_problem(400, "");
}

#[tokio::test]
async fn a_full_group_refuses_publishers() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","backlog":{"max_messages":2}}"#).await;
    assert_eq!(running.post("/topics/a", "1").await.status, 202);
    assert_eq!(running.post("/topics/a", "2").await.status, 202);
    let reply = running.post("/topics/a", "3").await;
    reply.is_problem(503, "q@a");
    assert!(reply.header("retry-after").is_some(), "{reply:?}");
    let lines = "{\"payload\":1}\n{\"payload\":2}";
    let reply = running.send("POST /topics/a", &[("content-type", "application/x-ndjson")], lines).await;
    assert_eq!((reply.status, &reply.json()["results"][1]["error"]["status"]), (207, &json!(503)));
    // Others are not held up, and consumers drain it.
    assert_eq!(running.post("/topics/b", "1").await.status, 202);
    let leases = running.pull("q", "max=1").await;
    assert!(running.settle("q", json!({"ack": [leases[0].lease]})).await.is_empty());
    assert_eq!(running.post("/topics/a", "3").await.status, 202);
}

#[tokio::test]
async fn topics_are_listed_page_by_page() {
    let running = Running::start().await;
    for topic in ["b", "a", "c"] {
        running.post(&format!("/topics/{topic}"), "x").await;
    }
    let names = |page: &Value| {
        page["topics"]
            .as_array()
            .unwrap()
            .iter()
            .map(|topic| topic["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let page = running.get("/topics?limit=2").await.json();
    assert_eq!((names(&page), &page["next"]), (vec!["a".to_owned(), "b".to_owned()], &json!("b")));
    let page = running.get("/topics?limit=2&next=b").await.json();
    assert_eq!((names(&page), &page["next"]), (vec!["c".to_owned()], &Value::Null));
    running.get("/topics?page=2").await.is_problem(400, "known: limit, next");
}
