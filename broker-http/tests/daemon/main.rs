//! The real binary, from its first line to its exit status, with real sockets on both sides.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod lines;
mod operation;
mod resume;
mod sdks;

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, Command};

/// A guard against hanging, never a measure.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what).await.expect("it took longer than any test may")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_broker-http"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // What the machine that tests has set is none of their business.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("BROKER_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// A daemon at work; killed when dropped.
struct Daemon {
    child: Child,
    address: SocketAddr,
    stderr: BufReader<ChildStderr>,
}

impl Daemon {
    async fn start(args: &[&str]) -> Self {
        let listen: &[&str] = if args.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = command(&[listen, args].concat()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        soon(stderr.read_line(&mut line)).await.unwrap();
        let address = line.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next());
        let address = address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address: {line}"));
        Self { child, address, stderr }
    }

    async fn send(&self, request: &str, body: &str) -> (u16, String) {
        self.raw(&format!("{request} HTTP/1.1"), body).await
    }

    /// As [`send`](Self::send), where the head begins with just these lines.
    async fn raw(&self, begin: &str, body: &str) -> (u16, String) {
        let mut stream = soon(TcpStream::connect(("127.0.0.1", self.address.port()))).await.unwrap();
        let head =
            format!("{begin}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn json(&self, request: &str, body: &str) -> Value {
        let (_, body) = self.send(request, body).await;
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// The exit status and what was said last.
    async fn finish(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        soon(self.stderr.read_to_string(&mut said)).await.unwrap();
        (soon(self.child.wait()).await.unwrap().code(), said)
    }
}

/// An endpoint that answers the first requests with these statuses, and 200 from then on; tells
/// each request it got.
async fn endpoint(statuses: &'static [u16]) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    let count = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, statuses, Arc::clone(&count), tell.clone()));
        }
    });
    (address, told)
}

async fn answer(
    mut stream: TcpStream,
    statuses: &[u16],
    count: Arc<AtomicUsize>,
    tell: tokio::sync::mpsc::UnboundedSender<String>,
) {
    let mut heard = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut piece).await {
        heard.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&heard).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.to_ascii_lowercase();
        let length = length.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        if body.len() < length.map_or(0, |length| length.parse().unwrap()) {
            continue;
        }
        let status = statuses.get(count.fetch_add(1, Ordering::SeqCst)).copied().unwrap_or(200);
        let _ = tell.send(text);
        heard.clear();
        let reply = format!("HTTP/1.1 {status} Whatever\r\ncontent-length: 0\r\n\r\n");
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let head = request.split("\r\n\r\n").next().unwrap();
    head.split("\r\n")
        .skip(1)
        .filter_map(|line| line.split_once(": "))
        .find(|(have, _)| have.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
}

#[tokio::test]
async fn what_is_published_is_pushed_and_sigterm_drains() {
    let (hook, mut told) = endpoint(&[]).await;
    let daemon = Daemon::start(&[]).await;
    let spec = json!({"filter": "orders.>", "endpoint": format!("http://{hook}/hook?a=1")}).to_string();
    assert_eq!(daemon.send("PUT /subscriptions/billing", &spec).await.0, 201);
    let (status, receipt) = daemon.send("POST /topics/orders.created?key=7", "hello").await;
    assert_eq!(status, 202);
    let request = soon(told.recv()).await.unwrap();
    assert!(request.starts_with("POST /hook?a=1 HTTP/1.1\r\n"), "{request}");
    assert!(request.ends_with("\r\n\r\nhello"), "{request}");
    let receipt: Value = serde_json::from_str(&receipt).unwrap();
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-id", receipt["id"].as_str().unwrap()),
        ("ce-source", "/topics/orders.created"),
        ("ce-type", "orders.created"),
        ("ce-partitionkey", "7"),
        ("broker-topic", "orders.created"),
        ("broker-subscription", "billing"),
        ("broker-attempt", "1"),
    ] {
        assert_eq!(header(&request, name), Some(value), "{name}: {request}");
    }
    soon(async {
        while daemon.json("GET /subscriptions/billing", "").await["status"]["lag"] != 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let attempts = daemon.json("GET /subscriptions/billing/attempts", "").await;
    assert_eq!((&attempts["attempts"][0]["status"], &attempts["attempts"][0]["attempt"]), (&json!(200), &json!(1)));

    daemon.signal("-TERM");
    let (code, said) = daemon.finish().await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("SIGTERM") && said.contains("nothing stayed behind"), "{said}");
}

#[tokio::test]
async fn a_failing_endpoint_gets_its_message_again_and_then_it_is_dead() {
    let (hook, mut told) = endpoint(&[500, 503, 500, 500, 500]).await;
    let daemon = Daemon::start(&[]).await;
    let retry = json!({"max_attempts": 3, "initial": "1ms", "max": "1ms"});
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/"), "retry": retry}).to_string();
    daemon.send("PUT /subscriptions/q", &spec).await;
    daemon.send("POST /topics/a?id=1", "x").await;
    for attempt in ["1", "2", "3"] {
        let request = soon(told.recv()).await.unwrap();
        assert_eq!((header(&request, "broker-attempt"), header(&request, "ce-id")), (Some(attempt), Some("1")));
    }
    let dead = soon(async {
        loop {
            let dead = daemon.json("GET /subscriptions/q/dead", "").await["dead"].clone();
            if dead[0].is_object() {
                return dead;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(
        (&dead[0]["attempts"], &dead[0]["status"], &dead[0]["event"]["id"]),
        (&json!(3), &json!("500"), &json!("1"))
    );
    assert_eq!(daemon.json("POST /subscriptions/q/redrive", "").await, json!({"redriven": 1}));
    let request = soon(told.recv()).await.unwrap();
    assert_eq!(header(&request, "broker-attempt"), Some("1"));
}

#[tokio::test]
async fn a_drain_that_is_cut_says_what_is_lost() {
    let daemon = Daemon::start(&["--drain", "100ms"]).await;
    daemon.send("PUT /subscriptions/q", r#"{"filter":"a","timeout":"1h"}"#).await;
    daemon.send("POST /topics/a", "x").await;
    daemon.send("POST /topics/a", "x").await;
    daemon.send("POST /subscriptions/q/pull?max=1", "").await;
    daemon.signal("-INT");
    let (code, said) = daemon.finish().await;
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("1 in flight") && said.contains("1 undelivered") && said.contains("lost"), "{said}");
}

#[tokio::test]
async fn subscriptions_outlive_a_crash() {
    let (hook, mut told) = endpoint(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let state = ["--state", state.to_str().unwrap()];
    let daemon = Daemon::start(&state).await;
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/")}).to_string();
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec).await.0, 201);
    daemon.signal("-KILL");
    daemon.finish().await;

    let daemon = Daemon::start(&state).await;
    assert_eq!(daemon.json("POST /topics/a", "again").await["matched"], 1);
    assert!(soon(told.recv()).await.unwrap().ends_with("again"));
}

#[tokio::test]
async fn a_config_file_is_read_and_flags_come_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    std::fs::write(&path, "listen = \"nowhere:99999\"\n[limits]\nsubscriptions = 1\n").unwrap();
    let daemon = Daemon::start(&["--config", path.to_str().unwrap()]).await;
    assert_eq!(daemon.send("PUT /subscriptions/a", r#"{"filter":"a"}"#).await.0, 201);
    assert_eq!(daemon.send("PUT /subscriptions/b", r#"{"filter":"a"}"#).await.0, 429);
}

/// Runs to the end; the exit status and everything said.
async fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = soon(command(args).output()).await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let bad_key = write("bad.toml", "colour = \"red\"\n");
    let bad_limit = write("limit.toml", "[limits]\nconnections = 0\n");
    let bad_state = write("state.json", "{");
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let busy = TcpListener::bind(&taken).await.unwrap();
    for (args, code, named) in [
        (&["--config", &bad_key][..], 1, "colour"),
        (&["--config", &bad_limit], 1, "limits.connections"),
        (&["--config", "/nowhere/at/all"], 1, "/nowhere/at/all"),
        (&["--listen", "127.0.0.1:0", "--state", &bad_state], 1, "state.json"),
        (&["--listen", &taken], 1, "--listen"),
        (&["--listen", "nonsense"], 1, "nonsense"),
        (&["--broker", "carrier-pigeon://user:hunter2@roof"], 1, "known schemes"),
        (&["--listen", "127.0.0.1:0", "--allow", "10.0.0.0/99"], 1, "10.0.0.0/99"),
        (&["--drain", "ten"], 2, "ten"),
        (&["--colour", "red"], 2, "--colour"),
        (&["fly"], 2, "fly"),
    ] {
        let (status, said) = run(args).await;
        assert_eq!(status, Some(code), "{args:?}: {said}");
        assert!(said.contains(named) && !said.contains("hunter2"), "{args:?}: {said}");
    }
    drop(busy);
}

#[tokio::test]
async fn help_teaches() {
    let (code, said) = run(&["--help"]).await;
    assert_eq!(code, Some(0));
    for word in ["serve", "pub", "sub", "status", "token", "check-config", "curl", "127.0.0.1:2757"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let (code, said) = run(&["serve", "--help"]).await;
    assert_eq!(code, Some(0));
    for word in ["--listen", "--config", "--broker", "--state", "--dev", "BROKER_HTTP_LISTEN", "20s"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_unix_socket_serves_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let listen = format!("unix:{}", path.display());
    for _ in 0..2 {
        let mut child = command(&["--listen", &listen]).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        soon(stderr.read_line(&mut line)).await.unwrap();
        assert!(line.contains("broker.sock"), "{line}");
        let mut stream = soon(tokio::net::UnixStream::connect(&path)).await.unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // Killed, it leaves its socket behind; the next takes it over.
        child.kill().await.unwrap();
    }
}
