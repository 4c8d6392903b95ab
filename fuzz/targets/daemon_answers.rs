//! What a daemon, or something in its place, answers to the client. The first line of the input is the
//! status.
#![no_main]

mod head;

use broker_http::fuzzing;
use http::StatusCode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let answer = head::request(data);
    let status = answer.query.and_then(|status| status.parse().ok()).unwrap_or(StatusCode::OK);
    fuzzing::daemon_answer(status, &answer.headers, &answer.body);
});
