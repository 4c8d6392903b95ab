//! The metadata of a group's offset in Kafka, which is anybody's to write: settings and progress. The first line
//! is the offset.
#![no_main]
#![allow(dead_code)]

/// The adapter's own modules: the crate would bring librdkafka, which is C and takes minutes to build.
#[path = "../../broker-kafka/src/progress.rs"]
mod progress;
#[path = "../../broker-kafka/src/stored.rs"]
mod stored;

use libfuzzer_sys::fuzz_target;
use progress::{MAX_ATTEMPTS, Progress};
use stored::Stored;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (offset, text) = text.split_once('\n').unwrap_or(("7", text));
    let Some(offset) = offset.parse().ok().filter(|offset| *offset >= 0) else { return };
    check(offset, text);
    if let Some(stored) = Stored::read(text) {
        let progress = stored.progress(offset);
        // What was read is written so that it is read the same.
        let again = Stored::read(&stored.metadata(&progress).expect("settings are JSON")).expect("our own JSON");
        assert_eq!(again.settings().ok(), stored.settings().ok());
        check(offset, &progress.encode());
    }
});

/// Progress lies beyond the offset, in order, apart from each other; and each record has one story.
fn check(offset: i64, text: &str) {
    let Some(progress) = Progress::decode(offset, text) else { return };
    assert_eq!(progress.watermark, offset);
    let mut at = offset;
    for range in &progress.done {
        assert!(at <= range.start && range.start <= range.end);
        at = range.end;
    }
    assert!(progress.attempts.iter().map(|(at, _)| *at).is_sorted());
    assert!(progress.end() >= at);
    assert!(progress.attempts.iter().all(|(_, failed)| *failed <= MAX_ATTEMPTS));
    assert_eq!(Progress::decode(offset, &progress.encode()).as_ref(), Some(&progress));
    // Every record it speaks of can be asked for.
    let mut asked = progress.clone();
    for range in progress.done.iter().filter(|range| !range.is_empty()) {
        assert!(asked.take_done(range.start));
    }
    let mut asked = progress.clone();
    for (at, _) in &progress.attempts {
        asked.take_attempts(*at);
    }
}
