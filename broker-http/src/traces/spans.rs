//! The spans, and how their context travels.

use std::fmt;
use std::time::Duration;

use broker_core::{Delivery, Error, Group, Message, Topic};
use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};

use crate::event::trace;
use crate::push::{Decision, Outcome, Target, Verdict};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Links of one span at most: a batch may have thousands of messages.
const MAX_LINKS: usize = 128;

/// Where spans of a server and its pushes go; the default is nowhere.
///
/// Cloning shares it. See [`ServerOptions::with_traces`](crate::ServerOptions::with_traces) and
/// [`PushClient::with_traces`](crate::push::PushClient::with_traces).
#[derive(Clone, Default)]
pub struct Traces(Option<Tracing>);

#[derive(Clone)]
struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Gives spans to the provider of a service that has one already: its sampler decides, its
    /// exporter sends them, and shutting it down is the service's.
    ///
    /// ```
    /// use broker_http::{ServerOptions, Traces};
    ///
    /// let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
    /// let options = ServerOptions::new().with_traces(Traces::new(provider));
    /// # let _ = options;
    /// ```
    pub fn new(provider: SdkTracerProvider) -> Self {
        let scope =
            InstrumentationScope::builder(env!("CARGO_PKG_NAME")).with_version(env!("CARGO_PKG_VERSION")).build();
        let tracer = provider.tracer_with_scope(scope);
        Self(Some(Tracing { provider, tracer }))
    }

    /// Sends what is left, within `patience`, and ends. Blocks.
    ///
    /// # Errors
    ///
    /// Why not all of it was sent.
    pub fn shutdown(&self, patience: Duration) -> Result<(), String> {
        let Some(tracing) = &self.0 else { return Ok(()) };
        tracing.provider.shutdown_with_timeout(patience).map_err(|error| error.to_string())
    }

    /// What a request belongs to.
    pub(crate) fn parent(&self, headers: &HeaderMap) -> Parent {
        Parent(self.0.as_ref().and_then(|_| context(trace::of_request(headers)?)))
    }

    /// A message is about to be published; from here on it belongs to this span.
    pub(crate) fn publish(&self, topic: &Topic, message: &mut Message) -> Publishing {
        let Some(Tracing { tracer, .. }) = &self.0 else { return Publishing(None) };
        let span = tracer
            .span_builder(format!("publish {topic}"))
            .with_kind(SpanKind::Producer)
            .with_attributes(
                sending(topic)
                    .into_iter()
                    .chain([id(message), size("messaging.message.body.size", message.payload().len())]),
            )
            .start_with_context(tracer, &below(of(message)));
        mark(message, span.span_context());
        Publishing(Some(Box::new(span)))
    }

    /// As [`publish`](Self::publish), several at once.
    pub(crate) fn publish_many(&self, topic: &Topic, parent: &Parent, messages: &mut [Message]) -> Publishing {
        let Some(Tracing { tracer, .. }) = &self.0 else { return Publishing(None) };
        let links = messages.iter().filter_map(of).take(MAX_LINKS).map(Link::with_context).collect();
        let span = tracer
            .span_builder(format!("publish {topic}"))
            .with_kind(SpanKind::Producer)
            .with_attributes(sending(topic).into_iter().chain([size("messaging.batch.message_count", messages.len())]))
            .with_links(links)
            .start_with_context(tracer, &below(parent.0.clone()));
        for message in messages.iter_mut().filter(|message| message.headers().get("traceparent").is_none()) {
            mark(message, span.span_context());
        }
        Publishing(Some(Box::new(span)))
    }

    /// Messages of a subscription are about to be pushed, in one request.
    pub(crate) fn process(&self, subscription: &str, group: &Group, deliveries: &[Delivery]) -> Processing {
        let Some(Tracing { tracer, .. }) = &self.0 else { return Processing(None) };
        let mut attributes = vec![
            KeyValue::new("messaging.system", SYSTEM),
            KeyValue::new("messaging.operation.name", "push"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.destination.subscription.name", subscription.to_owned()),
            KeyValue::new("messaging.consumer.group.name", group.name.to_string()),
        ];
        let (builder, parent) = match deliveries {
            [delivery] => {
                attributes.extend([
                    KeyValue::new("messaging.destination.name", delivery.topic().to_string()),
                    id(delivery.message()),
                    KeyValue::new("broker.attempt", i64::from(delivery.attempt())),
                ]);
                (tracer.span_builder(format!("push {}", delivery.topic())), below(of(delivery.message())))
            }
            batch => {
                attributes.extend([
                    KeyValue::new("messaging.destination.template", group.filter.to_string()),
                    size("messaging.batch.message_count", batch.len()),
                ]);
                let contexts = batch.iter().filter_map(|delivery| of(delivery.message()));
                let links = contexts.take(MAX_LINKS).map(Link::with_context).collect();
                (tracer.span_builder(format!("push {}", group.filter)).with_links(links), Context::new())
            }
        };
        let span =
            builder.with_kind(SpanKind::Consumer).with_attributes(attributes).start_with_context(tracer, &parent);
        Processing(Some(Box::new((tracer.clone(), span))))
    }
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Traces(on)" } else { "Traces(off)" })
    }
}

const SYSTEM: &str = "broker-http";

fn sending(topic: &Topic) -> [KeyValue; 4] {
    [
        KeyValue::new("messaging.system", SYSTEM),
        KeyValue::new("messaging.operation.name", "publish"),
        KeyValue::new("messaging.operation.type", "send"),
        KeyValue::new("messaging.destination.name", topic.to_string()),
    ]
}

fn id(message: &Message) -> KeyValue {
    KeyValue::new("messaging.message.id", message.id().to_string())
}

fn size(name: &'static str, size: usize) -> KeyValue {
    KeyValue::new(name, i64::try_from(size).unwrap_or(i64::MAX))
}

/// What a request belongs to, if it says.
#[derive(Clone, Debug)]
pub(crate) struct Parent(Option<SpanContext>);

/// A publish under way; over when dropped.
pub(crate) struct Publishing(Option<Box<Span>>);

impl Publishing {
    pub(crate) fn failed(&mut self, error: &Error) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new("error.type", error.kind().to_string()));
            span.set_status(Status::error(error.message().to_owned()));
        }
    }
}

/// Messages being pushed and settled; over when dropped.
pub(crate) struct Processing(Option<Box<(SdkTracer, Span)>>);

impl Processing {
    /// The request to the endpoint. Of its URL nothing is told but host and port: the rest is often a
    /// secret.
    pub(crate) fn push(&self, target: &Target) -> Pushing {
        let Some((tracer, span)) = self.0.as_deref() else { return Pushing(None) };
        let parent = Context::new().with_remote_span_context(span.span_context().clone());
        let span = tracer
            .span_builder("POST")
            .with_kind(SpanKind::Client)
            .with_attributes([
                KeyValue::new("http.request.method", "POST"),
                KeyValue::new("server.address", target.host.to_string()),
                KeyValue::new("server.port", i64::from(target.port)),
                KeyValue::new("url.scheme", if target.tls.is_some() { "https" } else { "http" }),
            ])
            .start_with_context(tracer, &parent);
        Pushing(Some(Box::new(span)))
    }

    /// Everything is settled.
    pub(crate) fn over(self) {}

    /// What was decided.
    pub(crate) fn judged(&mut self, verdict: &Verdict) {
        let Some((_, span)) = self.0.as_deref_mut() else { return };
        let settlement = match verdict.decision {
            Decision::Ack => "ack",
            Decision::Reject => "reject",
            Decision::Retry { .. } => "retry",
            Decision::Keep => "keep",
        };
        span.set_attribute(KeyValue::new("broker.settlement", settlement));
        if verdict.decision != Decision::Ack {
            span.set_status(Status::error(verdict.reason.to_string()));
        }
    }
}

/// A request to an endpoint under way.
pub(crate) struct Pushing(Option<Box<Span>>);

impl Pushing {
    /// Tells the endpoint which span it belongs to. A request of one message has the message's
    /// `tracestate` already.
    pub(crate) fn inject(&self, headers: &mut HeaderMap) {
        let Some(span) = &self.0 else { return };
        if let Ok(value) = HeaderValue::try_from(traceparent(span.span_context())) {
            headers.insert(TRACEPARENT, value);
        }
    }

    /// It was answered, or not.
    pub(crate) fn over(self, outcome: &Outcome) {
        let Some(mut span) = self.0 else { return };
        match outcome {
            Outcome::Answer(answer) => {
                span.set_attribute(KeyValue::new("http.response.status_code", i64::from(answer.status)));
                if answer.status >= 400 {
                    span.set_attribute(KeyValue::new("error.type", answer.status.to_string()));
                    span.set_status(Status::error(""));
                }
            }
            Outcome::TimedOut(_) => {
                span.set_attribute(KeyValue::new("error.type", "timeout"));
                span.set_status(Status::error("no answer in time"));
            }
            Outcome::Failed(why) => {
                span.set_attribute(KeyValue::new("error.type", "connection"));
                span.set_status(Status::error(why.clone()));
            }
        }
    }
}

fn below(parent: Option<SpanContext>) -> Context {
    parent.map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent))
}

/// What a message belongs to.
fn of(message: &Message) -> Option<SpanContext> {
    context(trace::of_message(message)?)
}

fn mark(message: &mut Message, context: &SpanContext) {
    // Full of headers as a message may be, it is published without its context rather than not at all.
    let _ = message.headers_mut().set("traceparent", traceparent(context));
}

/// A well-formed context as OpenTelemetry has it.
fn context((parent, state): (&str, Option<String>)) -> Option<SpanContext> {
    let mut parts = parent.split('-').skip(1);
    let trace = TraceId::from_hex(parts.next()?).ok()?;
    let span = SpanId::from_hex(parts.next()?).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(parts.next()?, 16).ok()?) & TraceFlags::SAMPLED;
    let state: TraceState = state.and_then(|text| text.parse().ok()).unwrap_or_default();
    Some(SpanContext::new(trace, span, flags, true, state)).filter(SpanContext::is_valid)
}

fn traceparent(context: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_read_and_written_as_it_was() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = context((text, Some("acme=1".to_owned()))).unwrap();
        assert_eq!((traceparent(&read).as_str(), read.trace_state().get("acme")), (text, Some("1")));
        assert_eq!(context((text, Some("no member".to_owned()))).unwrap().trace_state(), &TraceState::default());
    }
}
