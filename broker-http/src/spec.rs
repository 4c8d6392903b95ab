//! A subscription as `PUT /subscriptions/{name}` writes it: what the server, its state file and
//! the client have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{
    Backlog, Error, GroupName, Message, Overflow, Result, RetryPolicy, StartAt, Timestamp, Topic, TopicFilter,
    duration_text,
};
use serde::{Deserialize, Deserializer, Serialize};
use url::Url;

use crate::AttributeFilter;
use crate::push::PushTls;
use crate::{null, once};

/// A subscription's settings, in the JSON of the HTTP interface. Unknown fields are refused; what
/// is left out has the defaults that interface names.
///
/// Start, order, backlog, retry and dead letter are the group's: left out, they are the defaults
/// for who creates the group and whatever it has for who joins it.
///
/// ```
/// use broker_http::SubscriptionSpec;
///
/// let spec = SubscriptionSpec::from_json(br#"{"filter": "orders.>", "endpoint": "https://example.com/hook"}"#)?;
/// assert_eq!(spec.timeout.as_secs(), 10);
/// let error = SubscriptionSpec::from_json(br#"{"filter": "orders.>", "timeout": "ten"}"#).unwrap_err();
/// assert!(error.message().starts_with("timeout: "), "{error}");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SubscriptionSpec {
    /// The topics it wants.
    pub filter: TopicFilter,
    /// The events it wants among those, by attributes: every filter must match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<AttributeFilter>,
    /// Where messages are pushed; without one they are pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// The group it is a member of; by default of one called as itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
    /// Where the group begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartAt>,
    /// How a message becomes a request.
    #[serde(default)]
    pub mode: Mode,
    /// How many messages a request has in batch mode.
    #[serde(default)]
    pub batch: Batch,
    /// Whether messages of one key are delivered one at a time, in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordered: Option<bool>,
    /// Requests (or pulled deliveries) unsettled at most.
    #[serde(default = "max_in_flight", deserialize_with = "read_max_in_flight")]
    pub max_in_flight: u32,
    /// Messages a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "read_rate_limit")]
    pub rate_limit: Option<f64>,
    /// How long a push may take, connecting included; of a pull subscription, how long a lease holds.
    #[serde(default = "timeout", with = "duration_text")]
    pub timeout: Duration,
    /// How messages are retried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryPolicy>,
    /// The bound of the backlog.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "read_backlog")]
    pub backlog: Option<Backlog>,
    /// Where rejected and exhausted messages go; by default `dead.GROUP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<Topic>,
    /// What answers of the endpoint mean, where that is to differ from the usual, by HTTP status.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "once::map")]
    pub verdicts: BTreeMap<u16, StatusVerdict>,
    /// Headers sent with every push, each once, whatever its case; their values are secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "once::map")]
    pub headers: BTreeMap<String, Secret>,
    /// Whether an `http` endpoint speaks HTTP/2 by prior knowledge; an `https` one says so itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub http2: bool,
    /// The keys pushes are signed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing: Option<Signing>,
    /// Which servers are trusted and what is shown to them, where that differs from the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<PushTls>,
    /// Deletes a pull subscription nobody pulled, or read the group of by a stream, or held a lease of, for so long.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_duration")]
    pub expires: Option<Duration>,
}

const MAX_TIMEOUT: Duration = Duration::from_secs(12 * 3600);
const MAX_HEADERS: usize = 64;
const MAX_IN_FLIGHT: u32 = 65_535;
const MAX_BATCH: u32 = 10_000;
const MAX_BATCH_WAIT: Duration = Duration::from_secs(60);
const MAX_RATE: f64 = 1e9;

fn max_in_flight() -> u32 {
    64
}

fn timeout() -> Duration {
    Duration::from_secs(10)
}

impl SubscriptionSpec {
    /// A pull subscription to `filter`, everything else at its default.
    pub fn new(filter: TopicFilter) -> Self {
        Self {
            filter,
            filters: Vec::new(),
            endpoint: None,
            group: None,
            start: None,
            mode: Mode::default(),
            batch: Batch::default(),
            ordered: None,
            max_in_flight: max_in_flight(),
            rate_limit: None,
            timeout: timeout(),
            retry: None,
            backlog: None,
            dead_letter: None,
            verdicts: BTreeMap::new(),
            headers: BTreeMap::new(),
            http2: false,
            signing: None,
            tls: None,
            expires: None,
        }
    }

    /// Reads and checks the JSON.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the field and what is allowed.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        Self::read(json).map_err(|error| no_settings(json).unwrap_or(error))
    }

    fn read(json: &[u8]) -> Result<Self> {
        // An array would be taken for the fields in their order.
        if json.trim_ascii_start().first() == Some(&b'[') {
            return Err(Error::invalid("subscription: a JSON object is expected, as in {\"filter\": \"orders.>\"}"));
        }
        null::refuse(json)?;
        let mut reader = serde_json::Deserializer::from_slice(json);
        let spec: Self = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let path = error.path().to_string();
            let why = error.into_inner();
            Error::invalid(if path == "." { format!("subscription: {why}") } else { format!("{path}: {why}") })
        })?;
        reader.end().map_err(|error| Error::invalid(format!("subscription: {error}")))?;
        spec.check()?;
        Ok(spec)
    }

    /// Checks what the types alone cannot say.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the field and what is allowed.
    pub fn check(&self) -> Result<()> {
        let refuse = |bad: bool, what: &str| if bad { Err(Error::invalid(what)) } else { Ok(()) };
        self.filters.iter().try_for_each(AttributeFilter::check)?;
        refuse(
            self.timeout.is_zero() || self.timeout > MAX_TIMEOUT,
            "timeout: it is longer than zero and 12 hours at most",
        )?;
        refuse(self.batch.wait > MAX_BATCH_WAIT, "batch.wait: it is 1 minute at most")?;
        refuse(self.batch.max.get() > MAX_BATCH, "batch.max: it is from 1 to 10000")?;
        refuse(
            self.rate_limit.is_some_and(|rate| !rate.is_finite() || rate <= 0.0 || rate > MAX_RATE),
            "rate_limit: it is messages a second, more than zero and 1000000000 at most",
        )?;
        refuse(self.max_in_flight == 0 || self.max_in_flight > MAX_IN_FLIGHT, "max_in_flight: it is from 1 to 65535")?;
        refuse(self.expires.is_some_and(|expires| expires.is_zero()), "expires: it is longer than zero")?;
        refuse(
            self.expires.is_some() && self.endpoint.is_some(),
            "expires: it is for pull subscriptions, and this one has an endpoint; leave one of the two out",
        )?;
        refuse(self.headers.len() > MAX_HEADERS, "headers: at most 64 are allowed")?;
        refuse(
            self.dead_letter.as_ref().is_some_and(Topic::is_reserved),
            "dead_letter: topics beginning with 'broker-' are the broker's own",
        )?;
        for status in self.verdicts.keys() {
            if !(200..600).contains(status) {
                return Err(Error::invalid(format!("verdicts.{status}: an HTTP status from 200 to 599 is expected")));
            }
        }
        let mut names = BTreeSet::new();
        for (name, value) in &self.headers {
            check_header(name, value)?;
            if !names.insert(name.to_ascii_lowercase()) {
                return Err(Error::invalid(format!(
                    "headers.{name}: it is given twice, and HTTP does not tell small letters from capitals"
                )));
            }
        }
        refuse(
            self.http2 && self.endpoint.as_ref().is_none_or(|endpoint| endpoint.url().scheme() != "http"),
            "http2: it is for an endpoint that begins with http://; with https:// both sides agree on it themselves",
        )?;
        self.signing.as_ref().map_or(Ok(()), Signing::check)?;
        self.tls.as_ref().map_or(Ok(()), PushTls::check)
    }

    /// Whether the attribute filters want a message on `topic`.
    pub fn wants(&self, topic: &Topic, message: &Message) -> bool {
        self.filters.iter().all(|filter| filter.matches(topic, message))
    }

    /// The backlog of a group this subscription creates: the daemon's publishers are told of a full
    /// group rather than kept waiting.
    pub fn default_backlog() -> Backlog {
        Backlog::default().with_overflow(Overflow::Reject)
    }
}

/// Names a subscription's own headers must not take: they frame the request, or are ours to say.
fn is_ours(name: &str) -> bool {
    const FRAMING: [&str; 11] = [
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    FRAMING.contains(&name) || ["ce-", "broker-", "webhook-", "proxy-"].iter().any(|prefix| name.starts_with(prefix))
}

fn check_header(name: &str, value: &Secret) -> Result<()> {
    let shown: String = name.chars().take(40).collect();
    let parsed = http::HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| Error::invalid(format!("headers: {shown:?} is no HTTP header name")))?;
    if is_ours(parsed.as_str()) {
        return Err(Error::invalid(format!(
            "headers: {shown:?} is set by the push itself; choose a name that does not begin with ce-, broker-, webhook- or proxy- and does not frame the request"
        )));
    }
    if value.is_redacted() {
        return Err(Error::invalid(format!(
            "headers.{shown}: *** stands for a secret that is not shown; give its value"
        )));
    }
    // What HTTP allows besides arrives as something else, depending on who reads it (RFC 9110, section 5.5).
    let visible = value.expose().bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if value.expose().len() > 4096 || !visible {
        return Err(Error::invalid(format!(
            "headers.{shown}: a value has 4096 characters at most, of visible ASCII and spaces"
        )));
    }
    Ok(())
}

/// How a message becomes a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mode {
    /// One CloudEvent in binary mode: the payload as body, attributes as headers.
    #[default]
    Binary,
    /// One CloudEvent in structured mode: a JSON object.
    Structured,
    /// Several CloudEvents: a JSON array.
    Batch,
    /// The payload as body, and our own headers.
    Raw,
}

/// How many messages one request has in batch mode: up to 8 MiB of them, or one that is larger. While the endpoint refuses
/// so many as a whole they are fewer, down to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Messages at most.
    pub max: NonZeroU32,
    /// How long to wait for more once there is one.
    #[serde(with = "duration_text")]
    pub wait: Duration,
}

impl Default for Batch {
    fn default() -> Self {
        Self { max: NonZeroU32::MIN.saturating_add(99), wait: Duration::from_millis(10) }
    }
}

/// What an answer of an endpoint means, where a subscription says so itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StatusVerdict {
    /// Done.
    Ack,
    /// Push it again.
    Retry,
    /// Dead-letter it at once.
    Reject,
}

/// Bytes of an endpoint's URL.
const MAX_ENDPOINT: usize = 2_048;

/// Where messages are pushed: an `http` or `https` URL without user information.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Url);

impl Endpoint {
    /// The URL.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    /// Parses an endpoint. The error never repeats it: it may hold a password.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| Error::invalid(format!("endpoint: {why}; it looks like https://example.com/hook"));
        let too_long = |text: &str| text.len() > MAX_ENDPOINT;
        if too_long(text) {
            return Err(invalid("it is longer than 2048 bytes"));
        }
        let url = Url::parse(text).map_err(|error| invalid(&format!("it is no URL ({error})")))?;
        // As it is kept and sent: a letter that is encoded takes more bytes.
        if too_long(url.as_str()) {
            return Err(invalid("it is longer than 2048 bytes once it is encoded"));
        }
        if !matches!(url.scheme(), "http" | "https") {
            return Err(invalid("its scheme is neither http nor https"));
        }
        if has_user_information(text) {
            return Err(invalid("user information in it would be shown to everybody; use headers"));
        }
        if url.fragment().is_some() {
            return Err(invalid("a fragment is never sent"));
        }
        if url.port() == Some(0) {
            return Err(invalid("port 0 cannot be dialled"));
        }
        Ok(Self(url))
    }
}

/// Whether an `http` or `https` URL has user information, were it empty: the parser drops such an `@`. It passes over tabs
/// and line ends, and takes any number of slashes of either kind before the authority (WHATWG URL, section 4.4).
fn has_user_information(url: &str) -> bool {
    let url: String = url.chars().filter(|letter| !matches!(letter, '\t' | '\n' | '\r')).collect();
    let after_scheme = url.split_once(':').map_or("", |(_, rest)| rest).trim_start_matches(['/', '\\']);
    after_scheme.split(['/', '\\', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Without its query, which may hold a token.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.clone();
        shown.set_query(None);
        write!(f, "Endpoint({shown})")
    }
}

impl Serialize for Endpoint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| {
            // The path names the field already.
            serde::de::Error::custom(error.message().trim_start_matches("endpoint: "))
        })
    }
}

/// Why what `GET` gave is no good as it is: it tells more than the settings, and a null in that would be named first.
fn no_settings(json: &[u8]) -> Option<Error> {
    let fields: BTreeMap<String, serde::de::IgnoredAny> = serde_json::from_slice(json).ok()?;
    let told: Vec<_> = ["name", "owner", "status"].into_iter().filter(|field| fields.contains_key(*field)).collect();
    let why = "a GET tells this beside the settings, and it is none; leave it out";
    (!told.is_empty()).then(|| Error::invalid(format!("{}: {why}", told.join(", "))))
}

/// What stands for a secret where one is shown.
pub(crate) const REDACTED: &str = "***";

/// Text that is never printed. It serializes as it is, for the state file; what the API shows is
/// redacted first.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being printed.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for who sends or signs with it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    fn is_redacted(&self) -> bool {
        self.0 == REDACTED
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// The keys pushes are signed with, in the text of Standard Webhooks: `whsec_…` for HMAC-SHA256,
/// `whsk_…` for an ed25519 private key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signing {
    /// The key.
    pub secret: Secret,
    /// The key before it, which signs beside it while receivers change over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Secret>,
    /// Until when the previous key signs; for ever if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

impl Signing {
    fn check(&self) -> Result<()> {
        check_key("signing.secret", &self.secret)?;
        self.previous.as_ref().map_or(Ok(()), |previous| check_key("signing.previous", previous))?;
        if self.until.is_some() && self.previous.is_none() {
            return Err(Error::invalid("signing.until: it says how long signing.previous signs, which is missing"));
        }
        Ok(())
    }
}

/// Standard Webhooks: a symmetric key has 24 to 64 bytes; an ed25519 seed has 32, written with its
/// public half 64. Never repeats the key.
fn check_key(field: &str, secret: &Secret) -> Result<()> {
    let invalid = || {
        Error::invalid(format!(
            "{field}: it is whsec_ and the base64 of 24 to 64 bytes, or whsk_ and that of an ed25519 private key of 32 or 64 bytes"
        ))
    };
    let text = secret.expose();
    let bytes = |base64: &str| STANDARD.decode(base64).map(|bytes| bytes.len()).map_err(|_| invalid());
    match (text.strip_prefix("whsec_"), text.strip_prefix("whsk_")) {
        (Some(key), _) if (24..=64).contains(&bytes(key)?) => Ok(()),
        (_, Some(key)) if matches!(bytes(key)?, 32 | 64) => Ok(()),
        _ => Err(invalid()),
    }
}

fn read_max_in_flight<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = u64::deserialize(deserializer)?;
    match u32::try_from(number) {
        Ok(number @ 1..=MAX_IN_FLIGHT) => Ok(number),
        _ => Err(serde::de::Error::custom(format!("{number}: it is from 1 to {MAX_IN_FLIGHT}"))),
    }
}

fn read_rate_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    let Some(rate) = Option::<f64>::deserialize(deserializer)? else { return Ok(None) };
    if rate.is_finite() && rate > 0.0 && rate <= MAX_RATE {
        return Ok(Some(rate));
    }
    Err(serde::de::Error::custom(format!("{rate}: it is messages a second, more than zero")))
}

/// As the core's, except that here a full backlog rejects unless it is told otherwise.
fn read_backlog<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Backlog>, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Fields {
        max_messages: Option<u64>,
        max_bytes: Option<u64>,
        overflow: Option<Overflow>,
    }
    let Some(fields) = Option::<Fields>::deserialize(deserializer)? else { return Ok(None) };
    let default = SubscriptionSpec::default_backlog();
    default
        .with_overflow(fields.overflow.unwrap_or(default.overflow()))
        .with_max_messages(fields.max_messages.unwrap_or(default.max_messages()))
        .and_then(|backlog| backlog.with_max_bytes(fields.max_bytes.unwrap_or(default.max_bytes())))
        .map(Some)
        .map_err(|error| serde::de::Error::custom(error.message()))
}

/// A [`Duration`] that may be absent, as text.
mod optional_duration {
    use std::time::Duration;

    use broker_core::{format_duration, parse_duration};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => serializer.serialize_str(&format_duration(*duration)),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| parse_duration(&text).map_err(|error| serde::de::Error::custom(error.message()))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> String {
        SubscriptionSpec::from_json(json.as_bytes()).map(|_| json.to_owned()).unwrap_err().to_string()
    }

    #[test]
    fn an_endpoint_that_was_taken_is_taken_again() {
        let long = |letter: &str, count| format!("https://example.com/{}", letter.repeat(count)).parse::<Endpoint>();
        let taken = long("ü", 300).unwrap();
        assert_eq!(taken.to_string().parse::<Endpoint>().unwrap(), taken);
        // A kept one is read again at the next start, encoded.
        assert!(long("ü", 400).unwrap_err().message().contains("once it is encoded"));
        assert!(long("x", 2_100).is_err());
    }

    #[test]
    fn an_endpoint_has_no_user_information_not_even_an_empty_one() {
        for url in [
            "http://u:p@x/",
            "http://u@x/",
            "http://@x/",
            "http://:@x/",
            "http://:p@x",
            "http:@x",
            "http:/@x/",
            "http:\\\\@x/",
            "http:///@x/",
            " https://a@@x/",
            "http:/\t/@x/",
            "htt\np://@x/",
        ] {
            let error = url.parse::<Endpoint>().unwrap_err();
            assert!(error.message().contains("user information"), "{url:?}: {error}");
        }
        for url in ["http://x/@", "http://x?@", "http://x/a:@b/c@d", "http:\\\\x\\@"] {
            assert!(url.parse::<Endpoint>().is_ok(), "{url:?}");
        }
    }

    #[test]
    fn the_example_of_the_interface_reads_and_writes() {
        let json = r#"{
            "filter": "orders.>", "filters": [{"prefix": {"type": "com.acme."}}],
            "endpoint": "https://example.com/hook", "group": "billing", "start": "new", "mode": "binary",
            "batch": {"max": 100, "wait": "10ms"}, "ordered": false, "max_in_flight": 64, "rate_limit": 100,
            "timeout": "10s", "retry": {"max_attempts": 20, "initial": "1s", "max": "10m", "multiplier": 2.0},
            "backlog": {"max_messages": 1000000, "max_bytes": 268435456, "overflow": "reject"},
            "dead_letter": "dead.orders", "headers": {"x-api-key": "k"},
            "signing": {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
        }"#;
        let spec = SubscriptionSpec::from_json(json.as_bytes()).unwrap();
        assert_eq!(spec.backlog, Some(SubscriptionSpec::default_backlog()));
        assert_eq!(spec.retry, Some(RetryPolicy::default()));
        let again = SubscriptionSpec::from_json(&serde_json::to_vec(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
        assert!(!format!("{spec:?}").contains("MfKQ"), "{spec:?}");
    }

    #[test]
    fn only_the_filter_is_required() {
        let spec = SubscriptionSpec::from_json(br#"{"filter":"a"}"#).unwrap();
        assert_eq!(spec, SubscriptionSpec::new("a".parse().unwrap()));
        assert!(refused("{}").contains("filter"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (fields, named) in [
            (r#""colour":"red""#, "colour"),
            (r#""endpoint":"ftp://x""#, "endpoint"),
            (r#""endpoint":"http://u:p@x/""#, "user information"),
            (r#""endpoint":"nowhere""#, "endpoint"),
            (r#""max_in_flight":0"#, "max_in_flight"),
            (r#""max_in_flight":-1"#, "max_in_flight"),
            (r#""timeout":"0s""#, "timeout"),
            (r#""timeout":"-1s""#, "timeout"),
            (r#""timeout":10"#, "timeout"),
            (r#""rate_limit":0"#, "rate_limit"),
            (r#""batch":{"max":0}"#, "batch.max"),
            (r#""batch":{"wait":"2h"}"#, "batch.wait"),
            (r#""retry":{"max_attempts":0}"#, "retry"),
            (r#""backlog":{"max_bytes":0}"#, "backlog"),
            (r#""backlog":{"policy":"x"}"#, "policy"),
            (r#""group":"a@b""#, "group"),
            (r#""start":"yesterday""#, "start"),
            (r#""dead_letter":"broker-x""#, "dead_letter"),
            (r#""headers":{"host":"x"}"#, "host"),
            (r#""headers":{"x-key":"***"}"#, "x-key"),
            (r#""headers":{"x key":"v"}"#, "x key"),
            (r#""headers":{"x-key":"a\nb"}"#, "x-key"),
            (r#""headers":{"x-key":"Bearer é"}"#, "headers.x-key"),
            (r#""headers":{"X-Key":"a","x-key":"b"}"#, "x-key: it is given twice"),
            (r#""headers":{"x-key":"a","x-key":"b"}"#, "x-key is given twice"),
            (r#""filters":[{"exact":{"type":"a","type":"b"}}]"#, "type is given twice"),
            (r#""verdicts":{"404":"ack","404":"retry"}"#, "404 is given twice"),
            (r#""signing":{"secret":"hunter2"}"#, "signing.secret"),
            (r#""signing":{"secret":"***"}"#, "signing.secret"),
            (r#""filters":[{"exact":{}}]"#, "exact"),
            (r#""filters":[{"cesql":"x"}]"#, "filters"),
            (r#""endpoint":"http://x/","expires":"1s""#, "expires"),
            (r#""endpoint":"https://x/","http2":true"#, "http2"),
            (r#""verdicts":{"99":"ack"}"#, "verdicts"),
            (r#""tls":{"ca":"hunter2"}"#, "tls.ca"),
            (r#""tls":{"key":"***"}"#, "tls"),
        ] {
            let error = refused(&format!(r#"{{"filter":"a",{fields}}}"#));
            assert!(error.contains(named), "{fields}: {error}");
            assert!(!error.contains("hunter2") && !error.contains("u:p"), "{error}");
        }
        assert!(refused(r#"{"filter":"a.>.b"}"#).contains("filter"));
        assert!(refused(r#"{"filter":"a"} {}"#).contains("trailing"));
        assert!(refused("[").contains("subscription"));
    }
}
