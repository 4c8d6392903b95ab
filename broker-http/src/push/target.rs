//! An endpoint, taken apart once: what to dial, and what every request to it says.

use broker_core::{Error, Result};
use http::uri::PathAndQuery;
use http::{HeaderValue, Uri};
use rustls::pki_types::ServerName;
use url::Host;

use crate::Endpoint;

/// Where requests go.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) host: Host<String>,
    pub(crate) port: u16,
    /// The name the server's certificate must have, with TLS.
    pub(crate) tls: Option<ServerName<'static>>,
    /// Whether HTTP/2 is spoken without TLS and without asking, by prior knowledge.
    pub(crate) h2: bool,
    /// `Host` of HTTP/1.
    pub(crate) authority: HeaderValue,
    /// The request target of HTTP/1: path and query.
    pub(crate) origin: Uri,
    /// The request target of HTTP/2: all of it.
    pub(crate) absolute: Uri,
}

impl Target {
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a URL that no request can be made of.
    pub(crate) fn new(endpoint: &Endpoint) -> Result<Self> {
        let invalid = |why: &str| Error::invalid(format!("endpoint: {why}"));
        let url = endpoint.url();
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Err(invalid("it has no host"));
        };
        let host = host.to_owned();
        let tls = match (url.scheme(), &host) {
            ("https", Host::Domain(name)) => Some(
                ServerName::try_from(name.trim_end_matches('.').to_owned())
                    .map_err(|_| invalid("no certificate can be for its host"))?,
            ),
            ("https", Host::Ipv4(address)) => Some(ServerName::from(std::net::IpAddr::from(*address))),
            ("https", Host::Ipv6(address)) => Some(ServerName::from(std::net::IpAddr::from(*address))),
            _ => None,
        };
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_string(),
        };
        let path = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        let path = PathAndQuery::try_from(path).map_err(|_| invalid("its path or query cannot be sent"))?;
        let absolute = Uri::builder()
            .scheme(url.scheme())
            .authority(authority.as_str())
            .path_and_query(path.clone())
            .build()
            .map_err(|_| invalid("its host cannot be sent"))?;
        let authority = HeaderValue::try_from(authority).map_err(|_| invalid("its host cannot be sent"))?;
        Ok(Self { host, port, tls, h2: false, authority, origin: Uri::from(path), absolute })
    }

    /// Sets whether HTTP/2 is spoken by prior knowledge.
    pub(crate) fn with_h2(mut self, h2: bool) -> Self {
        self.h2 = h2;
        self
    }

    /// Whether requests may go over one connection that all share: HTTP/2, agreed on or known.
    pub(crate) fn may_share(&self) -> bool {
        self.tls.is_some() || self.h2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_endpoints_apart() {
        for (url, host, port, authority, origin, tls) in [
            ("http://example.com", "example.com", 80, "example.com", "/", false),
            ("https://example.com/hook?a=b", "example.com", 443, "example.com", "/hook?a=b", true),
            ("https://example.com.:8443/", "example.com.", 8443, "example.com.:8443", "/", true),
            ("http://[::1]:8080/a b", "[::1]", 8080, "[::1]:8080", "/a%20b", false),
            ("http://0x7f.1/x?", "127.0.0.1", 80, "127.0.0.1", "/x?", false),
            ("https://[2001:4860::1]/", "[2001:4860::1]", 443, "[2001:4860::1]", "/", true),
            ("https://müller.example/ü", "xn--mller-kva.example", 443, "xn--mller-kva.example", "/%C3%BC", true),
            ("http://a/x|y^z`{}\"<>", "a", 80, "a", "/x|y^z%60%7B%7D%22%3C%3E", false),
        ] {
            let target = Target::new(&url.parse().unwrap()).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(target.host.to_string(), host, "{url}");
            assert_eq!(target.port, port, "{url}");
            assert_eq!(target.authority, authority, "{url}");
            assert_eq!(target.origin, origin, "{url}");
            assert_eq!(target.tls.is_some(), tls, "{url}");
            assert_eq!(target.absolute.authority().map(ToString::to_string).as_deref(), Some(authority), "{url}");
        }
    }
}
