//! What the daemon can do: HTTP carries all of the contract, so that it is what the broker behind
//! it can do. Asked when connecting; before that, what every daemon can.

use broker_core::{Capabilities, Support};
use serde::Deserialize;

/// The most the daemon lends to one subscription.
pub(super) const MAX_IN_FLIGHT: usize = 65_535;

/// What a daemon over the in-process broker with its defaults can do, as long as nobody asked.
pub(super) fn unasked() -> Capabilities {
    let mut can = Capabilities::all();
    can.max_in_flight = MAX_IN_FLIGHT;
    // There is history only where the daemon was told to retain any.
    can.start_earliest = Support::None;
    can.start_time = Support::None;
    can.start_position = Support::None;
    can
}

/// What `/readyz` answers, as far as we read it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ready {
    capabilities: Able,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Degree {
    None,
    Limited,
    Full,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Able {
    max_message_bytes: Option<usize>,
    max_in_flight: Option<usize>,
    durable: Option<bool>,
    start_earliest: Option<Degree>,
    start_time: Option<Degree>,
    start_position: Option<Degree>,
    delay: Option<Degree>,
    expiry: Option<Degree>,
    deduplication: Option<Degree>,
    tombstones: Option<Degree>,
    require_route: Option<Degree>,
    matched: Option<bool>,
    ordered: Option<Degree>,
    overflow_wait: Option<Degree>,
    overflow_reject: Option<Degree>,
    overflow_drop_oldest: Option<Degree>,
    dead_letters: Option<Degree>,
    topics_must_exist: Option<bool>,
    max_active_members: Option<usize>,
}

impl Ready {
    /// What the daemon says that it can do; what it does not say stays.
    pub(super) fn capabilities(self) -> Capabilities {
        let able = self.capabilities;
        let mut can = unasked();
        let set = |have: &mut Support, told: Option<Degree>| match told {
            Some(Degree::None) => *have = Support::None,
            Some(Degree::Limited) => *have = Support::Limited,
            Some(Degree::Full) => *have = Support::Full,
            None => {}
        };
        set(&mut can.start_earliest, able.start_earliest);
        set(&mut can.start_time, able.start_time);
        set(&mut can.start_position, able.start_position);
        set(&mut can.delay, able.delay);
        set(&mut can.expiry, able.expiry);
        set(&mut can.deduplication, able.deduplication);
        set(&mut can.tombstones, able.tombstones);
        set(&mut can.require_route, able.require_route);
        set(&mut can.ordered, able.ordered);
        set(&mut can.overflow_wait, able.overflow_wait);
        set(&mut can.overflow_reject, able.overflow_reject);
        set(&mut can.overflow_drop_oldest, able.overflow_drop_oldest);
        set(&mut can.dead_letters, able.dead_letters);
        can.max_message_bytes = able.max_message_bytes.unwrap_or(can.max_message_bytes);
        can.max_in_flight = able.max_in_flight.map_or(MAX_IN_FLIGHT, |told| told.min(MAX_IN_FLIGHT));
        can.durable = able.durable.unwrap_or(can.durable);
        can.matched = able.matched.unwrap_or(can.matched);
        can.topics_must_exist = able.topics_must_exist.unwrap_or(can.topics_must_exist);
        can.max_active_members = able.max_active_members;
        can
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_daemon_writes() {
        let mut can = Capabilities::all();
        can.delay = Support::Limited;
        can.tombstones = Support::None;
        can.max_message_bytes = 7;
        can.max_in_flight = 100;
        can.durable = true;
        can.max_active_members = Some(3);
        let json = serde_json::json!({ "broker": "kafka://x", "capabilities": can }).to_string();
        assert_eq!(serde_json::from_str::<Ready>(&json).unwrap().capabilities(), can);
        assert_eq!(serde_json::from_str::<Ready>("{}").unwrap().capabilities(), unasked());
    }
}
