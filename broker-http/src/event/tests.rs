//! The codec as a whole: every message comes back, what others write is understood, what is wrong
//! is named.

use broker_core::{ErrorKind, Headers, Message, Result, Topic};
use bytes::Bytes;
use http::HeaderMap;
use proptest::prelude::*;

use super::arbitrary::{message, topic};
use super::*;

fn http(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(http::HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
    }
    headers
}

fn sorted(headers: &Headers) -> Vec<(String, Bytes)> {
    let mut list: Vec<_> = headers.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
    list.sort_by(|(one, _), (two, _)| one.cmp(two));
    list
}

/// As a server reads a request: options first, then headers and body.
fn receive(headers: &HeaderMap, body: Bytes, on: Option<&Topic>) -> Result<Decoded> {
    binary::decode(headers, &Options::parse(None, headers)?, body, on)
}

proptest! {
    #[test]
    fn json_carries_every_message(topic in topic(), message in message(), published: bool) {
        let mut out = Vec::new();
        let envelope = Envelope { topic: &topic, message: &message, subscription: Some("s"), attempt: Some(3) };
        json::encode(envelope, &mut out);
        prop_assert!(!out.contains(&b'\r'));
        let decoded = json::decode(&out, &Options::default(), published.then_some(&topic)).unwrap();
        let expected = Decoded { message, topic: Some(topic), subscription: Some("s".into()), attempt: Some(3), test: false };
        prop_assert_eq!(decoded, expected);
    }

    #[test]
    fn a_filter_sees_what_a_structured_push_shows(topic in topic(), message in message()) {
        let mut out = Vec::new();
        json::encode(Envelope::new(&topic, &message), &mut out);
        let event: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&out).unwrap();
        let shown = event.iter().filter(|(name, _)| !["data", "data_base64"].contains(&name.as_str()));
        for (name, value) in shown {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let seen = attribute_value(&topic, &message, name);
            prop_assert_eq!(seen.as_deref(), Some(&*text), "{}", name);
        }
        let called = message.headers().iter().filter_map(|(name, _)| name.as_str().strip_prefix("ce-"));
        for name in called.chain(["data", "brokertombstone", "brokerkey", "brokerheaders", "partitionkey"]) {
            let is_shown = name != "data" && event.contains_key(name);
            prop_assert_eq!(attribute_value(&topic, &message, name).is_some(), is_shown, "{}", name);
        }
    }

    #[test]
    fn batches_carry_every_message(topic in topic(), messages in proptest::collection::vec(message(), 0..4)) {
        let mut out = Vec::new();
        json::encode_batch(messages.iter().map(|message| Envelope::new(&topic, message)), &mut out);
        let decoded = json::decode_batch(&out, &Options::default(), Some(&topic)).unwrap();
        let decoded: Vec<_> = decoded.into_iter().map(|event| event.unwrap().message).collect();
        prop_assert_eq!(decoded, messages);
    }

    #[test]
    fn headers_carry_every_message_but_for_the_order_of_names(topic in topic(), message in message(), raw: bool) {
        let mode = if raw { binary::Mode::Raw } else { binary::Mode::Binary };
        let mut headers = HeaderMap::new();
        let body = binary::encode(Envelope::new(&topic, &message), mode, &mut headers);
        let decoded = receive(&headers, body, Some(&topic)).unwrap().message;
        prop_assert_eq!(sorted(decoded.headers()), sorted(message.headers()));
        if raw && binary::fits(&message) {
            prop_assert_eq!(&decoded, &message);
        }
        let unordered = decoded.with_headers(message.headers().clone());
        prop_assert_eq!(unordered, message);
    }

    #[test]
    fn what_was_damaged_on_the_way_never_panics(
        topic in topic(), message in message(), at: prop::sample::Index, with: u8, cut: bool,
    ) {
        let mut out = Vec::new();
        json::encode_batch([Envelope::new(&topic, &message), Envelope::new(&topic, &message)], &mut out);
        let index = at.index(out.len());
        out[index] = with;
        if cut {
            out.truncate(index);
        }
        let _ = json::decode_batch(&out, &Options::default(), None);
        let _ = json::decode(out.get(1..).unwrap_or_default(), &Options::default(), Some(&topic));
    }

    #[test]
    fn what_somebody_else_sends_never_panics(bytes: Vec<u8>, name in "(ce|broker|broker-header)-[!-~&&[^\\(\\),/:;<=>\\?@\\[\\]\\{\\}\\\\\"]]{1,10}") {
        let _ = json::decode(&bytes, &Options::default(), None);
        let _ = json::decode_batch(&bytes, &Options::default(), None);
        let _ = ndjson::decode(&bytes, &Options::default());
        let mut headers = HeaderMap::new();
        if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), http::HeaderValue::from_bytes(&bytes)) {
            headers.insert(name, value);
        }
        let _ = receive(&headers, Bytes::new(), None);
        let _ = Options::parse(Some(&String::from_utf8_lossy(&bytes)), &headers);
    }
}

/// A server takes twice the largest message, so that its JSON must not be larger.
#[test]
fn no_message_grows_beyond_measure() {
    let full = vec![0; 1 << 20];
    let text = |content_type: &str| Message::new(full.clone()).with_content_type(content_type).unwrap();
    for message in [
        Message::new(full.clone()),
        text("text/plain"),
        text("application/json"),
        Message::new(vec![b'"'; 1 << 20]).with_content_type("text/plain").unwrap(),
        Message::new("").with_key(full.clone()),
        Message::new("").with_header("a", full.clone()).unwrap(),
        Message::new("").with_header("ce-a", vec![b'"'; 1 << 20]).unwrap(),
    ] {
        let mut out = Vec::new();
        json::encode(Envelope::new(&Topic::new("t").unwrap(), &message), &mut out);
        assert!(out.len() < 4 << 20, "{message:?}: {}", out.len());
    }
}

/// The examples of the JSON event format, section 3.2, and what it says they are in binary mode.
#[test]
fn the_examples_of_the_json_format_read_as_they_say() {
    let event = |rest: &str| {
        let json = format!(
            r#"{{"specversion" : "1.0", "type" : "com.example.someevent", "source" : "/mycontext", "subject": null,
            "id" : "A234-1234-1234", "time" : "2018-04-05T17:31:00Z", "comexampleextension1" : "value",
            "comexampleothervalue" : 5, "unsetextension": null, {rest} }}"#
        );
        json::decode(json.as_bytes(), &Options::default(), None).unwrap().message
    };
    let binary = |content_type: &str, body: &'static str| {
        let headers = http(&[
            ("ce-specversion", "1.0"),
            ("ce-type", "com.example.someevent"),
            ("ce-source", "/mycontext"),
            ("ce-id", "A234-1234-1234"),
            ("ce-time", "2018-04-05T17:31:00Z"),
            ("ce-comexampleextension1", "value"),
            ("ce-comexampleothervalue", "5"),
            ("content-type", content_type),
        ]);
        receive(&headers, body.into(), None).unwrap().message
    };
    let thrift = "application/vnd.apache.thrift.binary";
    assert_eq!(event(&format!(r#""datacontenttype":"{thrift}","data_base64":"Li4u""#)), binary(thrift, "..."));
    assert_eq!(
        event(r#""datacontenttype":"application/xml","data":"<much wow=\"xml\"/>""#),
        binary("application/xml", r#"<much wow="xml"/>"#)
    );
    assert_eq!(
        event(r#""datacontenttype":"application/json","data":{"appinfoA" : "abc",  "appinfoC" : true}"#),
        binary("application/json", r#"{"appinfoA" : "abc",  "appinfoC" : true}"#)
    );
    assert_eq!(event(r#""data":"I'm just a string""#), binary("application/json", r#""I'm just a string""#));
    let read = event(r#""data":1"#);
    assert_eq!(read.timestamp().to_string(), "2018-04-05T17:31:00.000Z");
    assert!(read.headers().get("ce-subject").is_none());
}

#[test]
fn a_batch_fails_event_by_event() {
    let good = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t"}"#;
    let batch = format!(r#"[{good}, {{"specversion":"1.0","id":"2","source":"/s"}}, {good}]"#);
    let results = json::decode_batch(batch.as_bytes(), &Options::default(), None).unwrap();
    assert!(results[0].is_ok() && results[2].is_ok());
    let error = results[1].as_ref().unwrap_err();
    assert!(error.message().contains("event 1") && error.message().contains("type"), "{error}");
    assert!(json::decode_batch(b"[]", &Options::default(), None).unwrap().is_empty());
    for bad in ["", "{}", "[1]", "[{}", "[{}] x", "null"] {
        let error = json::decode_batch(bad.as_bytes(), &Options::default(), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Codec, "{bad}");
    }
    let options = Options::parse(Some("id=1"), &HeaderMap::new()).unwrap();
    assert!(json::decode_batch(b"[]", &options, None).is_err());
}

#[test]
fn of_a_batch_that_is_too_long_nothing_is_kept() {
    let of = |json: &[u8], max| json::decode_batch_of(json, &Options::default(), None, max);
    assert_eq!(of(b"[{},{},{}]", 3).unwrap().unwrap().len(), 3);
    assert!(of(b"[{},{},{},{}]", 3).unwrap().is_none());
    // It is read to its end, so that what is no JSON is said to be none.
    assert!(of(b"[{},{},{},{}", 3).is_err());
}

#[test]
fn what_is_no_uri_is_no_attribute_of_one() {
    let read = |schema: &str| {
        let mut headers = HeaderMap::new();
        let attributes = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
        for (name, value) in attributes.into_iter().chain([("ce-dataschema", schema)]) {
            headers.insert(name, value.parse().unwrap());
        }
        binary::decode(&headers, &Options::default(), "x".into(), None)
    };
    for wrong in ["https://example.com/a b", "https://example.com/%7ba b", "/a%20b"] {
        let error = read(wrong).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.message().contains("dataschema"), "{error}");
    }
    for (sent, read_as) in [
        ("https://example.com/a%2520b", "https://example.com/a%20b"),
        ("https://example.com/%61", "https://example.com/a"),
        // Not encoded for the header: what they decode to would be no URI.
        ("https://example.com/a%20b", "https://example.com/a%20b"),
        ("https://example.com/caf%C3%A9", "https://example.com/caf%C3%A9"),
        ("https://example.com/caf%E9", "https://example.com/caf%E9"),
    ] {
        let message = read(sent).unwrap().message;
        assert_eq!(message.headers().get_str("ce-dataschema"), Some(read_as));
    }

    // From elsewhere than a CloudEvent it is a header, and comes back as it was.
    let topic = Topic::new("t").unwrap();
    let mut message = Message::new("x");
    message.headers_mut().append("ce-source", "a b").unwrap();
    message.headers_mut().append("ce-dataschema", "/a b").unwrap();
    let mut text = Vec::new();
    json::encode(Envelope { topic: &topic, message: &message, subscription: None, attempt: None }, &mut text);
    let event: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((event["source"].as_str(), event.get("dataschema")), (Some("/topics/t"), None));
    assert_eq!(json::decode(&text, &Options::default(), None).unwrap().message.headers(), message.headers());
}

#[test]
fn json_that_is_no_event_is_refused_by_name() {
    let many: String = (0..200).map(|n| format!(r#""x{n}":"","#)).collect();
    for (members, named) in [
        (r#""specversion":"0.3""#, "specversion"),
        (r#""specversion":"1.0""#, "attribute specversion"),
        (r#""id":"""#, "attribute id"),
        (r#""id":"x""#, "attribute id"),
        (r#""source":"""#, "attribute source"),
        (r#""subject":"""#, "attribute subject"),
        (r#""dataschema":"https://example.com/a b""#, "attribute dataschema"),
        (r#""dataschema":"/schema""#, "attribute dataschema"),
        (r#""time":"yesterday""#, "attribute time"),
        (r#""Upper":"x""#, "attribute Upper"),
        (r#""with_underscore":"x""#, "attribute with_underscore"),
        (r#""ext":{"a":1}"#, "attribute ext"),
        (r#""ext":1.5"#, "attribute ext"),
        (r#""ext":99999999999"#, "attribute ext"),
        (r#""ext":"\u0007""#, "attribute ext"),
        (r#""ext":"\ud800""#, "attribute ext"),
        (r#""ext":"a","ext":"b""#, "attribute ext"),
        (r#""data":1,"data_base64":"AA==""#, "data_base64"),
        (r#""data":1,"data":2"#, "member data"),
        (r#""data_base64":"?""#, "member data_base64"),
        (r#""data_base64":1"#, "member data_base64"),
        (r#""datacontenttype":"text/plain","data":{}"#, "member data"),
        (r#""datacontenttype":"a\nb""#, "content type"),
        (r#""partitionkey":"""#, "attribute partitionkey"),
        (r#""partitionkey":"a","brokerkey":"AA==""#, "attribute partitionkey"),
        (r#""brokertombstone":true,"data":1"#, "tombstone"),
        (r#""brokerttl":"0s""#, "attribute brokerttl"),
        (r#""brokerdelay":"soon""#, "attribute brokerdelay"),
        (r#""brokerattempt":0"#, "attribute brokerattempt"),
        (r#""brokerheaders":"%0a=1""#, "attribute brokerheaders"),
        (many.trim_end_matches(','), "attribute x"),
    ] {
        let json = format!(r#"{{"specversion":"1.0","id":"x","source":"/s","type":"t",{members}}}"#);
        let error = json::decode(json.as_bytes(), &Options::default(), None).unwrap_err();
        assert!(error.message().contains(named), "{members}: {error}");
    }
    for (missing, json) in [
        ("specversion", r#"{"id":"1","source":"/s","type":"t"}"#),
        ("attribute id", r#"{"specversion":"1.0","source":"/s","type":"t"}"#),
        ("attribute source", r#"{"specversion":"1.0","id":"1","type":"t"}"#),
        ("attribute type", r#"{"specversion":"1.0","id":"1","source":"/s"}"#),
    ] {
        let error = json::decode(json.as_bytes(), &Options::default(), None).unwrap_err();
        assert!(error.message().contains(missing), "{json}: {error}");
    }
}

#[test]
fn headers_that_are_no_event_are_refused_by_name() {
    let event = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
    for (name, value, named) in [
        ("ce-subject", "%ff", "attribute subject"),
        ("ce-subject", "100%", "attribute subject"),
        ("ce-subject", "%07", "attribute subject"),
        ("ce-a-b", "x", "attribute a-b"),
        ("ce-", "x", "attribute "),
        ("ce-data", "x", "attribute data"),
        ("ce-id", "2", "attribute id"),
        ("ce-datacontenttype", "text/plain", "datacontenttype"),
        ("broker-id", "2", "option id"),
        ("broker-tombstone", "true", "tombstone"),
    ] {
        let mut headers = http(&event);
        headers.append(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        headers.insert("content-type", "application/json".parse().unwrap());
        let error = receive(&headers, "1".into(), None).unwrap_err();
        assert!(error.message().contains(named), "{name}: {error}");
    }
    for (missing, _) in event {
        let mut headers = http(&event);
        headers.remove(missing);
        let error = receive(&headers, Bytes::new(), None).unwrap_err();
        assert!(error.message().contains(missing.trim_start_matches("ce-")), "{missing}: {error}");
    }
}

#[test]
fn a_plain_request_is_a_message() {
    let headers = http(&[
        ("content-type", "text/plain"),
        ("broker-key", "customer%207"),
        ("broker-header-x", "1"),
        ("broker-header-x", "%00%ff"),
        ("broker-header-%58", "3"),
        ("broker-ttl", "1h"),
        ("accept", "*/*"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=1"),
    ]);
    let message = receive(&headers, "hello".into(), None).unwrap().message;
    assert_eq!(message.payload().as_ref(), b"hello");
    assert_eq!(message.content_type(), Some("text/plain"));
    assert_eq!(message.key().map(Bytes::as_ref), Some(&b"customer 7"[..]));
    assert_eq!(message.headers().get_all("x").map(Bytes::as_ref).collect::<Vec<_>>(), [&b"1"[..], b"\x00\xff"]);
    assert_eq!(message.headers().get_str("X"), Some("3"));
    assert_eq!(message.headers().get_str("tracestate"), Some("a=1"));
    assert_eq!(message.headers().len(), 5);
    assert!(message.expires_at().is_some());
    let broken = http(&[("traceparent", "hello"), ("tracestate", "a=1")]);
    assert!(receive(&broken, Bytes::new(), None).unwrap().message.headers().is_empty());
}

#[test]
fn an_event_without_source_and_type_of_its_own_has_those_of_its_topic() {
    let topic = Topic::new("orders.created").unwrap();
    let message = Message::new("1");
    let mut headers = HeaderMap::new();
    binary::encode(Envelope::new(&topic, &message), binary::Mode::Binary, &mut headers);
    assert_eq!(headers["ce-source"], "/topics/orders.created");
    assert_eq!(headers["ce-type"], "orders.created");
    // Handed on to another topic it is still the event it was.
    let other = Topic::new("copies").unwrap();
    let copy = receive(&headers, "1".into(), Some(&other)).unwrap().message;
    assert_eq!(copy.headers().get_str("ce-source"), Some("/topics/orders.created"));
    assert!(receive(&headers, "1".into(), Some(&topic)).unwrap().message.headers().is_empty());
}

#[test]
fn who_hands_an_event_on_may_change_an_attribute() {
    let topic = Topic::new("t").unwrap();
    let message = Message::new("").with_header("a", "1").unwrap().with_header("ce-subject", "old").unwrap();
    let mut out = Vec::new();
    json::encode(Envelope::new(&topic, &message), &mut out);
    let changed = String::from_utf8(out).unwrap().replacen(r#""subject":"old""#, r#""subject":"new""#, 1);
    let decoded = json::decode(changed.as_bytes(), &Options::default(), None).unwrap().message;
    assert_eq!(decoded.headers().get_str("ce-subject"), Some("new"));
    assert_eq!(decoded.headers().len(), 2);
}

#[test]
fn lines_that_are_no_message_are_refused_by_name() {
    for (line, named) in [
        ("", "column 0"),
        ("[]", "object"),
        ("{}", "payload"),
        (r#"{"payload":1,"payload_base64":""}"#, "payload_base64"),
        (r#"{"payload_base64":"?"}"#, "payload_base64"),
        (r#"{"payload":1,"colour":2}"#, "colour"),
        (r#"{"payload":1,"payload":2}"#, "payload"),
        (r#"{"payload":1,"headers":{"a":1}}"#, "header"),
        (r#"{"payload":1,"headers":{"a\n":"1"}}"#, "header name"),
        (r#"{"payload":1,"ttl":"0s"}"#, "ttl"),
        (r#"{"payload":1,"delay":"-1s"}"#, "delay"),
        (r#"{"payload":1,"id":""}"#, "id"),
        (r#"{"payload":1,"dedup":""}"#, "dedup"),
        (r#"{"payload":1,"content_type":"a\nb"}"#, "content_type"),
        (r#"{"payload":1} {}"#, "column 15"),
    ] {
        let error = ndjson::decode(line.as_bytes(), &Options::default()).unwrap_err();
        assert!(error.message().contains(named), "{line}: {error}");
    }
}

#[test]
fn lines_keep_json_as_it_is_written() {
    for payload in ["null", "1.50", r#"{"a" : [1, 2]}"#, r#""te\u0078t""#] {
        let message = ndjson::decode(format!(r#"{{"payload": {payload} }}"#).as_bytes(), &Options::default()).unwrap();
        assert_eq!(message.payload().as_ref(), payload.as_bytes());
    }
    let bytes =
        ndjson::decode(br#"{"payload_base64":"AP8=","id":"7","key":"","dedup":"d"}"#, &Options::default()).unwrap();
    assert_eq!(bytes.payload().as_ref(), b"\x00\xff");
    assert_eq!((bytes.content_type(), bytes.key().map(Bytes::len), bytes.dedup_key()), (None, Some(0), Some("d")));
}

#[test]
fn a_number_that_no_double_holds_is_not_embedded() {
    let topic = "orders".parse().unwrap();
    let digits = "7".repeat(400);
    for (payload, embedded) in [
        ("1e999", false),
        ("[1,-1E+400]", false),
        (r#"{"a":1.5e308,"b":"1e999","\"":1e0001,"c":1e-999}"#, true),
        (r#"{"a":"\"","b":12e3456}"#, false),
        (r#"{"sha":"7e100e300"}"#, true),
        (&digits, false),
        // Wherever it begins.
        (&format!("[{}e99]", "7".repeat(211)), false),
        (&format!("[{}{}e99]", " ".repeat(99), "7".repeat(211)), false),
        (&format!("[{}e99]", "7".repeat(209)), true),
        (&format!("\"{digits}\""), true),
        (&format!("0.{digits}"), true),
    ] {
        let message = Message::new(payload.to_owned()).with_content_type("application/json").unwrap();
        let mut out = Vec::new();
        json::encode(Envelope::new(&topic, &message), &mut out);
        let text = String::from_utf8(out.clone()).unwrap();
        assert_eq!(text.contains(r#""data":"#), embedded, "{text}");
        assert_eq!(json::decode(&out, &Options::default(), None).unwrap().message.payload(), payload.as_bytes());
    }
}

#[test]
fn what_is_nested_too_deep_for_parsers_is_not_embedded() {
    let topic = Topic::new("a").unwrap();
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let brackets = format!(r#"{{"a":"\\\"{}","b":[{}1]}}"#, "[".repeat(10_000), "[],".repeat(10_000));
    for (payload, embedded) in [(nested(120), true), (nested(121), false), (nested(10_000), false), (brackets, true)] {
        let message = Message::new(payload.clone()).with_content_type("application/json").unwrap();
        let mut out = b"{\"deliveries\":[{\"event\":".to_vec();
        let begin = out.len();
        json::encode(Envelope::new(&topic, &message), &mut out);
        let decoded = json::decode(&out[begin..], &Options::default(), None).unwrap().message;
        assert_eq!(decoded.payload().as_ref(), payload.as_bytes());
        out.extend_from_slice(b"}]}");
        let read: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let event = &read["deliveries"][0]["event"];
        assert_eq!((event.get("data").is_some(), event.get("data_base64").is_some()), (embedded, !embedded));
    }
}
