//! Percent-encoding: header values as the CloudEvents HTTP binding writes them (section 3.1.3.2),
//! header names, and `application/x-www-form-urlencoded` over bytes rather than text.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};

use http::HeaderValue;
use smallvec::SmallVec;

use broker_core::{Error, Result};

/// A header value: everything but printable ASCII is encoded, and of that the space, the double
/// quote and the percent sign.
pub(crate) fn encode_value(bytes: &[u8]) -> HeaderValue {
    if bytes.iter().all(is_kept) {
        return into_value(bytes);
    }
    let mut encoded = Encoded::default();
    encoded.push(bytes);
    into_value(&encoded.0)
}

/// As [`encode_value`], of what a value shows itself as: a push has a dozen of these.
pub(crate) fn encode_display(value: impl Display) -> HeaderValue {
    let mut encoded = Encoded::default();
    // Writing to memory cannot fail.
    let _ = write!(encoded, "{value}");
    into_value(&encoded.0)
}

fn is_kept(byte: &u8) -> bool {
    matches!(byte, b'!'..=b'~') && !matches!(byte, b'"' | b'%')
}

/// A header value in the making, on the stack unless it is long.
#[derive(Default)]
struct Encoded(SmallVec<[u8; 96]>);

impl Encoded {
    fn push(&mut self, bytes: &[u8]) {
        if bytes.iter().all(is_kept) {
            return self.0.extend_from_slice(bytes);
        }
        for byte in bytes {
            if is_kept(byte) { self.0.push(*byte) } else { self.0.extend_from_slice(&escape(*byte)) }
        }
    }
}

impl std::fmt::Write for Encoded {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

/// `%` and two hexadecimal digits.
fn escape(byte: u8) -> [u8; 3] {
    let digit = |value: u8| if value < 10 { b'0' + value } else { b'A' + value - 10 };
    [b'%', digit(byte >> 4), digit(byte & 15)]
}

/// Bytes [`encode_value`] makes of `bytes`.
pub(crate) fn encoded_len(bytes: &[u8]) -> usize {
    bytes.iter().map(|byte| if is_kept(byte) { 1 } else { 3 }).sum()
}

fn into_value(bytes: &[u8]) -> HeaderValue {
    // Printable ASCII is a header value always; were it not, an empty one hurts nobody.
    HeaderValue::from_bytes(bytes).unwrap_or(HeaderValue::from_static(""))
}

/// Reads a header value: a double-quoted one is unquoted first, as senders of older versions of the
/// binding wrote it; then one round of percent-decoding. Bytes that needed no encoding, or had
/// none, are taken as they are.
///
/// # Errors
///
/// What is wrong with it.
pub(crate) fn decode_value(value: &[u8]) -> Result<Cow<'_, [u8]>, &'static str> {
    let value = match value {
        [b'"', inner @ .., b'"'] => Cow::Owned(unquote(inner)?),
        _ => Cow::Borrowed(value),
    };
    Ok(match value {
        Cow::Borrowed(value) => decode(value, false)?,
        Cow::Owned(value) => Cow::Owned(decode(&value, false)?.into_owned()),
    })
}

fn unquote(inner: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => out.push(*bytes.next().ok_or("a backslash at the end of a quoted value escapes nothing")?),
            b'"' => return Err("a double quote inside a quoted value needs a backslash before it"),
            _ => out.push(*byte),
        }
    }
    Ok(out)
}

fn decode(text: &[u8], plus_is_space: bool) -> Result<Cow<'_, [u8]>, &'static str> {
    if !text.iter().any(|byte| *byte == b'%' || (plus_is_space && *byte == b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || char::from(*bytes.next()?).to_digit(16);
                match (digit(), digit()) {
                    (Some(high), Some(low)) => u8::try_from(high * 16 + low).unwrap_or_default(),
                    _ => {
                        return Err(
                            "a percent sign is followed by two hexadecimal digits; write %25 for the sign itself",
                        );
                    }
                }
            }
            b'+' if plus_is_space => b' ',
            _ => *byte,
        });
    }
    Ok(Cow::Owned(out))
}

/// Text that comes back as a header's value, after it was shown as it is: all but what would not come back the same, a
/// space at an end, since those of a header's value are trimmed, and the percent sign.
pub(crate) fn encode_field(text: &str) -> Cow<'_, str> {
    let trimmed = text.trim_matches(' ');
    if trimmed.len() == text.len() && !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let before = text.len() - text.trim_start_matches(' ').len();
    let after = text.len() - before - trimmed.len();
    Cow::Owned(["%20".repeat(before), trimmed.replace('%', "%25"), "%20".repeat(after)].concat())
}

/// Reads what [`encode_field`] wrote; what it cannot have written is taken as it is.
pub(crate) fn decode_field(text: &str) -> Cow<'_, str> {
    match decode(text.as_bytes(), false) {
        Ok(Cow::Owned(bytes)) => String::from_utf8(bytes).map_or(Cow::Borrowed(text), Cow::Owned),
        _ => Cow::Borrowed(text),
    }
}

/// A message header's name as the end of an HTTP header's: HTTP ignores case, so that capitals are
/// encoded, and so is what is no token.
pub(crate) fn encode_name(name: &str) -> Cow<'_, str> {
    if name.bytes().all(is_plain_name_byte) {
        return Cow::Borrowed(name);
    }
    let mut text = String::with_capacity(name.len() + 16);
    for byte in name.bytes() {
        if is_plain_name_byte(byte) {
            text.push(char::from(byte));
        } else {
            text.extend(escape(byte).map(char::from));
        }
    }
    // HTTP would lower the digits as well.
    Cow::Owned(text.to_ascii_lowercase())
}

fn is_plain_name_byte(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9') || b"!#$&'*+-.^_`|~".contains(&byte)
}

/// Reads what [`encode_name`] wrote.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid), naming it.
pub(crate) fn decode_name(name: &str) -> Result<Cow<'_, str>> {
    let invalid = |why: &str| Error::invalid(format!("header broker-header-{name}: in its name, {why}"));
    match decode(name.as_bytes(), false).map_err(invalid)? {
        Cow::Borrowed(_) => Ok(Cow::Borrowed(name)),
        Cow::Owned(bytes) => {
            String::from_utf8(bytes).map(Cow::Owned).map_err(|_| invalid("what is percent-encoded is not UTF-8"))
        }
    }
}

/// Appends `name=value` to a form, after a `&` unless it is the first.
pub(crate) fn push_pair(form: &mut String, name: &[u8], value: &[u8]) {
    if !form.is_empty() {
        form.push('&');
    }
    form.extend(form_urlencoded::byte_serialize(name));
    form.push('=');
    form.extend(form_urlencoded::byte_serialize(value));
}

/// A name and its value.
type Pair<'a> = (Cow<'a, [u8]>, Cow<'a, [u8]>);

/// The pairs of a form or query, decoded to bytes.
pub(crate) fn pairs(form: &str) -> impl Iterator<Item = Result<Pair<'_>, &'static str>> {
    form.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Ok((decode(name.as_bytes(), true)?, decode(value.as_bytes(), true)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(value: &str) -> Result<Vec<u8>, &'static str> {
        decode_value(value.as_bytes()).map(Cow::into_owned)
    }

    /// The example of the binding, section 3.1.3.2.
    #[test]
    fn encodes_as_the_binding_says() {
        assert_eq!(encode_value("Euro € 😀".as_bytes()), "Euro%20%E2%82%AC%20%F0%9F%98%80");
        assert_eq!(encode_value(b"a\"b%c\x7f!~"), "a%22b%25c%7F!~");
        assert_eq!(decoded("Euro%20%e2%82%AC%20%F0%9F%98%80").unwrap(), "Euro € 😀".as_bytes());
    }

    #[test]
    fn takes_what_older_senders_wrote() {
        assert_eq!(decoded(r#""a \"b\" \\ c""#).unwrap(), br#"a "b" \ c"#);
        assert_eq!(decoded(r#""50%25 off""#).unwrap(), b"50% off");
        assert_eq!(decoded("a b").unwrap(), b"a b");
        assert_eq!(decoded(r#"say "hi""#).unwrap(), br#"say "hi""#);
        assert_eq!(decoded("%41").unwrap(), b"A");
        assert_eq!(decoded("\"").unwrap(), b"\"");
    }

    #[test]
    fn refuses_what_means_nothing() {
        for bad in ["100%", "%4", "%zz", "%+1", r#""a"b""#, r#""a\""#] {
            assert!(decoded(bad).is_err(), "{bad}");
        }
        assert!(decode_name("%ff").is_err());
    }

    proptest! {
        #[test]
        fn every_value_round_trips(bytes: Vec<u8>) {
            let value = encode_value(&bytes);
            prop_assert_eq!(value.len(), encoded_len(&bytes));
            prop_assert_eq!(decode_value(value.as_bytes()).unwrap(), bytes);
        }

        #[test]
        fn every_field_round_trips_through_a_header(text in "[ %0-9a-fé]{1,12}") {
            let encoded = encode_field(&text);
            prop_assert_eq!(encoded.trim(), &*encoded);
            prop_assert_eq!(&*decode_field(&encoded), &*text);
        }

        #[test]
        fn every_name_round_trips(name in "[^\\p{Cc}]{1,40}") {
            let encoded = encode_name(&name);
            prop_assert!(http::HeaderName::from_bytes(encoded.as_bytes()).unwrap().as_str() == encoded);
            prop_assert_eq!(&*decode_name(&encoded).unwrap(), &*name);
        }

        #[test]
        fn every_form_round_trips(list: Vec<(Vec<u8>, Vec<u8>)>) {
            let mut form = String::new();
            for (name, value) in &list {
                push_pair(&mut form, name, value);
            }
            let read: Vec<_> = pairs(&form).map(|pair| pair.unwrap()).map(|(n, v)| (n.into_owned(), v.into_owned())).collect();
            prop_assert_eq!(read, list);
        }
    }
}
