//! What is encoded and not sent yet: answers with messages in them, and the bodies of pushes.
//!
//! Encoding copies. A message is held once, however many it is for; encoded for a thousand readers that do not read, it
//! would be there a thousand times more. So whoever encodes waits for a turn while what others encoded holds as much as
//! it may. None is refused: it is what takes messages out.
//!
//! Whoever is slow to take what is encoded for it keeps its room, and so it must not be all there is: nobody has more than
//! what is still free beside it (the dynamic threshold of Choudhury and Hahne, 1998). One that takes nothing leaves half to
//! the others, two leave a third. Those who wait have their turns one after the other, and each of them in the order in
//! which it asked. A turn says how much it is for: what it takes at least, and up to how much more there was room.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Shared by all that encode; a clone is the same.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing(Arc<Held>);

#[derive(Debug)]
struct Held {
    /// As in the table, to be read without it.
    bytes: AtomicU64,
    table: Mutex<Table>,
}

/// What is encoded for one of those among whom the room is shared; a clone is the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part(Arc<AtomicU64>);

impl Part {
    /// Changed with the table locked alone.
    fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether it has clones.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The same for its clones alone.
    fn key(&self) -> usize {
        Arc::as_ptr(&self.0) as usize
    }
}

impl Outgoing {
    /// Nobody encodes more while there are `max` bytes.
    pub(crate) fn new(max: u64) -> Self {
        let table = Table { bytes: 0, max, asked: 0, waiting: BTreeMap::new(), order: VecDeque::new() };
        Self(Arc::new(Held { bytes: AtomicU64::new(0), table: Mutex::new(table) }))
    }

    /// From now on this bound.
    pub(crate) fn set_max(&self, max: u64) {
        self.0.change(|table| table.max = max);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// What may be the size of one among several.
    pub(crate) fn quarter(&self) -> u64 {
        self.0.table.lock().quarter()
    }

    /// The turn to encode about so many bytes, if there is room for the least of it and nobody of the same part waits.
    pub(crate) fn try_turn(&self, part: &Part, about: RangeInclusive<u64>) -> Option<Turn> {
        let mut table = self.0.table.lock();
        if table.waiting.contains_key(&part.key()) {
            return None;
        }
        let bytes = table.room(part, &about)?;
        table.take(&self.0, part, bytes);
        drop(table);
        Some(Turn { part: part.clone(), bytes, held: Arc::clone(&self.0) })
    }

    /// The same, once there is room.
    pub(crate) async fn turn(&self, part: &Part, about: RangeInclusive<u64>) -> Turn {
        loop {
            if let Some(turn) = self.try_turn(part, about.clone()) {
                return turn;
            }
            let (give, given) = oneshot::channel();
            let mut place = None;
            // Room made before this is seen here, room made after it is given to who waits.
            self.0.change(|table| place = Some(table.ask(part, Waiting { about: about.clone(), give })));
            let _asked = place.map(|number| Asked { held: &self.0, key: part.key(), number });
            // It is given or, which does not happen, asked for anew.
            if let Ok(turn) = given.await {
                return turn;
            }
        }
    }

    /// Counts what was encoded until it is sent, or dropped.
    pub(crate) fn carry(&self, part: &Part, encoded: Vec<u8>) -> Bytes {
        let bytes = encoded.capacity() as u64;
        self.0.table.lock().take(&self.0, part, bytes);
        Bytes::from_owner(Carried { encoded, _room: Turn { part: part.clone(), bytes, held: Arc::clone(&self.0) } })
    }
}

/// Room for what is about to be encoded, or was; given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    part: Part,
    bytes: u64,
    held: Arc<Held>,
}

impl Turn {
    /// How many there is room for, about.
    pub(crate) fn bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held.change(|table| table.give_back(&self.held, &self.part, self.bytes));
    }
}

struct Carried {
    encoded: Vec<u8>,
    _room: Turn,
}

impl AsRef<[u8]> for Carried {
    fn as_ref(&self) -> &[u8] {
        &self.encoded
    }
}

/// Waits no more when dropped.
struct Asked<'a> {
    held: &'a Arc<Held>,
    key: usize,
    number: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.held.table.lock().forget(self.key, self.number);
    }
}

impl Held {
    /// Changes the table, and gives the turns that there is room for then.
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut Table)) {
        let given = {
            let mut table = self.table.lock();
            change(&mut table);
            table.turns(self)
        };
        // Who waits no more gives its turn back, for which the table must be free.
        for (give, turn) in given {
            drop(give.send(turn));
        }
    }
}

#[derive(Debug)]
struct Table {
    bytes: u64,
    max: u64,
    /// How often a turn was waited for.
    asked: u64,
    /// By the key of their part, and in the order in which they asked.
    waiting: BTreeMap<usize, (Part, BTreeMap<u64, Waiting>)>,
    /// The keys, in the order in which their turn is.
    order: VecDeque<usize>,
}

#[derive(Debug)]
struct Waiting {
    about: RangeInclusive<u64>,
    give: oneshot::Sender<Turn>,
}

impl Table {
    fn quarter(&self) -> u64 {
        (self.max / 4).max(1)
    }

    /// How much of it the part may take: no more than then leaves as much as it has. What is larger than any should be
    /// passes for a quarter of all, so that it has its turn too.
    fn room(&self, part: &Part, about: &RangeInclusive<u64>) -> Option<u64> {
        let (least, most) = (*about.start(), *about.end());
        let room = self.max.saturating_sub(self.bytes).saturating_sub(part.bytes()) / 2;
        let enough = least.clamp(1, self.quarter());
        (room >= enough || self.bytes == 0).then(|| most.min(room).max(least).max(1))
    }

    fn take(&mut self, held: &Held, part: &Part, bytes: u64) {
        part.add(bytes);
        self.bytes += bytes;
        held.bytes.store(self.bytes, Ordering::Relaxed);
    }

    fn give_back(&mut self, held: &Held, part: &Part, bytes: u64) {
        part.sub(bytes);
        self.bytes -= bytes;
        held.bytes.store(self.bytes, Ordering::Relaxed);
    }

    fn ask(&mut self, part: &Part, waiting: Waiting) -> u64 {
        let key = part.key();
        let (_, queue) = self.waiting.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            (part.clone(), BTreeMap::new())
        });
        self.asked += 1;
        queue.insert(self.asked, waiting);
        self.asked
    }

    fn forget(&mut self, key: usize, number: u64) {
        let Some((_, queue)) = self.waiting.get_mut(&key) else { return };
        if queue.remove(&number).is_some() && queue.is_empty() {
            self.waiting.remove(&key);
            self.order.retain(|other| *other != key);
        }
    }

    /// Turns that there is room for, taken.
    fn turns(&mut self, held: &Arc<Held>) -> Vec<(oneshot::Sender<Turn>, Turn)> {
        let mut turns = Vec::new();
        while self.bytes < self.max {
            let may = |(at, key)| {
                let (part, queue) = self.waiting.get(key)?;
                let (_, first) = queue.first_key_value()?;
                Some((at, self.room(part, &first.about)?))
            };
            let Some((at, bytes)) = self.order.iter().enumerate().find_map(may) else { break };
            let Some(key) = self.order.remove(at) else { break };
            let Some((part, mut queue)) = self.waiting.remove(&key) else { continue };
            let first = queue.pop_first();
            if !queue.is_empty() {
                self.waiting.insert(key, (part.clone(), queue));
                self.order.push_back(key);
            }
            if let Some((_, Waiting { give, .. })) = first {
                self.take(held, &part, bytes);
                turns.push((give, Turn { part, bytes, held: Arc::clone(held) }));
            }
        }
        turns
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn what_is_carried_counts_until_its_last_part_is_gone() {
        let outgoing = Outgoing::new(1_000);
        let mut whole = outgoing.carry(&Part::default(), vec![1; 100]);
        let part = whole.split_to(10);
        drop(whole);
        assert_eq!((outgoing.bytes(), part.len()), (100, 10));
        drop(part);
        assert_eq!(outgoing.bytes(), 0);
    }

    #[tokio::test]
    async fn whoever_encodes_waits_for_room() {
        let outgoing = Outgoing::new(100);
        drop(outgoing.turn(&Part::default(), 1..=1).await);
        let parts = [Part::default(), Part::default(), Part::default()];
        let (first, second) = (outgoing.carry(&parts[0], vec![0; 99]), outgoing.carry(&parts[1], vec![0; 97]));
        let mut turn = pin!(outgoing.turn(&parts[2], 1..=1));
        assert!(turn.as_mut().now_or_never().is_none());
        drop(first);
        drop(turn.await);
        let third = outgoing.carry(&parts[0], vec![0; 3]);
        let mut turn = pin!(outgoing.turn(&parts[2], 1..=1));
        assert!(turn.as_mut().now_or_never().is_none());
        outgoing.set_max(102);
        drop(turn.await);
        drop((second, third));
        assert_eq!(outgoing.bytes(), 0);
    }

    #[tokio::test]
    async fn nobody_takes_what_is_left_for_the_others() {
        let outgoing = Outgoing::new(800);
        let (greedy, modest) = (Part::default(), Part::default());
        let mut held = Vec::new();
        while let Some(_turn) = outgoing.try_turn(&greedy, 100..=100) {
            held.push(outgoing.carry(&greedy, vec![0; 100]));
        }
        assert_eq!(outgoing.bytes(), 400);
        let mut more = pin!(outgoing.turn(&greedy, 100..=100));
        assert!(more.as_mut().now_or_never().is_none());
        // Whoever waits for itself keeps nobody else waiting.
        let other = outgoing.turn(&modest, 100..=100).now_or_never().unwrap();
        held.truncate(2);
        assert!(more.as_mut().now_or_never().is_some());
        drop((other, held));
        assert_eq!((outgoing.bytes(), greedy.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn a_turn_is_for_what_there_is_room_for() {
        let outgoing = Outgoing::new(800);
        let ask = |part: &Part, about| outgoing.try_turn(part, about);
        let greedy = Part::default();
        // Half of all, however much is asked for.
        let first = ask(&greedy, 1..=10_000).unwrap();
        assert_eq!(first.bytes(), 400);
        assert!(ask(&greedy, 1..=1).is_none());
        // And half of what is left for the next.
        let second = ask(&Part::default(), 1..=10_000).unwrap();
        assert_eq!(second.bytes(), 200);
        assert!(ask(&Part::default(), 101..=101).is_none());
        let small = ask(&Part::default(), 60..=70).unwrap();
        assert_eq!(small.bytes(), 70);
        drop((first, second, small));
        // What is larger than all has its turn where a quarter would.
        let large = ask(&greedy, 5_000..=10_000).unwrap();
        assert_eq!(large.bytes(), 5_000);
        drop(large);
        let first = ask(&greedy, 300..=300).unwrap();
        assert!(ask(&Part::default(), 5_000..=5_000).is_some());
        let second = ask(&Part::default(), 110..=110).unwrap();
        assert!(ask(&Part::default(), 5_000..=5_000).is_none());
        drop((first, second));
        assert_eq!(outgoing.bytes(), 0);
    }

    #[tokio::test]
    async fn turns_come_in_the_order_in_which_they_were_asked_for() {
        let outgoing = Outgoing::new(100);
        let (many, one) = (Part::default(), Part::default());
        let full = outgoing.carry(&Part::default(), vec![0; 100]);
        let told = Arc::new(Mutex::new(Vec::new()));
        let ask = |name: &'static str, part: &Part, about: u64| {
            let (outgoing, part, told) = (outgoing.clone(), part.clone(), Arc::clone(&told));
            tokio::spawn(async move {
                let turn = outgoing.turn(&part, about..=about).await;
                told.lock().push(name);
                drop(turn);
            })
        };
        // Each takes all there is, however much it asks for. One of them leaves.
        let mut asked = Vec::new();
        for (name, part, about) in
            [("a", &many, 200), ("b", &many, 100), ("gone", &many, 100), ("c", &many, 300), ("d", &one, 200)]
        {
            asked.push(ask(name, part, about));
            tokio::task::yield_now().await;
        }
        asked.remove(2).abort();
        tokio::task::yield_now().await;
        assert!(told.lock().is_empty());
        drop(full);
        for asked in asked {
            asked.await.unwrap();
        }
        assert_eq!(*told.lock(), ["a", "d", "b", "c"]);
        let table = outgoing.0.table.lock();
        assert!(table.bytes == 0 && table.waiting.is_empty() && table.order.is_empty());
    }
}
