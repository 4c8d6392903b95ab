//! The file that keeps a daemon's subscriptions over its restarts.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::state(data));
