//! Client certificates: what one proves, once TLS has verified it.

use std::fmt;
use std::str::FromStr;

use broker_core::{Error, Result};
use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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

/// What the certificate of a connection says.
#[derive(Debug)]
pub(crate) struct Presented {
    fingerprint: TokenHash,
    names: Vec<String>,
}

impl Presented {
    /// Reads a certificate that TLS has verified.
    pub(crate) fn new(certificate: &CertificateDer<'_>) -> Self {
        let names = webpki::EndEntityCert::try_from(certificate)
            .map(|parsed| parsed.valid_dns_names().map(str::to_ascii_lowercase).collect())
            .unwrap_or_default();
        Self { fingerprint: TokenHash::of(certificate), names }
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
