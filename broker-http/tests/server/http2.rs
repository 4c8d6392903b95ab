//! HTTP/2 with prior knowledge.

use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;

use crate::support::{Running, soon};

#[tokio::test]
async fn many_requests_share_a_connection() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":">","max_in_flight":100}"#).await.status, 201);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(running.connect().await))
            .await
            .unwrap();
    tokio::spawn(connection);
    let publishes: Vec<_> = (0..100)
        .map(|number: u32| {
            let mut sender = sender.clone();
            let request = Request::post(format!("http://{}/topics/a?id={number}", running.address))
                .header("content-type", "text/plain")
                .body(Full::new(Bytes::from("hi")))
                .unwrap();
            tokio::spawn(async move { sender.send_request(request).await.unwrap() })
        })
        .collect();
    for (number, publish) in publishes.into_iter().enumerate() {
        let response = soon(publish).await.unwrap();
        assert_eq!((response.status().as_u16(), response.version()), (202, Version::HTTP_2));
        let receipt: Value = serde_json::from_slice(&response.collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(receipt["id"], number.to_string());
    }
    assert_eq!(running.pull("q", "max=100").await.len(), 100);
    // An error is a problem here too, and the connection goes on.
    let mut sender = sender;
    for (path, status) in [("/topics/a..b", 400), ("/topics/a", 202)] {
        let request = Request::post(format!("http://{}{path}", running.address)).body(Full::new(Bytes::new())).unwrap();
        assert_eq!(soon(sender.send_request(request)).await.unwrap().status().as_u16(), status);
    }
}

/// As clients do that send what an iterator gives: a line a frame, faster than it is read.
#[tokio::test]
async fn a_line_may_be_a_frame() {
    const LINES: usize = 10_000;
    let running = Running::start().await;
    let (send, connection) = h2::client::handshake(running.connect().await).await.unwrap();
    tokio::spawn(connection);
    for accept in ["application/x-ndjson", "application/json"] {
        let request = Request::post("http://localhost/topics/a")
            .header("content-type", "application/x-ndjson")
            .header("accept", accept)
            .body(())
            .unwrap();
        let mut send = soon(send.clone().ready()).await.unwrap();
        let (answer, mut body) = send.send_request(request, false).unwrap();
        let line = Bytes::from_static(b"{\"payload\":1}\n");
        let lines = async {
            for left in (0..LINES).rev() {
                body.reserve_capacity(line.len());
                while body.capacity() < line.len() {
                    // The answer says why it ended.
                    let Some(Ok(_)) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { return };
                }
                if body.send_data(line.clone(), left == 0).is_err() {
                    return;
                }
            }
        };
        let results = async {
            let mut results = answer.await.unwrap().into_body();
            let mut text = Vec::new();
            while let Some(data) = results.data().await {
                let data = data.unwrap();
                results.flow_control().release_capacity(data.len()).unwrap();
                text.extend_from_slice(&data);
            }
            text
        };
        let (_, results) = soon(futures_util::future::join(lines, results)).await;
        let results = String::from_utf8(results).unwrap();
        let said = results.matches("\"matched\"").count();
        assert_eq!(said, LINES, "{accept}: {}", &results[..results.len().min(300)]);
    }
}
