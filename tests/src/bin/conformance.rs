//! Runs the conformance suite against brokers by their URLs.
//!
//! Exit status: 0 if every check passed or was refused as declared, 1 if one failed or could not be
//! brought about, 2 for wrong arguments.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use broker_amqp::AmqpBroker;
use broker_core::{BoxFuture, Broker, Connectors};
use broker_kafka::KafkaBroker;
use broker_tests::{CHECKS, Form, Report, Suite, from_json, json, markdown, summary, url};
use clap::Parser;

/// Shows whether a broker keeps the contract: runs every check against each URL.
#[derive(Debug, Parser)]
#[command(name = "conformance")]
struct Arguments {
    /// Brokers, as in memory: or http://127.0.0.1:2757; NAME=URL gives one another name in the table.
    #[arg(required_unless_present_any = ["list", "from"], value_name = "URL")]
    urls: Vec<String>,
    /// Runs nothing: what --json wrote earlier, one file after another.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "urls")]
    from: Vec<PathBuf>,
    /// Only these checks: ids or letters, as in A1,B.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// How the checks see the broker: value, box, arc, wrapper or all.
    #[arg(long, default_value = "arc")]
    form: String,
    /// So many checks of a run at a time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// The whole run so many times at once.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    stress: u16,
    /// Writes every report to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes one table, checks by brokers, to a file.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Lists the checks.
    #[arg(long)]
    list: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What the broker logs helps to see why a check fails: RUST_LOG=debug.
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    if arguments.list {
        for check in CHECKS {
            say(&format!("{:<4}{}", check.id, check.title));
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "conformance: {error}");
            ExitCode::from(2)
        }
    }
}

/// The kinds of broker this program knows.
fn connectors() -> Connectors {
    let mut connectors = Connectors::new();
    connectors.add(["http", "https"], broker_http::client::connector());
    connectors.add(["kafka"], broker_kafka::connector());
    connectors.add(["amqp", "amqps"], broker_amqp::connector());
    connectors
}

/// Whether an adapter's own client can be reached through its broker; `memory:` and `http:` have none.
fn raw_client(broker: &dyn Broker) -> BoxFuture<'_, Option<bool>> {
    let any: &dyn std::any::Any = broker;
    let (kafka, amqp) = (any.downcast_ref::<KafkaBroker>(), any.downcast_ref::<AmqpBroker>());
    Box::pin(async move {
        if let Some(kafka) = kafka {
            return Some(kafka.raw_producer().is_ok());
        }
        Some(amqp?.raw().await.is_ok())
    })
}

/// A line on standard output; a reader that left early is no failure of a broker.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

async fn run(arguments: &Arguments) -> Result<bool, String> {
    let forms = match arguments.form.as_str() {
        "all" => Form::ALL.to_vec(),
        form => vec![form.parse().map_err(|error| format!("{error}, or all"))?],
    };
    for wanted in &arguments.only {
        if !CHECKS.iter().any(|check| check.id == wanted || check.id.starts_with(wanted) && wanted.len() == 1) {
            let letters: BTreeSet<&str> = CHECKS.iter().filter_map(|check| check.id.get(..1)).collect();
            let letters: Vec<&str> = letters.into_iter().collect();
            return Err(format!(
                "--only {wanted:?}: it is a check's id (see --list) or a letter: {}",
                letters.join(", ")
            ));
        }
    }
    let connectors = connectors();
    let mut suites = Vec::new();
    for argument in &arguments.urls {
        let (name, url) = named(argument);
        // The error names no URL: one may hold a password. Its place tells which it was.
        let suite = url::suite(&connectors, url, raw_client)
            .map_err(|error| format!("broker {}: {error}", suites.len() + 1))?;
        let suite = suite.parallel(arguments.jobs.into());
        let suite = if let Some(name) = name { suite.named(name) } else { suite };
        suites.push(if arguments.only.is_empty() { suite } else { suite.only(&arguments.only) });
    }
    let mut reports = Vec::new();
    for file in &arguments.from {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        reports.extend(from_json(&text).map_err(|error| format!("{}: {error}", file.display()))?);
    }
    for suite in &suites {
        for form in &forms {
            reports.extend(run_suite(&suite.clone().form(*form), arguments.stress).await);
        }
    }
    if reports.is_empty() {
        return Err("nothing to show: no check was run, and the files of --from hold no report".to_owned());
    }
    if let Some(file) = &arguments.json {
        write(file, &json(&reports).map_err(|error| error.to_string())?)?;
    }
    if let Some(file) = &arguments.markdown {
        write(file, &markdown(&reports))?;
    }
    for suite in &suites {
        say(&summary(suite.name(), &reports));
    }
    Ok(reports.iter().all(Report::is_good))
}

/// `NAME=URL`, or a URL alone, which may have an equals sign in its parameters.
fn named(argument: &str) -> (Option<&str>, &str) {
    match argument.split_once('=') {
        Some((name, url)) if !name.is_empty() && !name.contains([':', '/', '?']) => (Some(name), url),
        _ => (None, argument),
    }
}

/// Runs a suite `times` at once, and prints each report as it is known.
async fn run_suite(suite: &Suite, times: u16) -> Vec<Report> {
    let runs = (0..times).map(|_| suite.run(|report| say(&format!("{report} ({} ms)", report.millis))));
    futures_util::future::join_all(runs).await.into_iter().flatten().collect()
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))
}
