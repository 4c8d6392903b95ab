//! What others wrote, unmodified: the official CloudEvents SDKs of Python and JavaScript publish to the
//! daemon and read what it pushes, and the Standard Webhooks libraries of both verify every push.
//!
//! `install` fetches them, in pinned versions, into the target folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::{Daemon, soon};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

/// The folder with the SDKs.
fn installed() -> PathBuf {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    let install = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdks");
        let script = source("install");
        let status = std::process::Command::new(script).arg(&folder).status().unwrap();
        assert!(status.success(), "the SDKs cannot be installed");
        folder
    };
    INSTALLED.get_or_init(install).clone()
}

fn source(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/daemon/sdks").join(file)
}

#[derive(Clone, Copy, Debug)]
enum Language {
    Python,
    JavaScript,
}

impl Language {
    fn command(self, script: &str, argument: &str) -> Command {
        let folder = installed();
        let mut command = match self {
            Self::Python => {
                let mut command = Command::new(folder.join("python/bin/python"));
                command.arg(source(&format!("{script}.py")));
                command
            }
            Self::JavaScript => {
                let mut command = Command::new("node");
                command.arg(folder.join(format!("{script}.mjs")));
                command
            }
        };
        command.arg(argument).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command
    }
}

/// A receiver at work; killed when dropped.
struct Receiver {
    language: Language,
    port: u16,
    told: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Receiver {
    async fn start(language: Language) -> Self {
        let mut child = language.command("receive", SECRET).spawn().unwrap();
        let mut told = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = soon(told.next_line()).await.unwrap().expect("the receiver started").parse().unwrap();
        Self { language, port, told, _child: child }
    }

    async fn next(&mut self) -> Value {
        let line = soon(self.told.next_line()).await.unwrap().expect("the receiver is at work");
        serde_json::from_str(&line).unwrap()
    }

    /// Subscribes this receiver, on a path of its own for each mode.
    async fn subscribe(&self, daemon: &Daemon, mode: &str, filter: &str, secret: &str) {
        let spec = json!({
            "filter": filter, "mode": mode, "endpoint": format!("http://127.0.0.1:{}/{mode}", self.port),
            "batch": {"wait": "100ms"}, "retry": {"max_attempts": 1},
            // In the middle of a rotation: each push has two signatures.
            "signing": {"secret": secret, "previous": OTHER},
        });
        let name = format!("{:?}-{mode}-{}", self.language, filter.trim_end_matches(".>"));
        let (status, answer) = daemon.send(&format!("PUT /subscriptions/{name}"), &spec.to_string()).await;
        assert_eq!(status, 201, "{answer}");
    }
}

/// Publishes `events`, each in a mode; every one must be taken.
async fn publish(language: Language, daemon: &Daemon, topic: &str, events: &[(&str, Value)]) {
    let url = format!("http://{}/topics/{topic}", daemon.address);
    let mut child = language.command("publish", &url).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    for (mode, event) in events {
        input.write_all(format!("{}\n", json!({"mode": mode, "event": event})).as_bytes()).await.unwrap();
    }
    drop(input);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{language:?} could not publish");
    let answers: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), events.len());
    for (answer, (mode, event)) in answers.iter().zip(events) {
        assert_eq!(answer["status"], 202, "{language:?} {mode}: {answer}");
        match event.as_array() {
            Some(events) => assert_eq!(answer["answer"]["results"].as_array().unwrap().len(), events.len()),
            None => assert_eq!(answer["answer"]["id"], event["id"]),
        }
    }
}

fn event(id: &str, content: Value) -> Value {
    let mut event = json!({
        "specversion": "1.0", "id": id, "source": "/sdk", "type": "com.acme.order",
        "subject": "Euro € 😀 50% \"off\"", "time": "2026-01-02T03:04:05.678Z",
        "dataschema": "https://example.com/schema?a=b", "acmeext": "an extension",
    });
    event.as_object_mut().unwrap().extend(content.as_object().unwrap().clone());
    event
}

/// The events each language publishes, and in which mode.
fn events(language: Language) -> Vec<(&'static str, Value)> {
    let object =
        json!({"datacontenttype": "application/json", "data": {"n": 1, "text": "Euro €", "list": [null, 1.5]}});
    let text = json!({"datacontenttype": "text/plain", "data": "grüße"});
    // Their libraries verify text, so that the bytes are text too.
    let bytes = json!({"datacontenttype": "application/octet-stream", "data_base64": "AAECf2FiYw=="});
    let id = |what: &str| format!("{language:?} {what}");
    match language {
        Language::Python => vec![
            ("binary", event(&id("binary object"), object.clone())),
            ("binary", event(&id("binary text"), text.clone())),
            ("binary", event(&id("binary bytes"), bytes.clone())),
            ("structured", event(&id("structured object"), object)),
            ("structured", event(&id("structured text"), text)),
            ("structured", event(&id("structured bytes"), bytes)),
        ],
        Language::JavaScript => {
            // This SDK does not percent-encode what it puts into headers (HTTP binding, 3.1.3.2).
            let plain = |mut event: Value| {
                event["subject"] = json!("plain subject");
                event
            };
            vec![
                ("binary", plain(event(&id("binary object"), object.clone()))),
                ("binary", plain(event(&id("binary bytes"), bytes.clone()))),
                ("structured", event(&id("structured object"), object.clone())),
                ("structured", event(&id("structured text"), text.clone())),
                ("batch", json!([event(&id("batch object"), object), event(&id("batch text"), text)])),
            ]
        }
    }
}

/// What is said of one event on its way, and of our own attributes, is left out.
fn comparable(language: Language, mode: &str, mut event: Value) -> Value {
    let object = event.as_object_mut().unwrap();
    object.retain(|name, _| !name.starts_with("broker"));
    let time = object["time"].as_str().unwrap().replace("+00:00", "Z");
    object.insert("time".to_owned(), json!(time));
    if object["datacontenttype"] == "application/octet-stream"
        && let Some(Value::String(text)) = object.remove("data")
    {
        // What is UTF-8 the Python SDK takes for text.
        object.insert("data_base64".to_owned(), json!(STANDARD.encode(text)));
    }
    if let (Language::JavaScript, "binary") = (language, mode) {
        // Nor does it decode it.
        for name in ["subject", "acmeext", "id"] {
            let encoded = object[name].as_str().unwrap();
            let decoded = percent_encoding::percent_decode_str(encoded).decode_utf8().unwrap().into_owned();
            object.insert(name.to_owned(), json!(decoded));
        }
    }
    event
}

#[tokio::test]
async fn the_official_sdks_publish_and_receive() {
    let daemon = Daemon::start(&[]).await;
    let mut receivers = [Receiver::start(Language::Python).await, Receiver::start(Language::JavaScript).await];
    for receiver in &receivers {
        receiver.subscribe(&daemon, "binary", "sdk.>", SECRET).await;
        receiver.subscribe(&daemon, "structured", "sdk.>", SECRET).await;
    }
    // The Python SDK reads no batches over HTTP.
    receivers[1].subscribe(&daemon, "batch", "sdk.>", SECRET).await;

    let mut expected = BTreeMap::new();
    for language in [Language::Python, Language::JavaScript] {
        let events = events(language);
        publish(language, &daemon, "sdk.orders", &events).await;
        for (_, event) in events {
            let all = event.as_array().cloned().unwrap_or_else(|| vec![event]);
            expected.extend(all.into_iter().map(|event| (event["id"].as_str().unwrap().to_owned(), event)));
        }
    }
    assert_eq!(expected.len(), 12);
    for receiver in &mut receivers {
        let modes: &[&str] = match receiver.language {
            Language::Python => &["binary", "structured"],
            Language::JavaScript => &["binary", "structured", "batch"],
        };
        let mut seen = BTreeMap::new();
        while seen.len() < modes.len() * expected.len() {
            let told = receiver.next().await;
            let mode = told["path"].as_str().unwrap().trim_start_matches('/').to_owned();
            let events = told["events"].as_array().unwrap_or_else(|| panic!("{:?}: {told}", receiver.language));
            for event in events {
                let event = comparable(receiver.language, &mode, event.clone());
                let id = event["id"].as_str().unwrap().to_owned();
                assert_eq!(&event, &expected[&id], "{:?} {mode}", receiver.language);
                assert!(seen.insert((mode.clone(), id), ()).is_none(), "pushed twice: {told}");
            }
        }
    }
}

#[tokio::test]
async fn their_verifiers_refuse_another_key() {
    let daemon = Daemon::start(&[]).await;
    for language in [Language::Python, Language::JavaScript] {
        let mut receiver = Receiver::start(language).await;
        let wrong = "whsec_YWxsIHRoYXQgaXMgbm90IHRoZSByaWdodCBrZXk=";
        receiver.subscribe(&daemon, "binary", "wrong.>", wrong).await;
        publish(language, &daemon, "wrong.orders", &events(language)[..1]).await;
        let told = receiver.next().await;
        assert!(told["refused"].as_str().unwrap().contains("signature"), "{told}");
        let dead = loop {
            let dead = daemon.json(&format!("GET /subscriptions/{language:?}-binary-wrong/dead"), "").await;
            if let Some(dead) = dead["dead"].get(0) {
                break dead.clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        };
        assert_eq!(dead["status"], "401", "{dead}");
        daemon.send(&format!("DELETE /subscriptions/{language:?}-binary-wrong"), "").await;
    }
}
