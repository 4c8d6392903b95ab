//! From messages to a request: mode, headers, signature.

use broker_core::{Error, Message, MessageId, Result, Timestamp, Topic};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use sha2::{Digest as _, Sha256};

use super::connection::{ANSWER_BYTES, Content};
use super::sign::{Signer, seconds};
use crate::event::{self, BATCH_TYPE, EVENT_TYPE, Envelope, binary, json};
use crate::outgoing::{Outgoing, Part, Turn};
use crate::{Mode, SubscriptionSpec};

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
/// Marks the message of [`Push::test`](super::Push::test).
const BROKER_TEST: HeaderName = HeaderName::from_static("broker-test");

/// Headers that most messages add at most: room made at once costs less than growing.
const HEADERS: usize = 8;

/// Bytes of messages in a request at most, however much room there is.
const PARCEL_BYTES: usize = 8 << 20;

/// Bytes that an answer to a batch may have for each of its messages: its id, escaped, and its status.
const STATUS_BYTES: usize = 512;

/// The headers that the requests of a subscription have in common whose messages are of one topic, as the last one had
/// them: a map is copied for less than its names are hashed and its values encoded.
#[derive(Debug, Default)]
pub(crate) struct RouteHeaders {
    topic: Option<Topic>,
    headers: HeaderMap,
}

/// Makes the requests of one subscription.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// What every request says.
    base: HeaderMap,
    mode: Mode,
    signer: Option<Signer>,
    outgoing: Outgoing,
    /// What is encoded for it and not sent.
    part: Part,
}

impl Encoder {
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a header or a key that does not parse.
    pub(crate) fn new(spec: &SubscriptionSpec, outgoing: &Outgoing) -> Result<Self> {
        let mut base = HeaderMap::new();
        base.insert(USER_AGENT, HeaderValue::from_static(concat!("broker-http/", env!("CARGO_PKG_VERSION"))));
        for (name, value) in &spec.headers {
            let invalid = || Error::invalid(format!("headers: {name:?} cannot be sent"));
            let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
            let mut value = HeaderValue::from_str(value.expose()).map_err(|_| invalid())?;
            value.set_sensitive(true);
            base.insert(parsed, value);
        }
        if spec.mode == Mode::Batch {
            base.insert(CONTENT_TYPE, HeaderValue::from_static(BATCH_TYPE));
        }
        let signer = spec.signing.as_ref().map(Signer::new).transpose()?;
        Ok(Self { base, mode: spec.mode, signer, outgoing: outgoing.clone(), part: Part::default() })
    }

    /// Bytes of messages that one request has at most, unless it is for one: what is encoded for an endpoint that does not
    /// answer leaves room for the others.
    pub(crate) fn parcel_bytes(&self) -> usize {
        usize::try_from(self.outgoing.quarter()).map_or(PARCEL_BYTES, |quarter| quarter.min(PARCEL_BYTES))
    }

    /// Waits until a request for these messages may be encoded. What is sent as it is held, as binary mode does, waits for
    /// nothing.
    pub(crate) async fn turn(&self, messages: impl Iterator<Item = &Message>) -> Option<Turn> {
        let in_json = messages.filter(|message| matches!(self.mode_of(message), Mode::Structured | Mode::Batch));
        let about: u64 = in_json.map(json::about).sum();
        if about == 0 { None } else { Some(self.outgoing.turn(&self.part, about..=about).await) }
    }

    /// How this message becomes a request. A receiver knows structured mode by its content type alone, so that a payload
    /// which is itself of such a type goes in it (HTTP binding, section 3.1).
    fn mode_of(&self, message: &Message) -> Mode {
        match self.mode {
            Mode::Binary if message.content_type().is_some_and(event::is_event) => Mode::Structured,
            mode => mode,
        }
    }

    /// A request that carries no message, with what every request of the subscription says.
    pub(crate) fn bare(&self, method: Method) -> Content {
        let mut headers = self.base.clone();
        headers.remove(CONTENT_TYPE);
        Content { method, headers, body: Bytes::new(), answer_bytes: ANSWER_BYTES }
    }

    /// The request for these messages: one, unless the mode is batch.
    pub(crate) fn encode<'a>(
        &self,
        mut envelopes: impl ExactSizeIterator<Item = Envelope<'a>>,
        route: &mut RouteHeaders,
    ) -> Content {
        if self.mode == Mode::Batch {
            return self.batch(self.base.clone(), envelopes);
        }
        let Some(envelope) = envelopes.next() else { return post(self.base.clone(), Bytes::new()) };
        let (mut headers, body) = match self.mode_of(envelope.message) {
            Mode::Raw => self.as_held(envelope, binary::Mode::Raw, route),
            Mode::Structured => {
                let mut headers = self.base.clone();
                let mut body = Vec::with_capacity(512 + envelope.message.payload().len());
                json::encode(envelope, &mut body);
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_TYPE));
                binary::describe(envelope, &mut headers);
                (headers, self.outgoing.carry(&self.part, body))
            }
            _ => self.as_held(envelope, binary::Mode::Binary, route),
        };
        if let Some(signer) = &self.signer {
            sign(signer, &as_header(envelope.message.id()), &body, &mut headers);
        }
        post(headers, body)
    }

    /// The headers of a message whose payload is the body, and that.
    fn as_held(&self, envelope: Envelope<'_>, mode: binary::Mode, route: &mut RouteHeaders) -> (HeaderMap, Bytes) {
        let Envelope { topic, subscription, .. } = envelope;
        if route.topic.as_ref() != Some(topic) {
            let mut headers = self.base.clone();
            headers.reserve(HEADERS);
            binary::encode_route(topic, subscription, mode, &mut headers);
            *route = RouteHeaders { topic: Some(topic.clone()), headers };
        }
        let mut headers = route.headers.clone();
        headers.reserve(HEADERS);
        let body = binary::encode_message(envelope, mode, &mut headers);
        (headers, body)
    }

    /// As [`encode`](Self::encode), marked as a test.
    pub(crate) fn encode_test(&self, envelope: Envelope<'_>) -> Content {
        let mut content = self.encode(std::iter::once(envelope), &mut RouteHeaders::default());
        content.headers.insert(BROKER_TEST, HeaderValue::from_static("true"));
        content
    }

    fn batch<'a>(&self, mut headers: HeaderMap, envelopes: impl ExactSizeIterator<Item = Envelope<'a>>) -> Content {
        let items = envelopes.len();
        let mut body = Vec::with_capacity(512 * items);
        let mut ids = self.signer.as_ref().map(|_| Sha256::new());
        body.push(b'[');
        for (index, envelope) in envelopes.enumerate() {
            if index > 0 {
                body.push(b',');
            }
            json::encode(envelope, &mut body);
            if let Some(ids) = &mut ids {
                ids.update(as_header(envelope.message.id()));
                // No encoded id contains it, so that two lists never look like one.
                ids.update(b" ");
            }
        }
        body.push(b']');
        if let (Some(signer), Some(ids)) = (&self.signer, ids) {
            // The same messages in the same order have the same id, however often they are sent.
            let id = ids.finalize().iter().take(16).fold("batch_".to_owned(), |id, byte| format!("{id}{byte:02x}"));
            sign(signer, &id, &body, &mut headers);
        }
        // What is cut off an answer would be taken for messages that it leaves out.
        Content {
            answer_bytes: ANSWER_BYTES + items * STATUS_BYTES,
            ..post(headers, self.outgoing.carry(&self.part, body))
        }
    }
}

fn post(headers: HeaderMap, body: Bytes) -> Content {
    Content { method: Method::POST, headers, body, answer_bytes: ANSWER_BYTES }
}

fn sign(signer: &Signer, id: &str, body: &[u8], headers: &mut HeaderMap) {
    let now = Timestamp::now();
    let signature = signer.sign(id, now, body);
    // All three are printable ASCII.
    let values = [(WEBHOOK_ID, id), (WEBHOOK_SIGNATURE, signature.as_str())];
    headers.extend(values.into_iter().filter_map(|(name, text)| Some((name, HeaderValue::from_str(text).ok()?))));
    headers.insert(WEBHOOK_TIMESTAMP, HeaderValue::from(seconds(now)));
}

/// What CloudEvents encodes in a header value (HTTP binding, section 3.1.3.2); beyond ASCII all is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

fn as_header(id: &MessageId) -> String {
    utf8_percent_encode(&id.to_string(), ENCODED).to_string()
}

/// The message of a test push: what it says of itself is enough to be recognized by.
pub(crate) fn test_message() -> broker_core::Message {
    let message = broker_core::Message::new(r#"{"test":true}"#);
    message.clone().with_content_type("application/json").unwrap_or(message)
}

/// A delivery as an envelope.
pub(crate) fn envelope<'a>(delivery: &'a broker_core::Delivery, subscription: &'a str) -> event::Envelope<'a> {
    Envelope {
        topic: delivery.topic(),
        message: delivery.message(),
        subscription: Some(subscription),
        attempt: Some(delivery.attempt()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(json: &str) -> Encoder {
        let json = format!(r#"{{"filter":"orders","endpoint":"http://localhost/",{json}}}"#);
        Encoder::new(&SubscriptionSpec::from_json(json.as_bytes()).unwrap(), &Outgoing::new(1 << 20)).unwrap()
    }

    fn encode(encoder: &Encoder, messages: &[Message]) -> Content {
        let topic = Topic::new("orders").unwrap();
        let envelope = |message| Envelope { topic: &topic, message, subscription: Some("billing"), attempt: Some(3) };
        encoder.encode(messages.iter().map(envelope), &mut RouteHeaders::default())
    }

    fn text<'a>(content: &'a Content, name: &str) -> Option<&'a str> {
        content.headers.get(name).map(|value| value.to_str().unwrap())
    }

    fn message(id: &str) -> Message {
        Message::new("42").with_id(id.parse().unwrap()).with_content_type("text/plain").unwrap()
    }

    #[test]
    fn modes() {
        let content = encode(&encoder(r#""headers":{"x-api-key":"k"}"#), &[message("a")]);
        assert_eq!(content.body.as_ref(), b"42");
        assert_eq!((text(&content, "ce-id"), text(&content, "content-type")), (Some("a"), Some("text/plain")));
        assert_eq!((text(&content, "broker-attempt"), text(&content, "x-api-key")), (Some("3"), Some("k")));
        assert!(text(&content, "user-agent").unwrap().starts_with("broker-http/"));
        assert!(!format!("{content:?}").contains("\"k\""), "{content:?}");

        let content = encode(&encoder(r#""mode":"raw""#), &[message("a")]);
        assert_eq!((text(&content, "broker-id"), text(&content, "ce-id")), (Some("a"), None));

        let content = encode(&encoder(r#""mode":"structured""#), &[message("a")]);
        assert_eq!(text(&content, "content-type"), Some("application/cloudevents+json"));
        assert_eq!(text(&content, "broker-subscription"), Some("billing"));
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&content.body).unwrap()["id"], "a");

        let content = encode(&encoder(r#""mode":"batch""#), &[message("a"), message("b")]);
        assert_eq!(text(&content, "content-type"), Some("application/cloudevents-batch+json"));
        let body: serde_json::Value = serde_json::from_slice(&content.body).unwrap();
        assert_eq!((&body[0]["id"], &body[1]["brokerattempt"]), (&"a".into(), &3.into()));
    }

    /// In binary mode it would be taken for the event that it holds.
    #[test]
    fn a_payload_that_is_an_event_itself_goes_within_one() {
        let inner = r#"{"specversion":"1.0","id":"inner","source":"/x","type":"t"}"#;
        for content_type in ["application/cloudevents+json", "Application/CloudEvents-Batch+JSON; charset=utf-8"] {
            let message =
                Message::new(inner).with_id("outer".parse().unwrap()).with_content_type(content_type).unwrap();
            let message = message.with_key("k").with_header("a", "1").unwrap();
            let content = encode(&encoder(r#""mode":"binary""#), std::slice::from_ref(&message));
            assert_eq!(text(&content, "content-type"), Some("application/cloudevents+json"));
            assert_eq!((text(&content, "ce-id"), text(&content, "broker-header-a")), (None, Some("1")));
            let read = json::decode(&content.body, &event::Options::default(), None).unwrap();
            assert_eq!((read.message, read.attempt), (message.clone(), Some(3)));
            // What is raw is as it is, whatever it is.
            let content = encode(&encoder(r#""mode":"raw""#), &[message]);
            assert_eq!((text(&content, "content-type"), content.body.as_ref()), (Some(content_type), inner.as_bytes()));
        }
        let other = message("a").with_content_type("application/x-avro").unwrap();
        assert_eq!(text(&encode(&encoder(r#""mode":"binary""#), &[other]), "ce-id"), Some("a"));
        // An avro event is none of ours to read, and bytes.
        let avro = Message::new(vec![0, 255]).with_content_type("application/cloudevents+avro").unwrap();
        let content = encode(&encoder(r#""mode":"binary""#), &[avro]);
        let body: serde_json::Value = serde_json::from_slice(&content.body).unwrap();
        assert_eq!(
            (&body["datacontenttype"], &body["data_base64"]),
            (&"application/cloudevents+avro".into(), &"AP8=".into())
        );
    }

    /// A receiver looks there for what he is sent.
    #[test]
    fn every_header_of_ours_is_in_the_readme() {
        let time = Timestamp::from_millis(1);
        let full = message("a").with_key("k").with_deliver_at(time).with_expires_at(time).with_dedup_key("d").unwrap();
        let full = full.with_header("name", "x").unwrap();
        let tombstone = Message::tombstone();
        let mut said = std::collections::BTreeSet::new();
        for mode in ["binary", "raw", "structured", "batch"] {
            let encoder = encoder(&format!(r#""mode":"{mode}""#));
            let test = encoder.encode_test(Envelope::new(&Topic::new("orders").unwrap(), &full));
            for content in [
                encode(&encoder, std::slice::from_ref(&full)),
                encode(&encoder, std::slice::from_ref(&tombstone)),
                test,
            ] {
                let names = content.headers.keys().map(|name| name.as_str().replace("header-name", "header-NAME"));
                said.extend(names.filter(|name| name.starts_with("broker-")));
            }
        }
        let readme = include_str!("../../README.md");
        let rows: String = readme.lines().filter(|line| line.starts_with("| `broker-")).collect();
        for name in &said {
            assert!(rows.contains(&format!("`{name}`")), "{name} is not in the README's table of a push's headers");
        }
        assert_eq!(said.len(), rows.matches("`broker-").count(), "{said:?}");
    }

    #[test]
    fn signatures_are_of_what_is_sent() {
        let signing = r#""signing":{"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}"#;
        let signer = Signer::new(&crate::Signing {
            secret: crate::Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
            previous: None,
            until: None,
        })
        .unwrap();
        for mode in ["binary", "structured", "raw", "batch"] {
            let content = encode(&encoder(&format!(r#"{signing},"mode":"{mode}""#)), &[message("ä b")]);
            let id = text(&content, "webhook-id").unwrap();
            assert!(mode == "batch" || id == "%C3%A4%20b", "{id}");
            let seconds: i64 = text(&content, "webhook-timestamp").unwrap().parse().unwrap();
            let expected = signer.sign(id, Timestamp::from_millis(seconds * 1000), &content.body);
            assert_eq!(text(&content, "webhook-signature"), Some(expected.as_str()), "{mode}");
        }
        let batch = encoder(&format!(r#"{signing},"mode":"batch""#));
        let id = |ids: &[&str]| {
            let messages: Vec<_> = ids.iter().map(|id| message(id)).collect();
            text(&encode(&batch, &messages), "webhook-id").unwrap().to_owned()
        };
        assert_eq!(id(&["a", "b"]), id(&["a", "b"]));
        assert_ne!(id(&["a", "b"]), id(&["b", "a"]));
        assert_ne!(id(&["a", "b"]), id(&["a b"]));
    }
}
