//! `POST /subscriptions/{name}/settle`: acks, retries, rejects, releases and extensions by lease.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::settlements(data));
