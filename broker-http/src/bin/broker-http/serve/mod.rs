//! `broker-http serve`: the daemon.

mod descriptors;
mod listener;
mod logging;
mod notify;
mod signals;
mod traces;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use broker_core::{DrainReport, format_duration, parse_duration};
use broker_http::{Server, Tls};

use crate::config::Config;
use crate::connectors;
use crate::output::say;
use listener::{Listener, announce};
use logging::Logging;
use signals::{Signals, Told};
use traces::Traces;

/// How the daemon is started. Flags come before the environment, that before the configuration
/// file, and that before the defaults.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 picks one, unix:PATH is a Unix socket [default: 127.0.0.1:2757]
    #[arg(long, env = "BROKER_HTTP_LISTEN", value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,

    /// A TOML file with the names of these options as keys, and more; `broker-http settings` lists all
    #[arg(long, env = "BROKER_HTTP_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// The broker behind the interface [default: memory:]
    #[arg(long, env = "BROKER_HTTP_BROKER", value_name = "URL", hide_env_values = true)]
    pub(crate) broker: Option<String>,

    /// Keep subscriptions in this file over a restart
    #[arg(long, env = "BROKER_HTTP_STATE", value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,

    /// Development mode: endpoints on this machine may be pushed to, other hosts and web pages are
    /// refused. It is on by itself when listening on loopback without identities, and off with `false`
    #[arg(
        long,
        env = "BROKER_HTTP_DEV",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub(crate) dev: Option<bool>,

    /// Serve everybody who reaches the listener, beyond this machine too, without asking who it is
    #[arg(
        long,
        env = "BROKER_HTTP_INSECURE",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub(crate) insecure: Option<bool>,

    /// Serve TLS with this certificate, and those it was signed with after it, in PEM; it is read again
    /// when it changes
    #[arg(long, env = "BROKER_HTTP_TLS_CERTIFICATE", value_name = "FILE")]
    pub(crate) tls_certificate: Option<PathBuf>,

    /// The private key of the certificate, in PEM
    #[arg(long, env = "BROKER_HTTP_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Ask clients for a certificate of one of these authorities, in PEM
    #[arg(long, env = "BROKER_HTTP_TLS_CLIENT_CA", value_name = "FILE")]
    pub(crate) tls_client_ca: Option<PathBuf>,

    /// Endpoints that may be pushed to although their addresses are private: a CIDR such as
    /// 10.0.0.0/8, or a host name; may be repeated
    #[arg(long, env = "BROKER_HTTP_ALLOW", value_name = "CIDR|HOST", value_delimiter = ',')]
    pub(crate) allow: Vec<String>,

    /// Ask every endpoint whether it wants pushes from this name of the daemon, by the OPTIONS
    /// handshake of CloudEvents' web hooks
    #[arg(long, env = "BROKER_HTTP_WEBHOOK_ORIGIN", value_name = "NAME")]
    pub(crate) webhook_origin: Option<String>,

    /// Let endpoints that are asked consent later, by a request to a URL below this one, at which they
    /// reach the daemon, as in `https://broker.example.com`
    #[arg(long, env = "BROKER_HTTP_WEBHOOK_CALLBACK", value_name = "URL")]
    pub(crate) webhook_callback: Option<String>,

    /// Send traces to the OpenTelemetry collector at this URL, by OTLP over HTTP, as in
    /// http://127.0.0.1:4318; OTEL_EXPORTER_OTLP_ENDPOINT says so too
    #[arg(long, env = "BROKER_HTTP_OTLP_ENDPOINT", value_name = "URL", hide_env_values = true)]
    pub(crate) otlp_endpoint: Option<String>,

    /// The share of traces kept of those that begin here, from 0 to 1 [default: 1]
    #[arg(long, env = "BROKER_HTTP_OTLP_SAMPLE", value_name = "SHARE")]
    pub(crate) otlp_sample: Option<f64>,

    /// How long a shutdown waits for what is in flight [default: 20s]
    #[arg(long, env = "BROKER_HTTP_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub(crate) drain: Option<Duration>,

    /// How much is logged, by module, as in warn,broker_http::push=debug [default: warn]
    #[arg(long, env = "BROKER_HTTP_LOG", value_name = "LEVELS")]
    pub(crate) log: Option<String>,

    /// How it is logged: text, or one JSON object a line [default: text]
    #[arg(long, env = "BROKER_HTTP_LOG_FORMAT", value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.message().to_owned())
}

/// The exit status of a shutdown that was cut.
const CUT: u8 = 3;

/// How long a broker may take to count what a shutdown that is cut leaves behind.
const COUNTING: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: Args) -> ExitCode {
    match serve(args).await {
        Ok(code) => code,
        Err(why) => {
            say!("broker-http: {why}");
            ExitCode::FAILURE
        }
    }
}

/// `broker-http check-config`: everything that can be known without listening or connecting.
pub(crate) fn check(args: Args) -> ExitCode {
    let checked = Config::merge(args).and_then(|config| {
        let options = config.options()?;
        config.check_alone()?;
        config.check_state()?;
        logging::check(&config.log)?;
        config.otlp.as_ref().map_or(Ok(()), traces::check)?;
        let broker = connectors().open(&config.broker_url()).map_err(|error| error.message().to_owned())?;
        Server::new(broker, options.clone()).check_options(&options).map_err(|error| error.message().to_owned())?;
        config.tls.clone().map(Tls::load).transpose().map_err(|error| error.message().to_owned())?;
        Ok(config)
    });
    match checked {
        Ok(config) => {
            crate::output::print(&format!("the configuration is good: {}\n", config.summary()));
            // It may be for another machine, or systemd makes the folder at the start.
            if let Err(why) = config.check_state_folder() {
                say!("broker-http: {why} here; it has to be there where it is served");
            }
            ExitCode::SUCCESS
        }
        Err(why) => {
            say!("broker-http: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> Result<ExitCode, String> {
    let mut config = Config::merge(args.clone())?;
    let logging = Logging::start(&config.log, config.log_format)?;
    let descriptors = descriptors::raise();
    if let Some(fewer) = fit(&mut config, descriptors) {
        say!("broker-http: {fewer}");
    }
    let mut signals = Signals::new().map_err(|error| format!("cannot listen for signals: {error}"))?;
    let tls = config.tls.clone().map(Tls::load).transpose().map_err(|error| error.message().to_owned())?;
    let access = config.access()?;
    config.check_state()?;
    config.check_state_folder()?;
    let listener = Listener::bind(&config.listen).await?;
    let _file = listener.file();
    let loopback = listener.is_loopback();
    config.check_reach(loopback)?;
    let development = config.is_development(loopback);
    let broker = connectors().open(&config.broker_url()).map_err(|error| error.message().to_owned())?;
    let connected = tokio::select! {
        connected = broker.connect() => connected,
        signal = signals.end() => {
            say!("broker-http: {signal}: ended before the broker {} was reached", broker.name());
            return Ok(ExitCode::FAILURE);
        }
    };
    connected.map_err(|error| format!("cannot connect to the broker {}: {error}", broker.name()))?;
    let traces = Traces::start(config.otlp.as_ref())?;
    let options = traces.of(config.options()?.with_development(development));
    let server = Server::new(broker, options.clone());
    server.check_options(&options).map_err(|error| error.message().to_owned())?;
    let restored = tokio::select! {
        restored = server.restore() => restored,
        signal = signals.end() => {
            say!("broker-http: {signal}: ended before the subscriptions were restored");
            return Ok(ExitCode::FAILURE);
        }
    };
    restored.map_err(|error| error.message().to_owned())?;

    let mode = if development { format!(", development mode: {}", meaning(loopback)) } else { String::new() };
    announce(&listener, &**server.broker(), if tls.is_some() { "https" } else { "http" }, &mode);
    if config.insecure || access.is_open() && !loopback {
        let reach = if loopback { "every program of this machine that" } else { "whoever" };
        let listen = &config.listen;
        if access.is_open() {
            say!(
                "broker-http: INSECURE: {reach} reaches {listen} may publish, subscribe and delete; nobody is asked who they are"
            );
        } else {
            say!(
                "broker-http: INSECURE: a reload that leaves no identity is taken, and then {reach} reaches {listen} may publish, subscribe and delete"
            );
        }
    }
    notify::tell("READY=1");
    let serving = {
        let (server, tls) = (server.clone(), tls.clone());
        tokio::spawn(async move {
            match (listener, tls) {
                (Listener::Tcp(listener, _), None) => server.serve(listener).await,
                (Listener::Tcp(listener, _), Some(tls)) => server.serve_tls(listener, tls).await,
                #[cfg(unix)]
                (Listener::Unix(listener, _), _) => server.serve_unix(listener).await,
            }
        })
    };
    let mut running = Running { args, config, server, tls, logging, loopback, descriptors };
    let signal = loop {
        match signals.next().await {
            Told::End(signal) => break signal,
            Told::Reload => {
                notify::reloading();
                running.reload().await;
                notify::tell("READY=1");
            }
        }
    };
    notify::tell("STOPPING=1");
    let Running { config, server, .. } = running;
    say!("broker-http: {signal}: shutting down, {} at most", format_duration(config.drain));
    let report = tokio::select! {
        report = server.drain(config.drain) => report,
        signal = signals.end() => {
            // What stays behind is only counted.
            let counting = server.broker().close(Duration::ZERO);
            let stayed = match tokio::time::timeout(COUNTING, counting).await {
                Ok(report) => stayed(&report, server.broker().name()),
                Err(_) => "what was in flight is not finished".to_owned(),
            };
            say!("broker-http: {signal} again: cut; {stayed}");
            return Ok(ExitCode::from(CUT));
        }
    };
    let _ = serving.await;
    traces.end().await;
    say!("broker-http: {}", describe(&report, server.broker().name()));
    Ok(if report.complete { ExitCode::SUCCESS } else { ExitCode::from(CUT) })
}

/// What development mode is, in words.
fn meaning(loopback: bool) -> &'static str {
    if loopback { "for this machine only" } else { "endpoints on this machine may be pushed to" }
}

/// Promises no more connections than there are descriptors for; tells if that was so.
fn fit(config: &mut Config, descriptors: Option<u64>) -> Option<String> {
    let descriptors = descriptors?;
    let fewer = config.fit(descriptors::connections(descriptors))?;
    Some(format!(
        "{fewer}: {descriptors} open files (ulimit -n, LimitNOFILE=) are for them, for pushes and for what it keeps"
    ))
}

/// A daemon at work, and what can change about it.
struct Running {
    args: Args,
    config: Config,
    server: Server,
    tls: Option<Tls>,
    logging: Logging,
    /// Whether only this machine can reach the listener.
    loopback: bool,
    /// How many files and connections it may have open.
    descriptors: Option<u64>,
}

impl Running {
    /// Reads the configuration again. If it is no good, everything stays as it is.
    async fn reload(&mut self) {
        match self.try_reload().await {
            Ok(told) => say!("broker-http: reloaded: {told}"),
            Err(why) => say!("broker-http: SIGHUP: {why}; everything stays as it was"),
        }
    }

    async fn try_reload(&mut self) -> Result<String, String> {
        let mut config = Config::merge(self.args.clone())?;
        let fewer = fit(&mut config, self.descriptors);
        // What takes a restart is as it was.
        let development = self.config.dev.unwrap_or(self.loopback && config.is_open());
        let before = self.config.is_development(self.loopback);
        let options = config.options()?.with_development(development);
        logging::check(&config.log)?;
        config.check_endpoints(development)?;
        self.server.check_options(&options).map_err(|error| error.message().to_owned())?;
        if config.is_open() && !self.config.is_open() && !self.config.insecure {
            return Err(
                "no identity is left, so that everybody could publish and subscribe; restart it if that is meant"
                    .to_owned(),
            );
        }
        if let (Some(tls), Some(files)) = (&self.tls, &config.tls) {
            tls.set_files(files.clone()).map_err(|error| error.message().to_owned())?;
        }
        // From here on nothing fails as a whole.
        self.logging.set(&config.log)?;
        self.server.set_options(options);
        let mut told = config.summary();
        if let Err(error) = self.server.set_subscriptions(&config.subscriptions).await {
            told.push_str(&format!("; {}", error.message()));
        }
        if let Some(fewer) = fewer {
            told.push_str(&format!("; {fewer}"));
        }
        let fixed = self.config.fixed_differences(&config);
        if !fixed.is_empty() {
            told.push_str(&format!("; {} changed, which takes a restart", fixed.join(", ")));
        }
        if config.is_open() && !self.config.is_open() {
            told.push_str("; INSECURE: nobody is asked who they are any more");
        }
        if before != development {
            let now = if development { format!("on: {}", meaning(self.loopback)) } else { "off".to_owned() };
            told.push_str(&format!("; development mode is {now}"));
        }
        self.config.take_up(config);
        if let Err(why) = self.config.set_retention(&**self.server.broker()) {
            told.push_str(&format!("; {why}"));
        }
        Ok(told)
    }
}

/// How a shutdown ended, in words.
fn describe(report: &DrainReport, broker: &str) -> String {
    format!("{}; {}", if report.complete { "drained" } else { "the drain was cut" }, stayed(report, broker))
}

/// What it left behind.
fn stayed(report: &DrainReport, broker: &str) -> String {
    let counts = [
        (report.unconfirmed, "unconfirmed"),
        (report.in_flight, "in flight"),
        (report.undelivered, "undelivered"),
        (report.dead_letters, "dead letters"),
    ];
    let stayed: Vec<_> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if stayed.is_empty() {
        "nothing stayed behind".to_owned()
    } else if report.durable {
        format!("{} kept by the broker", stayed.join(", "))
    } else {
        format!("{} lost, since {broker} keeps nothing", stayed.join(", "))
    }
}
