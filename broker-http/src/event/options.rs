//! What a publisher says beside the body: query parameters and `broker-` headers.

use std::borrow::Cow;

use broker_core::{Error, Headers, MessageId, Result, Timestamp, Topic};
use bytes::Bytes;
use http::HeaderMap;

use super::draft::{read_attempt, read_due, read_expiry, read_flag};
use super::percent;

/// The options of a publish, from the query (`?key=…`) or from headers (`broker-key: …`). Unknown
/// ones are refused, and so is one given twice.
///
/// What a push says about itself (`broker-topic`, `broker-subscription`, `broker-attempt`, `broker-test`) is
/// taken note of and means nothing to a publish, so that a push can be published again as it is.
///
/// ```
/// use broker_http::event::Options;
/// use http::HeaderMap;
///
/// let mut headers = HeaderMap::new();
/// headers.insert("broker-key", "customer%207".parse().unwrap());
/// let options = Options::parse(Some("delay=10s"), &headers)?;
/// assert_eq!(options.key.as_deref(), Some(&b"customer 7"[..]));
/// assert!(options.deliver_at.is_some());
///
/// let error = Options::parse(Some("colour=red"), &HeaderMap::new()).unwrap_err();
/// assert!(error.message().contains("colour") && error.message().contains("delay"), "{error}");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// The message's id.
    pub id: Option<MessageId>,
    /// The message's key.
    pub key: Option<Bytes>,
    /// The message's timestamp.
    pub time: Option<Timestamp>,
    /// The earliest time of delivery.
    pub deliver_at: Option<Timestamp>,
    /// When the message is no longer worth delivering.
    pub expires_at: Option<Timestamp>,
    /// The deduplication key.
    pub dedup: Option<String>,
    /// Whether the message has no payload at all.
    pub tombstone: bool,
    /// Whether a message that nobody gets is an error.
    pub require_route: bool,
    /// Message headers, from `broker-header-NAME`.
    pub headers: Headers,
    /// Of a push: the topic.
    pub topic: Option<Topic>,
    /// Of a push: the subscription.
    pub subscription: Option<String>,
    /// Of a push: the attempt.
    pub attempt: Option<u32>,
    /// Of a push: whether an operator made it, to see whether it arrives.
    pub test: bool,
}

/// The options, as a header has them after `broker-`; a query has `_` for `-`.
const KNOWN: [&str; 8] = ["id", "key", "delay", "ttl", "dedup", "time", "tombstone", "require-route"];
const HEADER: &str = "broker-";
const MESSAGE_HEADER: &str = "header-";

impl Options {
    /// Reads the options of a request.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the parameter or header and what is
    /// allowed.
    pub fn parse(query: Option<&str>, headers: &HeaderMap) -> Result<Self> {
        let mut options = Self::default();
        let mut seen = [false; KNOWN.len()];
        for pair in percent::pairs(query.unwrap_or_default()) {
            let (name, value) = pair.map_err(|why| Error::invalid(format!("query: {why}")))?;
            let name = String::from_utf8_lossy(&name);
            let label = format!("query parameter {}", shown(&name));
            let Some(option) = KNOWN.iter().position(|known| known.replace('-', "_") == name) else {
                let known = KNOWN.map(|known| known.replace('-', "_")).join(", ");
                return Err(Error::invalid(format!("{label} is unknown; known parameters: {known}")));
            };
            options.set(option, &mut seen, value).map_err(|error| named(&label, &error))?;
        }
        for (name, value) in headers {
            let Some(name) = name.as_str().strip_prefix(HEADER) else { continue };
            let label = format!("header {HEADER}{}", shown(name));
            options.header(name, value.as_bytes(), &mut seen).map_err(|error| named(&label, &error))?;
        }
        Ok(options)
    }

    /// Checks that the options can be those of many messages.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming the one that belongs to one message.
    pub fn check_many(&self) -> Result<()> {
        let single = match self {
            Self { id: Some(_), .. } => "id",
            Self { dedup: Some(_), .. } => "dedup",
            Self { tombstone: true, .. } => "tombstone",
            _ => return Ok(()),
        };
        Err(Error::invalid(format!("option {single}: it belongs to one message, and here are several; say it in each")))
    }

    fn header(&mut self, name: &str, value: &[u8], seen: &mut [bool; KNOWN.len()]) -> Result<()> {
        let value = percent::decode_value(value).map_err(Error::invalid)?;
        if let Some(name) = name.strip_prefix(MESSAGE_HEADER) {
            return self.headers.append(percent::decode_name(name)?, value.into_owned());
        }
        match name {
            "topic" => self.topic = Some(text(&value)?.parse()?),
            "subscription" => self.subscription = Some(text(&value)?.to_owned()),
            "test" => self.test = read_flag(text(&value)?)?,
            "attempt" => self.attempt = Some(read_attempt(text(&value)?)?),
            _ => match KNOWN.iter().position(|known| *known == name) {
                Some(option) => return self.set(option, seen, value),
                None => {
                    return Err(Error::invalid(format!(
                        "it is unknown; known are broker-{}, and broker-header-NAME for a header of the message",
                        KNOWN.join(", broker-")
                    )));
                }
            },
        }
        Ok(())
    }

    fn set(&mut self, option: usize, seen: &mut [bool; KNOWN.len()], value: Cow<'_, [u8]>) -> Result<()> {
        if let Some(seen) = seen.get_mut(option)
            && std::mem::replace(seen, true)
        {
            return Err(Error::invalid("it is given twice"));
        }
        match KNOWN.get(option).copied().unwrap_or_default() {
            "id" => self.id = Some(text(&value)?.parse()?),
            "key" => self.key = Some(Bytes::from(value.into_owned())),
            "delay" => self.deliver_at = Some(read_due(text(&value)?)?),
            "ttl" => self.expires_at = Some(read_expiry(text(&value)?)?),
            "dedup" => self.dedup = Some(text(&value)?.to_owned()),
            "time" => self.time = Some(text(&value)?.parse()?),
            "tombstone" => self.tombstone = read_flag(text(&value)?)?,
            _ => self.require_route = read_flag(text(&value)?)?,
        }
        Ok(())
    }
}

fn text(value: &[u8]) -> Result<&str> {
    std::str::from_utf8(value).map_err(|_| Error::invalid("it is not UTF-8"))
}

fn named(label: &str, error: &Error) -> Error {
    Error::new(error.kind(), format!("{label}: {}", error.message()))
}

/// A name from outside, cut to what an error should show.
fn shown(name: &str) -> String {
    name.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(query: &str, header: Option<(&'static str, &str)>) -> String {
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header {
            headers.insert(name, value.parse().unwrap());
        }
        Options::parse(Some(query), &headers).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (query, named) in [
            ("colour=red", "colour"),
            ("delay=-1s", "delay"),
            ("delay=200000d", "delay"),
            ("ttl=0s", "ttl"),
            ("ttl=yes", "ttl"),
            ("id=", "id"),
            ("id=%ff", "id"),
            ("key=%zz", "percent"),
            ("tombstone=maybe", "tombstone"),
            ("key=a&key=b", "twice"),
            ("time=now:", "time"),
        ] {
            assert!(refused(query, None).contains(named), "{query}: {}", refused(query, None));
        }
        for (name, value) in [
            ("broker-colour", "red"),
            ("broker-ttl", "0s"),
            ("broker-attempt", "0"),
            ("broker-topic", "a..b"),
            ("broker-header-", "x"),
            ("broker-header-%0a", "x"),
            ("broker-header-a", "100%"),
        ] {
            assert!(refused("", Some((name, value))).contains(name), "{name}");
        }
        assert!(refused("key=a", Some(("broker-key", "a"))).contains("twice"));
    }

    #[test]
    fn keys_are_bytes_and_empty_is_one() {
        let options = Options::parse(Some("key=a%ff+b"), &HeaderMap::new()).unwrap();
        assert_eq!(options.key.as_deref(), Some(&b"a\xff b"[..]));
        assert_eq!(Options::parse(Some("key="), &HeaderMap::new()).unwrap().key.as_deref(), Some(&b""[..]));
        assert_eq!(Options::parse(None, &HeaderMap::new()).unwrap(), Options::default());
    }
}
