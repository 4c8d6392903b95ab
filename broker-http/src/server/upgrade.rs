//! The opening handshake of a WebSocket (RFC 6455, section 4.2).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::problem::{Answer, Problem};

/// A WebSocket that was asked for as it should be.
pub(crate) struct Upgrade {
    accept: HeaderValue,
    /// The connection, once the answer is written.
    pub(crate) connection: OnUpgrade,
}

impl Upgrade {
    /// What a request asks for; `None` where it is no WebSocket: clients offer an upgrade to HTTP/2 too, and go on
    /// without.
    ///
    /// # Errors
    ///
    /// 400 with what to send.
    pub(crate) fn of(parts: &mut Parts) -> Answer<Option<Self>> {
        let headers = &parts.headers;
        if parts.version > Version::HTTP_11 || !lists(headers, &header::UPGRADE, "websocket") {
            return Ok(None);
        }
        if parts.method != Method::GET || parts.version < Version::HTTP_11 {
            return Err(not_well_formed("ask for it by GET over HTTP/1.1"));
        }
        if !lists(headers, &header::CONNECTION, "upgrade") {
            return Err(not_well_formed("send the header connection: upgrade beside upgrade: websocket"));
        }
        if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            let mut problem = not_well_formed("send the header sec-websocket-version: 13");
            problem.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            return Err(problem);
        }
        let key = key_of(headers).ok_or_else(|| {
            not_well_formed("send one header sec-websocket-key, 16 random bytes in base64: 24 characters")
        })?;
        let accept =
            derive_accept_key(key).try_into().map_err(|_| not_well_formed("no accept key comes of its key"))?;
        let connection = parts
            .extensions
            .remove::<OnUpgrade>()
            .ok_or_else(|| not_well_formed("this connection cannot be upgraded; connect by HTTP/1.1"))?;
        Ok(Some(Self { accept, connection }))
    }

    /// The headers of the answer, 101.
    pub(crate) fn headers(&self) -> [(HeaderName, HeaderValue); 3] {
        [
            (header::CONNECTION, HeaderValue::from_static("upgrade")),
            (header::UPGRADE, HeaderValue::from_static("websocket")),
            (header::SEC_WEBSOCKET_ACCEPT, self.accept.clone()),
        ]
    }
}

/// Whether a header lists a token.
fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|listed| listed.trim().eq_ignore_ascii_case(token))
}

/// The key: one, and of 16 bytes.
fn key_of(headers: &HeaderMap) -> Option<&[u8]> {
    let mut keys = headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let key = keys.next().filter(|_| keys.next().is_none())?.as_bytes();
    STANDARD.decode(key).is_ok_and(|bytes| bytes.len() == 16).then_some(key)
}

fn not_well_formed(what: &str) -> Problem {
    Problem::invalid(format!("the upgrade to a WebSocket is not well formed: {what}"))
}
