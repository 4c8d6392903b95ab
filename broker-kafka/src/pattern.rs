//! Which topics of the server a filter means.

use broker_core::TopicFilter;

/// The first segment of topics that a wildcard never matches: the server's and our own.
const INTERNAL: [&str; 2] = ["__", "broker-"];

/// Any number of segments more. None of them is empty: Kafka has topics such as `a..b`, which are no topics of ours, and
/// whoever was given their partitions could do nothing with them.
const MORE: &str = r"(\.[^.]+)*";

/// What to subscribe to for `filter`: the topic itself, or a regular expression, which librdkafka
/// knows by its leading `^`.
///
/// `*` is one segment, a last `>` one or more; a wildcard in the first place never matches a topic
/// that begins with `__` or `broker-`. The expression is a POSIX extended one, because librdkafka's
/// are: it has no look-ahead, so what must not match is spelled out as what may.
///
/// ```
/// use broker_kafka::topic_pattern;
///
/// assert_eq!(topic_pattern(&"orders.created".parse()?), "orders.created");
/// assert_eq!(topic_pattern(&"orders.>".parse()?), r"^orders\.[^.]+(\.[^.]+)*$");
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn topic_pattern(filter: &TopicFilter) -> String {
    if !filter.is_pattern() {
        return filter.as_str().to_owned();
    }
    let mut pattern = String::from("^");
    for (place, segment) in filter.segments().enumerate() {
        if place > 0 {
            pattern.push_str(r"\.");
        }
        match (segment, place) {
            ("*", 0) => pattern.push_str(&public_segment()),
            (">", 0) => pattern.push_str(&format!("{}{MORE}", public_segment())),
            ("*", _) => pattern.push_str("[^.]+"),
            (">", _) => pattern.push_str(&format!("[^.]+{MORE}")),
            // Letters, digits, '_' and '-' stand for themselves.
            (literal, _) => pattern.push_str(literal),
        }
    }
    pattern.push('$');
    pattern
}

/// One segment that begins with none of the [`INTERNAL`] prefixes.
fn public_segment() -> String {
    let firsts: String = INTERNAL.iter().filter_map(|prefix| prefix.chars().next()).collect();
    let others = INTERNAL.iter().filter_map(|prefix| {
        let mut letters = prefix.chars();
        let first = letters.next()?;
        Some(format!("{first}{}", departs_from(letters.as_str())))
    });
    let alternatives: Vec<_> = std::iter::once(format!("[^{firsts}.][^.]*")).chain(others).collect();
    format!("({})", alternatives.join("|"))
}

/// The rest of a segment whose beginning was that of a prefix: it ends before `prefix` does, or has
/// another character somewhere in its place.
fn departs_from(prefix: &str) -> String {
    let mut letters = prefix.chars();
    let Some(letter) = letters.next() else { return String::new() };
    let rest = letters.as_str();
    if rest.is_empty() {
        return format!("([^{letter}.][^.]*)?");
    }
    format!("([^{letter}.][^.]*|{letter}{})?", departs_from(rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use broker_core::Topic;
    use proptest::prelude::*;
    use regex::Regex;

    fn matches(filter: &TopicFilter, topic: &Topic) -> bool {
        let pattern = topic_pattern(filter);
        if filter.is_pattern() {
            Regex::new(&pattern).unwrap().is_match(topic.as_str())
        } else {
            pattern == topic.as_str()
        }
    }

    #[test]
    fn a_wildcard_never_matches_what_is_not_the_users() {
        for (topic, expected) in [
            ("__consumer_offsets", false),
            ("broker-retry", false),
            ("broker-", false),
            ("broker", true),
            ("brokers", true),
            ("brok", true),
            ("_", true),
            ("_x", true),
            ("b", true),
            ("orders", true),
        ] {
            for filter in ["*", ">"] {
                let (filter, topic) = (filter.parse().unwrap(), Topic::new(topic).unwrap());
                assert_eq!(matches(&filter, &topic), expected, "{filter} on {topic}: {}", topic_pattern(&filter));
            }
        }
    }

    #[test]
    fn a_wildcard_never_matches_what_is_no_topic_of_ours() {
        for (filter, name) in
            [(">", "a..b"), (">", "a."), ("a.>", "a..b"), ("a.>", "a.b."), ("a.*", "a."), ("*.b", ".b")]
        {
            let pattern = topic_pattern(&filter.parse().unwrap());
            assert!(Topic::new(name).is_err() && !Regex::new(&pattern).unwrap().is_match(name), "{pattern} on {name}");
        }
    }

    /// Segments that come close to everything the expressions look at.
    fn segment() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z_-]{1,3}",
            "_{0,3}[a-z-]{0,2}x",
            "bro?ke?r-?[a-z]{0,2}",
            Just("__".into()),
            Just("broker-".into())
        ]
    }

    proptest! {
        #[test]
        fn the_expression_means_what_the_filter_means(
            filter in prop::collection::vec(prop_oneof![2 => segment(), 2 => Just("*".to_owned())], 0..4),
            rest in any::<bool>(),
            topic in prop::collection::vec(segment(), 1..5),
            from_filter in any::<bool>(),
        ) {
            // Half of the topics are made from the filter, so that many match.
            let topic: Vec<_> = if from_filter {
                let fill = topic.iter().cycle();
                let mut made: Vec<_> =
                    filter.iter().zip(fill).map(|(want, fill)| if want == "*" { fill.clone() } else { want.clone() }).collect();
                made.extend(topic.first().cloned().filter(|_| rest || made.is_empty()));
                made
            } else {
                topic
            };
            let mut filter = filter;
            if rest || filter.is_empty() {
                filter.push(">".into());
            }
            let filter: TopicFilter = filter.join(".").parse().unwrap();
            let topic = Topic::new(topic.join(".")).unwrap();
            prop_assert_eq!(matches(&filter, &topic), filter.matches(&topic), "{} as {}", filter, topic_pattern(&filter));
        }
    }
}
