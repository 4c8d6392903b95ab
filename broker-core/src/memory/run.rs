//! A stretch of the log: a segment in its place.

use std::sync::Arc;

use super::entry::{Entry, Segment, earlier, is_scheduled};
use crate::Timestamp;

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
    /// When the first entry in it expires.
    expiry: Option<Timestamp>,
    segment: Stage,
}

/// A segment is the log's alone until the first reader takes from it.
enum Stage {
    Filling(Segment),
    Shared(Arc<Segment>),
}

impl Run {
    pub(super) fn new(base: u64, segment: Segment) -> Self {
        Self { base, scheduled: false, readers: 0, expiry: None, segment: Stage::Filling(segment) }
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

    /// Whether it takes a shared entry as it is.
    pub(super) fn takes_shared(&mut self) -> bool {
        self.filling().is_some_and(|segment| !segment.is_own())
    }

    /// Adds an entry that is held elsewhere too; tells when it expires. Only for a run that
    /// [takes](Self::takes_shared) it.
    pub(super) fn push_shared(&mut self, entry: &Arc<Entry>) -> Option<Timestamp> {
        let expiry = entry.message.expires_at();
        self.scheduled |= is_scheduled(&entry.message);
        self.expiry = earlier(self.expiry, expiry);
        if let Stage::Filling(segment) = &mut self.segment {
            segment.push_shared(entry);
        }
        expiry
    }

    pub(super) fn expiry(&self) -> Option<Timestamp> {
        self.expiry
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
