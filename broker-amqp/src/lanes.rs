//! Order by key: of one key one delivery is out at a time, in the order they came.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

/// Deliveries waiting for a member. Where order is kept, what has a key waits behind the one of its
/// key that is out (or held for its retry); what has none waits for nobody.
#[derive(Debug)]
pub(crate) struct Lanes<T> {
    ordered: bool,
    ready: VecDeque<T>,
    /// A key that has one out, ready or held; and who waits behind it.
    busy: HashMap<Bytes, VecDeque<T>>,
}

impl<T> Lanes<T> {
    pub(crate) fn new(ordered: bool) -> Self {
        Self { ordered, ready: VecDeque::new(), busy: HashMap::new() }
    }

    /// One more came.
    pub(crate) fn push(&mut self, key: Option<&Bytes>, item: T) {
        match key.filter(|_| self.ordered).map(|key| self.busy.entry(Bytes::clone(key))) {
            Some(Entry::Occupied(mut waiting)) => waiting.get_mut().push_back(item),
            Some(Entry::Vacant(free)) => {
                free.insert(VecDeque::new());
                self.ready.push_back(item);
            }
            None => self.ready.push_back(item),
        }
    }

    /// Holds a key back for one of it that waits elsewhere, and comes [`again`](Self::again). False if none can be held back: it has
    /// none, or another of it is out.
    pub(crate) fn hold(&mut self, key: Option<&Bytes>) -> bool {
        match key.filter(|_| self.ordered).map(|key| self.busy.entry(Bytes::clone(key))) {
            Some(Entry::Vacant(free)) => {
                free.insert(VecDeque::new());
                true
            }
            Some(Entry::Occupied(_)) | None => false,
        }
    }

    /// The next to hand out.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.ready.pop_front()
    }

    /// One that was held is due again, before all others of its key.
    pub(crate) fn again(&mut self, item: T) {
        self.ready.push_front(item);
    }

    /// The one of `key` that was out is settled: the next of it may go.
    pub(crate) fn done(&mut self, key: Option<&Bytes>) {
        let Some(key) = key.filter(|_| self.ordered) else { return };
        if let Some(waiting) = self.busy.get_mut(key) {
            match waiting.pop_front() {
                Some(next) => self.ready.push_back(next),
                None => drop(self.busy.remove(key)),
            }
        }
    }

    /// The one of `key` that was out goes back to the server: so must all behind it, or they would
    /// overtake it.
    pub(crate) fn give_back(&mut self, key: Option<&Bytes>) -> VecDeque<T> {
        key.filter(|_| self.ordered).and_then(|key| self.busy.remove(key)).unwrap_or_default()
    }

    /// Takes everything that waits; what is out or held stays.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        let mut all: Vec<T> = self.ready.drain(..).collect();
        self.busy.values_mut().for_each(|waiting| all.extend(waiting.drain(..)));
        all
    }

    /// Waiting.
    pub(crate) fn len(&self) -> usize {
        self.ready.len() + self.busy.values().map(VecDeque::len).sum::<usize>()
    }

    /// Whether anything can be handed out.
    pub(crate) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn one_of_a_key_is_out_and_in_order(
            keys in proptest::collection::vec(0_u8..4, 1..60),
            steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..300),
        ) {
            let mut lanes = Lanes::new(true);
            let key = |number: u8| (number > 0).then(|| Bytes::from(vec![number]));
            for (place, number) in keys.iter().enumerate() {
                lanes.push(key(*number).as_ref(), (*number, place));
            }
            let (mut out, mut done) = (Vec::<(u8, usize)>::new(), Vec::<(u8, usize)>::new());
            for (take, index) in steps {
                if take {
                    if let Some(item) = lanes.pop() {
                        prop_assert!(item.0 == 0 || out.iter().all(|other| other.0 != item.0), "two of a key are out");
                        out.push(item);
                    }
                } else if !out.is_empty() {
                    let item = out.remove(index.index(out.len()));
                    lanes.done(key(item.0).as_ref());
                    done.push(item);
                }
            }
            for number in 1..4 {
                let places: Vec<_> = done.iter().filter(|item| item.0 == number).map(|item| item.1).collect();
                prop_assert!(places.is_sorted(), "key {number} went in the order {places:?}");
            }
            prop_assert_eq!(lanes.len() + out.len() + done.len(), keys.len());
        }
    }

    #[test]
    fn what_was_held_comes_before_those_behind_it() {
        let mut lanes = Lanes::new(true);
        let key = Bytes::from_static(b"k");
        lanes.push(Some(&key), 1);
        lanes.push(Some(&key), 2);
        assert_eq!((lanes.pop(), lanes.pop()), (Some(1), None));
        lanes.again(1);
        assert_eq!((lanes.pop(), lanes.pop()), (Some(1), None));
        assert_eq!(lanes.give_back(Some(&key)), [2]);
        lanes.push(Some(&key), 3);
        assert_eq!(lanes.pop(), Some(3));
        assert!(!lanes.hold(Some(&key)), "another is out");
        lanes.done(Some(&key));
        // As one that comes back with its retry not due.
        assert!(lanes.hold(Some(&key)) && !lanes.hold(None));
        lanes.push(Some(&key), 5);
        assert_eq!(lanes.pop(), None);
        lanes.again(4);
        assert_eq!((lanes.pop(), lanes.pop()), (Some(4), None));
        lanes.done(Some(&key));
        assert_eq!(lanes.pop(), Some(5));
    }
}
