//! The daemon's configuration: flags and environment over a TOML file over the defaults.

mod environment;
mod file;
mod limits;
mod listen;
mod suggest;
mod table;

use std::any::Any;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use broker_core::{Broker, GroupName, MemoryBroker, format_duration, parse_duration};
use broker_http::push::Guard;
use broker_http::{Access, Identity, Limits, PushTls, ServerOptions, SubscriptionSpec, TlsFiles, Topics};

use crate::serve::Args;
use crate::serve::LogFormat;
pub(crate) use environment::at_fault;
use file::{File, FilePush, FileTls};
pub(crate) use table::markdown;

/// What the daemon runs with.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) listen: String,
    broker: String,
    retained: Retained,
    /// Whether it is development mode, if that is said.
    pub(crate) dev: Option<bool>,
    pub(crate) insecure: bool,
    pub(crate) drain: Duration,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) subscriptions: BTreeMap<GroupName, SubscriptionSpec>,
    pub(crate) topics: Topics,
    pub(crate) otlp: Option<Otlp>,
    identities: Vec<Identity>,
    state: Option<PathBuf>,
    allow: Vec<String>,
    allowed_origins: Vec<String>,
    webhook_origin: Option<String>,
    webhook_callback: Option<String>,
    push: FilePush,
    limits: Limits,
}

/// Where traces go.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Otlp {
    pub(crate) endpoint: String,
    pub(crate) sample: f64,
    /// Whether OpenTelemetry's own variable named the endpoint, and no setting of ours.
    #[cfg_attr(feature = "otlp", allow(dead_code, reason = "only who cannot send asks"))]
    pub(crate) from_environment: bool,
}

/// What every topic retains unless the broker's URL says so itself: enough for a reader of a stream that comes back
/// (`Last-Event-ID`), for no longer than that takes.
const RETAINED: [(&str, &str); 2] = [("retain", "10000"), ("retain_age", "10m")];

/// Bytes of it of a topic at most.
const RETAINED_BYTES: u64 = 16 << 20;

/// Bytes that history takes at most where the broker's URL does not say so itself: a quarter of what messages may hold.
#[derive(Clone, Copy, Debug)]
struct Retained {
    of_topic: u64,
    of_all: u64,
}

/// How long a shutdown may be told to wait.
const MAX_DRAIN: Duration = Duration::from_secs(24 * 3600);

impl Config {
    /// Puts the sources together.
    pub(crate) fn merge(mut args: Args) -> Result<Self, String> {
        environment::check(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
        // What whoever looks for a fault sets for one start: before the file, after our own flag and variable.
        args.log = args.log.or_else(|| std::env::var("RUST_LOG").ok());
        let file = args.config.as_deref().map(file::read).transpose()?.unwrap_or_default();
        Self::over(file, args)
    }

    fn over(file: File, args: Args) -> Result<Self, String> {
        let drain = match (args.drain, file.drain) {
            (Some(drain), _) => drain,
            (None, Some(text)) => parse_duration(&text).map_err(|error| format!("drain: {}", error.message()))?,
            (None, None) => Duration::from_secs(20),
        };
        if drain > MAX_DRAIN {
            return Err(format!("drain {}: it is 1d at most", format_duration(drain)));
        }
        let log_format = match (args.log_format, file.log_format.as_deref()) {
            (Some(format), _) => format,
            (None, None | Some("text")) => LogFormat::Text,
            (None, Some("json")) => LogFormat::Json,
            (None, Some(other)) => return Err(format!("log_format {other:?}: it is text or json")),
        };
        // By its place: a URL may have a password.
        if let Some(bad) = file.allowed_origins.iter().position(|origin| !listen::is_origin(origin)) {
            return Err(format!(
                "allowed_origins, entry {}: it is a scheme, a host and maybe a port, as in https://app.example.com",
                bad + 1
            ));
        }
        let limits = file.limits.apply()?;
        let client_ca = args.tls_client_ca.is_some() || file.tls.client_ca.is_some();
        let config = Self {
            listen: args.listen.or(file.listen).unwrap_or_else(|| "127.0.0.1:2757".to_owned()),
            broker: args.broker.or(file.broker).unwrap_or_else(|| "memory:".to_owned()),
            retained: Retained::within(&limits, file.topics.iter().filter_map(|rule| rule.memory_bytes)),
            dev: args.dev.or(file.dev),
            insecure: args.insecure.or(file.insecure).unwrap_or(false),
            drain,
            log: args.log.or(file.log).unwrap_or_else(|| "warn".to_owned()),
            log_format,
            tls: tls(FileTls {
                certificate: args.tls_certificate.or(file.tls.certificate),
                key: args.tls_key.or(file.tls.key),
                client_ca: args.tls_client_ca.or(file.tls.client_ca),
            })?,
            subscriptions: file.subscriptions,
            topics: Topics::new(file.topics, file.only_declared_topics).map_err(said)?,
            otlp: otlp(args.otlp_endpoint.or(file.otlp.endpoint), args.otlp_sample.or(file.otlp.sample), |name| {
                std::env::var(name).ok()
            })?,
            identities: file.identities,
            state: args.state.or(file.state),
            allow: if args.allow.is_empty() { file.allow } else { args.allow },
            allowed_origins: file.allowed_origins,
            webhook_origin: args.webhook_origin.or(file.webhook_origin),
            webhook_callback: args.webhook_callback.or(file.webhook_callback),
            push: file.push,
            limits,
        };
        listen::check(&config.listen, config.tls.is_some())?;
        config.check_identities(client_ca)?;
        Ok(config)
    }

    /// The broker's URL; if it is a broker in this process that retains, with what its topics retain at most.
    pub(crate) fn broker_url(&self) -> String {
        self.retained.applied(&self.broker)
    }

    /// How much the topics of this broker retain from now on, if it is one in this process.
    pub(crate) fn set_retention(&self, broker: &dyn Broker) -> Result<(), String> {
        let broker: &dyn Any = broker;
        let Some(memory) = broker.downcast_ref::<MemoryBroker>() else { return Ok(()) };
        let Some(mut retention) = memory.retention() else { return Ok(()) };
        if !says(&self.broker, "retain_bytes") {
            retention.max_bytes = self.retained.of_topic;
        }
        if !says(&self.broker, "retain_total_bytes") {
            retention.max_total_bytes = self.retained.of_all;
        }
        memory.set_retention(retention).map_err(said)
    }

    /// Refuses an identity that nobody could ever be: clients are asked for certificates where there is an authority for them.
    fn check_identities(&self, client_ca: bool) -> Result<(), String> {
        let nobody = |identity: &&Identity| identity.tokens.is_empty() && !identity.certificates.is_empty();
        match self.identities.iter().find(nobody).filter(|_| !client_ca) {
            Some(Identity { name, .. }) => Err(format!(
                "identity {name}: it has certificates alone, and clients are asked for one with tls.client_ca only, which is missing"
            )),
            None => Ok(()),
        }
    }

    /// Who may do what.
    pub(crate) fn access(&self) -> Result<Access, String> {
        Access::new(self.identities.iter().cloned()).map_err(said)
    }

    /// Whether nobody is asked who they are.
    pub(crate) fn is_open(&self) -> bool {
        self.identities.is_empty()
    }

    /// Whether it is development mode: as it is said, or by itself where only this machine can reach an open listener.
    pub(crate) fn is_development(&self, loopback: bool) -> bool {
        self.dev.unwrap_or(loopback && self.is_open())
    }

    /// Refuses to serve everybody by a slip.
    pub(crate) fn check_reach(&self, loopback: bool) -> Result<(), String> {
        if loopback || self.insecure || !self.is_open() {
            return Ok(());
        }
        Err(format!(
            "{} can be reached from elsewhere, and there are no identities, so that everybody could publish and subscribe: `broker-http token new` makes one for the configuration; or say --insecure",
            self.listen
        ))
    }

    /// Refuses declared endpoints that could never be dialled, where that is known without asking for a name.
    pub(crate) fn check_endpoints(&self, development: bool) -> Result<(), String> {
        let guard = self.guard()?.with_development(development);
        for (name, spec) in &self.subscriptions {
            let Some(endpoint) = &spec.endpoint else { continue };
            guard
                .check_endpoint(endpoint)
                .map_err(|error| format!("subscriptions.{name}: endpoint: {}", error.message()))?;
        }
        Ok(())
    }

    /// Refuses a state file that is none.
    pub(crate) fn check_state(&self) -> Result<(), String> {
        match self.state.as_deref() {
            Some(path) if path.exists() && !path.is_file() => Err(format!("state: {} is no file", path.display())),
            _ => Ok(()),
        }
    }

    /// Refuses a state file where nothing could be written.
    pub(crate) fn check_state_folder(&self) -> Result<(), String> {
        match self.state.as_deref().and_then(Path::parent) {
            Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
                Err(format!("state: there is no folder {}", folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// What serving would find out once it listens, as far as that is known without.
    pub(crate) fn check_alone(&self) -> Result<(), String> {
        // What a name stands for is known where it is listened on.
        let Some(loopback) = listen::loopback(&self.listen) else { return Ok(()) };
        self.check_reach(loopback)?;
        self.check_endpoints(self.is_development(loopback))
    }

    /// Promises no more connections than there can be; tells if that was so.
    pub(crate) fn fit(&mut self, connections: usize) -> Option<String> {
        let asked = self.limits.connections;
        self.limits.connections = asked.min(connections);
        (asked > connections).then(|| format!("limits.connections is {asked}, and {connections} are taken at a time"))
    }

    fn guard(&self) -> Result<Guard, String> {
        self.allow.iter().try_fold(Guard::new(), |guard, allowed| Ok(guard.allowing(allowed.parse().map_err(said)?)))
    }

    /// The server's part of it.
    pub(crate) fn options(&self) -> Result<ServerOptions, String> {
        let mut options = ServerOptions::new()
            .with_guard(self.guard()?)
            .with_limits(self.limits.clone())
            .with_allowed_origins(self.allowed_origins.iter().cloned())
            .with_access(self.access()?)
            .with_topics(self.topics.clone())
            .with_subscriptions(self.subscriptions.clone())
            .with_push_tls(push_tls(&self.push)?)
            .map_err(|error| format!("push: {}", error.message()))?;
        if let Some(origin) = &self.webhook_origin {
            options = options.with_webhook_origin(origin).map_err(said)?;
        }
        if let Some(base) = &self.webhook_callback {
            if self.webhook_origin.is_none() {
                return Err(
                    "webhook_callback: it goes with webhook_origin, the name in which endpoints are asked".to_owned()
                );
            }
            options = options.with_webhook_callback(base).map_err(said)?;
        }
        if let Some(state) = &self.state {
            options = options.with_state(state);
        }
        Ok(options)
    }

    /// Settings that differ from `other` and cannot change while the daemon runs.
    pub(crate) fn fixed_differences(&self, other: &Self) -> Vec<&'static str> {
        [
            ("listen", self.listen != other.listen),
            ("broker", self.broker != other.broker),
            ("dev", self.dev != other.dev),
            ("insecure", self.insecure != other.insecure),
            ("log_format", self.log_format != other.log_format),
            ("tls", self.tls.is_some() != other.tls.is_some()),
            ("state", self.state != other.state),
            ("otlp", self.otlp != other.otlp),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect()
    }

    /// Takes of `new` what can change while the daemon runs.
    pub(crate) fn take_up(&mut self, new: Self) {
        *self = Self {
            listen: std::mem::take(&mut self.listen),
            broker: std::mem::take(&mut self.broker),
            dev: self.dev,
            insecure: self.insecure,
            log_format: self.log_format,
            tls: if self.tls.is_some() { new.tls.or_else(|| self.tls.take()) } else { None },
            state: self.state.take(),
            otlp: self.otlp.take(),
            ..new
        };
    }

    /// What it declares, in a few words.
    pub(crate) fn summary(&self) -> String {
        format!("{} identities, {} subscriptions declared", self.identities.len(), self.subscriptions.len())
    }
}

fn said(error: broker_core::Error) -> String {
    error.message().to_owned()
}

fn tls(files: FileTls) -> Result<Option<TlsFiles>, String> {
    match (files.certificate, files.key, files.client_ca) {
        (Some(certificate), Some(key), client_ca) => {
            let files = TlsFiles::new(certificate, key);
            Ok(Some(match client_ca {
                Some(path) => files.with_client_ca(path),
                None => files,
            }))
        }
        (None, None, None) => Ok(None),
        (None, None, Some(_)) => Err("tls.client_ca: it goes with tls.certificate and tls.key".to_owned()),
        (Some(_), None, _) => Err("tls.certificate: it goes with tls.key, which is missing".to_owned()),
        (None, Some(_), _) => Err("tls.key: it goes with tls.certificate, which is missing".to_owned()),
    }
}

/// Settings of ours come before OpenTelemetry's variables.
fn otlp(
    endpoint: Option<String>,
    sample: Option<f64>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Otlp>, String> {
    let sample = sample.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&sample) {
        return Err(format!("otlp.sample {sample}: it is a share of the traces, from 0 to 1"));
    }
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let found = match endpoint {
        Some(endpoint) => Some((endpoint, false)),
        None if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) => None,
        None => variable("OTEL_EXPORTER_OTLP_ENDPOINT").map(|endpoint| (endpoint, true)),
    };
    Ok(found.map(|(endpoint, from_environment)| Otlp { endpoint, sample, from_environment }))
}

fn push_tls(files: &FilePush) -> Result<PushTls, String> {
    let read = |key: &str, path: &Option<PathBuf>| {
        let read = |path: &Path| {
            broker_http::files::read_text(path).map_err(|error| format!("push.{key}: {}: {error}", path.display()))
        };
        path.as_deref().map(read).transpose()
    };
    let mut tls = PushTls::default();
    tls.ca = read("ca", &files.ca)?;
    tls.certificate = read("certificate", &files.certificate)?;
    tls.key = read("key", &files.key)?.map(broker_http::Secret::new);
    Ok(tls)
}

/// Whether a URL has a parameter.
fn says(url: &str, name: &str) -> bool {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    query.split('&').any(|pair| pair.split('=').next() == Some(name))
}

impl Retained {
    /// A quarter of the bytes that messages may hold, over all and of each topic, so that history seldom has to yield.
    fn within(limits: &Limits, topics: impl Iterator<Item = u64>) -> Self {
        let of_topic = topics.fold(limits.topic_memory_bytes, u64::min) / 4;
        Self { of_topic: of_topic.min(RETAINED_BYTES), of_all: limits.memory_bytes / 4 }
    }

    /// The URL of a broker, with these bounds if its topics retain anything.
    fn applied(self, url: &str) -> String {
        let silent = url == "memory:";
        let retains = ["retain", "retain_age", "retain_bytes", "retain_total_bytes"].iter().any(|name| says(url, name));
        if !url.starts_with("memory:") || !silent && !retains {
            return url.to_owned();
        }
        let bounds = [("retain_bytes", self.of_topic.to_string()), ("retain_total_bytes", self.of_all.to_string())];
        let retained = RETAINED.into_iter().filter(|_| silent).map(|(name, value)| (name, value.to_owned()));
        retained.chain(bounds).filter(|(name, _)| !says(url, name)).fold(url.to_owned(), |url, (name, value)| {
            let separator = if url.contains('?') { '&' } else { '?' };
            format!("{url}{separator}{name}={value}")
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn config(text: &str, args: &[&str]) -> Result<Config, String> {
        let args = Cli::try_parse_from([&["x"], args].concat()).unwrap().args;
        Config::over(file::parse(text)?, args)
    }

    #[test]
    fn flags_come_before_the_file_and_that_before_the_defaults() {
        let found = config("listen = \"a:1\"\ndrain = \"5s\"\nlog = \"info\"", &["--listen", "b:2"]).unwrap();
        assert_eq!((found.listen.as_str(), found.drain.as_secs(), found.log.as_str()), ("b:2", 5, "info"));
        let found = config("", &[]).unwrap();
        assert_eq!(
            (found.listen.as_str(), found.drain.as_secs(), found.broker_url().as_str()),
            (
                "127.0.0.1:2757",
                20,
                "memory:?retain=10000&retain_age=10m&retain_bytes=16777216&retain_total_bytes=268435456"
            )
        );
    }

    #[test]
    fn history_takes_a_quarter_of_what_messages_may_hold() {
        let broker = |text: &str| config(text, &[]).unwrap().broker_url();
        for (text, expected) in [
            ("broker = \"kafka://a:1\"", "kafka://a:1"),
            ("broker = \"memory:a\"", "memory:a"),
            ("broker = \"memory:?dedup_window=1m\"", "memory:?dedup_window=1m"),
            ("broker = \"memory:?retain=5\"", "memory:?retain=5&retain_bytes=16777216&retain_total_bytes=268435456"),
            (
                "broker = \"memory:?retain=5&retain_bytes=6&retain_total_bytes=7\"",
                "memory:?retain=5&retain_bytes=6&retain_total_bytes=7",
            ),
            (
                "broker = \"memory:?retain_age=1s\"",
                "memory:?retain_age=1s&retain_bytes=16777216&retain_total_bytes=268435456",
            ),
            ("broker = \"memory:?retain=0\"", "memory:?retain=0&retain_bytes=16777216&retain_total_bytes=268435456"),
            (
                "limits = {memory_bytes = 4000, topic_memory_bytes = 2000}",
                "memory:?retain=10000&retain_age=10m&retain_bytes=500&retain_total_bytes=1000",
            ),
            (
                "topics = [{filter = \"a\", memory_bytes = 400}]",
                "memory:?retain=10000&retain_age=10m&retain_bytes=100&retain_total_bytes=268435456",
            ),
        ] {
            assert_eq!(broker(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("drain = \"2d\"", "drain"),
            ("log_format = \"xml\"", "log_format"),
            ("tls = {certificate = \"x\"}", "tls.key"),
            ("tls = {client_ca = \"x\"}", "tls.client_ca"),
            ("limits = {connections = 0}", "limits.connections"),
            ("limits = {header_timeout = \"0s\"}", "limits.header_timeout"),
            ("only_declared_topics = true", "topics"),
            ("topics = [{filter = \"a\"}, {filter = \"b\"}, {filter = \"a\", memory_bytes = 5}]", "topics a"),
            ("push = {ca = \"/nowhere/ca.pem\"}", "push.ca: /nowhere/ca.pem"),
            ("identities = [{name = \"a\"}]", "identity a"),
            ("identities = [{name = \"a\", certificates = [\"a.internal\"]}]", "tls.client_ca"),
            ("allow = [\"10.0.0.0/99\"]", "10.0.0.0/99"),
            ("listen = \"2757\"", "listen \"2757\""),
            ("listen = \"127.0.0.1:99999\"", "listen \"127.0.0.1:99999\""),
            ("listen = \"unix:/x\"\ntls = {certificate = \"x\", key = \"y\"}", "without TLS"),
            ("allowed_origins = [\"app.example.com\"]", "allowed_origins"),
            ("allowed_origins = [\"https://app.example.com/\"]", "allowed_origins"),
            ("limits = {headers = 9223372036854775807}", "limits.headers"),
            ("limits = {header_bytes = 8191}", "limits.header_bytes"),
            ("webhook_callback = \"https://a.example\"", "webhook_origin"),
            ("webhook_origin = \"a\"\nwebhook_callback = \"a.example\"", "webhook callback"),
        ] {
            let error = config(text, &[]).and_then(|config| config.options().map(drop)).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn traces_go_where_we_are_told_or_opentelemetry_is() {
        let standard = |name: &str| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| "http://b:4318".to_owned());
        let found = otlp(Some("http://a:4318".to_owned()), Some(0.5), standard).unwrap().unwrap();
        assert_eq!((&*found.endpoint, found.sample, found.from_environment), ("http://a:4318", 0.5, false));
        let found = otlp(None, None, standard).unwrap().unwrap();
        assert_eq!((&*found.endpoint, found.sample, found.from_environment), ("http://b:4318", 1.0, true));
        assert_eq!(otlp(None, None, |_| Some("true".to_owned())), Ok(None), "OTEL_SDK_DISABLED");
        assert_eq!(otlp(None, None, |_| None), Ok(None));
        assert!(otlp(None, Some(1.5), |_| None).unwrap_err().contains("otlp.sample"));
    }

    #[test]
    fn what_is_said_of_development_mode_comes_before_what_is_supposed() {
        let identity = "[[identities]]\nname = \"a\"\ntokens = [\"sha256:\
            0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"]\n";
        // On loopback, and beyond it.
        for (text, args, expected) in [
            ("", &[][..], [true, false]),
            ("", &["--dev=false"], [false, false]),
            ("dev = false", &[], [false, false]),
            ("dev = false", &["--dev"], [true, true]),
            ("dev = true", &["--dev=false"], [false, false]),
            ("dev = true", &[], [true, true]),
            (identity, &[], [false, false]),
            (identity, &["--dev"], [true, true]),
        ] {
            let found = config(text, args).unwrap();
            assert_eq!([true, false].map(|loopback| found.is_development(loopback)), expected, "{text} {args:?}");
        }
    }

    #[test]
    fn no_secret_is_repeated() {
        for text in [
            "allow = [\"http://u:S3cret@x\"]",
            "allow = [\"u:S3cret@x\"]",
            "allow = [\"x?token=S3cret\"]",
            "allowed_origins = [\"https://a.example\", \"http://u:S3cret@x\"]",
            "allowed_origins = [\"http://x/?token=S3cret\"]",
        ] {
            let error = config(text, &[]).and_then(|config| config.options().map(drop)).unwrap_err();
            assert!(error.contains("allowed") && !error.contains("S3cret"), "{text}: {error}");
        }
        let error = config("allowed_origins = [\"https://a.example\", \"b\"]", &[]).unwrap_err();
        assert!(error.contains("allowed_origins, entry 2"), "{error}");
    }

    #[test]
    fn what_takes_a_restart_is_told() {
        let before = config("listen = \"a:1\"", &[]).unwrap();
        let after =
            config("listen = \"a:2\"\nlog = \"info\"\nlimits = {leases = 1}\nlog_format = \"json\"", &[]).unwrap();
        assert_eq!(before.fixed_differences(&after), ["listen", "log_format"]);
        assert!(before.fixed_differences(&before).is_empty());
        // What follows from limits is taken up with them.
        let fewer = config("listen = \"a:1\"\nlimits = {memory_bytes = 4000}", &[]).unwrap();
        assert!(before.fixed_differences(&fewer).is_empty());
    }
}
