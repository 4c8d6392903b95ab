//! Which of the confirmed messages came back as unroutable.
//!
//! The server returns an unroutable message before it confirms it. lapin hands each returned message to
//! whichever confirmation it resolves next, and resolves those of one `multiple` ack in no order: a
//! returned message is found with a confirmation, but not always with its own. So returned messages are
//! told by their routing key and id, and a confirmation that carries somebody else's return is held
//! until it is known whether its own is still to come:
//!
//! - one that carries none is decided at once: nothing was waiting in lapin when it was resolved;
//! - one that carries another's is decided when its own return is seen, when a later confirmation
//!   carries none, or when nothing is left in flight (every return is handed out by then: each has a
//!   confirmation of its own behind it).

use std::collections::HashMap;

/// What tells a message from others in flight. The same message twice on one topic is routed alike.
pub(crate) type Identity = (String, String);

/// A message confirmed, and whether it came back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Decided<T> {
    pub(crate) item: T,
    pub(crate) returned: bool,
}

#[derive(Debug)]
pub(crate) struct Returns<T> {
    /// Returned, and not yet claimed by its confirmation.
    returned: HashMap<Identity, usize>,
    /// Confirmed, and perhaps returned.
    held: Vec<(Identity, T)>,
}

impl<T> Returns<T> {
    pub(crate) fn new() -> Self {
        Self { returned: HashMap::new(), held: Vec::new() }
    }

    /// Whether nothing was returned or is held: then what is confirmed without a return is routed.
    pub(crate) fn is_idle(&self) -> bool {
        self.returned.is_empty() && self.held.is_empty()
    }

    /// A returned message was seen.
    pub(crate) fn seen(&mut self, identity: Identity) {
        *self.returned.entry(identity).or_insert(0) += 1;
    }

    /// Confirmations resolved so far, everything that was seen with them told before. `carried` says
    /// whether one came with a return, its own or not; `in_flight` how many are still to come.
    pub(crate) fn confirmed(&mut self, batch: Vec<(Identity, bool, T)>, in_flight: usize) -> Vec<Decided<T>> {
        let mut decided = Vec::with_capacity(batch.len());
        let emptied = batch.iter().any(|(_, carried, _)| !carried);
        let waiting = std::mem::take(&mut self.held);
        for (identity, item) in waiting {
            self.decide(identity, item, emptied || in_flight == 0 && batch.is_empty(), &mut decided);
        }
        for (identity, carried, item) in batch {
            self.decide(identity, item, !carried, &mut decided);
        }
        if in_flight == 0 {
            for (identity, item) in std::mem::take(&mut self.held) {
                self.decide(identity, item, true, &mut decided);
            }
            self.returned.clear();
        }
        decided
    }

    fn decide(&mut self, identity: Identity, item: T, last: bool, decided: &mut Vec<Decided<T>>) {
        if let Some(count) = self.returned.get_mut(&identity) {
            *count -= 1;
            if *count == 0 {
                self.returned.remove(&identity);
            }
            decided.push(Decided { item, returned: true });
        } else if last {
            decided.push(Decided { item, returned: false });
        } else {
            self.held.push((identity, item));
        }
    }

    /// The channel is gone: what was held was confirmed, and not seen to return.
    pub(crate) fn end(&mut self) -> Vec<Decided<T>> {
        self.confirmed(Vec::new(), 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, VecDeque};

    use super::*;
    use proptest::prelude::*;

    fn identity(number: usize) -> Identity {
        ("topic".to_owned(), number.to_string())
    }

    proptest! {
        /// lapin's behaviour: a queue of returned messages, of which each confirmation resolved takes one.
        #[test]
        fn every_message_is_told_right_whatever_confirmation_brings_its_return(
            routed in proptest::collection::vec(any::<bool>(), 1..40),
            order in proptest::collection::vec(any::<prop::sample::Index>(), 200),
            rounds in proptest::collection::vec(1_usize..5, 200),
        ) {
            let mut returns = Returns::new();
            let mut waiting: VecDeque<usize> = VecDeque::new();
            let mut order = order.into_iter();
            let mut rounds = rounds.into_iter();
            // The server returns in order, at some time before it confirms; it confirms in any order.
            let mut unreturned: VecDeque<usize> = (0..routed.len()).collect();
            let mut unconfirmed: BTreeSet<usize> = BTreeSet::new();
            let mut in_flight = routed.len();
            let mut decided = Vec::new();
            while in_flight > 0 {
                let mut resolved = Vec::new();
                for _ in 0..rounds.next().unwrap_or(1) {
                    let Some(choice) = order.next() else { return Ok(()) };
                    if !unreturned.is_empty() && (unconfirmed.is_empty() || choice.index(2) == 0) {
                        let number = unreturned.pop_front().unwrap();
                        if !routed[number] {
                            waiting.push_back(number);
                        }
                        unconfirmed.insert(number);
                    } else if !unconfirmed.is_empty() {
                        let number = *choice.get(&unconfirmed.iter().copied().collect::<Vec<_>>());
                        unconfirmed.remove(&number);
                        in_flight -= 1;
                        resolved.push((number, waiting.pop_front()));
                    }
                }
                resolved.iter().filter_map(|(_, carried)| *carried).for_each(|number| returns.seen(identity(number)));
                let batch = resolved.iter().map(|(number, carried)| (identity(*number), carried.is_some(), *number)).collect();
                decided.extend(returns.confirmed(batch, in_flight));
            }
            prop_assert!(returns.is_idle());
            prop_assert_eq!(decided.len(), routed.len());
            for Decided { item, returned } in decided {
                prop_assert_eq!(returned, !routed[item], "message {}", item);
            }
        }
    }
}
