//! `[limits]`: the names of [`Limits`], and what each is for.

use std::time::Duration;

use broker_core::{format_duration, parse_duration};
use broker_http::Limits;
use serde::Deserialize;

macro_rules! limits {
    (numbers { $($name:ident: $kind:ty = $doc:literal,)* } durations { $($time:ident = $time_doc:literal,)* }) => {
        /// The limits a file may set.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct FileLimits {
            $($name: Option<$kind>,)*
            $($time: Option<String>,)*
        }

        impl FileLimits {
            /// The defaults, and what the file says instead.
            pub(super) fn apply(&self) -> Result<Limits, String> {
                let mut limits = Limits::default();
                $(if let Some(value) = self.$name {
                    if value == 0 {
                        return Err(format!("limits.{}: 0 would refuse everything; give 1 or more", stringify!($name)));
                    }
                    limits.$name = value;
                })*
                $(if let Some(text) = &self.$time {
                    limits.$time = positive(concat!("limits.", stringify!($time)), text)?;
                })*
                limits.check().map_err(|error| error.message().to_owned())?;
                Ok(limits)
            }
        }

        /// Name, default and purpose of each.
        pub(super) fn described() -> Vec<(&'static str, String, &'static str)> {
            let limits = Limits::default();
            let mut all = vec![$((stringify!($name), limits.$name.to_string(), $doc),)*];
            all.extend([$((stringify!($time), format_duration(limits.$time), $time_doc),)*]);
            all.sort();
            all
        }
    };
}

limits! {
    numbers {
        connections: usize = "connections at a time, three quarters of the files that may be open at most; one more is answered 503, or with TLS cut",
        streams_per_connection: u32 = "requests at a time on one HTTP/2 connection",
        headers: usize = "headers of a request; more are answered 431",
        header_bytes: usize = "bytes of a request's line and headers; more are answered 431",
        uri_bytes: usize = "bytes of a request's path and query; more are answered 414",
        message_body_bytes: usize = "bytes of a body that holds one message; more are answered 413",
        batch_body_bytes: usize = "bytes of a body that holds a batch; more are answered 413",
        batch_messages: usize = "messages of a batch whose results are collected; more are answered 413",
        json_body_bytes: usize = "bytes of the JSON of a subscription or a settlement; more are answered 413",
        answer_bytes_per_second: u64 = "bytes a second at which a whole answer with messages in it is to be taken at least, beside body_timeout; then the connection is cut",
        refused_body_bytes: u64 = "bytes of a refused body that are read and dropped, so that its sender sees the answer",
        subscriptions: usize = "subscriptions, of which one identity may own half; one more is answered 429",
        topics: usize = "topics in use, of which one identity may have filled half; one more is answered 429",
        memory_bytes: u64 = "bytes that messages and bodies may hold; at it history is forgotten, then publishers are answered 503",
        topic_memory_bytes: u64 = "bytes that one topic's messages may hold; at it its publishers are answered 429",
        leases: usize = "leases held by pullers at a time, of which one identity may have half; one more is answered 429",
        streams: usize = "streams at a time, of which one identity may have half; one more is answered 429",
        idempotency_bytes: usize = "bytes of answers kept for repeated idempotency keys, each for 10 minutes at least; a key without room is answered 503",
    }
    durations {
        header_timeout = "how long a request's headers may take, half as long again at most, and an idle connection is kept; then 408",
        body_timeout = "how long a body may take, or each line of a streamed one, then 408; and how long an answer may wait for a reader that takes nothing of it, half as long again at most, then the connection is cut",
    }
}

fn positive(key: &str, text: &str) -> Result<Duration, String> {
    let duration = parse_duration(text).map_err(|error| format!("{key}: {}", error.message()))?;
    if duration.is_zero() { Err(format!("{key}: it is longer than zero")) } else { Ok(duration) }
}
