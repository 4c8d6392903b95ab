//! HTTP/2 without TLS, by prior knowledge.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::Message;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::frames::{ANY, Peer};
use crate::support::{Endpoint, QUICK, Rig, client, status, within};

#[tokio::test]
async fn all_requests_share_one_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (connections, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    tokio::spawn({
        let (connections, requests) = (Arc::clone(&connections), Arc::clone(&requests));
        async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Ordering::Relaxed);
                let requests = Arc::clone(&requests);
                let service = service_fn(move |request: hyper::Request<Incoming>| {
                    requests.fetch_add(1, Ordering::Relaxed);
                    async move {
                        assert_eq!(request.version(), hyper::Version::HTTP_2);
                        assert_eq!(request.headers()["broker-topic"], "orders.created");
                        request.into_body().collect().await.unwrap();
                        Ok::<_, Infallible>(hyper::Response::new(Full::<Bytes>::default()))
                    }
                });
                // It speaks no HTTP/1.
                tokio::spawn(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        }
    });
    let rig = Rig::new(&url, r#""http2":true,"retry":{"max_attempts":1}"#).await;
    rig.publish((0..100).map(|number: u32| Message::new(number.to_string()))).await;
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    assert_eq!((requests.load(Ordering::Relaxed), connections.load(Ordering::Relaxed)), (100, 1));
}

#[tokio::test]
async fn an_endpoint_that_speaks_only_http_1_is_a_failure_that_says_why() {
    let endpoint = Endpoint::new(|_| status(200)).await;
    let rig = Rig::new(&endpoint.url(), &format!(r#""http2":true,"timeout":"2s",{QUICK}"#)).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(!reason.is_empty(), "{reason}");
}

#[tokio::test]
async fn an_endpoint_that_refuses_every_stream_is_asked_a_few_times_an_attempt_and_not_without_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    tokio::spawn({
        let requests = Arc::clone(&requests);
        async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let requests = Arc::clone(&requests);
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((_request, mut respond))) = connection.accept().await {
                        requests.fetch_add(1, Ordering::Relaxed);
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    }
                });
            }
        }
    });
    let fields = r#""http2":true,"timeout":"2s","retry":{"max_attempts":3,"initial":"1ms","max":"2ms"}"#;
    let rig = Rig::new(&url, fields).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.starts_with("max_attempts (3)"), "{reason}");
    assert!(requests.load(Ordering::Relaxed) <= 12, "{requests:?} requests in 3 attempts");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_ends_connections_after_some_requests_costs_no_attempt() {
    const MESSAGES: usize = 5_000;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (connections, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    tokio::spawn({
        let (connections, answered) = (Arc::clone(&connections), Arc::clone(&answered));
        async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Ordering::Relaxed);
                let answered = Arc::clone(&answered);
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(lingering(stream)).await.unwrap();
                    let mut accepted = 0;
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        assert_eq!(request.headers()["broker-attempt"], "1");
                        answered.fetch_add(1, Ordering::Relaxed);
                        respond.send_response(hyper::Response::new(()), true).unwrap();
                        accepted += 1;
                        if accepted == 20 {
                            connection.graceful_shutdown();
                        }
                    }
                });
            }
        }
    });
    let rig = Rig::new(&url, r#""http2":true,"retry":{"max_attempts":1}"#).await;
    rig.publish((0..MESSAGES).map(|number| Message::new(number.to_string()))).await;
    rig.drained().await;
    let dead = rig.broker.dead_letters(&rig.group, 1000).await.unwrap();
    let reasons: Vec<_> = dead.iter().map(|dead| dead.failure.reason()).collect();
    assert!(reasons.is_empty(), "{reasons:?}");
    assert_eq!(answered.load(Ordering::Relaxed), MESSAGES);
    assert!(connections.load(Ordering::Relaxed) > 10, "{connections:?} connections");
}

#[tokio::test]
async fn an_endpoint_that_ends_every_connection_before_any_request_is_a_failed_attempt() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    tokio::spawn({
        let connections = Arc::clone(&connections);
        async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    // The preface (24 bytes) and whatever comes with it, then SETTINGS, and GOAWAY of last stream 0.
                    let (mut stream, mut preface) = (stream, [0; 24]);
                    stream.read_exact(&mut preface).await.unwrap();
                    let frames = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 8, 7, 0, 0, 0, 0, 0], &[0; 8]].concat();
                    stream.write_all(&frames).await.unwrap();
                    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                });
            }
        }
    });
    let rig = Rig::new(&url, r#""http2":true,"timeout":"5s","retry":{"max_attempts":1}"#).await;
    rig.publish_text("42").await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.contains("refused the request again and again"), "{reason}");
    assert!(connections.load(Ordering::Relaxed) <= 4, "{connections:?} connections in 1 attempt");
}

#[tokio::test]
async fn a_shared_connection_has_one_place_however_many_requests_go_over_it() {
    let client = client().with_max_connections(1);
    let (one, two) = (answering().await, answering().await);
    let one = Rig::with(&one, r#""http2":true,"retry":{"max_attempts":1}"#, &client).await;
    let two = Rig::with(&two, r#""http2":true,"retry":{"max_attempts":1}"#, &client).await;
    for rig in [&one, &two] {
        rig.publish((0..200).map(|number: u32| Message::new(number.to_string()))).await;
    }
    one.drained().await;
    two.drained().await;
    for rig in [&one, &two] {
        assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn what_is_sent_again_waits_for_a_place_as_anything_does() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let client = client().with_max_connections(1);
    let rig = Rig::with(&url, r#""http2":true,"timeout":"20s","retry":{"max_attempts":1}"#, &client).await;
    rig.publish(["1", "2", "3"].map(Message::new)).await;
    let mut first = within(Peer::accept(&listener)).await;
    assert_eq!(within(first.request()).await, Some(1));
    first.answer(1).await;
    // Two at a time now, of which the endpoint takes one.
    assert_eq!(within(first.request()).await, Some(3));
    assert_eq!(within(first.request()).await, Some(5));
    first.goaway(3).await;
    let early = tokio::time::timeout(Duration::from_millis(300), listener.accept()).await;
    assert!(early.is_err(), "a second connection where there may be one");
    first.answer(3).await;
    let mut second = within(Peer::accept(&listener)).await;
    assert_eq!(within(second.request()).await, Some(1));
    second.answer(1).await;
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
}

/// Three messages for an endpoint that answers one, takes the other two at a time on streams 3 and 5, and does `end`
/// then; what it does with its next connection is for the caller.
async fn ending(end: impl AsyncFnOnce(&mut Peer)) -> (Rig, TcpListener, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let rig = Rig::new(&url, r#""http2":true,"timeout":"20s","retry":{"max_attempts":1}"#).await;
    rig.publish(["1", "2", "3"].map(Message::new)).await;
    let mut peer = within(Peer::accept(&listener)).await;
    assert_eq!(within(peer.request()).await, Some(1));
    peer.answer(1).await;
    assert_eq!(within(peer.request()).await, Some(3));
    assert_eq!(within(peer.request()).await, Some(5));
    within(end(&mut peer)).await;
    (rig, listener, peer)
}

#[tokio::test]
async fn what_a_goaway_leaves_out_is_sent_elsewhere_and_what_it_takes_is_waited_for() {
    for warned in [false, true] {
        let (rig, listener, mut peer) = ending(async |peer: &mut Peer| {
            if warned {
                peer.goaway(ANY).await;
                assert_eq!(peer.ping().await, [0; 0], "nothing is sent after the warning");
            }
            peer.goaway(3).await;
        })
        .await;
        let mut next = within(Peer::accept(&listener)).await;
        assert_eq!(within(next.request()).await, Some(1), "the one of stream 5");
        next.answer(1).await;
        rig.until(async || rig.lag().await == 1).await;
        peer.answer(3).await;
        rig.drained().await;
        assert_eq!(within(peer.request()).await, None, "the connection is over");
        assert_eq!(rig.push.attempts().len(), 3);
        assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn what_was_taken_after_a_warning_is_waited_for_and_what_comes_later_goes_elsewhere() {
    let (rig, listener, mut peer) = ending(async |peer: &mut Peer| peer.goaway(ANY).await).await;
    peer.ping().await;
    rig.publish_text("4").await;
    peer.answer(5).await;
    let mut next = within(Peer::accept(&listener)).await;
    assert_eq!(within(next.request()).await, Some(1));
    next.answer(1).await;
    rig.until(async || rig.lag().await == 1).await;
    peer.goaway(5).await;
    peer.answer(3).await;
    rig.drained().await;
    assert_eq!(within(peer.request()).await, None);
    assert_eq!(rig.push.attempts().len(), 4);
}

#[tokio::test]
async fn what_was_taken_and_is_not_answered_is_sent_again_once() {
    // The connection ends without what it took: it may have been seen.
    let (rig, listener, peer) = ending(async |peer: &mut Peer| peer.goaway(5).await).await;
    drop(peer);
    for _ in 0..2 {
        let mut next = within(Peer::accept(&listener)).await;
        let stream = within(next.request()).await.unwrap();
        next.goaway(stream).await;
    }
    assert_eq!(rig.dead(2).await.len(), 2);
}

#[tokio::test]
async fn a_connection_whose_other_end_reads_nothing_is_closed_all_the_same() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let batch = r#""mode":"batch","batch":{"max":8,"wait":"1s"}"#;
    let rig = Rig::new(&url, &format!(r#"{batch},"http2":true,"timeout":"200ms","retry":{{"max_attempts":1}}"#)).await;
    // More than the sockets hold between them.
    rig.publish((0..8).map(|_| Message::new(vec![b'x'; 1_000_000]))).await;
    let mut peer = within(Peer::accept(&listener)).await;
    peer.widen().await;
    assert!(rig.dead(8).await.remove(0).failure.reason().ends_with("timed out after 200ms"));
    // It reads nothing, and so learns of the end only by what it writes.
    within(async {
        while peer.nudge().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// An endpoint that answers 200 to everything.
async fn answering() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(async |request: hyper::Request<Incoming>| {
                request.into_body().collect().await.unwrap();
                Ok::<_, Infallible>(hyper::Response::new(Full::<Bytes>::default()))
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    });
    url
}

/// The stream, which reads on after the server has let go of it: closing with something unread would reset the
/// connection, and take the answers on their way with it.
fn lingering(stream: TcpStream) -> tokio::io::DuplexStream {
    let (near, far) = tokio::io::duplex(64 << 10);
    let ((mut from_peer, mut to_peer), (mut from_near, mut to_near)) = (stream.into_split(), tokio::io::split(far));
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_near, &mut to_peer).await;
        let _ = to_peer.shutdown().await;
    });
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_peer, &mut to_near).await;
        let _ = tokio::io::copy(&mut from_peer, &mut tokio::io::sink()).await;
    });
    near
}
