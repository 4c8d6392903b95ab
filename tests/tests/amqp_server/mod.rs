//! The RabbitMQ of these tests: the one that AMQP_URL names, or one of our own that `tests/servers up amqp`
//! starts.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub(crate) mod slow;
pub(crate) mod stranger;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use broker_amqp::lapin::{Channel, Connection, ConnectionProperties};
use broker_core::{Broker, Connectors, Delivery, Group, Result, Subscribe, Subscription, Topic};
use tokio::time::timeout;

/// One test of a file at a time has the server.
pub(crate) static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub(crate) const PARAMETERS: &str = "connect_timeout=3s&publish_timeout=3s&max_reconnect_wait=1s";

pub(crate) fn script(arguments: &[&str]) -> std::result::Result<String, String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("servers");
    let output = Command::new(path).args(arguments).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(text) } else { Err(text + &String::from_utf8_lossy(&output.stderr)) }
}

/// What the script printed under a name; nothing but its URL is known of a server that is not ours.
pub(crate) fn printed(name: &str) -> Option<String> {
    static PRINTED: OnceLock<String> = OnceLock::new();
    let all = PRINTED
        .get_or_init(|| script(&["up", "amqp"]).unwrap_or_else(|error| panic!("tests/servers up amqp: {error}")));
    all.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
}

/// The server's URL.
pub(crate) fn server() -> &'static str {
    static SERVER: OnceLock<String> = OnceLock::new();
    SERVER.get_or_init(|| printed("AMQP_URL").unwrap_or_else(|| panic!("tests/servers up amqp printed no AMQP_URL")))
}

/// Whether the server can be stopped and started: it is ours, whoever started it.
pub(crate) fn ours() -> bool {
    printed("AMQP_MANAGEMENT").is_some()
}

/// A broker at `url`, as it is.
pub(crate) fn open_as_it_is(url: &str) -> Result<Arc<dyn Broker>> {
    let mut connectors = Connectors::new();
    connectors.add(["amqp", "amqps"], broker_amqp::connector());
    connectors.open(url)
}

/// A broker at `url` that is not patient.
pub(crate) fn open(url: &str) -> Result<Arc<dyn Broker>> {
    let separator = if url.contains('?') { '&' } else { '?' };
    open_as_it_is(&format!("{url}{separator}{PARAMETERS}"))
}

/// The server's URL with another address, and another user if one is given.
pub(crate) fn at(address: &str, user: Option<&str>) -> String {
    let (scheme, rest) = server().split_once("://").unwrap_or(("amqp", server()));
    let (own, tail) = rest.rsplit_once('@').unwrap_or(("guest:guest", rest));
    let tail = tail.find(['/', '?']).map_or("", |end| &tail[end..]);
    format!("{scheme}://{}@{address}{tail}", user.unwrap_or(own))
}

/// The server's host and port.
pub(crate) fn address() -> &'static str {
    let hosts = server().rsplit_once('@').map_or(server(), |(_, hosts)| hosts);
    hosts.split(['/', '?']).next().unwrap_or(hosts)
}

/// The raw client, for what a stranger does.
pub(crate) async fn raw() -> (Connection, Channel) {
    let connection = Connection::connect(&format!("{}/%2f", server()), ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

/// Brings a fault about; false, said aloud, where the server is not ours.
pub(crate) async fn fault(what: &'static str) -> bool {
    if !ours() {
        println!("no control: {what}");
        return false;
    }
    let done = tokio::task::spawn_blocking(move || script(&[what, server()])).await;
    done.map_err(|error| error.to_string()).flatten().unwrap_or_else(|error| panic!("tests/servers {what}: {error}"));
    true
}

/// What `rabbitmqctl` says, on a server of ours.
pub(crate) fn ctl(arguments: &[&str]) -> String {
    let all = [&["ctl", server()], arguments].concat();
    script(&all).unwrap_or_else(|error| panic!("tests/servers {all:?}: {error}"))
}

/// A name nobody else uses.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

/// A topic nobody else uses, and a group of it.
pub(crate) fn names(name: &str) -> (Topic, Group) {
    let topic = Topic::new(format!("suite.{}", unique(name))).unwrap();
    let group = Group::new(name.parse().unwrap(), (&topic).into());
    (topic, group)
}

/// What comes of it, unless it hangs.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), future).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

pub(crate) async fn join(broker: &dyn Broker, group: &Group) -> Subscription {
    broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await.unwrap()
}

pub(crate) async fn next(member: &mut Subscription) -> Delivery {
    within("receiving", member.next()).await.unwrap().unwrap()
}
