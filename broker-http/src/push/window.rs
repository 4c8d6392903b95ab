//! How many requests an endpoint gets at a time.
//!
//! Slow start, additive increase, multiplicative decrease, as TCP does it (RFC 5681): the window
//! starts at one, grows by one with every success until it met trouble once or reached its limit,
//! then by one per window; 429, 503 and timeouts halve it, at most once per round trip.

/// The window of one endpoint.
#[derive(Debug)]
pub(crate) struct Window {
    size: u32,
    max: u32,
    /// Below this the window grows with every success.
    threshold: u32,
    /// Successes since the last step, above the threshold.
    credit: u32,
    /// The number of the next request.
    next: u64,
    /// Trouble of a request with a lower number was answered already.
    answered: u64,
}

/// The number of a request, by which its outcome is told to the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    number: u64,
    /// How many were in flight then, itself included.
    in_flight: u32,
}

impl Window {
    /// A window of `max` requests at most, which starts at one.
    pub(crate) fn new(max: u32) -> Self {
        let max = max.max(1);
        Self { size: 1, max, threshold: max, credit: 0, next: 0, answered: 0 }
    }

    /// Requests that may be in flight at a time.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// A request is sent; so many are in flight now, itself included.
    pub(crate) fn sent(&mut self, in_flight: u32) -> Ticket {
        let number = self.next;
        self.next += 1;
        Ticket { number, in_flight }
    }

    /// A request succeeded. A window that was not used does not grow: nothing is known about it.
    pub(crate) fn succeeded(&mut self, ticket: Ticket) {
        if self.size >= self.max || ticket.in_flight.saturating_mul(2) < self.size {
            return;
        }
        if self.size < self.threshold {
            self.size += 1;
            return;
        }
        self.credit += 1;
        if self.credit >= self.size {
            self.credit = 0;
            self.size += 1;
        }
    }

    /// A request met 429, 503 or a timeout. What was sent before the last halving says nothing new.
    pub(crate) fn overloaded(&mut self, ticket: Ticket) {
        if ticket.number < self.answered {
            return;
        }
        self.size = (self.size / 2).max(1);
        self.threshold = self.size;
        self.credit = 0;
        self.answered = self.next;
    }

    /// The endpoint was away: begin as with a new one.
    pub(crate) fn restart(&mut self) {
        *self = Self { next: self.next, answered: self.next, ..Self::new(self.max) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends a whole window, and lets it succeed.
    fn round(window: &mut Window) {
        let size = window.size();
        let sent: Vec<_> = (0..size).map(|_| window.sent(size)).collect();
        sent.into_iter().for_each(|ticket| window.succeeded(ticket));
    }

    fn halve(window: &mut Window) {
        let ticket = window.sent(1);
        window.overloaded(ticket);
    }

    #[test]
    fn doubles_per_round_then_grows_by_one_per_window() {
        let mut window = Window::new(64);
        let mut sizes = Vec::new();
        for _ in 0..8 {
            sizes.push(window.size());
            round(&mut window);
        }
        assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 64]);
        halve(&mut window);
        assert_eq!(window.size(), 32);
        round(&mut window);
        assert_eq!(window.size(), 33);
        round(&mut window);
        assert_eq!(window.size(), 34);
    }

    #[test]
    fn halves_once_per_round_trip() {
        let mut window = Window::new(64);
        (0..6).for_each(|_| round(&mut window));
        let sent: Vec<_> = (0..64).map(|_| window.sent(64)).collect();
        sent.into_iter().for_each(|ticket| window.overloaded(ticket));
        assert_eq!(window.size(), 32);
        halve(&mut window);
        assert_eq!(window.size(), 16);
        (0..10).for_each(|_| halve(&mut window));
        assert_eq!(window.size(), 1);
    }

    #[test]
    fn an_unused_window_does_not_grow() {
        let mut window = Window::new(64);
        (0..3).for_each(|_| round(&mut window));
        assert_eq!(window.size(), 8);
        for _ in 0..100 {
            let ticket = window.sent(1);
            window.succeeded(ticket);
        }
        assert_eq!(window.size(), 8);
    }

    #[test]
    fn starts_again_after_an_absence() {
        let mut window = Window::new(64);
        (0..3).for_each(|_| round(&mut window));
        let straggler = window.sent(8);
        window.restart();
        assert_eq!(window.size(), 1);
        round(&mut window);
        window.overloaded(straggler);
        assert_eq!(window.size(), 2, "what was sent before says nothing new");
    }

    proptest! {
        #[test]
        fn stays_between_one_and_its_limit(max in 0_u32..100, steps in prop::collection::vec(0_u8..5, 0..400)) {
            let mut window = Window::new(max);
            let mut out = Vec::new();
            for step in steps {
                let before = window.size();
                match step {
                    0 | 1 => out.push(window.sent(out.len() as u32 + 1)),
                    2 => { if let Some(ticket) = out.pop() { window.succeeded(ticket) } }
                    3 => { if let Some(ticket) = out.pop() { window.overloaded(ticket) } }
                    _ => { if !out.is_empty() { window.overloaded(out.remove(0)) } }
                }
                prop_assert!((1..=max.max(1)).contains(&window.size()));
                prop_assert!(window.size() <= before + 1 && window.size() >= before / 2);
            }
        }
    }
}
