//! The places of connections: so many may be open, and none of the addresses they come from holds more than it
//! must where others find no place.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use super::access::network;
use super::activity::Activity;

/// Connections of one address that are looked at to find one that gives way, and addresses so looked through.
/// Both bound what a newcomer costs; who is not found for it is looked at for the next.
const LOOKED_AT: usize = 64;
const HOLDERS: usize = 8;

/// Where connections come from: an address, of IPv6 a /64; this machine's own sockets have none.
type Origin = Option<IpAddr>;

/// The places of a server's connections, over all its listeners.
#[derive(Debug, Default)]
pub(crate) struct Places(Arc<Mutex<Table>>);

/// A connection's place among all that may be open; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    table: Arc<Mutex<Table>>,
    origin: Origin,
    number: u64,
}

impl Places {
    /// A place among so many for a connection from this address, and whether another connection gave way for it.
    ///
    /// Where all are taken, one gives way that is at no request: of the address that holds most, if that still holds
    /// as many as the newcomer's own then; so addresses of equal shares never take each other's.
    pub(crate) fn take(&self, address: Option<IpAddr>, most: usize, activity: &Arc<Activity>) -> Option<(Place, bool)> {
        let origin = address.map(network);
        let mut table = self.0.lock();
        let full = table.open >= most;
        if full && !table.make_room_for(origin) {
            return None;
        }
        let number = table.insert(origin, Arc::clone(activity));
        Some((Place { table: Arc::clone(&self.0), origin, number }, full))
    }
}

impl Place {
    /// From now on its connection gives way to nobody: it was upgraded, and is at that for as long as it stands.
    pub(crate) fn keep(&self) {
        if let Some(holder) = self.table.lock().holders.get_mut(&self.origin)
            && let Some(activity) = holder.connections.get_mut(&self.number)
        {
            *activity = None;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.lock().remove(self.origin, self.number);
    }
}

#[derive(Debug, Default)]
struct Table {
    open: usize,
    /// Given to the next connection.
    next: u64,
    holders: BTreeMap<Origin, Holder>,
    /// The same by how many they hold.
    by_count: BTreeSet<(usize, Origin)>,
}

/// An address that holds connections.
#[derive(Debug, Default)]
struct Holder {
    /// In the order in which they came; of one that gives way to nobody nothing more is known.
    connections: BTreeMap<u64, Option<Arc<Activity>>>,
    /// All before it were at a request when they were last looked at.
    from: u64,
}

impl Table {
    fn insert(&mut self, origin: Origin, activity: Arc<Activity>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.open += 1;
        let holder = self.holders.entry(origin).or_default();
        self.by_count.remove(&(holder.connections.len(), origin));
        holder.connections.insert(number, Some(activity));
        self.by_count.insert((holder.connections.len(), origin));
        number
    }

    fn remove(&mut self, origin: Origin, number: u64) {
        let Some(holder) = self.holders.get_mut(&origin) else { return };
        let before = holder.connections.len();
        // Not there if it gave way.
        if holder.connections.remove(&number).is_none() {
            return;
        }
        self.open -= 1;
        self.by_count.remove(&(before, origin));
        if holder.connections.is_empty() {
            self.holders.remove(&origin);
        } else {
            self.by_count.insert((holder.connections.len(), origin));
        }
    }

    /// Has a connection give way to one from here.
    fn make_room_for(&mut self, origin: Origin) -> bool {
        let own = self.holders.get(&origin).map_or(0, |holder| holder.connections.len());
        let larger = self.by_count.iter().rev().take_while(|(count, _)| *count > own + 1).take(HOLDERS);
        let larger: Vec<Origin> = larger.map(|(_, origin)| *origin).collect();
        for origin in larger {
            if let Some(number) = self.holders.get_mut(&origin).and_then(Holder::yield_one) {
                self.remove(origin, number);
                return true;
            }
        }
        false
    }
}

impl Holder {
    /// Ends the connection that has been at no request for longest, of those looked at.
    fn yield_one(&mut self) -> Option<u64> {
        let turn = self.connections.range(self.from..).chain(self.connections.range(..self.from));
        let (mut quiet, mut last) = (Vec::new(), self.from);
        for (number, activity) in turn.take(LOOKED_AT) {
            last = *number;
            let since = activity.as_ref().and_then(|activity| activity.quiet_since());
            quiet.extend(since.map(|since| (since, *number)));
        }
        quiet.sort_unstable();
        // One at which a request has begun meanwhile stays.
        let gives_way = |number: &u64| self.connections.get(number)?.as_ref().map(|activity| activity.give_way());
        let gone = quiet.into_iter().map(|(_, number)| number).find(|number| gives_way(number) == Some(true));
        if gone.is_none() {
            self.from = last + 1;
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::super::activity::Busy;
    use super::*;

    const MOST: usize = 200;

    /// A connection that does nothing by itself.
    struct Open {
        activity: Arc<Activity>,
        place: Place,
        gave_way: bool,
        task: tokio::task::JoinHandle<()>,
    }

    fn open(places: &Places, address: &str) -> Option<Open> {
        let activity = Arc::<Activity>::default();
        let (place, gave_way) = places.take(address.parse().ok(), MOST, &activity)?;
        let task = tokio::spawn(std::future::pending());
        activity.served_by(task.abort_handle());
        Some(Open { activity, place, gave_way, task })
    }

    async fn is_gone(open: &mut Open) -> bool {
        let ended = tokio::time::timeout(std::time::Duration::from_millis(1), &mut open.task).await;
        ended.is_ok_and(|ended| ended.is_err_and(|error| error.is_cancelled()))
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_quiet_of_the_largest_share_gives_way() {
        let places = Places::default();
        let mut flood: Vec<_> = (0..MOST).map(|_| open(&places, "10.0.0.9").unwrap()).collect();
        assert!(open(&places, "10.0.0.9").is_none(), "its own flood is no reason");
        // The first is at a request, the second was just now.
        let busy = Busy::begin(&flood[0].activity);
        drop(Busy::begin(&flood[1].activity));
        let guest = open(&places, "10.0.0.1").unwrap();
        assert!(guest.gave_way);
        assert!(is_gone(&mut flood[2]).await);
        assert!(!is_gone(&mut flood[0]).await && !is_gone(&mut flood[1]).await && !is_gone(&mut flood[3]).await);
        drop(busy);
        // A place given back is nobody's, and one that gave way is given back once.
        drop(flood.remove(2));
        drop(flood.pop());
        assert!(!open(&places, "10.0.0.1").unwrap().gave_way);
        assert_eq!(places.0.lock().open, MOST - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn equal_shares_do_not_chase_each_other_out() {
        let places = Places::default();
        let _flood: Vec<_> = (0..MOST).map(|_| open(&places, "10.0.0.9").unwrap()).collect();
        let others: Vec<_> = std::iter::from_fn(|| open(&places, "2001:db8::1")).take(MOST).collect();
        assert_eq!(others.len(), MOST / 2);
        for address in ["10.0.0.9", "2001:db8::1", "2001:db8::2:0:0:1", "::ffff:10.0.0.9"] {
            assert!(open(&places, address).is_none(), "{address}");
        }
        let (guest, own) = (open(&places, "2001:db8:0:1::1"), open(&places, ""));
        assert!(guest.is_some() && own.is_some(), "another /64, and this machine's own sockets");
        drop((guest, own));
        drop(others);
        assert_eq!(places.0.lock().by_count.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_at_a_request_is_passed_by_however_many() {
        let places = Places::default();
        let flood: Vec<_> = (0..MOST).map(|_| open(&places, "10.0.0.9").unwrap()).collect();
        let mut busy: Vec<_> = flood.iter().map(|open| Busy::begin(&open.activity)).collect();
        for _ in 0..10 {
            assert!(open(&places, "10.0.0.1").is_none());
        }
        busy.swap_remove(150);
        // It is among those looked at sooner or later.
        let guest = (0..=MOST / LOOKED_AT).find_map(|_| open(&places, "10.0.0.1"));
        assert!(guest.is_some_and(|guest| guest.gave_way));
        assert!(flood[150].activity.has_given_way() && !flood[149].activity.has_given_way());
        assert!(flood.iter().all(|open| open.place.origin.is_some()));
    }
}
