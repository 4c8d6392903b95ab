//! What a `kafka:` URL means.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use broker_core::{BrokerUrl, Error, Group, Result};

use crate::record::Format;

/// Where the server is and how to talk to it. Made from a URL, whose parameters the
/// [crate documentation](crate#the-url) lists; does no I/O.
///
/// ```
/// use broker_core::BrokerUrl;
/// use broker_kafka::{KafkaConfig, Sasl, Security};
///
/// let url = BrokerUrl::parse("kafka://app:secret@host?partitions=12")?;
/// let config = KafkaConfig::from_url(url)?;
/// assert_eq!((config.security, config.sasl), (Security::Plaintext, Some(Sasl::Plain)));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct KafkaConfig {
    /// Servers to ask first, each `HOST:PORT`.
    pub hosts: Vec<String>,
    /// Who we are, where the server wants to know.
    pub credentials: Option<Credentials>,
    /// How we prove it; always there with credentials.
    pub sasl: Option<Sasl>,
    /// Whether the connection is encrypted.
    pub security: Security,
    /// Certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// How the server's logs call this client.
    pub client_id: String,
    /// Partitions of topics that we create; `None` leaves it to the server.
    pub partitions: Option<usize>,
    /// Whether a topic that is missing is created where it is published or subscribed to.
    pub auto_create: bool,
    /// How records are compressed.
    pub compression: Compression,
    /// How long connecting, and any question to the server, may take.
    pub connect_timeout: Duration,
    /// How long a publish may take, its retries included.
    pub publish_timeout: Duration,
    /// How long acks may wait to be committed: what a crash at most lets come again.
    pub commit_interval: Duration,
    /// How long a member that leaves, or whose partition moves, waits for its deliveries in flight.
    pub drain_timeout: Duration,
    /// How often topics and partitions that are new are looked for.
    pub metadata_refresh: Duration,
    /// How messages are written, and what is understood of those that others wrote.
    pub format: Format,
    /// The wait from which on a retry goes to a topic of its own instead of being held; `None` holds all.
    pub retry_topics: Option<Duration>,
    /// The `group.instance.id` of members, which makes their membership static.
    pub instance_id: Option<String>,
    /// The `transactional.id` of publishing, which is in transactions then.
    pub transactional_id: Option<String>,
    /// `group.id`s that are not `NAME@FILTER`.
    pub group_ids: BTreeMap<Group, String>,
    /// Settings of librdkafka that are handed on as they are.
    pub librdkafka: Settings,
}

const DEFAULT_PORT: u16 = 9092;
const MAX_PARTITIONS: usize = 10_000;
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// What the adapter's promises stand on.
const NOT_SETTABLE: [&str; 9] = [
    "bootstrap.servers",
    "metadata.broker.list",
    "group.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "auto.offset.reset",
    "allow.auto.create.topics",
    "transactional.id",
    "group.instance.id",
];

impl KafkaConfig {
    /// Reads a URL.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the part that is wrong; an unknown
    /// parameter lists the known ones.
    pub fn from_url(mut url: BrokerUrl) -> Result<Self> {
        if url.scheme() != "kafka" {
            return Err(Error::invalid(format!("broker URL scheme {:?}: this is Kafka, kafka://host", url.scheme())));
        }
        if !matches!(url.path(), "" | "/") {
            return Err(Error::invalid("broker URL: a path means nothing to kafka:; topics are named when publishing"));
        }
        let hosts: Vec<_> = url.hosts().map(with_port).collect();
        if hosts.is_empty() {
            return Err(Error::invalid("broker URL: kafka: needs a host, as in kafka://127.0.0.1:9092"));
        }
        let credentials = credentials(&url)?;
        let sasl = url.parameter("sasl")?.or(credentials.as_ref().map(|_| Sasl::Plain));
        if sasl.is_some() && credentials.is_none() {
            return Err(Error::invalid("broker URL parameter sasl: it needs a user, as in kafka://user:password@host"));
        }
        let security = url.parameter("security")?.unwrap_or_default();
        let ca = url.parameter("ca")?;
        if ca.is_some() && security != Security::Ssl {
            return Err(Error::invalid("broker URL parameter ca: it means something with security=ssl only"));
        }
        let config = Self {
            hosts,
            credentials,
            sasl,
            security,
            ca,
            client_id: client_id(&mut url)?,
            partitions: partitions(&mut url)?,
            auto_create: url.parameter("auto_create")?.unwrap_or(true),
            compression: url.parameter("compression")?.unwrap_or_default(),
            connect_timeout: timeout(&mut url, "connect_timeout", Duration::from_secs(10))?,
            publish_timeout: timeout(&mut url, "publish_timeout", Duration::from_secs(30))?,
            commit_interval: timeout(&mut url, "commit_interval", Duration::from_secs(1))?,
            drain_timeout: timeout(&mut url, "drain_timeout", Duration::from_secs(30))?,
            metadata_refresh: timeout(&mut url, "metadata_refresh", Duration::from_secs(10))?,
            format: format(&mut url)?,
            retry_topics: retry_topics(&mut url)?,
            instance_id: id(&mut url, "instance_id")?,
            transactional_id: id(&mut url, "transactional_id")?,
            group_ids: group_ids(&mut url)?,
            librdkafka: librdkafka(&mut url)?,
        };
        url.finish()?;
        config.check_build()?;
        Ok(config)
    }

    /// Refuses what this build cannot do.
    fn check_build(&self) -> Result<()> {
        let refuse = |what: &str, feature: &str| {
            Err(Error::unsupported(format!("{what}: broker-kafka was built without its feature {feature}")))
        };
        if cfg!(not(feature = "tls")) {
            if self.security == Security::Ssl {
                return refuse("broker URL parameter security=ssl", "tls");
            }
            if matches!(self.sasl, Some(Sasl::ScramSha256 | Sasl::ScramSha512)) {
                return refuse("broker URL parameter sasl=scram-…", "tls");
            }
        }
        if cfg!(not(feature = "zstd")) && self.compression == Compression::Zstd {
            return refuse("broker URL parameter compression=zstd", "zstd");
        }
        Ok(())
    }

    /// The hosts as Kafka's clients want them.
    pub fn bootstrap_servers(&self) -> String {
        self.hosts.join(",")
    }

    /// The `group.id` of a group: `NAME@FILTER`, with `preset=go-micro` `NAME`, unless the URL gave another.
    ///
    /// ```
    /// use broker_core::BrokerUrl;
    /// use broker_kafka::KafkaConfig;
    ///
    /// let url = BrokerUrl::parse("kafka://host?group_id.billing@orders.>=legacy-billing")?;
    /// let config = KafkaConfig::from_url(url)?;
    /// assert_eq!(config.group_id(&"billing@orders.>".parse()?), "legacy-billing");
    /// assert_eq!(config.group_id(&"billing@refunds".parse()?), "billing@refunds");
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn group_id(&self, group: &Group) -> String {
        match (self.group_ids.get(group), self.format) {
            (Some(id), _) => id.clone(),
            (None, Format::GoMicro) => group.name.to_string(),
            (None, _) => group.to_string(),
        }
    }
}

/// The host with its port; an IPv6 address stands in brackets.
fn with_port(host: &str) -> String {
    let after_address = host.rsplit_once(']').map_or(host, |(_, after)| after);
    if after_address.contains(':') { host.to_owned() } else { format!("{host}:{DEFAULT_PORT}") }
}

fn credentials(url: &BrokerUrl) -> Result<Option<Credentials>> {
    match (url.username(), url.password()) {
        (None, _) => Ok(None),
        (Some(username), Some(password)) if !username.is_empty() => {
            Ok(Some(Credentials { username: username.to_owned(), password: password.to_owned() }))
        }
        _ => Err(Error::invalid("broker URL: it takes a user and a password, as in kafka://user:password@host")),
    }
}

fn format(url: &mut BrokerUrl) -> Result<Format> {
    let preset: Option<Preset> = url.parameter("preset")?;
    let format: Option<Format> = url.parameter("format")?;
    match (preset, format) {
        (Some(Preset::GoMicro), Some(_)) => {
            Err(Error::invalid("broker URL parameter format: preset=go-micro says what it is"))
        }
        (Some(Preset::GoMicro), None) => Ok(Format::GoMicro),
        (None, format) => Ok(format.unwrap_or_default()),
    }
}

fn retry_topics(url: &mut BrokerUrl) -> Result<Option<Duration>> {
    let threshold = url.duration("retry_topics")?;
    if threshold.is_some_and(|threshold| threshold.is_zero() || threshold > MAX_TIMEOUT) {
        return Err(Error::invalid("broker URL parameter retry_topics: it is more than 0s and at most 1h"));
    }
    Ok(threshold)
}

/// An id that we hand on to the server.
fn id(url: &mut BrokerUrl, name: &str) -> Result<Option<String>> {
    let id: Option<String> = url.parameter(name)?;
    if id.as_ref().is_some_and(|id| id.is_empty() || id.len() > 200 || id.chars().any(char::is_control)) {
        return Err(Error::invalid(format!(
            "broker URL parameter {name}: it has 1 to 200 bytes, no control characters"
        )));
    }
    Ok(id)
}

fn client_id(url: &mut BrokerUrl) -> Result<String> {
    let id: String = url.parameter("client_id")?.unwrap_or_else(|| "broker".to_owned());
    if id.is_empty() || id.len() > 255 || id.chars().any(char::is_control) {
        return Err(Error::invalid("broker URL parameter client_id: it has 1 to 255 bytes, no control characters"));
    }
    Ok(id)
}

fn partitions(url: &mut BrokerUrl) -> Result<Option<usize>> {
    let partitions = url.parameter("partitions")?;
    if partitions.is_some_and(|count| count == 0 || count > MAX_PARTITIONS) {
        return Err(Error::invalid(format!("broker URL parameter partitions: it is 1 to {MAX_PARTITIONS}")));
    }
    Ok(partitions)
}

fn timeout(url: &mut BrokerUrl, name: &str, default: Duration) -> Result<Duration> {
    let timeout = url.duration(name)?.unwrap_or(default);
    if timeout.is_zero() || timeout > MAX_TIMEOUT {
        return Err(Error::invalid(format!("broker URL parameter {name}: it is more than 0s and at most 1h")));
    }
    Ok(timeout)
}

/// Names and values are checked by librdkafka when a client is made; some are ours.
fn librdkafka(url: &mut BrokerUrl) -> Result<Settings> {
    let prefix = "librdkafka.";
    let mut settings = BTreeMap::new();
    for (parameter, value) in url.take_prefixed(prefix) {
        let name = parameter.trim_start_matches(prefix);
        if NOT_SETTABLE.contains(&name) {
            return Err(Error::invalid(format!("broker URL parameter {parameter:?}: the adapter sets {name} itself")));
        }
        if settings.insert(name.to_owned(), value).is_some() {
            return Err(Error::invalid(format!("broker URL parameter {parameter:?} is given twice")));
        }
    }
    Ok(Settings(settings))
}

fn group_ids(url: &mut BrokerUrl) -> Result<BTreeMap<Group, String>> {
    let prefix = "group_id.";
    let mut ids = BTreeMap::new();
    for (parameter, id) in url.take_prefixed(prefix) {
        let group: Group = parameter
            .strip_prefix(prefix)
            .unwrap_or_default()
            .parse()
            .map_err(|error: Error| error.context(format_args!("broker URL parameter {parameter:?}")))?;
        if id.is_empty() || id.len() > 255 || id.chars().any(char::is_control) {
            return Err(Error::invalid(format!(
                "broker URL parameter {parameter:?}: a group.id has 1 to 255 bytes, no control characters"
            )));
        }
        if ids.insert(group, id).is_some() {
            return Err(Error::invalid(format!("broker URL parameter {parameter:?} is given twice")));
        }
    }
    Ok(ids)
}

/// A user's name and password. `Debug` shows neither.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    username: String,
    password: String,
}

impl Credentials {
    /// The user.
    pub fn username(&self) -> &str {
        &self.username
    }

    /// The password. Never print it.
    pub fn password(&self) -> &str {
        &self.password
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

/// Settings of librdkafka, by name. Some are passwords and keys, so that `Debug` shows the names alone.
///
/// ```
/// use broker_core::BrokerUrl;
/// use broker_kafka::KafkaConfig;
///
/// let url = BrokerUrl::parse("kafka://host?librdkafka.ssl.key.password=secret")?;
/// let settings = KafkaConfig::from_url(url)?.librdkafka;
/// assert_eq!(settings.get("ssl.key.password").map(String::as_str), Some("secret"));
/// assert_eq!(format!("{settings:?}"), r#"{"ssl.key.password"}"#);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl Deref for Settings {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Settings {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Whether a connection is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// It is not.
    #[default]
    Plaintext,
    /// By TLS.
    Ssl,
}

impl FromStr for Security {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "plaintext" => Ok(Self::Plaintext),
            "ssl" => Ok(Self::Ssl),
            _ => Err("it is plaintext or ssl"),
        }
    }
}

/// How records are compressed on the wire and in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// They are not.
    #[default]
    None,
    /// By gzip.
    Gzip,
    /// By Snappy.
    Snappy,
    /// By LZ4.
    Lz4,
    /// By Zstandard; a feature of this crate.
    Zstd,
}

impl Compression {
    /// Its name in librdkafka's settings and in the URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl FromStr for Compression {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        [Self::None, Self::Gzip, Self::Snappy, Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|compression| compression.as_str() == text)
            .ok_or("it is none, gzip, snappy, lz4 or zstd")
    }
}

/// Settings that belong together.
enum Preset {
    GoMicro,
}

impl FromStr for Preset {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "go-micro" => Ok(Self::GoMicro),
            _ => Err("it is go-micro"),
        }
    }
}

/// How a client proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sasl {
    /// The password as it is: use it over TLS.
    Plain,
    /// SCRAM with SHA-256.
    ScramSha256,
    /// SCRAM with SHA-512.
    ScramSha512,
}

impl FromStr for Sasl {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "plain" => Ok(Self::Plain),
            "scram-sha-256" => Ok(Self::ScramSha256),
            "scram-sha-512" => Ok(Self::ScramSha512),
            _ => Err("it is plain, scram-sha-256 or scram-sha-512"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_core::ErrorKind;

    fn read(url: &str) -> Result<KafkaConfig> {
        KafkaConfig::from_url(BrokerUrl::parse(url)?)
    }

    #[test]
    fn a_bare_host_gets_every_default() {
        let config = read("kafka://host").unwrap();
        assert_eq!(config.bootstrap_servers(), "host:9092");
        assert_eq!((config.security, config.sasl, config.partitions), (Security::Plaintext, None, None));
        assert_eq!((config.client_id.as_str(), config.connect_timeout), ("broker", Duration::from_secs(10)));
    }

    #[test]
    fn go_micros_group_is_its_queue() {
        let group: Group = "billing@orders.created".parse().unwrap();
        let config = read("kafka://host?preset=go-micro").unwrap();
        assert_eq!((config.format, config.group_id(&group)), (Format::GoMicro, "billing".to_owned()));
    }

    #[test]
    fn every_host_has_a_port() {
        let config = read("kafka://a,b:9094,[::1],[::1]:9095").unwrap();
        assert_eq!(config.hosts, ["a:9092", "b:9094", "[::1]:9092", "[::1]:9095"]);
    }

    #[test]
    fn a_user_is_proved_by_password_unless_told_otherwise() {
        assert_eq!(read("kafka://u:p@h").unwrap().sasl, Some(Sasl::Plain));
        let config = read("kafka://u:p%40ss@h?sasl=plain").unwrap();
        assert_eq!(config.credentials.map(|who| who.password().to_owned()).as_deref(), Some("p@ss"));
    }

    #[test]
    fn what_is_wrong_is_named_and_no_password_is_repeated() {
        for (url, named) in [
            ("http://u:hunter2@h", "scheme"),
            ("kafka:", "host"),
            ("kafka://u:hunter2@h/topic", "path"),
            ("kafka://u@h", "password"),
            ("kafka://:hunter2@h", "user"),
            ("kafka://h?sasl=plain", "sasl"),
            ("kafka://u:hunter2@h?sasl=md5", "scram-sha-256"),
            ("kafka://u:hunter2@h?security=tls", "plaintext or ssl"),
            ("kafka://u:hunter2@h?compression=zip", "zstd"),
            ("kafka://u:hunter2@h?librdkafka.enable.auto.commit=true", "enable.auto.commit"),
            ("kafka://u:hunter2@h?publish_timeout=0s", "publish_timeout"),
            ("kafka://u:hunter2@h?ca=x.pem", "ca"),
            ("kafka://u:hunter2@h?partitions=0", "partitions"),
            ("kafka://u:hunter2@h?partitions=10001", "10000"),
            ("kafka://u:hunter2@h?partitions=-1", "partitions"),
            ("kafka://u:hunter2@h?connect_timeout=0s", "connect_timeout"),
            ("kafka://u:hunter2@h?connect_timeout=2h", "connect_timeout"),
            ("kafka://u:hunter2@h?client_id=", "client_id"),
            ("kafka://u:hunter2@h?group_id.billing=x", "group_id.billing"),
            ("kafka://u:hunter2@h?group_id.billing@a=", "group.id"),
            ("kafka://u:hunter2@h?group_id.b@a=x&group_id.b@a=y", "twice"),
            ("kafka://u:hunter2@h?preset=nats", "go-micro"),
            ("kafka://u:hunter2@h?format=avro", "cloudevents"),
            ("kafka://u:hunter2@h?format=native&preset=go-micro", "preset"),
            ("kafka://u:hunter2@h?retry_topics=0s", "retry_topics"),
            ("kafka://u:hunter2@h?instance_id=", "instance_id"),
            ("kafka://u:hunter2@h?librdkafka.group.instance.id=x", "group.instance.id"),
            ("kafka://u:hunter2@h?librdkafka.transactional.id=x", "transactional.id"),
        ] {
            let error = read(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
            assert!(error.message().contains(named), "{url}: {error}");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn an_unknown_parameter_lists_the_known_ones() {
        let error = read("kafka://h?colour=red").unwrap_err();
        for known in ["colour", "security", "sasl", "partitions", "connect_timeout", "group_id.…", "client_id", "ca"]
        {
            assert!(error.message().contains(known), "{known} in {error}");
        }
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn what_the_build_lacks_is_unsupported() {
        for url in ["kafka://h?security=ssl", "kafka://u:p@h?sasl=scram-sha-256"] {
            let error = read(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{url}");
            assert!(error.message().contains("tls"), "{error}");
        }
    }

    #[test]
    fn debug_shows_no_credential() {
        for url in
            ["kafka://alice:hunter2@h", "kafka://h?librdkafka.sasl.username=alice&librdkafka.sasl.password=hunter2"]
        {
            let shown = format!("{:?}", read(url).unwrap());
            assert!(!shown.contains("hunter2") && !shown.contains("alice"), "{shown}");
        }
    }
}
