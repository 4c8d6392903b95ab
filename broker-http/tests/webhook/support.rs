//! A service of axum's on a port of its own, a server that pushes to it, and requests signed by hand.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Broker, MemoryBroker, Timestamp};
use broker_http::{Server, ServerOptions};
use bytes::Bytes;
use hmac::{Hmac, Mac};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use sha2::Sha256;
use tokio::net::{TcpListener, TcpStream};

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// Fails a test that hangs instead of letting it.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it took longer than any test may")
}

/// Serves `app`; it ends with the test's runtime.
pub(crate) async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// A server in development mode.
pub(crate) struct Running {
    pub(crate) server: Server,
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) address: SocketAddr,
}

impl Running {
    pub(crate) async fn start(options: ServerOptions) -> Self {
        let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new());
        let server = Server::new(Arc::clone(&broker), options.with_development(true));
        server.restore().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await });
        Self { server, broker, address }
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: serde_json::Value) -> (u16, serde_json::Value) {
        let request = Request::builder().method(method).uri(path).body(Bytes::from(body.to_string())).unwrap();
        let answer = send(self.address, request).await;
        (answer.status().as_u16(), serde_json::from_slice(answer.body()).unwrap_or_default())
    }

    pub(crate) async fn put(&self, name: &str, spec: serde_json::Value) -> (u16, serde_json::Value) {
        self.send(Method::PUT, &format!("/subscriptions/{name}"), spec).await
    }
}

/// One request on a connection of its own.
pub(crate) async fn send(address: SocketAddr, mut request: Request<Bytes>) -> Response<Bytes> {
    soon(async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        request.headers_mut().insert("host", address.to_string().parse().unwrap());
        let (parts, body) = sender.send_request(request.map(Full::new)).await.unwrap().into_parts();
        Response::from_parts(parts, body.collect().await.unwrap().to_bytes())
    })
    .await
}

/// A push of `body`, as any sender of Standard Webhooks signs it, made so many seconds ago.
pub(crate) fn signed(secret: &str, id: &str, ago: i64, body: &str) -> Request<Bytes> {
    let seconds = Timestamp::now().as_millis() / 1000 - ago;
    let mut request = Request::post("/hook").body(Bytes::from(body.to_owned())).unwrap();
    let headers = request.headers_mut();
    headers.insert("webhook-id", id.parse().unwrap());
    headers.insert("webhook-timestamp", seconds.to_string().parse().unwrap());
    headers.insert("webhook-signature", signature(secret, id, seconds, body).parse().unwrap());
    headers.insert("broker-id", id.parse().unwrap());
    request
}

pub(crate) fn signature(secret: &str, id: &str, seconds: i64, body: &str) -> String {
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{seconds}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

pub(crate) fn with(mut request: Request<Bytes>, name: &'static str, value: &str) -> Request<Bytes> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

pub(crate) fn without(mut request: Request<Bytes>, name: &str) -> Request<Bytes> {
    request.headers_mut().remove(name);
    request
}

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap())
}
