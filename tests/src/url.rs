//! A harness for any broker that has a URL: with a proxy before it where it speaks TCP to one host.

use std::fmt;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{BoxFuture, Broker, BrokerUrl, Connectors, Error, Result, Topic};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Fault, Harness, InProcess, Link, Place, Proxy, Secret, Suite, Timing};

/// Whether an adapter's raw client can be reached through a handle; `None` if it has none. Only who knows
/// the adapters can tell.
pub type RawClient = fn(&dyn Broker) -> BoxFuture<'_, Option<bool>>;

/// Of a broker that has none.
pub fn no_raw_client(_: &dyn Broker) -> BoxFuture<'_, Option<bool>> {
    Box::pin(std::future::ready(None))
}

/// The suite against the broker at `url`.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid) if the URL names no broker that `connectors` knows.
pub fn suite(connectors: &Connectors, url: &str, raw: RawClient) -> Result<Suite> {
    let parsed = BrokerUrl::parse(url)?;
    // Whatever is wrong with it is told before anything runs.
    drop(connectors.open(url)?);
    let name = parsed.to_string();
    if parsed.scheme() == "memory" {
        let parameters = url.split_once('?').map(|(_, query)| query.to_owned());
        return Ok(Suite::new(name, move || Arc::new(InProcess::with_parameters(parameters.clone()))));
    }
    let (connectors, url) = (connectors.clone(), url.to_owned());
    Ok(Suite::new(name.clone(), move || {
        Arc::new(AtUrl {
            name: name.clone(),
            url: url.clone(),
            parsed: parsed.clone(),
            connectors: connectors.clone(),
            raw,
        })
    }))
}

struct AtUrl {
    name: String,
    /// As it was given, credentials included: never printed.
    url: String,
    parsed: BrokerUrl,
    connectors: Connectors,
    raw: RawClient,
}

impl fmt::Debug for AtUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AtUrl").field(&self.name).finish()
    }
}

impl AtUrl {
    /// The URL with other hosts, and another user if one is given.
    fn at(&self, authority: &str, user: Option<&str>) -> String {
        let Some((scheme, rest)) = self.url.split_once("://") else { return self.url.clone() };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (have, tail) = rest.split_at(end);
        let own = have.rsplit_once('@').map(|(user, _)| user);
        match user.or(own) {
            Some(user) => format!("{scheme}://{user}@{authority}{tail}"),
            None => format!("{scheme}://{authority}{tail}"),
        }
    }

    /// An address where nobody listens.
    fn nowhere() -> Result<String> {
        // The port was free a moment ago, and is given to nobody else for a while.
        let listener = TcpListener::bind("127.0.0.1:0");
        let address = listener.and_then(|listener| listener.local_addr());
        Ok(address.map_err(|error| Error::backend("no free port").with_source(error))?.to_string())
    }

    /// The one host a proxy can stand before.
    fn host(&self) -> Option<&str> {
        // A Kafka client learns its brokers' addresses from them, and passes a proxy by.
        let proxied = ["http", "amqp"].contains(&self.parsed.scheme());
        let mut hosts = self.parsed.hosts();
        hosts.next().filter(|host| proxied && hosts.next().is_none() && host.contains(':'))
    }
}

impl Harness for AtUrl {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        self.connectors.open(&self.url)
    }

    fn place(&self) -> Place {
        Place::Server
    }

    fn timing(&self) -> Timing {
        let timing = Timing::default();
        // What the URL says of a lease, the broker's client has read as well.
        let lease = self.parsed.clone().duration("lease").ok().flatten();
        Timing { lease: lease.unwrap_or(timing.lease), ..timing }
    }

    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        Box::pin(async move {
            let Some(host) = self.host() else { return Ok(None) };
            let proxy = Proxy::start(host).await;
            let proxy = proxy.map_err(|error| Error::backend("start a proxy").with_source(error))?;
            let url = self.at(&proxy.address().to_string(), None);
            Ok(Some(Arc::new(Proxied { proxy, url, connectors: self.connectors.clone() }) as Arc<dyn Link>))
        })
    }

    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        Some(Self::nowhere().and_then(|nowhere| self.connectors.open(&self.at(&nowhere, None))))
    }

    fn raw_client<'a>(&'a self, broker: &'a dyn Broker) -> BoxFuture<'a, Option<bool>> {
        (self.raw)(broker)
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-suite".to_owned();
        let opened =
            Self::nowhere().and_then(|nowhere| self.connectors.open(&self.at(&nowhere, Some(&format!("user:{text}")))));
        Some(Secret { text, opened })
    }

    fn inject<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        Box::pin(async move {
            let host = self.host().filter(|_| self.parsed.scheme() == "http")?;
            Some(post_garbage(host, topic).await)
        })
    }
}

/// Publishes what says it is a CloudEvent and is none.
async fn post_garbage(host: &str, topic: &Topic) -> Result<()> {
    let body = br#"{"specversion":"1.0","id":7,"data_base64":"???"#;
    let head = format!(
        "POST /topics/{topic} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/cloudevents+json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let exchange = async {
        let mut stream = TcpStream::connect(host).await?;
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body).await?;
        let mut answer = Vec::new();
        stream.take(64 * 1024).read_to_end(&mut answer).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), exchange).await;
    let answer = answer.map_err(|_| Error::timeout("no answer within 10 s"))?;
    let answer = answer.map_err(|error| Error::unavailable("publish").with_source(error))?;
    match answer.split(' ').nth(1) {
        Some("202") => Ok(()),
        Some("400") => Err(Error::codec("the server refused it")),
        other => Err(Error::backend(format!("the server answered {other:?}"))),
    }
}

/// The way through a proxy.
struct Proxied {
    proxy: Proxy,
    url: String,
    connectors: Connectors,
}

impl fmt::Debug for Proxied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxied").field(&self.proxy).finish()
    }
}

fn done() -> BoxFuture<'static, ()> {
    Box::pin(std::future::ready(()))
}

impl Link for Proxied {
    fn open(&self) -> Result<Arc<dyn Broker>> {
        self.connectors.open(&self.url)
    }

    fn connections(&self) -> Option<u64> {
        Some(self.proxy.accepted())
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.proxy.cut();
        done()
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Refuse);
        self.proxy.cut();
        done()
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::Stall);
        done()
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        self.proxy.set(Fault::None);
        done()
    }
}
