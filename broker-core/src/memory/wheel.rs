//! A hierarchical timing wheel: pending delays in one structure, fired in linear time.
//!
//! Varghese and Lauck, "Hashed and Hierarchical Timing Wheels" (1987), scheme 7: seven levels of 64
//! slots, a tick of a millisecond; level *n* holds what is due within 64ⁿ⁺¹ ticks. An item moves
//! down at most six times, so that firing a million is linear; beside the item it costs an eighth of it
//! at most.

use std::mem;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
const LEVELS: usize = 7;
/// Ticks the wheel covers: 139 years.
const HORIZON: u64 = 1 << (BITS * LEVELS as u32);

/// What knows the tick it is due at; a wheel may change it, to what it can keep.
pub(super) trait Due {
    fn due(&mut self) -> &mut u64;
}

pub(super) struct Wheel<T> {
    /// Everything due at or before this tick has been fired.
    now: u64,
    len: usize,
    levels: [Level<T>; LEVELS],
}

struct Level<T> {
    /// One bit a slot that holds something.
    occupied: u64,
    slots: [Vec<T>; SLOTS],
}

impl<T: Due> Wheel<T> {
    /// An empty wheel at tick `now`. It is 11 KiB large: keep it in a box, and only while needed.
    pub(super) fn new(now: u64) -> Self {
        let level = || Level { occupied: 0, slots: [const { Vec::new() }; SLOTS] };
        Self { now, len: 0, levels: std::array::from_fn(|_| level()) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds an item; one that is due already fires on the next call, and one
    /// beyond half the horizon at half the horizon, so that no slot is taken for its own next turn.
    pub(super) fn insert(&mut self, mut item: T) {
        let due = (*item.due()).clamp(self.now + 1, self.now + HORIZON / 2);
        *item.due() = due;
        self.len += 1;
        self.place(due, item);
    }

    /// Every item, in no order.
    pub(super) fn items(&self) -> impl Iterator<Item = &T> {
        self.levels.iter().flat_map(|level| &level.slots).flatten()
    }

    /// Takes out, by a look at each, those for which `taken` holds.
    pub(super) fn take_if(&mut self, mut taken: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for level in &mut self.levels {
            for (number, slot) in level.slots.iter_mut().enumerate() {
                out.extend(slot.extract_if(.., |item| taken(item)));
                if slot.is_empty() {
                    level.occupied &= !(1 << number);
                }
            }
        }
        self.len -= out.len();
        out
    }

    fn place(&mut self, due: u64, item: T) {
        // The level is where `due` and `now` first differ, read from the top.
        let differing = (due ^ self.now) | 1;
        let level = ((63 - differing.leading_zeros()) / BITS) as usize;
        let slot = slot_of(due, level);
        // A due time across the horizon's boundary lands in the top level, which turns.
        if let Some(level) = self.levels.get_mut(level.min(LEVELS - 1)) {
            level.occupied |= 1 << slot;
            if let Some(slot) = level.slots.get_mut(slot) {
                // A million items should not hold the room of two.
                if slot.len() == slot.capacity() {
                    slot.reserve_exact((slot.len() / 8).max(4));
                }
                slot.push(item);
            }
        }
    }

    /// A tick at which it is worth calling [`fire`](Self::fire) again: never later than the
    /// earliest item is due.
    pub(super) fn next(&self) -> Option<u64> {
        self.levels.iter().enumerate().find_map(|(index, level)| {
            (level.occupied != 0).then(|| {
                let shift = BITS * index as u32;
                let current = (self.now >> shift) & (SLOTS as u64 - 1);
                let ahead = u64::from(level.occupied.rotate_right(current as u32).trailing_zeros());
                // A slot of the current turn of the level begins at this tick.
                (((self.now >> shift) + ahead) << shift).max(self.now + 1)
            })
        })
    }

    /// Hands every item due at or before `now` to `due`, in order of their ticks.
    pub(super) fn fire(&mut self, now: u64, mut due: impl FnMut(T)) {
        while let Some(next) = self.next().filter(|next| *next <= now) {
            self.now = next;
            // From the top: what moves down may land in a lower slot that begins at this tick too.
            for index in (0..LEVELS).rev() {
                let aligned = index == 0 || next.is_multiple_of(1 << (BITS * index as u32));
                let Some(level) = self.levels.get_mut(index).filter(|_| aligned) else { continue };
                let slot = slot_of(next, index);
                level.occupied &= !(1 << slot);
                let items = level.slots.get_mut(slot).map(mem::take).unwrap_or_default();
                for mut item in items {
                    let at = *item.due();
                    if at <= next {
                        self.len -= 1;
                        due(item);
                    } else {
                        self.place(at, item);
                    }
                }
            }
        }
        self.now = self.now.max(now);
    }
}

fn slot_of(tick: u64, level: usize) -> usize {
    ((tick >> (BITS * level as u32)) as usize) & (SLOTS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Due for u64 {
        fn due(&mut self) -> &mut u64 {
            self
        }
    }

    proptest! {
        #[test]
        fn fires_each_item_once_when_due_and_never_before(
            start in 0_u64..1 << 40,
            steps in proptest::collection::vec((proptest::collection::vec(0_u64..300_000, 0..8), 0_u64..400_000), 1..40),
        ) {
            let mut wheel = Wheel::new(start);
            let (mut now, mut pending) = (start, Vec::new());
            for (delays, advance) in steps {
                for delay in delays {
                    wheel.insert(now + delay);
                    pending.push((now + delay).max(now + 1));
                }
                if let Some(next) = wheel.next() {
                    prop_assert!(next > now);
                    prop_assert!(pending.iter().all(|due| next <= *due));
                }
                now += advance;
                let mut fired = Vec::new();
                wheel.fire(now, |due| fired.push(due));
                prop_assert!(fired.is_sorted());
                let mut expected: Vec<u64> = pending.extract_if(.., |due| *due <= now).collect();
                expected.sort_unstable();
                prop_assert_eq!(fired, expected);
                prop_assert_eq!(wheel.len, pending.len());
            }
        }
    }

    #[test]
    fn the_far_future_is_kept_too() {
        let mut wheel = Wheel::new(5);
        wheel.insert(u64::MAX);
        wheel.insert(1 << 41);
        assert_eq!(wheel.len, 2);
        let mut fired = 0;
        wheel.fire(1 << 41, |_| fired += 1);
        assert_eq!((fired, wheel.len), (1, 1));
    }
}
