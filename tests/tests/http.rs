//! The whole suite through the HTTP client broker: against the server in this process, with a
//! scripted proxy before it.

use std::error::Error;
use std::time::Duration;

use broker_core::Connectors;
use broker_http::{Server, ServerOptions};
use broker_tests::{Form, Report, keep_column, summary, url};

async fn every_check(form: Form) -> Result<(), Box<dyn Error>> {
    // A daemon of its own: what one form leaves behind is none of the others' business.
    let broker = Connectors::new().open("memory:?retain=1000")?;
    let server = Server::new(broker, ServerOptions::new().with_development(true));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}?timeout=5s", listener.local_addr()?);
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(listener).await });

    let mut connectors = Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    let suite = url::suite(&connectors, &url)?.form(form).parallel(8);
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
