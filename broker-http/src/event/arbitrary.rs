//! Any message the contract allows, for property tests.

use broker_core::{Headers, Message, MessageId, Timestamp, Topic};
use bytes::Bytes;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;

/// Topics, some of them named by [`message`]'s headers.
pub(crate) fn topic() -> impl Strategy<Value = Topic> {
    prop_oneof![Just("t".to_owned()), "[A-Za-z0-9_-]{1,8}(\\.[A-Za-z0-9_-]{1,8}){0,3}"]
        .prop_map(|name| Topic::new(name).unwrap())
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let about = (id(), time(), of(bytes()), of(content_type()), headers());
    let schedule = (of(time()), of(time()), of("[^\\p{Cc}]{1,20}"));
    (payload(), about, schedule, of(written())).prop_map(|(payload, about, (due, expires, dedup), written)| {
        let (id, time, key, content_type, mut headers) = about;
        if let Some(write) = written {
            // Among the others, or before them.
            let mut all = Headers::new();
            let (before, value) = write(time);
            if before {
                all.append("ce-time", value.clone()).unwrap();
            }
            headers.iter().for_each(|(name, value)| all.push(name.clone(), value.clone()));
            if !before {
                all.append("ce-time", value).unwrap();
            }
            headers = all;
        }
        let mut message = match payload {
            Some(payload) => Message::new(payload),
            None => Message::tombstone(),
        };
        message = message.with_id(id).with_timestamp(time).with_headers(headers);
        if let Some(key) = key {
            message = message.with_key(key);
        }
        if let Some(content_type) = content_type {
            message = message.with_content_type(content_type).unwrap();
        }
        if let Some(due) = due {
            message = message.with_deliver_at(due);
        }
        if let Some(expires) = expires {
            message = message.with_expires_at(expires);
        }
        if let Some(dedup) = dedup {
            message = message.with_dedup_key(dedup).unwrap();
        }
        message
    })
}

/// How a time may be written, and where.
fn written() -> impl Strategy<Value = fn(Timestamp) -> (bool, String)> {
    let ways: [fn(Timestamp) -> (bool, String); 4] = [
        |time| (true, time.to_string().replace('Z', "456Z")),
        |time| (false, time.to_string().replace('Z', "+00:00")),
        |time| (false, time.to_string()),
        |_| (true, "2018-04-05T17:31:00Z".to_owned()),
    ];
    proptest::sample::select(ways.to_vec())
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..20).prop_map(Bytes::from)
}

fn payload() -> impl Strategy<Value = Option<Bytes>> {
    let texts = [
        "",
        "null",
        "\"text\"",
        " {} ",
        "{\"a\":\r\n1}",
        "{\"a\": [1.0, 1e400]}",
        "[1",
        "<a b=\"c\"/>",
        "{\"ü\":\"\\u00e4\"}",
    ];
    prop_oneof![
        bytes().prop_map(Some),
        proptest::sample::select(texts.to_vec()).prop_map(|text| Some(Bytes::from(text))),
        Just(None),
    ]
}

fn id() -> impl Strategy<Value = MessageId> {
    prop_oneof!["[^\\p{Cc}]{1,30}", Just("0190a5e0-7a3b-7000-8000-000000000001".to_owned())]
        .prop_map(|id| id.parse().unwrap())
}

fn time() -> impl Strategy<Value = Timestamp> {
    // What RFC 3339 can write.
    (-62_135_596_800_000_i64..253_402_300_799_000).prop_map(Timestamp::from_millis)
}

fn content_type() -> impl Strategy<Value = String> {
    let known = [
        "application/json",
        "text/plain",
        "text/plain; charset=latin1",
        "application/vnd.x+json;v=1",
        "application/cloudevents+json",
        "application/x-ndjson",
        "image/svg+xml",
    ];
    prop_oneof![proptest::sample::select(known.to_vec()).prop_map(str::to_owned), "[!-~]([ -~]{0,20}[!-~])?"]
}

fn headers() -> impl Strategy<Value = Headers> {
    let known = [
        "ce-source",
        "ce-type",
        "ce-subject",
        "ce-data",
        "ce-id",
        "ce-brokerkey",
        "ce-Type",
        "ce-",
        "ce-a-b",
        "traceparent",
        "a",
        "A",
        "broker-dead-reason",
    ];
    let values = ["", "t", "/topics/t", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "\u{fffe}"];
    let name = prop_oneof![
        3 => proptest::sample::select(known.to_vec()).prop_map(str::to_owned),
        1 => "[^\\p{Cc}]{1,20}",
        1 => "ce-[a-z0-9]{1,20}",
    ];
    let value = prop_oneof![bytes(), proptest::sample::select(values.to_vec()).prop_map(Bytes::from)];
    vec((name, value), 0..8).prop_map(|list| {
        let mut headers = Headers::new();
        for (name, value) in list {
            headers.append(name, value).unwrap();
        }
        headers
    })
}
