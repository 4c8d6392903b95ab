//! What was here already: a push that is sent again word for word is told apart from one that is new.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Names a push: the hash of all that is signed of it.
pub(super) type Print = [u8; 32];

/// The pushes of the last while: bounded in number and in time, the oldest go first. Clones share it.
#[derive(Clone)]
pub(super) struct Replays(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    seen: HashMap<Print, Seen>,
    /// In the order of their coming; one that was let go of stands here until its time.
    order: VecDeque<(Instant, Print)>,
}

struct Seen {
    since: Instant,
    done: bool,
}

/// What is known of a push.
#[derive(Debug)]
pub(super) enum Known {
    /// It is new, and whoever has this is at work on it.
    New(Claim),
    /// Somebody is at work on it, or nobody knows how that ended.
    Taken,
    /// It was done.
    Done,
}

/// A push being worked on; dropped, it is as if it had never come.
pub(super) struct Claim {
    replays: Replays,
    print: Print,
    since: Instant,
    kept: bool,
}

impl Replays {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// Claims a push, of which `max` are remembered for as long as `kept`.
    pub(super) fn claim(&self, print: Print, now: Instant, kept: Duration, max: usize) -> Known {
        let mut table = self.0.lock();
        table.forget(now, kept, max);
        match table.seen.get(&print) {
            Some(Seen { done: true, .. }) => return Known::Done,
            Some(Seen { done: false, .. }) => return Known::Taken,
            None => {}
        }
        if max > 0 {
            table.seen.insert(print, Seen { since: now, done: false });
            table.order.push_back((now, print));
        }
        drop(table);
        Known::New(Claim { replays: self.clone(), print, since: now, kept: false })
    }
}

impl Table {
    /// Makes room for one more.
    fn forget(&mut self, now: Instant, kept: Duration, max: usize) {
        while let Some((since, print)) = self.order.front().copied()
            && (self.order.len() >= max || now.saturating_duration_since(since) > kept)
        {
            self.order.pop_front();
            self.remove(&print, since);
        }
    }

    /// Removes a push, unless it was let go of and has come anew.
    fn remove(&mut self, print: &Print, since: Instant) {
        if self.seen.get(print).is_some_and(|seen| seen.since == since) {
            self.seen.remove(print);
        }
    }
}

impl Claim {
    /// It is done: from now on it is a repetition.
    pub(super) fn done(mut self) {
        self.kept = true;
        if let Some(seen) = self.replays.0.lock().seen.get_mut(&self.print).filter(|seen| seen.since == self.since) {
            seen.done = true;
        }
    }

    /// Nobody will know how it ended.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            self.replays.0.lock().remove(&self.print, self.since);
        }
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claim")
    }
}

impl fmt::Debug for Replays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replays({})", self.0.lock().seen.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Duration = Duration::from_secs(600);

    fn print(number: u8) -> Print {
        [number; 32]
    }

    #[test]
    fn a_push_is_new_taken_or_done() {
        let (replays, now) = (Replays::new(), Instant::now());
        let claim = |number| replays.claim(print(number), now, KEPT, 10);
        let Known::New(first) = claim(1) else { panic!() };
        assert!(matches!(claim(1), Known::Taken));
        drop(first);
        let Known::New(second) = claim(1) else { panic!("it was let go of") };
        second.done();
        assert!(matches!(claim(1), Known::Done));
        let Known::New(third) = claim(2) else { panic!() };
        third.keep();
        assert!(matches!(claim(2), Known::Taken));
    }

    #[test]
    fn it_is_bounded_in_number_and_time() {
        let (replays, now) = (Replays::new(), Instant::now());
        for number in 0..100 {
            let Known::New(claim) = replays.claim(print(number), now, KEPT, 10) else { panic!() };
            claim.done();
        }
        assert_eq!(replays.0.lock().seen.len(), 10);
        assert_eq!(replays.0.lock().order.len(), 10);
        assert!(matches!(replays.claim(print(99), now, KEPT, 10), Known::Done));
        assert!(matches!(replays.claim(print(0), now, KEPT, 10), Known::New(_)));
        let later = now + KEPT + Duration::from_secs(1);
        assert!(matches!(replays.claim(print(99), later, KEPT, 10), Known::New(_)));
        assert!(replays.0.lock().seen.is_empty(), "and that one was let go of");
        assert!(matches!(replays.claim(print(1), later, KEPT, 0), Known::New(_)), "remembering nothing");
    }

    #[test]
    fn what_was_let_go_of_takes_no_newer_one_with_it() {
        let (replays, start) = (Replays::new(), Instant::now());
        drop(replays.claim(print(1), start, KEPT, 10));
        let later = start + KEPT;
        let Known::New(claim) = replays.claim(print(1), later, KEPT, 10) else { panic!() };
        claim.done();
        // The first one's time is over, the second one's is not.
        let Known::New(_) = replays.claim(print(2), later + Duration::from_secs(1), KEPT, 10) else { panic!() };
        assert!(matches!(replays.claim(print(1), later + Duration::from_secs(1), KEPT, 10), Known::Done));
    }
}
