//! Which deliveries of a channel are settled, and how that is said on the wire.
//!
//! To the user an ack is exact. On the wire one `multiple` ack can stand for every delivery up to its
//! own, so that acks of contiguous deliveries, which are most, cost one frame for many. Such a one takes with it
//! whatever before it the server still counts as unsettled: so what is given back is said first.

use std::collections::VecDeque;

/// Tags left out that are still counted one by one.
const MAX_GAP: u64 = 65_536;

/// A frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// With `multiple` it stands for everything before it as well.
    Ack { tag: u64, multiple: bool },
    /// Given back, this one alone.
    Nack(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Delivered and not settled.
    Out,
    /// Acked by the user, and the server not told yet.
    Acked,
    /// The server knows, or is told before anything else is.
    Told,
}

/// The deliveries of one channel: their tags count from 1.
#[derive(Debug)]
pub(crate) struct Acks {
    /// The tag of the first slot.
    base: u64,
    slots: VecDeque<Slot>,
    /// Tags acked since the last [`flush`](Self::flush), in the order they were.
    pending: Vec<u64>,
    /// Tags given back since then.
    given_back: Vec<u64>,
}

impl Acks {
    pub(crate) fn new() -> Self {
        Self { base: 1, slots: VecDeque::new(), pending: Vec::new(), given_back: Vec::new() }
    }

    /// The server delivered `tag`.
    pub(crate) fn delivered(&mut self, tag: u64) {
        // The server counts without gaps. Should it not, what is missing needs no ack; after a gap too long to fill, what was out before
        // it is not acked any more, and comes again with the channel's end.
        if tag.saturating_sub(self.next()) > MAX_GAP {
            self.slots.clear();
            self.base = tag;
        }
        while self.next() < tag {
            self.slots.push_back(Slot::Told);
        }
        if self.next() == tag {
            self.slots.push_back(Slot::Out);
        }
    }

    /// The tag that comes next.
    fn next(&self) -> u64 {
        self.base.saturating_add(self.slots.len() as u64)
    }

    /// The user acked `tag`. False if it is settled already.
    pub(crate) fn ack(&mut self, tag: u64) -> bool {
        let settled = self.turn(tag, Slot::Acked);
        if settled {
            self.pending.push(tag);
        }
        settled
    }

    /// `tag` goes back to the queue. False if it is settled already.
    pub(crate) fn give_back(&mut self, tag: u64) -> bool {
        let settled = self.turn(tag, Slot::Told);
        if settled {
            self.given_back.push(tag);
        }
        self.shrink();
        settled
    }

    fn turn(&mut self, tag: u64, to: Slot) -> bool {
        let index = tag.checked_sub(self.base).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.slots.get_mut(index)) {
            Some(slot) if *slot == Slot::Out => {
                *slot = to;
                true
            }
            _ => false,
        }
    }

    /// Acks waiting to be sent.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether anything waits to be given back.
    pub(crate) fn gives_back(&self) -> bool {
        !self.given_back.is_empty()
    }

    /// What to send, in this order, for everything since the last time: what is given back; of the acks the longest
    /// settled prefix as one, what lies beyond a delivery that is still out one by one.
    pub(crate) fn flush(&mut self) -> Vec<Said> {
        let mut wire: Vec<Said> = self.given_back.drain(..).map(Said::Nack).collect();
        if self.pending.is_empty() {
            return wire;
        }
        let mut prefix = None;
        let mut covered = 0_usize;
        while let Some(slot) = self.slots.front().copied().filter(|slot| *slot != Slot::Out) {
            if slot == Slot::Acked {
                prefix = Some(self.base);
                covered += 1;
            }
            self.slots.pop_front();
            self.base = self.base.saturating_add(1);
        }
        if let Some(tag) = prefix {
            wire.push(Said::Ack { tag, multiple: covered > 1 });
        }
        for tag in std::mem::take(&mut self.pending) {
            if tag >= self.base {
                if let Some(slot) = self.slots.get_mut((tag - self.base) as usize) {
                    *slot = Slot::Told;
                }
                wire.push(Said::Ack { tag, multiple: false });
            }
        }
        wire
    }

    fn shrink(&mut self) {
        while self.slots.front() == Some(&Slot::Told) {
            self.slots.pop_front();
            self.base = self.base.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn contiguous_acks_are_one_frame() {
        let mut acks = Acks::new();
        (1..=5).for_each(|tag| acks.delivered(tag));
        [2, 1, 3, 5].into_iter().for_each(|tag| assert!(acks.ack(tag)));
        assert!(!acks.ack(5), "once");
        let one = |tag| Said::Ack { tag, multiple: false };
        assert_eq!(acks.flush(), [Said::Ack { tag: 3, multiple: true }, one(5)]);
        assert!(acks.flush().is_empty());
        assert!(acks.ack(4));
        assert_eq!(acks.flush(), [one(4)]);
    }

    #[test]
    fn a_tag_from_far_away_costs_nothing() {
        let mut acks = Acks::new();
        for tag in [1, u64::MAX / 2, u64::MAX] {
            acks.delivered(tag);
            assert!(acks.ack(tag));
            assert_eq!(acks.slots.len(), 1);
            assert_eq!(acks.flush().last(), Some(&Said::Ack { tag, multiple: false }));
        }
    }

    /// What the server does: it knows the tags it has delivered, and refuses others.
    #[derive(Default)]
    struct Server {
        last: u64,
        outstanding: BTreeSet<u64>,
        given_back: BTreeSet<u64>,
    }

    impl Server {
        fn take(&mut self, said: Said) {
            let (Said::Ack { tag, .. } | Said::Nack(tag)) = said;
            assert!(self.outstanding.remove(&tag), "unknown delivery tag {tag}");
            match said {
                Said::Ack { multiple: true, .. } => self.outstanding.retain(|other| *other > tag),
                Said::Ack { .. } => {}
                Said::Nack(_) => assert!(self.given_back.insert(tag)),
            }
        }
    }

    proptest! {
        #[test]
        fn the_server_settles_exactly_what_the_user_did(steps in proptest::collection::vec((0_u8..5, any::<prop::sample::Index>()), 0..200)) {
            let (mut acks, mut server) = (Acks::new(), Server::default());
            let (mut out, mut acked, mut given_back) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            for (step, index) in steps {
                let chosen = (!out.is_empty()).then(|| *index.get(&out.iter().copied().collect::<Vec<u64>>()));
                match (step, chosen) {
                    (0 | 1, _) => {
                        server.last += 1;
                        server.outstanding.insert(server.last);
                        acks.delivered(server.last);
                        out.insert(server.last);
                    }
                    (2, Some(tag)) => {
                        prop_assert!(acks.ack(tag));
                        out.remove(&tag);
                        acked.insert(tag);
                    }
                    (3, Some(tag)) => {
                        prop_assert!(acks.give_back(tag));
                        out.remove(&tag);
                        given_back.insert(tag);
                    }
                    _ => {
                        acks.flush().into_iter().for_each(|said| server.take(said));
                        acked.clear();
                        prop_assert_eq!(&server.outstanding, &out);
                        prop_assert_eq!(&server.given_back, &given_back);
                    }
                }
                prop_assert_eq!(acks.pending(), acked.len());
            }
            acks.flush().into_iter().for_each(|said| server.take(said));
            prop_assert_eq!(&server.outstanding, &out);
            prop_assert_eq!(&server.given_back, &given_back);
        }
    }
}
