//! A batch of CloudEvents.
#![no_main]

use broker_core::Topic;
use broker_http::event::{Envelope, Options, json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let topic = Topic::new("orders.created").expect("a topic");
    let Ok(decoded) = json::decode_batch(data, &Options::default(), Some(&topic)) else { return };
    let good: Vec<_> = decoded.into_iter().flatten().collect();
    let mut out = Vec::new();
    json::encode_batch(good.iter().map(|decoded| Envelope::new(&topic, &decoded.message)), &mut out);
    let again = json::decode_batch(&out, &Options::default(), Some(&topic)).expect("our own JSON");
    assert_eq!(again.len(), good.len());
});
