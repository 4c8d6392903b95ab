//! Heads of requests over HTTP/1 that have begun and have no end yet: what they hold together is bounded.
//!
//! Each connection may hold one as large as any for as long as heads have time, before anybody knows who sends it. The
//! one begun first ends for those that go on: a head of somebody who means it is whole within moments. So is a message
//! to a WebSocket, which counts with them until what is to be said to it is told.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::activity::Activity;
use super::memory::{Ledger, Reservation};

/// Bytes of a head for which a connection has room anyway; most heads are smaller.
const FREE: usize = 8 << 10;

/// The large heads of a server's connections that have no end yet.
#[derive(Debug, Default)]
pub(crate) struct Heads(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    bytes: u64,
    /// Given to the next.
    next: u64,
    /// In the order in which they grew large.
    begun: BTreeMap<u64, (Reservation, Arc<Activity>)>,
}

/// One of them; it counts until it is dropped.
#[derive(Debug)]
pub(crate) struct Begun {
    table: Arc<Mutex<Table>>,
    number: u64,
}

impl Heads {
    /// A head has so many `bytes` so far, of `most` that all may have together. Tells how many ended for it, itself if
    /// it is the first.
    pub(crate) fn grow(
        &self,
        begun: &mut Option<Begun>,
        bytes: usize,
        most: u64,
        ledger: &Ledger,
        activity: &Arc<Activity>,
    ) -> usize {
        if bytes <= FREE {
            *begun = None;
            return 0;
        }
        let mut table = self.0.lock();
        let begun = begun.get_or_insert_with(|| {
            let number = table.next;
            table.next += 1;
            table.begun.insert(number, (ledger.grant(), Arc::clone(activity)));
            Begun { table: Arc::clone(&self.0), number }
        });
        if let Some((room, _)) = table.begun.get_mut(&begun.number) {
            let more = (bytes as u64).saturating_sub(room.bytes());
            room.add(more);
            table.bytes += more;
        }
        let mut ended = 0;
        while table.bytes > most
            && let Some(first) = table.begun.keys().next().copied()
        {
            ended += usize::from(table.remove(first).is_some_and(|activity| activity.give_way()));
        }
        ended
    }
}

impl Table {
    fn remove(&mut self, number: u64) -> Option<Arc<Activity>> {
        let (room, activity) = self.begun.remove(&number)?;
        self.bytes -= room.bytes();
        Some(activity)
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.table.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_head_begun_first_ends_for_those_that_go_on() {
        let (heads, ledger) = (Heads::default(), Ledger::new(1 << 20, 1 << 20));
        let mut open: Vec<(Option<Begun>, Arc<Activity>)> = (0..5).map(|_| (None, Arc::default())).collect();
        for (_, activity) in &open {
            activity.served_by(tokio::spawn(std::future::pending::<()>()).abort_handle());
        }
        let mut ended = 0;
        for bytes in [FREE, 2 * FREE, 4 * FREE] {
            for (begun, activity) in &mut open {
                ended += heads.grow(begun, bytes, 10 * FREE as u64, &ledger, activity);
            }
        }
        let gone: Vec<bool> = open.iter().map(|(_, activity)| activity.has_given_way()).collect();
        assert_eq!((ended, gone), (3, vec![true, true, true, false, false]));
        assert_eq!(ledger.held(), 8 * FREE as u64);
        drop(open);
        assert_eq!((ledger.held(), heads.0.lock().bytes), (0, 0));
    }
}
