//! A message in the making: attributes and options come in one by one, are checked, and become a
//! [`Decoded`].

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use broker_core::{Error, HeaderName, Headers, Message, MessageId, Result, Timestamp, Topic, parse_duration};
use bytes::Bytes;

use super::attributes::{
    MAX_ATTRIBUTES, NEVER_EMPTY, TIME, check_uri, header_name, is_default, is_name, is_string, says,
};
use super::{Decoded, Options, percent};

/// What is known of a message so far.
#[derive(Debug, Default)]
pub(super) struct Draft<'a> {
    specversion: bool,
    id: Option<MessageId>,
    time: Option<Timestamp>,
    content_type: Option<Cow<'a, str>>,
    partition_key: Option<Bytes>,
    key: Option<Bytes>,
    deliver_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    dedup: Option<Cow<'a, str>>,
    tombstone: bool,
    topic: Option<Topic>,
    subscription: Option<String>,
    attempt: Option<u32>,
    test: bool,
    /// Attributes that become headers, `source` and `type` among them.
    attributes: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    headers: Option<Headers>,
}

impl<'a> Draft<'a> {
    /// Takes the attribute `name`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid), naming it.
    pub(super) fn set(&mut self, name: Cow<'a, str>, value: Cow<'a, str>) -> Result<()> {
        let set = match &*name {
            "specversion" if value != "1.0" => Err(Error::invalid(format!("{value:?} is not understood, only 1.0 is"))),
            "specversion" if self.specversion => Err(twice()),
            "specversion" => {
                self.specversion = true;
                Ok(())
            }
            "id" => fill(&mut self.id, value.parse()),
            TIME => self.set_time(value),
            "datacontenttype" => fill(&mut self.content_type, Ok(value)),
            "partitionkey" => fill(&mut self.partition_key, non_empty(value).map(|text| text.into_owned().into())),
            "data" => Err(Error::invalid("no attribute may be called that")),
            "brokertopic" => fill(&mut self.topic, value.parse()),
            "brokersubscription" => fill(&mut self.subscription, Ok(value.into_owned())),
            "brokerattempt" => fill(&mut self.attempt, read_attempt(&value)),
            "brokerkey" => fill(&mut self.key, read_base64(&value).map(Bytes::from)),
            "brokerheaders" => fill(&mut self.headers, read_headers(&value)),
            "brokertombstone" => read_flag(&value).map(|tombstone| self.tombstone = tombstone),
            "brokerdelay" => fill(&mut self.deliver_at, read_due(&value)),
            "brokerttl" => fill(&mut self.expires_at, read_expiry(&value)),
            "brokerdedup" => fill(&mut self.dedup, Ok(value)),
            _ => self.extend(&name, value),
        };
        set.map_err(|error| Error::new(error.kind(), format!("attribute {name}: {}", error.message())))
    }

    /// Of the time the milliseconds are the message's own; how it was written is kept beside it, so that it is passed on
    /// as it came.
    fn set_time(&mut self, value: Cow<'a, str>) -> Result<()> {
        fill(&mut self.time, value.parse())?;
        if self.time.is_some_and(|time| says(&value, time)) {
            self.attributes.push((Cow::Borrowed(TIME), value));
        }
        Ok(())
    }

    fn extend(&mut self, name: &str, value: Cow<'a, str>) -> Result<()> {
        if !is_name(name) {
            return Err(Error::invalid("an attribute's name is lower-case letters and digits, 250 at most"));
        }
        if self.attributes.iter().any(|(have, _)| have == name) {
            return Err(twice());
        }
        // A time is one of those that every event may have.
        let times = self.attributes.iter().filter(|(have, _)| have == TIME).count();
        if self.attributes.len() - times == MAX_ATTRIBUTES {
            return Err(Error::invalid(format!("at most {MAX_ATTRIBUTES} attributes are allowed")));
        }
        if !is_string(&value) {
            return Err(Error::invalid("control characters and noncharacters are not allowed"));
        }
        let value = if NEVER_EMPTY.contains(&name) { non_empty(value)? } else { value };
        check_uri(name, &value).map_err(Error::invalid)?;
        self.attributes.push((Cow::Owned(name.to_owned()), value));
        Ok(())
    }

    /// The content type, where it is said outside the attributes.
    pub(super) fn set_content_type(&mut self, value: Cow<'a, str>) -> Result<()> {
        match &self.content_type {
            Some(have) if *have != value => Err(Error::invalid(
                "attribute datacontenttype: it differs from content-type, which says it in binary mode; leave it out",
            )),
            _ => {
                self.content_type = Some(value);
                Ok(())
            }
        }
    }

    pub(super) fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// Checks that the required attributes of a CloudEvent are there.
    pub(super) fn check_complete(&self) -> Result<()> {
        let has = |name: &str| self.attributes.iter().any(|(have, _)| have == name);
        let missing = match () {
            () if !self.specversion => "specversion",
            () if self.id.is_none() => "id",
            () if !has("source") => "source",
            () if !has("type") => "type",
            () => return Ok(()),
        };
        Err(Error::invalid(format!(
            "attribute {missing}: it is missing; a CloudEvent has specversion, id, source and type"
        )))
    }

    /// Takes the options of the request. What the event says itself stands; an option that says
    /// another thing is an error.
    pub(super) fn merge(&mut self, options: &Options) -> Result<()> {
        agree("id", &mut self.id, &options.id)?;
        let key = if self.key.is_some() { &mut self.key } else { &mut self.partition_key };
        agree("key", key, &options.key)?;
        agree("time", &mut self.time, &options.time)?;
        agree("delay", &mut self.deliver_at, &options.deliver_at)?;
        agree("ttl", &mut self.expires_at, &options.expires_at)?;
        agree("dedup", &mut self.dedup, &options.dedup.clone().map(Cow::Owned))?;
        self.tombstone |= options.tombstone;
        self.topic = self.topic.take().or_else(|| options.topic.clone());
        self.subscription = self.subscription.take().or_else(|| options.subscription.clone());
        self.attempt = self.attempt.or(options.attempt);
        self.test |= options.test;
        // A structured event pushed to us and published again says its headers twice.
        let own = self.headers.clone().unwrap_or_default();
        // And an attribute that its topic gives an event anyway says nothing of a header of that name.
        let is_default = |name: &str, value: &str| self.topic.as_ref().is_some_and(|on| is_default(on, name, value));
        let said = self.attributes.iter().filter(|(name, value)| !is_default(name, value));
        let said: Vec<String> = said.map(|(name, _)| header_name(name).to_string()).collect();
        let is_attribute = |header: &str| said.iter().any(|name| name == header);
        for (name, value) in options.headers.iter() {
            if own.get(name.as_str()).is_none() && !is_attribute(name.as_str()) {
                self.headers.get_or_insert_default().push(name.clone(), value.clone());
            }
        }
        Ok(())
    }

    /// The message. `on` is the topic it is published to, if it is on its way to the broker.
    pub(super) fn finish(self, payload: Bytes, on: Option<&Topic>) -> Result<Decoded> {
        if self.tombstone && !payload.is_empty() {
            return Err(Error::invalid("tombstone: a tombstone has no payload; leave the payload or the mark out"));
        }
        // Only where the event stayed on its topic do the defaults of that topic say nothing.
        let home = self.topic.as_ref().filter(|topic| on.is_none_or(|on| on == *topic));
        let headers = assemble(home, self.attributes, self.headers.unwrap_or_default())?;
        let mut message = if self.tombstone { Message::tombstone() } else { Message::new(payload) };
        if let Some(id) = self.id {
            message = message.with_id(id);
        }
        if let Some(time) = self.time {
            message = message.with_timestamp(time);
        }
        if let Some(key) = agreed_key(self.key, self.partition_key)? {
            message = message.with_key(key);
        }
        if let Some(content_type) = self.content_type {
            message = message.with_content_type(content_type)?;
        }
        if let Some(time) = self.deliver_at {
            message = message.with_deliver_at(time);
        }
        if let Some(time) = self.expires_at {
            message = message.with_expires_at(time);
        }
        if let Some(dedup) = self.dedup {
            message = message.with_dedup_key(dedup)?;
        }
        Ok(Decoded {
            message: message.with_headers(headers),
            topic: self.topic,
            subscription: self.subscription,
            attempt: self.attempt,
            test: self.test,
        })
    }
}

/// The message headers: attributes that are not listed, then the list; see
/// [`Plan`](super::attributes::Plan). An attribute has the last word on its value: who handed the
/// event on may have changed it.
fn assemble(home: Option<&Topic>, attributes: Vec<(Cow<'_, str>, Cow<'_, str>)>, listed: Headers) -> Result<Headers> {
    let mut headers = Headers::new();
    let mut changed: Vec<(HeaderName, Bytes)> = Vec::new();
    for (name, value) in attributes {
        if home.is_some_and(|topic| is_default(topic, &name, &value)) {
            continue;
        }
        let header = HeaderName::new(header_name(&name))?;
        let value = Bytes::from(value.into_owned());
        match listed.get(header.as_str()) {
            None => headers.push(header, value),
            Some(have) if *have == value => {}
            Some(_) => changed.push((header, value)),
        }
    }
    if headers.is_empty() && changed.is_empty() {
        return Ok(listed);
    }
    for (name, value) in listed.iter() {
        let change = changed.iter().position(|(changed, _)| changed == name);
        let value = change.map_or_else(|| value.clone(), |index| changed.swap_remove(index).1);
        headers.push(name.clone(), value);
    }
    Ok(headers)
}

fn agreed_key(key: Option<Bytes>, partition_key: Option<Bytes>) -> Result<Option<Bytes>> {
    match (key, partition_key) {
        (Some(key), Some(partition_key)) if key != partition_key => {
            Err(Error::invalid("attribute partitionkey: it says another key than the event's own key; leave one out"))
        }
        (key, partition_key) => Ok(key.or(partition_key)),
    }
}

fn agree<T: PartialEq + Clone>(name: &str, have: &mut Option<T>, option: &Option<T>) -> Result<()> {
    match (&have, option) {
        (_, None) => Ok(()),
        (Some(own), Some(option)) if own != option => Err(Error::invalid(format!(
            "option {name}: the event itself says another {name}; leave one of the two out"
        ))),
        _ => {
            have.clone_from(option);
            Ok(())
        }
    }
}

fn fill<T>(slot: &mut Option<T>, value: Result<T>) -> Result<()> {
    if slot.is_some() {
        return Err(twice());
    }
    *slot = Some(value?);
    Ok(())
}

fn twice() -> Error {
    Error::invalid("it is given twice")
}

fn non_empty(value: Cow<'_, str>) -> Result<Cow<'_, str>> {
    if value.is_empty() { Err(Error::invalid("it is empty")) } else { Ok(value) }
}

pub(super) fn read_base64(text: &str) -> Result<Vec<u8>> {
    STANDARD.decode(text).map_err(|error| Error::invalid(format!("it is not base64: {error}").to_lowercase()))
}

pub(super) fn read_attempt(text: &str) -> Result<u32> {
    match text.parse() {
        Ok(attempt @ 1..) => Ok(attempt),
        _ => Err(Error::invalid("a number from 1 is expected")),
    }
}

pub(super) fn read_flag(text: &str) -> Result<bool> {
    text.parse().map_err(|_| Error::invalid("true or false is expected"))
}

/// A delivery time: so much later than now, or a point in time.
pub(super) fn read_due(text: &str) -> Result<Timestamp> {
    // No duration has a colon, and every time has.
    if text.contains(':') { text.parse() } else { Ok(Timestamp::now().after(parse_duration(text)?)) }
}

/// An expiry: as a delivery time, but a time to live of nothing would be a message nobody gets.
pub(super) fn read_expiry(text: &str) -> Result<Timestamp> {
    if !text.contains(':') && parse_duration(text)?.is_zero() {
        return Err(Error::invalid("a time to live is longer than zero"));
    }
    read_due(text)
}

fn read_headers(form: &str) -> Result<Headers> {
    let mut headers = Headers::new();
    for pair in percent::pairs(form) {
        let (name, value) = pair.map_err(Error::invalid)?;
        let name = std::str::from_utf8(&name).map_err(|_| Error::invalid("a header's name is not UTF-8"))?;
        headers.append(name, Bytes::from(value.into_owned()))?;
    }
    Ok(headers)
}
