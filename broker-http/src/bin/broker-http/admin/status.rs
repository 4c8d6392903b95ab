//! `broker-http status`: a table of what a daemon is doing, drawn anew until it is ended.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use broker_core::{Result, parse_duration};
use serde_json::Value;
use tokio::time::Instant;

use super::subscription::subscriptions;
use super::{Daemon, Where};
use crate::output::{fail, interrupted, print};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Where,
    /// How often it is drawn anew
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Draw it once, and end; so it is where standard output is no terminal
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> std::result::Result<Duration, String> {
    let interval = parse_duration(text).map_err(|error| error.message().to_owned())?;
    if interval < Duration::from_millis(100) { Err("it is 100ms or more".to_owned()) } else { Ok(interval) }
}

pub(crate) async fn run(args: Args) -> ExitCode {
    let daemon = match args.place.open() {
        Ok(daemon) => daemon,
        Err(error) => return fail(&error),
    };
    let live = !args.once && std::io::stdout().is_terminal();
    let mut before = None;
    loop {
        let now = match Seen::ask(&daemon).await {
            Ok(now) => now,
            Err(error) => return fail(&error),
        };
        let text = now.draw(before.as_ref());
        if !live {
            print(&text);
            return ExitCode::SUCCESS;
        }
        // From the top left, and nothing of before below.
        print(&format!("\x1b[H\x1b[2J{text}"));
        before = Some(now);
        tokio::select! {
            () = tokio::time::sleep(args.interval) => {}
            () = interrupted() => return ExitCode::SUCCESS,
        }
    }
}

/// A daemon at one moment.
struct Seen {
    at: Instant,
    topics: Vec<Value>,
    subscriptions: Vec<Value>,
}

impl Seen {
    async fn ask(daemon: &Daemon) -> Result<Self> {
        let (topics, subscriptions) = (daemon.all("/topics", "topics").await?, subscriptions(daemon).await?);
        Ok(Self { at: Instant::now(), topics, subscriptions })
    }

    fn draw(&self, before: Option<&Self>) -> String {
        let elapsed = before.map(|before| self.at.duration_since(before.at).as_secs_f64().max(0.001));
        let rate = |old: Option<u64>, new: Option<u64>| match (old, new, elapsed) {
            (Some(old), Some(new), Some(elapsed)) => Some(new.saturating_sub(old) as f64 / elapsed),
            _ => None,
        };
        let earlier: BTreeMap<_, _> = before
            .iter()
            .flat_map(|before| &before.topics)
            .map(|topic| (Cells(topic).text("name"), Cells(topic).number("published")))
            .collect();
        let topics = self.topics.iter().map(|topic| {
            let cells = Cells(topic);
            let old = earlier.get(&cells.text("name")).copied().flatten();
            let per_second = rate(old, cells.number("published"));
            vec![cells.text("name"), cells.text("published"), show_rate(per_second), cells.text("held_bytes")]
        });
        let earlier: BTreeMap<_, _> = before
            .iter()
            .flat_map(|before| &before.subscriptions)
            .map(|one| (Cells(one).text("name"), Cells(one).acked()))
            .collect();
        let rows = self.subscriptions.iter().map(|one| {
            let old = earlier.get(&Cells(one).text("name")).copied().flatten();
            subscription_row(one, rate(old, Cells(one).acked()))
        });
        let mut text = table(&["TOPIC", "PUBLISHED", "PER SECOND", "HELD BYTES"], topics.collect());
        text.push('\n');
        text.push_str(&table(&SUBSCRIPTION_COLUMNS, rows.collect()));
        text
    }
}

pub(super) const SUBSCRIPTION_COLUMNS: [&str; 9] =
    ["SUBSCRIPTION", "FILTER", "STATE", "LAG", "IN FLIGHT", "ACKED/S", "RETRIED", "DEAD", "TO"];

pub(super) fn subscription_row(subscription: &Value, rate: Option<f64>) -> Vec<String> {
    let cells = Cells(subscription);
    let to = subscription.get("endpoint").and_then(Value::as_str).unwrap_or("(pulled)");
    vec![
        cells.text("name"),
        cells.text("filter"),
        cells.status("state"),
        cells.status("lag"),
        cells.status("in_flight"),
        show_rate(rate),
        cells.count("retried"),
        cells.status("dead_letters"),
        to.to_owned(),
    ]
}

fn show_rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"))
}

/// The cells of a row, as text.
pub(super) struct Cells<'a>(pub(super) &'a Value);

impl Cells<'_> {
    pub(super) fn text(&self, field: &str) -> String {
        show(self.0.get(field))
    }

    fn number(&self, field: &str) -> Option<u64> {
        self.0.get(field)?.as_u64()
    }

    fn status(&self, field: &str) -> String {
        show(self.0.pointer(&format!("/status/{field}")))
    }

    fn count(&self, field: &str) -> String {
        show(self.0.pointer(&format!("/status/counts/{field}")))
    }

    fn acked(&self) -> Option<u64> {
        self.0.pointer("/status/counts/acked")?.as_u64()
    }
}

fn show(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Columns as wide as their widest cell.
pub(super) fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let columns = all.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a string cannot fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_what_changed_between_two_looks() {
        let seen = |at, published: u64, acked: u64| Seen {
            at,
            topics: vec![json!({"name": "orders", "published": published, "held_bytes": 7})],
            subscriptions: vec![json!({
                "name": "billing", "filter": "orders", "endpoint": "http://x/",
                "status": {"state": "active", "lag": 3, "in_flight": 1, "dead_letters": 0, "counts": {"acked": acked, "retried": 2}}
            })],
        };
        let begin = Instant::now();
        let (one, two) = (seen(begin, 100, 50), seen(begin + Duration::from_secs(2), 300, 250));
        let text = two.draw(Some(&one));
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["orders", "300", "100", "7"], "{text}");
        assert_eq!(lines[4], ["billing", "orders", "active", "3", "1", "100", "2", "0", "http://x/"], "{text}");
        assert!(one.draw(None).contains("-"));
    }
}
