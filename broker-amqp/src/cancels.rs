//! The server's word that a consumer is cancelled, passed on once.
//!
//! RabbitMQ (3.10) gives it twice where a queue is deleted while one of its consumers is cancelled: the queue's part has
//! answered, is found gone, and the channel answers for it. lapin (4.12) expects no second answer and ends the
//! connection, with every other consumer on it.

use std::collections::VecDeque;

/// basic.cancel-ok and basic.cancel (AMQP 0-9-1, 1.8.3).
const CANCEL_OK: [u8; 4] = [0, 60, 0, 31];
const CANCEL: u8 = 30;
const NOWAIT: u8 = 1;
/// So many are remembered: of every channel of a connection the last.
const RECENT: usize = 2_048;

#[derive(Debug, Default)]
pub(crate) struct Cancels {
    recent: VecDeque<Vec<u8>>,
}

impl Cancels {
    /// Makes a method harmless that tells of a cancelled consumer again. The server names each consumer anew.
    pub(crate) fn sift(&mut self, channel: [u8; 2], method: &mut [u8]) {
        if !method.starts_with(&CANCEL_OK) {
            return;
        }
        let said = [channel.as_slice(), method].concat();
        if !self.recent.contains(&said) {
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(said);
            return;
        }
        // As long as it was: the cancellation, which needs no answer, of a consumer whose name is cut short.
        if let [_, _, _, method, length, .., last] = method
            && *length > 0
        {
            (*method, *length, *last) = (CANCEL, *length - 1, NOWAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use lapin::protocol::{AMQPClass, basic};

    use super::*;

    fn read(method: &[u8]) -> AMQPClass {
        lapin::protocol::parse_class(method).unwrap().1
    }

    #[test]
    fn the_second_time_it_is_of_nobody() {
        let mut cancels = Cancels::default();
        let one = [CANCEL_OK.as_slice(), &[3], b"one"].concat();
        for channel in [1, 2] {
            let mut first = one.clone();
            cancels.sift([0, channel], &mut first);
            assert_eq!(first, one);
        }
        let mut again = one.clone();
        cancels.sift([0, 1], &mut again);
        let expected = basic::Cancel { consumer_tag: "on".into(), nowait: true };
        assert_eq!(read(&again), AMQPClass::Basic(basic::AMQPMethod::Cancel(expected)));
        for mut short in [CANCEL_OK.to_vec(), [CANCEL_OK.as_slice(), &[0]].concat()] {
            let before = short.clone();
            (0..2).for_each(|_| cancels.sift([0, 1], &mut short));
            assert_eq!(short, before);
        }
    }

    #[test]
    fn no_more_are_remembered_than_there_are_channels() {
        let mut cancels = Cancels::default();
        for number in 0..3 * RECENT as u64 {
            cancels.sift([0, 1], &mut [CANCEL_OK.as_slice(), &[8], &number.to_be_bytes()].concat());
        }
        assert_eq!(cancels.recent.len(), RECENT);
    }
}
