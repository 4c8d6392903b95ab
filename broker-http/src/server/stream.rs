//! `GET /topics/{filter}/stream`: messages as server-sent events, for `curl -N`, browsers and
//! scripts. What was written is acked.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use broker_core::{
    Backlog, Delivery, Gap, Group, GroupName, GroupOptions, Overflow, Subscribe, Subscription, TopicFilter,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Uri, header};
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::leases::detach;
use super::problem::{Answer, Problem};
use super::query::{Query, name_in_path};
use super::{Shared, groups};
use crate::event::{Envelope, json};

/// Messages written in one go.
const MESSAGES_AT_ONCE: usize = 64;

/// How often a stream on which nothing happens says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What a stream without a group keeps of what its reader has not read.
const MAX_EVENTS: u64 = 10_000;
const MAX_BYTES: u64 = 16 << 20;

pub(crate) async fn stream(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer {
    let filter = TopicFilter::new(&*name_in_path(&uri)?)?;
    let mut query = Query::of(&uri);
    let group = query.parsed::<GroupName>("group")?;
    query.finish()?;
    if shared.is_draining() {
        return Err(Problem::draining());
    }
    let place = Place::take(&shared)?;
    // What was missed since that event is not kept, so that the reader is told.
    let resumed = headers.contains_key("last-event-id") && group.is_none();
    let options = match group {
        Some(name) => {
            let group = Group::new(name, filter.clone());
            groups::ensure(&*shared.broker, &group, GroupOptions::new()).await?;
            Subscribe::group(group.name)
        }
        None => Subscribe::new().with_options(GroupOptions::new().with_backlog(bounded()?)),
    };
    let subscription = shared.broker.subscribe(&filter, options.with_max_in_flight(MESSAGES_AT_ONCE * 2)?).await?;
    let events = Events {
        subscription,
        written: Vec::new(),
        gap: resumed.then_some(Gap::Unknown),
        greeted: false,
        alive: Box::pin(sleep(KEEP_ALIVE)),
        shared: Arc::clone(&shared),
        _place: place,
    };
    let mut response = Response::new(Body::new(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that buffer answers would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A reader that stands still loses the oldest and is told; it holds up no publisher.
fn bounded() -> broker_core::Result<Backlog> {
    let backlog = Backlog::default().with_overflow(Overflow::DropOldest);
    backlog.with_max_messages(MAX_EVENTS)?.with_max_bytes(MAX_BYTES)
}

/// The body: polled when there is room to write, so that what it gave before has been written.
struct Events {
    subscription: Subscription,
    written: Vec<Delivery>,
    gap: Option<Gap>,
    greeted: bool,
    alive: Pin<Box<Sleep>>,
    shared: Arc<Shared>,
    _place: Place,
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = broker_core::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, broker_core::Error>>> {
        let this = &mut *self;
        for delivery in this.written.drain(..) {
            detach(delivery.ack());
        }
        if !this.greeted {
            // Some readers wait for the first byte before they believe in the answer.
            this.greeted = true;
            return frame(b": connected\n\n".to_vec());
        }
        if let Some(gap) = this.gap.take() {
            return frame(encode_gap(gap));
        }
        match this.subscription.poll_receive(cx, &mut this.written, MESSAGES_AT_ONCE) {
            Poll::Pending => {
                ready!(this.alive.as_mut().poll(cx));
                this.alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
                frame(b": keep-alive\n\n".to_vec())
            }
            Poll::Ready(Ok(0)) => Poll::Ready(None),
            Poll::Ready(Err(error)) => {
                tracing::debug!(%error, "a stream ended");
                Poll::Ready(None)
            }
            Poll::Ready(Ok(messages)) => {
                this.shared.metrics.streamed(messages);
                this.alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
                let mut text = Vec::with_capacity(this.written.len() * 256);
                if let Some(gap) = this.subscription.gap() {
                    text = encode_gap(gap);
                }
                this.written.iter().for_each(|delivery| encode(delivery, &mut text));
                frame(text)
            }
        }
    }
}

fn frame<E>(text: Vec<u8>) -> Poll<Option<Result<Frame<Bytes>, E>>> {
    Poll::Ready(Some(Ok(Frame::data(text.into()))))
}

/// An id has no control characters, and JSON no line break: both are one line.
fn encode(delivery: &Delivery, text: &mut Vec<u8>) {
    text.extend_from_slice(format!("id: {}\ndata: ", delivery.message().id()).as_bytes());
    let envelope = Envelope {
        topic: delivery.topic(),
        message: delivery.message(),
        subscription: None,
        attempt: Some(delivery.attempt()),
    };
    json::encode(envelope, text);
    text.extend_from_slice(b"\n\n");
}

fn encode_gap(gap: Gap) -> Vec<u8> {
    match gap.lost() {
        Some(lost) => format!("event: gap\ndata: {{\"lost\":{lost}}}\n\n").into_bytes(),
        None => b"event: gap\ndata: {}\n\n".to_vec(),
    }
}

/// One of the streams there may be at a time.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(shared: &Shared) -> Answer<Self> {
        let max = shared.limits().streams;
        let place = Self(Arc::clone(&shared.streams));
        if place.0.fetch_add(1, Ordering::AcqRel) >= max {
            return Err(Problem::too_many(format!("there are {max} streams, which is the most; end one first")));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
