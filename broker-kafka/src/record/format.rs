//! Which of the formats a broker writes and reads.

use std::str::FromStr;

/// How messages are written, and what is understood of those that others wrote. Dead letters, and what
/// waits in retry topics, are always written natively.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Key, payload, headers and time as Kafka's own; the rest in headers of ours.
    #[default]
    Native,
    /// CloudEvents' Kafka protocol binding 1.0: written in binary mode, read in binary and structured mode.
    CloudEvents,
    /// What Go Micro's Kafka plugin writes and reads (`preset=go-micro`).
    GoMicro,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text {
            "native" => Ok(Self::Native),
            "cloudevents" => Ok(Self::CloudEvents),
            _ => Err("it is native or cloudevents"),
        }
    }
}
