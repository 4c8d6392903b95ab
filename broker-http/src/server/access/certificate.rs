//! Client certificates: what one proves, once TLS has verified it.

use std::fmt;
use std::str::FromStr;

use broker_core::{Error, Result};
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::tls::Tls;
use super::token::TokenHash;

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

/// What the certificate of a connection says, for as long as the authorities of clients vouch for it.
#[derive(Debug)]
pub(crate) struct Presented {
    fingerprint: TokenHash,
    names: Vec<String>,
    chain: Vec<CertificateDer<'static>>,
    tls: Tls,
    /// What is known of it, and after how many changes of the authorities.
    vouched: Mutex<(u64, bool)>,
}

impl Presented {
    /// Reads the chain of a certificate that TLS has verified, once it had changed its authorities so often; `None` if
    /// there is none.
    pub(crate) fn new(chain: &[CertificateDer<'_>], tls: &Tls, changes: u64) -> Option<Self> {
        let certificate = chain.first()?;
        let names = webpki::EndEntityCert::try_from(certificate)
            .map(|parsed| parsed.valid_dns_names().map(str::to_ascii_lowercase).collect())
            .unwrap_or_default();
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let vouched = Mutex::new((changes, true));
        Some(Self { fingerprint: TokenHash::of(certificate), names, chain, tls: tls.clone(), vouched })
    }

    /// Whether the authorities of now vouch for it; looked at anew where they have changed.
    pub(super) fn is_vouched_for(&self) -> bool {
        let changes = *self.tls.authorities().borrow();
        let mut vouched = self.vouched.lock();
        if vouched.0 != changes {
            *vouched = (changes, self.tls.vouches_for(&self.chain));
        }
        vouched.1
    }

    /// Waits until the authorities are others.
    pub(super) async fn authorities_changed(&self) {
        let mut authorities = self.tls.authorities();
        let known = self.vouched.lock().0;
        // It lives as long as what is held here.
        let _ = authorities.wait_for(|changes| *changes != known).await;
    }
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
