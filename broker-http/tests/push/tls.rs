//! Endpoints that speak TLS: HTTP/1.1, or HTTP/2 where both do.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use broker_core::Message;
use broker_http::push::{Guard, PushClient};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::support::{QUICK, Rig};

/// An endpoint for `localhost` that answers 200 to everything.
struct Tls {
    port: u16,
    certificate: CertificateDer<'static>,
    pem: String,
    connections: Arc<AtomicUsize>,
    /// Requests by HTTP version: 1.1 and 2.
    requests: Arc<[AtomicUsize; 2]>,
    task: tokio::task::JoinHandle<()>,
}

impl Tls {
    async fn new(protocols: &[&str]) -> Self {
        Self::with(protocols, rustls::server::WebPkiClientVerifier::no_client_auth()).await
    }

    /// One that wants to be shown this certificate.
    async fn asking(client: &rcgen::Certificate) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(client.der().clone()).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        Self::with(&["http/1.1"], verifier.build().unwrap()).await
    }

    async fn with(protocols: &[&str], verifier: Arc<dyn rustls::server::danger::ClientCertVerifier>) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (certificate, pem) = (made.cert.der().clone(), made.cert.pem());
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<[AtomicUsize; 2]>::default());
        let task = tokio::spawn({
            let (connections, requests) = (Arc::clone(&connections), Arc::clone(&requests));
            async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (acceptor, requests) = (acceptor.clone(), Arc::clone(&requests));
                    let connections = Arc::clone(&connections);
                    tokio::spawn(async move {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        connections.fetch_add(1, Ordering::Relaxed);
                        let service = service_fn(|request: hyper::Request<Incoming>| {
                            let h2 = request.version() == hyper::Version::HTTP_2;
                            requests[usize::from(h2)].fetch_add(1, Ordering::Relaxed);
                            assert_eq!(request.uri().path(), "/hook");
                            async move {
                                request.into_body().collect().await.unwrap();
                                Ok::<_, Infallible>(hyper::Response::new(Full::<Bytes>::default()))
                            }
                        });
                        let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    });
                }
            }
        });
        Self { port, certificate, pem, connections, requests, task }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}/hook", self.port)
    }

    fn requests(&self) -> (usize, usize) {
        let [one, two] = &*self.requests;
        (one.load(Ordering::Relaxed), two.load(Ordering::Relaxed))
    }

    /// A client that trusts this endpoint.
    fn client(&self) -> PushClient {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        PushClient::new(Guard::new().with_development(true)).with_tls(config)
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

async fn push_hundred(endpoint: &Tls) {
    let rig = Rig::with(&endpoint.url(), r#""retry":{"max_attempts":1}"#, &endpoint.client()).await;
    rig.publish((0..100).map(|number: u32| Message::new(number.to_string()))).await;
    rig.drained().await;
    assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn http_2_shares_one_connection() {
    let endpoint = Tls::new(&["h2", "http/1.1"]).await;
    push_hundred(&endpoint).await;
    assert_eq!(endpoint.requests(), (0, 100));
    assert_eq!(endpoint.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn http_1_where_the_endpoint_speaks_no_other() {
    for protocols in [&["http/1.1"][..], &[]] {
        let endpoint = Tls::new(protocols).await;
        push_hundred(&endpoint).await;
        assert_eq!(endpoint.requests(), (100, 0));
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_refused() {
    let (endpoint, other) = (Tls::new(&["h2"]).await, Tls::new(&["h2"]).await);
    let rig = Rig::with(&endpoint.url(), QUICK, &other.client()).await;
    rig.publish([Message::new("42")]).await;
    let reason = rig.dead(1).await.remove(0).failure.reason().to_owned();
    assert!(reason.contains("TLS: ") && reason.contains("certificate"), "{reason}");
    // Nor is one for another name.
    let url = endpoint.url().replace("localhost", "127.0.0.1");
    let rig = Rig::with(&url, QUICK, &endpoint.client()).await;
    rig.publish([Message::new("42")]).await;
    assert!(rig.dead(1).await.remove(0).failure.reason().contains("TLS: "));
    assert_eq!(endpoint.requests(), (0, 0));
}

#[tokio::test]
async fn a_private_authority_and_a_client_certificate_go_with_a_subscription() {
    let endpoint = Tls::new(&["h2", "http/1.1"]).await;
    let shown = rcgen::generate_simple_self_signed(["billing.internal".to_owned()]).unwrap();
    let asking = Tls::asking(&shown.cert).await;
    // The daemon's own client trusts nobody here.
    let client = crate::support::client();
    let field = |tls: serde_json::Value| format!("{QUICK},\"tls\":{tls}");
    for (endpoint, tls, acked) in [
        (&endpoint, serde_json::json!({"ca": endpoint.pem}), true),
        (&endpoint, serde_json::json!({"ca": asking.pem}), false),
        (&asking, serde_json::json!({"ca": asking.pem}), false),
        (
            &asking,
            serde_json::json!({"ca": asking.pem, "certificate": shown.cert.pem(), "key": shown.signing_key.serialize_pem()}),
            true,
        ),
    ] {
        let rig = Rig::with(&endpoint.url(), &field(tls), &client).await;
        rig.publish([Message::new("42")]).await;
        if acked {
            rig.drained().await;
            assert!(rig.broker.dead_letters(&rig.group, 10).await.unwrap().is_empty());
        } else {
            rig.dead(1).await;
        }
    }
}
