//! Publishing to a peer that misbehaves.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, BrokerExt, ErrorKind, Message, MessageId, PublisherOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::peer::{Peer, Then, accepted, answer, response};
use super::{broker, soon, topic};

#[tokio::test]
async fn a_kept_connection_that_closes_without_a_byte_is_tried_once_more() {
    let peer = Peer::start(|index, _| if index == 1 { Then::Close } else { accepted("a") }).await;
    let broker = broker(peer.address, "");
    soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap();
    soon(broker.publish(&topic("t"), Message::new("2"))).await.unwrap();
    let seen = peer.seen();
    assert_eq!(seen.iter().map(|seen| seen.connection).collect::<Vec<_>>(), [0, 0, 1]);
    assert_eq!(seen[1].body, seen[2].body);
}

#[tokio::test]
async fn a_new_connection_that_closes_leaves_the_outcome_unknown() {
    let peer = Peer::start(|_, _| Then::Close).await;
    let broker = broker(peer.address, "");
    let error = soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.is_retryable() && error.message().contains("unknown"), "{error}");
    assert_eq!(peer.seen().len(), 1, "it must not be published twice in silence");
}

#[tokio::test]
async fn what_was_lost_on_a_kept_connection_is_unknown_where_it_cannot_be_tried_once_more() {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let peer = Peer::start(move |index, _| match index {
        0 => accepted("a"),
        _ => Then::After(Arc::clone(&opened), Box::new(Then::Close)),
    })
    .await;
    let broker = broker(peer.address, "timeout=2s");
    soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap();
    let publisher = broker.publisher(&topic("t"), PublisherOptions::new()).unwrap();
    let second = publisher.publish(Message::new("2"));
    peer.requests(2).await;
    peer.stop().await;
    gate.notify_one();
    let error = soon(second).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("unknown"), "{error}");
}

#[tokio::test]
async fn a_kept_connection_that_is_seen_to_be_closed_is_not_used() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            stream.write_all(&response(202, r#"{"id":"a","topic":"t"}"#)).await.unwrap();
            // Not before the answer was read.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let broker = broker(address, "");
    soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    soon(broker.publish(&topic("t"), Message::new("2"))).await.unwrap();
    assert_eq!(broker.shared.http.losses(), 0, "nothing was sent on it");
}

#[tokio::test]
async fn an_answer_cut_short_is_not_tried_again() {
    let cut = b"HTTP/1.1 202 Accepted\r\ncontent-length: 100\r\n\r\n{\"id\"".to_vec();
    let peer = Peer::start(move |index, _| if index == 0 { accepted("a") } else { Then::Raw(cut.clone()) }).await;
    let broker = broker(peer.address, "");
    soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap();
    let error = soon(broker.publish(&topic("t"), Message::new("2"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(peer.seen().len(), 2);
}

#[tokio::test]
async fn a_full_group_says_when_to_try_again() {
    let problem = r#"{"status":503,"kind":"unavailable","detail":"group a@t is full"}"#;
    let full = format!("HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: {}\r\n\r\n{problem}", problem.len());
    let peer = Peer::start(move |_, _| Then::Raw(full.clone().into_bytes())).await;
    let error = soon(broker(peer.address, "").publish(&topic("t"), Message::new("1"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    assert!(error.message().contains("group a@t is full"), "{error}");
}

#[tokio::test]
async fn answers_that_make_no_sense_are_backend_errors() {
    let endless = {
        let mut bytes = b"HTTP/1.1 202 X\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        for _ in 0..100 {
            bytes.extend_from_slice(b"10000\r\n");
            bytes.extend_from_slice(&vec![b'x'; 0x10000]);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes
    };
    for raw in [
        response(202, "<html>"),
        response(202, r#"{"id":""}"#),
        response(200, "[]"),
        response(302, ""),
        b"HTTP/1.1 202 X\r\ncontent-length: 1099511627776\r\n\r\n".to_vec(),
        endless,
    ] {
        let shown = String::from_utf8_lossy(&raw[..raw.len().min(60)]).into_owned();
        let peer = Peer::start(move |_, _| Then::Raw(raw.clone())).await;
        let error = soon(broker(peer.address, "").publish(&topic("t"), Message::new("1"))).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Backend | ErrorKind::Invalid), "{shown}: {error}");
    }
    let peer = Peer::start(|_, _| Then::Raw(b"SSH-2.0-OpenSSH\r\n".to_vec())).await;
    let error = soon(broker(peer.address, "").publish(&topic("t"), Message::new("1"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_a_timeout() {
    let peer = Peer::start(|_, _| Then::Hang).await;
    let broker = broker(peer.address, "timeout=100ms");
    let error = soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("unknown"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_told_at_once() {
    let address = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let broker = broker(address, "");
    for error in [
        soon(broker.connect()).await.unwrap_err(),
        soon(broker.publish(&topic("t"), Message::new("1"))).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().contains("cannot connect"), "{error}");
        assert!(!format!("{error:?} {broker:?}").contains("hunter2"));
    }
}

#[tokio::test]
async fn what_queues_up_goes_together_in_order() {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let peer = Peer::start(move |index, seen| match index {
        0 => Then::Gated(Arc::clone(&opened), 202, r#"{"id":"0","topic":"t"}"#.to_owned()),
        _ => {
            let ids = seen.json().as_array().unwrap().clone();
            let results: Vec<_> = ids.iter().map(|event| serde_json::json!({ "id": event["id"] })).collect();
            answer(202, &serde_json::json!({ "results": results }).to_string())
        }
    })
    .await;
    let broker = broker(peer.address, "");
    let publisher = broker.publisher(&topic("t"), PublisherOptions::new()).unwrap();
    let first = publisher.publish(Message::new("0"));
    peer.requests(1).await;
    let message = |n: u32| Message::new(n.to_string()).with_id(n.to_string().parse::<MessageId>().unwrap());
    let second = publisher.publish(message(1));
    drop(publisher.publish(message(2)));
    let batch = publisher.publish_batch(vec![message(3), message(4)]);
    let last = publisher.publish(message(5));
    gate.notify_one();
    assert_eq!(soon(first).await.unwrap().id.to_string(), "0");
    assert_eq!(soon(second).await.unwrap().id.to_string(), "1");
    let batch: Vec<_> = soon(batch).await.unwrap().into_iter().map(|result| result.unwrap().id.to_string()).collect();
    assert_eq!(batch, ["3", "4"]);
    assert_eq!(soon(last).await.unwrap().id.to_string(), "5");
    let seen = peer.seen();
    assert_eq!(seen.len(), 2);
    let ids: Vec<_> = seen[1].json().as_array().unwrap().iter().map(|event| event["id"].clone()).collect();
    assert_eq!(ids, ["1", "3", "4", "5"], "the one dropped before it was sent is withdrawn");
}

#[tokio::test]
async fn a_batch_answered_short_fails_every_message_of_it() {
    let peer = Peer::start(|_, _| answer(207, r#"{"results":[{"id":"1"}]}"#)).await;
    let broker = broker(peer.address, "");
    let results = soon(broker.publish_batch(&topic("t"), vec![Message::new("1"), Message::new("2")])).await.unwrap();
    assert_eq!(results.len(), 2);
    for result in results {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Backend);
    }
}

#[tokio::test]
async fn a_batch_fails_message_by_message() {
    let results =
        r#"{"results":[{"id":"1","matched":0},{"error":{"status":413,"kind":"too large","detail":"too big"}}]}"#;
    let peer = Peer::start(move |_, _| answer(207, results)).await;
    let broker = broker(peer.address, "");
    let results = soon(broker.publish_batch(&topic("t"), vec![Message::new("1"), Message::new("2")])).await.unwrap();
    assert_eq!(results[0].as_ref().unwrap().routed, Some(false));
    assert_eq!(results[1].as_ref().unwrap_err().kind(), ErrorKind::TooLarge);
}

#[tokio::test]
async fn a_publish_dropped_while_the_daemon_waits_is_taken_back() {
    let peer = Peer::start(|index, _| if index == 0 { Then::Hang } else { accepted("b") }).await;
    let broker = broker(peer.address, "");
    let publisher = broker.publisher(&topic("t"), PublisherOptions::new()).unwrap();
    let first = publisher.publish(Message::new("a"));
    peer.requests(1).await;
    drop(first);
    // The peer's side of the first connection sees the end of it, which lets the next one go.
    soon(publisher.publish(Message::new("b"))).await.unwrap();
    assert_eq!(peer.seen().len(), 2);
}

#[tokio::test]
async fn closing_is_bounded_and_tells_what_stayed() {
    let peer = Peer::start(|_, _| Then::Hang).await;
    let broker = broker(peer.address, "");
    let publisher = broker.publisher(&topic("t"), PublisherOptions::new()).unwrap();
    let (sent, queued) = (publisher.publish(Message::new("1")), publisher.publish(Message::new("2")));
    peer.requests(1).await;
    let report = soon(broker.close(Duration::from_millis(100))).await;
    assert!(!report.complete);
    assert_eq!(report.unconfirmed, 2);
    assert_eq!(soon(broker.close(Duration::ZERO)).await, report);
    for publish in [sent, queued, publisher.publish(Message::new("3"))] {
        assert_eq!(soon(publish).await.unwrap_err().kind(), ErrorKind::Closed);
    }
    assert_eq!(soon(broker.connect()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn what_did_not_leave_is_sent_once_the_daemon_is_back() {
    let ready = b"HTTP/1.1 200 X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_vec();
    let peer = Peer::start(move |_, _| Then::Raw(ready.clone())).await;
    let broker = broker(peer.address, "");
    soon(broker.connect()).await.unwrap();
    let address = peer.stop().await;
    let publish = broker.publish(&topic("t"), Message::new("1"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!publish.is_ready());
    let listener = soon(async {
        loop {
            match tokio::net::TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await;
    let peer = Peer::on(listener, |_, _| accepted("a"));
    soon(publish).await.unwrap();
    assert_eq!(peer.seen().len(), 1);
}
