//! The stream as a WebSocket.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::support::{Running, read_until, soon};

/// What a client says first.
const OPENING: &str = "GET /topics/a/stream HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n\r\n";

struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    async fn open(running: &Running, path: &str) -> Self {
        let (socket, answer) = soon(connect_async(format!("ws://{}{path}", running.address))).await.unwrap();
        assert_eq!(answer.status(), 101);
        Self(socket)
    }

    async fn say(&mut self, frame: Value) {
        soon(self.0.send(Message::text(frame.to_string()))).await.unwrap();
    }

    /// The next frame of JSON; `None` at the end.
    async fn hear(&mut self) -> Option<Value> {
        soon(async {
            loop {
                match self.0.next().await? {
                    Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).unwrap()),
                    Ok(Message::Ping(_) | Message::Pong(_)) => {}
                    Ok(Message::Close(_)) | Err(_) => return None,
                    Ok(other) => panic!("{other:?}"),
                }
            }
        })
        .await
    }

    /// Deliveries until there are `count`.
    async fn deliveries(&mut self, count: usize) -> Vec<Value> {
        let mut all = Vec::new();
        while all.len() < count {
            let frame = self.hear().await.unwrap();
            all.extend(frame["deliveries"].as_array().unwrap_or_else(|| panic!("{frame}")).clone());
        }
        all
    }
}

#[tokio::test]
async fn a_paused_subscription_lends_nothing_until_it_is_resumed() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 10})).await;
    running.post("/topics/a?id=1", "x").await;
    let first = socket.deliveries(1).await;
    running.post("/subscriptions/q/pause", "").await;
    running.post("/topics/a?id=2", "x").await;
    // What is lent can be settled.
    socket.say(json!({"ack": [first[0]["lease"]]})).await;
    soon(async {
        while running.get("/subscriptions/q").await.json()["status"]["lag"] != 1 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let heard = tokio::time::timeout(std::time::Duration::from_millis(500), socket.hear()).await;
    assert!(heard.is_err(), "{heard:?}");
    running.post("/subscriptions/q/resume", "").await;
    assert_eq!(socket.deliveries(1).await[0]["event"]["id"], "2");
}

#[tokio::test]
async fn credit_decides_how_much_is_sent() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","retry":{"initial":"1ms","max":"1ms"}}"#).await;
    for id in 0..10 {
        running.post(&format!("/topics/a?id={id}"), "x").await;
    }
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 3})).await;
    let first = socket.deliveries(3).await;
    assert_eq!(first.iter().map(|delivery| delivery["event"]["id"].clone()).collect::<Vec<_>>(), ["0", "1", "2"]);
    // Without credit nothing comes; with it, the rest, and what was given back.
    socket.say(json!({"ack": [first[0]["lease"], first[1]["lease"]], "retry": [{"lease": first[2]["lease"]}]})).await;
    socket.say(json!({"credit": 100})).await;
    let rest = socket.deliveries(8).await;
    let again = rest.iter().find(|delivery| delivery["event"]["id"] == "2").unwrap();
    assert_eq!(again["attempt"], 2);
    let leases: Vec<_> = rest.iter().map(|delivery| delivery["lease"].clone()).collect();
    socket.say(json!({"ack": leases})).await;
    socket.say(json!({"ack": [first[0]["lease"]]})).await;
    assert_eq!(socket.hear().await.unwrap(), json!({"gone": [first[0]["lease"]]}));
    assert_eq!(running.get("/subscriptions/q").await.json()["status"]["lag"], 0);
}

#[tokio::test]
async fn what_is_not_settled_when_it_closes_comes_back() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    running.post("/topics/a?id=1", "x").await;
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q&timeout=1h").await;
    socket.say(json!({"credit": 1})).await;
    assert_eq!(socket.deliveries(1).await[0]["attempt"], 1);
    drop(socket);
    // A lost connection is no attempt.
    assert_eq!(running.pull("q", "wait=20s").await[0].attempt, 1);
}

#[tokio::test]
async fn a_lease_is_as_long_as_the_subscription_says() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","timeout":"300ms"}"#).await;
    running.post("/topics/a?id=1", "x").await;
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 2})).await;
    let first = socket.deliveries(1).await.remove(0);
    assert_eq!(first["attempt"], 1);
    let again = socket.deliveries(1).await.remove(0);
    assert_eq!(again["attempt"], 2);
    socket.say(json!({"ack": [first["lease"]]})).await;
    assert_eq!(socket.hear().await.unwrap()["gone"], json!([first["lease"]]));
    socket.say(json!({"ack": [again["lease"]]})).await;
}

#[tokio::test]
async fn without_a_group_it_has_a_copy_of_its_own() {
    let running = Running::start().await;
    let mut socket = Socket::open(&running, "/topics/a.%3E/stream").await;
    assert_eq!(running.post("/topics/a.b", "x").await.json()["matched"], 1);
    socket.say(json!({"credit": 1})).await;
    let delivery = socket.deliveries(1).await.remove(0);
    assert_eq!(delivery["event"]["brokertopic"], "a.b");
    socket.say(json!({"ack": [delivery["lease"]]})).await;
    socket.0.close(None).await.unwrap();
    soon(async {
        while running.post("/topics/a.b", "x").await.json()["matched"] != 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let running = Running::start().await;
    let mut socket = Socket::open(&running, "/topics/a/stream").await;
    for (frame, named) in [
        (json!({"credits": 1}), "credits"),
        (json!({"credit": -1}), "credit: invalid value: integer `-1`"),
        (json!({"credit": null}), "credit: invalid type: null"),
        (json!({"credit": 1, "rate": 2}), "unknown field `rate`, expected `credit`"),
        (json!({"retry": [{"lease": "x", "delai": "1s"}]}), "retry[0].delai"),
        (json!({"extend": [{"lease": "x", "for": "0s"}]}), "extend[0].for"),
        (json!([]), "an object is expected"),
        (json!([1]), "an object is expected"),
        (json!(1), "invalid type: integer `1`"),
    ] {
        socket.say(frame).await;
        let answer = socket.hear().await.unwrap();
        assert!(answer["error"]["detail"].as_str().unwrap().contains(named), "{answer}");
    }
    for (path, status) in
        [("/topics/a..b/stream", 400), ("/topics/a/stream?timeout=0s", 400), ("/topics/a/stream?x=1", 400)]
    {
        let refused = soon(connect_async(format!("ws://{}{path}", running.address))).await.unwrap_err();
        assert!(
            matches!(&refused, tokio_tungstenite::tungstenite::Error::Http(answer) if answer.status() == status),
            "{refused}"
        );
    }
    let reply = running.send("GET /topics/a/stream", &[("upgrade", "websocket")], "").await;
    reply.is_problem(400, "WebSocket");
}

#[tokio::test]
async fn a_drain_says_goodbye() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    running.post("/topics/a", "x").await;
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 1})).await;
    let delivery = socket.deliveries(1).await.remove(0);
    let server = running.server.clone();
    let draining = tokio::spawn(async move { server.drain(std::time::Duration::from_secs(20)).await });
    soon(async {
        while running.get("/readyz").await.status != 503 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    // What is lent can still be settled.
    socket.say(json!({"ack": [delivery["lease"]]})).await;
    assert!(socket.hear().await.is_none());
    let report = soon(draining).await.unwrap();
    assert!(report.complete && report.in_flight == 0, "{report:?}");
}

/// The close code heard last, and whether the connection ended as the protocol says.
async fn ending(socket: &mut Socket) -> (Option<u16>, bool) {
    soon(async {
        let mut code = None;
        loop {
            match socket.0.next().await {
                Some(Ok(Message::Close(frame))) => code = frame.map(|frame| frame.code.into()),
                Some(Ok(_)) => {}
                Some(Err(_)) => return (code, false),
                None => return (code, true),
            }
        }
    })
    .await
}

#[tokio::test]
async fn an_end_is_said_and_answered() {
    let running = Running::start().await;
    let mut socket = Socket::open(&running, "/topics/a/stream").await;
    let frame = CloseFrame { code: CloseCode::Normal, reason: "done".into() };
    soon(socket.0.send(Message::Close(Some(frame)))).await.unwrap();
    assert_eq!(ending(&mut socket).await, (Some(1000), true));
    // What cannot be read is told: a reserved opcode, a text that is no UTF-8, a frame of 2 MiB.
    for (frame, code) in [
        (&[0x83, 0x80, 0, 0, 0, 0][..], 1002),
        (&[0x81, 0x81, 0, 0, 0, 0, 0xff], 1007),
        (&[0x82, 0xff, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0], 1009),
    ] {
        let mut socket = Socket::open(&running, "/topics/a/stream").await;
        let stream = match socket.0.get_mut() {
            MaybeTlsStream::Plain(stream) => stream,
            other => panic!("{other:?}"),
        };
        soon(stream.write_all(frame)).await.unwrap();
        assert_eq!(ending(&mut socket).await.0, Some(code));
    }
    let mut socket = Socket::open(&running, "/topics/a/stream").await;
    let server = running.server.clone();
    let draining = tokio::spawn(async move { server.drain(std::time::Duration::from_secs(20)).await });
    assert_eq!(ending(&mut socket).await, (Some(1001), true));
    soon(draining).await.unwrap();
}

/// The server is not drained before: the daemon ends its process next.
#[tokio::test]
async fn a_drain_is_over_once_goodbye_is_said() {
    let running = Running::start().await;
    let mut sockets = Vec::new();
    for _ in 0..20 {
        let mut stream = running.connect().await;
        stream.write_all(OPENING.as_bytes()).await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        sockets.push(stream);
    }
    soon(running.server.drain(std::time::Duration::from_secs(20))).await;
    for socket in sockets {
        // Nothing else of this thread runs while it reads.
        let mut socket = socket.into_std().unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let mut heard = Vec::new();
        std::io::Read::read_to_end(&mut socket, &mut heard).unwrap();
        assert!(memchr::memmem::find(&heard, &1001_u16.to_be_bytes()).is_some(), "{heard:?}");
    }
}

/// One large message comes in fragments, and several in several frames.
#[tokio::test]
async fn what_is_large_comes_in_parts() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let body = "x".repeat(500_000);
    for _ in 0..3 {
        assert_eq!(running.post("/topics/a", &body).await.status, 202);
    }
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 3})).await;
    let mut leases = Vec::new();
    for _ in 0..3 {
        let frame = socket.hear().await.unwrap();
        let deliveries = frame["deliveries"].as_array().unwrap();
        assert_eq!(deliveries.len(), 1);
        assert_eq!(deliveries[0]["event"]["data_base64"].as_str().unwrap().len(), 500_000_usize.div_ceil(3) * 4);
        leases.push(deliveries[0]["lease"].clone());
    }
    // The subscription's numbers are of all who take from it.
    let status = running.get("/subscriptions/q").await.json()["status"].clone();
    assert_eq!((&status["in_flight"], &status["last_success"]), (&json!(3), &Value::Null));
    socket.say(json!({"ack": leases})).await;
    soon(async {
        loop {
            let status = running.get("/subscriptions/q").await.json()["status"].clone();
            if status["in_flight"] == 0 && status["last_success"].is_string() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// As it comes over the wire: no fragment is large.
#[tokio::test]
async fn fragments_are_bounded() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    assert_eq!(running.post("/topics/a", &"x".repeat(500_000)).await.status, 202);
    let mut stream = running.connect().await;
    stream.write_all(OPENING.replace("stream", "stream?group=q").as_bytes()).await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    stream.write_all(b"\x81\x8c\0\0\0\0{\"credit\":9}").await.unwrap();
    let mut text = Vec::new();
    loop {
        let mut head = [0; 2];
        soon(stream.read_exact(&mut head)).await.unwrap();
        let length = match head[1] {
            126 => u64::from(soon(stream.read_u16()).await.unwrap()),
            127 => soon(stream.read_u64()).await.unwrap(),
            length => u64::from(length),
        };
        assert!(length <= 64 << 10, "{length}");
        let mut payload = vec![0; length as usize];
        soon(stream.read_exact(&mut payload)).await.unwrap();
        if head[0] & 0x0f == 9 {
            // A ping, which may come between.
            continue;
        }
        assert_eq!(head[0] & 0x0f, u8::from(text.is_empty()), "text, then continuations");
        text.extend(payload);
        if head[0] & 0x80 != 0 {
            break;
        }
    }
    assert_eq!(serde_json::from_slice::<Value>(&text).unwrap()["deliveries"].as_array().unwrap().len(), 1);
}

/// The code that a socket is closed with, which sends these as fast as it can.
async fn closed_with(mut socket: Socket, frames: impl Iterator<Item = Message>) -> Option<CloseCode> {
    let (mut write, mut read) = (&mut socket.0).split();
    let flooding = async {
        for frame in frames {
            if write.send(frame).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let closing = async {
        loop {
            match read.next().await {
                Some(Ok(Message::Close(frame))) => return frame.map(|frame| frame.code),
                Some(Ok(_)) => {}
                _ => return None,
            }
        }
    };
    soon(async {
        tokio::select! { code = closing => code, () = flooding => None }
    })
    .await
}

#[tokio::test]
async fn a_flood_of_frames_that_settle_nothing_ends_its_socket() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","max_in_flight":5000}"#).await;
    let floods = [
        Message::Ping("x".into()),
        Message::text(r#"{"credit":0}"#),
        Message::text("{}"),
        Message::text(r#"{"ack":["gone"]}"#),
        Message::text("what?"),
    ];
    for (number, frame) in floods.into_iter().enumerate() {
        let socket = Socket::open(&running, "/topics/a/stream?group=q").await;
        let code = closed_with(socket, std::iter::repeat_n(frame.clone(), 100_000)).await;
        assert_eq!(code, Some(CloseCode::Policy), "{frame:?}");
        let metrics = running.get("/metrics").await.text();
        assert!(metrics.contains(&format!("refused_total{{reason=\"flood\"}} {}\n", number + 1)), "{metrics}");
    }
    // Who is lent much says much.
    let lines: String = (0..3_000).map(|number| format!("{{\"payload\":{number}}}\n")).collect();
    running.send("POST /topics/a", &[("content-type", "application/x-ndjson")], lines).await;
    let mut socket = Socket::open(&running, "/topics/a/stream?group=q").await;
    socket.say(json!({"credit": 3_000})).await;
    for delivery in socket.deliveries(3_000).await {
        socket.say(json!({"credit": 1})).await;
        socket.say(json!({"ack": [delivery["lease"]]})).await;
    }
    socket.say(json!({"ack": ["gone"]})).await;
    assert_eq!(socket.hear().await.unwrap()["gone"], json!(["gone"]));
}
