//! `broker-http pub`: publishes an argument, a file, or every line of standard input.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{
    Broker, Error, Message, MessageId, Publisher, PublisherOptions, Receipt, Result, Topic, parse_duration,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use serde_json::json;

use super::output::{self, Out, say};
use super::stdin::{Line, Lines};

/// Publishes messages to a topic.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The topic, as in orders.created
    topic: Topic,
    /// The payload; without it (and without --file) every line of standard input is a message
    payload: Option<String>,
    /// Publish this file as one message; `-` is standard input as a whole
    #[arg(long, short, value_name = "PATH", conflicts_with = "payload")]
    file: Option<PathBuf>,
    /// Publish a tombstone: a message without payload, which says that what its key names is gone
    #[arg(long, conflicts_with_all = ["payload", "file"])]
    tombstone: bool,
    /// The key; messages of one key keep their order
    #[arg(long, short)]
    key: Option<String>,
    /// A header, as in trace=on; may be repeated
    #[arg(long = "header", short = 'H', value_name = "NAME=VALUE", value_parser = parse_header)]
    headers: Vec<(String, String)>,
    /// What the payload is, as in application/json
    #[arg(long, short = 't', value_name = "TYPE")]
    content_type: Option<String>,
    /// Deliver no earlier than so long from now, as in 10s or 1m30s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    delay: Option<Duration>,
    /// Discard what was not delivered so long from now
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// The message's id, instead of a new one; for one message
    #[arg(long)]
    id: Option<MessageId>,
    /// Publish once within the broker's window, however often this key comes; for one message
    #[arg(long, value_name = "KEY")]
    dedup: Option<String>,
    /// Fail if no group and no subscription gets the message
    #[arg(long)]
    require_route: bool,
    /// Messages published and not yet confirmed, at most
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    in_flight: u32,
    #[command(flatten)]
    common: output::Common,
}

const AFTER_HELP: &str = "\
Examples:
  broker-http pub orders.created '{\"id\": 42}' --content-type application/json --key customer-7
  broker-http pub photos --file cat.jpg --content-type image/jpeg
  tail -f access.log | broker-http pub logs.access

The exit status is 0 if every message was published, 1 if any failed, 2 for wrong arguments.
With --json, standard output has one object a line: the receipt, or {\"error\": …} with the line's number.
";

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is written NAME=VALUE")?;
    broker_core::HeaderName::new(name).map_err(|error| error.message().to_owned())?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> ExitCode {
    let broker = match output::open(&args.common).await {
        Ok(broker) => broker,
        Err(code) => return code,
    };
    let result = publish(&args, &broker).await;
    // What is under way is waited for; with nothing under way this takes no time.
    let report = broker.close(output::DRAIN).await;
    match result {
        Ok(tally) if tally.failed == 0 && report.unconfirmed == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => output::fail(&error),
    }
}

#[derive(Debug, Default)]
struct Tally {
    published: u64,
    failed: u64,
    /// Whether standard output has a reader no more.
    unread: bool,
}

async fn publish(args: &Args, broker: &Arc<dyn Broker>) -> Result<Tally> {
    let options = PublisherOptions::new().with_require_route(args.require_route);
    let publisher = broker.publisher(&args.topic, options)?;
    let max = broker.capabilities().max_message_bytes;
    let single = match (&args.payload, &args.file) {
        (Some(payload), _) => Some(Message::new(payload.clone())),
        (None, Some(path)) => Some(Message::new(output::read_file(path, max).await?)),
        (None, None) if args.tombstone => Some(Message::tombstone()),
        (None, None) => None,
    };
    let mut report = Report::new(args);
    match single {
        Some(message) => {
            let mut message = describe(args, message)?;
            if let Some(id) = &args.id {
                message = message.with_id(id.clone());
            }
            if let Some(dedup) = &args.dedup {
                message = message.with_dedup_key(dedup)?;
            }
            let result = publisher.publish(message).await;
            report.one(&result);
        }
        None if args.id.is_some() || args.dedup.is_some() => {
            return Err(Error::invalid(
                "--id and --dedup belong to one message; give it as an argument or with --file",
            ));
        }
        None => lines(args, &publisher, max, &mut report).await?,
    }
    Ok(report.tally)
}

fn describe(args: &Args, mut message: Message) -> Result<Message> {
    if let Some(key) = &args.key {
        message = message.with_key(key.clone());
    }
    for (name, value) in &args.headers {
        message = message.with_header(name, value.clone())?;
    }
    if let Some(content_type) = &args.content_type {
        message = message.with_content_type(content_type)?;
    }
    if let Some(delay) = args.delay {
        message = message.with_delay(delay);
    }
    if let Some(ttl) = args.ttl {
        message = message.with_ttl(ttl);
    }
    Ok(message)
}

/// Publishes every line of standard input, many at a time, and tells of each in order.
async fn lines(args: &Args, publisher: &Publisher, max: usize, report: &mut Report<'_>) -> Result<()> {
    if io::stdin().is_terminal() {
        say!("every line is a message; end with Ctrl-D");
    }
    let mut lines = Lines::new(tokio::io::stdin(), max);
    let mut under_way = FuturesOrdered::new();
    let mut interrupted = std::pin::pin!(output::interrupted());
    let mut number = 0_u64;
    let mut reading = true;
    while (reading || !under_way.is_empty()) && !report.tally.unread {
        tokio::select! {
            () = &mut interrupted, if reading => {
                say!("interrupted: waiting for what is under way");
                reading = false;
            }
            Some((line, result)) = under_way.next(), if !under_way.is_empty() => report.line(line, &result),
            line = lines.next(), if reading && under_way.len() < args.in_flight as usize => {
                let line = line.map_err(|error| Error::invalid(format!("standard input: {error}")).with_source(error))?;
                number += 1;
                match line {
                    None => reading = false,
                    Some(Line::TooLong) => {
                        let error = Error::too_large(format!("line {number} is longer than a message of {max} bytes"));
                        under_way.push_back(tell(number, Err(error).into()));
                    }
                    Some(Line::Text(text)) => {
                        let publish = publisher.publish(describe(args, Message::new(text))?);
                        under_way.push_back(tell(number, publish));
                    }
                }
            }
        }
    }
    report.end();
    Ok(())
}

async fn tell(line: u64, publish: broker_core::Publish) -> (u64, Result<Receipt>) {
    (line, publish.await)
}

/// What is printed, and how much of it there was.
struct Report<'a> {
    args: &'a Args,
    out: Out,
    tally: Tally,
    begun: Instant,
    shown: Option<Instant>,
    progress: bool,
}

impl<'a> Report<'a> {
    fn new(args: &'a Args) -> Self {
        let progress = io::stderr().is_terminal();
        Self { args, out: Out::new(), tally: Tally::default(), begun: Instant::now(), shown: None, progress }
    }

    fn count(&mut self, result: &Result<Receipt>) {
        match result {
            Ok(_) => self.tally.published += 1,
            Err(_) => self.tally.failed += 1,
        }
    }

    fn one(&mut self, result: &Result<Receipt>) {
        self.count(result);
        match result {
            _ if self.args.common.json => self.print(&receipt_json(&self.args.topic, None, result)),
            Ok(receipt) => self.print(&receipt_text(&self.args.topic, receipt)),
            Err(error) => say!("broker-http: {error}"),
        }
    }

    fn line(&mut self, line: u64, result: &Result<Receipt>) {
        self.count(result);
        if self.args.common.json {
            self.print(&receipt_json(&self.args.topic, Some(line), result));
        } else if let Err(error) = result {
            self.clear();
            say!("line {line}: {error}");
        }
        // Often enough to be watched, seldom enough to cost nothing.
        if self.progress && self.shown.is_none_or(|shown| shown.elapsed() > Duration::from_millis(200)) {
            self.shown = Some(Instant::now());
            output::show(&format!("\r{}\x1b[K", self.summary()));
        }
    }

    fn end(&mut self) {
        self.clear();
        if !self.args.common.json {
            say!("{}", self.summary());
        }
    }

    fn clear(&self) {
        if self.shown.is_some() {
            output::show("\r\x1b[K");
        }
    }

    fn summary(&self) -> String {
        let Tally { published, failed, .. } = self.tally;
        let rate = published as f64 / self.begun.elapsed().as_secs_f64().max(0.001);
        format!("{published} published, {failed} failed, {rate:.0}/s")
    }

    fn print(&mut self, line: &str) {
        self.tally.unread |= self.out.line(line).is_err();
    }
}

fn receipt_text(topic: &Topic, receipt: &Receipt) -> String {
    let mut text = format!("published {} to {topic}", receipt.id);
    // Writing to a string cannot fail.
    if let Some(matched) = receipt.matched {
        let _ = write!(text, ", {matched} {}", if matched == 1 { "copy" } else { "copies" });
    }
    if let (Some(partition), Some(offset)) = (receipt.partition, receipt.offset) {
        let _ = write!(text, ", partition {partition} offset {offset}");
    }
    if receipt.duplicate {
        text.push_str(", a duplicate");
    }
    text
}

fn receipt_json(topic: &Topic, line: Option<u64>, result: &Result<Receipt>) -> String {
    let mut object = match result {
        Ok(receipt) => json!({
            "id": receipt.id, "topic": topic, "matched": receipt.matched, "duplicate": receipt.duplicate,
            "partition": receipt.partition, "offset": receipt.offset,
        }),
        Err(error) => json!({ "error": { "kind": error.kind().as_str(), "detail": error.message() } }),
    };
    if let Some(object) = object.as_object_mut() {
        object.retain(|name, value| !value.is_null() && (name != "duplicate" || value == true));
        if let Some(line) = line {
            object.insert("line".to_owned(), line.into());
        }
    }
    object.to_string()
}
