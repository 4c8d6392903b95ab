//! Which topics a subscription wants.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::topic::{MAX_TOPIC_BYTES, check_segments};
use crate::{Error, Result, Topic};

/// A topic, or a pattern over topics: `*` stands for one segment, a last `>` for one or more.
///
/// A pattern that begins with a wildcard never matches the broker's own topics (first segment
/// `broker-…`), nor Kafka's (`__…`).
///
/// ```
/// use broker_core::{Topic, TopicFilter};
///
/// let filter = TopicFilter::new("orders.*.eu.>")?;
/// assert!(filter.matches(&Topic::new("orders.created.eu.berlin")?));
/// assert!(!filter.matches(&Topic::new("orders.created.eu")?));
/// assert!(TopicFilter::new("orders.>.eu").is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter {
    text: Arc<str>,
    pattern: bool,
}

impl TopicFilter {
    /// Parses a filter.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), naming the filter and what is allowed.
    pub fn new(filter: impl AsRef<str>) -> Result<Self> {
        let filter = filter.as_ref();
        let mut pattern = false;
        let mut segments = filter.split('.').peekable();
        while let Some(segment) = segments.next() {
            match segment {
                ">" if segments.peek().is_some() => {
                    return Err(Error::invalid(format!("filter {filter:?}: '>' is allowed as the last segment only")));
                }
                "*" | ">" => pattern = true,
                _ if segment.contains(['*', '>']) => {
                    return Err(Error::invalid(format!(
                        "filter {filter:?}: '*' and '>' stand for whole segments, as in orders.*.created or orders.>"
                    )));
                }
                _ => {}
            }
        }
        if pattern {
            // What is left, wildcards taken as any segment, has a topic's grammar.
            check_segments("filter", &filter.replace(['*', '>'], "x"), MAX_TOPIC_BYTES).map_err(|error| {
                Error::invalid(error.message().replacen("filter", &format!("filter {filter:?}, as"), 1))
            })?;
        } else {
            check_segments("filter", filter, MAX_TOPIC_BYTES)?;
        }
        Ok(Self { text: filter.into(), pattern })
    }

    /// The filter as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the filter has a wildcard.
    pub fn is_pattern(&self) -> bool {
        self.pattern
    }

    /// The one topic of a filter without a wildcard.
    ///
    /// ```
    /// use broker_core::TopicFilter;
    /// assert_eq!(TopicFilter::new("orders")?.topic().map(|t| t.to_string()).as_deref(), Some("orders"));
    /// assert!(TopicFilter::new("orders.>")?.topic().is_none());
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn topic(&self) -> Option<Topic> {
        if self.pattern { None } else { Topic::new(&*self.text).ok() }
    }

    /// The parts between the dots, wildcards included.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.text.split('.')
    }

    /// Whether a message on `topic` is wanted.
    pub fn matches(&self, topic: &Topic) -> bool {
        if !self.pattern {
            return *self.text == *topic.as_str();
        }
        let mut wanted = self.segments();
        let mut first = true;
        for segment in topic.segments() {
            let internal = first && (segment.starts_with("broker-") || segment.starts_with("__"));
            match wanted.next() {
                Some(">") => return !internal,
                Some("*") if !internal => {}
                Some(literal) if literal == segment => {}
                _ => return false,
            }
            first = false;
        }
        wanted.next().is_none()
    }

    /// Whether every topic that `other` matches is matched by this filter too: what a right over a
    /// pattern includes.
    ///
    /// ```
    /// use broker_core::TopicFilter;
    ///
    /// let own = TopicFilter::new("orders.>")?;
    /// assert!(own.covers(&TopicFilter::new("orders.*.eu")?));
    /// assert!(!own.covers(&TopicFilter::new("*.created")?));
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn covers(&self, other: &TopicFilter) -> bool {
        let (mut own, mut others) = (self.segments(), other.segments());
        let mut first = true;
        loop {
            let theirs = others.next();
            // A pattern's first wildcard leaves the broker's own topics out.
            let internal =
                first && theirs.is_some_and(|segment| segment.starts_with("broker-") || segment.starts_with("__"));
            match (own.next(), theirs) {
                (None, None) => return true,
                (Some(">"), Some(_)) => return !internal,
                (Some("*"), Some(segment)) if segment != ">" && !internal => {}
                (Some(literal), Some(segment)) if literal == segment && literal != "*" => {}
                _ => return false,
            }
            first = false;
        }
    }
}

impl From<&Topic> for TopicFilter {
    fn from(topic: &Topic) -> Self {
        Self { text: topic.as_str().into(), pattern: false }
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TopicFilter({})", self.text)
    }
}

impl FromStr for TopicFilter {
    type Err = Error;

    fn from_str(filter: &str) -> Result<Self> {
        Self::new(filter)
    }
}

impl TryFrom<&str> for TopicFilter {
    type Error = Error;

    fn try_from(filter: &str) -> Result<Self> {
        Self::new(filter)
    }
}

crate::text::serde_as_text!(TopicFilter);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_covers_what_lies_within_it() {
        let parse = |text: &str| TopicFilter::new(text).unwrap();
        for (own, other, covers) in [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.b", "a.*", false),
            ("a.*", "a.b", true),
            ("a.*", "a.*", true),
            ("a.*", "a.>", false),
            ("a.*", "a.b.c", false),
            ("a.>", "a.>", true),
            ("a.>", "a.*.>", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("a.>", "*.b", false),
            ("a.>", ">", false),
            ("*.>", ">", false),
            (">", "*.>", true),
            (">", ">", true),
            (">", "a", true),
            ("*", "a", true),
            ("*.b", "a.b", true),
            ("*.b", "a.*", false),
            (">", "broker-x.a", false),
            (">", "__x", false),
            ("*", "broker-x", false),
            ("broker-x.>", "broker-x.a", true),
            ("a.>", "a.broker-x", true),
        ] {
            assert_eq!(parse(own).covers(&parse(other)), covers, "{own} covers {other}");
        }
    }

    #[test]
    fn matches_by_whole_segments() {
        for (filter, topic, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c.d", true),
            ("a.>", "a", false),
            (">", "a", true),
            (">", "broker-x.a", false),
            ("*", "broker-x", false),
            (">", "__consumer_offsets", false),
            ("broker-x.>", "broker-x.a", true),
            ("*.*.>", "a.b", false),
            ("*.*.>", "a.b.c", true),
        ] {
            let matches = TopicFilter::new(filter).unwrap().matches(&Topic::new(topic).unwrap());
            assert_eq!(matches, expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn refuses_what_is_no_pattern() {
        for bad in ["", ">.a", "a.>.b", "a*", "a.b>", "a..*", "*.", "**", "a.* ", &format!("*.{}", "x".repeat(248))] {
            let error = TopicFilter::new(bad).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{bad}");
        }
    }
}
