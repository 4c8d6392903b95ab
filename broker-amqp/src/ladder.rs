//! Waiting on the server: a ladder of queues, each with one time to live, whose messages the server
//! hands on when that is over.
//!
//! A TTL of a message's own is no use: it is looked at only at a queue's head, behind longer ones.
//! There are two ladders, one that leads to a queue (retries: to one group alone) and one that leads to
//! a topic (delayed publishes); 18 queues a virtual host. A wait is rounded up to a rung; what is longer
//! than the last goes round again: whoever receives it sees that it is not due.

use std::time::Duration;

use broker_core::Result;
use lapin::types::ShortString;

use crate::naming::short;

const RUNGS: [Duration; 9] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(120),
    Duration::from_secs(600),
    Duration::from_secs(3600),
];

/// What a ladder leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Leads {
    /// The queue that the routing key names.
    ToQueue,
    /// The exchange of topics.
    ToTopic,
}

/// A rung: an exchange, which keeps the routing key, and the queue behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rung {
    pub(crate) leads: Leads,
    index: usize,
}

impl Rung {
    /// The lowest that is at least `wait`; else the highest.
    pub(crate) fn of(leads: Leads, wait: Duration) -> Self {
        let index = RUNGS.iter().position(|rung| *rung >= wait).unwrap_or(RUNGS.len() - 1);
        Self { leads, index }
    }

    /// The same, for what is of no use any more when `left` is over: where rounding up would take so long, the highest below the
    /// wait, of which the rest is waited afterwards.
    pub(crate) fn before(leads: Leads, wait: Duration, left: Duration) -> Self {
        let up = Self::of(leads, wait);
        if up.ttl() < left {
            return up;
        }
        let below = RUNGS.iter().rposition(|rung| *rung <= wait);
        Self { leads, index: below.unwrap_or(up.index) }
    }

    /// All of a ladder, from the lowest.
    pub(crate) fn all(leads: Leads) -> impl Iterator<Item = Self> {
        (0..RUNGS.len()).map(move |index| Self { leads, index })
    }

    pub(crate) fn ttl(self) -> Duration {
        RUNGS.get(self.index).copied().unwrap_or(Duration::from_secs(3600))
    }

    /// What its exchange and its queue are called.
    pub(crate) fn name(self, exchange: &str) -> Result<ShortString> {
        let time = broker_core::format_duration(self.ttl());
        short(
            "a delay queue",
            &match self.leads {
                Leads::ToQueue => format!("broker.retry.{time}"),
                Leads::ToTopic => format!("broker.delay.{exchange}.{time}"),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_wait_is_a_floor_up_to_the_last_rung(millis in 0_u64..10_000_000) {
            let wait = Duration::from_millis(millis);
            let rung = Rung::of(Leads::ToQueue, wait);
            prop_assert!(rung.ttl() >= wait.min(Duration::from_secs(3600)));
        }
    }

    #[test]
    fn no_wait_is_rounded_up_beyond_an_expiry() {
        let rung = |wait, left| {
            Rung::before(Leads::ToQueue, Duration::from_secs(wait), Duration::from_secs(left)).ttl().as_secs()
        };
        assert_eq!(rung(31, 121), 120);
        assert_eq!(rung(31, 120), 30);
        assert_eq!(rung(30, 31), 30);
        assert_eq!(rung(5000, 5001), 3600);
    }

    #[test]
    fn rungs_have_names_of_their_own() {
        let names =
            [Leads::ToQueue, Leads::ToTopic].map(|leads| Rung::of(leads, Duration::from_secs(1)).name("broker"));
        let names = names.map(|name| name.unwrap().to_string());
        assert_eq!(names, ["broker.retry.2s", "broker.delay.broker.2s"]);
    }
}
