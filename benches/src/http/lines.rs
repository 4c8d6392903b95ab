//! NDJSON: our server, its socket included, beside a bare loop of serde_json and an in-process
//! publish.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use broker_core::{Connectors, Message, PublisherOptions, Subscribe, Topic, TopicFilter};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::load::{Connection, publish_request};
use super::{Ours, bounded, drain};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

const TOPIC: &str = "orders.created";

/// Lines a request, as many as are answered in one piece, and requests a round.
const LINES: usize = 10_000;
const REQUESTS: usize = 8;

/// Bytes of a chunk of a streamed body.
const CHUNK: usize = 64 << 10;

/// Bytes of a payload, the quotes of its JSON string included.
const PAYLOAD: usize = 100;

pub(super) fn comparisons() -> Vec<Comparison> {
    let collected = Comparison::new("http/publish/ndjson", Unit::MessagesPerSecond, 0.5, async || {
        let body = Bytes::from(line().repeat(LINES));
        let ours = Arc::new(ours().await?);
        let request = publish_request(ours.address, TOPIC, "application/x-ndjson", &body);
        let ours = move || {
            let (ours, request) = (Arc::clone(&ours), request.clone());
            async move { bounded("an NDJSON round", over_http(&ours, &request)).await }
        };
        Ok(Pair::new(ours, theirs(body).await?))
    });
    let streamed = Comparison::new("http/publish/ndjson_stream", Unit::MessagesPerSecond, 0.5, async || {
        let ours = Arc::new(ours().await?);
        let request = streamed_request(ours.address);
        let ours = move || {
            let (ours, request) = (Arc::clone(&ours), request.clone());
            async move { bounded("a streamed NDJSON round", streamed_over_http(&ours, &request)).await }
        };
        Ok(Pair::new(ours, theirs(Bytes::from(line().repeat(LINES))).await?))
    });
    vec![collected, streamed]
}

fn line() -> String {
    format!("{{\"payload\":\"{}\"}}\n", "x".repeat(PAYLOAD - 2))
}

/// Our server, with a subscriber that acks.
async fn ours() -> Result<Ours> {
    let ours = Ours::start().await?;
    tokio::spawn(drain(ours.broker.subscribe(&TopicFilter::new(TOPIC)?, Subscribe::new()).await?));
    Ok(ours)
}

/// Rounds of the bare loop, with such a subscriber too.
async fn theirs(body: Bytes) -> Result<impl FnMut() -> std::pin::Pin<Box<dyn Future<Output = Result<f64>> + Send>>> {
    let broker = Connectors::new().open("memory:")?;
    tokio::spawn(drain(broker.subscribe(&TopicFilter::new(TOPIC)?, Subscribe::new()).await?));
    let publisher = broker.publisher(&Topic::new(TOPIC)?, PublisherOptions::new())?;
    Ok(move || {
        // The publisher would not keep the broker open.
        let (broker, publisher, body) = (Arc::clone(&broker), publisher.clone(), body.clone());
        Box::pin(async move {
            let _broker = broker;
            bounded("a bare loop", bare_loop(&publisher, &body)).await
        }) as _
    })
}

/// One body of a whole round's lines, in chunks, as a program writes that does not know its length.
fn streamed_request(address: SocketAddr) -> Bytes {
    let mut request = format!(
        "POST /topics/{TOPIC} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/x-ndjson\r\naccept: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for chunk in line().repeat(LINES * REQUESTS).as_bytes().chunks(CHUNK) {
        request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        request.extend_from_slice(chunk);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    request.into()
}

async fn streamed_over_http(ours: &Ours, request: &[u8]) -> Result<f64> {
    let mut stream = TcpStream::connect(ours.address).await?;
    let began = Instant::now();
    let (mut read, mut write) = stream.split();
    // The results come while the lines go, and a server that nobody reads from stops reading.
    let ((), receipts) = tokio::try_join!(write.write_all(request), receipts(&mut read))?;
    let elapsed = began.elapsed();
    if receipts != LINES * REQUESTS {
        return Err(format!("{receipts} receipts were answered where {} were due", LINES * REQUESTS).into());
    }
    Ok(receipts as f64 / elapsed.as_secs_f64())
}

/// Counts receipts as they come: the generator keeps nothing, since it shares the machine with the server.
async fn receipts(read: &mut (impl AsyncRead + Unpin)) -> std::io::Result<usize> {
    let mut buffer = Vec::with_capacity(CHUNK);
    let mut receipts = 0;
    while read.read_buf(&mut buffer).await? > 0 {
        let lines = memchr::memrchr(b'\n', &buffer).map_or(0, |end| end + 1);
        receipts += buffer.get(..lines).map_or(0, |lines| memchr::memmem::find_iter(lines, b"{\"id\":").count());
        buffer.drain(..lines);
    }
    Ok(receipts)
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
