//! Streams without a group: a copy of one's own, of brokers that bound no backlog.

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::TcpStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{Daemon, soon};
use crate::{server, unique};

/// Server-sent events, the subscription of which stands.
async fn events(daemon: &Daemon, filter: &str, header: &str) -> Lines<BufReader<TcpStream>> {
    let mut stream = soon(TcpStream::connect(daemon.address)).await.unwrap();
    let request = format!("GET /topics/{filter}/stream HTTP/1.1\r\nhost: {}\r\n{header}\r\n", daemon.address);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let status = soon(lines.next_line()).await.unwrap().unwrap();
    assert!(status.contains(" 200 "), "{status}");
    while soon(lines.next_line()).await.unwrap().unwrap() != ": connected" {}
    lines
}

/// What `id:` and `event:` say until this one has come.
async fn heads(lines: &mut Lines<BufReader<TcpStream>>, last: &str) -> Vec<String> {
    let mut heads: Vec<String> = Vec::new();
    while heads.last().is_none_or(|head| head != last) {
        let line = soon(lines.next_line()).await.unwrap().unwrap();
        heads.extend(Some(line).filter(|line| line.starts_with("id: ") || line.starts_with("event: ")));
    }
    heads
}

async fn publish(daemon: &Daemon, topic: &str, id: &str) {
    // One key, so that they have an order on every broker.
    assert_eq!(daemon.send(&format!("POST /topics/{topic}?id={id}&key=k"), "x").await.0, 202);
}

async fn events_come(kind: &str) {
    let daemon = Daemon::start(&["--broker", &server(kind)]).await;
    let topic = format!("{}.a", unique());
    publish(&daemon, &topic, "before").await;
    for filter in [topic.clone(), topic.replace(".a", ".%3E")] {
        let mut lines = events(&daemon, &filter, "").await;
        for id in ["one", "two", "three"] {
            publish(&daemon, &topic, id).await;
        }
        assert_eq!(heads(&mut lines, "id: three").await, ["id: one", "id: two", "id: three"], "{kind}");
        // Nothing is sought in what the server keeps: the reader is told of the gap, and goes on with what is new.
        let mut lines = events(&daemon, &filter, "last-event-id: one\r\n").await;
        publish(&daemon, &topic, "four").await;
        assert_eq!(heads(&mut lines, "id: four").await, ["event: gap", "id: four"], "{kind}");
    }
}

async fn a_socket_lends(kind: &str) {
    let daemon = Daemon::start(&["--broker", &server(kind)]).await;
    let topic = unique();
    publish(&daemon, &topic, "before").await;
    let connecting = connect_async(format!("ws://{}/topics/{topic}/stream", daemon.address));
    let (mut socket, answer) = soon(connecting).await.unwrap_or_else(|error| panic!("{kind}: {error}"));
    assert_eq!(answer.status(), 101);
    socket.send(Message::text(json!({ "credit": 2 }).to_string())).await.unwrap();
    for (id, credit) in [("one", 0), ("two", 1), ("three", 0)] {
        publish(&daemon, &topic, id).await;
        let frame: Value = soon(async {
            loop {
                if let Message::Text(text) = socket.next().await.unwrap().unwrap() {
                    return serde_json::from_str(&text).unwrap();
                }
            }
        })
        .await;
        assert_eq!(frame["deliveries"][0]["event"]["id"], id, "{kind}: {frame}");
        let lease = &frame["deliveries"][0]["lease"];
        socket.send(Message::text(json!({ "ack": [lease] }).to_string())).await.unwrap();
        socket.send(Message::text(json!({ "credit": credit }).to_string())).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_events_come() {
    events_come("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_events_come() {
    events_come("kafka").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_a_socket_lends() {
    a_socket_lends("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_socket_lends() {
    a_socket_lends("kafka").await;
}
