//! A reader of a stream that comes back, at a daemon with its defaults.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::{Daemon, soon};

/// What `id:` and `event:` say to a reader that comes back, until there are `count`.
async fn heads(daemon: &Daemon, last: &str, count: usize) -> Vec<String> {
    let mut stream = soon(TcpStream::connect(daemon.address)).await.unwrap();
    let request =
        format!("GET /topics/orders.%3E/stream HTTP/1.1\r\nhost: {}\r\nlast-event-id: {last}\r\n\r\n", daemon.address);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut heads = Vec::new();
    while heads.len() < count {
        let line = soon(lines.next_line()).await.unwrap().unwrap();
        heads.extend(Some(line).filter(|line| line.starts_with("id: ") || line.starts_with("event: ")));
    }
    heads
}

async fn publish(daemon: &Daemon, ids: &[&str]) {
    for id in ids {
        assert_eq!(daemon.send(&format!("POST /topics/orders.created?id={id}"), "x").await.0, 202);
    }
}

#[tokio::test]
async fn it_goes_on_after_the_event_it_saw_last() {
    let daemon = Daemon::start(&[]).await;
    publish(&daemon, &["one", "two", "three"]).await;
    assert_eq!(heads(&daemon, "one", 2).await, ["id: two", "id: three"]);
}

#[tokio::test]
async fn it_goes_on_at_a_daemon_in_front_of_another() {
    let behind = Daemon::start(&[]).await;
    let daemon = Daemon::start(&["--broker", &format!("http://{}", behind.address)]).await;
    publish(&daemon, &["one", "two", "three"]).await;
    assert_eq!(heads(&daemon, "one", 2).await, ["id: two", "id: three"]);
    assert_eq!(heads(&daemon, "two", 1).await, ["id: three"]);
    // What is not there is told before what is.
    assert_eq!(heads(&daemon, "none", 4).await, ["event: gap", "id: one", "id: two", "id: three"]);
    // The last one: what comes next is new.
    let (heads, ()) = tokio::join!(heads(&daemon, "three", 1), async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        publish(&daemon, &["four"]).await;
    });
    assert_eq!(heads, ["id: four"]);
}
