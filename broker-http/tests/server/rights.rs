//! What was let begin, when the rules change: nothing is handed over after that, and nothing settled.

use std::time::Duration;

use broker_core::{BrokerExt, Message as Published};
use broker_http::{Access, Action, Identity, ServerOptions, TokenHash};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::support::{Reply, Running, read_until, soon};

/// Somebody with a token who does all with some topics.
fn works(name: &str, token: &str, topics: &str) -> Identity {
    let all = [Action::Publish, Action::Subscribe, Action::Settle];
    Identity::new(name).unwrap().with_token(TokenHash::of(token)).allowing(all, [topics.parse().unwrap()])
}

fn access<const N: usize>(others: [Identity; N]) -> Access {
    let ops = Identity::new("ops").unwrap().with_token(TokenHash::of("ops"));
    let ops = ops.allowing([Action::Publish, Action::Subscribe, Action::Settle, Action::Admin], [">".parse().unwrap()]);
    Access::new([ops].into_iter().chain(others)).unwrap()
}

async fn guarded<const N: usize>(others: [Identity; N]) -> Running {
    Running::with(ServerOptions::new().with_access(access(others))).await
}

async fn ask(running: &Running, who: &str, request: &str, body: &str) -> Reply {
    running.send(request, &[("authorization", &format!("Bearer {who}"))], body).await
}

/// Publishes without letting anybody else run: what waits for it has not seen the change of the rules before it either.
async fn publish(running: &Running, topic: &str) {
    let message = Published::new("x").with_id("secret".parse().unwrap());
    running.server.broker().publish(&topic.parse().unwrap(), message).await.unwrap();
}

/// Waits until so many wait in a pull.
async fn waits(running: &Running, name: &str) {
    soon(async {
        while ask(running, "ops", &format!("GET /subscriptions/{name}"), "").await.json()["status"]["members"] != 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_pull_that_waits_ends_when_its_token_or_its_rule_is_taken_away() {
    for (who, status, says) in [("revoked", 401, "nobody here any more"), ("ruled", 403, "may not settle on orders.>")]
    {
        let running = guarded([works("revoked", "revoked", "orders.>"), works("ruled", "ruled", "orders.>")]).await;
        assert_eq!(ask(&running, who, "PUT /subscriptions/q", r#"{"filter":"orders.>"}"#).await.status, 201);
        let pull = ask(&running, who, "POST /subscriptions/q/pull?wait=5m", "");
        let change = async {
            waits(&running, "q").await;
            running
                .server
                .set_access(access([works("revoked", "rotated", "orders.>"), works("ruled", "ruled", "other")]));
            publish(&running, "orders.a").await;
        };
        let (pulled, ()) = tokio::join!(pull, change);
        pulled.is_problem(status, says);
        // It is there for who may, as if nobody had tried.
        let pulled = ask(&running, "ops", "POST /subscriptions/q/pull?wait=20s", "").await.json();
        assert_eq!(
            (&pulled["deliveries"][0]["attempt"], &pulled["deliveries"][0]["event"]["id"]),
            (&json!(1), &json!("secret"))
        );
    }
}

#[tokio::test]
async fn a_pull_that_waits_for_room_or_for_the_end_of_a_pause_ends_too() {
    for pause in [false, true] {
        let running = guarded([works("worker", "worker", "orders.>")]).await;
        let spec = r#"{"filter":"orders.>","max_in_flight":1}"#;
        assert_eq!(ask(&running, "worker", "PUT /subscriptions/q", spec).await.status, 201);
        if pause {
            assert_eq!(ask(&running, "worker", "POST /subscriptions/q/pause", "").await.status, 200);
        } else {
            publish(&running, "orders.a").await;
            let pulled = ask(&running, "worker", "POST /subscriptions/q/pull?wait=20s", "").await.json();
            assert_eq!(pulled["deliveries"].as_array().unwrap().len(), 1);
        }
        let mut waiting = running.connect().await;
        let head = "POST /subscriptions/q/pull?wait=5m HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer worker\r\n\
            connection: close\r\ncontent-length: 0\r\n\r\n";
        waiting.write_all(head.as_bytes()).await.unwrap();
        // Whether it waits already or comes to wait only now, its answer is the same.
        tokio::time::sleep(Duration::from_millis(50)).await;
        running.server.set_access(access([]));
        let mut answer = Vec::new();
        soon(waiting.read_to_end(&mut answer)).await.unwrap();
        Reply::parse(&answer).is_problem(401, "nobody");
    }
}

#[tokio::test]
async fn what_was_lent_is_not_settled_by_who_is_refused_now() {
    let running = guarded([works("worker", "worker", "orders.>")]).await;
    assert_eq!(ask(&running, "worker", "PUT /subscriptions/q", r#"{"filter":"orders.>"}"#).await.status, 201);
    publish(&running, "orders.a").await;
    let pulled = ask(&running, "worker", "POST /subscriptions/q/pull?wait=20s", "").await.json();
    let settle = json!({ "ack": [pulled["deliveries"][0]["lease"]] }).to_string();
    // The head is let in before the change, the body comes after it.
    let mut slow = running.connect().await;
    let head = format!(
        "POST /subscriptions/q/settle HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer worker\r\nexpect: 100-continue\r\n\
        connection: close\r\ncontent-length: {}\r\n\r\n",
        settle.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    read_until(&mut slow, "100 Continue\r\n\r\n").await;
    running.server.set_access(access([works("worker", "worker", "other")]));
    slow.write_all(settle.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(slow.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(403, "may not settle on orders.>");
    // Asked for anew, it is not even there for who may not see it any more.
    assert_eq!(ask(&running, "worker", "POST /subscriptions/q/settle", &settle).await.status, 404);
    let settled = ask(&running, "ops", "POST /subscriptions/q/settle", &settle).await.json();
    assert_eq!(settled["gone"], json!([]), "it was held all the while");
}

/// Whether a stream or a socket looks first at what came in or at the rules is up to chance: each is tried often.
const TRIES: usize = 20;

#[tokio::test]
async fn a_stream_writes_nothing_of_what_is_published_after_its_rule_is_gone() {
    for _ in 0..TRIES {
        let running = guarded([works("reader", "reader", "orders.>")]).await;
        let mut stream = running.connect().await;
        let head = "GET /topics/orders.a/stream HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer reader\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        read_until(&mut stream, ": connected").await;
        running.server.set_access(access([works("reader", "reader", "other")]));
        publish(&running, "orders.a").await;
        let heard = read_until(&mut stream, "0\r\n\r\n").await;
        assert!(!heard.contains("secret"), "{heard}");
    }
}

#[tokio::test]
async fn a_socket_lends_nothing_and_settles_nothing_after_its_rule_is_gone() {
    for attempt in 0..TRIES {
        let running = guarded([works("worker", "worker", "orders.>")]).await;
        let url = format!("ws://{}/topics/orders.a/stream?group=q", running.address);
        let mut request = url.into_client_request().unwrap();
        request.headers_mut().insert("authorization", "Bearer worker".parse().unwrap());
        let (mut socket, _) = soon(connect_async(request)).await.unwrap();
        soon(socket.send(Message::text(r#"{"credit":2}"#))).await.unwrap();
        let before = Published::new("x").with_id("before".parse().unwrap());
        running.server.broker().publish(&"orders.a".parse().unwrap(), before).await.unwrap();
        let lent = soon(async {
            loop {
                if let Message::Text(text) = socket.next().await.unwrap().unwrap() {
                    break serde_json::from_str::<Value>(&text).unwrap();
                }
            }
        })
        .await;
        let ack = json!({ "ack": [lent["deliveries"][0]["lease"]] });
        running.server.set_access(access([works("worker", "worker", "other")]));
        publish(&running, "orders.a").await;
        // What arrives now is not done.
        let _ = soon(socket.send(Message::text(ack.to_string()))).await;
        let mut heard = Vec::new();
        let code = soon(async {
            loop {
                match socket.next().await.unwrap().unwrap() {
                    Message::Close(frame) => break frame.unwrap().code,
                    other => heard.push(other.into_text().unwrap_or_default().to_string()),
                }
            }
        })
        .await;
        assert_eq!(u16::from(code), 1008);
        assert!(!heard.iter().any(|frame| frame.contains("secret")), "attempt {attempt}: {heard:?}");
        let mut back = Vec::new();
        while back.len() < 2 {
            let pulled = ask(&running, "ops", "POST /subscriptions/q/pull?wait=20s", "").await.json();
            assert_ne!(pulled["deliveries"], json!([]), "attempt {attempt}: one was settled, and not {back:?}");
            back.extend(pulled["deliveries"].as_array().unwrap().iter().map(|one| one["event"]["id"].clone()));
        }
    }
}
