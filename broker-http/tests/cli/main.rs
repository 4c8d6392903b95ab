//! `broker-http pub` and `broker-http sub`: the real binary against a server on a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, MemoryBroker, Message, Subscribe, Subscription, TopicFilter};
use broker_http::{Access, Action, Identity, Server, ServerOptions, TokenHash};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};

/// A guard against hanging, never a measure.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what).await.expect("it took longer than any test may")
}

struct Daemon {
    server: Server,
    address: SocketAddr,
}

impl Daemon {
    async fn start() -> Self {
        Self::with(ServerOptions::new().with_development(true)).await
    }

    async fn with(options: ServerOptions) -> Self {
        let server = Server::new(Arc::new(MemoryBroker::new()), options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = server.clone();
        tokio::spawn(async move { serving.serve(listener).await.unwrap() });
        Self { server, address }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_broker-http"));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
            .env_remove("RUST_LOG")
            .env_remove("BROKER_TOKEN")
            .env("BROKER_URL", format!("http://hunter2@{}", self.address));
        command
    }

    /// Runs a command to its end, with this on its standard input.
    async fn run(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input).await.unwrap();
        drop(stdin);
        let output = soon(child.wait_with_output()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked") && !said.contains("hunter2"), "{said}");
        output
    }

    async fn listen(&self, filter: &str) -> Subscription {
        soon(self.server.broker().subscribe(&TopicFilter::new(filter).unwrap(), Subscribe::new())).await.unwrap()
    }

    /// Starts `sub`, and waits until it stands.
    async fn sub(&self, args: &[&str]) -> Sub {
        let before = self.subscriptions().await;
        let mut child = self.command(&[&["sub"], args].concat()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        soon(async {
            while self.subscriptions().await == before {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Sub { child, lines }
    }

    async fn subscriptions(&self) -> usize {
        soon(self.server.broker().status()).await.unwrap().groups.len()
    }
}

struct Sub {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Sub {
    async fn line(&mut self) -> Option<String> {
        soon(self.lines.next_line()).await.unwrap()
    }

    async fn json(&mut self) -> Value {
        serde_json::from_str(&self.line().await.unwrap()).unwrap()
    }
}

async fn received(subscription: &mut Subscription) -> Message {
    let delivery = soon(subscription.next()).await.unwrap().unwrap();
    let message = delivery.message().clone();
    soon(delivery.ack()).await.unwrap();
    message
}

#[tokio::test]
async fn an_argument_is_one_message_with_all_that_is_said_about_it() {
    let daemon = Daemon::start().await;
    let mut orders = daemon.listen("orders").await;
    let output = daemon
        .run(
            &[
                "pub",
                "orders",
                "{\"id\": 42}",
                "-t",
                "application/json",
                "--key",
                "c 7",
                "-H",
                "Odd=a=b",
                "-H",
                "Odd=2",
                "--id",
                "order-42",
                "--ttl",
                "1h",
                "--dedup",
                "once",
            ],
            b"",
        )
        .await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "published order-42 to orders, 1 copy\n");
    let message = received(&mut orders).await;
    assert_eq!(message.payload().as_ref(), b"{\"id\": 42}");
    assert_eq!((message.content_type(), message.dedup_key()), (Some("application/json"), Some("once")));
    assert_eq!((message.id().to_string().as_str(), message.key().unwrap().as_ref()), ("order-42", &b"c 7"[..]));
    assert_eq!(message.headers().get_all("Odd").map(|value| value.to_vec()).collect::<Vec<_>>(), [&b"a=b"[..], b"2"]);
    assert!(message.expires_at().is_some());
    let again = daemon.run(&["pub", "orders", "x", "--dedup", "once", "--json"], b"").await;
    let receipt: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((&receipt["duplicate"], &receipt["id"]), (&true.into(), &"order-42".into()));
}

#[tokio::test]
async fn a_file_is_one_message_and_standard_input_many() {
    let daemon = Daemon::start().await;
    let mut all = daemon.listen(">").await;
    let path = std::env::temp_dir().join(format!("broker-http-cli-{}", std::process::id()));
    std::fs::write(&path, b"a\nb\xff").unwrap();
    assert!(daemon.run(&["pub", "file", "--file", path.to_str().unwrap()], b"").await.status.success());
    std::fs::remove_file(&path).unwrap();
    assert_eq!(received(&mut all).await.payload().as_ref(), b"a\nb\xff");
    assert!(daemon.run(&["pub", "whole", "--file", "-"], b"1\n2\n").await.status.success());
    assert_eq!(received(&mut all).await.payload().as_ref(), b"1\n2\n");

    let input: String = (0..3_000).map(|n| format!("line {n}\n")).collect();
    let output = daemon.run(&["pub", "lines", "--json", "--key", "k"], input.as_bytes()).await;
    assert!(output.status.success());
    let told = String::from_utf8(output.stdout).unwrap();
    let last: Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!((told.lines().count(), last["line"].as_u64()), (3_000, Some(3_000)));
    for n in 0..3_000 {
        assert_eq!(received(&mut all).await.payload().as_ref(), format!("line {n}").as_bytes());
    }
    assert!(daemon.run(&["pub", "none"], b"").await.status.success(), "no line, no failure");
    assert!(daemon.run(&["pub", "gone", "--tombstone", "-k", "x"], b"").await.status.success());
    assert!(received(&mut all).await.is_tombstone());
}

#[tokio::test]
async fn what_fails_is_told_and_seen_in_the_exit_status() {
    let daemon = Daemon::start().await;
    let long = "x".repeat((1 << 20) + 1);
    let input = format!("one\n{long}\nthree\n");
    let output = daemon.run(&["pub", "t", "--json"], input.as_bytes()).await;
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!((&lines[1]["line"], &lines[1]["error"]["kind"]), (&2.into(), &"too large".into()));
    assert!(lines[2]["id"].is_string());

    let unroutable = daemon.run(&["pub", "t", "x", "--require-route"], b"").await;
    assert_eq!(unroutable.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unroutable.stderr).contains("unroutable"));

    for (args, named) in [
        (&["pub", "a..b", "x"][..], "a..b"),
        (&["pub", "t", "x", "--ttl", "soon"], "soon"),
        (&["pub", "t", "x", "-H", "novalue"], "NAME=VALUE"),
        (&["pub", "t", "x", "--file", "y"], "--file"),
        (&["pub", "t", "--id", "x"], "--id"),
        (&["pub", "broker-x", "x"], "broker-x"),
        (&["pub", "t", "--file", "/nowhere/at/all"], "/nowhere/at/all"),
        (&["pub", "t", "x", "--broker", "carrier-pigeon://roof"], "known schemes"),
        (&["pub", "t", "x", "--broker", "http://hunter2@h?colour=red"], "colour"),
        (&["sub", "a.>.b"], "a.>.b"),
        (&["sub", "t", "--from", "yesterday"], "yesterday"),
    ] {
        let output = daemon.run(args, b"").await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(named), "{args:?}: {output:?}");
    }
    let nobody = daemon.run(&["pub", "t", "x", "--broker", "http://127.0.0.1:1"], b"").await;
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("is the daemon running"));
}

/// As the other commands take it, and before one that the URL has.
#[tokio::test]
async fn a_token_is_an_option_or_in_the_environment() {
    let everything = || [TopicFilter::new(">").unwrap()];
    let identity = Identity::new("me").unwrap().with_token(TokenHash::of("right"));
    let identity = identity
        .allowing([Action::Publish, Action::Subscribe, Action::Settle], everything())
        .allowing([Action::Admin], everything());
    let daemon = Daemon::with(ServerOptions::new().with_access(Access::new([identity]).unwrap())).await;
    let publish: &[&str] = &["pub", "t", "1"];
    assert_eq!(daemon.run(publish, b"").await.status.code(), Some(1), "the URL's own is nobody's");
    assert!(daemon.run(&[publish, &["--token", "right"]].concat(), b"").await.status.success());
    let inherited = soon(daemon.command(publish).env("BROKER_TOKEN", "right").output()).await.unwrap();
    assert!(inherited.status.success(), "{inherited:?}");
    let spelt = daemon.run(&[publish, &["--token", "a\nb"]].concat(), b"").await;
    assert_eq!(spelt.status.code(), Some(2), "{spelt:?}");

    let mut sub = daemon.sub(&["t", "--max", "1", "--token", "right"]).await;
    daemon.run(&[publish, &["--token", "right"]].concat(), b"").await;
    assert_eq!(sub.line().await.unwrap(), "t 1");
}

#[tokio::test]
async fn what_is_published_is_printed_and_acked() {
    let daemon = Daemon::start().await;
    let mut sub = daemon.sub(&["orders.>", "--json", "--max", "3"]).await;
    daemon.run(&["pub", "orders.a", "{\"n\": 1.0}", "-t", "application/json", "-k", "k", "-H", "h=v"], b"").await;
    daemon.run(&["pub", "orders.b", "text"], b"").await;
    daemon.run(&["pub", "orders.c", "--file", "-"], b"\xff").await;
    let first = sub.line().await.unwrap();
    assert!(first.ends_with(r#""payload":{"n": 1.0}}"#), "{first}");
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!((&first["topic"], &first["key"], &first["attempt"]), (&"orders.a".into(), &"k".into(), &1.into()));
    assert_eq!(first["headers"], serde_json::json!([["h", "v"]]));
    assert_eq!(sub.json().await["payload_text"], "text");
    assert_eq!(sub.json().await["payload_base64"], "/w==");
    assert_eq!(sub.line().await, None);
    assert!(soon(sub.child.wait()).await.unwrap().success());
    soon(async {
        while daemon.subscriptions().await > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_group_goes_on_where_the_last_member_stopped() {
    let daemon = Daemon::start().await;
    let mut first = daemon.sub(&["t", "--group", "g", "--max", "1"]).await;
    for payload in ["1", "2", "3"] {
        daemon.run(&["pub", "t", payload], b"").await;
    }
    assert_eq!(first.line().await.unwrap(), "t 1");
    assert!(soon(first.child.wait()).await.unwrap().success());
    // A look takes nothing away.
    let look = daemon.run(&["sub", "t", "--group", "g", "--max", "2", "--no-ack", "--payload"], b"").await;
    assert_eq!(String::from_utf8_lossy(&look.stdout), "2\n3\n");
    let rest = daemon.run(&["sub", "t", "-g", "g", "-n", "2", "--json"], b"").await;
    let lines: Vec<Value> =
        String::from_utf8(rest.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seen: Vec<_> =
        lines.iter().map(|line| (line["payload_text"].as_str().unwrap(), line["attempt"].as_u64())).collect();
    assert_eq!(seen, [("2", Some(1)), ("3", Some(1))]);
}

#[cfg(unix)]
#[tokio::test]
async fn an_interrupt_ends_it_cleanly() {
    let daemon = Daemon::start().await;
    let mut sub = daemon.sub(&["t"]).await;
    daemon.run(&["pub", "t", "1"], b"").await;
    assert_eq!(sub.line().await.unwrap(), "t 1");
    let pid = sub.child.id().unwrap().to_string();
    assert!(soon(Command::new("kill").args(["-INT", &pid]).status()).await.unwrap().success());
    assert!(soon(sub.child.wait()).await.unwrap().success());

    let mut publishing = daemon.command(&["pub", "t"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut all = daemon.listen("t").await;
    let mut stdin = publishing.stdin.take().unwrap();
    stdin.write_all(b"before\n").await.unwrap();
    assert_eq!(received(&mut all).await.payload().as_ref(), b"before");
    let pid = publishing.id().unwrap().to_string();
    assert!(soon(Command::new("kill").args(["-INT", &pid]).status()).await.unwrap().success());
    assert!(soon(publishing.wait()).await.unwrap().success());
}

#[cfg(unix)]
#[tokio::test]
async fn a_reader_that_leaves_is_no_panic() {
    let daemon = Daemon::start().await;
    let mut sub = daemon.sub(&["t", "--json"]).await;
    daemon.run(&["pub", "t", "1"], b"").await;
    sub.line().await.unwrap();
    let Sub { mut child, lines } = sub;
    drop(lines);
    daemon.run(&["pub", "t", "2"], b"").await;
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(soon(child.wait()).await.unwrap().success());
    while let Some(line) = soon(stderr.next_line()).await.unwrap() {
        assert!(!line.contains("panicked"), "{line}");
    }
}
