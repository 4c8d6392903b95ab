//! From publish to push, at half of the load that we can take, offered at a fixed rate whatever the
//! answers do: our server beside a bare relay on hyper, which answers a POST and sends the body on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::Notify;

use super::bare::{self, Client};
use super::load::{closed_loop, open_loop, publish_request};
use super::{CONNECTIONS, Ours, PAYLOAD, bounded};
use crate::comparison::{Comparison, Pair, Unit};
use crate::{Failure, Result};

const TOPIC: &str = "orders.created";

/// Seconds a round offers load for.
const SECONDS: f64 = 1.0;

/// Messages the relay holds at most.
const RELAY_CAPACITY: usize = 1_000_000;

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![Comparison::new("http/latency/p99_at_half_load", Unit::P99Micros, 0.5, async || {
        let clock = Clock::start();
        let (our_arrivals, their_arrivals) = (Arrivals::start(1, clock).await?, Arrivals::start(1, clock).await?);

        let ours = Arc::new(Ours::start().await?);
        let endpoint = our_arrivals.urls().next().ok_or("there is an endpoint")?;
        ours.put("push", json!({"filter": "orders.>", "endpoint": endpoint, "max_in_flight": CONNECTIONS})).await?;
        let rate = capacity(&ours, &our_arrivals, clock).await? / 2.0;

        let relay = relay(their_arrivals.addresses.first().copied().ok_or("there is an endpoint")?).await?;
        let our_side = move || {
            let (ours, arrivals) = (Arc::clone(&ours), our_arrivals.clone());
            async move { offer(ours.address, &arrivals, clock, rate).await }
        };
        let their_side = move || {
            let arrivals = their_arrivals.clone();
            async move { offer(relay, &arrivals, clock, rate).await }
        };
        Ok(Pair::new(our_side, their_side))
    })]
}

/// Messages a second that come out of our server when clients publish as fast as they are answered.
async fn capacity(ours: &Ours, arrivals: &Arrivals, clock: Clock) -> Result<f64> {
    let times = 400;
    let request = publish_request(ours.address, TOPIC, "application/octet-stream", &clock.stamped(PAYLOAD));
    let mut rate = 0.0;
    // The first time opens connections and widens the window.
    for _ in 0..2 {
        let arrived = arrivals.expect(CONNECTIONS * times);
        let began = Instant::now();
        closed_loop(ours.address, CONNECTIONS, times, request.clone()).await?;
        arrived.await?;
        rate = (CONNECTIONS * times) as f64 / began.elapsed().as_secs_f64();
    }
    Ok(rate)
}

async fn offer(address: SocketAddr, arrivals: &Arrivals, clock: Clock, rate: f64) -> Result<f64> {
    let count = (rate * SECONDS) as usize;
    let arrived = arrivals.expect(count);
    let request = || publish_request(address, TOPIC, "application/octet-stream", &clock.stamped(PAYLOAD));
    open_loop(address, CONNECTIONS, rate, count, request).await?;
    Ok(p99(arrived.await?))
}

/// Answers a POST when it has its body, and sends the body on over connections of its own.
async fn relay(to: SocketAddr) -> Result<SocketAddr> {
    let (sender, receiver) = flume::bounded::<Bytes>(RELAY_CAPACITY);
    for _ in 0..CONNECTIONS {
        let (receiver, mut client) = (receiver.clone(), Client::connect(to).await?);
        tokio::spawn(async move {
            while let Ok(body) = receiver.recv_async().await {
                client.request(Method::POST, "/", HeaderMap::new(), body).await?;
            }
            Result::Ok(())
        });
    }
    bare::serve(move |_, body| match sender.try_send(body) {
        Ok(()) => bare::answer(StatusCode::ACCEPTED, None, Bytes::from_static(b"{}")),
        Err(_) => bare::answer(StatusCode::SERVICE_UNAVAILABLE, None, Bytes::new()),
    })
    .await
}

/// The time that 99 of 100 took at most.
pub(super) fn p99(mut micros: Vec<u32>) -> f64 {
    micros.sort_unstable();
    micros.get((micros.len() * 99 / 100).saturating_sub(1)).copied().map_or(f64::NAN, f64::from)
}

/// Writes the present into payloads, and reads from them how long ago it was.
#[derive(Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    fn micros(self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A payload of this size that begins with the present.
    pub(super) fn stamped(self, size: usize) -> Bytes {
        let mut payload = BytesMut::with_capacity(size);
        payload.put_u64(self.micros());
        payload.resize(size, b'x');
        payload.freeze()
    }

    fn since(self, payload: &[u8]) -> Option<u32> {
        let stamp = u64::from_be_bytes(*payload.first_chunk()?);
        u32::try_from(self.micros().saturating_sub(stamp)).ok()
    }
}

/// Endpoints that note how long each message was on its way.
#[derive(Clone)]
pub(super) struct Arrivals {
    pub(super) addresses: Vec<SocketAddr>,
    noted: Arc<Noted>,
}

#[derive(Default)]
struct Noted {
    state: Mutex<State>,
    reached: Notify,
}

#[derive(Default)]
struct State {
    micros: Vec<u32>,
    target: usize,
}

impl Arrivals {
    pub(super) async fn start(endpoints: usize, clock: Clock) -> Result<Self> {
        let noted = Arc::<Noted>::default();
        let mut addresses = Vec::with_capacity(endpoints);
        for _ in 0..endpoints {
            let noted = Arc::clone(&noted);
            let take = move |_: &HeaderMap, body: Bytes| {
                let mut state = noted.state.lock();
                state.micros.extend(clock.since(&body));
                if state.micros.len() == state.target {
                    noted.reached.notify_one();
                }
                bare::answer(StatusCode::NO_CONTENT, None, Bytes::new())
            };
            addresses.push(bare::serve(take).await?);
        }
        Ok(Self { addresses, noted })
    }

    pub(super) fn urls(&self) -> impl Iterator<Item = String> {
        self.addresses.iter().map(|address| format!("http://{address}/"))
    }

    /// Expects so many messages; tells how many microseconds each took.
    pub(super) fn expect(&self, messages: usize) -> impl Future<Output = Result<Vec<u32>>> + use<> {
        let noted = Arc::clone(&self.noted);
        *noted.state.lock() = State { micros: Vec::with_capacity(messages), target: messages };
        async move {
            bounded("a push", async {
                while noted.state.lock().micros.len() < messages {
                    noted.reached.notified().await;
                }
                Ok(())
            })
            .await?;
            let micros = std::mem::take(&mut noted.state.lock().micros);
            if micros.len() == messages {
                return Ok(micros);
            }
            Err(Failure::from(format!("{} messages arrived where {messages} were due", micros.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p99_is_what_99_of_100_took_at_most() {
        assert_eq!(p99((1..=100).rev().collect()), 99.0);
        assert_eq!(p99((1..=1000).collect()), 990.0);
        assert!(p99(Vec::new()).is_nan());
    }

    #[test]
    fn a_payload_tells_when_it_was_made() {
        let clock = Clock::start();
        assert_eq!(clock.stamped(PAYLOAD).len(), PAYLOAD);
        assert!(clock.since(&clock.stamped(PAYLOAD)).is_some());
        assert_eq!(clock.since(b"short"), None);
    }
}
