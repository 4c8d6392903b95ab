//! A collector of OpenTelemetry's, as far as spans go: it takes what OTLP posts to it.

use std::collections::HashMap;
use std::net::SocketAddr;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span as Raw;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::support::{header, soon};

/// A span, in the words a test compares.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    /// Trace and span of each.
    pub(crate) links: Vec<(String, String)>,
    pub(crate) failed: bool,
    pub(crate) service: String,
    attributes: HashMap<String, String>,
}

impl Span {
    pub(crate) fn is(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// As the header says it.
    pub(crate) fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.trace, self.id)
    }
}

pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    told: UnboundedReceiver<(String, Vec<Span>)>,
    spans: Vec<Span>,
    /// The head of the last request.
    pub(crate) head: String,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, told) = unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(take(stream, tell.clone()));
            }
        });
        Self { address, told, spans: Vec::new(), head: String::new() }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The spans that came, once there are so many.
    pub(crate) async fn spans(&mut self, count: usize) -> Vec<Span> {
        while self.spans.len() < count {
            let (head, spans) = soon(self.told.recv()).await.unwrap();
            self.head = head;
            self.spans.extend(spans);
        }
        std::mem::take(&mut self.spans)
    }

    /// What came besides.
    pub(crate) fn more(&mut self) -> usize {
        std::iter::from_fn(|| self.told.try_recv().ok()).map(|(_, spans)| spans.len()).sum()
    }
}

async fn take(mut stream: TcpStream, tell: UnboundedSender<(String, Vec<Span>)>) {
    let mut heard = Vec::new();
    let mut piece = [0; 16 << 10];
    while let Ok(read @ 1..) = stream.read(&mut piece).await {
        heard.extend_from_slice(&piece[..read]);
        let Some(end) = heard.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8(heard[..end].to_vec()).unwrap();
        let length: usize = header(&head, "content-length").unwrap().parse().unwrap();
        let Some(body) = heard.get(end + 4..end + 4 + length) else { continue };
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        let _ = tell.send((head, read_all(request)));
        heard.drain(..end + 4 + length);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

fn read_all(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource in request.resource_spans {
        let about = attributes(resource.resource.unwrap_or_default().attributes);
        let service = about.get("service.name").cloned().unwrap_or_default();
        for raw in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(read(raw, &service));
        }
    }
    spans
}

fn read(raw: Raw, service: &str) -> Span {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Span {
        name: raw.name,
        kind: match raw.kind {
            3 => "client",
            4 => "producer",
            5 => "consumer",
            _ => "other",
        },
        trace: hex(&raw.trace_id),
        id: hex(&raw.span_id),
        parent: hex(&raw.parent_span_id),
        links: raw.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
        failed: raw.status.is_some_and(|status| status.code == 2),
        service: service.to_owned(),
        attributes: attributes(raw.attributes),
    }
}

fn attributes(pairs: Vec<opentelemetry_proto::tonic::common::v1::KeyValue>) -> HashMap<String, String> {
    let text = |value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.into_iter().filter_map(|pair| Some((pair.key, text(pair.value?.value?)))).collect()
}
