//! TLS on the listener: certificates from files, taken up again when they change, and client
//! certificates where there is an authority for them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use broker_core::{Error, Result};
use parking_lot::RwLock;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::files;

/// How often the files are looked at, unless it is said otherwise.
const LOOK: Duration = Duration::from_secs(5);

/// The PEM files TLS is spoken with.
///
/// ```
/// use broker_http::TlsFiles;
/// let files = TlsFiles::new("broker.pem", "broker.key").with_client_ca("clients.pem");
/// # let _ = files;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl TlsFiles {
    /// A certificate, those it was signed with after it, and its private key.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), client_ca: None }
    }

    /// Asks clients for a certificate of one of these authorities. One that is shown must be good;
    /// whether one must be shown is up to the identities.
    #[must_use]
    pub fn with_client_ca(mut self, path: impl Into<PathBuf>) -> Self {
        self.client_ca = Some(path.into());
        self
    }

    /// Reads the files, blocking.
    fn read(&self) -> Result<Contents> {
        let read = |path: &Path| {
            files::read(path).map_err(|error| Error::invalid(format!("TLS: {}: {error}", path.display())))
        };
        Ok(Contents {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
            client_ca: self.client_ca.as_deref().map(read).transpose()?,
        })
    }

    /// What checks the certificates of clients, where they may show one.
    fn verifier(&self, contents: &Contents) -> Result<Option<Arc<dyn ClientCertVerifier>>> {
        let (Some(path), Some(pem)) = (&self.client_ca, &contents.client_ca) else { return Ok(None) };
        let broken = |why: &dyn fmt::Display| Error::invalid(format!("TLS: {}: {why}", path.display()));
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem).map_err(|why| broken(&why))? {
            roots.add(certificate).map_err(|error| broken(&error))?;
        }
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .allow_unauthenticated()
            .build()
            .map(Some)
            .map_err(|error| broken(&error))
    }

    fn config(&self, contents: &Contents, verifier: Option<&Arc<dyn ClientCertVerifier>>) -> Result<ServerConfig> {
        let broken = |path: &Path, why: &dyn fmt::Display| Error::invalid(format!("TLS: {}: {why}", path.display()));
        let chain = certificates(&contents.certificate).map_err(|why| broken(&self.certificate, &why))?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_| broken(&self.key, &"it holds no private key in PEM"))?;
        let verifier = verifier.map_or_else(WebPkiClientVerifier::no_client_auth, Arc::clone);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| broken(&self.certificate, &error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| broken(&self.certificate, &error))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The certificates of a PEM text: one at least.
pub(crate) fn certificates(pem: &[u8]) -> std::result::Result<Vec<CertificateDer<'static>>, &'static str> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err("it holds no certificate in PEM"),
    }
}

/// What the files held when they were last read.
#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// TLS as a server speaks it; cloning shares it. See [`Server::serve_tls`](crate::Server::serve_tls).
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

struct Shared {
    /// How often the files are looked at.
    look: AtomicU64,
    now: RwLock<Now>,
    /// How often the authorities of clients have changed.
    authorities: watch::Sender<u64>,
}

struct Now {
    files: TlsFiles,
    contents: Contents,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    config: Arc<ServerConfig>,
}

impl Now {
    fn of(files: TlsFiles, contents: Contents) -> Result<Self> {
        let verifier = files.verifier(&contents)?;
        let config = Arc::new(files.config(&contents, verifier.as_ref())?);
        Ok(Self { files, contents, verifier, config })
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.0.now.read().files).finish()
    }
}

impl Tls {
    /// Reads the files, blocking for as long as that takes.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the file and what is wrong with it.
    pub fn load(files: TlsFiles) -> Result<Self> {
        let contents = files.read()?;
        Ok(Self(Arc::new(Shared {
            look: AtomicU64::new(LOOK.as_millis() as u64),
            now: RwLock::new(Now::of(files, contents)?),
            authorities: watch::Sender::default(),
        })))
    }

    /// Takes up what the files hold now, and tells whether it is something new. Connections that
    /// stand go on, but for a client certificate that the new authorities do not vouch for: it is nobody's from
    /// then on. If the files are no good, what was read before goes on.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn reload(&self) -> Result<bool> {
        let files = self.0.now.read().files.clone();
        self.set_files(files)
    }

    /// As [`reload`](Self::reload), from now on of these files.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); then it goes on with the files it had.
    ///
    /// ```no_run
    /// use broker_http::{Tls, TlsFiles};
    ///
    /// # fn main() -> broker_core::Result<()> {
    /// let tls = Tls::load(TlsFiles::new("cert.pem", "key.pem"))?;
    /// // True if what they hold is something else.
    /// let changed = tls.set_files(TlsFiles::new("next/cert.pem", "next/key.pem"))?;
    /// # let _ = changed; Ok(()) }
    /// ```
    pub fn set_files(&self, files: TlsFiles) -> Result<bool> {
        let contents = files.read()?;
        {
            let mut now = self.0.now.write();
            if now.contents == contents {
                now.files = files;
                return Ok(false);
            }
        }
        let next = Now::of(files, contents)?;
        let other_authorities = {
            let mut now = self.0.now.write();
            let other = now.contents.client_ca != next.contents.client_ca;
            *now = next;
            other
        };
        if other_authorities {
            self.0.authorities.send_modify(|changes| *changes += 1);
        }
        Ok(true)
    }

    /// Sets how often the files are looked at while they are served from (default 5 s).
    ///
    /// ```no_run
    /// # fn main() -> broker_core::Result<()> {
    /// use std::time::Duration;
    /// use broker_http::{Tls, TlsFiles};
    ///
    /// let tls = Tls::load(TlsFiles::new("cert.pem", "key.pem"))?.with_look(Duration::from_secs(60));
    /// # let _ = tls; Ok(()) }
    /// ```
    #[must_use]
    pub fn with_look(self, every: Duration) -> Self {
        let millis = u64::try_from(every.as_millis()).unwrap_or(u64::MAX).max(1);
        self.0.look.store(millis, Ordering::Relaxed);
        self
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.0.now.read().config))
    }

    /// How often the authorities of clients have changed, and what tells of the next time.
    pub(crate) fn authorities(&self) -> watch::Receiver<u64> {
        self.0.authorities.subscribe()
    }

    /// Whether the authorities of now vouch for the certificate that a client has shown, the first of its chain.
    pub(crate) fn vouches_for(&self, chain: &[CertificateDer<'_>]) -> bool {
        let verifier = self.0.now.read().verifier.clone();
        let (Some(verifier), Some((certificate, rest))) = (verifier, chain.split_first()) else { return false };
        verifier.verify_client_cert(certificate, rest, UnixTime::now()).is_ok()
    }

    /// Looks at the files now and then, until it is aborted.
    pub(crate) fn watch(&self) -> JoinHandle<()> {
        let tls = self.clone();
        tokio::spawn(async move {
            let mut failure = Failure::default();
            loop {
                tokio::time::sleep(Duration::from_millis(tls.0.look.load(Ordering::Relaxed))).await;
                let looking = tls.clone();
                let Ok(found) = tokio::task::spawn_blocking(move || looking.reload()).await else { continue };
                if let Ok(true) = found {
                    tracing::info!("the TLS certificate changed and was taken up");
                }
                if let Some(error) = failure.news(found) {
                    tracing::error!(%error, "TLS goes on with the certificate it has");
                }
            }
        })
    }
}

/// What was wrong with the files when they were last looked at.
#[derive(Debug, Default)]
struct Failure(Option<String>);

impl Failure {
    /// What is to be said: what goes on being wrong was said already, unless it was good in between.
    fn news(&mut self, found: Result<bool>) -> Option<String> {
        let now = found.err().map(|error| error.to_string());
        let before = std::mem::replace(&mut self.0, now.clone());
        now.filter(|now| before.as_ref() != Some(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_again_is_said_again() {
        let mut failure = Failure::default();
        let broken = |why: &str| Err(Error::invalid(why));
        for (found, said) in [
            (Ok(false), false),
            (broken("a"), true),
            (broken("a"), false),
            (broken("b"), true),
            (Ok(true), false),
            (broken("b"), true),
            (Ok(false), false),
            (broken("b"), true),
        ] {
            let expected = found.as_ref().err().filter(|_| said).map(ToString::to_string);
            assert_eq!(failure.news(found), expected);
        }
    }
}
