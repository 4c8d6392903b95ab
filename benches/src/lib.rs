#![doc = include_str!("../README.md")]

pub mod adapters;
pub mod amqp;
pub mod cli;
pub mod comparison;
pub mod footprint;
pub mod http;
pub mod in_process;
pub mod kafka;
pub mod measure;
pub mod peers;
pub mod report;
pub mod sample;
pub mod server;
pub mod statistics;

use comparison::Comparison;

/// What may go wrong in a round: a broker's error, a count that does not add up, a task that panicked.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The result of a round, or of preparing one.
pub type Result<T> = std::result::Result<T, Failure>;

/// Every comparison of this package, in the order they are listed and run.
pub fn comparisons() -> Vec<Comparison> {
    let groups = [in_process::comparisons(), http::comparisons(), kafka::comparisons(), amqp::comparisons()];
    groups.into_iter().flatten().chain(adapters::comparisons()).collect()
}

/// The code of the project's README runs as a doctest of this package, which may know every broker.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
