//! The management API, for what AMQP does not tell: how many messages of a queue are unacked, whoever
//! holds them.
//!
//! Asked over plain HTTP, with the broker's own user: its address is given for a server whose API is on
//! loopback or in a network that is trusted.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, Result};
use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::AmqpOptions;

/// An answer tells statistics of one queue: some kilobytes.
const MAX_ANSWER: usize = 1 << 20;

/// What is read of the answer. A queue that was made a moment ago has no statistics yet.
#[derive(Deserialize)]
struct Queue {
    #[serde(default)]
    messages_unacknowledged: u64,
}

/// The host and port of `http://HOST:PORT`.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid) for anything else: credentials are the broker's.
pub(crate) fn authority(url: &str) -> Result<String> {
    let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    match authority {
        Some(authority) if !authority.is_empty() && !authority.contains(['/', '@', '?']) => Ok(authority.to_owned()),
        _ => Err(Error::invalid(
            "broker URL parameter management: it is http://host:port, asked with the user of the broker URL",
        )),
    }
}

/// Messages of a queue that are with a consumer and not acked; as of the server's last statistics, which
/// are up to five seconds old.
///
/// # Errors
///
/// What keeps it from being asked, within `patience`.
pub(crate) async fn unacked(authority: &str, queue: &str, options: &AmqpOptions, patience: Duration) -> Result<u64> {
    let asked = timeout(patience, ask(authority, queue, options)).await;
    let answer = asked.unwrap_or_else(|_| Err(Error::timeout(format!("no answer within {patience:?}"))));
    answer.map_err(|error| error.context(format_args!("management API at {authority}")))
}

async fn ask(authority: &str, queue: &str, options: &AmqpOptions) -> Result<u64> {
    let failed = |error: hyper::Error| Error::unavailable("the request failed").with_source(error);
    let address = if has_port(authority) { authority.to_owned() } else { format!("{authority}:15672") };
    let stream =
        TcpStream::connect(address).await.map_err(|error| Error::unavailable("not reached").with_source(error))?;
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let encoded = |name: &str| utf8_percent_encode(name, NON_ALPHANUMERIC).to_string();
    let user = STANDARD.encode(format!("{}:{}", options.username, options.password));
    let request = Request::get(format!("/api/queues/{}/{}", encoded(&options.vhost), encoded(queue)))
        .header(HOST, authority)
        .header(AUTHORIZATION, format!("Basic {user}"))
        .body(Empty::<Bytes>::new())
        .map_err(|_| Error::invalid("its address is no host"))?;
    let asking = async {
        let answer = requests.send_request(request).await.map_err(failed)?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(Error::unauthorized("the user lacks the tag monitoring or management"));
            }
            status => return Err(Error::backend(format!("it answers {status}"))),
        }
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|_| Error::backend("its answer breaks off, or is too long"))?.to_bytes();
        let queue: Queue =
            serde_json::from_slice(&body).map_err(|error| Error::codec("its answer is no queue").with_source(error))?;
        Ok(queue.messages_unacknowledged)
    };
    let mut connection = std::pin::pin!(connection);
    let mut asking = std::pin::pin!(asking);
    tokio::select! {
        answer = &mut asking => answer,
        // It may end with the answer.
        _ = &mut connection => asking.await,
    }
}

fn has_port(authority: &str) -> bool {
    authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_host_and_nothing_secret() {
        assert_eq!(authority("http://rabbit:15672/").unwrap(), "rabbit:15672");
        assert_eq!(authority("http://[::1]").unwrap(), "[::1]");
        for bad in ["https://rabbit", "rabbit:15672", "http://user:secret@rabbit", "http://rabbit/api", "http://"] {
            let error = authority(bad).unwrap_err();
            assert!(error.message().contains("http://host:port") && !error.message().contains("secret"), "{error}");
        }
        assert!(has_port("rabbit:1") && has_port("[::1]:1") && !has_port("rabbit") && !has_port("[::1]"));
    }
}
