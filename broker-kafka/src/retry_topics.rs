//! Where retries wait that are not held by their member: topics of the group's own, one for each length
//! of wait.
//!
//! A retry that waits in its partition takes room there: of the commit's metadata, of the member's memory.
//! From a threshold on (`?retry_topics=`) it goes to a topic instead, and its record is settled. Each rung
//! of the ladder is a topic of its own, so that what is due soon never lies behind what is due late; in its
//! rung a retry waits for its own time, or where more than a member holds lie before it, the rung's at most
//! twice. Every member of the group reads these topics.

use std::time::Duration;

use broker_core::{Error, Group, Result, Topic};

const PREFIX: &str = "broker-retry.";

/// Names and the longest wait of each.
const RUNGS: [(&str, Duration); 7] = [
    ("10s", Duration::from_secs(10)),
    ("1m", Duration::from_secs(60)),
    ("10m", Duration::from_secs(600)),
    ("1h", Duration::from_secs(3600)),
    ("6h", Duration::from_secs(6 * 3600)),
    ("1d", Duration::from_secs(24 * 3600)),
    ("7d", Duration::from_secs(7 * 24 * 3600)),
];

/// How long a retry is kept after it was due: as long as a topic keeps records by default.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// The retry topics of one group.
#[derive(Debug)]
pub(crate) struct RetryTopics {
    threshold: Duration,
    /// `broker-retry.GROUP.`, the group in letters that a topic may have.
    prefix: String,
}

impl RetryTopics {
    /// Those of `group`, for waits of `threshold` and more.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) if the group's name is too long for a topic's.
    pub(crate) fn new(group: &Group, threshold: Duration) -> Result<Self> {
        let prefix = format!("{PREFIX}{}.", escape(&group.to_string()));
        let topics = Self { threshold, prefix };
        topics.rungs().try_for_each(|rung| rung.map(drop)).map_err(|_| {
            Error::invalid(format!("group {group}: with retry_topics its name and filter have some 200 bytes at most"))
        })?;
        Ok(topics)
    }

    /// Where a retry waits; `None` if its member holds it.
    pub(crate) fn topic(&self, wait: Duration) -> Option<Topic> {
        let (name, _) = RUNGS.iter().find(|(_, longest)| wait <= *longest).filter(|_| wait >= self.threshold)?;
        Topic::new(format!("{}{name}", self.prefix)).ok()
    }

    fn rungs(&self) -> impl Iterator<Item = Result<Topic>> {
        RUNGS.iter().map(|(name, _)| Topic::new(format!("{}{name}", self.prefix)))
    }

    /// The regular expression of all of them.
    pub(crate) fn pattern(&self) -> String {
        format!("^{}[0-9]+[smhd]$", self.prefix.replace('.', r"\."))
    }

    /// Whether it is one of them.
    pub(crate) fn contains(&self, topic: &str) -> bool {
        topic.strip_prefix(self.prefix.as_str()).is_some_and(|rung| RUNGS.iter().any(|(name, _)| *name == rung))
    }
}

/// How long a topic keeps its records, if it is a retry topic: longer than the longest wait in it.
pub(crate) fn retention(topic: &Topic) -> Option<Duration> {
    let (_, rung) = topic.as_str().strip_prefix(PREFIX)?.rsplit_once('.')?;
    RUNGS.iter().find(|(name, _)| *name == rung).map(|(_, longest)| *longest + KEPT)
}

/// A group in a topic's letters, each in its own way.
fn escape(group: &str) -> String {
    let mut out = String::with_capacity(group.len() + 8);
    for letter in group.chars() {
        match letter {
            '_' => out.push_str("__"),
            '@' => out.push_str("_a"),
            '*' => out.push_str("_s"),
            '>' => out.push_str("_g"),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use regex::Regex;

    use super::*;

    fn topics(group: &str) -> Result<RetryTopics> {
        RetryTopics::new(&group.parse()?, Duration::from_secs(5))
    }

    #[test]
    fn a_wait_has_the_next_longer_rung_or_none() {
        let topics = topics("billing@orders.>").unwrap();
        let rung = |secs| topics.topic(Duration::from_secs(secs)).map(|topic| topic.to_string());
        assert_eq!(rung(4), None, "below the threshold");
        assert_eq!(rung(5).as_deref(), Some("broker-retry.billing_aorders._g.10s"));
        assert_eq!(rung(601).as_deref(), Some("broker-retry.billing_aorders._g.1h"));
        assert_eq!(rung(8 * 24 * 3600), None, "longer than it would be kept");
    }

    #[test]
    fn groups_share_none_and_each_finds_its_own() {
        let groups = ["a@b", "a_a@b", "a@b.*", "a@b.>", "a_@b", "a@b_s"];
        let prefixes: std::collections::BTreeSet<_> =
            groups.iter().map(|group| topics(group).unwrap().prefix).collect();
        assert_eq!(prefixes.len(), groups.len());
        for group in groups {
            let topics = topics(group).unwrap();
            let pattern = Regex::new(&topics.pattern()).unwrap();
            for rung in topics.rungs() {
                let rung = rung.unwrap();
                assert!(pattern.is_match(rung.as_str()) && topics.contains(rung.as_str()), "{rung}");
                assert!(retention(&rung).unwrap() > KEPT && rung.is_reserved());
            }
        }
    }

    #[test]
    fn a_group_too_long_for_a_topic_is_refused() {
        let error = topics(&format!("{}@{}", "g".repeat(120), "t".repeat(120))).unwrap_err();
        assert_eq!(error.kind(), broker_core::ErrorKind::Invalid);
    }
}
