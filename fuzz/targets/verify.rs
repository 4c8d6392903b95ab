//! What a receiver reads of a push: signatures, timestamps, ids.
#![no_main]

mod head;

use broker_core::Timestamp;
use broker_http::webhook::Verifier;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let request = head::request(data);
    let verifier = Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a key");
    let now = Timestamp::from_millis(1_614_265_330_000);
    let _ = verifier.verify_at(&request.headers, &request.body, now);
    let _ = verifier.consent(&request.headers);
});
