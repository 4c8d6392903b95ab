//! Topics as an operator declares them: bounds for some, and whether there are any others.

use std::collections::HashMap;

use broker_core::{Error, Result, Topic, TopicFilter};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::problem::{Answer, Problem};

/// What is declared of topics. By default nothing is, and any topic may be published to.
///
/// ```
/// use broker_http::{TopicRule, Topics};
///
/// let orders = TopicRule::new("orders.>".parse()?).with_max_message_bytes(64 << 10);
/// let topics = Topics::new([orders], true)?;
/// assert!(topics.rule(&"orders.created".parse()?).is_some());
/// assert!(topics.rule(&"oders.created".parse()?).is_none());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topics {
    rules: Vec<TopicRule>,
    only: bool,
}

/// What is declared of the topics of one filter; in the configuration file an entry of `[[topics]]`.
///
/// ```
/// use broker_http::TopicRule;
/// let rule = TopicRule::new("orders.>".parse()?).with_memory_bytes(16 << 20);
/// assert_eq!(rule.memory_bytes, Some(16 << 20));
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TopicRule {
    /// The topics it speaks of; of several rules the first that matches counts.
    pub filter: TopicFilter,
    /// Bytes of payload, key and headers a message may have, where that is less than the broker's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_message_bytes: Option<usize>,
    /// Bytes that the messages of one such topic may hold, instead of the limit for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

impl TopicRule {
    /// Declares the topics of a filter, with the bounds that all have.
    pub fn new(filter: TopicFilter) -> Self {
        Self { filter, max_message_bytes: None, memory_bytes: None }
    }

    /// Sets how many bytes a message may have.
    #[must_use]
    pub fn with_max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = Some(bytes);
        self
    }

    /// Sets how many bytes the messages of one such topic may hold.
    #[must_use]
    pub fn with_memory_bytes(mut self, bytes: u64) -> Self {
        self.memory_bytes = Some(bytes);
        self
    }
}

impl Topics {
    /// These rules; with `only`, a topic that none of them matches cannot be published to, so that a
    /// name with a slip is told and not obeyed.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a bound of zero, for different bounds of one filter, or for `only`
    /// without a rule.
    pub fn new(rules: impl IntoIterator<Item = TopicRule>, only: bool) -> Result<Self> {
        let rules: Vec<_> = rules.into_iter().collect();
        if only && rules.is_empty() {
            return Err(Error::invalid("topics: none is declared, and no others are allowed: nobody could publish"));
        }
        for rule in &rules {
            if rule.max_message_bytes == Some(0) || rule.memory_bytes == Some(0) {
                return Err(Error::invalid(format!(
                    "topics {}: a bound of 0 would refuse everything; give 1 or more",
                    rule.filter
                )));
            }
        }
        let mut first = HashMap::new();
        for rule in &rules {
            if *first.entry(&rule.filter).or_insert(rule) != rule {
                return Err(Error::invalid(format!(
                    "topics {}: it is declared twice, with different bounds; leave one out",
                    rule.filter
                )));
            }
        }
        Ok(Self { rules, only })
    }

    /// The rule that counts for a topic.
    pub fn rule(&self, topic: &Topic) -> Option<&TopicRule> {
        self.rules.iter().find(|rule| rule.filter.matches(topic))
    }

    /// The bounds of a topic.
    ///
    /// # Errors
    ///
    /// 404 for a topic that is not among those declared, where there are no others.
    pub(crate) fn bounds(&self, topic: &Topic) -> Answer<Bounds> {
        match self.rule(topic) {
            None if self.only => {
                let detail = format!("topic {topic} is not among those the operator declared");
                Err(Problem::new(StatusCode::NOT_FOUND, broker_core::ErrorKind::NotFound, detail))
            }
            rule => Ok(Bounds {
                message: rule.and_then(|rule| rule.max_message_bytes),
                memory: rule.and_then(|rule| rule.memory_bytes),
            }),
        }
    }
}

/// The bounds one topic has of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    pub(crate) message: Option<usize>,
    pub(crate) memory: Option<u64>,
}

impl Bounds {
    /// Refuses a message that is larger than its topic takes.
    pub(crate) fn check(&self, topic: &Topic, size: usize) -> Result<()> {
        match self.message {
            Some(max) if size > max => Err(Error::too_large(format!(
                "the message has {size} bytes of payload, key and headers, and topic {topic} takes {max}"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_counts_and_others_can_be_refused() {
        let rule = |filter: &str| TopicRule::new(filter.parse().unwrap());
        let topics =
            Topics::new([rule("a.b").with_max_message_bytes(10), rule("a.>").with_memory_bytes(20)], true).unwrap();
        let bounds = |topic: &str| topics.bounds(&topic.parse().unwrap());
        assert_eq!(bounds("a.b").unwrap().message, Some(10));
        assert_eq!(bounds("a.b").unwrap().memory, None);
        assert_eq!(bounds("a.c").unwrap().memory, Some(20));
        assert_eq!(bounds("b").unwrap_err().status(), 404);
        bounds("a.b").unwrap().check(&"a.b".parse().unwrap(), 10).unwrap();
        assert!(bounds("a.b").unwrap().check(&"a.b".parse().unwrap(), 11).is_err());
        assert!(Topics::default().bounds(&"x".parse().unwrap()).is_ok());
        let twice = |other: TopicRule| Topics::new([rule("a.b"), rule("a.>").with_memory_bytes(20), other], false);
        assert!(twice(rule("a.>").with_memory_bytes(21)).is_err() && twice(rule("a.b").with_memory_bytes(1)).is_err());
        assert!(twice(rule("a.b")).is_ok() && twice(rule("a.*")).is_ok(), "nothing else is said of it");
        assert!(Topics::new([], true).is_err() && Topics::new([rule("a").with_memory_bytes(0)], false).is_err());
    }
}
