//! The toy adapter of "Writing an adapter" passes the suite.

#[path = "../examples/toy/adapter/mod.rs"]
mod adapter;

use std::sync::Arc;

use broker_tests::{Report, Suite, summary};

#[tokio::test(flavor = "multi_thread")]
async fn the_toy_keeps_the_contract_or_refuses_as_it_declares() {
    let suite = Suite::new("toy:", || Arc::new(adapter::ToyHarness::new())).parallel(8);
    let reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    println!("{}", summary("toy:", &reports));
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
