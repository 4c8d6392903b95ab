//! What somebody may try against each limit: it is bounded, answered, counted, and the others are
//! served meanwhile.

use std::time::Duration;

use broker_http::{Access, Action, Identity, Limits, ServerOptions, TokenHash};
use bytes::Bytes;
use http::Request;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::{Reply, Running, soon};

async fn limited(change: impl FnOnce(&mut Limits)) -> Running {
    let mut limits = Limits::default();
    change(&mut limits);
    Running::with(ServerOptions::new().with_limits(limits)).await
}

/// How often something was refused for this reason.
async fn refused(running: &Running, reason: &str) -> u64 {
    let metrics = running.get("/metrics").await.text();
    let line = format!("broker_refused_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|have| have.strip_prefix(&line)).unwrap_or_else(|| panic!("{reason}")).parse().unwrap()
}

/// Waits until it was refused so often: what ends a connection is counted after its end is seen.
async fn refused_at_last(running: &Running, reason: &str, least: u64) {
    soon(async {
        while refused(running, reason).await < least {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn slow_heads_are_told_408() {
    let running = limited(|limits| limits.header_timeout = Duration::from_millis(300)).await;
    let begun: Vec<_> = futures_util::future::join_all((0..20).map(|_| async {
        let mut stream = running.connect().await;
        stream.write_all(b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await.unwrap();
        stream
    }))
    .await;
    // Meanwhile others are served.
    assert_eq!(running.get("/healthz").await.status, 200);
    for mut stream in begun {
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        Reply::parse(&answer).is_problem(408, "headers did not arrive");
    }
    refused_at_last(&running, "head_timeout", 20).await;
}

#[tokio::test]
async fn slow_heads_over_http_2_are_cut_and_counted() {
    let running = limited(|limits| limits.header_timeout = Duration::from_millis(300)).await;
    let begin = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
    // Half a preface, half a frame, a head without END_HEADERS; and an idle connection, which is no slow head.
    let head = frame(1, 1, 1, &[0x82]);
    for said in [&begin[..10], &[&begin[..], &head[..5]].concat(), &[&begin[..], &head].concat(), &begin] {
        let mut stream = running.connect().await;
        stream.write_all(said).await.unwrap();
        let _ = soon(stream.read_to_end(&mut Vec::new())).await;
    }
    refused_at_last(&running, "head_timeout", 3).await;
    assert_eq!(refused(&running, "head_timeout").await, 3);
}

#[tokio::test]
async fn a_head_drop_by_drop_is_no_way_around_it() {
    let running = limited(|limits| limits.header_timeout = Duration::from_millis(300)).await;
    let mut stream = running.connect().await;
    let (mut read, mut write) = stream.split();
    let dripping = async {
        write.write_all(b"GET /healthz HTTP/1.1\r\n").await?;
        loop {
            write.write_all(b"x: y\r\n").await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        #[allow(unreachable_code, reason = "it ends with an error alone")]
        std::io::Result::Ok(())
    };
    let mut answer = Vec::new();
    let ended = soon(async {
        tokio::select! { end = read.read_to_end(&mut answer) => end.map(drop), end = dripping => end }
    });
    let served = async { assert_eq!(running.get("/healthz").await.status, 200) };
    let _ = tokio::join!(ended, served);
    refused_at_last(&running, "head_timeout", 1).await;
}

/// Before anybody knows who sends them.
#[tokio::test]
async fn heads_without_an_end_are_bounded_together() {
    let running = limited(|limits| limits.memory_bytes = 8 << 20).await;
    let line = format!("x-large: {}\r\n", "y".repeat(1_000));
    let mut begun = Vec::new();
    for _ in 0..40 {
        let mut stream = running.connect().await;
        stream
            .write_all(format!("GET /healthz HTTP/1.1\r\nhost: localhost\r\n{}", line.repeat(59)).as_bytes())
            .await
            .unwrap();
        begun.push(stream);
    }
    // An eighth of it holds 17 of them.
    refused_at_last(&running, "heads", 40 - 17).await;
    for stream in &mut begun[..40 - 17] {
        let mut answer = Vec::new();
        let _ = soon(stream.read_to_end(&mut answer)).await;
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    }
    let metrics = running.get("/metrics").await.text();
    let held = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes ")).unwrap();
    assert!((800_000..=1 << 20).contains(&held.parse::<u64>().unwrap()), "{held}");
    // Others are served meanwhile, also those with much to say, and who began last.
    let large = "y".repeat(40_000);
    assert_eq!(running.send("GET /healthz", &[("x-large", &large)], "").await.status, 200);
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
    let last = begun.last_mut().unwrap();
    last.write_all(b"\r\n").await.unwrap();
    crate::support::read_until(last, "ok\n").await;
    assert_eq!(refused(&running, "heads").await, 40 - 17 + 1);
    // Idle after its answer it holds nothing.
    drop(begun.drain(..39));
    soon(async {
        while !running.get("/metrics").await.text().contains("broker_memory_bytes 0\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_is_only_idle_just_ends() {
    let running = limited(|limits| limits.header_timeout = Duration::from_millis(200)).await;
    let mut stream = running.connect().await;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("ok\n"), "{text}");
    assert_eq!(refused(&running, "head_timeout").await, 0);
}

#[tokio::test]
async fn slow_bodies_are_told_408() {
    let running = limited(|limits| limits.body_timeout = Duration::from_millis(300)).await;
    let slow = futures_util::future::join_all((0..20).map(|_| async {
        let mut stream = running.connect().await;
        let head = b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf";
        stream.write_all(head).await.unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        Reply::parse(&answer).is_problem(408, "in time");
    }));
    let served = async { assert_eq!(running.post("/topics/a", "x").await.status, 202) };
    tokio::join!(slow, served);
    assert_eq!(refused(&running, "body_timeout").await, 20);
}

/// A line drop by drop is no way to stay, and a stream of whole ones is.
#[tokio::test]
async fn each_line_of_a_stream_has_its_time() {
    let running = limited(|limits| limits.body_timeout = Duration::from_secs(2)).await;
    let head = b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
        accept: application/x-ndjson\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    let whole = async {
        let mut stream = running.connect().await;
        stream.write_all(head).await.unwrap();
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            stream.write_all(b"e\r\n{\"payload\":1}\n\r\n").await.unwrap();
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer.matches("\"id\":").count(), 8, "{answer}");
    };
    let dripping = async {
        let mut stream = running.connect().await;
        stream.write_all(head).await.unwrap();
        stream.write_all(b"1a\r\n{\"payload\":1}\n{\"payload\":\"\r\n").await.unwrap();
        let (mut read, mut write) = stream.split();
        let mut answer = Vec::new();
        let drip = async {
            while write.write_all(b"1\r\nx\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            std::future::pending().await
        };
        // It may be reset, since more was sent than read.
        let _ = soon(async {
            tokio::select! { end = read.read_to_end(&mut answer) => end.map(drop), () = drip => Ok(()) }
        })
        .await;
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains("\"id\":") && text.contains("line 2 did not arrive in time"), "{text}");
    };
    let served = async { assert_eq!(running.post("/topics/a", "x").await.status, 202) };
    tokio::join!(whole, dripping, served);
    assert_eq!(refused(&running, "body_timeout").await, 1);
}

#[tokio::test]
async fn oversize_is_told_413_414_431() {
    let running = limited(|limits| limits.uri_bytes = 1_000).await;
    let reply = running.post(&format!("/topics/a?key={}", "k".repeat(1_000)), "x").await;
    reply.is_problem(414, "1000 are the most");
    running.post("/topics/a", &"x".repeat(3 << 20)).await.is_problem(413, "limit");
    let large = "v".repeat(100 << 10);
    assert_eq!(running.send("POST /topics/a", &[("x-large", &large)], "").await.status, 431);
    for reason in ["uri_too_long", "too_large", "head_too_large"] {
        refused_at_last(&running, reason, 1).await;
    }
    let mut stream = running.connect().await;
    stream.write_all(b"nonsense\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400"));
    refused_at_last(&running, "malformed", 1).await;
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
}

#[tokio::test]
async fn too_many_of_anything_is_told_and_counted() {
    let running = limited(|limits| {
        (limits.subscriptions, limits.topics, limits.streams, limits.leases) = (1, 1, 1, 1);
    })
    .await;
    running.put("q", r#"{"filter":"a"}"#).await;
    running.put("r", r#"{"filter":"a"}"#).await.is_problem(429, "subscriptions");
    // At each bound others are served: the subscription that stands is changed, the topic in use published to.
    assert_eq!(running.put("q", r#"{"filter":"a","max_in_flight":3}"#).await.status, 200);
    for _ in 0..2 {
        assert_eq!(running.post("/topics/a", "x").await.status, 202);
    }
    // A topic whose messages are kept is in use; one that holds nothing makes room.
    let reply = running.post("/topics/b", "x").await;
    reply.is_problem(429, "1 topics");
    assert!(reply.header("retry-after").is_some());
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
    let leases = running.pull("q", "max=1").await;
    running.post("/subscriptions/q/pull?max=1", "").await.is_problem(429, "leases");
    // Who holds one settles it, and has the next.
    assert!(running.settle("q", json!({ "ack": [leases[0].lease] })).await.is_empty());
    assert_eq!(running.pull("q", "max=1").await.len(), 1);
    let mut stream = running.connect().await;
    stream.write_all(b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut stream, ": connected").await;
    running.get("/topics/a/stream").await.is_problem(429, "streams");
    // Who has a place goes on: the stream that stands gets what is published to the topic that is in use.
    assert_eq!(running.post("/topics/a", "still").await.status, 202);
    crate::support::read_until(&mut stream, "id: ").await;
    for reason in ["subscriptions", "topics", "streams", "leases"] {
        assert_eq!(refused(&running, reason).await, 1, "{reason}");
    }
    running.delete("/subscriptions/q").await;
    drop(stream);
    soon(async {
        while running.post("/topics/b", "x").await.status != 202 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// A batch of too many messages or bytes, and JSON that is too long for a subscription or a settlement.
#[tokio::test]
async fn batches_and_json_are_bounded() {
    let running = limited(|limits| {
        (limits.batch_messages, limits.batch_body_bytes, limits.json_body_bytes) = (3, 1_000, 200);
    })
    .await;
    running.put("a", r#"{"filter":"a"}"#).await;
    let event = |id: usize, data: &str| {
        format!(r#"{{"specversion":"1.0","id":"{id}","source":"s","type":"t","data":"{data}"}}"#)
    };
    let batch = |count: usize| {
        let events: Vec<String> = (0..count).map(|id| event(id, "")).collect();
        format!("[{}]", events.join(","))
    };
    let events = [("content-type", "application/cloudevents-batch+json")];
    let lines = [("content-type", "application/x-ndjson")];
    let publish = "POST /topics/a";
    assert!(running.send(publish, &events, batch(3)).await.status < 300);
    running.send(publish, &events, batch(4)).await.is_problem(413, "3");
    running.send(publish, &lines, "{\"payload\":1}\n".repeat(4)).await.is_problem(413, "3");
    running.send(publish, &events, format!("[{}]", event(0, &"x".repeat(1_000)))).await.is_problem(413, "1000");
    let chunked = [events[0], ("transfer-encoding", "chunked")];
    let chunks = format!("3e9\r\n{}\r\n0\r\n\r\n", " ".repeat(1_001));
    running.send(publish, &chunked, &chunks).await.is_problem(413, "1000");
    running.put("b", &format!(r#"{{"filter":"b","x":"{}"}}"#, "x".repeat(200))).await.is_problem(413, "200");
    let settle = format!(r#"{{"ack":["{}"]}}"#, "x".repeat(200));
    running.send("POST /subscriptions/a/settle", &[], settle).await.is_problem(413, "200");
    assert_eq!(refused(&running, "too_large").await, 6);
    // What was within the bounds is there, and nothing else.
    assert_eq!(running.pull("a", "max=100").await.len(), 3);
}

/// Whoever goes on sending what was refused is not read for ever.
#[tokio::test]
async fn a_refused_body_is_not_read_beyond_its_bound() {
    let running = limited(|limits| {
        (limits.message_body_bytes, limits.refused_body_bytes) = (1 << 10, 64 << 10);
    })
    .await;
    let mut stream = running.connect().await;
    let head = "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [b"10000\r\n".as_slice(), &vec![b'x'; 64 << 10], b"\r\n"].concat();
    let mut sent = 0;
    // What the kernels hold between the two is some megabytes.
    let cut = soon(async {
        while sent < 256 << 20 {
            if stream.write_all(&chunk).await.is_err() {
                return true;
            }
            sent += chunk.len();
        }
        false
    })
    .await;
    assert!(cut, "{sent} bytes were read of what was refused");
    assert_eq!(running.get("/healthz").await.status, 200);
    refused_at_last(&running, "too_large", 1).await;
}

#[tokio::test]
async fn at_the_bound_of_memory_one_may_settle_and_mend() {
    let running = limited(|limits| (limits.memory_bytes, limits.topic_memory_bytes) = (100_000, 200_000)).await;
    running.put("q", r#"{"filter":"a","max_in_flight":1000}"#).await;
    // Of a batch that comes while there is room the first ones are taken, as far as it goes.
    let lines: String = (0..500).map(|number| format!("{{\"payload\":{number}}}\n")).collect();
    let reply = running.send("POST /topics/a", &[("content-type", "application/x-ndjson")], lines).await;
    assert_eq!(reply.status, 207);
    let results = reply.json()["results"].as_array().unwrap().clone();
    let taken = results.iter().take_while(|result| result["error"].is_null()).count();
    // What is told of them takes its room, too.
    assert!(results.len() == 500 && (50..250).contains(&taken), "{taken}");
    for result in &results[taken..] {
        assert_eq!(result["error"]["status"], 503, "{result}");
        assert!(result["error"]["detail"].as_str().unwrap().contains("bound of 100000 bytes"), "{result}");
    }
    assert!(refused(&running, "memory").await >= 1, "the first part had room");
    let mut taken = taken;
    let full = loop {
        let reply = running.post("/topics/a", "x".repeat(300).as_str()).await;
        if reply.status != 202 {
            break reply;
        }
        taken += 1;
    };
    assert!(taken < 400, "{taken}");
    full.is_problem(503, "bound");
    // Who would make room has its say, and who mends a subscription.
    assert_eq!(running.put("r", r#"{"filter":"b"}"#).await.status, 201);
    let mut left = taken;
    while left > 0 {
        let leases: Vec<_> = running.pull("q", "max=100").await.into_iter().map(|lease| lease.lease).collect();
        // As many as an answer has room for.
        assert!((1..=left.min(100)).contains(&leases.len()), "{}", leases.len());
        left -= leases.len();
        assert!(running.settle("q", json!({ "ack": leases })).await.is_empty());
    }
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
}

#[tokio::test]
async fn memory_is_bounded_and_consumers_keep_draining() {
    let running = limited(|limits| {
        (limits.memory_bytes, limits.topic_memory_bytes) = (1 << 20, 400 << 10);
    })
    .await;
    for topic in ["a", "b", "c"] {
        running.put(topic, &format!(r#"{{"filter":"{topic}","max_in_flight":1000}}"#)).await;
    }
    let body = "x".repeat(50 << 10);
    let mut taken = 0;
    let told = loop {
        let reply = running.post("/topics/a", &body).await;
        if reply.status != 202 {
            break reply;
        }
        taken += 1;
    };
    told.is_problem(429, "topic a");
    assert!(told.header("retry-after").is_some() && (7..=9).contains(&taken), "{taken}");
    // Another topic goes on, until all together hold too much.
    let mut reply = running.post("/topics/b", &body).await;
    assert_eq!(reply.status, 202);
    while reply.status == 202 {
        reply = running.post("/topics/b", &body).await;
    }
    loop {
        let reply = running.post("/topics/c", &body).await;
        if reply.status != 202 {
            reply.is_problem(503, "at their bound of 1048576 bytes");
            assert!(reply.header("retry-after").is_some());
            break;
        }
    }
    let metrics = running.get("/metrics").await.text();
    let held = |metrics: &str| -> u64 {
        metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes ")).unwrap().parse().unwrap()
    };
    assert!((900 << 10..=1 << 20).contains(&held(&metrics)), "{metrics}");
    // At the bound a body is refused before it is read, however it comes.
    let chunked = [("transfer-encoding", "chunked")];
    let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    running.send("POST /topics/c", &chunked, &chunks).await.is_problem(503, "bound");
    // Whoever takes messages out is served, and that makes room.
    while taken > 0 {
        let leases: Vec<_> = running.pull("a", "max=100").await.into_iter().map(|lease| lease.lease).collect();
        assert!((1..=taken).contains(&leases.len()), "{}", leases.len());
        taken -= leases.len();
        assert!(running.settle("a", serde_json::json!({ "ack": leases })).await.is_empty());
    }
    soon(async {
        while running.post("/topics/a", &body).await.status != 202 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    for topic in ["a", "b", "c"] {
        running.delete(&format!("/subscriptions/{topic}")).await;
    }
    soon(async {
        while held(&running.get("/metrics").await.text()) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(refused(&running, "topic_memory").await >= 2 && refused(&running, "memory").await >= 2);
}

/// All heads come in while there is room, and only then the bodies.
#[tokio::test]
async fn publishers_at_once_do_not_pass_the_bound_together() {
    let running = limited(|limits| {
        (limits.memory_bytes, limits.topic_memory_bytes) = (8 << 20, 400 << 10);
    })
    .await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let body = "x".repeat(50 << 10);
    let mut senders = Vec::new();
    for _ in 0..40 {
        let mut stream = running.connect().await;
        let head = format!(
            "POST /topics/a HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&body.as_bytes()[1..]).await.unwrap();
        senders.push(stream);
    }
    let mut statuses = Vec::new();
    for mut stream in senders {
        stream.write_all(b"x").await.unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        statuses.push(Reply::parse(&answer).status);
    }
    let taken = statuses.iter().filter(|status| **status == 202).count();
    assert!((7..=8).contains(&taken), "{statuses:?}");
    assert!(statuses.iter().all(|status| [202, 429].contains(status)), "{statuses:?}");
}

/// Nobody reads, and everything has expired: publishers are not refused for ever.
#[tokio::test]
async fn what_has_expired_makes_room_at_the_bound() {
    let running = limited(|limits| {
        (limits.memory_bytes, limits.topic_memory_bytes) = (1 << 20, 400 << 10);
    })
    .await;
    running.put("late", r#"{"filter":"a"}"#).await;
    let body = "x".repeat(50 << 10);
    // Behind one that lasts.
    assert_eq!(running.post("/topics/a", &body).await.status, 202);
    while running.post("/topics/a?ttl=300ms", &body).await.status == 202 {}
    soon(async {
        while running.post("/topics/a", &body).await.status != 202 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn tombstones_are_bounded_too() {
    let running = limited(|limits| {
        (limits.memory_bytes, limits.topic_memory_bytes) = (1 << 20, 400 << 10);
    })
    .await;
    let large = "x".repeat(50 << 10);
    let headers = [("broker-tombstone", "true"), ("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "s")];
    let headed = [&headers[..], &[("ce-type", "t"), ("ce-large", large.as_str())]].concat();
    let keyed = [&headers[..], &[("ce-type", "t"), ("ce-partitionkey", large.as_str())]].concat();
    for (topic, headers) in [("a", &headed), ("b", &keyed), ("c", &headed)] {
        running.put(topic, &format!(r#"{{"filter":"{topic}"}}"#)).await;
        let mut taken = 0;
        let refused = loop {
            let reply = running.send(&format!("POST /topics/{topic}"), headers, "").await;
            if reply.status != 202 {
                break reply;
            }
            taken += 1;
            assert!(taken < 30, "nobody counts them");
        };
        match topic {
            "c" => refused.is_problem(503, "bound of 1048576"),
            _ => refused.is_problem(429, "bound of 409600"),
        }
    }
    for topic in ["a", "b", "c"] {
        running.delete(&format!("/subscriptions/{topic}")).await;
    }
    soon(async {
        while !running.get("/metrics").await.text().lines().any(|line| line == "broker_memory_bytes 0") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// A frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A raw connection of HTTP/2.
async fn h2(running: &Running) -> h2::client::SendRequest<Bytes> {
    let (send, connection) = h2::client::handshake(running.connect().await).await.unwrap();
    tokio::spawn(connection);
    send
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://localhost{path}")).body(()).unwrap()
}

#[tokio::test]
async fn rapid_reset_is_cut_off() {
    // CVE-2023-44487: streams opened and reset as fast as can be.
    let running = Running::start().await;
    let mut send = h2(&running).await;
    let mut reset = 0;
    let cut = soon(async {
        loop {
            let Ok(ready) = send.clone().ready().await else { break };
            send = ready;
            let Ok((_, mut body)) = send.send_request(get("/healthz"), false) else { break };
            body.send_reset(h2::Reason::CANCEL);
            reset += 1;
            if reset % 50 == 0 {
                tokio::task::yield_now().await;
            }
            assert!(reset < 100_000, "nobody stopped it");
        }
    });
    let served = async { assert_eq!(running.post("/topics/a", "x").await.status, 202) };
    tokio::join!(cut, served);
    refused_at_last(&running, "flood", 1).await;
    assert_eq!(running.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn streams_of_one_connection_are_bounded() {
    let running = limited(|limits| limits.streams_per_connection = 4).await;
    let mut send = h2(&running).await;
    // What the server allows is known once its settings are here.
    soon(async {
        while send.current_max_send_streams() != 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // Long polls that hold their streams.
    running.put("q", r#"{"filter":"a"}"#).await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        send = soon(send.ready()).await.unwrap();
        let request = Request::post("http://localhost/subscriptions/q/pull?wait=60s").body(()).unwrap();
        waiting.push(send.send_request(request, true).unwrap().0);
    }
    // A fifth waits for its turn; another connection does not.
    send = soon(send.ready()).await.unwrap();
    let mut fifth = send.send_request(get("/healthz"), true).unwrap().0;
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut fifth).await.is_err(), "five at a time");
    assert_eq!(running.get("/healthz").await.status, 200);
    // One of the four ends, and makes room.
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
    assert_eq!(soon(fifth).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_flood_of_headers_over_http_2_is_refused() {
    let running = limited(|limits| (limits.header_bytes, limits.headers) = (16 << 10, 1_000)).await;
    // A head of 18 KB loses its stream, one of 69 KB its connection.
    for (count, answered) in [(130, true), (500, false)] {
        let mut request = get("/healthz");
        for index in 0..count {
            let name = http::HeaderName::try_from(format!("x-{index}")).unwrap();
            request.headers_mut().insert(name, "v".repeat(100).parse().unwrap());
        }
        let mut send = h2(&running).await.ready().await.unwrap();
        match soon(send.send_request(request, true).unwrap().0).await {
            Ok(response) => assert!(answered && response.status() == 431, "{response:?}"),
            Err(error) => assert!(!answered && (error.is_go_away() || error.is_io()), "{error}"),
        }
        assert_eq!(running.get("/healthz").await.status, 200);
    }
    refused_at_last(&running, "head_too_large", 2).await;
    assert_eq!((refused(&running, "head_too_large").await, refused(&running, "malformed").await), (2, 0));
}

#[tokio::test]
async fn more_headers_than_may_be_are_told_431_over_http_2_too() {
    let running = limited(|limits| limits.headers = 5).await;
    let mut send = h2(&running).await.ready().await.unwrap();
    for (count, status) in [(5, 200), (6, 431), (5, 200), (6, 431)] {
        let mut request = get("/healthz");
        for index in 0..count {
            let name = http::HeaderName::try_from(format!("x-{index}")).unwrap();
            request.headers_mut().insert(name, "v".parse().unwrap());
        }
        send = send.ready().await.unwrap();
        assert_eq!(soon(send.send_request(request, true).unwrap().0).await.unwrap().status(), status, "{count}");
    }
    // Meanwhile others are served.
    assert_eq!(running.get("/healthz").await.status, 200);
    assert_eq!(refused(&running, "head_too_large").await, 2);
}

#[tokio::test]
async fn streams_beyond_those_of_a_connection_are_refused_and_counted() {
    let running = limited(|limits| limits.streams_per_connection = 2).await;
    let mut stream = running.connect().await;
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    begin.extend(frame(4, 0, 0, &[]));
    // POST, http, /topics/a, localhost, five times; no body comes. Who waits for no place loses its stream.
    let head = [&[0x83, 0x86, 0x04, 9][..], b"/topics/a", &[0x01, 9], b"localhost"].concat();
    for id in [1, 3, 5, 7, 9] {
        begin.extend(frame(1, 4, id, &head));
    }
    stream.write_all(&begin).await.unwrap();
    refused_at_last(&running, "connection_streams", 3).await;
    assert_eq!(running.get("/healthz").await.status, 200);
    assert_eq!(refused(&running, "connection_streams").await, 3);
}

#[tokio::test]
async fn headers_of_requests_that_wait_on_one_connection_are_bounded_together() {
    let running = limited(|limits| limits.header_bytes = 8 << 10).await;
    let mut send = h2(&running).await;
    let large = |method: &str| {
        let mut request = get("/topics/a");
        *request.method_mut() = method.parse().unwrap();
        request.headers_mut().insert("x-large", "v".repeat(6 << 10).parse().unwrap());
        request
    };
    // 16 times 8 KiB have room for 20 or 21 heads of 6 KiB and something.
    let mut waiting = Vec::new();
    for _ in 0..30 {
        send = send.ready().await.unwrap();
        waiting.push(send.send_request(large("POST"), false).unwrap());
    }
    refused_at_last(&running, "connection_headers", 9).await;
    // Others are served, and so is who has had his answer.
    let reply = running.send("POST /topics/a", &[("x-large", &"v".repeat(6 << 10))], "x").await;
    assert_eq!(reply.status, 202);
    let mut statuses = Vec::new();
    for (answer, mut body) in waiting {
        // Nobody waits for the body of what was refused.
        let _ = body.send_data(Bytes::from_static(b"x"), true);
        statuses.push(soon(answer).await.unwrap().status().as_u16());
    }
    let taken = statuses.iter().take_while(|status| **status == 202).count();
    assert!((20..=21).contains(&taken) && statuses[taken..].iter().all(|status| *status == 503), "{statuses:?}");
    for _ in 0..30 {
        send = send.ready().await.unwrap();
        let (answer, mut body) = send.send_request(large("POST"), false).unwrap();
        body.send_data(Bytes::from_static(b"x"), true).unwrap();
        assert_eq!(soon(answer).await.unwrap().status(), 202);
    }
    assert_eq!(refused(&running, "connection_headers").await, 30 - taken as u64);
}

#[tokio::test]
async fn a_flood_of_continuations_is_cut_off() {
    // A head that never ends (CVE-2024-27316 and its kin).
    let running = Running::start().await;
    let mut stream = running.connect().await;
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    begin.extend(frame(4, 0, 0, &[]));
    // HEADERS without END_HEADERS: :method GET and no more.
    begin.extend(frame(1, 1, 1, &[0x82]));
    stream.write_all(&begin).await.unwrap();
    let (mut read, mut write) = stream.split();
    // Literal fields without indexing.
    let field = [&[0x00, 0x01, b'x', 0x7f, 0x80, 0x20][..], &[b'v'; 4_223]].concat();
    let flooding = async {
        for _ in 0..20_000 {
            write.write_all(&frame(9, 0, 1, &field)).await?;
        }
        std::io::Result::Ok(())
    };
    let mut heard = Vec::new();
    let ended = soon(async {
        tokio::select! {
            _ = read.read_to_end(&mut heard) => true,
            flooded = flooding => flooded.is_err(),
        }
    });
    let served = async { assert_eq!(running.get("/healthz").await.status, 200) };
    assert!(tokio::join!(ended, served).0, "80 MB of headers were taken");
    refused_at_last(&running, "flood", 1).await;
}

/// Each is taken as it comes, and some are answered: one connection kept a core busy, or filled the log.
#[tokio::test]
async fn a_flood_of_frames_that_ask_for_nothing_is_cut_off() {
    let running = limited(|_| {}).await;
    let floods = [
        ("WINDOW_UPDATE", frame(8, 0, 0, &[0, 0, 0, 1])),
        ("PRIORITY", frame(2, 0, 1, &[0, 0, 0, 0, 16])),
        ("SETTINGS", frame(4, 0, 0, &[])),
        ("PING", frame(6, 0, 0, &[0; 8])),
        ("PING that answers none", frame(6, 1, 0, &[0; 8])),
        ("unknown", frame(48, 0, 0, &[])),
    ];
    for (count, (name, flood)) in (1..).zip(floods) {
        let stream = running.connect().await;
        let (mut read, mut write) = stream.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
        write.write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat()).await.unwrap();
        let block = flood.repeat(100);
        let cut = soon(async {
            for _ in 0..2_000 {
                if write.write_all(&block).await.is_err() {
                    return true;
                }
            }
            false
        })
        .await;
        assert!(cut, "200,000 frames were taken: {name}");
        refused_at_last(&running, "flood", count).await;
        assert_eq!(running.get("/healthz").await.status, 200);
    }
}

/// Whoever floods and still listens is told what is wrong, as HTTP/2 has it said (RFC 9113, 7 and 10.5).
#[tokio::test]
async fn who_floods_is_told_to_be_calm() {
    let running = limited(|_| {}).await;
    for flood in [frame(8, 0, 0, &[0, 0, 0, 1]), frame(6, 0, 0, &[0; 8])] {
        let (mut read, mut write) = running.connect().await.into_split();
        let begin = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
        // GET /healthz, so that there is a stream.
        let path = b"/healthz";
        let head = [&[0x82, 0x86, 0x04, 8], &path[..], &[0x01, 9], b"localhost"].concat();
        write.write_all(&[begin, frame(1, 5, 7, &head)].concat()).await.unwrap();
        let (mut told, mut answered) = (None, false);
        soon(async {
            let mut head = [0; 9];
            while read.read_exact(&mut head).await.is_ok() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                let mut payload = vec![0; length as usize];
                read.read_exact(&mut payload).await.unwrap();
                assert!(told.is_none(), "it is the last");
                if head[3] == 0 && !answered {
                    answered = true;
                    write.write_all(&flood.repeat(6_000)).await.unwrap();
                }
                told = (head[3] == 7).then_some(payload);
            }
        })
        .await;
        let told = told.expect("no GOAWAY");
        assert_eq!(told, [0, 0, 0, 7, 0, 0, 0, 11], "the last stream, and ENHANCE_YOUR_CALM");
    }
    assert_eq!(refused(&running, "flood").await, 2);
}

/// Tells for each frame how much more it takes, and asks whether the other side is there.
#[tokio::test]
async fn a_reader_that_says_much_of_what_it_reads_is_no_flood() {
    let running = limited(|_| {}).await;
    running.put("big", r#"{"filter":"big"}"#).await;
    for _ in 0..9 {
        assert_eq!(running.post("/topics/big", &"x".repeat(900_000)).await.status, 202);
    }
    let (mut read, mut write) = running.connect().await.into_split();
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    begin.extend(frame(4, 0, 0, &[]));
    let path = "/subscriptions/big/pull";
    let length = u8::try_from(path.len()).unwrap();
    // POST.
    let head = [&[0x83, 0x86, 0x04, length], path.as_bytes(), &[0x01, 9], b"localhost"].concat();
    begin.extend(frame(1, 5, 1, &head));
    write.write_all(&begin).await.unwrap();
    let (mut frames, mut bytes, mut over) = (0, 0, false);
    soon(async {
        while !over {
            let mut head = [0; 9];
            read.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            read.read_exact(&mut vec![0; length as usize]).await.unwrap();
            match (head[3], head[4] & 1) {
                (0, last) => {
                    (frames, bytes, over) = (frames + 1, bytes + length, last == 1);
                    let window = length.max(1).to_be_bytes();
                    let said = [frame(8, 0, 0, &window), frame(8, 0, 1, &window), frame(6, 0, 0, &[1; 8])].concat();
                    write.write_all(&said).await.unwrap();
                }
                (6, 0) => write.write_all(&frame(6, 1, 0, &[0; 8])).await.unwrap(),
                _ => {}
            }
        }
    })
    .await;
    assert!(frames > 400 && bytes > 8_000_000, "{bytes} bytes in {frames} frames");
    assert_eq!(refused(&running, "flood").await, 0);
}

/// A connection that takes little before it is read from.
async fn narrow(running: &Running) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    soon(socket.connect(running.address)).await.unwrap()
}

/// Every place is taken, until those that do not read have lost theirs, each counted.
async fn is_served_at_last(running: &Running, cut: u64) {
    let mut stream = running.connect().await;
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(503, "too many connections");
    soon(async {
        loop {
            let mut stream = running.connect().await;
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
            let mut answer = Vec::new();
            if stream.read_to_end(&mut answer).await.is_ok() && answer.starts_with(b"HTTP/1.1 200") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    refused_at_last(running, "answer_timeout", cut).await;
}

#[tokio::test]
async fn a_peer_without_a_window_does_not_keep_its_connection_by_pings() {
    let running = limited(|limits| {
        limits.connections = 3;
        // The server pings so often, too.
        (limits.header_timeout, limits.body_timeout) = (Duration::from_millis(200), Duration::from_millis(500));
    })
    .await;
    for path in ["/openapi.json", "/healthz", "/topics/a/stream"] {
        let mut stream = running.connect().await;
        let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS_INITIAL_WINDOW_SIZE = 0.
        begin.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]));
        let length = u8::try_from(path.len()).unwrap();
        let head = [&[0x82, 0x86, 0x04, length], path.as_bytes(), &[0x01, 9], b"localhost"].concat();
        begin.extend(frame(1, 5, 1, &head));
        stream.write_all(&begin).await.unwrap();
        tokio::spawn(async move {
            let mut head = [0; 9];
            while stream.read_exact(&mut head).await.is_ok() {
                let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
                stream.read_exact(&mut payload).await?;
                match (head[3], head[4] & 1) {
                    (6, 0) => stream.write_all(&frame(6, 1, 0, &payload)).await?,
                    (4, 0) => stream.write_all(&frame(4, 1, 0, &[])).await?,
                    _ => {}
                }
            }
            std::io::Result::Ok(())
        });
    }
    is_served_at_last(&running, 3).await;
}

/// One stream that gets on does not keep the others' answers for ever.
#[tokio::test]
async fn a_stream_without_a_window_ends_its_connection_also_beside_one_that_is_read() {
    let running = limited(|limits| limits.body_timeout = Duration::from_millis(600)).await;
    let mut stream = running.connect().await;
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    begin.extend(frame(4, 0, 0, &[]));
    let path = "/topics/big/stream";
    let head = [&[0x82, 0x86, 0x04, 18], path.as_bytes(), &[0x01, 9], b"localhost"].concat();
    begin.extend(frame(1, 5, 1, &head));
    begin.extend(frame(1, 5, 3, &head));
    // The connection itself has a window for all.
    begin.extend(frame(8, 0, 0, &(1_u32 << 30).to_be_bytes()));
    stream.write_all(&begin).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let reading = tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    soon(async {
        while !running.get("/metrics").await.text().contains("broker_streams 2\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    for _ in 0..3 {
        assert_eq!(running.post("/topics/big", &"x".repeat(900_000)).await.status, 202);
    }
    let window = |stream: u32| frame(8, 0, stream, &16_384_u32.to_be_bytes());
    for _ in 0..25 {
        write.write_all(&[window(1), window(3)].concat()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!reading.is_finished(), "both are read");
    soon(async {
        while !reading.is_finished() {
            let _ = write.write_all(&window(3)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    refused_at_last(&running, "answer_timeout", 1).await;
}

/// A stream over HTTP/2 whose reader has a window for the greeting alone, once it has encoded its first frame.
async fn held_up(running: &Running, path: &str) -> TcpStream {
    let mut stream = running.connect().await;
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS_INITIAL_WINDOW_SIZE = 16.
    begin.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 16]));
    let length = u8::try_from(path.len()).unwrap();
    let head = [&[0x82, 0x86, 0x04, length], path.as_bytes(), &[0x01, 9], b"localhost"].concat();
    begin.extend(frame(1, 5, 1, &head));
    stream.write_all(&begin).await.unwrap();
    soon(async {
        while !running.get("/metrics").await.text().contains("broker_messages_streamed_total 1\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    stream
}

/// What a reader that leaves was never written comes back untried.
#[tokio::test]
async fn what_is_not_written_to_a_reader_costs_no_attempt() {
    let running = limited(|_| {}).await;
    running.put("q", r#"{"filter":"a","retry":{"initial":"1ms","max":"1ms"}}"#).await;
    for id in 0..3 {
        assert_eq!(running.post(&format!("/topics/a?id={id}"), &"x".repeat(100_000)).await.status, 202);
    }
    drop(held_up(&running, "/topics/a/stream?group=q").await);
    let mut attempts = Vec::new();
    while attempts.len() < 3 {
        attempts.extend(running.pull("q", "wait=20s").await.iter().map(|lease| lease.attempt));
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 1, 2]);
}

/// While others have asked for more than may be encoded, and read nothing, nothing is lent to who cannot be answered.
#[tokio::test]
async fn a_pull_that_waits_for_its_turn_costs_no_attempt() {
    let running = limited(|limits| limits.memory_bytes = 4 << 20).await;
    running.put("q", r#"{"filter":"a","timeout":"1s","retry":{"max_attempts":1}}"#).await;
    running.put("big", r#"{"filter":"big"}"#).await;
    assert_eq!(running.post("/topics/big", &"x".repeat(900_000)).await.status, 202);
    running.post("/topics/a?id=1", "x").await;
    let stream = held_up(&running, "/topics/big/stream?group=big").await;
    running.send("POST /subscriptions/q/pull", &[], "").await.is_problem(503, "not read");
    // Nor is anything listed, or changed that could not be told.
    let (listed, paused) = tokio::join!(running.get("/subscriptions"), running.post("/subscriptions/q/pause", ""));
    listed.is_problem(503, "not read");
    paused.is_problem(503, "not read");
    drop(stream);
    let leases = running.pull("q", "wait=20s").await;
    assert_eq!((leases.len(), leases[0].attempt), (1, 1));
}

/// The end of an answer waits for its stream's window when its body has ended.
#[tokio::test]
async fn the_end_of_an_answer_is_waited_for_no_longer_than_the_rest() {
    let running = limited(|limits| limits.body_timeout = Duration::from_millis(400)).await;
    let mut stream = running.connect().await;
    let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // SETTINGS_INITIAL_WINDOW_SIZE = 1.
    begin.extend(frame(4, 0, 0, &[0, 4, 0, 0, 0, 1]));
    for (number, path) in [(1, "/topics/a/stream"), (3, "/healthz")] {
        let length = u8::try_from(path.len()).unwrap();
        let head = [&[0x82, 0x86, 0x04, length], path.as_bytes(), &[0x01, 9], b"localhost"].concat();
        begin.extend(frame(1, 5, number, &head));
    }
    // The stream of events is read, and has nothing more to say.
    begin.extend(frame(8, 0, 1, &100_000_u32.to_be_bytes()));
    stream.write_all(&begin).await.unwrap();
    soon(tokio::io::copy(&mut stream, &mut tokio::io::sink())).await.unwrap();
    refused_at_last(&running, "answer_timeout", 1).await;
}

#[tokio::test]
async fn a_sender_of_lines_that_reads_no_results_is_cut() {
    let running = limited(|limits| (limits.connections, limits.body_timeout) = (2, Duration::from_millis(500))).await;
    let lines = "{\"payload\":1}\n".repeat(1_000);
    let chunk = format!("{:x}\r\n{lines}\r\n", lines.len());
    let mut senders = Vec::new();
    for _ in 0..2 {
        let mut stream = narrow(&running).await;
        stream
            .write_all(
                b"POST /topics/log HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
                accept: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n",
            )
            .await
            .unwrap();
        let chunk = chunk.clone();
        senders.push(tokio::spawn(async move { while stream.write_all(chunk.as_bytes()).await.is_ok() {} }));
    }
    is_served_at_last(&running, 2).await;
    for sender in senders {
        soon(sender).await.unwrap();
    }
}

/// Opens a stream of events, and publishes more than fits between here and there.
async fn flooded(running: &Running, mut stream: TcpStream) -> TcpStream {
    stream.write_all(b"GET /topics/big/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut stream, ": connected").await;
    let large = "x".repeat(1_000_000);
    for _ in 0..LARGE {
        assert_eq!(running.post("/topics/big", &large).await.status, 202);
    }
    stream
}

/// Messages of a megabyte.
const LARGE: usize = 14;

#[tokio::test]
async fn a_reader_of_events_that_does_not_read_is_cut_and_an_idle_one_is_not() {
    let running = limited(|limits| {
        (limits.connections, limits.streams, limits.body_timeout) = (3, 2, Duration::from_millis(500));
    })
    .await;
    let mut idle = running.connect().await;
    idle.write_all(b"GET /topics/idle/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut idle, ": connected").await;
    let _unread = flooded(&running, narrow(&running).await).await;
    running.get("/topics/a/stream").await.is_problem(429, "streams");
    refused_at_last(&running, "answer_timeout", 1).await;
    // Its place among the streams is free again too; the one that had nothing to read lives.
    let mut next = running.connect().await;
    next.write_all(b"GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    crate::support::read_until(&mut next, ": connected").await;
    assert_eq!(running.post("/topics/idle", "hello").await.json()["matched"], 1);
    crate::support::read_until(&mut idle, "id: ").await;
    assert_eq!(refused(&running, "answer_timeout").await, 1);
}

#[tokio::test]
async fn a_slow_reader_that_gets_on_is_not_cut() {
    let running = limited(|limits| limits.body_timeout = Duration::from_secs(1)).await;
    let events = async {
        let mut stream = flooded(&running, narrow(&running).await).await;
        let (mut piece, mut seen, mut rest) = (vec![0; 256 << 10], 0, Vec::new());
        while seen < LARGE {
            let read = soon(stream.read(&mut piece)).await.unwrap();
            assert!(read > 0, "it was cut after {seen} of {LARGE}");
            rest.extend_from_slice(&piece[..read]);
            seen += rest.windows(4).filter(|have| have == b"\nid:").count();
            rest.drain(..rest.len().saturating_sub(3));
            tokio::time::sleep(Duration::from_millis((read >> 12) as u64)).await;
        }
    };
    let document = async {
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(4 << 10);
        let (send, connection) = builder.handshake::<_, Bytes>(running.connect().await).await.unwrap();
        tokio::spawn(connection);
        let (answer, _) = send.ready().await.unwrap().send_request(get("/openapi.json"), true).unwrap();
        let mut body = soon(answer).await.unwrap().into_body();
        let mut read = 0;
        while let Some(data) = soon(body.data()).await {
            let length = data.expect("it was cut").len();
            read += length;
            tokio::time::sleep(Duration::from_millis(100)).await;
            body.flow_control().release_capacity(length).unwrap();
        }
        read
    };
    let read = document.await;
    events.await;
    assert_eq!(read, running.get("/openapi.json").await.body.len());
    assert_eq!(refused(&running, "answer_timeout").await, 0);
}

/// What is announced and never sent keeps nobody out.
#[tokio::test]
async fn bodies_count_as_they_come() {
    let running = limited(|limits| {
        (limits.memory_bytes, limits.topic_memory_bytes) = (1 << 20, 1 << 20);
    })
    .await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let mut silent = Vec::new();
    for path in ["topics/b", "subscriptions/q/settle"].repeat(20) {
        let mut stream = running.connect().await;
        let head = format!("POST /{path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 200000\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.post("/topics/a", &"x".repeat(100_000)).await.status, 202);
    let metrics = running.get("/metrics").await.text();
    let held = metrics.lines().find_map(|line| line.strip_prefix("broker_memory_bytes ")).unwrap();
    assert!(held.parse::<u64>().unwrap() < 200_000, "{held}");
}

/// What an identity has sent of bodies that never end is bounded by itself.
#[tokio::test]
async fn no_identity_takes_the_memory_of_all_by_sending_slowly() {
    let mut limits = Limits::default();
    (limits.memory_bytes, limits.topic_memory_bytes) = (1 << 20, 1 << 20);
    let identity = |name: &str| {
        let identity = Identity::new(name).unwrap().with_token(TokenHash::of(name));
        identity.allowing([Action::Publish, Action::Settle, Action::Admin], [">".parse().unwrap()])
    };
    let access = Access::new([identity("slow"), identity("good")]).unwrap();
    let running = Running::with(ServerOptions::new().with_limits(limits).with_access(access)).await;
    let good = [("authorization", "Bearer good")];
    assert_eq!(running.send("PUT /subscriptions/q", &good, r#"{"filter":"a"}"#).await.status, 201);
    let mut begun = Vec::new();
    for path in ["topics/b", "subscriptions/q/settle"].repeat(10) {
        let mut stream = running.connect().await;
        let head = format!(
            "POST /{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer slow\r\ncontent-length: 200000\r\n\r\n{{"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&[b' '; 100_000]).await.unwrap();
        begun.push(stream);
    }
    let line = "broker_refused_total{reason=\"bodies\"} ";
    soon(async {
        loop {
            let metrics = running.send("GET /metrics", &good, "").await.text();
            let refused = metrics.lines().find_map(|have| have.strip_prefix(line)).unwrap().parse::<u32>().unwrap();
            if refused >= 10 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let answer = running.send("POST /topics/a", &good, "x".repeat(200_000)).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
}

/// A page of much ends early, and goes on where it ended.
#[tokio::test]
async fn a_page_of_large_subscriptions_is_cut() {
    let running = Running::start().await;
    let values: Vec<_> = (0..200).map(|number| json!({"prefix": {"type": format!("{number:0250}")}})).collect();
    let spec = json!({"filter": "a", "filters": [{"any": values}]}).to_string();
    for number in 0..170 {
        assert_eq!(running.put(&format!("s{number:03}"), &spec).await.status, 201);
    }
    let (mut seen, mut next, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let reply = running.get(&format!("/subscriptions?limit=1000{next}")).await;
        assert!(reply.text().len() < 9 << 20);
        let page = reply.json();
        let names =
            page["subscriptions"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned());
        seen.extend(names);
        pages += 1;
        match page["next"].as_str() {
            Some(name) => next = format!("&next={name}"),
            None => break,
        }
    }
    assert_eq!((seen.len(), pages), (170, 2));
    assert!(seen.is_sorted());
}
