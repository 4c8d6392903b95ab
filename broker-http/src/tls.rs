//! TLS on the way out, for pushes and for the client: a connection with or without it, and the roots it
//! trusts.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// A connection, with or without TLS.
#[derive(Debug)]
pub(crate) enum MaybeTls {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    /// To this machine itself.
    #[cfg(unix)]
    Unix(tokio::net::UnixStream),
}

/// PEM files that say whom to trust and what to show.
#[derive(Clone, Debug, Default)]
pub(crate) struct PemFiles {
    /// Root certificates to trust instead of this machine's.
    pub(crate) ca: Option<PathBuf>,
    /// A certificate to show to servers that ask for one, with those that signed it, and its private key.
    pub(crate) shown: Option<(PathBuf, PathBuf)>,
}

impl PemFiles {
    /// The configuration they make. Reads them: not for the threads that serve requests.
    ///
    /// # Errors
    ///
    /// Why there is none, in a few words.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, String> {
        let roots = match &self.ca {
            Some(path) => from_file(path)?,
            None => from_this_machine()?,
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let Some((certificate, key)) = &self.shown else { return Ok(builder.with_no_client_auth()) };
        let chain = chain(certificate)?;
        let fails = |why: &dyn Display| format!("private key of {}: {why}", key.display());
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| fails(&error))?;
        builder.with_client_auth_cert(chain, private).map_err(|error| fails(&error))
    }
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let fails = |why: &dyn Display| format!("certificate of {}: {why}", path.display());
    let read = CertificateDer::pem_file_iter(path).map_err(|error| fails(&error))?;
    let chain = read.collect::<Result<Vec<_>, _>>().map_err(|error| fails(&error))?;
    if chain.is_empty() { Err(fails(&"there is none in it")) } else { Ok(chain) }
}

/// The root certificates of this machine.
pub(crate) fn from_this_machine() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (good, _) = roots.add_parsable_certificates(found.certs);
    if good == 0 {
        let why = found.errors.first().map_or(String::new(), |error| format!(" ({error})"));
        return Err(format!("no root certificates were found on this machine{why}"));
    }
    Ok(roots)
}

fn from_file(path: &Path) -> Result<RootCertStore, String> {
    let fails = |why: &dyn Display| format!("root certificates of {}: {why}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| fails(&error))? {
        roots.add(certificate.map_err(|error| fails(&error))?).map_err(|error| fails(&error))?;
    }
    if roots.is_empty() { Err(fails(&"there is no certificate in it")) } else { Ok(roots) }
}

macro_rules! forward {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            MaybeTls::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            MaybeTls::Tls(stream) => {
                let $stream = Pin::new(stream.as_mut());
                $call
            }
            #[cfg(unix)]
            MaybeTls::Unix(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
        }
    };
}

impl AsyncRead for MaybeTls {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for MaybeTls {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self, stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
            #[cfg(unix)]
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => stream.poll_shutdown(cx))
    }
}
