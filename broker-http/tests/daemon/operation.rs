//! What an operator does with it: who may reach it, reloading, checking, watching.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

use super::{Daemon, command, endpoint, run, soon};

const HASH: &str = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// An identity whose token is `secret`.
fn operator() -> String {
    format!(
        "[[identities]]\nname = \"ops\"\ntokens = [\"{HASH}\"]\nallow = [{{ actions = [\"publish\", \"subscribe\", \"settle\", \"admin\"], topics = [\">\"] }}]\n"
    )
}

impl Daemon {
    /// The next line on standard error that contains `text`.
    async fn says(&mut self, text: &str) -> String {
        soon(async {
            loop {
                let mut line = String::new();
                assert!(self.stderr.read_line(&mut line).await.unwrap() > 0, "it ended without {text:?}");
                if line.contains(text) {
                    return line;
                }
            }
        })
        .await
    }
}

/// As over TCP.
#[cfg(unix)]
#[tokio::test]
async fn a_token_is_shown_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), &operator());
    let listen = format!("unix:{}", folder.path().join("broker.sock").display());
    let mut daemon = command(&["--listen", &listen, "--config", &config]).spawn().unwrap();
    let (mut stderr, mut line) = (tokio::io::BufReader::new(daemon.stderr.take().unwrap()), String::new());
    soon(stderr.read_line(&mut line)).await.unwrap();
    assert!(line.contains("broker.sock"), "{line}");
    let publish = async |more: &[&str]| run(&[&["pub", "a", "x", "--broker", &listen], more].concat()).await;
    for more in [&[][..], &["--token", "wrong"]] {
        let (code, said) = publish(more).await;
        assert!(code == Some(1) && said.contains("unauthorized"), "{more:?} {code:?}: {said}");
    }
    let mut sub = command(&["sub", "a", "--max", "1", "--broker", &listen, "--token", "secret"]).spawn().unwrap();
    let ended = soon(async {
        loop {
            assert_eq!(publish(&["--token", "secret"]).await.0, Some(0));
            if let Some(ended) = sub.try_wait().unwrap() {
                return ended;
            }
        }
    });
    assert!(ended.await.success());
}

#[tokio::test]
async fn beyond_this_machine_it_takes_identities_or_insecure() {
    let (code, said) = run(&["--listen", "0.0.0.0:0"]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no identities") && said.contains("token new") && said.contains("--insecure"), "{said}");

    let mut daemon = Daemon::start(&["--listen", "0.0.0.0:0", "--insecure"]).await;
    daemon.says("INSECURE").await;

    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), &operator());
    let daemon = Daemon::start(&["--listen", "0.0.0.0:0", "--config", &config]).await;
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
    assert_eq!(daemon.send("GET /healthz", "").await.0, 200);
    // On loopback too: one identity ends the development mode.
    let daemon = Daemon::start(&["--config", &config]).await;
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
}

/// What is said at the start is so, however it was asked for.
#[tokio::test]
async fn every_start_says_who_may_do_what() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), &operator());
    let (here, machine, open) = ("for this machine only", "every program of this machine", "nobody is asked");
    let beyond = &["--listen", "0.0.0.0:0", "--insecure", "--dev"][..];
    for (args, says, says_not) in [
        (&[][..], &[here][..], &["INSECURE"][..]),
        (&["--insecure"], &[here, "INSECURE", machine, open], &["whoever"]),
        (beyond, &["endpoints on this machine", "INSECURE", "whoever", open], &[here, machine]),
        (&["--config", &config], &[], &["INSECURE", "development"]),
        (&["--config", &config, "--insecure"], &["INSECURE: a reload", machine], &["development", open]),
    ] {
        let listen: &[&str] = if args.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = command(&[listen, args].concat()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        // What to try is said on standard output after the first line, before anything else is.
        let mut piece = [0; 64];
        assert!(soon(out.read(&mut piece)).await.unwrap() > 0, "{args:?}");
        // A signal is looked at after all is said.
        let pid = child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        drop(out);
        let said = String::from_utf8(soon(child.wait_with_output()).await.unwrap().stderr).unwrap();
        for word in says {
            assert!(said.contains(word), "{args:?}: {word}: {said}");
        }
        for word in says_not {
            assert!(!said.contains(word), "{args:?}: {word}: {said}");
        }
    }
}

#[tokio::test]
async fn a_token_is_made_and_its_hash_lets_it_in() {
    let made = soon(command(&["token", "new", "--name", "shop"]).output()).await.unwrap();
    let (token, told) = (String::from_utf8(made.stdout).unwrap(), String::from_utf8(made.stderr).unwrap());
    assert!(!told.contains(token.trim()), "the token is printed once, apart");
    let entry = told.split_once("[[identities]]").unwrap().1;
    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), &format!("[[identities]]{entry}"));
    let daemon = Daemon::start(&["--config", &config]).await;
    let bearer = format!("POST /topics/a HTTP/1.1\r\nauthorization: Bearer {}\r\nx: x", token.trim());
    // The request line is written as it stands, so that a header can follow it.
    assert_eq!(daemon.raw(&bearer, "x").await.0, 202);

    let mut hashing = command(&["token", "hash"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = hashing.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, token.as_bytes()).await.unwrap();
    drop(stdin);
    let hashed = soon(hashing.wait_with_output()).await.unwrap();
    assert!(entry.contains(String::from_utf8(hashed.stdout).unwrap().trim()));

    // What can be guessed is no token, and a name that no file could hold is none.
    let mut hashing = command(&["token", "hash"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = hashing.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"fifteen letters\n").await.unwrap();
    drop(stdin);
    let hashed = soon(hashing.wait_with_output()).await.unwrap();
    assert!(hashed.status.code() == Some(2) && hashed.stdout.is_empty());
    let (code, said) = run(&["token", "new", "--name", "a\"b"]).await;
    assert!(code != Some(0) && !said.contains("[[identities]]"), "{said}");
}

#[tokio::test]
async fn the_environment_has_no_unknown_setting_and_the_flag_comes_before_rust_log() {
    let wrong = command(&["check-config"]).env("BROKER_HTTP_LISEN", "127.0.0.1:0").output();
    let said = String::from_utf8(soon(wrong).await.unwrap().stderr).unwrap();
    assert!(said.contains("did you mean BROKER_HTTP_LISTEN?"), "{said}");
    // What is wrong with the value is said of the flag by clap, which nobody typed.
    for (variable, value, told) in [
        ("BROKER_HTTP_STATE", "", ", which is empty: unset it"),
        ("BROKER_HTTP_DRAIN", "soon", ""),
        ("BROKER_HTTP_DEV", "", ","),
    ] {
        let wrong = soon(command(&["check-config"]).env(variable, value).output()).await.unwrap();
        let said = String::from_utf8(wrong.stderr).unwrap();
        assert_eq!(wrong.status.code(), Some(2), "{said}");
        let (complaint, told) =
            (said.find("error: "), said.find(&format!("it comes from the environment variable {variable}{told}")));
        assert!(complaint.is_some() && complaint < told, "{said}");
    }
    let typed =
        soon(command(&["check-config", "--drain", "soon"]).env("BROKER_HTTP_DRAIN", "5s").output()).await.unwrap();
    let said = String::from_utf8(typed.stderr).unwrap();
    assert!(typed.status.code() == Some(2) && !said.contains("comes from"), "{said}");

    let args = ["--log", "warn,broker_http=debug", "--log-format", "json"];
    let mut daemon = Daemon::start_with(&args, &[("RUST_LOG", "error")]).await;
    assert_eq!(daemon.send("nonsense", "").await.0, 400);
    daemon.says("a connection ended").await;
    let mut daemon = Daemon::start_with(&args[2..], &[("RUST_LOG", "broker_http=debug")]).await;
    assert_eq!(daemon.send("nonsense", "").await.0, 400);
    daemon.says("a connection ended").await;
}

/// Of every setting: what is switched on in the file is switched off by the environment, and by a flag again.
#[tokio::test]
async fn the_environment_and_a_flag_come_before_the_file_for_what_is_on_or_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let (dev, insecure) = (format!("dev = true\n{}", operator()), "insecure = true".to_owned());
    let hook = r#"{"filter":"a","endpoint":"http://127.0.0.1:1/"}"#;
    for (flag, variables, status) in [
        (&[][..], &[][..], 201),
        (&[], &[("BROKER_HTTP_DEV", "false")], 403),
        (&["--dev=false"], &[("BROKER_HTTP_DEV", "true")], 403),
        (&["--dev"], &[("BROKER_HTTP_DEV", "false")], 201),
    ] {
        let config = write(&path, &dev);
        let args = [flag, &["--config", &config]].concat();
        let daemon = Daemon::start_with(&args, variables).await;
        let put = "PUT /subscriptions/q HTTP/1.1\r\nauthorization: Bearer secret\r\nx: x";
        assert_eq!(daemon.raw(put, hook).await.0, status, "{args:?} {variables:?}");
    }
    // Nor is it on by itself on loopback, where it is said to be off.
    for (flag, variables) in [(&["--dev=false"][..], &[][..]), (&[], &[("BROKER_HTTP_DEV", "false")])] {
        let daemon = Daemon::start_with(flag, variables).await;
        assert_eq!(daemon.send("PUT /subscriptions/q", hook).await.0, 403, "{flag:?} {variables:?}");
    }
    let config = write(&path, &insecure);
    for (flag, variable, code) in
        [(&[][..], "false", Some(1)), (&["--insecure=false"], "true", Some(1)), (&[], "true", Some(0))]
    {
        let args = [&["check-config", "--listen", "0.0.0.0:0", "--config", &config], flag].concat();
        let checked = command(&args).env("BROKER_HTTP_INSECURE", variable).output();
        assert_eq!(soon(checked).await.unwrap().status.code(), code, "{args:?} {variable}");
    }
}

#[tokio::test]
async fn sigterm_ends_what_waits_for_a_silent_broker() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = format!("http://{}", silent.local_addr().unwrap());
    let child = command(&["--listen", "127.0.0.1:0", "--broker", &broker]).spawn().unwrap();
    // It is asked, and says nothing.
    let _asked = soon(silent.accept()).await.unwrap();
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = soon(child.wait_with_output()).await.unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.contains("SIGTERM") && said.contains("before the broker"), "{said}");
}

/// Who has no patience is told what that costs.
#[tokio::test]
async fn a_second_sigterm_counts_what_it_leaves_behind() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut daemon = Daemon::start(&[]).await;
    let spec =
        json!({"filter": "a", "endpoint": format!("http://{}/", silent.local_addr().unwrap()), "max_in_flight": 1});
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec.to_string()).await.0, 201);
    for _ in 0..3 {
        assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202);
    }
    let _pushed = soon(silent.accept()).await.unwrap();
    daemon.signal("-TERM");
    daemon.says("shutting down").await;
    daemon.signal("-TERM");
    let (code, said) = daemon.finish().await;
    assert_eq!(code, Some(3), "{said}");
    let told = said.split_once("SIGTERM again: cut; ").unwrap_or_else(|| panic!("{said}")).1;
    assert!(told.contains("in flight") && told.contains("lost, since memory: keeps nothing"), "{said}");
}

/// It connects to a broker that then says nothing, with a subscription to be made there.
#[tokio::test]
async fn sigterm_ends_what_restores_at_a_silent_broker() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = format!("http://{}", silent.local_addr().unwrap());
    let (asked, mut hear) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = silent.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.unwrap() > 0 {}
            if head.starts_with(b"GET /readyz") {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
                stream.write_all(answer).await.unwrap();
            } else {
                asked.send(String::from_utf8_lossy(&head).into_owned()).unwrap();
                kept.push(stream);
            }
        }
    });
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), "[subscriptions.q]\nfilter = \"a\"\n").unwrap();
    let path = config.path().to_str().unwrap();
    let child = command(&["--config", path, "--listen", "127.0.0.1:0", "--broker", &broker]).spawn().unwrap();
    soon(hear.recv()).await.expect("it is asked for the group");
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = soon(child.wait_with_output()).await.unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.contains("SIGTERM") && said.contains("before the subscriptions"), "{said}");
}

#[tokio::test]
async fn a_test_push_that_fails_is_told_by_the_exit_status() {
    let (hook, _told) = endpoint(&[500]).await;
    let daemon = Daemon::start(&[]).await;
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/")}).to_string();
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec).await.0, 201);
    let place = format!("http://{}", daemon.address);
    let (code, said) = run(&["subscription", "test", "q", "--broker", &place]).await;
    assert!(code == Some(1) && said.contains("the push failed") && said.contains("500"), "{code:?} {said}");
    let (code, said) = run(&["subscription", "test", "q", "--broker", &place]).await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn a_configuration_is_checked_without_serving() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let good = write(&path, &format!("listen = \"0.0.0.0:1\"\n{}\n[subscriptions.q]\nfilter = \"a\"\n", operator()));
    let (code, said) = run(&["check-config", "--config", &good]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 identities, 1 subscriptions"), "{said}");
    // It may be checked on another machine: a folder that is not here is told, and refused where it is served.
    let elsewhere = write(&path, "state = \"/nowhere/state.json\"");
    let (code, said) = run(&["check-config", "--config", &elsewhere]).await;
    assert!(code == Some(0) && said.contains("no folder /nowhere"), "{said}");
    let (code, said) = run(&["--listen", "127.0.0.1:0", "--config", &elsewhere]).await;
    assert!(code == Some(1) && said.contains("no folder /nowhere"), "{said}");
    for (text, named) in [
        ("lisen = \"x\"", "did you mean `listen`?"),
        ("log = \"a=loud\"", "loud"),
        ("broker = \"pigeon://roof\"", "pigeon"),
        ("tls = { certificate = \"/nowhere/x.pem\", key = \"/nowhere/x.key\" }", "/nowhere/x.pem"),
        ("[subscriptions.q]\nfilter = \"a..b\"", "a..b"),
        ("[[identities]]\nname = \"a\"\ntokens = [\"hunter2\"]", "64 hexadecimal"),
        ("listen = \"0.0.0.0:1\"", "no identities"),
        ("listen = \"2757\"", "HOST:PORT"),
        ("allowed_origins = [\"app.example.com\"]", "allowed_origins"),
        ("[limits]\nheaders = 9223372036854775807", "limits.headers"),
        ("[subscriptions.q]\nfilter = \"a\"\nendpoint = \"http://10.0.0.1/\"", "subscriptions.q: endpoint"),
        ("listen = \"256.0.0.1:1\"", "HOST:PORT"),
    ] {
        let (code, said) = run(&["check-config", "--config", &write(&path, text)]).await;
        assert_eq!(code, Some(1), "{text}: {said}");
        assert!(said.contains(named) && !said.contains("hunter2"), "{text}: {said}");
    }
}

/// What `serve` would not start with, `check-config` refuses in the same words, and a reload leaves alone.
#[tokio::test]
async fn checking_serving_and_reloading_refuse_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "[subscriptions.q]\nfilter = \"a\"\n");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    let two = |one: &str, other: &str| {
        format!("[subscriptions.q]\nfilter = \"a\"\n{one}\n[subscriptions.r]\nfilter = \"a\"\ngroup = \"q\"\n{other}\n")
    };
    let beside = "not what subscription q has";
    for (text, named) in [
        (two("[limits]\nsubscriptions = 1", ""), "2 subscriptions are declared, and limits.subscriptions is 1"),
        (two("", "ordered = true"), beside),
        (two("backlog = { max_messages = 5 }", "backlog = { max_messages = 6 }"), beside),
        (two("", "backlog = { overflow = \"drop_oldest\" }"), beside),
        (two("retry = { max_attempts = 3 }", "retry = { max_attempts = 4 }"), beside),
        (two("dead_letter = \"x\"", "dead_letter = \"y\""), beside),
        (two("", "start = \"earliest\""), beside),
    ] {
        write(&path, &text);
        for args in [&["check-config", "--config", &config][..], &["--listen", "127.0.0.1:0", "--config", &config]] {
            let (code, said) = run(args).await;
            assert_eq!(code, Some(1), "{args:?} {text}: {said}");
            assert!(said.contains(named), "{args:?} {text}: {said}");
        }
        daemon.signal("-HUP");
        let said = daemon.says("broker-http: ").await;
        assert!(said.contains(named) && said.contains("stays as it was"), "{text}: {said}");
        assert_eq!(daemon.send("GET /subscriptions/r", "").await.0, 404, "{text}");
    }
    // What is fixed for life is no reason not to start with it, and is left alone by a reload.
    write(&path, "[subscriptions.q]\nfilter = \"a\"\nordered = true\n[subscriptions.new]\nfilter = \"a\"\n");
    assert_eq!(run(&["check-config", "--config", &config]).await.0, Some(0));
    daemon.signal("-HUP");
    let said = daemon.says("broker-http: ").await;
    assert!(said.contains("subscription q: ordered would change from false to true"), "{said}");
    assert!(said.contains("under another name") && said.contains("stays as it was"), "{said}");
    assert_eq!(daemon.send("GET /subscriptions/new", "").await.0, 404);
    // What agrees, or says nothing of it, stands.
    for other in ["", "backlog = { max_messages = 5 }\nretry = { max_attempts = 3 }\nstart = \"new\""] {
        write(&path, &two("backlog = { max_messages = 5 }\nretry = { max_attempts = 3 }", other));
        assert_eq!(run(&["check-config", "--config", &config]).await.0, Some(0), "{other}");
        daemon.signal("-HUP");
        let said = daemon.says("broker-http: ").await;
        assert!(said.contains("reloaded: 0 identities, 2 subscriptions declared\n"), "{said}");
    }

    let state = format!("state = {:?}", folder.path().to_str().unwrap());
    write(&path, &state);
    for args in [&["check-config", "--config", &config][..], &["--listen", "127.0.0.1:0", "--config", &config]] {
        let (code, said) = run(args).await;
        assert!(code == Some(1) && said.contains("is no file"), "{args:?}: {said}");
    }
}

/// Those made over the interface count, too: at the next start they are there before the declared ones.
#[tokio::test]
async fn a_reload_goes_with_what_was_made_over_the_interface() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    let own = r#"{"filter":"a","group":"g","retry":{"max_attempts":3}}"#;
    assert_eq!(daemon.send("PUT /subscriptions/own", own).await.0, 201);
    let declared = "[subscriptions.r]\nfilter = \"a\"\ngroup = \"g\"\n";
    for (text, named) in [
        (
            format!("[limits]\nsubscriptions = 1\n{declared}"),
            "1 subscriptions are declared beside 1 made over the interface",
        ),
        (format!("{declared}retry = {{ max_attempts = 4 }}"), "subscription r: retry is not what subscription own has"),
    ] {
        write(&path, &text);
        daemon.signal("-HUP");
        let said = daemon.says("broker-http: ").await;
        assert!(said.contains(named) && said.contains("stays as it was"), "{text}: {said}");
    }
    write(&path, declared);
    daemon.signal("-HUP");
    let said = daemon.says("broker-http: ").await;
    assert!(said.contains("reloaded: 0 identities, 1 subscriptions declared\n"), "{said}");
}

#[tokio::test]
async fn sighup_takes_up_what_changed_and_leaves_what_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "[subscriptions.kept]\nfilter = \"a\"\n[subscriptions.gone]\nfilter = \"b\"\n");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    assert_eq!(daemon.send("GET /subscriptions/gone", "").await.0, 200);
    // What is declared is not changed over the interface; pausing it is no change.
    let (status, body) = daemon.send("PUT /subscriptions/kept", r#"{"filter":"a","timeout":"1s"}"#).await;
    assert_eq!(status, 409, "{body}");
    assert_eq!(daemon.send("DELETE /subscriptions/kept", "").await.0, 409);
    assert_eq!(daemon.send("POST /subscriptions/kept/pause", "").await.0, 200);
    assert_eq!(daemon.send("PUT /subscriptions/own", r#"{"filter":"c"}"#).await.0, 201);

    write(&path, "lisen = 1");
    daemon.signal("-HUP");
    let said = daemon.says("SIGHUP").await;
    assert!(said.contains("listen") && said.contains("stays as it was"), "{said}");
    assert_eq!(daemon.send("GET /subscriptions/gone", "").await.0, 200);

    let changed = "only_declared_topics = true\n[limits]\nleases = 1\n[[topics]]\nfilter = \"a\"\nmax_message_bytes = 3\n[subscriptions.kept]\nfilter = \"a\"\ntimeout = \"7s\"\n[subscriptions.new]\nfilter = \"a\"\n";
    write(&path, changed);
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(!said.contains("restart"), "{said}");
    let kept = daemon.json("GET /subscriptions/kept", "").await;
    assert_eq!((&kept["timeout"], &kept["status"]["state"]), (&json!("7s"), &json!("paused")));
    for (name, status) in [("gone", 404), ("new", 200), ("own", 200)] {
        assert_eq!(daemon.send(&format!("GET /subscriptions/{name}"), "").await.0, status, "{name}");
    }
    for (topic, body, status) in [("a", "xxx", 202), ("a", "xxxx", 413), ("b", "x", 404)] {
        assert_eq!(daemon.send(&format!("POST /topics/{topic}"), body).await.0, status, "{topic} {body}");
    }

    write(&path, &operator());
    daemon.signal("-HUP");
    daemon.says("reloaded").await;
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
    // Identities do not vanish by a slip.
    write(&path, "");
    daemon.signal("-HUP");
    assert!(daemon.says("SIGHUP").await.contains("no identity is left"));
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
}

/// Opening a named pipe waits for its writer: whoever read one would hear no signal any more.
#[cfg(unix)]
#[tokio::test]
async fn a_file_that_is_a_pipe_is_refused_and_signals_are_heard() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let config = write(&path, "");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    let named = format!("[push]\nca = {:?}\n", pipe.to_str().unwrap());
    let tls = format!("[tls]\ncertificate = {0:?}\nkey = {0:?}\n", pipe.to_str().unwrap());
    for text in [&named, &tls] {
        write(&path, text);
        let (code, said) = run(&["check-config", "--config", &config]).await;
        assert!(code == Some(1) && said.contains("no regular file"), "{text}: {said}");
    }
    write(&path, &named);
    daemon.signal("-HUP");
    let said = daemon.says("SIGHUP").await;
    assert!(said.contains("push.ca") && said.contains("no regular file") && said.contains("as it was"), "{said}");
    std::fs::remove_file(&path).unwrap();
    std::fs::rename(&pipe, &path).unwrap();
    daemon.signal("-HUP");
    let said = daemon.says("SIGHUP").await;
    assert!(said.contains("broker.toml: it is no regular file"), "{said}");
    daemon.signal("-TERM");
    assert_eq!(daemon.finish().await.0, Some(0));
}

/// A request of the operator's.
fn ask(request: &str) -> String {
    format!("{request} HTTP/1.1\r\nauthorization: Bearer secret\r\nx: x")
}

#[tokio::test]
async fn sighup_takes_up_limits_endpoints_and_origins_and_names_what_takes_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let with = |text: &str| write(&path, &format!("{text}\n{}", operator()));
    let config = with("");
    let (hook, mut told) = endpoint(&[]).await;
    let mut daemon = Daemon::start(&["--config", &config]).await;
    let spec = json!({"filter": "a", "endpoint": format!("http://{hook}/"), "retry": {"max_attempts": 1}}).to_string();
    let put = ask("PUT /subscriptions/q");
    // With identities it is no development mode, and this machine no endpoint.
    assert_eq!(daemon.raw(&put, &spec).await.0, 403);

    with("allow = [\"127.0.0.1\"]");
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(!said.contains("restart"), "{said}");
    assert_eq!(daemon.raw(&put, &spec).await.0, 201);
    assert_eq!(daemon.raw(&ask("POST /topics/a"), "one").await.0, 202);
    assert!(soon(told.recv()).await.unwrap().ends_with("one"));

    // No longer allowed, it is not pushed to, though there is a connection to it.
    with("[limits]\nmessage_body_bytes = 3\nsubscriptions = 1\nleases = 1\nconnections = 5");
    daemon.signal("-HUP");
    daemon.says("reloaded").await;
    assert_eq!(daemon.raw(&ask("POST /topics/a"), "two").await.0, 202);
    let attempt = soon(async {
        loop {
            let (_, body) = daemon.raw(&ask("GET /subscriptions/q/attempts"), "").await;
            let attempt = serde_json::from_str::<Value>(&body).unwrap()["attempts"][0].clone();
            if attempt["error"].is_string() {
                return attempt;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(attempt["error"].as_str().unwrap().contains("may not be dialled"), "{attempt}");
    assert!(told.try_recv().is_err());
    assert_eq!(daemon.raw(&ask("POST /topics/a"), "four").await.0, 413);
    assert_eq!(daemon.raw(&ask("PUT /subscriptions/pulled"), r#"{"filter":"a"}"#).await.0, 429);
    let mut idle = Vec::new();
    soon(async {
        // Those before it are counted once they are accepted, and may have been refused while one that was done still
        // counted.
        while daemon.raw("GET /healthz HTTP/1.1", "").await.0 != 503 {
            idle.push(tokio::net::TcpStream::connect(daemon.address).await.unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    drop(idle);
    // Whom it asks for its consent it asks from now on.
    with("webhook_origin = \"broker.example\"\nallow = [\"127.0.0.1\"]");
    daemon.signal("-HUP");
    daemon.says("reloaded").await;
    let (status, said) = daemon.raw(&put, &spec.replace("\"a\"", "\"a\",\"timeout\":\"5s\"")).await;
    assert!(status == 403 && said.contains("WebHook-Allowed-Origin"), "{status} {said}");
    let (_, view) = daemon.raw(&ask("GET /subscriptions/q"), "").await;
    assert!(view.contains("\"state\":\"unconsented\""), "who was not asked is held: {view}");

    with(
        "listen = \"127.0.0.1:1\"\nbroker = \"memory:?retain=1\"\nlog_format = \"json\"\nstate = \"x.json\"\ndev = true\n[otlp]\nendpoint = \"http://127.0.0.1:4318\"",
    );
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(said.contains("; broker, dev, log_format, state, otlp changed, which takes a restart"), "{said}");
}

/// Whoever said `insecure` at the start may take the identities away, and is told what that means.
#[tokio::test]
async fn a_reload_that_leaves_nobody_to_ask_says_insecure() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, &format!("insecure = true\n{}", operator()));
    let mut daemon = Daemon::start(&["--listen", "0.0.0.0:0", "--config", &config]).await;
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
    write(&path, "insecure = true");
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(said.contains("INSECURE: nobody is asked who they are any more"), "{said}");
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202);
    // Said once: the next reload takes nobody away.
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(!said.contains("INSECURE"), "{said}");
}

#[tokio::test]
async fn what_takes_a_restart_opens_no_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, &operator());
    let mut daemon = Daemon::start(&["--listen", "0.0.0.0:0", "--config", &config]).await;
    write(&path, "insecure = true");
    daemon.signal("-HUP");
    let said = daemon.says("SIGHUP").await;
    assert!(said.contains("no identity is left") && said.contains("stays as it was"), "{said}");
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 401);
}

#[tokio::test]
async fn identities_that_come_end_the_development_mode() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    let hook = r#"{"filter":"a","endpoint":"http://127.0.0.1:1/"}"#;
    assert_eq!(daemon.send("PUT /subscriptions/q", hook).await.0, 201);
    write(&path, &operator());
    daemon.signal("-HUP");
    let said = daemon.says("reloaded").await;
    assert!(said.contains("development mode is off"), "{said}");
    let (status, said) = daemon.raw(&ask("PUT /subscriptions/r"), hook).await;
    assert!(status == 403 && said.contains("may not be dialled"), "{status} {said}");
    // Other hosts may ask: it has a name of its own from now on.
    assert_eq!(daemon.raw("GET /healthz HTTP/1.1\r\nx: x", "").await.0, 200);

    // Said in so many words it stays.
    let dev = write(&path, "dev = true");
    let mut daemon = Daemon::start(&["--config", &dev]).await;
    write(&path, &format!("dev = true\n{}", operator()));
    daemon.signal("-HUP");
    daemon.says("reloaded").await;
    assert_eq!(daemon.raw(&ask("PUT /subscriptions/r"), hook).await.0, 201);
}

#[tokio::test]
async fn a_subscription_that_cannot_change_leaves_everything_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.toml");
    let config = write(&path, "[subscriptions.q]\nfilter = \"a\"\n");
    let mut daemon = Daemon::start(&["--config", &config]).await;
    for (text, named) in [
        ("[subscriptions.q]\nfilter = \"b\"\n", "filter of subscription q"),
        ("[subscriptions.q]\nfilter = \"a\"\ngroup = \"g\"\n", "group of subscription q"),
        (
            "[subscriptions.q]\nfilter = \"a\"\n[subscriptions.r]\nfilter = \"a\"\nendpoint = \"http://10.0.0.1/\"",
            "subscriptions.r: endpoint",
        ),
    ] {
        write(&path, &format!("only_declared_topics = true\n[[topics]]\nfilter = \"none\"\n{text}"));
        daemon.signal("-HUP");
        let said = daemon.says("SIGHUP").await;
        assert!(said.contains(named) && said.contains("stays as it was"), "{said}");
        assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202, "{text}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_unix_socket_takes_nothing_elses_place_and_goes_with_its_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let listen = format!("unix:{}", path.display());
    std::fs::write(&path, "precious").unwrap();
    let (code, said) = run(&["--listen", &listen]).await;
    assert!(code == Some(1) && said.contains("no socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
    // What a killed one left is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let mut child = command(&["--listen", &listen]).spawn().unwrap();
    let mut stderr = tokio::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    soon(stderr.read_line(&mut line)).await.unwrap();
    assert!(line.contains("listening on unix:"), "{line}");
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
    assert!(!path.exists());
}

#[tokio::test]
async fn what_is_declared_no_more_is_gone_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (path, state) = (folder.path().join("broker.toml"), folder.path().join("state.json"));
    let config = write(&path, "[subscriptions.a]\nfilter = \"a\"\n[subscriptions.b]\nfilter = \"b\"\n");
    let args = ["--config", &config, "--state", state.to_str().unwrap()];
    let daemon = Daemon::start(&args).await;
    daemon.send("PUT /subscriptions/own", r#"{"filter":"c"}"#).await;
    daemon.send("POST /subscriptions/b/pause", "").await;
    daemon.signal("-TERM");
    daemon.finish().await;
    write(&path, "[subscriptions.b]\nfilter = \"b\"\n");
    let daemon = Daemon::start(&args).await;
    for (name, status) in [("a", 404), ("b", 200), ("own", 200)] {
        assert_eq!(daemon.send(&format!("GET /subscriptions/{name}"), "").await.0, status, "{name}");
    }
    assert_eq!(daemon.json("GET /subscriptions/b", "").await["status"]["state"], "paused");
}

#[tokio::test]
async fn the_log_has_levels_by_module_and_can_be_json() {
    let mut daemon = Daemon::start(&["--log", "warn,broker_http=debug", "--log-format", "json"]).await;
    assert_eq!(daemon.send("nonsense", "").await.0, 400);
    let line = daemon.says("a connection ended").await;
    let event: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_eq!((&event["level"], &event["message"]), (&json!("DEBUG"), &json!("a connection ended")), "{event}");
}

#[tokio::test]
async fn an_operator_steers_it_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(&folder.path().join("broker.toml"), &operator());
    let daemon = Daemon::start(&["--config", &config]).await;
    let place = ["--broker", &format!("http://{}", daemon.address), "--token", "secret"].map(str::to_owned);
    let ask = async |args: &[&str]| {
        let place: Vec<&str> = place.iter().map(String::as_str).collect();
        let (code, said) = run(&[args, &place].concat()).await;
        assert!(!said.contains("panicked") && !said.contains("secret\""), "{said}");
        (code, said)
    };
    let (code, said) = run(&["subscription", "list", "--broker", &place[1]]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("needs an identity"), "{said}");

    for (args, code, has) in [
        (&["subscription", "put", "q", "--filter", "orders.>", "--set", "timeout=1h"][..], 0, "\"1h\""),
        (&["subscription", "put", "q", "--filter", "orders.>", "--set", "colour=red"], 2, "colour"),
        (&["subscription", "list"], 0, "orders.>"),
        (&["subscription", "list", "--json"], 0, "\"filter\": \"orders.>\""),
        (&["subscription", "show", "q"], 0, "\"state\": \"active\""),
        (&["subscription", "show", "none"], 1, "no subscription none"),
        (&["subscription", "pause", "q"], 0, "\"state\": \"paused\""),
        (&["subscription", "resume", "q"], 0, "\"state\": \"active\""),
        (&["subscription", "test", "q"], 1, "no endpoint"),
        (&["subscription", "attempts", "q"], 0, "\"attempts\": []"),
        (&["subscription", "dead", "q", "--max", "5"], 0, "\"dead\": []"),
        (&["subscription", "redrive", "q"], 0, "\"redriven\": 0"),
        (&["subscription", "purge", "q", "dead"], 0, "\"purged\": 0"),
    ] {
        let (have, said) = ask(args).await;
        assert_eq!(have, Some(code), "{args:?}: {said}");
        assert!(said.contains(has), "{args:?}: {said}");
    }
    daemon.raw("POST /topics/orders.a HTTP/1.1\r\nauthorization: Bearer secret\r\nx: x", "one").await;
    daemon.raw("POST /topics/orders.a HTTP/1.1\r\nauthorization: Bearer secret\r\nx: x", "two").await;
    let (_, pulled) = ask(&["subscription", "pull", "q", "--max", "1", "--wait", "20s"]).await;
    let pulled: Value = serde_json::from_str(&pulled).unwrap();
    let lease = pulled["deliveries"][0]["lease"].as_str().unwrap();
    let (code, said) = ask(&["subscription", "settle", "q", "--ack", lease]).await;
    assert!(code == Some(0) && said.contains("\"gone\": []"), "{said}");
    // A lease may begin like an option.
    for option in ["--ack", "--retry", "--reject", "--release", "--for=1s --extend"] {
        let args: Vec<_> = option.split(' ').chain(["-Yw"]).collect();
        let (_, said) = ask(&[&["subscription", "settle", "q"], &args[..]].concat()).await;
        assert!(said.contains("\"gone\": [\n    \"-Yw\"\n  ]"), "{option}: {said}");
    }
    let (_, said) = ask(&["topic", "list"]).await;
    assert!(said.lines().any(|line| line.starts_with("orders.a") && line.contains(" 2 ")), "{said}");
    let (code, said) = ask(&["status", "--once"]).await;
    let row = said.lines().find(|line| line.starts_with("q ")).unwrap_or_else(|| panic!("{said}"));
    let row: Vec<_> = row.split_whitespace().collect();
    assert_eq!((code, &row[..4]), (Some(0), &["q", "orders.>", "active", "1"][..]), "{said}");
    assert!(ask(&["subscription", "purge", "q", "backlog"]).await.1.contains("\"purged\": 1"));
    assert_eq!(ask(&["subscription", "delete", "q"]).await.0, Some(0));
    assert_eq!(ask(&["subscription", "show", "q"]).await.0, Some(1));
    // Where nobody looks at a terminal it is drawn once.
    let (code, said) = ask(&["status"]).await;
    assert_eq!(code, Some(0), "{said}");
}

/// Whatever `/settle` can do.
#[tokio::test]
async fn what_was_pulled_is_settled_from_the_command_line() {
    let daemon = Daemon::start(&[]).await;
    let place = format!("http://{}", daemon.address);
    let settle = async |args: &[&str]| {
        let (code, said) = run(&[&["subscription", "settle", "q", "--broker", &place], args].concat()).await;
        assert!(!said.contains("panicked"), "{said}");
        (code, said)
    };
    let settled = async |args: &[&str]| {
        let (code, said) = settle(args).await;
        assert!(code == Some(0) && said.contains("\"gone\": []"), "{args:?}: {said}");
    };
    let lease = async |attempt: u64| {
        let pulled = daemon.json("POST /subscriptions/q/pull?max=1&wait=20s", "").await["deliveries"][0].clone();
        assert_eq!(pulled["attempt"], attempt, "{pulled}");
        pulled["lease"].as_str().unwrap().to_owned()
    };
    daemon.send("PUT /subscriptions/q", r#"{"filter":"a","timeout":"8s","retry":{"initial":"1h","max":"1h"}}"#).await;
    daemon.send("POST /topics/a", "x").await;
    settled(&["--release", &lease(1).await]).await;
    // The group's own backoff is an hour.
    settled(&["--retry", &lease(1).await, "--delay", "10ms", "--reason", "not yet", "--status", "E1"]).await;
    let held = lease(2).await;
    settled(&["--extend", &held, "--for", "1h"]).await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    settled(&["--reject", &held, "--reason", "no such account", "--status", "E42"]).await;
    let dead = daemon.json("GET /subscriptions/q/dead", "").await["dead"][0].clone();
    assert_eq!((&dead["reason"], &dead["status"]), (&json!("no such account"), &json!("E42")), "{dead}");

    daemon.send("POST /topics/a", "y").await;
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder.path().join("settle.json"), &json!({ "ack": [lease(1).await] }).to_string());
    settled(&["--file", &file]).await;
    for (args, why) in [
        (&["--extend", "x"][..], "--for"),
        (&["--ack", "x", "--for", "1s"], "--extend"),
        (&["--ack", "x", "--delay", "1s"], "--retry"),
        (&["--ack", "x", "--reason", "r"], "--retry or --reject"),
        (&["--ack", "x", "--file", "-"], "--file"),
        (&["--retry", "x", "--delay", "soon"], "delay"),
    ] {
        let (code, said) = settle(args).await;
        assert!(code != Some(0) && said.contains(why), "{args:?}: {said}");
    }
}

#[tokio::test]
async fn completions_the_manual_and_the_settings_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, said) = run(&["completions", shell]).await;
        assert!(code == Some(0) && said.contains("check-config") && said.contains("redrive"), "{shell}: {said}");
    }
    let (code, page) = run(&["man"]).await;
    assert_eq!(code, Some(0));
    for word in [".TH", "\\-\\-listen", "BROKER_HTTP_LISTEN", "REDRIVE", "\\-\\-insecure"] {
        assert!(page.contains(word), "{word}: {page}");
    }
    // There is one page: its commands are named as they are typed.
    assert!(page.contains("\\fBbroker\\-http check\\-config\\fR") && !page.contains("(1)\n"), "{page}");
    let (code, table) = run(&["settings"]).await;
    assert!(code == Some(0) && table.contains("| `--listen HOST:PORT` | `BROKER_HTTP_LISTEN` | `listen` |"), "{table}");
}
