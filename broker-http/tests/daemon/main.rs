//! The real binary, from its first line to its exit status, with real sockets on both sides.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod descriptors;
mod history;
#[cfg(target_os = "linux")]
mod keys;
mod lines;
mod operation;
mod overload;
mod packaging;
#[cfg(target_os = "linux")]
mod readers;
mod resume;
mod sdks;
mod support;
mod surroundings;
mod under_load;

use std::time::Duration;

use serde_json::{Value, json};
use support::{Daemon, command, endpoint, header, run, soon};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

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
    let topics: &[_] = &["topic", "list", "--help"];
    for command in [&["status", "--help"], &["subscription", "put", "--help"][..], topics, &["pub", "--help"]] {
        let (code, said) = run(command).await;
        assert_eq!(code, Some(0), "{command:?}");
        for word in ["https://host:port", "unix:/path", "ca=FILE", "cert=FILE key=FILE", "token=TOKEN", "timeout=10s"] {
            assert!(said.contains(word), "{command:?} {word}: {said}");
        }
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
        // And so it is asked.
        for args in [
            &["pub", "a", "x", "--broker", &listen][..],
            &["subscription", "list", "--broker", &listen],
            &["status", "--once", "--broker", &listen],
        ] {
            let (code, said) = run(args).await;
            assert_eq!(code, Some(0), "{args:?}: {said}");
        }
        // Killed, it leaves its socket behind; the next takes it over.
        child.kill().await.unwrap();
    }
}
