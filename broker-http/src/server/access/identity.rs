//! Who there is, and what each may do.

use broker_core::{Error, Result, TopicFilter};
use serde::{Deserialize, Serialize};

use super::certificate::CertificateName;
use super::token::TokenHash;

/// Somebody who publishes, subscribes or operates: how they prove it, and what they may do. In the
/// configuration file an entry of `[[identities]]`.
///
/// ```
/// use broker_http::{Action, Identity, Token};
///
/// let identity = Identity::new("billing")?
///     .with_token(Token::random()?.hash())
///     .allowing([Action::Publish], ["orders.>".parse()?])
///     .allowing([Action::Subscribe, Action::Settle], ["invoices.*".parse()?]);
/// assert!(identity.may(Action::Publish, &"orders.created".parse()?));
/// assert!(!identity.may(Action::Publish, &"invoices.paid".parse()?));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Identity {
    /// What it is called in logs and errors; the grammar of a group's name.
    pub name: String,
    /// Hashes of its bearer tokens: several while it changes over from one to the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenHash>,
    /// Its client certificates, by fingerprint or by DNS name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<CertificateName>,
    /// What it may do; nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Allow>,
    /// Requests and messages a second; any number if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Requests and messages at once, after a quiet time; a second's worth if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
}

/// Some actions on some topics.
///
/// ```
/// use broker_http::{Action, Allow};
/// let allow = Allow { actions: vec![Action::Publish], topics: vec!["orders.>".parse()?] };
/// assert!(allow.permits(Action::Publish, &"orders.created".parse()?));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// What may be done.
    pub actions: Vec<Action>,
    /// On what: a subscription's filter must lie within one of these wholly.
    pub topics: Vec<TopicFilter>,
}

/// What somebody does.
///
/// ```
/// assert_eq!(broker_http::Action::Publish.to_string(), "publish");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Action {
    /// Publishing to a topic; also naming it as a dead-letter topic.
    Publish,
    /// Reading streams of one's own, and showing, pausing and resuming subscriptions; with `settle` also what takes
    /// messages out of a group that others may share: streams of a group, and making, changing and deleting subscriptions.
    Subscribe,
    /// Pulling from a subscription that stands, and settling what was pulled.
    Settle,
    /// All that `subscribe` is; making, changing, testing, redriving, purging and deleting subscriptions; with the topics
    /// `>` also metrics and the list of topics.
    Admin,
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Settle => "settle",
            Self::Admin => "admin",
        })
    }
}

impl Allow {
    /// Whether this allows `action` on all that `filter` matches.
    pub fn permits(&self, action: Action, filter: &TopicFilter) -> bool {
        let acts = |allowed: &Action| *allowed == action || *allowed == Action::Admin && action == Action::Subscribe;
        self.actions.iter().any(acts) && self.topics.iter().any(|topics| topics.covers(filter))
    }
}

/// Requests a second that can be told from none.
const MIN_RATE: f64 = 0.001;
const MAX_RATE: f64 = 1e9;

impl Identity {
    /// Somebody who may do nothing yet.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a name outside a group's grammar.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let identity =
            Self { name, tokens: Vec::new(), certificates: Vec::new(), allow: Vec::new(), rate: None, burst: None };
        identity.check_name().map(|()| identity)
    }

    /// Adds a bearer token, by its hash.
    #[must_use]
    pub fn with_token(mut self, hash: TokenHash) -> Self {
        self.tokens.push(hash);
        self
    }

    /// Adds a client certificate.
    #[must_use]
    pub fn with_certificate(mut self, certificate: CertificateName) -> Self {
        self.certificates.push(certificate);
        self
    }

    /// Allows some actions on some topics.
    #[must_use]
    pub fn allowing(
        mut self,
        actions: impl IntoIterator<Item = Action>,
        topics: impl IntoIterator<Item = TopicFilter>,
    ) -> Self {
        self.allow.push(Allow { actions: actions.into_iter().collect(), topics: topics.into_iter().collect() });
        self
    }

    /// Bounds its requests and messages: so many a second, and `burst` at once.
    #[must_use]
    pub fn with_rate(mut self, per_second: f64, burst: u32) -> Self {
        (self.rate, self.burst) = (Some(per_second), Some(burst));
        self
    }

    /// Whether it may do this on all that `filter` matches.
    pub fn may(&self, action: Action, filter: &TopicFilter) -> bool {
        self.allow.iter().any(|allow| allow.permits(action, filter))
    }

    fn check_name(&self) -> Result<()> {
        broker_core::GroupName::new(&self.name)
            .map(drop)
            .map_err(|error| Error::invalid(format!("identity {:?}: {}", self.name, error.message())))
    }

    pub(super) fn check(&self) -> Result<()> {
        self.check_name()?;
        let invalid = |why: &str| Err(Error::invalid(format!("identity {}: {why}", self.name)));
        if self.tokens.is_empty() && self.certificates.is_empty() {
            return invalid("it has neither tokens nor certificates, so that nobody can be it");
        }
        if self.allow.iter().any(|allow| allow.actions.is_empty() || allow.topics.is_empty()) {
            return invalid("allow: an entry without actions or topics allows nothing");
        }
        match (self.rate, self.burst) {
            (Some(rate), _) if !(MIN_RATE..=MAX_RATE).contains(&rate) => {
                invalid("rate: it is requests a second, from 0.001 to 1000000000")
            }
            (None, Some(_)) => invalid("burst: it goes with rate, which is missing"),
            (_, Some(0)) => invalid("burst: 0 would refuse everything; give 1 or more"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(json: &str) -> std::result::Result<Identity, String> {
        let identity: Identity = serde_json::from_str(json).map_err(|error| error.to_string())?;
        identity.check().map_err(|error| error.to_string()).map(|()| identity)
    }

    const HASH: &str = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

    #[test]
    fn rules_are_by_action_and_topic() {
        let billing = identity(&format!(
            r#"{{"name": "billing", "tokens": ["{HASH}"], "allow": [
                {{"actions": ["publish"], "topics": ["orders.>", "audit"]}},
                {{"actions": ["admin"], "topics": ["billing.*"]}}]}}"#
        ))
        .unwrap();
        for (action, filter, may) in [
            (Action::Publish, "orders.created", true),
            (Action::Publish, "audit", true),
            (Action::Publish, "billing.x", false),
            (Action::Subscribe, "orders.created", false),
            (Action::Subscribe, "billing.x", true),
            (Action::Subscribe, "billing.*", true),
            (Action::Subscribe, "billing.>", false),
            (Action::Admin, "billing.x", true),
            (Action::Settle, "billing.x", false),
        ] {
            assert_eq!(billing.may(action, &filter.parse().unwrap()), may, "{action} {filter}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (fields, named) in [
            (r#""name": "a b""#, "a b"),
            (r#""name": "a""#, "neither tokens nor certificates"),
            (r#""name": "a", "tokens": ["hunter2"]"#, "64 hexadecimal"),
            (r#""name": "a", "certificates": ["not a name"]"#, "certificate"),
            (r#""name": "a", "tokens": ["H"], "allow": [{"actions": [], "topics": [">"]}]"#, "allows nothing"),
            (r#""name": "a", "tokens": ["H"], "allow": [{"actions": ["fly"], "topics": [">"]}]"#, "fly"),
            (r#""name": "a", "tokens": ["H"], "rate": 0"#, "rate"),
            (r#""name": "a", "tokens": ["H"], "burst": 5"#, "burst"),
            (r#""name": "a", "tokens": ["H"], "rate": 5, "burst": 0"#, "burst"),
            (r#""name": "a", "tokens": ["H"], "colour": 0"#, "colour"),
        ] {
            let error = identity(&format!("{{{}}}", fields.replace("\"H\"", &format!("\"{HASH}\"")))).unwrap_err();
            assert!(error.contains(named) && !error.contains("hunter2"), "{fields}: {error}");
        }
    }
}
