//! A stretch of the log: a segment in its place.

use std::sync::Arc;

use super::entry::Segment;

/// Entries a segment has at most.
pub(super) const MAX_SEGMENT: usize = 256;
/// Bytes after which a segment is full: about what one unsettled delivery keeps alive beside itself.
const MAX_SEGMENT_BYTES: u64 = 64 << 10;

/// A segment, its place, and who is inside.
pub(super) struct Run {
    /// Position of its first entry in the log.
    pub(super) base: u64,
    /// Whether an entry has a delivery time or an expiry.
    pub(super) scheduled: bool,
    /// Readers whose cursor is inside.
    pub(super) readers: usize,
    segment: Stage,
}

/// A segment is the log's alone until the first reader takes from it.
enum Stage {
    Filling(Segment),
    Shared(Arc<Segment>),
}

impl Run {
    pub(super) fn new(base: u64, segment: Segment) -> Self {
        Self { base, scheduled: false, readers: 0, segment: Stage::Filling(segment) }
    }

    pub(super) fn segment(&self) -> &Segment {
        match &self.segment {
            Stage::Filling(segment) => segment,
            Stage::Shared(segment) => segment,
        }
    }

    /// The segment, if it takes another entry.
    pub(super) fn filling(&mut self) -> Option<&mut Segment> {
        match &mut self.segment {
            Stage::Filling(segment) if !segment.is_full() && segment.size() < MAX_SEGMENT_BYTES => Some(segment),
            _ => None,
        }
    }

    /// The segment, which changes no more.
    pub(super) fn share(&mut self) -> Arc<Segment> {
        let segment = match std::mem::replace(&mut self.segment, Stage::Filling(Segment::shared(0))) {
            Stage::Filling(segment) => Arc::new(segment),
            Stage::Shared(segment) => segment,
        };
        self.segment = Stage::Shared(Arc::clone(&segment));
        segment
    }

    pub(super) fn is_shared(&self) -> bool {
        matches!(self.segment, Stage::Shared(_))
    }

    pub(super) fn end(&self) -> u64 {
        self.base + self.segment().len() as u64
    }
}
