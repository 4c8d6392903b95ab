//! `GET /topics/{filter}/stream` as a WebSocket: deliveries lent against credit, settled over the
//! same socket.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message as Frame, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use broker_core::{Delivery, GroupName, StartAt, Subscription, TopicFilter};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::Error as WebSocketError;

use super::Shared;
use super::access::Revoked;
use super::leases::Holder;
use super::problem::{Answer, Problem};
use super::pull::{self, Settlements};
use super::stream::{Place, copy, join};

/// Bytes of a frame from the other side.
const MAX_FRAME: usize = 1 << 20;

/// Bytes read from a socket at a time: each has a buffer of that size for as long as it stands.
const READ: usize = 8 << 10;

/// Deliveries sent in one frame, and lent to one socket, at most.
const AT_ONCE: usize = 64;
const MAX_LENT: usize = 10_000;

/// How long a delivery is lent, unless `?timeout=` says so or it is extended.
const DEFAULT_HOLD: Duration = Duration::from_secs(30);

/// How often the other side is asked whether it is there, and how long it may be silent.
const PING: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(45);

/// How long an ended socket waits for the other side's end.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a frame may take to be written.
const WRITE: Duration = Duration::from_secs(30);

/// Subscribes, and answers once the subscription stands.
pub(crate) async fn open(
    upgrade: WebSocketUpgrade,
    shared: Arc<Shared>,
    (place, mut revoked): (Place, Revoked),
    filter: TopicFilter,
    group: Option<GroupName>,
    hold: Option<Duration>,
) -> Answer<Response> {
    let hold = hold.unwrap_or(DEFAULT_HOLD);
    if hold.is_zero() || hold > pull::MAX_HOLD {
        return Err(Problem::invalid("query parameter timeout: it is longer than zero and 12h at most"));
    }
    let name = group.as_ref().map(GroupName::to_string);
    let subscription = match group {
        Some(group) => join(&shared, filter, group, MAX_LENT).await?,
        None => copy(&shared, &filter, StartAt::New).await?,
    };
    let lending = Lending { shared, subscription: Some(subscription), holder: Arc::default(), hold, name, credit: 0 };
    let upgrade = upgrade.max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME).read_buffer_size(READ);
    Ok(upgrade.on_upgrade(|socket| async move {
        lending.run(socket, &mut revoked).await;
        drop(place);
    }))
}

/// One socket: what is lent over it, and what may still be.
struct Lending {
    shared: Arc<Shared>,
    /// `None` once it has ended; what is lent can still be settled.
    subscription: Option<Subscription>,
    holder: Arc<Holder>,
    hold: Duration,
    name: Option<String>,
    credit: usize,
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
        // An array would be taken for the fields in their order.
        let object = frame.trim_ascii_start().first() == Some(&b'{');
        if object && let Ok(Credit { credit }) = serde_json::from_slice(frame) {
            return Ok(Self::Credit(credit as usize));
        }
        serde_json::from_slice(if object { frame } else { b"" }).map(Self::Settlements).map_err(|error| {
            Problem::invalid(format!(
                "a frame is {{\"credit\": n}} or what is settled, as in {{\"ack\": [\"lease\"]}}: {error}"
            ))
        })
    }
}

impl Lending {
    async fn run(mut self, mut socket: WebSocket, revoked: &mut Revoked) {
        let goodbye = self.serve(&mut socket, revoked).await;
        // What is still lent is due again at once.
        self.shared.leases.release_all(&self.holder);
        drop(self);
        // The other side's close frame is answered, and its answer to ours awaited: who ends first would
        // otherwise see a connection that broke (RFC 6455, section 7.1.1).
        let end = async {
            if let Some(frame) = goodbye {
                let fault = frame.code != close_code::AWAY && frame.code != close_code::POLICY;
                socket.send(Frame::Close(Some(frame))).await?;
                if fault {
                    // What follows is not understood: it is left time to be written, and the frame to be read.
                    sleep(FAREWELL).await;
                }
            }
            while socket.recv().await.transpose()?.is_some() {}
            Ok::<_, axum::Error>(())
        };
        let _ = timeout(2 * FAREWELL, end).await;
    }

    /// Serves until one side ends it; tells what to say at the end, if anybody is there to hear it.
    async fn serve(&mut self, socket: &mut WebSocket, revoked: &mut Revoked) -> Option<CloseFrame> {
        let mut ping = interval(PING);
        let mut heard = Instant::now();
        let mut batch = Vec::new();
        let cut = self.shared.connections.closing();
        loop {
            if self.subscription.is_none() && self.holder.leased() == 0 {
                return Some(goodbye(close_code::AWAY, "the subscription has ended"));
            }
            let room = self.credit.min(MAX_LENT.saturating_sub(self.holder.leased())).min(AT_ONCE);
            let places = self.shared.leases.reserve(&self.holder, room, MAX_LENT);
            let room = places.count();
            let receive = async {
                match &mut self.subscription {
                    Some(subscription) if room > 0 => subscription.receive(&mut batch, room).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = revoked.as_mut() => return Some(goodbye(close_code::POLICY, "this is no longer allowed")),
                frame = socket.recv() => {
                    drop(places);
                    heard = Instant::now();
                    match frame {
                        Some(Ok(Frame::Text(text))) => self.asked(socket, text.as_bytes()).await?,
                        Some(Ok(Frame::Binary(bytes))) => self.asked(socket, &bytes).await?,
                        Some(Ok(Frame::Ping(_) | Frame::Pong(_))) => {}
                        Some(Err(error)) => return fault(error),
                        Some(Ok(Frame::Close(_))) | None => return None,
                    }
                }
                received = receive => match received {
                    Ok(1..) => {
                        let gap = self.subscription.as_mut().and_then(Subscription::gap);
                        if let Some(gap) = gap {
                            send(socket, json!({ "gap": { "lost": gap.lost() } }).to_string().into_bytes()).await?;
                        }
                        let text = self.lend(places, std::mem::take(&mut batch))?;
                        send(socket, text).await?;
                    }
                    Ok(0) => self.subscription = None,
                    Err(error) => {
                        tracing::debug!(%error, "a socket's subscription ended");
                        self.subscription = None;
                    }
                },
                _ = ping.tick() => {
                    drop(places);
                    if heard.elapsed() > SILENCE {
                        return None;
                    }
                    timeout(WRITE, socket.send(Frame::Ping(Default::default()))).await.ok()?.ok()?;
                }
                () = cut.cancelled() => return Some(goodbye(close_code::AWAY, "the server is shutting down")),
            }
        }
    }

    /// Lends deliveries; the frame that tells of them.
    fn lend(&mut self, places: super::leases::Places, deliveries: Vec<Delivery>) -> Option<Vec<u8>> {
        self.credit -= deliveries.len().min(self.credit);
        self.shared.metrics.streamed(deliveries.len());
        let events: Vec<_> = deliveries.iter().map(|delivery| delivery.received().clone()).collect();
        let ids = self.shared.leases.grant(places, deliveries, self.hold).ok()?;
        Some(pull::encode(ids.into_iter().zip(events), self.name.as_deref()))
    }

    /// Takes a frame: adds its credit, settles what it settles.
    async fn asked(&mut self, socket: &mut WebSocket, frame: &[u8]) -> Option<()> {
        let gone = match Told::read(frame) {
            Ok(Told::Credit(credit)) => {
                self.credit = self.credit.saturating_add(credit);
                return Some(());
            }
            Ok(Told::Settlements(settlements)) => {
                pull::settle_all(&self.shared.leases, &self.holder, settlements).await
            }
            Err(problem) => Err(problem),
        };
        let answer = match gone {
            Ok(gone) if gone.is_empty() => return Some(()),
            Ok(gone) => json!({ "gone": gone }),
            Err(problem) => json!({ "error": problem }),
        };
        send(socket, answer.to_string().into_bytes()).await
    }
}

/// What to say of what could not be read (RFC 6455, section 7.4.1); to a connection that broke nothing.
fn fault(error: axum::Error) -> Option<CloseFrame> {
    match *error.into_inner().downcast::<WebSocketError>().ok()? {
        WebSocketError::Protocol(_) => Some(goodbye(close_code::PROTOCOL, "this is not the WebSocket protocol")),
        WebSocketError::Utf8(_) => Some(goodbye(close_code::INVALID, "a text frame is UTF-8")),
        WebSocketError::Capacity(_) => Some(goodbye(close_code::SIZE, "a frame has 1 MiB at most")),
        _ => None,
    }
}

fn goodbye(code: u16, reason: &'static str) -> CloseFrame {
    CloseFrame { code, reason: reason.into() }
}

/// Writes a frame of JSON; `None` if nobody takes it in time.
async fn send(socket: &mut WebSocket, json: Vec<u8>) -> Option<()> {
    // JSON is UTF-8.
    let text = String::from_utf8(json).ok()?;
    timeout(WRITE, socket.send(Frame::Text(text.into()))).await.ok()?.ok()
}
