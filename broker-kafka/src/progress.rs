//! What a commit says beyond its offset, and how that is written into its metadata.

use std::collections::VecDeque;
use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// How far a group is in one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Every record below is settled.
    pub(crate) watermark: i64,
    /// Records beyond that are settled, too: sorted, apart from each other.
    pub(crate) done: VecDeque<Range<i64>>,
    /// Failed attempts of records that are not: sorted.
    pub(crate) attempts: VecDeque<(i64, u32)>,
}

/// Attempts of one record that are remembered: two bytes of a varint.
pub(crate) const MAX_ATTEMPTS: u32 = (1 << 14) - 1;

/// The bytes that one range or attempt takes at most, with offsets no farther apart than `span`.
pub(crate) fn entry_bytes(span: i64) -> usize {
    2 * varint_bytes(u64::try_from(span).unwrap_or(0)).max(2)
}

fn varint_bytes(value: u64) -> usize {
    (64 - value.leading_zeros() as usize).div_ceil(7).max(1)
}

impl Progress {
    /// Adds a settled range that begins no earlier than the last one ends.
    pub(crate) fn push_done(&mut self, range: Range<i64>) {
        match self.done.back_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None => self.done.push_back(range),
        }
    }

    /// Adds what `rest` says about records beyond all of this.
    pub(crate) fn append(&mut self, rest: &Self) {
        rest.done.iter().for_each(|range| self.push_done(range.clone()));
        self.attempts.extend(&rest.attempts);
    }

    /// Whether `offset` is settled; forgets what lies below it.
    pub(crate) fn take_done(&mut self, offset: i64) -> bool {
        while self.done.front().is_some_and(|range| range.end <= offset) {
            self.done.pop_front();
        }
        match self.done.front_mut().filter(|range| range.start <= offset) {
            Some(range) => {
                range.start = offset + 1;
                if range.is_empty() {
                    self.done.pop_front();
                }
                true
            }
            None => false,
        }
    }

    /// The failed attempts of `offset`; forgets what lies below it.
    pub(crate) fn take_attempts(&mut self, offset: i64) -> u32 {
        while self.attempts.front().is_some_and(|(at, _)| *at < offset) {
            self.attempts.pop_front();
        }
        let found = self.attempts.front().is_some_and(|(at, _)| *at == offset);
        if found { self.attempts.pop_front().map_or(0, |(_, failed)| failed) } else { 0 }
    }

    /// Ranges and attempts.
    pub(crate) fn entries(&self) -> usize {
        self.done.len() + self.attempts.len()
    }

    /// What is left of it where the log ends at `end`.
    pub(crate) fn cut(mut self, end: i64) -> Self {
        self.watermark = self.watermark.min(end);
        self.done.retain_mut(|range| {
            range.end = range.end.min(end);
            !range.is_empty()
        });
        self.attempts.retain(|(offset, _)| *offset < end);
        self
    }

    /// The offset after the last one it speaks of.
    pub(crate) fn end(&self) -> i64 {
        let done = self.done.back().map_or(self.watermark, |range| range.end);
        self.attempts.back().map_or(done, |(offset, _)| done.max(offset + 1))
    }

    /// Everything but the watermark, as text: base64 of the number of ranges, of each range its
    /// distance from the one before and its length, then of each attempt its distance and its count,
    /// all as varints. Empty if there is nothing to say.
    pub(crate) fn encode(&self) -> String {
        if self.entries() == 0 {
            return String::new();
        }
        let mut bytes = Vec::new();
        put(&mut bytes, self.done.len() as u64);
        let mut at = self.watermark;
        for range in &self.done {
            put(&mut bytes, range.start.abs_diff(at));
            put(&mut bytes, range.end.abs_diff(range.start));
            at = range.end;
        }
        let mut at = self.watermark;
        for (offset, failed) in &self.attempts {
            put(&mut bytes, offset.abs_diff(at));
            put(&mut bytes, u64::from((*failed).min(MAX_ATTEMPTS)));
            at = *offset;
        }
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote; `None` for anything else. It comes from a server
    /// that others write to, so that nothing is taken for granted: there is an offset after each it speaks of,
    /// no range is empty, and nobody counts further than we do.
    pub(crate) fn decode(watermark: i64, text: &str) -> Option<Self> {
        let mut progress = Self { watermark, ..Self::default() };
        if text.is_empty() {
            return Some(progress);
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let mut bytes = bytes.as_slice();
        let ranges = take(&mut bytes)?;
        let mut at = watermark;
        for _ in 0..ranges {
            let start = at.checked_add_unsigned(take(&mut bytes)?)?;
            at = start.checked_add_unsigned(take(&mut bytes)?).filter(|end| *end > start)?;
            progress.push_done(start..at);
        }
        let mut at = watermark;
        while !bytes.is_empty() {
            at = at.checked_add_unsigned(take(&mut bytes)?).filter(|at| *at < i64::MAX)?;
            let failed = u32::try_from(take(&mut bytes)?).ok().filter(|failed| *failed <= MAX_ATTEMPTS)?;
            progress.attempts.push_back((at, failed));
        }
        Some(progress)
    }
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            watermark in 0_i64..1 << 40,
            ranges in prop::collection::vec((1_i64..1_000, 1_i64..1_000), 0..50),
            attempts in prop::collection::vec((0_i64..1_000, 1_u32..=MAX_ATTEMPTS), 0..50),
        ) {
            let mut progress = Progress { watermark, ..Progress::default() };
            let mut at = watermark;
            for (gap, length) in ranges {
                progress.push_done(at + gap..at + gap + length);
                at += gap + length;
            }
            let mut at = watermark;
            for (gap, failed) in attempts {
                at += gap;
                progress.attempts.push_back((at, failed));
            }
            prop_assert_eq!(Progress::decode(watermark, &progress.encode()), Some(progress));
        }

        #[test]
        fn what_others_wrote_is_no_danger(watermark in any::<i64>(), text in ".{0,40}") {
            let _ = Progress::decode(watermark, &text).map(|progress| progress.end());
        }
    }

    #[test]
    fn of_a_log_that_was_cut_nothing_is_said_beyond_its_end() {
        let mut progress = Progress { watermark: 10, ..Progress::default() };
        progress.push_done(12..15);
        progress.push_done(20..21);
        progress.attempts.extend([(11, 2), (16, 1)]);
        let cut = |end| progress.clone().cut(end);
        let mut left = Progress { watermark: 10, ..Progress::default() };
        left.push_done(12..14);
        left.attempts.push_back((11, 2));
        assert_eq!(cut(14), left);
        assert_eq!(cut(3), Progress { watermark: 3, ..Progress::default() });
        assert_eq!(cut(30), progress);
    }

    #[test]
    fn what_we_never_write_is_not_read() {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        // No ranges, one attempt: of the last offset there is.
        assert!(Progress::decode(i64::MAX - 2, &text(&[0, 1, 1])).is_some_and(|last| last.end() == i64::MAX));
        assert_eq!(Progress::decode(i64::MAX - 1, &text(&[0, 1, 1])), None);
        // One that failed more often than anybody counts.
        assert!(Progress::decode(7, &text(&[0, 1, 0xff, 0x7f])).is_some());
        assert_eq!(Progress::decode(7, &text(&[0, 1, 0x80, 0x80, 1])), None);
        // A range of nothing.
        assert_eq!(Progress::decode(7, &text(&[1, 1, 0])), None);
    }
}
