//! What an endpoint answers to a push and to the question whether it wants any. The first line of the
//! input is the status.
#![no_main]

mod head;

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let answer = head::request(data);
    let status = answer.query.and_then(|status| status.parse().ok()).filter(|status| (100..1000).contains(status));
    fuzzing::push_answer(status.unwrap_or(200), &answer.headers, &answer.body);
    fuzzing::consent_answer(&answer.headers);
});
