//! A long file of messages, streamed: in constant memory, however long it is.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::{Daemon, soon};

const LINES: usize = 100_000;
/// Bytes of a line, its end included.
const LINE: usize = 1_000;
/// What the daemon may grow by: a fraction of the 100 MB that pass through it.
const MAX_GROWTH: u64 = 24 << 20;

/// The most memory the daemon has held so far.
fn peak(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_file_of_any_length_passes_in_constant_memory() {
    // The default broker retains what was published for readers that come back, which is memory.
    let daemon = Daemon::start(&["--broker", "memory:lines"]).await;
    let before = peak(&daemon);
    let (read, mut write) = soon(TcpStream::connect(daemon.address)).await.unwrap().into_split();
    let head = format!(
        "POST /topics/log HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\n\
         accept: application/x-ndjson\r\ncontent-length: {}\r\n\r\n",
        daemon.address,
        LINES * LINE,
    );
    let mut line = format!("{{\"payload\":\"{:0>width$}\"}}", 7, width = LINE - 15);
    line.push('\n');
    assert_eq!(line.len(), LINE);
    let writing = tokio::spawn(async move {
        write.write_all(head.as_bytes()).await.unwrap();
        let block = line.repeat(100);
        for _ in 0..LINES / 100 {
            write.write_all(block.as_bytes()).await.unwrap();
        }
        write
    });
    let mut results = 0;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = soon(lines.next_line()).await.unwrap() {
        assert!(!line.contains("error"), "{line}");
        results += usize::from(line.starts_with("{\"id\":"));
    }
    writing.await.unwrap();
    assert_eq!(results, LINES);
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < MAX_GROWTH, "{growth} bytes for {} streamed", LINES * LINE);
}
