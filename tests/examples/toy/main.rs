//! A toy adapter and the suite run on it: what "Writing an adapter" walks through.

mod adapter;

use std::sync::Arc;

use broker_tests::{Report, Suite, summary};

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let suite = Suite::new("toy:", || Arc::new(adapter::ToyHarness::new())).parallel(8);
    let reports = suite.run(|report| println!("{report}")).await;
    println!("{}", summary("toy:", &reports));
    if reports.iter().all(Report::is_good) { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
