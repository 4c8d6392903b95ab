//! A way for fuzzing to what is decoded of a delivery, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use bytes::Bytes;
use lapin::protocol::basic::parse_properties;

use crate::sieve::{HEADER, sift};
use crate::wire::{Style, Travel, decode, encode};

/// A delivery, its properties as they stand in the content header (AMQP 0-9-1, 4.2.6.1). What was read is
/// written so that it is read the same.
pub fn delivery(routing_key: &str, properties: &[u8], body: &[u8]) {
    // Class, weight and size come before them; then lapin gets what the sieve lets through.
    let mut header = [&[0; 12], properties].concat();
    sift(HEADER, &mut header);
    let Ok((_, properties)) = parse_properties(header.get(12..).unwrap_or_default()) else { return };
    let body = Bytes::copy_from_slice(body);
    let _ = decode(routing_key, &properties, body.clone(), true);
    let Ok(arrived) = decode(routing_key, &properties, body, false) else { return };
    let travel = Travel {
        attempts: arrived.attempts,
        first: arrived.first,
        topic: Some(arrived.topic.clone()),
        due: arrived.due,
        ..Travel::default()
    };
    // Names of 255 bytes are too long once they are escaped.
    let Ok(written) = encode(&arrived.message, &travel, Style { persistent: true, go_micro: false }) else { return };
    let again = decode("elsewhere", &written, arrived.message.payload().clone(), false).expect("our own properties");
    assert_eq!(again.message, arrived.message);
    assert_eq!((again.topic, again.attempts), (arrived.topic, arrived.attempts));
    assert_eq!((again.first, again.due), (arrived.first, arrived.due));
}
