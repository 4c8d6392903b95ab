//! How the adapter is set up: what the URL says, and what code may say besides.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use broker_core::{BrokerUrl, Error, Group, Result};

use crate::management::authority;
use crate::naming::short;
use crate::wire::Style;

/// What kind of queue a group is.
///
/// ```
/// use broker_amqp::QueueType;
/// assert_eq!("classic".parse::<QueueType>()?, QueueType::Classic);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueType {
    /// Replicated, and written to disk before it confirms.
    #[default]
    Quorum,
    /// Durable on one node; faster, and lost with its disk.
    Classic,
}

impl QueueType {
    /// The value of the queue argument `x-queue-type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Quorum => Self::Classic,
            Self::Classic => Self::Quorum,
        }
    }
}

impl FromStr for QueueType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "quorum" => Ok(Self::Quorum),
            "classic" => Ok(Self::Classic),
            _ => Err(Error::invalid(format!("queue type {text:?}: it is quorum or classic"))),
        }
    }
}

/// Conventions of somebody else's to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preset {
    GoMicro,
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "go-micro" => Ok(Self::GoMicro),
            _ => Err(Error::invalid(format!("preset {text:?}: there is go-micro"))),
        }
    }
}

/// Everything that can be set; the [crate documentation](crate#the-url) lists the URL's parameters.
///
/// ```
/// use broker_amqp::AmqpOptions;
/// use broker_core::BrokerUrl;
///
/// let url = BrokerUrl::parse("amqp://user:secret@a:5672,b:5672/orders?queue_type=classic")?;
/// let options = AmqpOptions::from_url(url)?;
/// assert_eq!(options.vhost(), "orders");
/// assert!(!format!("{options:?}").contains("secret"));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone)]
pub struct AmqpOptions {
    pub(crate) url: String,
    pub(crate) tls: bool,
    pub(crate) hosts: Vec<(String, u16)>,
    pub(crate) username: String,
    pub(crate) password: String,
    pub(crate) vhost: String,
    pub(crate) service: String,
    pub(crate) exchange: String,
    pub(crate) queue_type: QueueType,
    pub(crate) passive: bool,
    /// Exchange, queues and headers as Go Micro's RabbitMQ broker has them.
    pub(crate) go_micro: bool,
    pub(crate) persistent: bool,
    pub(crate) queues: BTreeMap<String, String>,
    /// How many queues an ordered group gets that is made by us.
    pub(crate) ordered_queues: u16,
    /// Where the management API answers: host and port.
    pub(crate) management: Option<String>,
    pub(crate) heartbeat: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) publish_timeout: Duration,
    pub(crate) max_reconnect_wait: Duration,
    pub(crate) max_message_bytes: usize,
    pub(crate) max_redeliveries: u64,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// The largest message this crate can be set to: what RabbitMQ takes by default.
const MAX_MESSAGE_BYTES: usize = 128 << 20;

/// Queues an ordered group has at most: each is a channel and a consumer of every member.
const MAX_ORDERED_QUEUES: u16 = 64;

impl AmqpOptions {
    /// Reads `amqp://user:password@host:port,host:port/vhost?…`. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming what is wrong and what is allowed; never
    /// the credentials.
    pub fn from_url(mut url: BrokerUrl) -> Result<Self> {
        let tls = url.scheme() == "amqps";
        let port = if tls { 5671 } else { 5672 };
        let hosts = url.hosts().map(|host| host_and_port(host, port)).collect::<Result<Vec<_>>>()?;
        if hosts.is_empty() {
            return Err(Error::invalid("broker URL has no host: it looks like amqp://user:password@host:5672/vhost"));
        }
        let seconds = Duration::from_secs;
        let go_micro = url.parameter::<Preset>("preset")?.is_some();
        let exchange = if go_micro { "micro" } else { "broker" };
        let options = Self {
            url: url.to_string(),
            tls,
            hosts,
            username: url.username().unwrap_or("guest").to_owned(),
            password: url.password().unwrap_or("guest").to_owned(),
            vhost: vhost(url.path())?,
            service: url.parameter("name")?.unwrap_or_else(|| "broker-amqp".to_owned()),
            exchange: url.parameter("exchange")?.unwrap_or_else(|| exchange.to_owned()),
            queue_type: url.parameter("queue_type")?.unwrap_or_default(),
            passive: url.parameter("passive")?.unwrap_or(false),
            go_micro,
            persistent: url.parameter("persistent")?.unwrap_or(true),
            queues: url.take_prefixed("queue.").into_iter().map(adopted).collect::<Result<_>>()?,
            ordered_queues: url.parameter("ordered_queues")?.unwrap_or(1),
            management: url.parameter::<String>("management")?.map(|url| authority(&url)).transpose()?,
            heartbeat: url.duration("heartbeat")?.unwrap_or(seconds(10)),
            connect_timeout: url.duration("connect_timeout")?.unwrap_or(seconds(10)),
            publish_timeout: url.duration("publish_timeout")?.unwrap_or(seconds(30)),
            max_reconnect_wait: url.duration("max_reconnect_wait")?.unwrap_or(seconds(10)),
            max_message_bytes: url.parameter("max_message_bytes")?.unwrap_or(1 << 20),
            max_redeliveries: url.parameter("max_redeliveries")?.unwrap_or(20),
            ca: url.parameter("ca")?,
            cert: url.parameter("cert")?,
            key: url.parameter("key")?,
        };
        url.finish()?;
        options.checked()
    }

    fn checked(self) -> Result<Self> {
        short("broker URL parameter exchange", &self.exchange)?;
        short("broker URL's vhost", &self.vhost)?;
        if self.exchange.is_empty() || self.exchange.starts_with("amq.") {
            return Err(Error::invalid(format!(
                "broker URL parameter exchange {:?}: it is a name that does not begin with amq.",
                self.exchange
            )));
        }
        let heartbeat = self.heartbeat.as_secs();
        if heartbeat == 0 || heartbeat > 3600 || self.heartbeat.subsec_nanos() != 0 {
            return Err(Error::invalid("broker URL parameter heartbeat: it is whole seconds, 1s to 1h"));
        }
        for (name, time) in [
            ("connect_timeout", self.connect_timeout),
            ("publish_timeout", self.publish_timeout),
            ("max_reconnect_wait", self.max_reconnect_wait),
        ] {
            if time.is_zero() || time > Duration::from_secs(3600) {
                return Err(Error::invalid(format!("broker URL parameter {name}: it is between 1ms and 1h")));
            }
        }
        if !(1..=MAX_MESSAGE_BYTES).contains(&self.max_message_bytes) {
            return Err(Error::invalid(format!(
                "broker URL parameter max_message_bytes is {}: it is between 1 and {MAX_MESSAGE_BYTES}",
                self.max_message_bytes
            )));
        }
        if self.go_micro && self.passive {
            return Err(Error::invalid("broker URL parameters preset and passive do not go together"));
        }
        if !(1..=MAX_ORDERED_QUEUES).contains(&self.ordered_queues) {
            return Err(Error::invalid(format!(
                "broker URL parameter ordered_queues is {}: it is between 1 and {MAX_ORDERED_QUEUES}",
                self.ordered_queues
            )));
        }
        if self.max_redeliveries == 0 {
            return Err(Error::invalid("broker URL parameter max_redeliveries is 0: it is 1 or more"));
        }
        if self.cert.is_some() != self.key.is_some() {
            return Err(Error::invalid("broker URL parameters cert and key go together"));
        }
        if !self.tls && (self.ca.is_some() || self.cert.is_some()) {
            return Err(Error::invalid("broker URL parameters ca, cert and key are for amqps: URLs"));
        }
        Ok(self)
    }

    pub(crate) fn style(&self) -> Style {
        Style { persistent: self.persistent, go_micro: self.go_micro }
    }

    /// The virtual host.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Sets what the connections are called in the server's own listing: the service's name.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.service = name.into();
        self
    }

    /// Has `group` use a queue of another name, one that is there already for instance.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for no name, or one over 255 bytes.
    pub fn with_queue(mut self, group: &Group, queue: impl Into<String>) -> Result<Self> {
        let (group, queue) = adopted((format!("queue.{group}"), queue.into()))?;
        self.queues.insert(group, queue);
        Ok(self)
    }
}

fn adopted((name, queue): (String, String)) -> Result<(String, String)> {
    let group: Group = name.strip_prefix("queue.").unwrap_or(&name).parse()?;
    short("queue", &queue)?;
    if queue.is_empty() {
        return Err(Error::invalid(format!("the queue of group {group} is empty: it is a name of 1 to 255 bytes")));
    }
    Ok((group.to_string(), queue))
}

fn host_and_port(text: &str, default: u16) -> Result<(String, u16)> {
    let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_owned();
    match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            let port = port.parse().map_err(|_| Error::invalid("a port in the broker URL is not one"))?;
            Ok((bare(host), port))
        }
        _ => Ok((bare(text), default)),
    }
}

/// `/` and nothing at all are the default virtual host; `/%2f` is it spelled out.
fn vhost(path: &str) -> Result<String> {
    let path = path.strip_prefix('/').unwrap_or(path);
    if path.contains('/') {
        return Err(Error::invalid("the broker URL's vhost has a slash: write it as %2F"));
    }
    let name = percent_encoding::percent_decode_str(path)
        .decode_utf8()
        .map_err(|_| Error::invalid("the broker URL's vhost is not UTF-8"))?;
    Ok(if name.is_empty() { "/".to_owned() } else { name.into_owned() })
}

/// Without credentials.
impl fmt::Debug for AmqpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpOptions")
            .field("url", &self.url)
            .field("service", &self.service)
            .field("exchange", &self.exchange)
            .field("queue_type", &self.queue_type)
            .field("passive", &self.passive)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> Result<AmqpOptions> {
        AmqpOptions::from_url(BrokerUrl::parse(url)?)
    }

    #[test]
    fn reads_hosts_vhost_and_adopted_queues() {
        let read = options("amqp://u:p@a,b:1,[::1]:2,[::1]/%2fteam?queue.billing@orders.>=legacy").unwrap();
        let hosts: Vec<_> = read.hosts.iter().map(|(host, port)| format!("{host} {port}")).collect();
        assert_eq!(hosts, ["a 5672", "b 1", "::1 2", "::1 5672"]);
        assert_eq!(read.vhost, "/team");
        assert_eq!(read.queues.get("billing@orders.>").map(String::as_str), Some("legacy"));
        assert_eq!(options("amqps://h").unwrap().hosts, [("h".to_owned(), 5671)]);
        assert_eq!(options("amqp://h").unwrap().vhost, "/");
        assert_eq!(options("amqp://h/").unwrap().vhost, "/");
    }

    #[test]
    fn refuses_what_it_cannot_keep_and_names_it() {
        for (url, named) in [
            ("amqp:", "host"),
            ("amqp://h?colour=red", "colour"),
            ("amqp://h?heartbeat=500ms", "heartbeat"),
            ("amqp://h?publish_timeout=0s", "publish_timeout"),
            ("amqp://h?queue_type=stream", "queue_type"),
            ("amqp://h?ordered_queues=0", "ordered_queues"),
            ("amqp://h?management=https://h", "management"),
            ("amqp://h?preset=go-kit", "go-micro"),
            ("amqp://h?max_message_bytes=0", "max_message_bytes"),
            ("amqp://h?cert=a", "key"),
            ("amqp://h?ca=a", "amqps"),
            ("amqp://h?exchange=amq.topic", "exchange"),
            ("amqp://h?queue.billing=x", "billing"),
            ("amqp://h/a/b", "%2F"),
        ] {
            let error = options(url).unwrap_err();
            assert_eq!(error.kind(), broker_core::ErrorKind::Invalid, "{url}");
            assert!(error.message().contains(named), "{url}: {error}");
        }
    }
}
