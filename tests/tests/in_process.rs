//! The whole suite on the in-process broker: by value, boxed, shared and wrapped.

use std::sync::Arc;

use broker_tests::{Form, InProcess, Report, Suite, keep_column, summary};

async fn every_check(form: Form) {
    let name = format!("memory: ({form})");
    let suite = Suite::new(name.clone(), || Arc::new(InProcess::new())).form(form).parallel(8);
    let reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    println!("{}", summary(&name, &reports));
    if form == Form::Shared {
        assert!(keep_column(env!("CARGO_TARGET_TMPDIR"), "memory", &reports).is_ok(), "the column is not kept");
    }
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn by_value() {
    every_check(Form::Value).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn boxed() {
    every_check(Form::Boxed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared() {
    every_check(Form::Shared).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrapped() {
    every_check(Form::Wrapped).await;
}
