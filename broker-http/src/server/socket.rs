//! `GET /topics/{filter}/stream` as a WebSocket: deliveries lent against credit, settled over the
//! same socket.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use broker_core::{Delivery, Group, GroupName, StartAt, TopicFilter};
use bytes::Bytes;
use futures_util::future::{Fuse, FusedFuture};
use futures_util::{FutureExt, SinkExt, StreamExt};
use http::StatusCode;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::access::Right;
use super::chatter::Chatter;
use super::leases::{Borrower, Hand, Holder, Places};
use super::member::Member;
use super::metrics::Refusal;
use super::places;
use super::problem::{Answer, Problem};
use super::pull::{self, Settlements};
use super::reader::Reader;
use super::stream::{FRAME_BYTES, Place, copy, join};
use super::upgrade::Upgrade;
use super::{Shared, body};
use crate::event::json;
use crate::outgoing::Turn;

/// Bytes of a message from the other side.
const MAX_MESSAGE: usize = 1 << 20;

/// Characters that are told of what is wrong with a message.
const MAX_ERROR: usize = 1_000;

/// Bytes of a fragment that is sent. The socket has a buffer as large as its largest, for as long as it stands.
const FRAGMENT: usize = 64 << 10;

/// Bytes read from a socket at a time: each has a buffer of that size for as long as it stands.
const READ: usize = 8 << 10;

/// Bytes of a ping or a pong besides what it says.
const CONTROL: usize = 6;

/// Deliveries taken in one go, and lent to one socket, at most.
const AT_ONCE: usize = 64;
const MAX_LENT: usize = 10_000;

/// How long a delivery is lent, unless `?timeout=` says so or it is extended.
const DEFAULT_HOLD: Duration = Duration::from_secs(30);

/// How often the other side is asked whether it is there, and how long it may be silent.
const PING: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(45);

/// How long it waits where all leases are taken, by others or by its own identity elsewhere, before it looks again.
const LEASES_TAKEN: Duration = Duration::from_millis(500);

/// How long an ended socket waits for the other side's end.
const FAREWELL: Duration = Duration::from_secs(1);

/// Subscribes, and answers once the subscription stands.
pub(crate) async fn open(
    upgrade: Upgrade,
    shared: Arc<Shared>,
    (place, right, reader): (Place, Arc<Right>, Reader),
    connection: Option<Arc<places::Place>>,
    filter: TopicFilter,
    group: Option<GroupName>,
    hold: Option<Duration>,
) -> Answer<Response> {
    if hold.is_some_and(|hold| hold.is_zero() || hold > pull::MAX_HOLD) {
        return Err(Problem::invalid("query parameter timeout: it is longer than zero and 12h at most"));
    }
    let name = group.as_ref().map(GroupName::to_string);
    let ((subscription, tally), lease) = match group {
        Some(name) => {
            let group = Group::new(name.clone(), filter.clone());
            let joined = join(&shared, filter, name, right.owner(), MAX_LENT).await?;
            (joined, shared.registry.lease(&group))
        }
        None => ((copy(&shared, &filter, StartAt::New).await?.into(), Arc::default()), None),
    };
    // Whoever asks has the word, then the subscription.
    let hold = hold.or(lease).unwrap_or(DEFAULT_HOLD);
    let holder = Arc::new(Holder::counted_by(tally));
    let lending = Lending {
        shared: Arc::clone(&shared),
        reader,
        subscription: Some(subscription),
        holder,
        borrower: right.borrower(),
        hold,
        name,
        right,
        credit: 0,
        ready: Hand::default(),
        places: None,
        told: VecDeque::new(),
        chatter: Chatter::new(Instant::now()),
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().extend(upgrade.headers());
    let wire = Arc::clone(&lending.reader.wire);
    if let Some(connection) = &connection {
        connection.keep();
    }
    shared.connections.serve(&wire, async move {
        // The connection counts among all for as long as it stands.
        let _places = (place, connection);
        let Ok(connection) = upgrade.connection.await else { return };
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE))
            .read_buffer_size(READ);
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(connection), Role::Server, Some(config));
        lending.run(socket.await).await;
    });
    Ok(response)
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// One socket: what is lent over it, and what may still be.
struct Lending {
    shared: Arc<Shared>,
    reader: Reader,
    /// `None` once it has ended; what is lent can still be settled.
    subscription: Option<Member>,
    holder: Arc<Holder>,
    borrower: Borrower,
    hold: Duration,
    name: Option<String>,
    right: Arc<Right>,
    credit: usize,
    /// Taken and not lent yet: nothing is lent while the other side cannot be told.
    ready: Hand,
    places: Option<Places>,
    /// What is to be said to the message that was read last, in parts. Nothing is read while there is any.
    told: VecDeque<Vec<u8>>,
    chatter: Chatter,
}

impl Drop for Lending {
    /// What is still lent is due again at once.
    fn drop(&mut self) {
        self.shared.leases.release_all(&self.holder);
    }
}

/// What a frame from the other side says.
#[derive(Debug)]
pub(crate) enum Told {
    /// So many deliveries more may be lent.
    Credit(usize),
    Settlements(Settlements),
}

impl Told {
    pub(crate) fn read(frame: &[u8]) -> Answer<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Credit {
            credit: u32,
        }
        let read = if names_credit(frame) {
            read(frame).map(|read| read.map(|Credit { credit }| Self::Credit(credit as usize)))
        } else {
            read(frame).map(|read| read.map(Self::Settlements))
        };
        let refuse = |why: &str| {
            // It may name what is not known, however long that is.
            let why: String = why.chars().take(MAX_ERROR).collect();
            Problem::invalid(format!(
                "a frame is {{\"credit\": n}} or what is settled, as in {{\"ack\": [\"lease\"]}}: {why}"
            ))
        };
        read.map_err(|problem| refuse(problem.detail()))?.ok_or_else(|| refuse("it is empty"))
    }
}

/// Whether a frame is about credit, right or wrong: what is wrong with it is then told of credit.
fn names_credit(frame: &[u8]) -> bool {
    let fields = frame.trim_ascii_start().strip_prefix(b"{");
    fields.is_some_and(|fields| fields.trim_ascii_start().starts_with(br#""credit""#))
}

/// As [`body::read_json`]; where what is wrong stands is looked for only where something is.
fn read<T: DeserializeOwned>(frame: &[u8]) -> Answer<Option<T>> {
    // An array would be taken for the fields in their order.
    let object = frame.trim_ascii_start().first() == Some(&b'{');
    if object && let Ok(told) = serde_json::from_slice(frame) { Ok(Some(told)) } else { body::read_json(frame) }
}

impl Lending {
    async fn run(mut self, mut socket: Socket) {
        let goodbye = self.serve(&mut socket).await;
        drop(self);
        // The other side's close frame is answered, and its answer to ours awaited: who ends first would
        // otherwise see a connection that broke (RFC 6455, section 7.1.1).
        let end = async {
            if let Some(frame) = goodbye {
                let fault = !matches!(frame.code, CloseCode::Away | CloseCode::Policy);
                socket.send(Message::Close(Some(frame))).await?;
                if fault {
                    // What follows is not understood: it is left time to be written, and the frame to be read.
                    sleep(FAREWELL).await;
                }
            }
            while socket.next().await.transpose()?.is_some() {}
            Ok::<_, Error>(())
        };
        let _ = timeout(2 * FAREWELL, end).await;
    }

    /// Serves until one side ends it; tells what to say at the end, if anybody is there to hear it.
    async fn serve(&mut self, socket: &mut Socket) -> Option<CloseFrame> {
        let mut revoked = self.right.ended();
        let mut ping = interval(PING);
        let mut heard = Instant::now();
        let mut batch = Vec::new();
        let cut = self.shared.connections.closing();
        // It keeps its place among those who wait, whatever else happens meanwhile.
        let mut turn = pin!(Fuse::terminated());
        loop {
            if self.subscription.is_none() && self.holder.leased() == 0 {
                return Some(goodbye(CloseCode::Away, "the subscription has ended"));
            }
            if turn.is_terminated() && (!self.told.is_empty() || !self.ready.is_empty()) {
                let (reader, about) = (self.reader.clone(), self.about());
                turn.set(async move { reader.turn(about).await }.fuse());
            }
            // What was taken is lent before more is taken.
            let room = if self.ready.is_empty() { self.credit } else { 0 };
            let room = room.min(MAX_LENT.saturating_sub(self.holder.leased())).min(AT_ONCE);
            let places = self.shared.leases.reserve((&self.holder, &self.borrower), room, MAX_LENT);
            let all_taken = room > 0 && places.count() == 0;
            let room = places.count();
            let receive = async {
                match &mut self.subscription {
                    Some(subscription) => subscription.receive(&mut batch, room).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = revoked.as_mut() => return Some(refusal()),
                message = socket.next(), if self.told.is_empty() => {
                    drop(places);
                    heard = Instant::now();
                    // What was said after the rules changed is not done, nor anything shown that came after that.
                    if !self.right.holds() {
                        return Some(refusal());
                    }
                    let settles = match message {
                        Some(Ok(Message::Text(text))) => self.asked(text.as_bytes()).await,
                        Some(Ok(Message::Binary(bytes))) => self.asked(&bytes).await,
                        Some(Ok(Message::Ping(said) | Message::Pong(said))) => {
                            // It may come between the parts of a message.
                            self.reader.wire.leave_out(CONTROL + said.len());
                            false
                        }
                        Some(Ok(Message::Frame(_))) => false,
                        Some(Err(error)) => return fault(&error),
                        Some(Ok(Message::Close(_))) | None => return None,
                    };
                    if !settles && !self.chatter.may_go_on(1, heard) {
                        self.shared.metrics.refused(Refusal::Flood);
                        return Some(goodbye(CloseCode::Policy, "too many frames that settle nothing"));
                    }
                }
                turn = turn.as_mut(), if !turn.is_terminated() => {
                    if !self.right.holds() {
                        return Some(refusal());
                    }
                    let answer = self.told.pop_front();
                    let answers = answer.is_some();
                    let text = match answer {
                        Some(answer) => self.reader.part(turn, answer),
                        None => self.lend(turn)?,
                    };
                    send(socket, text, self.shared.limits().body_timeout).await?;
                    if answers && self.told.is_empty() {
                        heard = Instant::now();
                        self.reader.wire.forget();
                    }
                }
                received = receive => match received {
                    Ok(1..) => {
                        let gap = self.subscription.as_mut().and_then(Member::gap);
                        if let Some(gap) = gap {
                            let text = serde_json::json!({ "gap": { "lost": gap.lost() } }).to_string().into();
                            send(socket, text, self.shared.limits().body_timeout).await?;
                        }
                        self.take(places, std::mem::take(&mut batch));
                    }
                    Ok(0) => self.subscription = None,
                    Err(error) => {
                        tracing::debug!(%error, "a socket's subscription ended");
                        self.subscription = None;
                    }
                },
                () = sleep(LEASES_TAKEN), if all_taken => {}
                _ = ping.tick() => {
                    drop(places);
                    // While it is not listened to, it is not silent.
                    if self.told.is_empty() && heard.elapsed() > SILENCE {
                        return None;
                    }
                    let patience = self.shared.limits().body_timeout;
                    timeout(patience, socket.send(Message::Ping(Bytes::new()))).await.ok()?.ok()?;
                }
                () = cut.cancelled() => return Some(goodbye(CloseCode::Away, "the server is shutting down")),
            }
        }
    }

    /// Takes deliveries, and the places that their leases will have.
    fn take(&mut self, places: Places, deliveries: Vec<Delivery>) {
        self.credit -= deliveries.len().min(self.credit);
        self.places = Some(places);
        self.ready.extend(deliveries);
    }

    /// What the next message takes.
    fn about(&self) -> RangeInclusive<u64> {
        let next = self.ready.get(0).map_or(0, |delivery| json::about(delivery.message()));
        let first = self.told.front().map_or(next, |told| told.len() as u64);
        first..=first.max(FRAME_BYTES as u64)
    }

    /// Lends as many as one message tells of; that message.
    fn lend(&mut self, turn: Turn) -> Option<Bytes> {
        let deliveries = self.ready.take_fitting(turn.bytes().min(FRAME_BYTES));
        let count = deliveries.len();
        let places = self.places.as_mut()?.part(count);
        if self.ready.is_empty() {
            self.places = None;
        }
        // For each credit is given anew, and its lease may have ended when it is settled.
        self.chatter.earn(2 * count);
        self.shared.metrics.streamed(count);
        let events: Vec<_> = deliveries.iter().map(|delivery| delivery.received().clone()).collect();
        let ids = self.shared.leases.grant(places, deliveries, self.hold).ok()?;
        let leased: Vec<_> = ids.into_iter().zip(events).collect();
        Some(self.reader.part(turn, pull::encode(&leased, self.name.as_deref())))
    }

    /// Takes a frame: adds its credit, settles what it settles; tells whether that was something. What there is to say
    /// to it is said in its turn.
    async fn asked(&mut self, frame: &[u8]) -> bool {
        let (named, gone) = match Told::read(frame) {
            Ok(Told::Credit(credit)) => {
                self.credit = self.credit.saturating_add(credit);
                self.reader.wire.forget();
                return false;
            }
            Ok(Told::Settlements(settlements)) => {
                (settlements.len(), pull::settle_all(&self.shared.leases, &self.holder, settlements).await)
            }
            Err(problem) => (0, Err(problem)),
        };
        match gone {
            Ok(gone) if gone.is_empty() => {
                self.reader.wire.forget();
                named > 0
            }
            Ok(gone) => {
                let settles = gone.len() < named;
                self.told = tell(gone);
                settles
            }
            Err(problem) => {
                self.told.push_back(serde_json::json!({ "error": problem }).to_string().into_bytes());
                false
            }
        }
    }
}

/// The leases that no longer held, in messages of [`FRAME_BYTES`] at most, or of one.
fn tell(gone: Vec<String>) -> VecDeque<Vec<u8>> {
    const BEGIN: &[u8] = br#"{"gone":["#;
    let mut told = VecDeque::new();
    let mut message = BEGIN.to_vec();
    for lease in gone {
        let lease = serde_json::json!(lease).to_string();
        if message.len() > BEGIN.len() && message.len() + lease.len() + 3 > FRAME_BYTES {
            message.extend_from_slice(b"]}");
            told.push_back(std::mem::replace(&mut message, BEGIN.to_vec()));
        }
        if message.len() > BEGIN.len() {
            message.push(b',');
        }
        message.extend_from_slice(lease.as_bytes());
    }
    message.extend_from_slice(b"]}");
    told.push_back(message);
    told
}

/// What to say of what could not be read (RFC 6455, section 7.4.1); to a connection that broke nothing.
fn fault(error: &Error) -> Option<CloseFrame> {
    match error {
        Error::Protocol(_) => Some(goodbye(CloseCode::Protocol, "this is not the WebSocket protocol")),
        Error::Utf8(_) => Some(goodbye(CloseCode::Invalid, "a text frame is UTF-8")),
        Error::Capacity(_) => Some(goodbye(CloseCode::Size, "a message has 1 MiB at most")),
        _ => None,
    }
}

fn refusal() -> CloseFrame {
    goodbye(CloseCode::Policy, "this is no longer allowed")
}

fn goodbye(code: CloseCode, reason: &'static str) -> CloseFrame {
    CloseFrame { code, reason: reason.into() }
}

/// Writes a message of JSON in as many fragments as it takes (RFC 6455, section 5.4); `None` if one waits for its
/// reader for longer than any answer may. All of it counts as held until its last.
async fn send(socket: &mut Socket, json: Bytes, patience: Duration) -> Option<()> {
    let (mut rest, mut kind) = (json, Data::Text);
    loop {
        let fragment = rest.split_to(rest.len().min(FRAGMENT));
        let frame = Frame::message(fragment, OpCode::Data(kind), rest.is_empty());
        timeout(patience, socket.send(Message::Frame(frame))).await.ok()?.ok()?;
        if rest.is_empty() {
            return Some(());
        }
        kind = Data::Continue;
    }
}
