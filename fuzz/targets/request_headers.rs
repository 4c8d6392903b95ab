//! Headers of a request that are decoded: `Idempotency-Key`, `Accept`, `Last-Event-ID`, `Content-Encoding`,
//! `Transfer-Encoding`, and those that ask for a WebSocket. The first line is the query.
#![no_main]

mod head;

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let request = head::request(data);
    fuzzing::request_headers(request.query.as_deref(), &request.headers);
});
