//! Failed attempts to be somebody: each is answered later than the one before it, and only so many
//! wait at a time.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::time::Instant;

/// How long the first failed attempt waits for its answer; each further one twice as long.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// Without a failure for so long, an address begins anew.
const FORGIVEN: Duration = Duration::from_secs(60);
/// Failed attempts of one address that wait at a time; more are refused at once. What is shown is looked at
/// before: who has the right token is let in whoever else fails from there, and what keeps a token from being
/// guessed is its length.
const WAITING: u32 = 16;
/// Addresses remembered.
const ADDRESSES: usize = 10_000;

/// Remembers who failed.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<FxHashMap<Option<IpAddr>, Failures>>);

#[derive(Debug)]
struct Failures {
    count: u32,
    waiting: u32,
    last: Instant,
}

/// One failed attempt that waits for its answer.
struct Waits<'a>(&'a Throttle, Option<IpAddr>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if let Some(failures) = self.0.0.lock().get_mut(&self.1) {
            failures.waiting = failures.waiting.saturating_sub(1);
        }
    }
}

impl Throttle {
    /// Holds the answer to a failed attempt back; false if too many of this address wait already.
    pub(crate) async fn slow(&self, address: Option<IpAddr>) -> bool {
        let address = address.map(network);
        let Some(delay) = self.failed(address, Instant::now()) else { return false };
        let _waits = Waits(self, address);
        tokio::time::sleep(delay).await;
        true
    }

    fn failed(&self, address: Option<IpAddr>, now: Instant) -> Option<Duration> {
        let mut table = self.0.lock();
        if table.len() >= ADDRESSES && !table.contains_key(&address) {
            table.retain(|_, failures| failures.waiting > 0 || now - failures.last < FORGIVEN);
            if table.len() >= ADDRESSES {
                // An attack from everywhere: nobody's past can be told any more, and each failure waits.
                return Some(LONGEST);
            }
        }
        let failures = table.entry(address).or_insert(Failures { count: 0, waiting: 0, last: now });
        if now - failures.last >= FORGIVEN && failures.waiting == 0 {
            failures.count = 0;
        }
        failures.last = now;
        if failures.waiting >= WAITING {
            return None;
        }
        failures.waiting += 1;
        failures.count = failures.count.saturating_add(1);
        Some(FIRST.saturating_mul(1 << (failures.count - 1).min(10)).min(LONGEST))
    }
}

/// Who has one address of a /64 has all of it.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Option<IpAddr> {
        Some(network(text.parse().unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn each_failure_waits_longer_and_time_forgives() {
        let throttle = Throttle::default();
        for millis in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            let begun = Instant::now();
            assert!(throttle.slow("10.0.0.1".parse().ok()).await);
            assert_eq!(begun.elapsed().as_millis(), millis);
        }
        // Another address is another's.
        let begun = Instant::now();
        throttle.slow("10.0.0.2".parse().ok()).await;
        assert_eq!(begun.elapsed().as_millis(), 100);
        tokio::time::sleep(FORGIVEN).await;
        let begun = Instant::now();
        throttle.slow("10.0.0.1".parse().ok()).await;
        assert_eq!(begun.elapsed().as_millis(), 100);
    }

    #[test]
    fn only_so_many_wait_and_a_network_is_one() {
        let throttle = Throttle::default();
        let now = Instant::now();
        for index in 0..WAITING {
            assert!(throttle.failed(address(&format!("2a00:1::{index:x}")), now).is_some());
        }
        assert_eq!(throttle.failed(address("2a00:1::ffff"), now), None);
        assert!(throttle.failed(address("2a00:1:0:1::1"), now).is_some());
        drop(Waits(&throttle, address("2a00:1::1")));
        assert!(throttle.failed(address("2a00:1::ffff"), now).is_some());
    }

    #[test]
    fn an_attack_from_everywhere_takes_bounded_memory() {
        let throttle = Throttle::default();
        let now = Instant::now();
        for index in 0..2 * ADDRESSES as u32 {
            let address = Some(std::net::Ipv4Addr::from_bits(index).into());
            assert!(throttle.failed(address, now).is_some());
            drop(Waits(&throttle, address));
        }
        assert_eq!(throttle.0.lock().len(), ADDRESSES);
        assert!(throttle.failed(address("1.2.3.4"), now + FORGIVEN).is_some());
        assert_eq!(throttle.0.lock().len(), 1);
    }
}
