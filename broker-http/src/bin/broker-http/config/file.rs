//! The TOML file: its keys, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use broker_core::GroupName;
use broker_http::{Identity, SubscriptionSpec, TopicRule};
use serde::Deserialize;

use super::limits::FileLimits;
use super::suggest;

/// The file. Unknown keys are refused, and the near one is suggested.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    pub(super) listen: Option<String>,
    pub(super) broker: Option<String>,
    pub(super) state: Option<PathBuf>,
    pub(super) dev: Option<bool>,
    pub(super) insecure: Option<bool>,
    pub(super) allow: Vec<String>,
    pub(super) allowed_origins: Vec<String>,
    pub(super) webhook_origin: Option<String>,
    pub(super) webhook_callback: Option<String>,
    pub(super) drain: Option<String>,
    pub(super) log: Option<String>,
    pub(super) log_format: Option<String>,
    pub(super) only_declared_topics: bool,
    pub(super) tls: FileTls,
    pub(super) push: FilePush,
    pub(super) otlp: FileOtlp,
    pub(super) limits: FileLimits,
    pub(super) identities: Vec<Identity>,
    pub(super) topics: Vec<TopicRule>,
    pub(super) subscriptions: BTreeMap<GroupName, SubscriptionSpec>,
}

/// TLS of the listener: PEM files.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTls {
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
    pub(super) client_ca: Option<PathBuf>,
}

/// TLS of pushes: PEM files.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FilePush {
    pub(super) ca: Option<PathBuf>,
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
}

/// Where traces go.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileOtlp {
    pub(super) endpoint: Option<String>,
    pub(super) sample: Option<f64>,
}

/// Keys that no flag has: name, default, purpose.
pub(super) const KEYS: [(&str, &str, &str); 8] = [
    ("allowed_origins", "", "origins whose web pages may use the daemon, as in `[\"https://app.example.com\"]`"),
    ("only_declared_topics", "false", "topics that no `[[topics]]` declares cannot be published to"),
    (
        "push.ca",
        "",
        "PEM file of the authorities that endpoints' certificates are checked against, instead of the machine's",
    ),
    ("push.certificate", "", "PEM file of the certificate shown to endpoints that ask for one"),
    ("push.key", "", "PEM file of its private key"),
    ("[[identities]]", "", "who may do what: `name`, `tokens`, `certificates`, `allow`, `rate`, `burst`"),
    ("[[topics]]", "", "bounds of topics: `filter`, `max_message_bytes`, `memory_bytes`"),
    (
        "[subscriptions.NAME]",
        "",
        "a subscription that stands from the start, with the fields of `PUT /subscriptions/NAME`",
    ),
];

pub(super) fn read(path: &Path) -> Result<File, String> {
    let named = |why: &str| format!("configuration file {}: {why}", path.display());
    let text = broker_http::files::read_text(path).map_err(|error| named(&error.to_string()))?;
    parse(&text).map_err(|why| named(&why))
}

/// Reads the text of a file.
pub(super) fn parse(text: &str) -> Result<File, String> {
    let file: File = toml::from_str(text).map_err(|error| suggest::describe(text, &error))?;
    for (name, spec) in &file.subscriptions {
        spec.check().map_err(|error| format!("subscriptions.{name}: {}", error.message()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_key_is_named_with_its_line_and_the_near_one() {
        for (text, named) in [
            ("dev = true\nlisen = \"127.0.0.1:0\"", "line 2: unknown field `lisen`"),
            ("lisen = \"127.0.0.1:0\"", "did you mean `listen`?"),
            ("[limits]\nconections = 1", "did you mean `connections`?"),
            ("[tls]\ncertifcate = \"x\"", "did you mean `certificate`?"),
            ("[[identities]]\nname = \"a\"\ntoken = []", "did you mean `tokens`?"),
            ("[subscriptions.q]\nfilter = \"a\"\nendpiont = \"http://x\"", "did you mean `endpoint`?"),
            ("[[topics]]\nfiter = \"a\"", "did you mean `filter`?"),
            ("colour = \"red\"", "expected one of"),
            ("dev = 1", "line 1"),
            ("[subscriptions.q]\nfilter = \"a\"\ntimeout = \"0s\"", "subscriptions.q: timeout"),
            ("[subscriptions.\"a b\"]\nfilter = \"a\"", "a b"),
            ("[limits]\nmemory_bytes = -1", "line 2"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn no_secret_is_repeated() {
        for text in [
            "[[identities]]\nname = \"a\"\ntokens = \"hunter2\"",
            "[[identities]]\nname = \"a\"\ntokens = [\"hunter2\"]",
            "[subscriptions.q]\nfilter = \"a\"\nsigning = \"hunter2\"",
            "[subscriptions.q]\nfilter = \"a\"\nsigning = {secret = \"hunter2\"}",
            "[subscriptions.q]\nfilter = \"a\"\nheaders = {x-key = \"hunter2",
        ] {
            let error = parse(text).unwrap_err();
            assert!(!error.contains("hunter2"), "{text}: {error}");
        }
    }

    #[test]
    fn a_whole_file_is_read() {
        let file = parse(
            r#"
            listen = "0.0.0.0:2757"
            only_declared_topics = true
            log = "warn,broker_http::push=debug"
            [tls]
            certificate = "broker.pem"
            key = "broker.key"
            [limits]
            memory_bytes = 1000000
            body_timeout = "5s"
            [[identities]]
            name = "billing"
            tokens = ["sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"]
            certificates = ["billing.internal"]
            allow = [{ actions = ["publish", "settle"], topics = ["orders.>"] }]
            rate = 100
            burst = 200
            [[topics]]
            filter = "orders.>"
            max_message_bytes = 65536
            [subscriptions.billing]
            filter = "orders.>"
            endpoint = "https://billing.internal/hook"
            timeout = "5s"
            retry = { max_attempts = 3 }
            "#,
        )
        .unwrap();
        assert_eq!(file.limits.apply().unwrap().body_timeout.as_secs(), 5);
        assert_eq!(file.identities[0].rate, Some(100.0));
        assert_eq!(file.subscriptions.len(), 1);
        assert_eq!(file.topics[0].max_message_bytes, Some(65_536));
    }
}
