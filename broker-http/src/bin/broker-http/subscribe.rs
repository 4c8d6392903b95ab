//! `broker-http sub`: prints what is published.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{
    Broker, Delivery, Gap, GroupName, GroupOptions, Received, Result, StartAt, Subscribe, Subscription, TopicFilter,
};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::output::{self, Out, say};

/// Prints the messages of a topic or of many.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// A topic, or a pattern: `*` is one segment, a last `>` is one or more
    filter: TopicFilter,
    /// Share the messages with the other members of this group, which outlives this command
    #[arg(long, short, value_name = "NAME")]
    group: Option<GroupName>,
    /// End after so many messages
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,
    /// Where to begin: new, earliest, a time as in 2026-11-22T12:00:00Z, or positions as in 0:42,1:7
    #[arg(long, value_name = "START")]
    from: Option<StartAt>,
    /// Look only: give every message back at the end, to be delivered as if it had not been
    #[arg(long)]
    no_ack: bool,
    /// Messages held at a time, at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    in_flight: u32,
    /// Print payloads alone, byte for byte, each with a line feed
    #[arg(long, conflicts_with = "json")]
    payload: bool,
    #[command(flatten)]
    common: output::Common,
}

const AFTER_HELP: &str = "\
Examples:
  broker-http sub 'orders.>'
  broker-http sub orders.created --group billing --json | jq .payload
  broker-http sub 'logs.*' --payload > logs

With --json, standard output has one object a line: topic, id, time, attempt, key (or key_base64),
content_type, headers (name and value), and one of payload (JSON as it was published),
payload_text and payload_base64; a tombstone has none of the three.
";

/// Runs the command.
pub(crate) async fn run(args: Args) -> ExitCode {
    let broker = match output::open(&args.common).await {
        Ok(broker) => broker,
        Err(code) => return code,
    };
    let result = subscribe(&args, &broker).await;
    broker.close(output::DRAIN).await;
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::fail(&error),
    }
}

async fn subscribe(args: &Args, broker: &Arc<dyn Broker>) -> Result<()> {
    let mut options = GroupOptions::new();
    options.start.clone_from(&args.from);
    let most = args.max.unwrap_or(u64::MAX).min(u64::from(args.in_flight));
    let subscribe = args.group.clone().map_or_else(Subscribe::new, Subscribe::group);
    let subscribe = subscribe.with_options(options).with_max_in_flight(usize::try_from(most).unwrap_or(1))?;
    let mut subscription = broker.subscribe(&args.filter, subscribe).await?;
    let mut held = Vec::new();
    let result = print(args, &mut subscription, &mut held).await;
    // Each goes to the front: the last one first, they are in order again.
    let released: Vec<_> = held.into_iter().rev().map(Delivery::release).collect();
    for released in released {
        released.await?;
    }
    subscription.close().await?;
    result
}

async fn print(args: &Args, subscription: &mut Subscription, held: &mut Vec<Delivery>) -> Result<()> {
    let out = Out::new();
    let mut interrupted = std::pin::pin!(output::interrupted());
    let mut left = args.max.unwrap_or(u64::MAX);
    let mut batch = Vec::new();
    while left > 0 {
        let limit = usize::try_from(left.min(256)).unwrap_or(256);
        let received = tokio::select! {
            biased;
            () = &mut interrupted => return Ok(()),
            received = subscription.receive(&mut batch, limit) => received?,
        };
        if received == 0 {
            return Ok(());
        }
        match subscription.gap() {
            Some(Gap::Lost(lost)) => say!("{lost} messages were dropped before these"),
            Some(Gap::Unknown) => say!("messages may be missing before these: the connection was lost"),
            None => {}
        }
        let mut acks = Vec::with_capacity(batch.len());
        let mut unread = false;
        for delivery in batch.drain(..) {
            unread = unread || out.line(line(args, delivery.received())).is_err();
            if unread || args.no_ack {
                // What nobody saw is not ours to ack.
                held.push(delivery);
                continue;
            }
            left -= 1;
            acks.push(delivery.ack());
        }
        for ack in acks {
            if let Err(error) = ack.await {
                say!("an ack was not taken, the message comes back: {error}");
            }
        }
        if unread {
            return Ok(());
        }
        if args.no_ack {
            left = args.max.map_or(left, |max| max.saturating_sub(held.len() as u64));
        }
    }
    Ok(())
}

fn line(args: &Args, received: &Received) -> Vec<u8> {
    match () {
        () if args.payload => received.message().payload().to_vec(),
        () if args.common.json => as_json(received).into_bytes(),
        () => as_text(received).into_bytes(),
    }
}

/// Topic, key and payload, control characters escaped: what is published must not steer a terminal.
fn as_text(received: &Received) -> String {
    let message = received.message();
    let mut text = received.topic().to_string();
    if let Some(key) = message.key() {
        // Writing to a string cannot fail.
        let _ = write!(text, " [{}]", printable(key));
    }
    if received.attempt() > 1 {
        let _ = write!(text, " (attempt {})", received.attempt());
    }
    if message.is_tombstone() {
        text.push_str(" (tombstone)");
    } else {
        let _ = write!(text, " {}", printable(message.payload()));
    }
    text
}

fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for letter in String::from_utf8_lossy(bytes).chars() {
        if letter.is_control() && letter != '\t' { text.extend(letter.escape_default()) } else { text.push(letter) }
    }
    text
}

fn as_json(received: &Received) -> String {
    let message = received.message();
    let mut object = Map::new();
    object.insert("topic".to_owned(), json!(received.topic()));
    object.insert("id".to_owned(), json!(message.id()));
    object.insert("time".to_owned(), json!(message.timestamp()));
    object.insert("attempt".to_owned(), json!(received.attempt()));
    if let Some(key) = message.key() {
        match std::str::from_utf8(key) {
            Ok(text) => object.insert("key".to_owned(), json!(text)),
            Err(_) => object.insert("key_base64".to_owned(), json!(STANDARD.encode(key))),
        };
    }
    if let Some(content_type) = message.content_type() {
        object.insert("content_type".to_owned(), json!(content_type));
    }
    if !message.headers().is_empty() {
        let value = |value: &[u8]| match std::str::from_utf8(value) {
            Ok(text) => json!(text),
            Err(_) => json!({ "base64": STANDARD.encode(value) }),
        };
        let headers = message.headers().iter().map(|(name, bytes)| json!([name.as_str(), value(bytes)]));
        object.insert("headers".to_owned(), Value::Array(headers.collect()));
    }
    let mut line = Value::Object(object).to_string();
    if !message.is_tombstone() {
        line.pop();
        line.push_str(&payload_member(message.content_type(), message.payload()));
        line.push('}');
    }
    line
}

fn payload_member(content_type: Option<&str>, payload: &[u8]) -> String {
    let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let json = essence.ends_with("/json") || essence.ends_with("+json");
    match std::str::from_utf8(payload) {
        // As it was published, but on one line: line ends in JSON are white space always.
        Ok(text) if json && serde_json::from_str::<&RawValue>(text).is_ok() => {
            format!(",\"payload\":{}", text.replace(['\n', '\r'], " "))
        }
        Ok(text) => format!(",\"payload_text\":{}", json!(text)),
        Err(_) => format!(",\"payload_base64\":\"{}\"", STANDARD.encode(payload)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_shown_as_what_it_is() {
        assert_eq!(payload_member(Some("application/json"), b"{\"a\": 1.0}"), ",\"payload\":{\"a\": 1.0}");
        assert_eq!(payload_member(Some("a/b+json; v=1"), b"[1,\r\n2]"), ",\"payload\":[1,  2]");
        assert_eq!(payload_member(Some("application/json"), b"{oops"), ",\"payload_text\":\"{oops\"");
        assert_eq!(payload_member(None, b"1"), ",\"payload_text\":\"1\"");
        assert_eq!(payload_member(None, b"\xff"), ",\"payload_base64\":\"/w==\"");
    }

    #[test]
    fn what_is_published_does_not_steer_a_terminal() {
        assert_eq!(printable(b"a\x1b[2Jb\n\tc"), "a\\u{1b}[2Jb\\n\tc");
    }
}
