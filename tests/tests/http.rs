//! The whole suite through the HTTP client broker: against the server in this process, with a
//! scripted proxy before it.

use std::error::Error;
use std::time::Duration;

use broker_core::Connectors;
use broker_http::{Server, ServerOptions};
use broker_tests::{Form, Report, Suite, keep_column, summary, url};

/// The server in this process, and its URL.
async fn daemon() -> Result<(Server, String), Box<dyn Error>> {
    // A daemon of its own: what one form leaves behind is none of the others' business.
    let broker = Connectors::new().open("memory:?retain=1000")?;
    let server = Server::new(broker, ServerOptions::new().with_development(true));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}?timeout=5s", listener.local_addr()?);
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(listener).await });
    Ok((server, url))
}

fn suite(url: &str) -> Result<Suite, Box<dyn Error>> {
    let mut connectors = Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    Ok(url::suite(&connectors, url, url::no_raw_client)?)
}

async fn every_check(form: Form) -> Result<(), Box<dyn Error>> {
    let (server, url) = daemon().await?;
    let suite = suite(&url)?.form(form).parallel(8);
    let reports = suite.run(|report| println!("{report} ({} ms)", report.millis)).await;
    println!("{}", summary(suite.name(), &reports));
    if form == Form::Shared {
        keep_column(env!("CARGO_TARGET_TMPDIR"), "http", &reports)?;
    }
    server.drain(Duration::from_secs(1)).await;
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    if bad.is_empty() { Ok(()) } else { Err(bad.join("\n").into()) }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_value() -> Result<(), Box<dyn Error>> {
    every_check(Form::Value).await
}

#[tokio::test(flavor = "multi_thread")]
async fn boxed() -> Result<(), Box<dyn Error>> {
    every_check(Form::Boxed).await
}

#[tokio::test(flavor = "multi_thread")]
async fn shared() -> Result<(), Box<dyn Error>> {
    every_check(Form::Shared).await
}

#[tokio::test(flavor = "multi_thread")]
async fn wrapped() -> Result<(), Box<dyn Error>> {
    every_check(Form::Wrapped).await
}

/// With leases so short that C1 waits until they would have run out: an acked message does not return
/// then either.
#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_lease() -> Result<(), Box<dyn Error>> {
    let (server, url) = daemon().await?;
    let reports = suite(&format!("{url}&lease=1s"))?.only(["C1", "C6", "C8"]).run(|report| println!("{report}")).await;
    server.drain(Duration::from_secs(1)).await;
    assert_eq!(reports.len(), 3);
    let waited = reports.iter().find(|report| report.check == "C1").map(|report| report.millis);
    // That it waited at all, not how fast anything was.
    assert!(waited > Some(1_500), "C1 waits out the lease: {waited:?} ms");
    let bad: Vec<String> = reports.iter().filter(|report| !report.is_good()).map(Report::to_string).collect();
    if bad.is_empty() { Ok(()) } else { Err(bad.join("\n").into()) }
}
