//! A record of Kafka, whoever wrote it, in each format. The input is the query of `head`, which says the format,
//! header lines, an empty line, the value.
#![no_main]
#![allow(dead_code, unused_imports)]

/// The adapter's own modules: the crate would bring librdkafka, which is C and takes minutes to build.
#[path = "../../broker-kafka/src/record/mod.rs"]
mod record;

use broker_core::{Message, Timestamp, Topic};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use record::{Decoded, Field, Format, Writer, encode, from_headers, place};

#[derive(Default)]
struct Written(Vec<(String, Vec<u8>)>);

impl Writer for Written {
    fn with_capacity(_: usize) -> Self {
        Self::default()
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        self.0.push((name.to_owned(), value.to_owned()));
    }
}

fn read(fields: &[Field<'_>], key: Option<&[u8]>, value: Option<&[u8]>, time: i64, format: Format) -> Decoded {
    let bare = |id| {
        let message = Message::received(id, Timestamp::from_millis(time), value.map(Bytes::copy_from_slice));
        match key {
            Some(key) => message.with_key(key.to_vec()),
            None => message,
        }
    };
    from_headers(bare, fields, format, || place("orders", 0, 42))
}

fuzz_target!(|data: &[u8]| {
    let split = data.windows(2).position(|pair| pair == b"\n\n");
    let (head, value) = match split {
        Some(at) => (&data[..at], Some(&data[at + 2..])),
        None => (data, None),
    };
    let mut lines = head.split(|byte| *byte == b'\n');
    // A key, or none.
    let key = lines.next().filter(|key| !key.is_empty());
    let fields: Vec<Field<'_>> = lines
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            Some((std::str::from_utf8(&line[..colon]).ok()?, &line[colon + 1..]))
        })
        .collect();
    for format in [Format::Native, Format::CloudEvents, Format::GoMicro] {
        let decoded = read(&fields, key, value, 7, format);
        if decoded.problem.is_some() {
            // What cannot be read keeps its bytes.
            assert_eq!(decoded.message.payload().as_ref(), value.unwrap_or_default());
            assert_eq!(decoded.message.headers().len(), fields.len());
        }
        // What was read is written so that it is read the same, and by those who read another format.
        let topic = Topic::new("orders").expect("a topic");
        let travel = decoded.travel.as_deref();
        let Ok(wire) = encode::<Written>(&topic, &decoded.message, travel, format) else { continue };
        let Some(Written(headers)) = wire.headers else {
            // Go Micro has no place for an id.
            let again = read(&[], wire.key, wire.payload.as_deref(), wire.timestamp.unwrap_or(0), format);
            assert_eq!(again.problem, None);
            assert_eq!(again.message.payload(), decoded.message.payload());
            continue;
        };
        let written: Vec<Field<'_>> = headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        for other in [Format::Native, Format::CloudEvents, Format::GoMicro] {
            let again = read(&written, wire.key, wire.payload.as_deref(), wire.timestamp.unwrap_or(0), other);
            assert_eq!((again.problem, &again.message), (None, &decoded.message));
            assert_eq!(again.travel, decoded.travel);
        }
    }
});
