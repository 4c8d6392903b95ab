//! A delivery of RabbitMQ: the first line is the routing key, the second how many bytes of properties follow,
//! and the rest is the body.
#![no_main]

use broker_amqp::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let (Some(key), Some(length), Some(rest)) = (lines.next(), lines.next(), lines.next()) else { return };
    let Ok(key) = std::str::from_utf8(key) else { return };
    let length = std::str::from_utf8(length).ok().and_then(|length| length.parse().ok()).unwrap_or(rest.len());
    let (properties, body) = rest.split_at(length.min(rest.len()));
    fuzzing::delivery(key, properties, body);
});
