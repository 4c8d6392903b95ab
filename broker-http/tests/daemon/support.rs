//! The daemon as a process, and an endpoint for its pushes.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, Command};

/// A guard against hanging, never a measure.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what).await.expect("it took longer than any test may")
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_broker-http"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // What the machine that tests has set is none of their business.
    for (name, _) in std::env::vars_os() {
        if ["BROKER_", "OTEL_", "RUST_LOG"].iter().any(|begin| name.to_string_lossy().starts_with(begin)) {
            command.env_remove(name);
        }
    }
    command
}

/// A daemon at work; killed when dropped.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) stderr: BufReader<ChildStderr>,
}

impl Daemon {
    pub(crate) async fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[]).await
    }

    /// As [`start`](Self::start), with variables of the environment.
    pub(crate) async fn start_with(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let listen: &[&str] = if args.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let variables = variables.iter().copied();
        let mut child = command(&[listen, args].concat()).envs(variables).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        // What is logged before is no address.
        while !line.contains("listening on") {
            line.clear();
            assert!(soon(stderr.read_line(&mut line)).await.unwrap() > 0, "it ended before it listened");
        }
        let address = line.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next());
        let address = address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address: {line}"));
        Self { child, address, stderr }
    }

    pub(crate) async fn send(&self, request: &str, body: &str) -> (u16, String) {
        self.raw(&format!("{request} HTTP/1.1"), body).await
    }

    /// As [`send`](Self::send), where the head begins with just these lines.
    pub(crate) async fn raw(&self, begin: &str, body: &str) -> (u16, String) {
        let mut stream = soon(TcpStream::connect(("127.0.0.1", self.address.port()))).await.unwrap();
        let head =
            format!("{begin}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The status of an answer, if there is one.
    pub(crate) async fn try_send(&self, request: &str, body: &str) -> std::io::Result<u16> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.address.port())).await?;
        let head = format!(
            "{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        status.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }

    pub(crate) async fn json(&self, request: &str, body: &str) -> Value {
        let (_, body) = self.send(request, body).await;
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// The exit status and what was said last.
    pub(crate) async fn finish(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        soon(self.stderr.read_to_string(&mut said)).await.unwrap();
        (soon(self.child.wait()).await.unwrap().code(), said)
    }
}

/// An endpoint that answers the first requests with these statuses, and 200 from then on; tells
/// each request it got.
pub(crate) async fn endpoint(statuses: &'static [u16]) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
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

pub(crate) fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let head = request.split("\r\n\r\n").next().unwrap();
    head.split("\r\n")
        .skip(1)
        .filter_map(|line| line.split_once(": "))
        .find(|(have, _)| have.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
}

/// Runs to the end; the exit status and everything said.
pub(crate) async fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = soon(command(args).output()).await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}
