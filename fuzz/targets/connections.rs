//! The bytes of a connection over HTTP/2, whose frames are followed for what nobody else tells.
#![no_main]

use broker_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::connection(data));
