//! The client and a daemon behind TLS.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Broker, BrokerExt, ErrorKind, MemoryBroker, Message, Subscribe, TopicFilter};
use rustls::RootCertStore;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::{soon, topic};
use crate::client::{HttpBroker, HttpOptions};
use crate::tls::PemFiles;
use crate::{Server, ServerOptions};

/// A daemon for `localhost` with TLS before it, and the file that has its certificate.
struct Daemon {
    port: u16,
    /// What it has, in one file and in two: whom it trusts is who has the same.
    ca: PathBuf,
    key: PathBuf,
    _folder: tempfile::TempDir,
    _server: Server,
}

impl Daemon {
    async fn start() -> Self {
        Self::with(false).await
    }

    /// One that asks for a certificate, and takes its own alone.
    async fn asking() -> Self {
        Self::with(true).await
    }

    async fn with(asks: bool) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        let pem =
            format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(made.cert.der()));
        std::fs::write(&ca, pem).unwrap();
        let key_file = folder.path().join("key.pem");
        std::fs::write(&key_file, made.signing_key.serialize_pem()).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = if asks {
            let mut roots = RootCertStore::empty();
            roots.add(made.cert.der().clone()).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            config.with_client_cert_verifier(verifier)
        } else {
            config.with_no_client_auth()
        };
        let config = config.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));

        let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new().with_development(true));
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = plain.local_addr().unwrap();
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(plain).await.unwrap() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut outside) = acceptor.accept(stream).await else { return };
                    let mut inside = TcpStream::connect(behind).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
                });
            }
        });
        Self { port, ca, key: key_file, _folder: folder, _server: server }
    }

    fn broker(&self, host: &str, query: &str) -> HttpBroker {
        HttpBroker::new(HttpOptions::from_url(&format!("https://{host}:{}?{query}", self.port)).unwrap())
    }
}

#[tokio::test]
async fn the_contract_holds_over_tls() {
    let daemon = Daemon::start().await;
    let broker = daemon.broker("localhost", &format!("ca={}", daemon.ca.display()));
    soon(broker.connect()).await.unwrap();
    let mut orders = soon(broker.subscribe(&TopicFilter::new("orders.>").unwrap(), Subscribe::new())).await.unwrap();
    soon(broker.publish(&topic("orders.created"), Message::new("42"))).await.unwrap();
    let delivery = soon(orders.next()).await.unwrap().unwrap();
    assert_eq!(delivery.message().payload(), "42");
    soon(delivery.ack()).await.unwrap();
    assert!(soon(broker.close(Duration::from_secs(10))).await.complete);
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_an_error_that_says_so() {
    let (daemon, other) = (Daemon::start().await, Daemon::start().await);
    let ca = format!("ca={}&timeout=5s", other.ca.display());
    let own = format!("ca={}&timeout=5s", daemon.ca.display());
    // Another authority's, and one for another name.
    for broker in [daemon.broker("localhost", &ca), daemon.broker("127.0.0.1", &own)] {
        let error = soon(broker.connect()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.message().contains("certificate"), "{error}");
    }
}

#[tokio::test]
async fn root_certificates_that_cannot_be_read_are_named() {
    let daemon = Daemon::start().await;
    let empty = daemon.ca.with_file_name("empty.pem");
    std::fs::write(&empty, "nothing").unwrap();
    for path in [daemon.ca.with_file_name("missing.pem"), empty] {
        let error = soon(daemon.broker("localhost", &format!("ca={}", path.display())).connect()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.message().contains(&*path.to_string_lossy()), "{error}");
    }
    // With a configuration of the service's own no file is needed.
    let files = PemFiles { ca: Some(daemon.ca.clone()), ..PemFiles::default() };
    let config = files.client_config().unwrap();
    let url = format!("https://localhost:{}", daemon.port);
    let broker = HttpBroker::new(HttpOptions::from_url(&url).unwrap().with_tls(config).unwrap());
    soon(broker.connect()).await.unwrap();
    let plain = HttpOptions::from_url("http://localhost").unwrap();
    assert!(plain.with_tls(files.client_config().unwrap()).is_err());
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_daemon_that_asks() {
    let (daemon, other) = (Daemon::asking().await, Daemon::start().await);
    let url = |shown: &Daemon, key: &Path| {
        format!("ca={}&cert={}&key={}&timeout=5s", daemon.ca.display(), shown.ca.display(), key.display())
    };
    let broker = daemon.broker("localhost", &url(&daemon, &daemon.key));
    soon(broker.connect()).await.unwrap();
    soon(broker.publish(&topic("a"), Message::new("42"))).await.unwrap();
    // None, and somebody else's.
    for query in [format!("ca={}&timeout=5s", daemon.ca.display()), url(&other, &other.key)] {
        let error = soon(daemon.broker("localhost", &query).connect()).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    // What cannot be used is named.
    let missing = daemon.key.with_file_name("missing.pem");
    for (query, file) in [
        (url(&daemon, &missing), &missing),
        (url(&daemon, &other.key), &other.key),
        (url(&daemon, &daemon.ca), &daemon.ca),
        (format!("ca={0}&cert={1}&key={1}", daemon.ca.display(), daemon.key.display()), &daemon.key),
    ] {
        let error = soon(daemon.broker("localhost", &query).connect()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.message().contains(&*file.to_string_lossy()), "{error}");
    }
}
