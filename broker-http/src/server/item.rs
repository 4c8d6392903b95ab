//! A header whose value is one string of RFC 8941 ("Structured Field Values for HTTP"), as the draft of
//! `Idempotency-Key` has it, or the same without its quotes, as many senders write it.

use std::borrow::Cow;

/// The string; `None` if it is not well formed.
///
/// What follows the quotes are parameters (section 3.1.2), which mean nothing here. Without quotes all of it is the
/// string: two keys that differ in what looks like a parameter stay two, since else a message would be lost.
pub(crate) fn read(value: &str) -> Option<Cow<'_, str>> {
    let Some(quoted) = value.strip_prefix('"') else {
        return value.bytes().all(|byte| matches!(byte, b'!' | b'#'..=b'~')).then_some(Cow::Borrowed(value));
    };
    let (text, mut rest) = string(quoted)?;
    while !rest.trim_matches(' ').is_empty() {
        rest = parameter(rest.trim_start_matches(' ').strip_prefix(';')?.trim_start_matches(' '))?;
    }
    Some(text)
}

/// A string after its first quote, and what follows it (section 4.2.5).
fn string(quoted: &str) -> Option<(Cow<'_, str>, &str)> {
    let mut text = Cow::Borrowed("");
    let mut rest = quoted;
    loop {
        let (plain, after) = rest.split_at(rest.find(['"', '\\'])?);
        if !plain.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return None;
        }
        text += plain;
        if let Some(after) = after.strip_prefix('"') {
            return Some((text, after));
        }
        let escaped = after.get(1..2).filter(|escaped| matches!(*escaped, "\"" | "\\"))?;
        text += escaped;
        rest = after.get(2..)?;
    }
}

/// What follows a parameter after its semicolon: `name` or `name=value`. Of a value that is no string only the
/// characters are checked, since nobody reads it.
fn parameter(text: &str) -> Option<&str> {
    let is_name = |letter: char| matches!(letter, 'a'..='z' | '0'..='9' | '_' | '-' | '.' | '*');
    if !text.starts_with(|letter: char| letter.is_ascii_lowercase() || letter == '*') {
        return None;
    }
    let after = text.trim_start_matches(is_name);
    let Some(value) = after.strip_prefix('=') else { return Some(after) };
    if let Some(quoted) = value.strip_prefix('"') {
        return string(quoted).map(|(_, rest)| rest);
    }
    let is_value = |letter: char| letter.is_ascii_alphanumeric() || "!#$%&'*+-./:=?^_`|~@".contains(letter);
    let rest = value.trim_start_matches(is_value);
    (rest.len() < value.len()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_read_with_and_without_quotes_and_parameters_left_out() {
        for (value, text) in [
            ("7", "7"),
            ("k;v=1", "k;v=1"),
            ("\"7\"", "7"),
            ("\"\"", ""),
            (r#""a \"b\" \\ c""#, r#"a "b" \ c"#),
            ("\"7\";v=1", "7"),
            ("\"7\" ;  v", "7"),
            ("\"7\";v=\"a;\\\"b\";w=?1;x=:aGk=:;*y=-1.5;z=text/html", "7"),
        ] {
            assert_eq!(read(value).as_deref(), Some(text), "{value}");
        }
        for bad in [
            "k\"2",
            "\"k",
            "k\"",
            "a b",
            "\"a\\b\"",
            "\"a\"b",
            "\"a\\",
            "\"a\"\"b\"",
            "\"a\", \"b\"",
            "\"a\";",
            "\"a\";=1",
            "\"a\";V=1",
            "\"a\";v=",
            "\"a\";v=\"b",
            "\"a\";v=1 2",
            "k\tl",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
