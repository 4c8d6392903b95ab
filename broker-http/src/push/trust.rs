//! Which servers a push trusts, and what it shows them: a private authority, a client certificate.

use std::sync::Arc;

use broker_core::{Error, Result};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Serialize};

use crate::Secret;

/// TLS of pushes, as text in PEM. Of a subscription it is the field `tls`, of a whole daemon the
/// configuration's `[push]`.
///
/// ```
/// use broker_http::{PushTls, SubscriptionSpec};
///
/// let error = SubscriptionSpec::from_json(
///     br#"{"filter": "a", "endpoint": "https://billing.internal/", "tls": {"ca": "not a certificate"}}"#,
/// ).unwrap_err();
/// assert!(error.message().starts_with("tls.ca: "), "{error}");
/// # let _ = PushTls::default();
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct PushTls {
    /// The authorities to trust, instead of this machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The certificate to show to endpoints that ask for one, and those it was signed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Its private key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Secret>,
}

const MAX_BYTES: usize = 256 << 10;

impl PushTls {
    /// Trusts these authorities instead of this machine's.
    #[must_use]
    pub fn with_ca(mut self, pem: impl Into<String>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Shows this certificate to endpoints that ask for one.
    #[must_use]
    pub fn with_certificate(mut self, certificate: impl Into<String>, key: impl Into<String>) -> Self {
        self.certificate = Some(certificate.into());
        self.key = Some(Secret::new(key));
        self
    }

    /// Checks that everything can be used. Never repeats what it holds.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the field.
    pub fn check(&self) -> Result<()> {
        let key = self.key.as_ref().map(Secret::expose);
        for (field, text) in [("ca", self.ca.as_deref()), ("certificate", self.certificate.as_deref()), ("key", key)] {
            if text.is_some_and(|text| text.len() > MAX_BYTES) {
                return Err(invalid(field, "it is longer than 256 KiB"));
            }
        }
        let roots = if self.ca.is_some() { self.roots()? } else { RootCertStore::empty() };
        self.config(roots).map(drop)
    }

    /// How TLS is spoken; without authorities of its own with this machine's, reading which blocks.
    pub(crate) fn client_config(&self) -> Result<ClientConfig> {
        self.config(self.roots()?)
    }

    fn roots(&self) -> Result<RootCertStore> {
        let Some(pem) = &self.ca else { return crate::tls::from_this_machine().map_err(Error::unavailable) };
        let mut roots = RootCertStore::empty();
        for certificate in certificates("ca", pem)? {
            roots.add(certificate).map_err(|error| invalid("ca", &error.to_string()))?;
        }
        Ok(roots)
    }

    fn config(&self, roots: RootCertStore) -> Result<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::unavailable(format!("TLS: {error}")))?
            .with_root_certificates(roots);
        let mut config = match (&self.certificate, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(certificate), Some(key)) => {
                let chain = certificates("certificate", certificate)?;
                let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
                    .map_err(|_| invalid("key", "it holds no private key in PEM"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| invalid("key", &format!("it does not go with the certificate: {error}")))?
            }
            (Some(_), None) => return Err(invalid("key", "tls.certificate goes with its key, which is missing")),
            (None, Some(_)) => return Err(invalid("certificate", "tls.key goes with a certificate, which is missing")),
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn certificates(field: &str, pem: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or_else(|| invalid(field, "it holds no certificate in PEM"))
}

fn invalid(field: &str, why: &str) -> Error {
    Error::invalid(format!("tls.{field}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named_and_not_repeated() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let (pem, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let good = PushTls::default().with_ca(&pem).with_certificate(&pem, &key);
        good.check().unwrap();
        assert!(!format!("{good:?}").contains("PRIVATE KEY"), "{good:?}");
        for (tls, named) in [
            (PushTls::default().with_ca("hunter2"), "tls.ca"),
            (PushTls::default().with_certificate("hunter2", &key), "tls.certificate"),
            (PushTls::default().with_certificate(&pem, "hunter2"), "tls.key"),
            (PushTls::default().with_certificate(&pem, &other), "tls.key"),
            (PushTls { key: None, ..good.clone() }, "tls.key"),
            (PushTls { certificate: None, ..good.clone() }, "tls.certificate"),
            (PushTls::default().with_ca("x".repeat(MAX_BYTES + 1)), "256 KiB"),
        ] {
            let error = tls.check().unwrap_err();
            assert!(error.message().contains(named) && !error.message().contains("hunter2"), "{error}");
        }
    }
}
