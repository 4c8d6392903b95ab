//! Who may ask: in development mode only this machine, and no web page; elsewhere the configured
//! origins.

use std::net::IpAddr;

use axum::response::{IntoResponse, Response};
use broker_core::ErrorKind;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, Version, header};

use super::problem::{Answer, Problem};

/// Checks where a request comes from. A web page on this machine's browser can reach a loopback
/// port; it cannot hide its `Origin`, nor the name it resolved (`Host`).
pub(crate) fn check(development: bool, allowed: &[String], parts: &Parts) -> Answer<()> {
    let headers = &parts.headers;
    if headers.contains_key(header::ORIGIN) && page(development, allowed, headers).is_none() {
        return Err(forbidden(if development {
            "the origin of this request is not this machine, and the server is in development mode"
        } else {
            "the origin of this request is not among the allowed ones; add it to allowed_origins"
        }));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, another) = (hosts.next(), hosts.next());
    // RFC 9112, section 3.2: who would be asked is not to be guessed.
    if another.is_some() || host.is_none() && parts.version == Version::HTTP_11 {
        return Err(Problem::invalid("host: a request has one Host header"));
    }
    if !development {
        return Ok(());
    }
    // HTTP/2 has the authority in the request's URI, HTTP/1.1 may say one there that counts before `Host`.
    let host = host.map(|host| host.to_str().unwrap_or_default());
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    if [host, authority].into_iter().flatten().any(|name| !is_loopback_authority(name)) {
        return Err(forbidden(
            "the host of this request is not this machine (localhost, 127.0.0.1 or [::1]), and the server is in development mode",
        ));
    }
    Ok(())
}

/// The origin of the web page that asks, if it is one that may: whatever the answer is, it may read it.
pub(crate) fn page(development: bool, allowed: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let text = origin.to_str().ok()?;
    let may =
        allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(text)) || development && is_loopback_origin(text);
    may.then(|| origin.clone())
}

/// Answers a browser that asks ahead whether a page may send a request (the CORS protocol of the
/// Fetch standard): what the request is was checked, what it does is checked when it comes.
pub(crate) fn preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    let methods = HeaderValue::from_static("GET, POST, PUT, DELETE");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

/// What an answer says in headers that a browser keeps from a page unless it is told not to.
const EXPOSED: HeaderValue = HeaderValue::from_static("ratelimit, ratelimit-policy, retry-after, www-authenticate");

/// Lets the [`page`] of this origin read the answer.
pub(crate) fn allow(page: HeaderValue, headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, page);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    headers.append(header::VARY, HeaderValue::from_static("origin"));
}

fn forbidden(detail: &str) -> Problem {
    Problem::new(StatusCode::FORBIDDEN, ErrorKind::Unauthorized, detail)
}

fn is_loopback_origin(origin: &str) -> bool {
    origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"))
        .is_some_and(|authority| !authority.contains('/') && is_loopback_authority(authority))
}

fn is_loopback_authority(authority: &str) -> bool {
    // What nearly every request says, told without parsing it.
    let usual = authority.strip_prefix("127.0.0.1").or_else(|| authority.strip_prefix("localhost"));
    if usual.is_some_and(is_port) {
        return true;
    }
    if authority.contains('@') {
        return false;
    }
    let host = match authority.strip_prefix('[') {
        Some(rest) => {
            let Some((host, port)) = rest.split_once(']') else { return false };
            return is_port(port) && host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        }
        None => match authority.split_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
            Some(_) => return false,
            None => authority,
        },
    };
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_told_from_others() {
        for here in
            ["localhost", "LOCALHOST:80", "app.localhost:3000", "127.0.0.1", "127.1.2.3:2757", "[::1]:2757", "[::1]"]
        {
            assert!(is_loopback_authority(here), "{here}");
            assert!(is_loopback_origin(&format!("http://{here}")), "{here}");
        }
        for elsewhere in [
            "example.com",
            "localhost.example.com",
            "127.0.0.1.nip.io",
            "192.168.0.1",
            "[::2]:1",
            "[::1",
            "[::1]x",
            "localhost@evil.com",
            "localhost:x",
            "",
            "null",
        ] {
            assert!(!is_loopback_authority(elsewhere), "{elsewhere}");
            assert!(!is_loopback_origin(&format!("http://{elsewhere}")), "{elsewhere}");
        }
        assert!(!is_loopback_origin("null"));
        assert!(!is_loopback_origin("file://localhost"));
    }
}
