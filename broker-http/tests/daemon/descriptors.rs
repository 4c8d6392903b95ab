//! The daemon and the number of files it may have open.
#![cfg(target_os = "linux")]

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::support::{Daemon, soon};

/// A request on a connection that stays.
async fn ask(stream: &mut TcpStream, path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 64 << 10];
    loop {
        let read = soon(stream.read(&mut piece)).await.unwrap();
        assert!(read > 0, "it was closed");
        answer.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()).unwrap();
        if body.len() >= length.parse().unwrap() {
            return text.into_owned();
        }
    }
}

/// The lowest number that no open file of a process has: the next one gets it.
fn lowest_free(pid: u32) -> u64 {
    let open = |number: &u64| std::fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_ok();
    (0..).find(|number| !open(number)).unwrap()
}

#[tokio::test]
async fn without_a_descriptor_left_who_comes_is_told_and_who_is_there_is_served() {
    let daemon = Daemon::start(&[]).await;
    let pid = daemon.child.id().unwrap();
    let connect = || soon(TcpStream::connect(daemon.address));
    let mut kept = connect().await.unwrap();
    assert!(ask(&mut kept, "/healthz").await.starts_with("HTTP/1.1 200"));

    let limited = Pid::from_raw(i32::try_from(pid).unwrap());
    let now = prlimit(limited, Resource::Nofile, rustix::process::getrlimit(Resource::Nofile)).unwrap();
    prlimit(limited, Resource::Nofile, Rlimit { current: Some(lowest_free(pid)), ..now }).unwrap();
    let mut beyond = connect().await.unwrap();
    let mut answer = String::new();
    soon(beyond.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    let metrics = ask(&mut kept, "/metrics").await;
    let counted = metrics.lines().find_map(|line| line.strip_prefix("broker_refused_total{reason=\"descriptors\"} "));
    assert!(counted.unwrap().parse::<u64>().unwrap() > 0);

    // Who waits is served once there is room again.
    let mut waits = connect().await.unwrap();
    prlimit(limited, Resource::Nofile, now).unwrap();
    let mut served = false;
    while !served {
        served = tokio::time::timeout(Duration::from_secs(60), async {
            waits.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
            let mut begin = [0; 12];
            waits.read_exact(&mut begin).await?;
            std::io::Result::Ok(begin.ends_with(b"200"))
        })
        .await
        .unwrap()
        .unwrap_or(false);
        if !served {
            waits = connect().await.unwrap();
        }
    }
    daemon.signal("-TERM");
    let (_, said) = daemon.finish().await;
    assert_eq!(said.matches("cannot be accepted").count(), 1, "{said}");
}

#[tokio::test]
async fn it_takes_all_the_descriptors_it_may_have_and_promises_no_more_connections() {
    let script = "ulimit -n 200 && ulimit -S -n 100 && exec \"$0\" --listen 127.0.0.1:0";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_broker-http")]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    while !said.last().is_some_and(|line: &String| line.contains("listening on")) {
        said.push(soon(lines.next_line()).await.unwrap().unwrap());
    }
    assert!(said[0].contains("limits.connections is 10000, and 150 are taken") && said[0].contains("200 open files"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id().unwrap())).unwrap();
    let files: Vec<_> = limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split(' ').collect();
    assert_eq!(files.iter().filter(|word| **word == "200").count(), 2, "{files:?}");

    let address = said.last().unwrap().split("http://").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let mut open = Vec::new();
    for _ in 0..150 {
        let mut stream = soon(TcpStream::connect(&address)).await.unwrap();
        assert!(ask(&mut stream, "/healthz").await.starts_with("HTTP/1.1 200"));
        open.push(stream);
    }
    let mut answer = String::new();
    soon(soon(TcpStream::connect(&address)).await.unwrap().read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
}
