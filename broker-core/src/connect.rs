//! Opening a broker by its URL.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use url::Url;

use crate::{Broker, Error, Result, memory};

/// Opens a broker of one kind from a URL; an adapter implements this and adds it to a
/// [`Connectors`] table.
///
/// ```
/// use std::sync::Arc;
/// use broker_core::{Broker, BrokerUrl, Connector, Connectors, MemoryBroker, Result};
///
/// struct Test;
///
/// impl Connector for Test {
///     fn open(&self, url: BrokerUrl) -> Result<Arc<dyn Broker>> {
///         url.finish()?;
///         Ok(Arc::new(MemoryBroker::new()))
///     }
/// }
///
/// assert!(Connectors::new().add(["test"], Test).open("test:").is_ok());
/// ```
pub trait Connector: Send + Sync {
    /// Makes the broker; parses and does no I/O.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), naming the part of the URL that is wrong.
    fn open(&self, url: BrokerUrl) -> Result<Arc<dyn Broker>>;
}

impl<F: Fn(BrokerUrl) -> Result<Arc<dyn Broker>> + Send + Sync> Connector for F {
    fn open(&self, url: BrokerUrl) -> Result<Arc<dyn Broker>> {
        self(url)
    }
}

/// The kinds of broker a program knows, by URL scheme. `memory:` is always there; an adapter adds
/// its own.
///
/// ```
/// use std::sync::Arc;
/// use broker_core::{Broker, BrokerUrl, Connectors, MemoryBroker};
///
/// let mut connectors = Connectors::new();
/// connectors.add(["test"], |url: BrokerUrl| {
///     url.finish()?;
///     Ok(Arc::new(MemoryBroker::new()) as Arc<dyn Broker>)
/// });
/// assert_eq!(connectors.open("memory:")?.name(), "memory:");
/// assert!(connectors.open("test://here").is_ok());
///
/// let error = connectors.open("carrier-pigeon://roof").unwrap_err();
/// assert!(error.message().contains("memory, test"), "{error}");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Connectors(BTreeMap<String, Arc<dyn Connector>>);

impl Connectors {
    /// A table that knows `memory:`.
    pub fn new() -> Self {
        let mut connectors = Self(BTreeMap::new());
        connectors.add(["memory"], memory::open);
        connectors
    }

    /// Adds a kind of broker under its schemes, replacing what was there.
    pub fn add(
        &mut self,
        schemes: impl IntoIterator<Item = impl Into<String>>,
        connector: impl Connector + 'static,
    ) -> &mut Self {
        let connector: Arc<dyn Connector> = Arc::new(connector);
        for scheme in schemes {
            self.0.insert(scheme.into(), Arc::clone(&connector));
        }
        self
    }

    /// The schemes known, sorted.
    pub fn schemes(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Makes the broker that `url` names; parses and does no I/O.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) for what is no URL, an unknown scheme or an unknown
    /// query parameter; the error lists the known ones.
    pub fn open(&self, url: &str) -> Result<Arc<dyn Broker>> {
        let known = || self.schemes().collect::<Vec<_>>().join(", ");
        let url = BrokerUrl::parse(url)
            .map_err(|error| Error::invalid(format!("{}; known schemes: {}", error.message(), known())))?;
        match self.0.get(url.scheme()) {
            Some(connector) => connector.open(url),
            None => Err(Error::invalid(format!(
                "broker URL scheme {:?} is unknown; known schemes: {}",
                url.scheme(),
                known()
            ))),
        }
    }
}

impl Default for Connectors {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Connectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.schemes()).finish()
    }
}

/// A broker's URL, taken apart: query parameters are taken one by one, and what is left over is an
/// error that lists the known ones. Credentials are in [`username`](Self::username) and
/// [`password`](Self::password) and never printed.
///
/// ```
/// use broker_core::BrokerUrl;
///
/// let mut url = BrokerUrl::parse("amqp://user:secret@host:5672/vhost?heartbeat=10&colour=red")?;
/// assert_eq!(url.parameter::<u16>("heartbeat")?, Some(10));
/// assert_eq!(url.to_string(), "amqp://host:5672/vhost");
/// let error = url.finish().unwrap_err();
/// assert!(error.message().contains("colour") && error.message().contains("heartbeat"), "{error}");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
pub struct BrokerUrl {
    scheme: String,
    /// Between the slashes: hosts with their ports, separated by commas.
    authority: String,
    path: String,
    username: Option<String>,
    password: Option<String>,
    parameters: Vec<(String, String)>,
    known: Vec<String>,
}

impl BrokerUrl {
    /// Takes a URL apart. A list of hosts (`kafka://a:9092,b:9092`) is allowed.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid); the error never repeats the URL, which may hold a
    /// password.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid =
            |why: &str| Error::invalid(format!("broker URL: {why}; it looks like memory: or http://127.0.0.1:2757"));
        let (scheme, rest) = text.split_once(':').ok_or_else(|| invalid("it has no scheme"))?;
        if scheme.is_empty() || !scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte)) {
            return Err(invalid("its scheme is not one"));
        }
        if rest.contains('#') {
            return Err(invalid("a fragment means nothing here; write # in a password as %23"));
        }
        // A list of hosts is no URL to the standard, so the authority is taken out before parsing.
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash)),
            None => ("", rest),
        };
        let (user, hosts) = authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
        for host in hosts.split(',').filter(|_| !hosts.is_empty()) {
            Url::parse(&format!("http://{host}/"))
                .ok()
                .filter(|url| url.path() == "/" && !host.is_empty())
                .ok_or_else(|| invalid("a host or port in it does not parse"))?;
        }
        let (username, password) = match user {
            None => (None, None),
            Some(user) => {
                let (name, password) =
                    user.split_once(':').map_or((user, None), |(name, password)| (name, Some(password)));
                (Some(decode(name, &invalid)?), password.map(|password| decode(password, &invalid)).transpose()?)
            }
        };
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            authority: hosts.to_owned(),
            path: path.to_owned(),
            username,
            password,
            parameters: url::form_urlencoded::parse(query.as_bytes()).into_owned().collect(),
            known: Vec::new(),
        })
    }

    /// The scheme, in lower case.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Hosts with their ports, as written, separated by commas; no credentials.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The hosts, one by one.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.authority.split(',').filter(|host| !host.is_empty())
    }

    /// What follows the hosts, a leading slash included, not decoded.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The user name, decoded.
    pub fn username(&self) -> Option<&str> {
        self.username.as_deref()
    }

    /// The password, decoded. Never print it.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// Takes the query parameter `name` and parses it.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) if it does not parse or is there twice.
    pub fn parameter<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Result<Option<T>> {
        self.parameter_with(name, |text| text.parse().map_err(|error| format!("{error}")))
    }

    /// Takes the query parameter `name` as a duration, as in `10s`.
    ///
    /// # Errors
    ///
    /// As [`parameter`](Self::parameter).
    pub fn duration(&mut self, name: &str) -> Result<Option<std::time::Duration>> {
        self.parameter_with(name, |text| crate::parse_duration(text).map_err(|error| error.message().to_owned()))
    }

    fn parameter_with<T>(&mut self, name: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Option<T>> {
        self.known.push(name.to_owned());
        let mut values = self.parameters.extract_if(.., |(have, _)| have == name).map(|(_, value)| value);
        let (value, second) = (values.next(), values.next());
        drop(values);
        if second.is_some() {
            return Err(Error::invalid(format!("broker URL parameter {name} is given twice")));
        }
        value
            .map(|value| parse(&value).map_err(|why| Error::invalid(format!("broker URL parameter {name}: {why}"))))
            .transpose()
    }

    /// Takes every query parameter whose name begins with `prefix`: settings that are handed on.
    pub fn take_prefixed(&mut self, prefix: &str) -> Vec<(String, String)> {
        self.known.push(format!("{prefix}…"));
        self.parameters.extract_if(.., |(name, _)| name.starts_with(prefix)).collect()
    }

    /// Checks that no query parameter is left.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), naming the first unknown one and listing the known.
    pub fn finish(self) -> Result<()> {
        let Some((name, _)) = self.parameters.first() else { return Ok(()) };
        let known = if self.known.is_empty() { "none".to_owned() } else { self.known.join(", ") };
        Err(Error::invalid(format!(
            "broker URL parameter {name:?} is unknown to {}:; known parameters: {known}",
            self.scheme
        )))
    }
}

fn decode(text: &str, invalid: &impl Fn(&str) -> Error) -> Result<String> {
    let text = percent_encoding::percent_decode_str(text).decode_utf8();
    text.map(Into::into).map_err(|_| invalid("its credentials are not UTF-8"))
}

/// Without credentials and parameters.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slashes = if self.authority.is_empty() { "" } else { "//" };
        write!(f, "{}:{slashes}{}{}", self.scheme, self.authority, self.path)
    }
}

/// Without credentials.
impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BrokerUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_lists_of_hosts_and_credentials_apart() {
        let url = BrokerUrl::parse("kafka://us%40er:p%3Aw+x@a:9092,[::1]:9093/path?x=1").unwrap();
        assert_eq!((url.scheme(), url.authority(), url.path()), ("kafka", "a:9092,[::1]:9093", "/path"));
        assert_eq!(url.hosts().count(), 2);
        assert_eq!((url.username(), url.password()), (Some("us@er"), Some("p:w+x")));
        assert!(!format!("{url:?} {url}").contains("p:w"));
    }

    #[test]
    fn refuses_without_repeating_a_password() {
        for bad in [
            "",
            "memory",
            "://x",
            "amqp://u:hunter2@ho st",
            "amqp://u:hunter2@host:99999",
            "a b://x",
            "amqp://u:hunter2@h#x",
            "amqp://u:hunter2@a,,b",
        ] {
            let error = Connectors::new().open(bad).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{bad}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn an_unknown_parameter_lists_the_known_ones() {
        let error = Connectors::new().open("memory:?colour=red").unwrap_err();
        assert!(error.message().contains("colour") && error.message().contains("retain"), "{error}");
    }
}
