//! `GET /topics/{filter}/stream`: messages as server-sent events, for `curl -N`, browsers and
//! scripts. What was written is acked.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use broker_core::{
    Backlog, Delivery, ErrorKind, Gap, Group, GroupName, GroupOptions, MemoryBroker, MessageId, Overflow, StartAt,
    Subscribe, Subscription, TopicFilter,
};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};

use super::access::{Action, Caller, Ended, Peer, Right};
use super::leases::{Hand, Tally, detach};
use super::member::Member;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::query::{Query, name_in_path};
use super::reader::Reader;
use super::registry::Reading;
use super::subscriptions::finish;
use super::upgrade::Upgrade;
use super::{Shared, acceptable, socket};
use crate::event::{Envelope, json, percent};
use crate::outgoing::Turn;

const EVENTS_TYPE: &str = "text/event-stream";

/// Messages received in one go.
const MESSAGES_AT_ONCE: usize = 64;

/// Bytes of messages after which a frame is full: what is encoded and not read yet is there besides them.
pub(crate) const FRAME_BYTES: usize = 64 << 10;

/// How often a stream on which nothing happens says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What a stream without a group keeps of what its reader has not read, where the broker has such a bound.
const MAX_EVENTS: u64 = 10_000;
const MAX_BYTES: u64 = 16 << 20;

/// Retained events that are looked through for the one a reader saw last.
const MAX_SEEKING: usize = 20_000;

/// How long what another daemon retains is waited for: since the last of it came, and in all.
const QUIET: Duration = Duration::from_secs(2);
const SEEKING: Duration = Duration::from_secs(10);

pub(crate) async fn stream(State(shared): State<Arc<Shared>>, request: Request) -> Answer {
    let (mut parts, _) = request.into_parts();
    let upgrade = Upgrade::of(&mut parts)?;
    let filter = TopicFilter::new(&*name_in_path(&parts.uri)?)?;
    let mut query = Query::of(&parts.uri);
    let group = query.parsed::<GroupName>("group")?;
    let hold = if upgrade.is_some() { query.duration("timeout")? } else { None };
    query.finish()?;
    if upgrade.is_none() && acceptable::refuses(&parts.headers, EVENTS_TYPE) {
        return Err(Problem::new(
            StatusCode::NOT_ACCEPTABLE,
            ErrorKind::Invalid,
            "accept: it refuses text/event-stream, and this is nothing else, but for a WebSocket",
        ));
    }
    if shared.is_draining() {
        return Err(Problem::draining());
    }
    let reader = Reader::of(&shared, &parts.extensions);
    let caller = parts.extensions.remove::<Caller>();
    // A group is not its reader's alone: what is read is gone for the others. A socket settles, whatever it reads.
    let takes = group.is_some() || upgrade.is_some();
    let actions: &[_] = if takes { &[Action::Subscribe, Action::Settle] } else { &[Action::Subscribe] };
    let right = Right::of(&shared, caller.clone(), actions, filter.clone());
    right.check()?;
    let place = Place::take(&shared, caller.as_ref())?;
    if let Some(upgrade) = upgrade {
        let connection = parts.extensions.remove::<Peer>().and_then(|peer| peer.place);
        return socket::open(upgrade, shared, (place, right, reader), connection, filter, group, hold).await;
    }
    let last = parts.headers.get("last-event-id").filter(|last| !last.is_empty());
    let ((subscription, tally), seeking) = match (group, last) {
        (Some(group), _) => (join(&shared, filter, group, right.owner(), MESSAGES_AT_ONCE * 2).await?, Seeking::No),
        (None, None) => ((copy(&shared, &filter, StartAt::New).await?.into(), Arc::default()), Seeking::No),
        (None, Some(last)) => {
            let (subscription, seeking) = resume(&shared, &filter, last).await?;
            ((subscription.into(), Arc::default()), seeking)
        }
    };
    let events = Events {
        subscription,
        tally,
        written: Vec::new(),
        ready: Hand::default(),
        gap: matches!(seeking, Seeking::Missed).then_some(Gap::Unknown),
        seeking,
        greeted: false,
        turn: None,
        alive: Box::pin(sleep(KEEP_ALIVE)),
        shared: Arc::clone(&shared),
        reader,
        revoked: right.ended(),
        right,
        _place: place,
    };
    let mut response = Response::new(Body::new(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(EVENTS_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that buffer answers would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A member of a group, and where its work is counted. If no subscription has the group, one to pull is made of its
/// name, so that it can be listed, purged and deleted.
pub(crate) async fn join(
    shared: &Arc<Shared>,
    filter: TopicFilter,
    name: GroupName,
    owner: Option<GroupName>,
    max_in_flight: usize,
) -> Answer<(Member, Arc<Tally>)> {
    let group = Group::new(name, filter);
    let reading = Reading::begin(shared, group.clone());
    let (making, wanted) = (Arc::clone(shared), group.clone());
    finish(async move {
        if making.registry.stand_for(&making, &wanted, owner).await? {
            making.try_save().await?;
        }
        Ok(())
    })
    .await?;
    let tally = shared.registry.tally(&group);
    Ok((Member::join(shared, reading, max_in_flight).await?, tally))
}

/// A copy of one's own, from `start` on. In hand of it are `max_in_flight` messages at most, whatever the broker; what
/// waits behind them is bounded where the broker can tell how many it dropped, and elsewhere waits in its server: in
/// Kafka's log as its retention has it, in RabbitMQ's queue of this stream's own, which goes with the stream.
pub(crate) async fn copy(shared: &Shared, filter: &TopicFilter, start: StartAt) -> Answer<Subscription> {
    let max = if start == StartAt::New { MESSAGES_AT_ONCE * 2 } else { MAX_SEEKING };
    let mut options = GroupOptions::new();
    if shared.broker.capabilities().overflow_drop_oldest.is_some() {
        options = options.with_backlog(bounded()?);
    }
    if start != StartAt::New {
        options = options.with_start(start);
    }
    let options = Subscribe::new().with_options(options).with_max_in_flight(max)?;
    Ok(shared.broker.subscribe(filter, options).await?)
}

/// A copy that begins after the event the reader saw last, if that is still retained. A broker that keeps its messages
/// retains them without a bound of ours, so that nothing is sought there: it would be read from its beginning.
async fn resume(shared: &Shared, filter: &TopicFilter, last: &HeaderValue) -> Answer<(Subscription, Seeking)> {
    let can = shared.broker.capabilities();
    if let Some(id) = last_seen(last)
        && can.start_earliest.is_some()
        && !can.durable
    {
        match copy(shared, filter, StartAt::Earliest).await {
            Ok(subscription) => {
                let broker: &dyn Any = &*shared.broker;
                let patience = (!broker.is::<MemoryBroker>()).then(Patience::new);
                return Ok((subscription, Seeking::After(id, patience)));
            }
            // It can, and was not told to.
            Err(problem) if problem.is_unsupported() => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok((copy(shared, filter, StartAt::New).await?, Seeking::Missed))
}

/// The event that `Last-Event-ID` names, if it can name one.
pub(super) fn last_seen(last: &HeaderValue) -> Option<MessageId> {
    // Browsers send back in UTF-8 what they were given.
    let text = std::str::from_utf8(last.as_bytes()).ok()?;
    percent::decode_field(text).parse().ok()
}

/// A reader that stands still loses the oldest and is told; it holds up no publisher.
fn bounded() -> broker_core::Result<Backlog> {
    let backlog = Backlog::default().with_overflow(Overflow::DropOldest);
    backlog.with_max_messages(MAX_EVENTS)?.with_max_bytes(MAX_BYTES)
}

/// Where a reader that comes back is to go on.
enum Seeking {
    /// It does not come back, or it has gone on.
    No,
    /// What it missed is not retained.
    Missed,
    /// After this event, among those retained; they come in their time if they are not in this process.
    After(MessageId, Option<Patience>),
}

/// How long what is retained elsewhere may still come: nobody says where it ends.
struct Patience {
    wait: Pin<Box<Sleep>>,
    end: Instant,
    bytes: u64,
}

impl Patience {
    fn new() -> Self {
        Self { wait: Box::pin(sleep(QUIET)), end: Instant::now() + SEEKING, bytes: 0 }
    }

    /// More has come. It is held here until it is known where to go on, and no more of it than waits for a reader.
    fn more(&mut self, deliveries: &[Delivery]) {
        self.bytes += deliveries.iter().map(|delivery| delivery.message().size() as u64).sum::<u64>();
        self.wait.as_mut().reset(self.end.min(Instant::now() + QUIET));
    }

    /// Whether nothing more is to be read, as where messages keep coming.
    fn is_over(&self) -> bool {
        self.bytes > MAX_BYTES || Instant::now() >= self.end
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wait.as_mut().poll(cx)
    }
}

/// The body: polled when there is room to write, so that what it gave before has been written.
struct Events {
    subscription: Member,
    tally: Arc<Tally>,
    written: Vec<Delivery>,
    /// Received and not written yet.
    ready: Hand,
    seeking: Seeking,
    gap: Option<Gap>,
    greeted: bool,
    /// Waited for while too much is encoded already.
    turn: Option<Pin<Box<dyn Future<Output = Turn> + Send>>>,
    alive: Pin<Box<Sleep>>,
    shared: Arc<Shared>,
    reader: Reader,
    revoked: Ended,
    right: Arc<Right>,
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
        if !this.written.is_empty() {
            this.tally.settle(this.written.len());
            this.tally.succeed();
            this.written.drain(..).for_each(|delivery| detach(delivery.ack()));
        }
        if this.revoked.as_mut().poll(cx).is_ready() {
            return this.refuse();
        }
        if !this.greeted {
            // Some readers wait for the first byte before they believe in the answer.
            this.greeted = true;
            return frame(b": connected\n\n".to_vec());
        }
        // What it finds may have a gap forgotten that it met on its way.
        if matches!(this.seeking, Seeking::After(..)) {
            ready!(this.poll_seek(cx));
        }
        if let Some(gap) = this.gap.take() {
            return frame(encode_gap(gap));
        }
        if this.ready.is_empty() {
            match this.subscription.poll_receive(cx, &mut this.written, MESSAGES_AT_ONCE) {
                Poll::Pending => {
                    ready!(this.alive.as_mut().poll(cx));
                    this.alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
                    return frame(b": keep-alive\n\n".to_vec());
                }
                Poll::Ready(Ok(0)) => return Poll::Ready(None),
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%error, "a stream ended");
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(count)) => {
                    this.tally.lend(count);
                    this.ready.extend(this.written.drain(..));
                }
            }
            if let Some(gap) = this.subscription.gap() {
                return frame(encode_gap(gap));
            }
        }
        let Poll::Ready(turn) = this.poll_turn(cx) else {
            ready!(this.alive.as_mut().poll(cx));
            this.alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
            return frame(b": keep-alive\n\n".to_vec());
        };
        // What came in meanwhile may have been published after the rules changed.
        if !this.right.holds() {
            return this.refuse();
        }
        this.write(turn)
    }
}

impl Events {
    /// Ends; what was received and not written goes back untried.
    fn refuse<E>(&self) -> Poll<Option<Result<Frame<Bytes>, E>>> {
        tracing::info!("a stream ended: its reader is no longer allowed it");
        Poll::Ready(None)
    }

    /// Ready when what is to be written may be encoded.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        let first = self.ready.get(0).map_or(0, |delivery| json::about(delivery.message()));
        let about = first..=first.max(FRAME_BYTES as u64);
        if self.turn.is_none()
            && let Some(turn) = self.reader.try_turn(about.clone())
        {
            return Poll::Ready(turn);
        }
        let waits = self.turn.get_or_insert_with(|| {
            let reader = self.reader.clone();
            Box::pin(async move { reader.turn(about).await })
        });
        let turn = ready!(waits.as_mut().poll(cx));
        self.turn = None;
        Poll::Ready(turn)
    }

    /// Encodes what is to be written next.
    fn write<E>(&mut self, turn: Turn) -> Poll<Option<Result<Frame<Bytes>, E>>> {
        let mut text = Vec::with_capacity(self.ready.len() * 256);
        while text.len() < turn.bytes().min(FRAME_BYTES)
            && let Some(delivery) = self.ready.pop()
        {
            encode(&delivery, &mut text);
            self.written.push(delivery);
        }
        self.shared.metrics.streamed(self.written.len());
        self.alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
        Poll::Ready(Some(Ok(Frame::data(self.reader.part(turn, text)))))
    }

    /// Reads what is retained up to the event sought. What this process retains is there at once, and where it ends
    /// without that event, it has been forgotten; what another does has until its patience ends.
    fn poll_seek(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Seeking::After(id, patience) = &mut self.seeking else { return Poll::Ready(()) };
        let mut batch = Vec::new();
        loop {
            let room = MAX_SEEKING - self.ready.len();
            let over = patience.as_ref().is_some_and(Patience::is_over);
            let polled = if room == 0 || over {
                Poll::Ready(Ok(0))
            } else {
                self.subscription.poll_receive(cx, &mut batch, room)
            };
            let gap = self.subscription.gap();
            let found = batch.iter().position(|delivery| delivery.message().id() == id);
            if let Some(patience) = patience.as_mut().filter(|_| !batch.is_empty()) {
                patience.more(&batch);
            }
            if let Some(at) = found {
                // Seen already, and everything before it.
                self.tally.settle(self.ready.len());
                std::iter::from_fn(|| self.ready.pop())
                    .chain(batch.drain(..=at))
                    .for_each(|delivery| detach(delivery.ack()));
            }
            // What the past lacks before the event was not for this reader.
            if found.is_some() || gap.is_some_and(|gap| gap.lost().is_some()) {
                self.gap = gap;
            }
            self.tally.lend(batch.len());
            self.ready.extend(batch.drain(..));
            if found.is_none() {
                match polled {
                    Poll::Ready(Ok(1..)) => continue,
                    Poll::Pending if patience.as_mut().is_some_and(|patience| patience.poll(cx).is_pending()) => {
                        return Poll::Pending;
                    }
                    _ => self.gap = Some(Gap::Unknown),
                }
            }
            self.seeking = Seeking::No;
            return Poll::Ready(());
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.tally.settle(self.ready.len() + self.written.len());
    }
}

fn frame<E>(text: Vec<u8>) -> Poll<Option<Result<Frame<Bytes>, E>>> {
    Poll::Ready(Some(Ok(Frame::data(text.into()))))
}

/// An id has no control characters and is one line; JSON may have line breaks between its tokens, and
/// then it is as many.
fn encode(delivery: &Delivery, text: &mut Vec<u8>) {
    let id = delivery.message().id().to_string();
    text.extend_from_slice(format!("id: {}\ndata: ", percent::encode_field(&id)).as_bytes());
    let envelope = Envelope {
        topic: delivery.topic(),
        message: delivery.message(),
        subscription: None,
        attempt: Some(delivery.attempt()),
    };
    let begin = text.len();
    json::encode(envelope, text);
    if text.iter().skip(begin).any(|byte| *byte == b'\n') {
        for byte in text.split_off(begin) {
            match byte {
                b'\n' => text.extend_from_slice(b"\ndata: "),
                _ => text.push(byte),
            }
        }
    }
    text.extend_from_slice(b"\n\n");
}

fn encode_gap(gap: Gap) -> Vec<u8> {
    match gap.lost() {
        Some(lost) => format!("event: gap\ndata: {{\"lost\":{lost}}}\n\n").into_bytes(),
        None => b"event: gap\ndata: {}\n\n".to_vec(),
    }
}

/// One of the streams there may be at a time, counted with those of all and with the caller's own.
pub(crate) struct Place {
    all: Arc<AtomicUsize>,
    own: Option<Arc<AtomicUsize>>,
}

impl Place {
    /// Nobody is given another while he has as many as are free: one always is for who has none.
    fn take(shared: &Shared, caller: Option<&Caller>) -> Answer<Self> {
        let max = shared.limits().streams;
        let count = |open: &AtomicUsize| open.fetch_add(1, Ordering::AcqRel);
        let open = count(&shared.streams);
        let own = caller.map(|caller| (caller.name(), count(caller.streams())));
        let place = Self { all: Arc::clone(&shared.streams), own: caller.map(Caller::streams).cloned() };
        let full = match own {
            _ if open >= max => format!("there are {max} streams, which is the most; end one first"),
            Some((name, own)) if own > 0 && own >= max - open => format!(
                "{name} has {own} of the {max} streams, and no more than that are left, which are for others; end one first"
            ),
            _ => return Ok(place),
        };
        Err(Problem::too_many(full).counted(Refusal::Streams))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for open in self.own.iter().chain([&self.all]) {
            open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
