//! What topics retain is a copy of the past: where its memory is needed, it yields.

use std::sync::atomic::Ordering;

use super::Shared;
use super::history::{Frees, Retention};
use crate::{Error, MemoryBroker, Result, Topic};

/// Messages gone through at most, wherever they are retained: a few milliseconds' work.
const MAX_LOOKS: usize = 16_384;

impl MemoryBroker {
    /// How much of its past every topic retains now; `None` if nothing, ever.
    pub fn retention(&self) -> Option<Retention> {
        self.shared().retention.read().clone()
    }

    /// Changes how much of its past every topic retains. What is over the new bounds is forgotten now: of each topic
    /// the oldest, and where it is too much for all together, of each the same share.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if it was opened to retain nothing.
    ///
    /// ```
    /// # fn main() -> broker_core::Result<()> {
    /// use broker_core::{MemoryBroker, MemoryOptions, Retention};
    ///
    /// let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(100)));
    /// broker.set_retention(Retention::messages(100).with_max_bytes(1 << 20))?;
    /// assert_eq!(broker.retention().map(|retention| retention.max_bytes), Some(1 << 20));
    /// assert!(MemoryBroker::new().set_retention(Retention::messages(1)).is_err());
    /// # Ok(()) }
    /// ```
    pub fn set_retention(&self, retention: Retention) -> Result<()> {
        let shared = self.shared();
        if shared.options.retention.is_none() {
            return Err(Error::unsupported("this broker retains nothing; open it as memory:?retain=MESSAGES"));
        }
        *shared.retention.write() = Some(retention.clone());
        let of_each = retention.clone().with_max_total_bytes(u64::MAX);
        shared.all_topics().iter().for_each(|topic| topic.trim(&of_each));
        let over = shared.retained.load(Ordering::Relaxed).saturating_sub(retention.max_total_bytes);
        shared.forget_shares(over, Frees::Everything, &mut { usize::MAX });
        Ok(())
    }

    /// Forgets messages that are retained, of `topic` or of all, the oldest first, until `bytes` are free that they took
    /// (as of [`Message::memory_size`](crate::Message::memory_size)); tells how many are, which may be fewer. What is
    /// also in a backlog or in flight frees nothing, and stays retained unless something newer goes. Of all topics, each
    /// forgets its share; a topic that has nothing to forget has its dead letters forgotten, which are retained
    /// elsewhere. A group made later is told of it as of what was over a bound.
    ///
    /// It takes a few milliseconds at most: it goes through 16,384 messages, and when none of them frees anything,
    /// forgets some of those, so that the next call gets further.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use broker_core::{BrokerExt, MemoryBroker, MemoryOptions, Message, Retention, Topic};
    ///
    /// let broker = MemoryBroker::with_options(MemoryOptions::new().with_retention(Retention::messages(100)));
    /// let topic = Topic::new("orders")?;
    /// broker.publish(&topic, Message::new(vec![0; 1_000])).await?;
    /// assert!(broker.forget(Some(&topic), 1) >= 1_000);
    /// assert_eq!(broker.forget(None, 1), 0);
    /// # Ok(()) }
    /// ```
    pub fn forget(&self, topic: Option<&Topic>, bytes: u64) -> u64 {
        let shared = self.shared();
        let mut looks = MAX_LOOKS;
        match topic.map(|topic| shared.known_topic(topic)) {
            None => shared.forget_shares(bytes, Frees::WhatIsAlone, &mut looks),
            Some(topic) => topic.map_or(0, |topic| {
                let freed = topic.forget(bytes, Frees::WhatIsAlone, &mut looks);
                if freed > 0 { freed } else { shared.forget_letters(&topic.topic, bytes, &mut looks) }
            }),
        }
    }
}

impl Shared {
    /// Has whichever topics retain them forget dead letters of `topic`; tells how many bytes they were.
    fn forget_letters(&self, topic: &Topic, bytes: u64, looks: &mut usize) -> u64 {
        let mut freed = 0;
        for dead in self.all_topics().iter().filter(|dead| dead.retains_letters()) {
            if freed >= bytes {
                break;
            }
            freed += dead.forget(bytes - freed, Frees::LettersOf(topic), looks);
        }
        freed
    }

    /// Has every topic forget its share of `bytes`, and where that was not enough, whichever has more. Tells how many it
    /// were.
    fn forget_shares(&self, bytes: u64, frees: Frees<'_>, looks: &mut usize) -> u64 {
        let total = u128::from(self.retained.load(Ordering::Relaxed));
        if total == 0 || bytes == 0 {
            return 0;
        }
        let topics = self.all_topics();
        let mut topics: Vec<_> = topics.iter().filter_map(|topic| Some((topic.oldest_retained()?, topic))).collect();
        // A message is no share: where many topics have few, those with the oldest begin.
        topics.sort_unstable_by_key(|((oldest, _), _)| *oldest);
        let mut freed = 0;
        for rest in [false, true] {
            for ((_, retained), topic) in &topics {
                let left = bytes.saturating_sub(freed);
                if left == 0 || *looks == 0 {
                    return freed;
                }
                let share = (u128::from(*retained) * u128::from(bytes)).div_ceil(total);
                let share = if rest { left } else { u64::try_from(share).unwrap_or(left).min(left) };
                freed += topic.forget(share, frees, looks);
            }
        }
        freed
    }
}
