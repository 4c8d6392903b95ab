//! What a WebSocket of `/topics/{filter}/stream` is told: credit and settlements.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::frame(data));
