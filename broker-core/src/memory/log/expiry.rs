//! What has expired leaves the log wherever it stands: it fills no backlog, and keeps no publisher out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::{LogState, Reader};
use crate::Timestamp;
use crate::memory::entry::{Segment, is_expired};
use crate::memory::run::{MAX_SEGMENT, Run};
use crate::memory::topics::TopicState;

/// Entries set aside for what is left of a run, so that few runs hold what is left of many.
const REST: usize = 64;
/// Runs gone through for each millisecond until the next look.
const RUNS_A_MILLI: usize = 1_024;

/// Entries that left the log, in order: their positions, and the bytes of each and all before it.
#[derive(Default)]
struct Removed(Vec<(u64, u64)>);

impl Removed {
    fn push(&mut self, position: u64, bytes: u64) {
        let before = self.0.last().map_or(0, |(_, sum)| *sum);
        self.0.push((position, before + bytes));
    }

    /// How many stood before a position, and their bytes.
    fn before(&self, position: u64) -> (u64, u64) {
        let count = self.0.partition_point(|(at, _)| *at < position);
        (count as u64, count.checked_sub(1).and_then(|last| self.0.get(last)).map_or(0, |(_, sum)| *sum))
    }
}

impl LogState {
    /// Takes out what has expired by `now`, and counts it for every reader before which it stood. False
    /// if there was nothing, or if the last look was too recent for its cost.
    pub(in crate::memory) fn expire(&mut self, now: Timestamp) -> bool {
        if self.next_expiry().is_none_or(|look| look > now) {
            return false;
        }
        let mut removed = Removed::default();
        let runs = std::mem::take(&mut self.runs);
        let cost = Duration::from_millis(((runs.len() + self.readers.len()) / RUNS_A_MILLI) as u64);
        for mut run in runs {
            if run.expiry().is_none_or(|expiry| expiry > now) {
                run.base -= removed.0.len() as u64;
                self.runs.push_back(run);
            } else {
                keep_rest(&run, now, &mut self.runs, &mut removed);
            }
        }
        self.expiry = self.runs.iter().filter_map(Run::expiry).min();
        self.look_from = Some(now.after(cost));
        if removed.0.is_empty() {
            return false;
        }
        self.renumber(&removed);
        // Any reader may have room now, not only the one that was found at its bound.
        self.resumed.extend(self.stalled.drain(..).map(|(_, topic)| topic));
        true
    }

    /// When [`expire`](Self::expire) is worth calling again.
    pub(in crate::memory) fn next_expiry(&self) -> Option<Timestamp> {
        self.expiry.max(self.look_from.filter(|_| self.expiry.is_some()))
    }

    /// Topics that may go on since something expired: to be resumed once no lock is held.
    pub(in crate::memory) fn take_resumed(&mut self) -> Vec<Arc<TopicState>> {
        std::mem::take(&mut self.resumed)
    }

    /// How many entries expired before a reader came to them.
    pub(in crate::memory) fn expired(&self, key: usize) -> u64 {
        self.readers.get(key).map_or(0, |reader| reader.expired)
    }

    /// Brings every reader, and who is inside which run, in line with what was taken out.
    fn renumber(&mut self, removed: &Removed) {
        let (count, bytes) = removed.before(u64::MAX);
        self.tail -= count;
        self.tail_bytes -= bytes;
        self.room = 0;
        for (_, reader) in &mut self.readers {
            let (before, bytes_before) = removed.before(reader.cursor);
            reader.cursor -= before;
            reader.cursor_bytes -= bytes_before;
            reader.expired += count - before;
            reader.tell_at = reader.tell_at.saturating_sub(count);
        }
        self.caught_up = 0;
        self.runs.iter_mut().for_each(|run| run.readers = 0);
        let cursors: Vec<u64> = self.readers.iter().map(|(_, Reader { cursor, .. })| *cursor).collect();
        for cursor in cursors {
            let index = self.run_of(cursor);
            match self.runs.get_mut(index).filter(|_| cursor < self.tail) {
                Some(run) => run.readers += 1,
                None => self.caught_up += 1,
            }
        }
        self.trim();
    }
}

/// Adds what is left of a run to the last of `runs` that takes it. What was handed out of it stays whole
/// where it was handed to.
fn keep_rest(run: &Run, now: Timestamp, runs: &mut VecDeque<Run>, removed: &mut Removed) {
    let segment = run.segment();
    for slot in 0..segment.len() {
        let position = run.base + slot as u64;
        if segment.message(slot).is_some_and(|message| is_expired(message, now)) {
            removed.push(position, segment.bytes(slot, 1));
            continue;
        }
        let Some(entry) = segment.share(slot) else { continue };
        if !runs.back_mut().is_some_and(Run::takes_shared) {
            let rest = (segment.len() - slot).clamp(REST, MAX_SEGMENT);
            runs.push_back(Run::new(position - removed.0.len() as u64, Segment::shared(rest)));
        }
        if let Some(last) = runs.back_mut() {
            last.push_shared(&entry);
        }
    }
}
