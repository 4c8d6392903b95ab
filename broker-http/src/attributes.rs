//! Filters on the attributes of an event: the dialects of the CloudEvents Subscriptions API.

use std::collections::BTreeMap;

use broker_core::{Error, Message, Result, Topic};
use serde::{Deserialize, Serialize};

use crate::event::attribute_value;
use crate::once;

/// Dialects one inside another at most; a request must not make us recurse further.
const MAX_DEPTH: usize = 8;

/// Dialects of one filter at most, those inside counted.
const MAX_DIALECTS: usize = 256;

/// Which events a subscription wants, by their attributes: one dialect of the CloudEvents
/// Subscriptions API 1.0 (section 3.2.4.1), in its JSON form.
///
/// An attribute an event does not have equals nothing, begins with nothing and ends with nothing. An event has those that a
/// structured push of it shows, as text, but `brokersubscription` and `brokerattempt`, which are its delivery's. A message
/// header that is called like an attribute and is none (it repeats, is no text, is a `ce-source` that is no URI) is none here
/// either.
///
/// ```
/// use broker_core::{Message, Topic};
/// use broker_http::AttributeFilter;
///
/// let filter: AttributeFilter = serde_json::from_str(r#"{"prefix": {"type": "com.acme."}}"#).unwrap();
/// let message = Message::new("42").with_header("ce-type", "com.acme.order")?;
/// assert!(filter.matches(&Topic::new("orders")?, &message));
/// assert!(!filter.matches(&Topic::new("orders")?, &Message::new("42")));
/// assert!(serde_json::from_str::<AttributeFilter>(r#"{"sql": "1 = 1"}"#).is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttributeFilter {
    /// Every attribute named equals its value.
    Exact(#[serde(deserialize_with = "once::map")] BTreeMap<String, String>),
    /// Every attribute named begins with its value.
    Prefix(#[serde(deserialize_with = "once::map")] BTreeMap<String, String>),
    /// Every attribute named ends with its value.
    Suffix(#[serde(deserialize_with = "once::map")] BTreeMap<String, String>),
    /// Every one of these filters matches.
    All(Vec<AttributeFilter>),
    /// At least one of these filters matches.
    Any(Vec<AttributeFilter>),
    /// This filter does not match.
    Not(Box<AttributeFilter>),
}

impl AttributeFilter {
    /// Whether a message on `topic` is wanted.
    pub fn matches(&self, topic: &Topic, message: &Message) -> bool {
        let every = |wanted: &BTreeMap<String, String>, test: fn(&str, &str) -> bool| {
            wanted
                .iter()
                .all(|(name, value)| attribute_value(topic, message, name).is_some_and(|have| test(&have, value)))
        };
        match self {
            Self::Exact(wanted) => every(wanted, |have, value| have == value),
            Self::Prefix(wanted) => every(wanted, |have, value| have.starts_with(value)),
            Self::Suffix(wanted) => every(wanted, |have, value| have.ends_with(value)),
            Self::All(filters) => filters.iter().all(|filter| filter.matches(topic, message)),
            Self::Any(filters) => filters.iter().any(|filter| filter.matches(topic, message)),
            Self::Not(filter) => !filter.matches(topic, message),
        }
    }

    /// Checks what the JSON alone cannot say.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the dialect and what is allowed.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_within(MAX_DEPTH, &mut 0)
    }

    fn check_within(&self, depth: usize, dialects: &mut usize) -> Result<()> {
        *dialects += 1;
        if depth == 0 || *dialects > MAX_DIALECTS {
            return Err(Error::invalid(format!(
                "filters: at most {MAX_DIALECTS} dialects, {MAX_DEPTH} one inside another, are allowed"
            )));
        }
        match self {
            Self::Exact(wanted) => check_attributes("exact", wanted),
            Self::Prefix(wanted) => check_attributes("prefix", wanted),
            Self::Suffix(wanted) => check_attributes("suffix", wanted),
            Self::All(filters) | Self::Any(filters) if filters.is_empty() => {
                Err(Error::invalid("filters: all and any hold a list of one filter or more"))
            }
            Self::All(filters) | Self::Any(filters) => {
                filters.iter().try_for_each(|filter| filter.check_within(depth - 1, dialects))
            }
            Self::Not(filter) => filter.check_within(depth - 1, dialects),
        }
    }
}

fn check_attributes(dialect: &str, wanted: &BTreeMap<String, String>) -> Result<()> {
    if wanted.is_empty() {
        return Err(Error::invalid(format!(
            "filters: {dialect} names no attribute, as in {{\"type\": \"com.acme.\"}}"
        )));
    }
    for (name, value) in wanted {
        let lower_case = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if name.is_empty() || !lower_case {
            return Err(Error::invalid(format!(
                "filters: {dialect} attribute {name:?}: a CloudEvents attribute's name is of a-z and 0-9"
            )));
        }
        if value.is_empty() {
            return Err(Error::invalid(format!("filters: {dialect} attribute {name:?} has an empty value")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(json: &str) -> AttributeFilter {
        let filter: AttributeFilter = serde_json::from_str(json).unwrap();
        filter.check().unwrap();
        filter
    }

    #[test]
    fn every_dialect_decides() {
        let topic = Topic::new("orders.created").unwrap();
        let message = Message::new("").with_key("eu-1").with_header("ce-subject", "a/b.png").unwrap();
        for (json, expected) in [
            (r#"{"exact":{"type":"orders.created"}}"#, true),
            (r#"{"exact":{"type":"orders.created","subject":"other"}}"#, false),
            (r#"{"exact":{"source":"/topics/orders.created"}}"#, true),
            (r#"{"prefix":{"partitionkey":"eu-"}}"#, true),
            (r#"{"suffix":{"subject":".png"}}"#, true),
            (r#"{"suffix":{"missing":"x"}}"#, false),
            (r#"{"not":{"suffix":{"missing":"x"}}}"#, true),
            (r#"{"all":[{"exact":{"specversion":"1.0"}},{"suffix":{"subject":".gif"}}]}"#, false),
            (r#"{"any":[{"exact":{"specversion":"1.0"}},{"suffix":{"subject":".gif"}}]}"#, true),
        ] {
            assert_eq!(filter(json).matches(&topic, &message), expected, "{json}");
        }
    }

    /// A header that only looks like an attribute is pushed as a header.
    #[test]
    fn what_is_no_attribute_of_the_event_is_none_to_a_filter() {
        let topic = Topic::new("orders").unwrap();
        let message = Message::new("").with_key("\u{1}").with_header("ce-data", "x").unwrap();
        let message = message.with_header("ce-twice", "x").unwrap().with_header("ce-twice", "x").unwrap();
        let message = message.with_header("ce-source", "no URI").unwrap().with_header("ce-subject", "").unwrap();
        let message = message.with_header("ce-bell", "\u{7}").unwrap().with_header("ce-brokerdedup", "x").unwrap();
        let message = message.with_header(format!("ce-{}", "a".repeat(252)), "x").unwrap();
        let long = format!(r#"{{"exact":{{"{}":"x"}}}}"#, "a".repeat(252));
        for (json, expected) in [
            (r#"{"exact":{"data":"x"}}"#, false),
            (r#"{"exact":{"twice":"x"}}"#, false),
            (r#"{"exact":{"source":"no URI"}}"#, false),
            (r#"{"exact":{"source":"/topics/orders"}}"#, true),
            (r#"{"prefix":{"subject":"a"}}"#, false),
            (r#"{"exact":{"bell":"\u0007"}}"#, false),
            (r#"{"exact":{"brokerdedup":"x"}}"#, false),
            (r#"{"exact":{"partitionkey":"\u0001"}}"#, false),
            (r#"{"exact":{"brokerkey":"AQ=="}}"#, true),
            (r#"{"exact":{"brokertopic":"orders"}}"#, true),
            (r#"{"prefix":{"brokerheaders":"ce-data=x&ce-twice=x"}}"#, true),
            (&long, false),
        ] {
            assert_eq!(filter(json).matches(&topic, &message), expected, "{json}");
        }
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        for bad in [
            r#"{"exact":{}}"#,
            r#"{"exact":{"Type":"x"}}"#,
            r#"{"prefix":{"type":""}}"#,
            r#"{"all":[]}"#,
            r#"{"not":{"any":[]}}"#,
            r#"{"exact":{"type":"x"},"prefix":{"type":"y"}}"#,
            r#"{"exact":"x"}"#,
            r#"{"exact":{"type":1}}"#,
            r"{}",
        ] {
            let refused = serde_json::from_str::<AttributeFilter>(bad).map_or(true, |filter| filter.check().is_err());
            assert!(refused, "{bad}");
        }
        let deep = format!("{}{}{}", r#"{"not":"#.repeat(20), r#"{"exact":{"type":"x"}}"#, "}".repeat(20));
        assert!(serde_json::from_str::<AttributeFilter>(&deep).unwrap().check().is_err());
    }
}
