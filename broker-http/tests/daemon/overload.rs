//! Twice the load it can take: the daemon answers as it did, refuses the rest, and its memory stays
//! where it was. Measured on the real process; the plot is `overload.svg` in the target folder.
//!
//! An endpoint takes 200 messages of 32 KiB a second, which is what the daemon can take as well once its
//! memory is used up. It is offered 160 a second for five seconds and 400 a second for fifteen, at fixed
//! times, whatever the answers do: little enough for any machine, so that the bound decides and not the
//! processor.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Daemon, endpoint, soon};

const TAKEN: u64 = 200;
const PUBLISHERS: u64 = 16;
const MEMORY: u64 = 24 << 20;
const STEP: Duration = Duration::from_millis(500);
/// Steps at less than it can take, and at twice as much.
const PHASES: [(usize, u64); 2] = [(10, TAKEN * 4 / 5), (30, TAKEN * 2)];

/// What it must go on accepting and delivering at twice the load, of what it did before.
const ACCEPTED: f64 = 0.95;
/// How much longer its answers may take; in between lies what else the machine does.
const SLOWER: f64 = 3.0;

/// What was seen in one step.
#[derive(Clone, Default)]
struct Seen {
    accepted: usize,
    refused: usize,
    pushed: usize,
    /// Median time to an answer, in milliseconds.
    millis: f64,
    /// Megabytes of the process.
    resident: f64,
}

#[derive(Default)]
struct Counts {
    accepted: AtomicUsize,
    refused: AtomicUsize,
    pushed: AtomicUsize,
    millis: Mutex<Vec<f64>>,
}

/// Publishes at fixed times until the rate is zero.
async fn publish(port: u16, rate: Arc<AtomicUsize>, counts: Arc<Counts>) {
    let body = "x".repeat(32 << 10);
    let request =
        format!("POST /topics/load HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut due = Instant::now();
    loop {
        let rate = rate.load(Ordering::Relaxed) as f64 / PUBLISHERS as f64;
        if rate == 0.0 {
            return;
        }
        due += Duration::from_secs_f64(1.0 / rate);
        tokio::time::sleep_until(due.into()).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let mut piece = [0; 2048];
        let (status, end) = loop {
            let read = stream.read(&mut piece).await.unwrap();
            assert!(read > 0, "the daemon closed the connection");
            answer.extend_from_slice(&piece[..read]);
            let text = String::from_utf8_lossy(&answer);
            let Some((head, rest)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.to_ascii_lowercase();
            let length = length.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
            if rest.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                break (head.split(' ').nth(1).unwrap().to_owned(), Instant::now());
            }
        };
        match status.as_str() {
            "202" => &counts.accepted,
            "429" | "503" => &counts.refused,
            other => panic!("answered {other}"),
        }
        .fetch_add(1, Ordering::Relaxed);
        // From when it was due: an answer that is late makes the next late too.
        counts.millis.lock().push((end - due).as_secs_f64() * 1e3);
    }
}

/// Megabytes of memory the process holds.
fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: twenty seconds of load"]
async fn at_twice_the_load_it_refuses_the_rest_and_its_memory_stays_flat() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("broker.toml");
    let limits = format!("[limits]\nmemory_bytes = {MEMORY}\ntopic_memory_bytes = {MEMORY}\n");
    std::fs::write(&config, format!("broker = \"memory:?dedup_window=2m\"\n{limits}")).unwrap();
    let mut daemon = Daemon::start(&["--config", config.to_str().unwrap(), "--drain", "1s"]).await;
    let (hook, mut told) = endpoint(&[]).await;
    let spec = json!({"filter": "load", "endpoint": format!("http://{hook}/"), "rate_limit": TAKEN});
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec.to_string()).await.0, 201);

    let counts = Arc::new(Counts::default());
    let counting = Arc::clone(&counts);
    tokio::spawn(async move {
        while told.recv().await.is_some() {
            counting.pushed.fetch_add(1, Ordering::Relaxed);
        }
    });
    let rate = Arc::new(AtomicUsize::new(PHASES[0].1 as usize));
    let port = daemon.address.port();
    let publishers: Vec<_> =
        (0..PUBLISHERS).map(|_| tokio::spawn(publish(port, Arc::clone(&rate), Arc::clone(&counts)))).collect();
    let pid = daemon.child.id().unwrap();
    let mut steps = Vec::new();
    for (count, offered) in PHASES {
        rate.store(offered as usize, Ordering::Relaxed);
        for _ in 0..count {
            tokio::time::sleep(STEP).await;
            let mut millis = std::mem::take(&mut *counts.millis.lock());
            millis.sort_by(f64::total_cmp);
            steps.push(Seen {
                accepted: counts.accepted.swap(0, Ordering::Relaxed),
                refused: counts.refused.swap(0, Ordering::Relaxed),
                pushed: counts.pushed.swap(0, Ordering::Relaxed),
                millis: millis.get(millis.len() / 2).copied().unwrap_or(f64::NAN),
                resident: resident(pid),
            });
        }
    }
    rate.store(0, Ordering::Relaxed);
    for publisher in publishers {
        soon(publisher).await.unwrap();
    }
    daemon.child.kill().await.unwrap();

    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("overload.svg");
    std::fs::write(&file, plot(&steps)).unwrap();
    println!("seconds accepted/s refused/s pushed/s median ms resident MB");
    for (index, step) in steps.iter().enumerate() {
        let second = |count: usize| count as f64 / STEP.as_secs_f64();
        println!(
            "{:7.1} {:10.0} {:9.0} {:8.0} {:9.2} {:11.1}",
            (index + 1) as f64 * STEP.as_secs_f64(),
            second(step.accepted),
            second(step.refused),
            second(step.pushed),
            step.millis,
            step.resident
        );
    }
    println!("plotted in {}", file.display());

    // Once it is full it stays full, and goes on: each second takes, refuses and delivers.
    let full = &steps[PHASES[0].0 + 10..];
    for second in full.chunks(2) {
        let sum = |read: fn(&Seen) -> usize| second.iter().map(read).sum::<usize>();
        assert!(sum(|seen| seen.accepted) > 0, "nothing was taken for a second");
        assert!(sum(|seen| seen.refused) > 0, "nothing was refused for a second");
        assert!(sum(|seen| seen.pushed) > 0, "nothing was delivered for a second");
    }
    // Answers, what is taken and what is delivered are what they were; only what is refused is more.
    let before = &steps[2..PHASES[0].0];
    let mean =
        |steps: &[Seen], read: fn(&Seen) -> usize| steps.iter().map(read).sum::<usize>() as f64 / steps.len() as f64;
    let median = |steps: &[Seen]| {
        let mut millis: Vec<_> = steps.iter().map(|seen| seen.millis).collect();
        millis.sort_by(f64::total_cmp);
        millis[millis.len() / 2]
    };
    let accepted = mean(full, |seen| seen.accepted) / mean(before, |seen| seen.accepted);
    let pushed = mean(full, |seen| seen.pushed) / mean(before, |seen| seen.pushed);
    let slower = median(full) / median(before);
    println!("at twice the load: accepts {accepted:.2}, delivers {pushed:.2}, answers in {slower:.2} of before");
    // It was offered four fifths of what it can take.
    assert!(accepted >= ACCEPTED, "it accepts {accepted:.2} of what it did");
    assert!(pushed >= ACCEPTED, "it delivers {pushed:.2} of what it did");
    assert!(slower <= SLOWER, "an answer takes {slower:.2} times as long");
    let most = |steps: &[Seen]| steps.iter().map(|seen| seen.resident).fold(0.0, f64::max);
    let (early, late) = full.split_at(full.len() / 2);
    assert!(most(late) <= most(early) * 1.1 + 8.0, "memory grew from {} to {} MB", most(early), most(late));
}

/// Lines over time, each scaled to its own greatest value, which its label names.
fn plot(steps: &[Seen]) -> String {
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 360.0;
    type Read = fn(&Seen) -> f64;
    let lines: [(&str, &str, Read); 5] = [
        ("accepted a second", "#2a7", |seen| seen.accepted as f64 / STEP.as_secs_f64()),
        ("refused a second", "#c33", |seen| seen.refused as f64 / STEP.as_secs_f64()),
        ("pushed a second", "#27c", |seen| seen.pushed as f64 / STEP.as_secs_f64()),
        ("median answer, ms", "#a6a", |seen| seen.millis),
        ("resident, MB", "#333", |seen| seen.resident),
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        HEIGHT + 120.0
    );
    let x = |index: usize| 20.0 + index as f64 / (steps.len().max(2) - 1) as f64 * (WIDTH - 40.0);
    let begin = x(PHASES[0].0);
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<line x1=\"{begin}\" y1=\"10\" x2=\"{begin}\" y2=\"{HEIGHT}\" stroke=\"#999\" stroke-dasharray=\"4\"/><text x=\"{}\" y=\"22\">twice what it can take</text>",
        begin + 6.0
    );
    for (row, (name, colour, read)) in lines.into_iter().enumerate() {
        let most = steps.iter().map(read).filter(|value| value.is_finite()).fold(0.0, f64::max).max(1e-9);
        let points: Vec<String> = steps
            .iter()
            .enumerate()
            .map(|(index, seen)| format!("{:.1},{:.1}", x(index), HEIGHT - read(seen) / most * (HEIGHT - 40.0)))
            .collect();
        let y = HEIGHT + 20.0 + row as f64 * 20.0;
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/><text x=\"20\" y=\"{y}\" fill=\"{colour}\">{name}: {most:.1} at most</text>",
            points.join(" ")
        );
    }
    svg + "</svg>\n"
}
