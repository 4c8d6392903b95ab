//! The suite on a real RabbitMQ: the one that AMQP_URL names, or one of our own that
//! `tests/servers up amqp` starts.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use broker_amqp::{AmqpBroker, AmqpOptions, lapin};
use broker_core::{BoxFuture, Broker, BrokerUrl, Connectors, Error, Result, Topic};
use broker_tests::{Fault, Harness, Link, Proxy, Report, Secret, Suite, Timing, summary};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};

fn script(arguments: &[&str]) -> std::result::Result<String, String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("servers");
    let output = Command::new(path).args(arguments).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(text) } else { Err(text + &String::from_utf8_lossy(&output.stderr)) }
}

/// The server's URL.
fn server() -> &'static str {
    static SERVER: OnceLock<String> = OnceLock::new();
    SERVER.get_or_init(|| {
        let printed = script(&["up", "amqp"]).unwrap_or_else(|error| panic!("tests/servers up amqp: {error}"));
        let url = printed.lines().find_map(|line| line.strip_prefix("AMQP_URL="));
        url.unwrap_or_else(|| panic!("no AMQP_URL in {printed:?}")).to_owned()
    })
}

/// Whether the server can be stopped and started: it is ours.
fn ours() -> bool {
    std::env::var_os("AMQP_URL").is_none()
}

const PARAMETERS: &str = "connect_timeout=3s&publish_timeout=3s&max_reconnect_wait=1s";

fn open(url: &str) -> Result<Arc<dyn Broker>> {
    let mut connectors = Connectors::new();
    connectors.add(["amqp", "amqps"], broker_amqp::connector());
    let separator = if url.contains('?') { '&' } else { '?' };
    connectors.open(&format!("{url}{separator}{PARAMETERS}"))
}

/// The server's URL with another address, and another user if one is given.
fn at(address: &str, user: Option<&str>) -> String {
    let (scheme, rest) = server().split_once("://").unwrap_or(("amqp", server()));
    let (own, tail) = rest.rsplit_once('@').unwrap_or(("guest:guest", rest));
    let tail = tail.find(['/', '?']).map_or("", |end| &tail[end..]);
    format!("{scheme}://{}@{address}{tail}", user.unwrap_or(own))
}

fn address() -> &'static str {
    let hosts = server().rsplit_once('@').map_or(server(), |(_, hosts)| hosts);
    hosts.split(['/', '?']).next().unwrap_or(hosts)
}

fn nowhere() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map(|address| address.to_string()).map_err(|error| Error::backend("no free port").with_source(error))
}

#[derive(Debug)]
struct RabbitMq {
    /// Nobody else uses the server meanwhile: it may be restarted.
    alone: bool,
    queue_type: &'static str,
}

impl RabbitMq {
    fn parameters(&self, url: &str) -> String {
        let separator = if url.contains('?') { '&' } else { '?' };
        format!("{url}{separator}queue_type={}&exchange=suite.{}", self.queue_type, self.queue_type)
    }
}

impl Harness for RabbitMq {
    fn name(&self) -> String {
        format!("amqp: ({})", self.queue_type)
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        open(&self.parameters(server()))
    }

    fn timing(&self) -> Timing {
        Timing { lease: Duration::ZERO, ..Timing::default() }
    }

    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        Box::pin(async move {
            let proxy = Proxy::start(address()).await;
            let proxy = proxy.map_err(|error| Error::backend("start a proxy").with_source(error))?;
            let url = self.parameters(&at(&proxy.address().to_string(), None));
            Ok(Some(Arc::new(Proxied { proxy, url, alone: self.alone }) as Arc<dyn Link>))
        })
    }

    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        Some(nowhere().and_then(|nowhere| open(&at(&nowhere, None))))
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-suite".to_owned();
        // The server says no to it, and says so in its own words.
        let opened = open(&at(address(), Some(&format!("user:{text}"))));
        Some(Secret { text, opened })
    }

    fn inject<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        Box::pin(async move {
            // A key that is no string: whoever wrote it is not us.
            let mut headers = FieldTable::default();
            headers.insert("x-broker-key".into(), AMQPValue::LongInt(7));
            let properties = BasicProperties::default().with_headers(headers);
            let exchange = format!("suite.{}", self.queue_type);
            Some(publish_raw(&exchange, topic.as_str(), b"\xff", properties).await)
        })
    }

    fn raw_client(&self, broker: &dyn Broker) -> Option<bool> {
        let broker: &dyn std::any::Any = broker;
        Some(broker.downcast_ref::<AmqpBroker>().is_some())
    }
}

async fn publish_raw(exchange: &str, key: &str, body: &[u8], properties: BasicProperties) -> Result<()> {
    let publish = async {
        let connection = Connection::connect(&format!("{}/%2f", server()), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicPublishOptions::default();
        channel.basic_publish(exchange.into(), key.into(), options, body, properties).await?.await?;
        connection.close(200, "OK".into()).await
    };
    publish.await.map_err(|error: lapin::Error| Error::backend("publish past the adapter").with_source(error))
}

#[derive(Debug)]
struct Proxied {
    proxy: Proxy,
    url: String,
    alone: bool,
}

impl Link for Proxied {
    fn open(&self) -> Result<Arc<dyn Broker>> {
        open(&self.url)
    }

    fn connections(&self) -> Option<u64> {
        Some(self.proxy.accepted())
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.proxy.cut();
        Box::pin(std::future::ready(()))
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Refuse);
        self.proxy.cut();
        Box::pin(std::future::ready(()))
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Stall);
        Box::pin(std::future::ready(()))
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::None);
        Box::pin(std::future::ready(()))
    }

    fn restart(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            if self.alone && ours() {
                let restart = tokio::task::spawn_blocking(|| script(&["restart", server()]));
                restart
                    .await
                    .map_err(|error| Error::backend("restart RabbitMQ").with_source(error))?
                    .map_err(|error| Error::backend(format!("restart RabbitMQ: {error}")))?;
                return Ok(true);
            }
            self.down().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.up().await;
            Ok(false)
        })
    }
}

async fn run(queue_type: &'static str) {
    let name = format!("amqp: ({queue_type})");
    let wanted = std::env::var("CHECKS").ok();
    let suite = Suite::new(name.clone(), move || Arc::new(RabbitMq { alone: false, queue_type })).parallel(4);
    let suite = match &wanted {
        Some(wanted) => suite.only(wanted.split(',')),
        None => suite,
    };
    let mut reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    if wanted.is_none() {
        // Alone on the server, which now really is restarted.
        let faults = Suite::new(name.clone(), move || Arc::new(RabbitMq { alone: true, queue_type })).only(["F1"]);
        reports.extend(faults.run(|report| println!("restarted: {report} ({} ms)", report.millis)).await);
    }
    println!("{}", summary(&name, &reports));
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// One test after another: the last part of each has the server to itself.
#[tokio::test(flavor = "multi_thread")]
async fn every_check_on_both_kinds_of_queue() {
    let _ = AmqpOptions::from_url(BrokerUrl::parse(server()).unwrap()).unwrap();
    match std::env::var("QUEUES").as_deref() {
        Ok("classic") => run("classic").await,
        Ok("quorum") => run("quorum").await,
        _ => {
            run("quorum").await;
            run("classic").await;
        }
    }
}
