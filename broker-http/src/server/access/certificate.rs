//! Client certificates: what one proves, and for how long.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use broker_core::{Error, Result, Timestamp};
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::tls::Tls;
use super::token::TokenHash;
use super::validity;

/// A client certificate an identity is known by: its fingerprint (`sha256:` and the hash of its DER
/// form), or a DNS name among its subject alternative names.
///
/// ```
/// use broker_http::CertificateName;
/// assert!("billing.internal".parse::<CertificateName>().is_ok());
/// assert!("not a name".parse::<CertificateName>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateName(Form);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    Fingerprint(TokenHash),
    Dns(String),
}

/// What the certificate of a connection says, for as long as it is good and the authorities of clients vouch for it.
#[derive(Debug)]
pub(crate) struct Presented {
    fingerprint: TokenHash,
    names: Vec<String>,
    chain: Vec<CertificateDer<'static>>,
    tls: Tls,
    /// When it, or another of its chain, is good no more.
    ends: Vec<Option<Timestamp>>,
    vouched: Mutex<Vouched>,
}

/// What is known of a certificate.
#[derive(Clone, Copy, Debug)]
struct Vouched {
    /// After how many changes of the authorities.
    changes: u64,
    /// When to look again, whatever the authorities do.
    until: Option<Timestamp>,
    is: bool,
}

/// How often a certificate is looked at again that does not say in a way we know until when it is good, and how long is
/// slept at most until then: clocks are set.
const LOOK: Duration = Duration::from_secs(60);

impl Presented {
    /// Reads the chain of a certificate that TLS tells of, after it had changed its authorities so often; `None` if there
    /// is none. Where a session was resumed, TLS verified it when the session began, and not since: it is looked at here.
    pub(crate) fn new(chain: &[CertificateDer<'_>], tls: &Tls, changes: u64) -> Option<Self> {
        let certificate = chain.first()?;
        let names = webpki::EndEntityCert::try_from(certificate)
            .map(|parsed| parsed.valid_dns_names().map(str::to_ascii_lowercase).collect())
            .unwrap_or_default();
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let now = Timestamp::now();
        let ends: Vec<_> = chain.iter().map(|one| validity::end(one)).collect();
        let vouched = Mutex::new(Vouched { changes, until: next(&ends, now), is: tls.vouches_for(&chain) });
        Some(Self { fingerprint: TokenHash::of(certificate), names, chain, tls: tls.clone(), ends, vouched })
    }

    /// Whether the authorities of now vouch for it; looked at anew where they have changed, and where it may have ended.
    pub(super) fn is_vouched_for(&self) -> bool {
        let changes = *self.tls.authorities().borrow();
        let now = Timestamp::now();
        let mut vouched = self.vouched.lock();
        if vouched.changes != changes || vouched.until.is_some_and(|until| until <= now) {
            *vouched = Vouched { changes, until: next(&self.ends, now), is: self.tls.vouches_for(&self.chain) };
        }
        vouched.is
    }

    /// Waits until the authorities are others, or it may have ended.
    pub(super) async fn may_differ(&self) {
        let mut authorities = self.tls.authorities();
        let Vouched { changes: known, until, .. } = *self.vouched.lock();
        let ended = async {
            let Some(until) = until else { return std::future::pending().await };
            loop {
                match until.since(Timestamp::now()) {
                    Duration::ZERO => return,
                    left => tokio::time::sleep(left.min(LOOK)).await,
                }
            }
        };
        tokio::select! {
            // It lives as long as what is held here.
            _ = authorities.wait_for(|changes| *changes != known) => {}
            () = ended => {}
        }
    }
}

/// The next of these that is still to come.
fn next(ends: &[Option<Timestamp>], now: Timestamp) -> Option<Timestamp> {
    ends.iter().map(|end| end.unwrap_or_else(|| now.after(LOOK))).filter(|end| *end > now).min()
}

impl CertificateName {
    pub(super) fn is(&self, presented: &Presented) -> bool {
        match &self.0 {
            Form::Fingerprint(fingerprint) => fingerprint.matches(&presented.fingerprint).into(),
            // Literally: a certificate for `*.internal` is none for `billing.internal`.
            Form::Dns(name) => presented.names.iter().any(|have| have == name),
        }
    }
}

impl FromStr for CertificateName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.starts_with("sha256:") {
            return text.parse().map(|hash| Self(Form::Fingerprint(hash))).map_err(|_| invalid(text));
        }
        match ServerName::try_from(text) {
            Ok(ServerName::DnsName(name)) => Ok(Self(Form::Dns(name.as_ref().to_ascii_lowercase()))),
            _ => Err(invalid(text)),
        }
    }
}

fn invalid(text: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    Error::invalid(format!(
        "certificate {shown:?}: it is sha256: and the 64 hexadecimal digits of its fingerprint, or a DNS name it is made out to"
    ))
}

impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Form::Fingerprint(hash) => hash.fmt(f),
            Form::Dns(name) => f.write_str(name),
        }
    }
}

impl Serialize for CertificateName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CertificateName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}
