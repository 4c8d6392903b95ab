//! Who may do what: identities by bearer token or client certificate, rules by action and topic,
//! and everything else refused as soon as there is one identity.

mod certificate;
mod identity;
mod need;
mod owner;
mod rate;
mod right;
mod throttle;
mod token;
mod validity;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Result, TopicFilter};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use parking_lot::RwLock;
use subtle::ConditionallySelectable;
use tokio::sync::watch;

use super::Shared;
use super::memory::Share;
use super::metrics::{Metrics, Refusal};
use super::places::Place;
use super::problem::{Answer, Problem};
use super::wire::Wire;
use crate::outgoing::Part;
pub use certificate::CertificateName;
pub(crate) use certificate::Presented;
pub use identity::{Action, Allow, Identity};
use need::Need;
use rate::Bucket;
pub(crate) use right::{Ended, Right};
use throttle::Throttle;
pub(crate) use throttle::network;
pub use token::{Token, TokenHash};

/// The identities of a server. Without any, whoever reaches it may do everything; with one or more,
/// what no rule allows is refused.
///
/// ```
/// use broker_http::{Access, Action, Identity, ServerOptions, Token};
///
/// let token = Token::random()?;
/// let billing = Identity::new("billing")?
///     .with_token(token.hash())
///     .allowing([Action::Publish], ["orders.>".parse()?]);
/// let options = ServerOptions::new().with_access(Access::new([billing])?);
/// # let _ = options;
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Access {
    known: Vec<Arc<Known>>,
}

/// An identity, and what it has left of its rate.
#[derive(Debug)]
pub(crate) struct Known {
    identity: Identity,
    bucket: Option<Arc<Bucket>>,
    /// What its bodies hold that are under way.
    bodies: Share,
    /// What is encoded for it and not read.
    answers: Part,
    /// Its streams that are open.
    streams: Arc<AtomicUsize>,
    /// Topics in use that it published to first.
    topics: Arc<AtomicUsize>,
    /// Deliveries lent to it.
    leases: Arc<AtomicUsize>,
}

impl Known {
    fn new(identity: Identity, bucket: Option<Arc<Bucket>>) -> Self {
        let (bodies, answers) = (Share::default(), Part::default());
        let (streams, topics, leases) = Default::default();
        Self { identity, bucket, bodies, answers, streams, topics, leases }
    }
}

impl Access {
    /// These identities and nobody else; none is [`default`](Self::default).
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the identity, for one without tokens and
    /// certificates, an empty rule, a rate out of range, or a name, token or certificate that two have.
    pub fn new(identities: impl IntoIterator<Item = Identity>) -> Result<Self> {
        let mut known: Vec<Arc<Known>> = Vec::new();
        for identity in identities {
            identity.check()?;
            for other in known.iter().map(|known| &known.identity) {
                let twice = |what: &str| {
                    Error::invalid(format!("identities {} and {} have the same {what}", other.name, identity.name))
                };
                if other.name == identity.name {
                    return Err(twice("name"));
                }
                if identity.tokens.iter().any(|token| other.tokens.contains(token)) {
                    return Err(twice("token"));
                }
                if identity.certificates.iter().any(|certificate| other.certificates.contains(certificate)) {
                    return Err(twice("certificate"));
                }
            }
            let bucket = identity.rate.map(|rate| Arc::new(Bucket::new(rate, identity.burst)));
            known.push(Arc::new(Known::new(identity, bucket)));
        }
        Ok(Self { known })
    }

    /// As these are; who is in `before` too, with the same rate, has left of it what was left.
    fn after(&self, before: &Self) -> Self {
        let bucket = |new: &Known| {
            let old = before.known.iter().find(|old| old.identity.name == new.identity.name)?;
            let same = (old.identity.rate, old.identity.burst) == (new.identity.rate, new.identity.burst);
            old.bucket.clone().filter(|_| same)
        };
        let known = |new: &Arc<Known>| {
            let bucket = bucket(new).or_else(|| new.bucket.clone());
            let old = before.known.iter().find(|old| old.identity.name == new.identity.name);
            // What it holds it holds under the new rules, too.
            let held = old.unwrap_or(new);
            Arc::new(Known {
                identity: new.identity.clone(),
                bucket,
                bodies: held.bodies.clone(),
                answers: held.answers.clone(),
                streams: Arc::clone(&held.streams),
                topics: Arc::clone(&held.topics),
                leases: Arc::clone(&held.leases),
            })
        };
        Self { known: self.known.iter().map(known).collect() }
    }

    /// Whether there is nobody, and so no rule.
    pub fn is_open(&self) -> bool {
        self.known.is_empty()
    }

    /// Who has this token. Every hash is compared, and in a time that tells nothing.
    fn by_token(&self, presented: &TokenHash) -> Option<&Arc<Known>> {
        let mut found = u64::MAX;
        for (index, known) in (0_u64..).zip(&self.known) {
            for token in &known.identity.tokens {
                found.conditional_assign(&index, token.matches(presented));
            }
        }
        self.known.get(usize::try_from(found).ok()?)
    }

    fn by(&self, shown: &Shown) -> Option<&Arc<Known>> {
        match shown {
            Shown::Token(hash) => self.by_token(hash),
            Shown::Certificate(presented) => self.by_certificate(presented),
        }
    }

    fn by_certificate(&self, presented: &Presented) -> Option<&Arc<Known>> {
        if !presented.is_vouched_for() {
            return None;
        }
        self.known.iter().find(|known| known.identity.certificates.iter().any(|name| name.is(presented)))
    }
}

/// Whoever is at the other end of a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub(crate) address: Option<IpAddr>,
    pub(crate) certificate: Option<Arc<Presented>>,
    pub(crate) wire: Arc<Wire>,
    /// That of the connection among all that may be open. None where somebody else serves.
    pub(crate) place: Option<Arc<Place>>,
}

/// Who made a request, where somebody must be known. It travels with the request.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    known: Arc<Known>,
    shown: Shown,
}

/// What somebody is known by.
#[derive(Clone, Debug)]
enum Shown {
    Token(TokenHash),
    Certificate(Arc<Presented>),
}

impl Caller {
    /// Who made this request: nobody in particular where everybody may do everything.
    pub(crate) fn of(extensions: &http::Extensions) -> Option<Self> {
        extensions.get().cloned()
    }

    pub(crate) fn name(&self) -> &str {
        &self.known.identity.name
    }

    /// What its bodies hold that are under way.
    pub(crate) fn bodies(&self) -> Share {
        self.known.bodies.clone()
    }

    /// What is encoded for it and not read.
    pub(crate) fn answers(&self) -> Part {
        self.known.answers.clone()
    }

    /// How many streams of its are open.
    pub(crate) fn streams(&self) -> &Arc<AtomicUsize> {
        &self.known.streams
    }

    /// How many topics in use it published to first.
    pub(crate) fn topics(&self) -> &Arc<AtomicUsize> {
        &self.known.topics
    }

    /// How many deliveries are lent to it.
    pub(crate) fn leases(&self) -> &Arc<AtomicUsize> {
        &self.known.leases
    }

    pub(crate) fn may(&self, action: Action, filter: &TopicFilter) -> bool {
        self.known.identity.may(action, filter)
    }

    fn may_at_all(&self, action: Action) -> bool {
        let acts = |allowed: &Action| *allowed == action || *allowed == Action::Admin && action == Action::Subscribe;
        self.known.identity.allow.iter().any(|allow| allow.actions.iter().any(acts))
    }

    /// Whether it may know of a subscription to `filter`.
    pub(crate) fn may_see(&self, filter: &TopicFilter) -> bool {
        self.may(Action::Subscribe, filter) || self.may(Action::Settle, filter)
    }

    /// Refuses what no rule allows.
    pub(crate) fn check(&self, action: Action, filter: &TopicFilter) -> Answer<()> {
        if self.may(action, filter) { Ok(()) } else { Err(self.forbidden(&format!("{action} on {filter}"))) }
    }

    fn forbidden(&self, what: &str) -> Problem {
        let detail = format!("identity {} may not {what}; no rule of its allows that", self.known.identity.name);
        Problem::new(StatusCode::FORBIDDEN, ErrorKind::Unauthorized, detail).counted(Refusal::Forbidden)
    }

    /// Takes messages beyond the first of a request.
    pub(crate) fn overdraw(&self, count: usize) {
        if let Some(bucket) = &self.known.bucket {
            bucket.overdraw(count);
        }
    }

    /// What a stream of messages waits for before it reads on.
    pub(crate) async fn pace(&self) {
        if let Some(owed) = self.known.bucket.as_ref().map(|bucket| bucket.owed()).filter(|owed| !owed.is_zero()) {
            tokio::time::sleep(owed).await;
        }
    }

    /// Tells what is left of the rate, if there is one.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        if let Some(bucket) = &self.known.bucket {
            bucket.tell(headers);
        }
    }
}

/// Where every request passes.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    access: RwLock<Arc<Access>>,
    /// How many changes there were.
    changed: watch::Sender<u64>,
    throttle: Throttle,
}

impl Gate {
    pub(crate) fn new(access: Arc<Access>) -> Self {
        Self { access: RwLock::new(access), ..Self::default() }
    }

    /// From now on these identities; what waits or goes on ends with its [`Right`], and other requests under way finish.
    pub(crate) fn set(&self, access: &Access) {
        {
            let mut now = self.access.write();
            *now = Arc::new(access.after(&now));
        }
        self.changed.send_modify(|changes| *changes += 1);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.access.read().is_open()
    }

    /// Whether who asks may know what is for admins, where it need not say who it is.
    ///
    /// # Errors
    ///
    /// As anywhere for a token that is nobody's: it may be a guess. A certificate is none, and may be the machine's.
    pub(crate) async fn is_admin(&self, metrics: &Metrics, peer: Option<&Peer>, headers: &HeaderMap) -> Answer<bool> {
        let access = Arc::clone(&self.access.read());
        if access.is_open() {
            return Ok(true);
        }
        match who(&access, peer, headers) {
            Ok(caller) => Ok(TopicFilter::new(">").is_ok_and(|all| caller.may(Action::Admin, &all))),
            Err(Unknown::Wrong) if headers.contains_key(header::AUTHORIZATION) => Err(self.wrong(metrics, peer).await),
            Err(_) => Ok(false),
        }
    }

    /// Finds out who asks, and whether it may; `None` where everybody may do everything.
    pub(crate) async fn admit(
        &self,
        shared: &Shared,
        peer: Option<&Peer>,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Answer<Option<Caller>> {
        let access = Arc::clone(&self.access.read());
        if access.is_open() {
            return Ok(None);
        }
        let need = Need::of(method, uri, headers);
        if let Need::Nobody = need {
            return Ok(None);
        }
        let caller = match who(&access, peer, headers) {
            Ok(caller) => caller,
            Err(Unknown::Nobody) => {
                return Err(unauthorized(
                    "this needs an identity: send authorization: Bearer TOKEN, or a client certificate",
                )
                .counted(Refusal::Unauthenticated));
            }
            Err(Unknown::Wrong) => return Err(self.wrong(&shared.metrics, peer).await),
        };
        if let Some(Err(wait)) = caller.known.bucket.as_ref().map(|bucket| bucket.take()) {
            let rate = caller.known.identity.rate.unwrap_or_default();
            let detail =
                format!("identity {} is over its {rate} requests and messages a second", caller.known.identity.name);
            let mut problem = Problem::too_many(detail).retry_after(wait).counted(Refusal::Rate);
            caller.tell(problem.headers_mut());
            return Err(problem);
        }
        need.check(shared, &caller).map_err(|mut problem| {
            caller.tell(problem.headers_mut());
            problem
        })?;
        Ok(Some(caller))
    }

    /// The answer to a failed attempt, when it is due.
    async fn wrong(&self, metrics: &Metrics, peer: Option<&Peer>) -> Problem {
        // Who leaves meanwhile makes room for another attempt, and counts without an answer.
        peer.inspect(|peer| peer.wire.set_fleeting(true));
        let mut left = Left(Some(metrics));
        let answers = self.throttle.slow(peer.and_then(|peer| peer.address)).await;
        left.0 = None;
        if answers {
            return unauthorized("the token or certificate is nobody's here");
        }
        Problem::too_many("too many failed attempts from this address wait; try again later")
            .retry_after(Duration::from_secs(5))
            .counted(Refusal::Attempts)
    }
}

/// A failed attempt whose answer is waited for; one that is answered counts with its answer.
struct Left<'a>(Option<&'a Metrics>);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if let Some(metrics) = self.0 {
            metrics.refused(Refusal::Unauthenticated);
        }
    }
}

enum Unknown {
    /// Nothing was shown.
    Nobody,
    /// What was shown is nobody's.
    Wrong,
}

/// A token counts before a certificate, which may belong to the machine.
fn who(access: &Access, peer: Option<&Peer>, headers: &HeaderMap) -> std::result::Result<Caller, Unknown> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => {
            let token = bearer(value).ok_or(Unknown::Wrong)?;
            known_by(access, Shown::Token(TokenHash::of(token)))
        }
        (Some(_), Some(_)) => Err(Unknown::Wrong),
        (None, _) => {
            let presented = peer.and_then(|peer| peer.certificate.as_ref()).ok_or(Unknown::Nobody)?;
            known_by(access, Shown::Certificate(Arc::clone(presented)))
        }
    }
}

fn known_by(access: &Access, shown: Shown) -> std::result::Result<Caller, Unknown> {
    let known = Arc::clone(access.by(&shown).ok_or(Unknown::Wrong)?);
    Ok(Caller { known, shown })
}

/// The token of `Bearer TOKEN` (RFC 6750, 2.1).
fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn unauthorized(detail: &str) -> Problem {
    let mut problem = Problem::new(StatusCode::UNAUTHORIZED, ErrorKind::Unauthorized, detail);
    problem.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"broker-http\""));
    problem
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str, token: &str) -> Identity {
        Identity::new(name).unwrap().with_token(TokenHash::of(token))
    }

    #[test]
    fn everybody_is_told_from_everybody_else() {
        let access =
            Access::new([known("a", "one"), known("b", "two").with_token(TokenHash::of("three")), known("c", "four")])
                .unwrap();
        for (token, name) in
            [("one", Some("a")), ("two", Some("b")), ("three", Some("b")), ("four", Some("c")), ("five", None)]
        {
            let found = access.by_token(&TokenHash::of(token)).map(|known| known.identity.name.as_str());
            assert_eq!(found, name, "{token}");
        }
        assert!(Access::default().by_token(&TokenHash::of("")).is_none());
    }

    #[test]
    fn what_two_have_is_refused() {
        for (one, two, what) in [
            (known("a", "1"), known("a", "2"), "name"),
            (known("a", "1"), known("b", "1"), "token"),
            (
                known("a", "1").with_certificate("x.internal".parse().unwrap()),
                known("b", "2").with_certificate("X.internal".parse().unwrap()),
                "certificate",
            ),
        ] {
            let error = Access::new([one, two]).unwrap_err();
            assert!(error.message().contains(&format!("same {what}")), "{error}");
        }
    }

    #[test]
    fn a_bearer_token_is_read_as_the_standard_says() {
        for (value, token) in
            [("Bearer x", Some("x")), ("bearer  x ", Some("x")), ("Basic x", None), ("Bearer", None), ("", None)]
        {
            let value = HeaderValue::from_static(value);
            assert_eq!(bearer(&value), token.map(str::as_bytes), "{value:?}");
        }
    }
}
