//! A CloudEvent in structured mode.
#![no_main]

use broker_core::Topic;
use broker_http::event::{Envelope, Options, json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let topic = Topic::new("orders.created").expect("a topic");
    let Ok(decoded) = json::decode(data, &Options::default(), Some(&topic)) else { return };
    let mut out = Vec::new();
    json::encode(Envelope::new(&topic, &decoded.message), &mut out);
    let again = json::decode(&out, &Options::default(), Some(&topic)).expect("our own JSON");
    assert_eq!(again.message, decoded.message);
});
