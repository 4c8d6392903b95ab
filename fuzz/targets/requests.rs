//! `POST /subscriptions/{name}/pull` by its query, `/redrive` by its body.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(query) = std::str::from_utf8(data) {
        fuzzing::pull(query);
    }
    fuzzing::redrive(data);
});
