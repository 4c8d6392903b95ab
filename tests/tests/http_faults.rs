//! What the network and the machine do to an HTTP broker: a daemon killed, a connection half-open,
//! slow, or cut in the middle of an answer.

use std::collections::BTreeSet;
use std::error::Error;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, BrokerExt, Connectors, ErrorKind, Group, GroupOptions, Message, PublisherOptions, Subscribe,
    Topic,
};
use broker_http::{Server, ServerOptions};
use broker_tests::{Fault, Harness, Link, Outcome, Proxy, Report, Suite, numbered, url};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

type Tested = Result<(), Box<dyn Error>>;

/// A hang guard: nothing here measures.
const PATIENCE: Duration = Duration::from_secs(60);

fn connectors() -> Connectors {
    let mut connectors = Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    connectors
}

/// A server in this process, a proxy before it, and a broker through the proxy and one beside it.
struct Stage {
    _server: Server,
    proxy: Proxy,
    through: Arc<dyn Broker>,
    direct: Arc<dyn Broker>,
    topic: Topic,
    group: Group,
}

impl Stage {
    async fn set() -> Result<Self, Box<dyn Error>> {
        let server = Server::new(Connectors::new().open("memory:")?, ServerOptions::new().with_development(true));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await });
        let proxy = Proxy::start(address.to_string()).await?;
        let parameters = "lease=2s&timeout=2s&wait=1s";
        let through = connectors().open(&format!("http://{}?{parameters}", proxy.address()))?;
        let direct = connectors().open(&format!("http://{address}?{parameters}"))?;
        let topic = Topic::new("faults")?;
        let group: Group = "workers@faults".parse()?;
        direct.create_group(&group, GroupOptions::new()).await?;
        Ok(Self { _server: server, proxy, through, direct, topic, group })
    }

    /// Receives through the proxy until every message has come, each whole.
    async fn receive_all(&self, messages: &[Message]) -> Tested {
        let options = Subscribe::group(self.group.name.clone());
        let mut member = self.through.subscribe(&self.group.filter, options).await?;
        let mut missing: BTreeSet<String> = messages.iter().map(|message| message.id().to_string()).collect();
        let receiving = async {
            while !missing.is_empty() {
                let delivery = member.next().await?.ok_or("the subscription ended")?;
                let sent = messages.iter().find(|message| message.id() == delivery.message().id());
                let sent = sent.ok_or("a message nobody published")?;
                assert_eq!(sent.payload(), delivery.message().payload());
                missing.remove(&sent.id().to_string());
                // A settlement lost with its connection is no failure: the message comes back.
                let _ = delivery.ack().await;
            }
            Tested::Ok(())
        };
        timeout(PATIENCE, receiving).await.map_err(|_| "some messages never came")??;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_a_timeout_and_then_it_is_over() -> Tested {
    let stage = Stage::set().await?;
    let publisher = stage.through.publisher(&stage.topic, PublisherOptions::new())?;
    let messages = numbered(3);
    publisher.publish(messages[0].clone()).await?;
    stage.proxy.set(Fault::HalfOpen);
    let lost = timeout(PATIENCE, publisher.publish(messages[1].clone())).await?;
    let error = lost.err().ok_or("nobody was there to take it")?;
    assert!([ErrorKind::Timeout, ErrorKind::Unavailable].contains(&error.kind()), "{error}");
    assert!(error.is_retryable(), "{error}");
    stage.proxy.set(Fault::None);
    // The same message again: what a caller does with a retryable error.
    timeout(PATIENCE, async {
        for message in &messages[1..] {
            while publisher.publish(message.clone()).await.is_err() {}
        }
    })
    .await?;
    stage.receive_all(&messages).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_short_loses_nothing_and_mangles_nothing() -> Tested {
    let stage = Stage::set().await?;
    let publisher = stage.through.publisher(&stage.topic, PublisherOptions::new())?;
    // Cut in the status line, in the head, in the body.
    let mut messages = Vec::new();
    for bytes in [1, 40, 120] {
        stage.proxy.set(Fault::CutAnswer(bytes));
        let message = Message::new(format!("cut after {bytes}"));
        let cut = timeout(PATIENCE, publisher.publish(message.clone())).await?;
        if let Err(error) = cut {
            assert!(error.is_retryable(), "{error}");
        }
        stage.proxy.set(Fault::None);
        timeout(PATIENCE, async { while publisher.publish(message.clone()).await.is_err() {} }).await?;
        messages.push(message);
    }
    // The answers of pulls are cut as well: what they carried is leased, and comes again.
    let through = Arc::clone(&stage.through);
    let mut member = through.subscribe(&stage.group.filter, Subscribe::group(stage.group.name.clone())).await?;
    stage.proxy.set(Fault::CutAnswer(200));
    let cut = timeout(Duration::from_secs(2), member.next()).await;
    drop(cut);
    stage.proxy.set(Fault::None);
    drop(member);
    stage.receive_all(&messages).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_subscription_goes_on_where_it_was() -> Tested {
    let stage = Stage::set().await?;
    let messages = numbered(20);
    stage.proxy.set(Fault::Stall);
    let publishing = async {
        for message in &messages {
            stage.direct.publish(&stage.topic, message.clone()).await?;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        stage.proxy.set(Fault::None);
        Tested::Ok(())
    };
    // Subscribing through a stalled line may time out: again, then.
    let receiving = async {
        let options = || Subscribe::group(stage.group.name.clone());
        let trying = async { while stage.through.subscribe(&stage.group.filter, options()).await.is_err() {} };
        timeout(PATIENCE, trying).await?;
        stage.receive_all(&messages).await
    };
    let (published, received) = tokio::join!(publishing, receiving);
    published?;
    received
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_line_changes_nothing() -> Tested {
    let server = Server::new(Connectors::new().open("memory:")?, ServerOptions::new().with_development(true));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let proxy = Proxy::start(listener.local_addr()?.to_string()).await?;
    proxy.set(Fault::Delay(Duration::from_millis(30)));
    tokio::spawn(async move { server.serve(listener).await });
    let suite = url::suite(&connectors(), &format!("http://{}", proxy.address()), url::no_raw_client)?;
    let suite = suite.only(["A1", "A4", "B1", "B4", "C2", "C3", "D2", "E1", "E7", "F5"]).parallel(8);
    good(&suite.run(|report| println!("{report} ({} ms)", report.millis)).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_under_load_is_found_again() -> Tested {
    let daemon = Arc::new(Daemon::start().await?);
    let suite = Suite::new("broker-http, killed", move || Arc::clone(&daemon)).only(["F1"]);
    let reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    // In memory: what the daemon had when it was killed is gone, which it declares.
    let declared = |report: &Report| matches!(report.outcome, Outcome::RefusedAsDeclared(_));
    assert!(reports.iter().all(declared), "{reports:?}");
    good(&reports)
}

fn good(reports: &[Report]) -> Tested {
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    if bad.is_empty() { Ok(()) } else { Err(bad.join("\n").into()) }
}

/// A daemon in a process of its own, that can be killed and started again on its port.
#[derive(Debug)]
struct Daemon {
    state: tempfile::TempDir,
    process: Arc<Mutex<Child>>,
    address: String,
}

impl Daemon {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let state = tempfile::tempdir()?;
        let (process, address) = spawn(state.path(), "127.0.0.1:0").await?;
        Ok(Self { state, process: Arc::new(Mutex::new(process)), address })
    }

    fn open(&self) -> broker_core::Result<Arc<dyn Broker>> {
        connectors().open(&format!("http://{}?lease=2s&timeout=5s", self.address))
    }
}

/// Where the process below listens, and where it keeps its subscriptions.
const LISTEN: &str = "BROKER_TESTS_LISTEN";
const STATE: &str = "BROKER_TESTS_STATE";

/// No test: the daemon of those above. This binary starts itself with this alone to run, so that the
/// daemon is as fresh as its tests.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the daemon that another test starts and kills"]
async fn daemon() -> Tested {
    let (Ok(listen), Ok(state)) = (std::env::var(LISTEN), std::env::var(STATE)) else { return Ok(()) };
    let options = ServerOptions::new().with_development(true).with_state(state);
    let server = Server::new(Connectors::new().open("memory:")?, options);
    let listener = tokio::net::TcpListener::bind(listen).await?;
    println!("\nlistening on http://{}", listener.local_addr()?);
    Ok(server.serve(listener).await?)
}

/// Starts it, and waits until it accepts connections.
async fn spawn(state: &std::path::Path, listen: &str) -> Result<(Child, String), Box<dyn Error>> {
    let mut process = Command::new(std::env::current_exe()?)
        .args(["--exact", "daemon", "--ignored", "--nocapture"])
        .env(LISTEN, listen)
        .env(STATE, state.join("subscriptions.json"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(process.stdout.take().ok_or("its output was asked for")?).lines();
    let waiting = async {
        while let Some(line) = lines.next_line().await? {
            if let Some((_, address)) = line.split_once("listening on http://") {
                return Ok(address.to_owned());
            }
        }
        Err::<_, Box<dyn Error>>("the daemon ended before it listened".into())
    };
    let address = timeout(PATIENCE, waiting).await??;
    // Its later lines are read and dropped, so that it never waits for us.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok((process, address))
}

impl Harness for Daemon {
    fn name(&self) -> String {
        "broker-http".to_owned()
    }

    fn open(&self) -> broker_core::Result<Arc<dyn Broker>> {
        self.open()
    }

    fn link(&self) -> BoxFuture<'_, broker_core::Result<Option<Arc<dyn Link>>>> {
        let link = Killable {
            url: format!("http://{}?lease=2s&timeout=5s", self.address),
            address: self.address.clone(),
            state: self.state.path().to_owned(),
            process: Arc::clone(&self.process),
        };
        Box::pin(std::future::ready(Ok(Some(Arc::new(link) as Arc<dyn Link>))))
    }
}

#[derive(Debug)]
struct Killable {
    url: String,
    address: String,
    state: std::path::PathBuf,
    process: Arc<Mutex<Child>>,
}

impl Link for Killable {
    fn open(&self) -> broker_core::Result<Arc<dyn Broker>> {
        connectors().open(&self.url)
    }

    fn connections(&self) -> Option<u64> {
        None
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.down()
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move { drop(self.process.lock().await.kill().await) })
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.down()
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move { drop(self.restart().await) })
    }

    fn restart(&self) -> BoxFuture<'_, broker_core::Result<bool>> {
        Box::pin(async move {
            let failed = |what: &str| broker_core::Error::backend(format!("restart the daemon: {what}"));
            let mut process = self.process.lock().await;
            process.kill().await.map_err(|error| failed(&error.to_string()))?;
            let started = spawn(&self.state, &self.address).await.map_err(|error| error.to_string());
            *process = started.map_err(|error| failed(&error))?.0;
            Ok(true)
        })
    }
}
