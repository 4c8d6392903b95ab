//! Where the daemon is and how patient to be with it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{BrokerUrl, Error, Result};
use http::HeaderValue;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use url::Url;

use crate::tls::PemFiles;

/// How an [`HttpBroker`](super::HttpBroker) talks to its daemon.
///
/// In a URL the same are query parameters: `http://127.0.0.1:2757?timeout=10s`. A token is the user
/// name of the URL, or the parameter `token`; it is never printed. `https` trusts the root certificates
/// of this machine, or those of a PEM file that the parameter `ca` names; `cert` and `key` name those of a client
/// certificate to show and of its private key. `unix:/run/broker-http.sock` is a Unix socket of this machine.
///
/// ```
/// use std::time::Duration;
/// use broker_http::client::HttpOptions;
///
/// let options = HttpOptions::from_url("http://s3cret@127.0.0.1:2757?timeout=10s")?;
/// assert_eq!(options.timeout, Duration::from_secs(10));
/// assert!(!format!("{options:?}").contains("s3cret"));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct HttpOptions {
    /// `host:port`.
    authority: String,
    /// A Unix socket of this machine, instead of an address.
    socket: Option<PathBuf>,
    /// What stands before every path, for a daemon behind a gateway; empty or `/…`.
    prefix: String,
    authorization: Option<HeaderValue>,
    /// With `https`.
    tls: Option<Tls>,
    /// How long connecting may take (default 5 s).
    pub connect_timeout: Duration,
    /// How long a request may take, connecting included (default 10 s).
    pub timeout: Duration,
    /// How long a delivery is ours without a sign of life; held ones are extended in time
    /// (default 10 s). What got lost on its way to us comes back after it.
    pub lease: Duration,
    /// How long a pull waits for a message before it is sent anew (default 20 s).
    pub wait: Duration,
    /// Bytes of payload, key and headers a message may have (default 1 MiB).
    pub max_message_bytes: usize,
    /// Connections for requests that are not waiting pulls (default 32).
    pub connections: usize,
}

/// How TLS is spoken.
#[derive(Clone)]
pub(super) struct Tls {
    /// The name the daemon's certificate must have.
    pub(super) name: ServerName<'static>,
    pub(super) files: PemFiles,
    /// What the service brought itself.
    pub(super) config: Option<Arc<ClientConfig>>,
}

impl HttpOptions {
    /// Reads a URL, `http://host:port`, `https://host:port` or `unix:/path`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the part that is wrong.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::from_broker_url(BrokerUrl::parse(url)?)
    }

    pub(super) fn from_broker_url(mut url: BrokerUrl) -> Result<Self> {
        let invalid = |why: &str| Error::invalid(format!("broker URL: {why}; it looks like http://127.0.0.1:2757"));
        let (mut socket, mut path, mut authority) = (None, url.path().to_owned(), url.authority().to_owned());
        let scheme = match url.scheme() {
            "http" => "http",
            "https" => "https",
            "unix" if cfg!(unix) => {
                if path.is_empty() || !authority.is_empty() {
                    return Err(invalid("a path follows unix:, as in unix:/run/broker-http.sock"));
                }
                socket = Some(PathBuf::from(std::mem::take(&mut path)));
                authority = "localhost".to_owned();
                "http"
            }
            other => return Err(invalid(&format!("its scheme is {other:?}, and this is for http, https and unix"))),
        };
        if authority.is_empty() || authority.contains(',') {
            return Err(invalid("it names one host"));
        }
        let parsed = Url::parse(&format!("{scheme}://{authority}/")).map_err(|_| invalid("its host does not parse"))?;
        let host = parsed.host_str().ok_or_else(|| invalid("it names no host"))?;
        let port = parsed.port_or_known_default().unwrap_or_default();
        if port == 0 {
            return Err(invalid("port 0 cannot be dialled"));
        }
        let token = url.parameter::<String>("token")?;
        let authorization = authorization(url.username(), url.password(), token.as_deref())?;
        let at_least = |name: &str, value: Option<Duration>, default: Duration, least: Duration| match value {
            Some(value) if value < least || value > Duration::from_secs(3600) => Err(Error::invalid(format!(
                "broker URL parameter {name}: it is from {} to 1h",
                broker_core::format_duration(least)
            ))),
            value => Ok(value.unwrap_or(default)),
        };
        let files = pem_files(&mut url)?;
        let tls = match scheme {
            "http" => {
                let named = [("ca", files.ca.is_some()), ("cert and key", files.shown.is_some())];
                if let Some((name, _)) = named.into_iter().find(|(_, is_there)| *is_there) {
                    return Err(Error::invalid(format!("broker URL parameter {name}: it is for https")));
                }
                None
            }
            _ => {
                let name = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
                let name =
                    ServerName::try_from(name.to_owned()).map_err(|_| invalid("no certificate can be for its host"))?;
                Some(Tls { name, files, config: None })
            }
        };
        let second = Duration::from_secs(1);
        let milli = Duration::from_millis(1);
        let options = Self {
            authority: format!("{host}:{port}"),
            socket,
            prefix: path.trim_end_matches('/').to_owned(),
            authorization,
            tls,
            connect_timeout: at_least("connect_timeout", url.duration("connect_timeout")?, 5 * second, milli)?,
            timeout: at_least("timeout", url.duration("timeout")?, 10 * second, milli)?,
            lease: at_least("lease", url.duration("lease")?, 10 * second, second)?,
            wait: at_least("wait", url.duration("wait")?, 20 * second, milli)?,
            max_message_bytes: url.parameter("max_message_bytes")?.unwrap_or(1 << 20),
            connections: url.parameter("connections")?.unwrap_or(32),
        };
        url.finish()?;
        if options.connections == 0 {
            return Err(Error::invalid("broker URL parameter connections: it is 1 or more"));
        }
        if http::uri::PathAndQuery::try_from(format!("{}/", options.prefix)).is_err() {
            return Err(invalid("its path does not parse"));
        }
        Ok(options)
    }

    /// Speaks TLS like this with an `https` daemon: other roots, a client certificate.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) where the URL says `http`.
    pub fn with_tls(mut self, config: impl Into<Arc<ClientConfig>>) -> Result<Self> {
        let tls = self.tls.as_mut().ok_or_else(|| Error::invalid("TLS is for https, and the broker URL says http"))?;
        tls.config = Some(config.into());
        Ok(self)
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Sends this bearer token with every request, instead of credentials of the URL.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) if it is not visible ASCII; it is not repeated.
    pub fn with_token(mut self, token: &str) -> Result<Self> {
        self.authorization = authorization(None, None, Some(token))?;
        Ok(self)
    }

    #[cfg(unix)]
    pub(super) fn socket(&self) -> Option<&std::path::Path> {
        self.socket.as_deref()
    }

    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// The URL without credentials.
    pub(crate) fn name(&self) -> String {
        if let Some(path) = &self.socket {
            return format!("unix:{}", path.display());
        }
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority, self.prefix)
    }
}

fn pem_files(url: &mut BrokerUrl) -> Result<PemFiles> {
    let ca = url.parameter("ca")?;
    let shown = match (url.parameter("cert")?, url.parameter("key")?) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        _ => return Err(Error::invalid("broker URL parameters cert and key go together")),
    };
    Ok(PemFiles { ca, shown })
}

/// A token is a bearer token; a user name with a password is basic authentication.
fn authorization(user: Option<&str>, password: Option<&str>, token: Option<&str>) -> Result<Option<HeaderValue>> {
    let invalid = |why: &str| Error::invalid(format!("broker URL: {why}"));
    let text = match (user.filter(|user| !user.is_empty()), password, token) {
        (None, None, None) => return Ok(None),
        (None, None, Some(token)) | (Some(token), None, None) | (None, Some(token), None) => format!("Bearer {token}"),
        (Some(user), Some(password), None) => format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))),
        (_, _, Some(_)) => return Err(invalid("credentials are given twice: before the host, and as token")),
    };
    let mut value = HeaderValue::try_from(text).map_err(|_| invalid("its credentials are not visible ASCII"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Without credentials.
impl fmt::Debug for HttpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpOptions")
            .field("url", &self.name())
            .field("connect_timeout", &self.connect_timeout)
            .field("timeout", &self.timeout)
            .field("lease", &self.lease)
            .field("wait", &self.wait)
            .field("max_message_bytes", &self.max_message_bytes)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_url_and_hides_what_is_secret() {
        let options = HttpOptions::from_url("http://hunter2@[::1]/gateway/?lease=1m").unwrap();
        assert_eq!(options.name(), "http://[::1]:80/gateway");
        assert_eq!(options.authorization().unwrap(), "Bearer hunter2");
        assert!(!format!("{options:?} {:?}", options.authorization()).contains("hunter2"));
        let basic = HttpOptions::from_url("http://me:hunter2@localhost:1").unwrap();
        assert_eq!(basic.authorization().unwrap(), "Basic bWU6aHVudGVyMg==");
        assert!(HttpOptions::from_url("http://localhost?token=x").unwrap().authorization().is_some());
        for (url, name) in
            [("https://localhost", "https://localhost:443"), ("https://[::1]:2757/?ca=a.pem", "https://[::1]:2757")]
        {
            assert_eq!(HttpOptions::from_url(url).unwrap().name(), name);
        }
    }

    #[test]
    fn names_what_is_wrong() {
        for (url, named) in [
            ("http:", "host"),
            ("unix:", "a path follows unix:"),
            ("unix:/a?ca=roots.pem", "ca"),
            ("http://a,b", "host"),
            ("http://h:0", "port"),
            ("ftp://h", "scheme"),
            ("https://h:0", "port"),
            ("http://h?ca=roots.pem", "ca"),
            ("http://h?cert=a.pem&key=a.key", "cert and key: it is for https"),
            ("https://h?cert=a.pem", "go together"),
            ("https://h?key=a.key", "go together"),
            ("http://h?colour=red", "colour"),
            ("http://h?timeout=0s", "timeout"),
            ("http://h?lease=10ms", "lease"),
            ("http://h?connections=0", "connections"),
            ("http://h/a b", "path"),
            ("http://x@h?token=hunter2", "twice"),
        ] {
            let error = HttpOptions::from_url(url).unwrap_err();
            assert_eq!(error.kind(), broker_core::ErrorKind::Invalid, "{url}");
            assert!(error.message().contains(named) && !error.message().contains("hunter2"), "{url}: {error}");
        }
    }
}
