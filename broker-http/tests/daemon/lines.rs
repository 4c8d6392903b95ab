//! A long file of messages, streamed: in constant memory, however long it is.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;

use crate::{Daemon, soon};

const LINES: usize = 100_000;
/// Bytes of a line, its end included.
const LINE: usize = 1_000;
/// What the daemon may grow by: a fraction of the 100 MB that pass through it.
const MAX_GROWTH: u64 = 24 << 20;

/// The most memory the daemon has held so far.
pub(crate) fn peak(daemon: &Daemon) -> u64 {
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
    let block = line(LINE).repeat(100);
    pass(&daemon, (LINES * LINE) as u64, LINES, async |write| {
        for _ in 0..LINES / 100 {
            write.write_all(block.as_bytes()).await.unwrap();
        }
    })
    .await;
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < MAX_GROWTH, "{growth} bytes for {} streamed", LINES * LINE);
}

/// A file as it lies on a disk, and the daemon with its defaults: a topic retains 16 MiB at most, and
/// once it does, nine tenths of the file add nothing.
#[cfg(target_os = "linux")]
#[tokio::test]
#[ignore = "long: a million lines, 500 MB"]
async fn a_file_of_a_million_lines_passes_in_constant_memory() {
    const MILLION: usize = 1_000_000;
    const LINE: usize = 500;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines.ndjson");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    (0..MILLION).for_each(|_| std::io::Write::write_all(&mut file, line(LINE).as_bytes()).unwrap());
    drop(file.into_inner().unwrap());
    let size = std::fs::metadata(&path).unwrap().len();
    assert_eq!(size, (MILLION * LINE) as u64);

    let daemon = Daemon::start(&[]).await;
    let mut before = 0;
    pass(&daemon, size, MILLION, async |write| {
        let mut file = tokio::fs::File::open(&path).await.unwrap();
        let mut tenth = tokio::io::AsyncReadExt::take(&mut file, size / 10);
        tokio::io::copy(&mut tenth, write).await.unwrap();
        before = peak(&daemon);
        tokio::io::copy(&mut file, write).await.unwrap();
    })
    .await;
    let growth = peak(&daemon).saturating_sub(before);
    assert!(growth < MAX_GROWTH, "{growth} bytes for nine tenths of {size} streamed, beside {before}");
}

/// A line of so many bytes, its end included.
fn line(bytes: usize) -> String {
    format!("{{\"payload\":\"{:0>width$}\"}}\n", 7, width = bytes - 15)
}

/// Streams a body of `size` bytes that `send` writes, and hears a receipt for each line meanwhile.
async fn pass(daemon: &Daemon, size: u64, lines: usize, send: impl AsyncFnOnce(&mut OwnedWriteHalf)) {
    let (read, mut write) = soon(TcpStream::connect(daemon.address)).await.unwrap().into_split();
    let head = format!(
        "POST /topics/log HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\n\
         accept: application/x-ndjson\r\ncontent-length: {size}\r\n\r\n",
        daemon.address,
    );
    let writing = async {
        write.write_all(head.as_bytes()).await.unwrap();
        send(&mut write).await;
        // Half a connection ends it.
        write
    };
    let reading = async {
        let mut results = 0;
        let mut answer = BufReader::new(read).lines();
        while let Some(line) = soon(answer.next_line()).await.unwrap() {
            assert!(!line.contains("error"), "{line}");
            results += usize::from(line.starts_with("{\"id\":"));
        }
        assert_eq!(results, lines);
    };
    let (_write, ()) = tokio::join!(writing, reading);
}
