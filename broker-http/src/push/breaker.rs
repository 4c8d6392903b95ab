//! When an endpoint that only fails is left alone.
//!
//! Ten failures in a row open the breaker; while it is open nothing is sent and no attempt is
//! counted. After a second one request probes: its success closes the breaker, its failure doubles
//! the pause, up to a minute.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row that open the breaker.
const FAILURES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The breaker of one endpoint.
#[derive(Debug)]
pub(crate) struct Breaker {
    state: State,
    /// The pause before the next probe.
    pause: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
    },
    /// A probe is under way.
    Probing,
}

/// Whether a request may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Any number.
    Free,
    /// One, as a probe; see [`Breaker::probe`].
    Probe,
    /// None before this time.
    Until(Instant),
    /// None before the probe under way has ended.
    Busy,
}

impl Breaker {
    pub(crate) fn new() -> Self {
        Self { state: State::Closed { failures: 0 }, pause: FIRST_PAUSE }
    }

    /// Whether a request may be sent now.
    pub(crate) fn admits(&self, now: Instant) -> Admission {
        match self.state {
            State::Closed { .. } => Admission::Free,
            State::Open { until } if now < until => Admission::Until(until),
            State::Open { .. } => Admission::Probe,
            State::Probing => Admission::Busy,
        }
    }

    /// Whether it is open or probing.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// A probe is sent.
    pub(crate) fn probe(&mut self) {
        self.state = State::Probing;
    }

    /// A request succeeded: the endpoint is back, whichever request it was. True if that closed the
    /// breaker.
    pub(crate) fn succeeded(&mut self) -> bool {
        let closed = self.is_open();
        *self = Self::new();
        closed
    }

    /// A request failed; of those sent before the breaker opened, only the probe counts. True if
    /// that opened the breaker.
    pub(crate) fn failed(&mut self, now: Instant, probe: bool) -> bool {
        match self.state {
            State::Closed { failures } if failures + 1 < FAILURES => {
                self.state = State::Closed { failures: failures + 1 };
                false
            }
            State::Closed { .. } => {
                self.open(now);
                true
            }
            State::Probing if probe => {
                self.open(now);
                true
            }
            State::Probing | State::Open { .. } => false,
        }
    }

    fn open(&mut self, now: Instant) {
        self.state = State::Open { until: now + self.pause };
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new();
        for _ in 1..FAILURES {
            assert!(!breaker.failed(now, false));
            assert_eq!(breaker.admits(now), Admission::Free);
        }
        assert!(breaker.failed(now, false));
        breaker
    }

    #[test]
    fn opens_after_ten_failures_in_a_row() {
        let now = Instant::now();
        assert_eq!(opened(now).admits(now), Admission::Until(now + SECOND));
        let mut breaker = Breaker::new();
        for _ in 0..100 {
            (1..FAILURES).for_each(|_| assert!(!breaker.failed(now, false)));
            assert!(!breaker.succeeded());
        }
        assert!(!breaker.is_open());
    }

    #[test]
    fn one_probe_at_a_time_and_pauses_double_to_a_minute() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
            let until = now + seconds * SECOND;
            assert_eq!(breaker.admits(until - SECOND / 2), Admission::Until(until));
            assert_eq!(breaker.admits(until), Admission::Probe);
            breaker.probe();
            assert_eq!(breaker.admits(until), Admission::Busy);
            now = until;
            assert!(breaker.failed(now, true));
        }
        assert_eq!(breaker.admits(now + 60 * SECOND), Admission::Probe);
        breaker.probe();
        assert!(breaker.succeeded());
        assert_eq!(breaker.admits(now), Admission::Free);
        let breaker = opened(now);
        assert_eq!(breaker.admits(now), Admission::Until(now + SECOND), "the pauses begin again");
    }

    #[test]
    fn what_was_sent_before_it_opened_does_not_stand_for_the_probe() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert!(!breaker.failed(now, false));
        assert_eq!(breaker.admits(now), Admission::Until(now + SECOND));
        breaker.probe();
        assert!(!breaker.failed(now, false));
        assert_eq!(breaker.admits(now), Admission::Busy);
        assert!(breaker.succeeded(), "but a late success says that the endpoint lives");
    }
}
