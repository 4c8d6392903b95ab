//! `broker-http serve`: the daemon.

use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use broker_core::{Broker, DrainReport, format_duration, parse_duration};
use broker_http::Server;
use tokio::net::TcpListener;

use crate::config::Config;
use crate::connectors;
use crate::output::say;

/// How the daemon is started. Flags come before the environment, that before the configuration
/// file, and that before the defaults.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 picks one, unix:PATH is a Unix socket [default: 127.0.0.1:2757]
    #[arg(long, env = "BROKER_HTTP_LISTEN", value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,

    /// A TOML file with the names of these options as keys, and allow, allowed_origins and [limits]
    #[arg(long, env = "BROKER_HTTP_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// The broker behind the interface [default: memory:]
    #[arg(long, env = "BROKER_HTTP_BROKER", value_name = "URL", hide_env_values = true)]
    pub(crate) broker: Option<String>,

    /// Keep subscriptions in this file over a restart
    #[arg(long, env = "BROKER_HTTP_STATE", value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,

    /// Development mode: endpoints on this machine may be pushed to, other hosts and web pages are
    /// refused. It is on by itself when listening on loopback
    #[arg(long, env = "BROKER_HTTP_DEV")]
    pub(crate) dev: bool,

    /// Endpoints that may be pushed to although their addresses are private: a CIDR such as
    /// 10.0.0.0/8, or a host name; may be repeated
    #[arg(long, env = "BROKER_HTTP_ALLOW", value_name = "CIDR|HOST", value_delimiter = ',')]
    pub(crate) allow: Vec<String>,

    /// Ask every endpoint whether it wants pushes from this name of the daemon, by the OPTIONS
    /// handshake of CloudEvents' web hooks
    #[arg(long, env = "BROKER_HTTP_WEBHOOK_ORIGIN", value_name = "NAME")]
    pub(crate) webhook_origin: Option<String>,

    /// How long a shutdown waits for what is in flight [default: 20s]
    #[arg(long, env = "BROKER_HTTP_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub(crate) drain: Option<Duration>,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.message().to_owned())
}

/// The exit status of a shutdown that was cut.
const CUT: u8 = 3;

pub(crate) async fn run(args: Args) -> ExitCode {
    start_logging();
    match serve(args).await {
        Ok(code) => code,
        Err(why) => {
            say!("broker-http: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Warnings go to standard error; RUST_LOG asks for more or less.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

async fn serve(args: Args) -> Result<ExitCode, String> {
    let config = Config::merge(args)?;
    let mut signals = Signals::new().map_err(|error| format!("cannot listen for signals: {error}"))?;
    let broker = connectors().open(&config.broker).map_err(|error| error.message().to_owned())?;
    broker.connect().await.map_err(|error| format!("cannot connect to the broker {}: {error}", broker.name()))?;
    let listener = Listener::bind(&config.listen).await?;
    let development = config.dev || listener.is_loopback();
    let options = config.options()?.with_development(development);
    let server = Server::new(broker, options);
    server.restore().await.map_err(|error| error.message().to_owned())?;

    announce(&listener, &**server.broker(), development);
    let serving = {
        let server = server.clone();
        tokio::spawn(async move {
            match listener {
                Listener::Tcp(listener, _) => server.serve(listener).await,
                #[cfg(unix)]
                Listener::Unix(listener, _) => server.serve_unix(listener).await,
            }
        })
    };
    let signal = signals.next().await;
    say!("broker-http: {signal}: shutting down, {} at most", format_duration(config.drain));
    let report = tokio::select! {
        report = server.drain(config.drain) => report,
        signal = signals.next() => {
            say!("broker-http: {signal} again: cut; what was in flight is not finished");
            return Ok(ExitCode::from(CUT));
        }
    };
    let _ = serving.await;
    say!("broker-http: {}", describe(&report, server.broker().name()));
    Ok(if report.complete { ExitCode::SUCCESS } else { ExitCode::from(CUT) })
}

/// Where the daemon listens.
enum Listener {
    Tcp(TcpListener, std::net::SocketAddr),
    #[cfg(unix)]
    Unix(tokio::net::UnixListener, PathBuf),
}

impl Listener {
    async fn bind(listen: &str) -> Result<Self, String> {
        let fails = |error: &std::io::Error| {
            format!("cannot listen on {listen}: {error}; choose another address with --listen HOST:PORT")
        };
        #[cfg(unix)]
        if let Some(path) = listen.strip_prefix("unix:") {
            let listener = bind_unix(path).map_err(|error| fails(&error))?;
            return Ok(Self::Unix(listener, path.into()));
        }
        let listener = TcpListener::bind(listen).await.map_err(|error| fails(&error))?;
        let address = listener.local_addr().map_err(|error| fails(&error))?;
        Ok(Self::Tcp(listener, address))
    }

    /// Whether only this machine can reach it.
    fn is_loopback(&self) -> bool {
        match self {
            Self::Tcp(_, address) => address.ip().is_loopback(),
            #[cfg(unix)]
            Self::Unix(..) => true,
        }
    }
}

/// A socket left by a daemon that was killed is in the way of the next; one that answers is not
/// ours to remove.
#[cfg(unix)]
fn bind_unix(path: &str) -> std::io::Result<tokio::net::UnixListener> {
    match tokio::net::UnixListener::bind(path) {
        Err(error)
            if error.kind() == std::io::ErrorKind::AddrInUse
                && std::os::unix::net::UnixStream::connect(path)
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) =>
        {
            std::fs::remove_file(path)?;
            tokio::net::UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// One line on standard error, for people and scripts; on standard output what to try.
fn announce(listener: &Listener, broker: &dyn Broker, development: bool) {
    let (address, curl) = match listener {
        Listener::Tcp(_, address) => {
            // A wildcard address cannot be asked; this machine can.
            let host = match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
                IpAddr::V6(ip) if ip.is_unspecified() => "[::1]".to_owned(),
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            (format!("http://{address}"), format!("curl -s http://{host}:{}", address.port()))
        }
        #[cfg(unix)]
        Listener::Unix(_, path) => {
            (format!("unix:{}", path.display()), format!("curl -s --unix-socket {} http://localhost", path.display()))
        }
    };
    let mode = if development { ", development mode: for this machine only" } else { "" };
    say!("broker-http listening on {address} (broker {}{mode})", broker.name());
    let volatile =
        if broker.capabilities().durable { "" } else { "\nMessages are kept in memory: they are gone when it stops." };
    let screen = format!(
        "
Try, from another terminal:

  {curl}/topics/orders.%3E/stream -N
      shows what is published to orders.…, as it comes

  {curl}/topics/orders.created -d '{{\"id\": 42}}' -H 'content-type: application/json'
      publishes a message

  {curl}/subscriptions/billing -X PUT -d '{{\"filter\": \"orders.>\", \"endpoint\": \"http://127.0.0.1:8080/hook\"}}'
      has every message on orders.… pushed to a URL, again and again until it answers 2xx

  {curl}/subscriptions/billing
      shows how that is going; /metrics and /openapi.json show the rest
{volatile}
"
    );
    // Nobody may be reading.
    let _ = std::io::stdout().write_all(screen.as_bytes());
}

/// What a shutdown left behind, in words.
fn describe(report: &DrainReport, broker: &str) -> String {
    let mut text = if report.complete { "drained".to_owned() } else { "the drain was cut".to_owned() };
    let counts = [
        (report.unconfirmed, "unconfirmed"),
        (report.in_flight, "in flight"),
        (report.undelivered, "undelivered"),
        (report.dead_letters, "dead letters"),
    ];
    let stayed: Vec<_> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if stayed.is_empty() {
        text.push_str("; nothing stayed behind");
    } else if report.durable {
        text.push_str(&format!("; {} kept by the broker", stayed.join(", ")));
    } else {
        text.push_str(&format!("; {} lost, since {broker} keeps nothing", stayed.join(", ")));
    }
    text
}

/// SIGTERM and SIGINT, or Ctrl-C.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(unix)]
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> &'static str {
        let _ = tokio::signal::ctrl_c().await;
        "Ctrl-C"
    }
}
