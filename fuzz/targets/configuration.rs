//! The daemon's TOML file, and what is said about one that is no good.
#![no_main]
#![allow(dead_code)]

/// The daemon's own modules, which are no part of the library.
#[path = "../../broker-http/src/bin/broker-http/config"]
mod config {
    mod file;
    mod limits;
    mod suggest;

    pub fn parse(text: &str) {
        if let Ok(file) = file::parse(text) {
            let _ = file.limits.apply();
            let _ = broker_http::Access::new(file.identities);
            let _ = broker_http::Topics::new(file.topics, file.only_declared_topics);
        }
    }
}

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    config::parse(text);
});
