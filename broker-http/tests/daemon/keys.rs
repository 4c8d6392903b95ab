//! A flood of idempotency keys: what is kept of their answers is bounded, and others are served.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::lines::peak;
use crate::{Daemon, soon};

const REQUESTS: usize = 8_000;
/// Messages of a request; its answer has about 90 bytes for each.
const LINES: usize = 100;
const BOUND: usize = 1 << 20;
/// What the daemon may grow by: a fraction of the 72 MB of answers. Most of it is the allocator's, which keeps pages for each
/// thread and size.
const MAX_GROWTH: u64 = 24 << 20;

#[tokio::test]
async fn a_flood_of_keys_takes_bounded_memory_and_others_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("broker.toml");
    std::fs::write(&config, format!("limits = {{ idempotency_bytes = {BOUND} }}")).unwrap();
    let daemon = Daemon::start(&["--config", config.to_str().unwrap(), "--broker", "memory:keys"]).await;
    let before = peak(&daemon);
    let body = "{\"payload\":1}\n".repeat(LINES);
    let (mut read, mut write) = soon(TcpStream::connect(daemon.address)).await.unwrap().into_split();
    let flooding = tokio::spawn(async move {
        for key in 0..REQUESTS {
            let last = if key + 1 == REQUESTS { "connection: close\r\n" } else { "" };
            let request = format!(
                "POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
                idempotency-key: {key}\r\n{last}content-length: {}\r\n\r\n{body}",
                body.len()
            );
            write.write_all(request.as_bytes()).await.unwrap();
        }
    });
    // Its end is also that of what the client says: the last answer comes all the same.
    let mut answers = Vec::new();
    soon(read.read_to_end(&mut answers)).await.unwrap();
    soon(flooding).await.unwrap();
    let text = String::from_utf8(answers).unwrap();
    let (taken, refused) = (text.matches("HTTP/1.1 202 ").count(), text.matches("HTTP/1.1 503 ").count());
    let others: Vec<_> = text
        .split("HTTP/1.1 ")
        .skip(1)
        .filter(|answer| !answer.starts_with("202 ") && !answer.starts_with("503 "))
        .collect();
    assert_eq!(taken + refused, REQUESTS, "{others:?}");
    assert!((50..=BOUND / LINES / 50).contains(&taken), "{taken}");
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < MAX_GROWTH, "{growth} bytes for {taken} answers kept");
    // Who needs no key, and who has one already.
    assert_eq!(daemon.send("POST /topics/a", "x").await.0, 202);
    assert_eq!(daemon.raw("POST /topics/b HTTP/1.1\r\nidempotency-key: other", "x").await.0, 503);
    let metrics = daemon.send("GET /metrics", "").await.1;
    let counted = metrics.lines().find_map(|line| line.strip_prefix("broker_refused_total{reason=\"idempotency\"} "));
    assert_eq!(counted.unwrap().parse::<usize>().unwrap(), refused + 1);
}
