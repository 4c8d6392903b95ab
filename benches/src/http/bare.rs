//! What a user writes with hyper alone: a client on one connection, and a server that reads a body
//! and answers.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::Result;

/// A connection of HTTP/1.1, one request at a time.
pub(crate) struct Client {
    sender: SendRequest<Full<Bytes>>,
    host: HeaderValue,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, host: HeaderValue::try_from(address.to_string())? })
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn request(
        &mut self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes)> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse()?;
        *request.headers_mut() = headers;
        request.headers_mut().entry(HOST).or_insert_with(|| self.host.clone());
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

/// Starts a server of HTTP/1.1 that reads every body, hands it to `take`, and answers as that says.
pub(crate) async fn serve<F>(take: F) -> Result<SocketAddr>
where
    F: Fn(&HeaderMap, Bytes) -> Response<Full<Bytes>> + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let take = Arc::new(take);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let take = Arc::clone(&take);
            tokio::spawn(async move {
                // An answer is small: waiting for more of it helps nobody.
                let _ = stream.set_nodelay(true);
                let service = service_fn(move |request: Request<Incoming>| {
                    let take = Arc::clone(&take);
                    async move {
                        let (parts, body) = request.into_parts();
                        let answer = match body.collect().await {
                            Ok(body) => take(&parts.headers, body.to_bytes()),
                            Err(_) => answer(StatusCode::BAD_REQUEST, None, Bytes::new()),
                        };
                        Ok::<_, Infallible>(answer)
                    }
                });
                // A connection that its client ends is no failure.
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok(address)
}

/// An answer with this body.
pub(crate) fn answer(status: StatusCode, content_type: Option<HeaderValue>, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response.headers_mut().insert(CONTENT_TYPE, content_type);
    }
    response
}
