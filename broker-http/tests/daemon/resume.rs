//! A reader of a stream that comes back, at a daemon with its defaults.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::{Daemon, soon};

#[tokio::test]
async fn it_goes_on_after_the_event_it_saw_last() {
    let daemon = Daemon::start(&[]).await;
    for id in ["one", "two", "three"] {
        assert_eq!(daemon.send(&format!("POST /topics/orders.created?id={id}"), "x").await.0, 202);
    }
    let mut stream = soon(TcpStream::connect(daemon.address)).await.unwrap();
    let request =
        format!("GET /topics/orders.%3E/stream HTTP/1.1\r\nhost: {}\r\nlast-event-id: one\r\n\r\n", daemon.address);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut ids = Vec::new();
    while ids.len() < 2 {
        let line = soon(lines.next_line()).await.unwrap().unwrap();
        assert!(!line.contains("gap"), "{line}");
        ids.extend(line.strip_prefix("id: ").map(str::to_owned));
    }
    assert_eq!(ids, ["two", "three"]);
}
