//! NDJSON: our server, its socket included, beside a bare loop of serde_json and an in-process
//! publish.

use std::sync::Arc;
use std::time::Instant;

use broker_core::{Connectors, Message, PublisherOptions, Subscribe, Topic, TopicFilter};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::load::{Connection, publish_request};
use super::{Ours, bounded, drain};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

const TOPIC: &str = "orders.created";

/// Lines a request, as many as are answered in one piece, and requests a round.
const LINES: usize = 10_000;
const REQUESTS: usize = 8;

/// Bytes of a payload, the quotes of its JSON string included.
const PAYLOAD: usize = 100;

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![Comparison::new("http/publish/ndjson", Unit::MessagesPerSecond, 0.5, async || {
        let filter = TopicFilter::new(TOPIC)?;
        let line = format!("{{\"payload\":\"{}\"}}\n", "x".repeat(PAYLOAD - 2));
        let body = Bytes::from(line.repeat(LINES));

        let ours = Arc::new(Ours::start().await?);
        tokio::spawn(drain(ours.broker.subscribe(&filter, Subscribe::new()).await?));
        let request = publish_request(ours.address, TOPIC, "application/x-ndjson", &body);
        let ours = move || {
            let (ours, request) = (Arc::clone(&ours), request.clone());
            async move { bounded("an NDJSON round", over_http(&ours, &request)).await }
        };

        let broker = Connectors::new().open("memory:")?;
        tokio::spawn(drain(broker.subscribe(&filter, Subscribe::new()).await?));
        let publisher = broker.publisher(&Topic::new(TOPIC)?, PublisherOptions::new())?;
        let theirs = move || {
            // The publisher would not keep the broker open.
            let (_broker, publisher, body) = (Arc::clone(&broker), publisher.clone(), body.clone());
            async move { bounded("a bare loop", bare_loop(&publisher, &body)).await }
        };
        Ok(Pair::new(ours, theirs))
    })]
}

async fn over_http(ours: &Ours, request: &[u8]) -> Result<f64> {
    let mut connection = Connection::open(ours.address).await?;
    let began = Instant::now();
    for _ in 0..REQUESTS {
        let answer = connection.exchange(request).await?;
        let receipts = memchr::memmem::find_iter(answer, b"{\"id\":").count();
        if receipts != LINES {
            return Err(format!("{receipts} receipts were answered where {LINES} were due").into());
        }
    }
    Ok((LINES * REQUESTS) as f64 / began.elapsed().as_secs_f64())
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    payload: &'a RawValue,
}

async fn bare_loop(publisher: &broker_core::Publisher, body: &[u8]) -> Result<f64> {
    let began = Instant::now();
    for _ in 0..REQUESTS {
        for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let line: Line<'_> = serde_json::from_slice(line)?;
            let payload = Bytes::copy_from_slice(line.payload.get().as_bytes());
            publisher.publish(Message::new(payload).with_content_type("application/json")?).await?;
        }
    }
    Ok((LINES * REQUESTS) as f64 / began.elapsed().as_secs_f64())
}
