//! Every order of an ack and of whoever waits for it, by shuttle's exhaustive scheduler: the tally
//! and the flag of the in-process broker's source, on shuttle's atomics. Shuttle's atomics are
//! sequentially consistent, and so are all of the tally's; loom would weaken them.

#![allow(missing_docs, dead_code, clippy::unwrap_used)]

mod atomic {
    pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}

#[path = "../src/memory/tally.rs"]
mod tally;

use shuttle::sync::{Arc, Mutex};
use shuttle::{check_dfs, thread};

use tally::{Asked, Sum, Tally};

/// What a group does with its batches, in small: what was collected stands under a lock.
struct Group {
    asked: Asked,
    batch: Tally,
    len: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    collected: Sum,
    /// A publish waits for room.
    waits: bool,
    /// It was told that there is some.
    told: bool,
}

impl Group {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self { asked: Asked::new(false), batch: Tally::new(), len, state: Mutex::default() })
    }

    fn collect(&self, state: &mut State) -> bool {
        let settled = self.batch.sum();
        let progress = settled != state.collected;
        state.collected = settled;
        state.told |= progress && state.waits;
        progress
    }

    fn ack(&self) {
        let settled = self.batch.add(10);
        if settled.messages == self.len || self.asked.get() {
            let mut state = self.state.lock().unwrap();
            self.collect(&mut state);
            if !state.waits || state.told {
                self.asked.set(false);
            }
        }
    }

    /// A publish that found no room: asks, looks, and waits if it saw nothing.
    fn wait_for_room(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        self.asked.set(true);
        let progress = self.collect(&mut state);
        state.waits = !progress;
        progress
    }
}

#[test]
fn an_ack_is_seen_by_who_waits_or_tells_it() {
    let every_order = || {
        // Three deliveries, of which one is never settled: the batch is never done by itself.
        let group = Group::new(3);
        let acks: Vec<_> = (0..2)
            .map(|_| {
                let group = Arc::clone(&group);
                thread::spawn(move || group.ack())
            })
            .collect();
        let saw = group.wait_for_room();
        acks.into_iter().for_each(|ack| ack.join().unwrap());
        let state = group.state.lock().unwrap();
        assert!(saw || state.told, "a publish waits for room that is there");
        assert_eq!(group.batch.sum(), Sum { messages: 2, bytes: 20 });
    };
    check_dfs(every_order, None);
}

#[test]
fn a_batch_that_is_done_is_collected_whole() {
    let every_order = || {
        let group = Group::new(2);
        let other = Arc::clone(&group);
        let ack = thread::spawn(move || other.ack());
        group.ack();
        ack.join().unwrap();
        assert_eq!(group.state.lock().unwrap().collected, Sum { messages: 2, bytes: 20 });
    };
    check_dfs(every_order, None);
}
