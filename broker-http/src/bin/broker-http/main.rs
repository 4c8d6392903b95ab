//! The daemon and its command line; see `broker-http --help`.

mod admin;
mod config;
mod documents;
mod output;
mod publish;
mod serve;
mod stdin;
mod subscribe;
mod token;

use std::ffi::OsString;
use std::process::ExitCode;

use broker_core::Connectors;
use clap::{Parser, Subcommand};

/// A message is made on one thread and dropped on another. glibc's allocator does that under a lock, and looks through
/// all that was freed whenever a batch wants a kilobyte: it took a fifth of the time of streamed NDJSON.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pub/sub from one binary: any program publishes with an HTTP POST and subscribes by giving a URL
/// to push to.
///
/// Without a command it serves: `broker-http` alone listens on 127.0.0.1:2757 and keeps messages in
/// memory; it prints the curl lines to try.
#[derive(Debug, Parser)]
#[command(name = "broker-http", version, max_term_width = 100, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Try, each in a terminal of its own:
  broker-http
      serves on 127.0.0.1:2757
  broker-http sub 'orders.>'
      shows every message on orders.…
  broker-http pub orders.created '{\"id\": 42}'
      publishes one; so does
  curl http://127.0.0.1:2757/topics/orders.created -d '{\"id\": 42}'
";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the HTTP interface (the default command)
    Serve(serve::Args),
    /// Check the configuration that serve would run with, and end
    CheckConfig(serve::Args),
    /// Show every topic and subscription of a daemon at work: rates, lag, state
    Status(admin::status::Args),
    /// Make, show, change and delete subscriptions of a daemon at work
    #[command(subcommand)]
    Subscription(admin::subscription::Command),
    /// Show the topics of a daemon at work
    #[command(subcommand)]
    Topic(admin::topic::Command),
    /// Make bearer tokens, and the hashes a daemon keeps of them
    #[command(subcommand)]
    Token(token::Command),
    /// Publish messages: an argument, a file, or every line of standard input
    Pub(publish::Args),
    /// Print the messages of a topic or of many
    Sub(subscribe::Args),
    /// Print completions for a shell
    Completions(documents::Completions),
    /// Print the manual page
    Man,
    /// Print the table of settings, in Markdown
    Settings,
}

fn main() -> ExitCode {
    let typed = with_default_command(std::env::args_os().collect());
    let cli = match Cli::try_parse_from(&typed) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes this way, too, and ends well.
            let _ = error.print();
            if let Some(told) = config::at_fault(&error, &typed) {
                output::say!("broker-http: {told}");
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("broker-http: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve::run(args).await,
            Command::CheckConfig(args) => serve::check(args),
            Command::Status(args) => admin::status::run(args).await,
            Command::Subscription(command) => admin::subscription::run(command).await,
            Command::Topic(command) => admin::topic::run(command).await,
            Command::Token(command) => token::run(command),
            Command::Completions(args) => documents::completions(args),
            Command::Man => documents::man(),
            Command::Settings => documents::settings(),
            Command::Pub(args) => publish::run(args).await,
            Command::Sub(args) => subscribe::run(args).await,
        }
    });
    // What still runs was given its time.
    runtime.shutdown_background();
    code
}

/// `serve` goes without saying: clap's own way to do it would take options from the environment
/// for options of another command.
fn with_default_command(mut args: Vec<OsString>) -> Vec<OsString> {
    let said = match args.get(1).map(|arg| arg.to_string_lossy().into_owned()) {
        None => false,
        Some(first) => !first.starts_with('-') || ["-h", "--help", "-V", "--version"].contains(&first.as_str()),
    };
    if !said {
        args.insert(1.min(args.len()), "serve".into());
    }
    args
}

/// Every kind of broker this binary knows.
pub(crate) fn connectors() -> Connectors {
    let mut connectors = Connectors::new();
    connectors.add(["http", "https", "unix"], broker_http::client::connector());
    #[cfg(feature = "kafka")]
    connectors.add(["kafka"], broker_kafka::connector());
    #[cfg(not(feature = "kafka"))]
    connectors.add(["kafka"], left_out("kafka"));
    #[cfg(feature = "amqp")]
    connectors.add(["amqp", "amqps"], broker_amqp::connector());
    #[cfg(not(feature = "amqp"))]
    connectors.add(["amqp", "amqps"], left_out("amqp"));
    connectors
}

/// What answers for a kind of broker that this binary was built without.
#[cfg(not(all(feature = "kafka", feature = "amqp")))]
fn left_out(feature: &'static str) -> impl broker_core::Connector {
    move |_: broker_core::BrokerUrl| {
        Err(broker_core::Error::unsupported(format!(
            "this broker-http was built without {feature}: build it with `cargo build --release -p broker-http --features {feature}`, or `full` for everything"
        )))
    }
}
