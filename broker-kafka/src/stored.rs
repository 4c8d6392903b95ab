//! What the metadata of a group's offsets says.
//!
//! Kafka's groups have no settings. Ours are written as JSON into the metadata of every commit, beside
//! the progress beyond the offset: `{"v":1,"start":"new","ordered":false,…,"progress":"…"}`. So they
//! live and die with the group, and whoever joins can know them.

use broker_core::{Error, GroupOptions, GroupSettings, Result, RetryPolicy, StartAt, Topic};
use serde::{Deserialize, Serialize};

use crate::progress::Progress;

/// Bytes of metadata that Kafka keeps with an offset (`offset.metadata.max.bytes`).
const MAX_METADATA_BYTES: usize = 4096;
/// Bytes of them that settings may take; the rest is for progress.
const MAX_SETTINGS_BYTES: usize = 1536;

/// Bytes by which settings can grow while a group has members: the name of a dead-letter topic, and the longest of retries.
const ALTERABLE_BYTES: usize = 384;

/// A group's settings as they are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stored {
    v: u32,
    start: StartAt,
    ordered: bool,
    retry: RetryPolicy,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter: Option<Topic>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    progress: String,
}

impl Stored {
    pub(crate) fn new(settings: &GroupSettings) -> Self {
        Self {
            v: 1,
            start: settings.start.clone(),
            ordered: settings.ordered,
            retry: settings.retry,
            dead_letter: settings.dead_letter.clone(),
            progress: String::new(),
        }
    }

    pub(crate) fn settings(&self) -> Result<GroupSettings> {
        let mut options =
            GroupOptions::new().with_start(self.start.clone()).with_ordered(self.ordered).with_retry(self.retry);
        options.dead_letter = self.dead_letter.clone();
        options.resolve(None)
    }

    /// The metadata of a commit with this progress.
    pub(crate) fn metadata(&self, progress: &Progress) -> Result<String> {
        let stored = Self { progress: progress.encode(), ..self.clone() };
        serde_json::to_string(&stored).map_err(|error| Error::codec("write a group's settings").with_source(error))
    }

    /// Bytes of encoded progress that fit beside the settings.
    ///
    /// # Errors
    ///
    /// If the settings are too long: too many start positions.
    pub(crate) fn room(&self) -> Result<usize> {
        let bare = self.metadata(&Progress::default())?.len();
        if bare > MAX_SETTINGS_BYTES {
            return Err(Error::invalid(format!(
                "the group's settings take {bare} bytes, of at most {MAX_SETTINGS_BYTES}: name fewer start positions"
            )));
        }
        // What was begun with these settings is said with those of later, too.
        let fixed = Self { dead_letter: None, retry: RetryPolicy::default(), ..self.clone() };
        let reserved = bare.max(fixed.metadata(&Progress::default())?.len() + ALTERABLE_BYTES);
        // The member's name and quotes, one entry more than is counted, base64.
        Ok((MAX_METADATA_BYTES - reserved - 48) / 4 * 3)
    }

    /// What the metadata of an offset says, which is anybody's to write; `None` if it is not ours.
    pub(crate) fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok().filter(|stored: &Self| stored.v == 1)
    }

    /// The progress beyond the offset of that commit. What cannot be read costs repeats, no messages.
    pub(crate) fn progress(&self, offset: i64) -> Progress {
        let bare = || Progress { watermark: offset, ..Progress::default() };
        Progress::decode(offset, &self.progress).unwrap_or_else(bare)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn settings_and_progress_fit_into_metadata_and_come_back() {
        let settings = GroupOptions::new().with_ordered(true).resolve(Some(&"billing".parse().unwrap())).unwrap();
        let stored = Stored::new(&settings);
        assert!(stored.room().unwrap() > 2_000, "{}", stored.room().unwrap());
        let mut progress = Progress { watermark: 7, ..Progress::default() };
        progress.push_done(9..12);
        let read = Stored::read(&stored.metadata(&progress).unwrap()).unwrap();
        assert_eq!(read.settings().unwrap(), settings);
        assert_eq!(read.progress(7), progress);
        assert!(Stored::read("somebody else's").is_none() && Stored::read(r#"{"v":2}"#).is_none());
    }

    /// A member that holds all that a commit can say goes on when its group is altered.
    #[test]
    fn what_fits_beside_settings_fits_beside_those_they_become() {
        let room = Stored::new(&GroupOptions::new().resolve(None).unwrap()).room().unwrap();
        let longest = Duration::from_millis(u64::MAX);
        let retry = RetryPolicy::default().with_max_attempts(u32::MAX).unwrap();
        let retry = retry.with_backoff(longest, longest, 99.999_999_999_999_99).unwrap();
        let dead_letter = Topic::new("d".repeat(249)).unwrap();
        let altered = GroupOptions::new().with_retry(retry).with_dead_letter(dead_letter).resolve(None).unwrap();
        let mut progress = Progress { watermark: 0, ..Progress::default() };
        while progress.encode().len() < room / 3 * 4 {
            let at = progress.end() + 1_000;
            progress.push_done(at..at + 1);
        }
        let said = Stored::new(&altered).metadata(&progress).unwrap();
        assert!(said.len() <= MAX_METADATA_BYTES, "{} bytes", said.len());
    }

    #[test]
    fn too_many_positions_are_refused() {
        let positions = (0..1_000).map(|partition| (partition, 1_000_000)).collect();
        let settings = GroupOptions::new().with_start(StartAt::Position(positions)).resolve(None).unwrap();
        assert_eq!(Stored::new(&settings).room().unwrap_err().kind(), broker_core::ErrorKind::Invalid);
    }
}
