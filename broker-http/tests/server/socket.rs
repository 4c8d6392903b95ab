//! The stream as a WebSocket.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::support::{Running, soon};

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
        (json!({"credit": -1}), "credit"),
        (json!({"extend": [{"lease": "x", "for": "0s"}]}), "extend[0].for"),
        (json!([1]), "frame"),
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
