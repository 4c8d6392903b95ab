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
