//! A compressed body of a request, gzip or zstd, whole and in pieces.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::body(data));
