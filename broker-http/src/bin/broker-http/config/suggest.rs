//! Errors of the configuration file, as somebody wants to read them: the line, the near key, and no
//! secret.

use std::fmt::Write as _;

/// How alike two keys must be for one to be taken for a slip of the other.
const ALIKE: f64 = 0.8;

/// What is wrong with a TOML text, with the line it is in. The text itself is not shown: it may hold
/// a secret.
pub(super) fn describe(text: &str, error: &toml::de::Error) -> String {
    let mut described = String::new();
    if let Some(span) = error.span() {
        let line = text.get(..span.start).map_or(1, |before| before.matches('\n').count() + 1);
        // Writing to a string cannot fail.
        let _ = write!(described, "line {line}: ");
    }
    described.push_str(&without_values(error.message()));
    if let Some(near) = near(error.message()) {
        let _ = write!(described, "; did you mean `{near}`?");
    }
    described
}

/// Of `unknown field `lisen`, expected one of `listen`, …` the expected one that is meant.
pub(super) fn near(message: &str) -> Option<&str> {
    let (unknown, expected) = message.strip_prefix("unknown ")?.split_once(", expected ")?;
    let unknown = quoted(unknown).next()?;
    nearest(unknown, quoted(expected))
}

/// The key that is meant by an unknown one.
pub(super) fn nearest<'a>(unknown: &str, keys: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |key: &&str| strsim::jaro_winkler(unknown, key);
    keys.filter(|key| likeness(key) >= ALIKE).max_by(|one, two| likeness(one).total_cmp(&likeness(two)))
}

fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// `invalid type: string "secret", expected …` without the string.
fn without_values(message: &str) -> String {
    match (message.find("string \""), message.rfind("\", expected")) {
        (Some(begin), Some(end)) if begin < end => {
            let (head, rest) = message.split_at(begin);
            let tail = rest.get(end - begin + 1..).unwrap_or_default();
            format!("{head}string{tail}")
        }
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_near_key_is_found_and_a_far_one_is_not() {
        for (message, found) in [
            ("unknown field `lisen`, expected one of `listen`, `broker`", Some("listen")),
            ("unknown field `conections`, expected one of `listen`, `connections`", Some("connections")),
            ("unknown field `colour`, expected one of `listen`, `broker`", None),
            ("unknown field `actoins`, expected `actions` or `topics`", Some("actions")),
            ("unknown variant `publsih`, expected one of `publish`, `settle`", Some("publish")),
            ("missing field `name`", None),
        ] {
            assert_eq!(near(message), found, "{message}");
        }
    }

    #[test]
    fn a_value_is_not_repeated() {
        let message = without_values("invalid type: string \"hunter2, \\\"x\\\"\", expected a sequence");
        assert_eq!(message, "invalid type: string, expected a sequence");
        assert_eq!(without_values("missing field `name`"), "missing field `name`");
    }
}
