//! The JSON of a subscription: filters, endpoints, durations, keys, certificates.
#![no_main]

use broker_core::{Message, Topic};
use broker_http::SubscriptionSpec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = SubscriptionSpec::from_json(data) else { return };
    // A filter that was taken can be asked, and settings that were taken can be kept.
    let topic = Topic::new("orders.created").expect("a topic");
    let _ = spec.wants(&topic, &Message::new("x"));
    let kept = serde_json::to_vec(&spec).expect("settings are JSON");
    assert_eq!(SubscriptionSpec::from_json(&kept).expect("our own JSON"), spec);
});
