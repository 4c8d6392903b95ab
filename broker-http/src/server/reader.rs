//! Among whom the room for answers is shared: identities, and where nobody needs to be known, addresses.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use broker_core::ErrorKind;
use bytes::Bytes;
use http::request::Parts;
use http::{Extensions, StatusCode};
use parking_lot::Mutex;

use super::Shared;
use super::access::{Caller, Peer, network};
use super::limits::Limits;
use super::memory::RETRY_AFTER;
use super::metrics::Refusal;
use super::owed::Pace;
use super::problem::{Answer, Problem};
use super::wire::Wire;
use crate::outgoing::{Outgoing, Part, Turn};

/// Who made a request, as far as what is encoded for it goes.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    part: Part,
    outgoing: Outgoing,
    /// Its connection, and what that is to take in time.
    pub(crate) wire: Arc<Wire>,
    pace: Pace,
}

impl Reader {
    pub(crate) fn of(shared: &Shared, extensions: &Extensions) -> Self {
        let part = match (extensions.get::<Caller>(), extensions.get::<Peer>()) {
            (Some(caller), _) => caller.answers(),
            (None, Some(peer)) => shared.readers.part(peer.address),
            // In somebody else's server nothing more is known.
            (None, None) => Part::default(),
        };
        let wire = extensions.get::<Peer>().map(|peer| Arc::clone(&peer.wire)).unwrap_or_default();
        Self { part, outgoing: shared.ledger.answers().clone(), wire, pace: pace(&shared.limits()) }
    }

    /// Waits until about so many bytes may be encoded for it.
    pub(crate) async fn turn(&self, about: RangeInclusive<u64>) -> Turn {
        self.outgoing.turn(&self.part, about).await
    }

    /// The same, and no longer than a moment.
    ///
    /// # Errors
    ///
    /// 503: what others have asked for and not read is as much as may be.
    pub(crate) async fn soon(&self, about: RangeInclusive<u64>) -> Answer<Turn> {
        tokio::time::timeout(TURN_TO_ANSWER, self.turn(about)).await.map_err(|_| Self::crowded())
    }

    /// That there was no turn in time.
    pub(crate) fn crowded() -> Problem {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Unavailable,
            "what was asked for and is not read is as much as may be; read the answers, or try again",
        )
        .retry_after(RETRY_AFTER)
        .counted(Refusal::Memory)
    }

    /// The same, if nothing is waited for.
    pub(crate) fn try_turn(&self, about: RangeInclusive<u64>) -> Option<Turn> {
        self.outgoing.try_turn(&self.part, about)
    }

    /// A whole answer, encoded in its turn: it counts until it is sent, for which it has its time.
    pub(crate) fn answer(&self, turn: Turn, encoded: Vec<u8>) -> Bytes {
        self.wire.owed.add(self.part(turn, encoded), self.pace)
    }

    /// A part of a stream. Its reader may be slow: there is one at a time, and no end to be in time for.
    pub(crate) fn part(&self, _turn: Turn, encoded: Vec<u8>) -> Bytes {
        self.outgoing.carry(&self.part, encoded)
    }
}

/// How long an answer is waited for that others leave no room for.
pub(crate) const TURN_TO_ANSWER: Duration = Duration::from_secs(5);

fn pace(limits: &Limits) -> Pace {
    Pace { patience: limits.body_timeout, bytes_per_second: limits.answer_bytes_per_second }
}

impl FromRequestParts<Arc<Shared>> for Reader {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, Infallible> {
        Ok(Self::of(shared, &parts.extensions))
    }
}

/// The parts of addresses (of IPv6, of a /64; this machine's own sockets have none) that read.
#[derive(Debug, Default)]
pub(crate) struct Readers(Mutex<Addresses>);

#[derive(Debug, Default)]
struct Addresses {
    parts: HashMap<Option<IpAddr>, Part>,
    /// With so many it is looked for those of whom nothing is left.
    look: usize,
}

/// Addresses that are kept at least, whether anything is encoded for them or not.
const KEPT: usize = 64;

impl Readers {
    fn part(&self, address: Option<IpAddr>) -> Part {
        let mut addresses = self.0.lock();
        if addresses.parts.len() >= addresses.look {
            addresses.parts.retain(|_, part| part.is_shared());
            addresses.look = addresses.parts.len() * 2 + KEPT;
        }
        addresses.parts.entry(address.map(network)).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_part_while_it_reads_and_those_that_have_read_are_forgotten() {
        let readers = Readers::default();
        let address = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        let outgoing = Outgoing::new(1_000);
        let held = outgoing.carry(&readers.part(address(0)), vec![0; 100]);
        for last in 1..=200 {
            readers.part(address(last));
        }
        assert!(readers.0.lock().parts.len() <= 2 * KEPT + 2);
        assert!(outgoing.try_turn(&readers.part(address(0)), 1..=1).is_some());
        let more = outgoing.carry(&readers.part(address(0)), vec![0; 400]);
        assert!(outgoing.try_turn(&readers.part(address(0)), 1..=1).is_none());
        assert!(outgoing.try_turn(&readers.part(None), 1..=1).is_some());
        drop((held, more));
    }
}
