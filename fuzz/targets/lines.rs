//! NDJSON: one message a line, and the options of the request beside it.
#![no_main]

mod head;

use broker_http::event::{Options, ndjson};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let request = head::request(data);
    let Ok(options) = Options::parse(request.query.as_deref(), &request.headers) else { return };
    for line in request.body.split(|byte| *byte == b'\n') {
        let _ = ndjson::decode(line, &options);
    }
});
