//! CloudEvents attributes and the message headers they are.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{HeaderName, Message, Timestamp, Topic};
use bytes::Bytes;
use smallvec::SmallVec;

use super::percent;

/// Letters of an attribute's name, so that it is a header's name with what stands before it.
const MAX_NAME: usize = 250;

/// Attributes an event has at most, so that comparing each with each stays cheap; headers beyond
/// travel as headers.
pub(super) const MAX_ATTRIBUTES: usize = 100;

/// What a message header is called that is a CloudEvents attribute.
const PREFIX: &str = "ce-";

/// Part of the message, and a header where its publisher wrote it in another way than we do.
pub(super) const TIME: &str = "time";

/// Attributes that are no message headers: parts of the message, or ours.
pub(super) const OWN: [&str; 15] = [
    "specversion",
    "id",
    TIME,
    "datacontenttype",
    "partitionkey",
    "data",
    "brokertopic",
    "brokersubscription",
    "brokerattempt",
    "brokerkey",
    "brokerheaders",
    "brokertombstone",
    "brokerdelay",
    "brokerttl",
    "brokerdedup",
];

/// Attributes that CloudEvents wants to be something where they are there at all.
pub(super) const NEVER_EMPTY: [&str; 4] = ["source", "type", "subject", "dataschema"];

/// Before the topic, the `source` of an event whose publisher gave none.
pub(super) const DEFAULT_SOURCE: &str = "/topics/";

/// The `source` of an event whose publisher gave none.
pub(super) fn default_source(topic: &Topic) -> String {
    format!("{DEFAULT_SOURCE}{topic}")
}

/// The name of the message header that is attribute `name`.
pub(super) fn header_name(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// How a message's headers travel: some as attributes, some in a list of our own.
///
/// A reader puts the attributes that are not in the list first, in their order, and the list after
/// them. So the headers up to the first one that is no attribute need no place in the list, and
/// every later one does, attribute or not. An attribute that reads like the default one is listed
/// too, so that it is told apart from none.
pub(super) struct Plan<'a> {
    /// Name and value.
    pub(super) attributes: SmallVec<[(&'a str, &'a str); 8]>,
    pub(super) listed: SmallVec<[(&'a HeaderName, &'a Bytes); 8]>,
}

impl<'a> Plan<'a> {
    pub(super) fn of(topic: &Topic, message: &'a Message) -> Self {
        let mut plan = Self { attributes: SmallVec::new(), listed: SmallVec::new() };
        let mut candidates = 0;
        for (name, value) in message.headers().iter() {
            let candidate = name.as_str().strip_prefix(PREFIX).filter(|_| candidates < MAX_ATTRIBUTES);
            candidates += usize::from(candidate.is_some());
            match candidate.and_then(|attribute| as_attribute(message, name, attribute, value)) {
                Some((attribute, text)) => {
                    if !plan.listed.is_empty() || is_default(topic, attribute, text) {
                        plan.listed.push((name, value));
                    }
                    plan.attributes.push((attribute, text));
                }
                None => plan.listed.push((name, value)),
            }
        }
        plan
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.attributes.iter().any(|(have, _)| *have == name)
    }

    /// The list as `brokerheaders` has it, if there is one.
    pub(super) fn form(&self) -> Option<String> {
        let mut form = String::new();
        for (name, value) in &self.listed {
            percent::push_pair(&mut form, name.as_str().as_bytes(), value);
        }
        (!self.listed.is_empty()).then_some(form)
    }
}

/// What attribute `name` is of the event that a message on `topic` is: the same as a structured push shows, but what that
/// says of the delivery (`brokersubscription`, `brokerattempt`).
pub(crate) fn value<'a>(topic: &'a Topic, message: &'a Message, name: &str) -> Option<Cow<'a, str>> {
    Some(match name {
        "specversion" => Cow::Borrowed("1.0"),
        "id" => message.id().to_string().into(),
        "datacontenttype" => message.content_type()?.into(),
        "partitionkey" => message.key().and_then(as_partition_key)?.into(),
        "brokertopic" => topic.as_str().into(),
        "brokerkey" => {
            let key = message.key().filter(|key| as_partition_key(key).is_none())?;
            STANDARD.encode(key).into()
        }
        "brokerheaders" => Plan::of(topic, message).form()?.into(),
        "brokerdelay" => message.deliver_at()?.to_string().into(),
        "brokerttl" => message.expires_at()?.to_string().into(),
        "brokerdedup" => message.dedup_key()?.into(),
        "brokertombstone" if message.is_tombstone() => Cow::Borrowed("true"),
        _ => match (given(message, name), name) {
            (Some(text), _) => text.into(),
            (None, TIME) => message.timestamp().to_string().into(),
            (None, "type") => topic.as_str().into(),
            (None, "source") => default_source(topic).into(),
            (None, _) => return None,
        },
    })
}

/// The value of the header that is attribute `name`, if that is one.
fn given<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    let candidates = message.headers().iter().filter(|(header, _)| header.as_str().starts_with(PREFIX));
    let (header, value) = candidates
        .take(MAX_ATTRIBUTES)
        .find(|(header, _)| header.as_str().strip_prefix(PREFIX).is_some_and(|have| have == name))?;
    as_attribute(message, header, header.as_str().strip_prefix(PREFIX)?, value).map(|(_, text)| text)
}

/// Whether this is what an event on `topic` says that says nothing itself.
pub(super) fn is_default(topic: &Topic, name: &str, value: &str) -> bool {
    match name {
        "type" => value == topic.as_str(),
        "source" => value.strip_prefix(DEFAULT_SOURCE) == Some(topic.as_str()),
        _ => false,
    }
}

fn as_attribute<'a>(
    message: &Message,
    header: &HeaderName,
    name: &'a str,
    value: &'a Bytes,
) -> Option<(&'a str, &'a str)> {
    let text = std::str::from_utf8(value).ok().filter(|text| is_string(text))?;
    let once = message.headers().get_all(header.as_str()).nth(1).is_none();
    let own = OWN.contains(&name) && !(name == TIME && says(text, message.timestamp()));
    let empty = text.is_empty() && NEVER_EMPTY.contains(&name);
    let fits = is_name(name) && !own && !empty && check_uri(name, text).is_ok();
    (fits && once).then_some((name, text))
}

/// Whether this text is RFC 3339 for a time, to the millisecond, and not what we would write.
pub(super) fn says(text: &str, time: Timestamp) -> bool {
    is_rfc_3339(text) && text.parse().is_ok_and(|read: Timestamp| read == time) && text != time.to_string()
}

/// `2018-04-05T17:31:00.123456+02:00`: what parses as a time may be more than that, which others do not read.
fn is_rfc_3339(text: &str) -> bool {
    let form = |text: &str, form: &str| {
        let fits = |(byte, want): (u8, u8)| match want {
            b'0' => byte.is_ascii_digit(),
            b'+' => matches!(byte, b'+' | b'-'),
            _ => byte.eq_ignore_ascii_case(&want),
        };
        text.len() == form.len() && text.bytes().zip(form.bytes()).all(fits)
    };
    const DATE_TIME: &str = "0000-00-00T00:00:00";
    let Some((date_time, rest)) = text.split_at_checked(DATE_TIME.len()) else { return false };
    let offset = match rest.strip_prefix('.') {
        Some(fraction) => {
            let offset = fraction.trim_start_matches(|digit: char| digit.is_ascii_digit());
            if offset.len() == fraction.len() {
                return false;
            }
            offset
        }
        None => rest,
    };
    form(date_time, DATE_TIME) && (form(offset, "Z") || form(offset, "+00:00"))
}

/// An attribute's name: lower-case letters and digits ("Naming Conventions" of the specification).
pub(super) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// A `String` of the CloudEvents type system: no control characters and no noncharacters.
pub(super) fn is_string(text: &str) -> bool {
    text.chars().all(|letter| {
        let code = u32::from(letter);
        !letter.is_control() && !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe
    })
}

/// Whether attribute `name` is a `URI` or a `URI-reference` of the CloudEvents type system.
pub(super) fn is_uri(name: &str) -> bool {
    matches!(name, "source" | "dataschema")
}

/// Whether attribute `name` may have this value where it is a `URI` or a `URI-reference` of the CloudEvents type system:
/// others read no event of a batch if one has a `source` or `dataschema` that is none.
pub(super) fn check_uri(name: &str, value: &str) -> Result<(), &'static str> {
    match name {
        _ if is_uri(name) && !has_uri_characters(value) => Err(
            "it is a URI, which has no spaces, controls, letters beyond ASCII nor \"<>\\^`{|}, and two hexadecimal digits after \
            each %; percent-encode them",
        ),
        "dataschema" if !has_scheme(value) => Err("it is a URI with a scheme, as in https://example.com/schema"),
        _ => Ok(()),
    }
}

/// RFC 3986, section 2. Brackets are let be wherever they are.
fn has_uri_characters(text: &str) -> bool {
    let mut bytes = text.bytes();
    let hex = |bytes: &mut std::str::Bytes<'_>| bytes.next().is_some_and(|byte| byte.is_ascii_hexdigit());
    while let Some(byte) = bytes.next() {
        let fits = match byte {
            b'%' => hex(&mut bytes) && hex(&mut bytes),
            b'!' | b'#'..=b';' | b'=' | b'?'..=b'[' | b']' | b'_' | b'a'..=b'z' | b'~' => true,
            _ => false,
        };
        if !fits {
            return false;
        }
    }
    true
}

/// RFC 3986, section 3.1.
fn has_scheme(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
    })
}

/// Whether `partitionkey` can say this key.
pub(super) fn as_partition_key(key: &Bytes) -> Option<&str> {
    std::str::from_utf8(key).ok().filter(|text| !text.is_empty() && is_string(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_told_by_its_characters_and_its_scheme() {
        for uri in
            ["urn:uuid:6e8bc430-9c3a-11d9-9669-0800200c9a66", "https://u@[::1]:8/a%20b?c=d&e=(f)#g", "mailto:a+b@c.d"]
        {
            assert_eq!((check_uri("source", uri), check_uri("dataschema", uri)), (Ok(()), Ok(())), "{uri}");
        }
        for reference in ["/topics/a.b", "../x", "1-555-123-4567", "a/b:c", "?q", ":"] {
            assert_eq!(check_uri("source", reference), Ok(()), "{reference}");
            assert!(check_uri("dataschema", reference).is_err(), "{reference}");
        }
        for neither in [
            " a:b", "a:b c", "a:\u{7f}", "a:\u{e4}", "a:<b>", "a:\"", "a:{b}", "a:\\b", "a:%", "a:%2", "a:%2g",
            "a:%%20",
        ] {
            assert!(check_uri("source", neither).is_err() && check_uri("dataschema", neither).is_err(), "{neither}");
            assert_eq!(check_uri("subject", neither), Ok(()));
        }
    }

    #[test]
    fn a_time_is_kept_as_written_where_it_is_rfc_3339() {
        let time: Timestamp = "2018-04-05T17:31:00.123Z".parse().unwrap();
        for text in [
            "2018-04-05T17:31:00.123456Z",
            "2018-04-05T17:31:00.1230Z",
            "2018-04-05t17:31:00.123z",
            "2018-04-05T19:31:00.123+02:00",
            "2018-04-05T17:31:00.123-00:00",
        ] {
            assert!(says(text, time), "{text}");
        }
        for text in [
            "2018-04-05T17:31:00.123Z",
            "2018-04-05T17:31:00Z",
            "2018-04-05 17:31:00.123Z",
            "20180405T173100.123Z",
            "2018-04-05T17:31:00,123Z",
            "2018-04-05T19:31:00.123+02",
            "2018-04-05T17:31:00.123Z[UTC]",
            "2018-04-05T17:31:00.Z",
            "+002018-04-05T17:31:00.123Z",
            "2018-04-05T17:31:00.123",
            "2018-04-05T17:31:0",
            "",
            "ä018-04-05T17:31:00.123Z",
        ] {
            assert!(!says(text, time), "{text}");
        }
    }
}
