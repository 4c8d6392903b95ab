//! TLS on the listener: who is there, client certificates, certificates that change.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use broker_core::MemoryBroker;
use broker_http::push::Guard;
use broker_http::{Access, Action, Identity, Limits, PushTls, Server, ServerOptions, Tls, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::HandshakeKind;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use crate::support::{Reply, Running, soon};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for a name, and its key.
fn issue(authority: &Authority, name: &str) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, authority).unwrap();
    (certificate, key)
}

fn write(folder: &Path, authority: &Authority, name: &str) {
    let (certificate, key) = issue(authority, name);
    std::fs::write(folder.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
}

fn client(trusts: &Authority, shows: Option<(rcgen::Certificate, KeyPair)>) -> TlsConnector {
    client_of(rustls::DEFAULT_VERSIONS, trusts, shows)
}

fn client_of(
    versions: &[&'static rustls::SupportedProtocolVersion],
    trusts: &Authority,
    shows: Option<(rcgen::Certificate, KeyPair)>,
) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(trusts.der().to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let config = match shows {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
            builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

/// One request, or why the connection was refused.
async fn ask(address: std::net::SocketAddr, tls: &TlsConnector, request: &str) -> Result<Reply, std::io::Error> {
    let stream = TcpStream::connect(address).await?;
    let mut stream = tls.connect(ServerName::try_from("localhost").unwrap(), stream).await?;
    let head = format!("{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(Reply::parse(&answer))
}

#[tokio::test]
async fn a_client_certificate_is_an_identity() {
    let folder = tempfile::tempdir().unwrap();
    let (servers, clients, strangers) = (authority(), authority(), authority());
    write(folder.path(), &servers, "localhost");
    std::fs::write(folder.path().join("clients.pem"), clients.pem()).unwrap();
    let files = TlsFiles::new(folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let tls = Tls::load(files.with_client_ca(folder.path().join("clients.pem"))).unwrap();

    let by_print = issue(&clients, "anything.internal");
    let print = broker_http::TokenHash::of(by_print.0.der()).to_string();
    let all = || [">".parse().unwrap()];
    let access = Access::new([
        Identity::new("billing")
            .unwrap()
            .with_certificate("billing.internal".parse().unwrap())
            .allowing([Action::Publish], all()),
        Identity::new("printed").unwrap().with_certificate(print.parse().unwrap()).allowing([Action::Subscribe], all()),
    ])
    .unwrap();
    let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new().with_access(access));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { server.serve_tls(listener, tls).await });

    let named = client(&servers, Some(issue(&clients, "billing.internal")));
    let unknown = client(&servers, Some(issue(&clients, "somebody.internal")));
    let printed = client(&servers, Some(by_print));
    let nobody = client(&servers, None);
    for (connector, request, status) in [
        (&named, "POST /topics/a", 202),
        (&named, "PUT /subscriptions/a", 403),
        (&printed, "POST /topics/a", 403),
        (&printed, "GET /subscriptions", 200),
        (&unknown, "POST /topics/a", 401),
        (&nobody, "POST /topics/a", 401),
        (&nobody, "GET /healthz", 200),
    ] {
        let reply = soon(ask(address, connector, request)).await.unwrap();
        assert_eq!(reply.status, status, "{request}: {}", reply.text());
    }
    // One of another authority is refused before a request, and the next is served.
    let stranger = client(&servers, Some(issue(&strangers, "billing.internal")));
    assert!(soon(ask(address, &stranger, "POST /topics/a")).await.is_err());
    // So is one who speaks no TLS.
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = soon(plain.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    assert_eq!(soon(ask(address, &nobody, "GET /healthz")).await.unwrap().status, 200);
}

/// A handshake that gets nowhere holds a place as little as a connection that says nothing.
#[tokio::test]
async fn handshakes_give_way_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let servers = authority();
    write(folder.path(), &servers, "localhost");
    let files = TlsFiles::new(folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let mut limits = Limits::default();
    limits.connections = 4;
    let options = ServerOptions::new().with_development(true).with_limits(limits);
    let server = Server::new(Arc::new(MemoryBroker::new()), options);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { server.serve_tls(listener, Tls::load(files).unwrap()).await });
    let mut flood = Vec::new();
    // Nothing, or a handshake's record of 256 bytes begun.
    for said in [&b""[..], &[22, 3, 1, 1, 0], b"", &[22, 3, 1, 1, 0]] {
        let mut stream = crate::places::connect_from("127.0.0.9", address).await;
        stream.write_all(said).await.unwrap();
        flood.push(stream);
    }
    let guest = client(&servers, None);
    let mut first = guest
        .connect(ServerName::try_from("localhost").unwrap(), TcpStream::connect(address).await.unwrap())
        .await
        .unwrap();
    say(&mut first, "GET /healthz", "ok\n").await;
    assert_eq!(soon(ask(address, &guest, "GET /healthz")).await.unwrap().status, 200);
    say(&mut first, "GET /metrics", "reason=\"gave_way\"} 2\n").await;
}

/// Sends a request over a connection that stays, and reads until `end` has come.
async fn say(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), request: &str, end: &str) {
    let head = format!("{request} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    hear(stream, end).await;
}

async fn hear(stream: &mut (impl AsyncReadExt + Unpin), end: &str) {
    let mut answer = String::new();
    let mut piece = [0; 4096];
    while !answer.contains(end) {
        let read = stream.read(&mut piece).await.unwrap();
        assert!(read > 0, "{answer}");
        answer.push_str(std::str::from_utf8(&piece[..read]).unwrap());
    }
}

/// A server that lets in as `billing` whoever shows a certificate of that name by `clients`, a file that a reload reads again.
async fn serve_billing(folder: &Path, servers: &Authority, clients: &Authority) -> (Tls, SocketAddr) {
    write(folder, servers, "localhost");
    std::fs::write(folder.join("clients.pem"), clients.pem()).unwrap();
    let files = TlsFiles::new(folder.join("cert.pem"), folder.join("key.pem"));
    let tls = Tls::load(files.with_client_ca(folder.join("clients.pem"))).unwrap();
    let rule = Identity::new("billing").unwrap().with_certificate("billing.internal".parse().unwrap());
    let rule = rule.allowing([Action::Publish, Action::Subscribe], [">".parse().unwrap()]);
    let options = ServerOptions::new().with_access(Access::new([rule]).unwrap());
    let server = Server::new(Arc::new(MemoryBroker::new()), options);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tls.clone();
    tokio::spawn(async move { server.serve_tls(listener, serving).await });
    (tls, address)
}

#[tokio::test]
async fn a_client_certificate_counts_as_long_as_the_authorities_vouch_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (servers, old, new) = (authority(), authority(), authority());
    let path = folder.path().join("clients.pem");
    let (tls, address) = serve_billing(folder.path(), &servers, &old).await;

    let connector = client(&servers, Some(issue(&old, "billing.internal")));
    let connect = async || {
        let stream = TcpStream::connect(address).await.unwrap();
        connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap()
    };
    let (mut publisher, mut reader) = (soon(connect()).await, soon(connect()).await);
    soon(say(&mut publisher, "POST /topics/a", "202 Accepted")).await;
    soon(say(&mut reader, "GET /topics/a/stream", "text/event-stream")).await;
    // While one authority follows another both are listed.
    std::fs::write(&path, [old.pem(), new.pem()].concat()).unwrap();
    assert!(tls.reload().unwrap());
    soon(say(&mut publisher, "POST /topics/a", "202 Accepted")).await;
    soon(hear(&mut reader, "data:")).await;
    std::fs::write(&path, new.pem()).unwrap();
    assert!(tls.reload().unwrap());
    soon(say(&mut publisher, "POST /topics/a", "401 Unauthorized")).await;
    // The last chunk.
    soon(hear(&mut reader, "0\r\n\r\n")).await;
    assert!(soon(connect()).await.read(&mut [0; 1]).await.is_err(), "nor is it let in anew");
}

#[tokio::test]
async fn a_client_certificate_that_ends_ends_what_it_proves_over_connections_that_stand() {
    let folder = tempfile::tempdir().unwrap();
    let (servers, clients) = (authority(), authority());
    let (_, address) = serve_billing(folder.path(), &servers, &clients).await;

    let ends = std::time::SystemTime::now() + Duration::from_secs(4);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["billing.internal".to_owned()]).unwrap();
    params.not_after = ends.into();
    let connector = client(&servers, Some((params.signed_by(&key, &clients).unwrap(), key)));
    let connect = async || {
        let stream = TcpStream::connect(address).await.unwrap();
        connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap()
    };
    let (mut publisher, mut reader) = (soon(connect()).await, soon(connect()).await);
    soon(say(&mut publisher, "POST /topics/a", "202 Accepted")).await;
    soon(say(&mut reader, "GET /topics/a/stream", "text/event-stream")).await;
    // The last chunk: nobody asked for anything meanwhile.
    soon(hear(&mut reader, "0\r\n\r\n")).await;
    assert!(std::time::SystemTime::now() >= ends - Duration::from_secs(1), "not before");
    soon(say(&mut publisher, "POST /topics/a", "401 Unauthorized")).await;
}

/// A session that is resumed tells of a certificate that was verified when it began, and not since.
#[tokio::test]
async fn a_client_certificate_that_ended_is_nobodys_when_its_session_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let (servers, clients) = (authority(), authority());
    let (_, address) = serve_billing(folder.path(), &servers, &clients).await;

    let ends = std::time::SystemTime::now() + Duration::from_secs(6);
    let connectors = [&rustls::version::TLS12, &rustls::version::TLS13].map(|version| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["billing.internal".to_owned()]).unwrap();
        params.not_after = ends.into();
        client_of(&[version], &servers, Some((params.signed_by(&key, &clients).unwrap(), key)))
    });
    let publish = async |connector: &TlsConnector, answer: &str| {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        soon(say(&mut stream, "POST /topics/a", answer)).await;
        stream.get_ref().1.handshake_kind()
    };
    for connector in &connectors {
        assert_eq!(publish(connector, "202 Accepted").await, Some(HandshakeKind::Full));
        assert_eq!(publish(connector, "202 Accepted").await, Some(HandshakeKind::Resumed));
    }
    tokio::time::sleep(ends.duration_since(std::time::SystemTime::now()).unwrap_or_default() + Duration::from_secs(2))
        .await;
    for connector in &connectors {
        assert_eq!(publish(connector, "401 Unauthorized").await, Some(HandshakeKind::Resumed));
    }
}

/// Nor does a session from before let in whom the authorities of now do not vouch for.
#[tokio::test]
async fn no_session_outlives_the_authority_that_vouched_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (servers, old, new) = (authority(), authority(), authority());
    let path = folder.path().join("clients.pem");
    let (tls, address) = serve_billing(folder.path(), &servers, &old).await;
    let connectors = [&rustls::version::TLS12, &rustls::version::TLS13]
        .map(|version| client_of(&[version], &servers, Some(issue(&old, "billing.internal"))));
    for connector in &connectors {
        assert_eq!(soon(ask(address, connector, "POST /topics/a")).await.unwrap().status, 202);
    }
    std::fs::write(&path, new.pem()).unwrap();
    assert!(tls.reload().unwrap());
    for connector in &connectors {
        let refused = match soon(ask(address, connector, "POST /topics/a")).await {
            Ok(reply) => reply.status == 401,
            Err(_) => true,
        };
        assert!(refused);
    }
}

#[tokio::test]
async fn a_certificate_that_changes_is_taken_up_and_a_broken_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (before, after) = (authority(), authority());
    write(folder.path(), &before, "localhost");
    let tls = Tls::load(TlsFiles::new(folder.path().join("cert.pem"), folder.path().join("key.pem"))).unwrap();
    let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tls.clone();
    tokio::spawn(async move { server.serve_tls(listener, serving).await });
    let (old, new) = (client(&before, None), client(&after, None));
    assert_eq!(soon(ask(address, &old, "GET /healthz")).await.unwrap().status, 200);
    assert!(!tls.reload().unwrap(), "nothing changed");

    std::fs::write(folder.path().join("key.pem"), "nonsense").unwrap();
    let error = tls.reload().unwrap_err();
    assert!(error.message().contains("key.pem") && !error.message().contains("nonsense"), "{error}");
    assert_eq!(soon(ask(address, &old, "GET /healthz")).await.unwrap().status, 200);

    write(folder.path(), &after, "localhost");
    assert!(tls.reload().unwrap());
    assert_eq!(soon(ask(address, &new, "GET /healthz")).await.unwrap().status, 200);
    assert!(soon(ask(address, &old, "GET /healthz")).await.is_err());
}

#[tokio::test]
async fn the_files_are_watched_and_may_be_others() {
    let folder = tempfile::tempdir().unwrap();
    let (before, after, last) = (authority(), authority(), authority());
    write(folder.path(), &before, "localhost");
    let files = |folder: &Path| TlsFiles::new(folder.join("cert.pem"), folder.join("key.pem"));
    let tls = Tls::load(files(folder.path())).unwrap().with_look(Duration::from_millis(10));
    let server = Server::new(Arc::new(MemoryBroker::new()), ServerOptions::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tls.clone();
    tokio::spawn(async move { server.serve_tls(listener, serving).await });
    let old = client(&before, None);
    assert_eq!(soon(ask(address, &old, "GET /healthz")).await.unwrap().status, 200);

    // Nobody calls anything: the change is seen.
    write(folder.path(), &after, "localhost");
    let new = client(&after, None);
    soon(async {
        while ask(address, &new, "GET /healthz").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(soon(ask(address, &old, "GET /healthz")).await.is_err());

    let elsewhere = tempfile::tempdir().unwrap();
    assert!(tls.set_files(files(elsewhere.path())).is_err());
    assert_eq!(soon(ask(address, &new, "GET /healthz")).await.unwrap().status, 200);
    write(elsewhere.path(), &last, "localhost");
    assert!(tls.set_files(files(elsewhere.path())).unwrap());
    assert_eq!(soon(ask(address, &client(&last, None), "GET /healthz")).await.unwrap().status, 200);
}

/// An endpoint with a certificate of `authority`, which answers 200 and closes.
async fn endpoint(authority: &Authority) -> std::net::SocketAddr {
    let (certificate, key) = issue(authority, "localhost");
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let Ok(mut stream) = acceptor.accept(listener.accept().await.unwrap().0).await else { continue };
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

#[tokio::test]
async fn whom_pushes_trust_may_change_while_they_run() {
    let (wrong, right) = (authority(), authority());
    let hook = endpoint(&right).await;
    let trusting = |ca: &Authority| {
        let options = ServerOptions::new().with_guard(Guard::new().allowing("localhost".parse().unwrap()));
        options.with_push_tls(PushTls::default().with_ca(ca.pem())).unwrap()
    };
    let running = Running::with(trusting(&wrong)).await;
    let spec = format!(
        r#"{{"filter":"a","endpoint":"https://localhost:{}/","retry":{{"max_attempts":100000,"initial":"1ms","max":"1ms"}}}}"#,
        hook.port()
    );
    assert_eq!(running.put("q", &spec).await.status, 201);
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
    let attempt = async |good: bool| loop {
        let attempts = running.get("/subscriptions/q/attempts").await.json()["attempts"].clone();
        if attempts[0].is_object() && (attempts[0]["status"] == 200) == good {
            return attempts[0].clone();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let failed = soon(attempt(false)).await;
    assert!(failed["error"].as_str().unwrap().contains("TLS"), "{failed}");
    running.server.set_options(trusting(&right).with_development(true));
    assert_eq!(running.send("POST /subscriptions/q/resume", &[], "").await.status, 200);
    soon(attempt(true)).await;
    // And back: a connection made before is not used again.
    running.server.set_options(trusting(&wrong).with_development(true));
    assert_eq!(running.post("/topics/a", "x").await.status, 202);
    soon(attempt(false)).await;
}

#[test]
fn what_is_no_pem_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let authority = authority();
    write(folder.path(), &authority, "localhost");
    std::fs::write(path("other.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    std::fs::write(path("empty.pem"), "").unwrap();
    for (files, named) in [
        (TlsFiles::new(path("none.pem"), path("key.pem")), "none.pem"),
        (TlsFiles::new(path("empty.pem"), path("key.pem")), "empty.pem"),
        (TlsFiles::new(path("cert.pem"), path("empty.pem")), "no private key"),
        (TlsFiles::new(path("cert.pem"), path("other.key")), "cert.pem"),
        (TlsFiles::new(path("cert.pem"), path("key.pem")).with_client_ca(path("empty.pem")), "empty.pem"),
    ] {
        let error = Tls::load(files).unwrap_err();
        assert!(error.message().contains(named), "{named}: {error}");
    }
}
