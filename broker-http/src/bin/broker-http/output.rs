//! What `pub` and `sub` have in common: the broker they open, what they print, how they end.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, BrokerUrl, Error, ErrorKind, Result};
use broker_http::client::{HttpBroker, HttpOptions};
use tokio::io::AsyncReadExt;

use super::admin::DAEMON_URL;

/// Prints a line on standard error, if anybody reads it: `eprintln!` would panic where nobody does.
macro_rules! say {
    ($($text:tt)*) => {
        crate::output::show(&format!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use say;

/// Prints on standard error, if anybody reads it.
pub(crate) fn show(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Prints on standard output, if anybody reads it.
pub(crate) fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// How long closing may take.
pub(crate) const DRAIN: Duration = Duration::from_secs(10);

/// Options of both commands.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// The broker: http://host:port, or any other kind this binary was built with
    #[arg(
        long,
        short,
        value_name = "URL",
        long_help = format!("{DAEMON_URL}\nOr any other kind of broker this binary was built with."),
        env = "BROKER_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:2757"
    )]
    pub(crate) broker: String,
    /// The bearer token of who asks, at a daemon; other brokers take credentials in their URL
    #[arg(long, value_name = "TOKEN", env = "BROKER_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Print one JSON object a line, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

/// Opens the broker and connects, so that what is wrong is told at once.
pub(crate) async fn open(common: &Common) -> Result<Arc<dyn Broker>, ExitCode> {
    let scheme = BrokerUrl::parse(&common.broker).map_err(|error| fail(&error))?.scheme().to_owned();
    let is_daemon = ["http", "https", "unix"].contains(&scheme.as_str());
    let opened = match common.token.as_deref().filter(|_| is_daemon) {
        Some(token) => HttpOptions::from_url(&common.broker)
            .and_then(|options| options.with_token(token))
            .map(|options| Arc::new(HttpBroker::new(options)) as Arc<dyn Broker>),
        None => super::connectors().open(&common.broker),
    };
    let broker = opened.map_err(|error| fail(&error))?;
    broker.connect().await.map_err(|error| {
        let code = fail(&error);
        if error.kind() == ErrorKind::Unavailable && is_daemon {
            say!("is the daemon running? `broker-http` starts it; --broker says where it is");
        }
        code
    })?;
    Ok(broker)
}

/// Prints an error; the exit status for it: 2 for what the caller got wrong.
pub(crate) fn fail(error: &Error) -> ExitCode {
    say!("broker-http: {error}");
    if error.kind() == ErrorKind::Invalid { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// Resolves on Ctrl-C or SIGTERM.
pub(crate) async fn interrupted() {
    let interrupt = async {
        // Without the signal there is nothing to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                () = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    interrupt.await;
}

/// A file's contents, `max` bytes at most; `-` is standard input.
pub(crate) async fn read_file(path: &Path, max: usize) -> Result<Vec<u8>> {
    let broken = |error: io::Error| Error::invalid(format!("{}: {error}", path.display()));
    let mut contents = Vec::new();
    let most = max as u64 + 1;
    if path.as_os_str() == "-" {
        tokio::io::stdin().take(most).read_to_end(&mut contents).await.map_err(broken)?;
    } else {
        let file = tokio::fs::File::open(path).await.map_err(broken)?;
        file.take(most).read_to_end(&mut contents).await.map_err(broken)?;
    }
    if contents.len() > max {
        return Err(Error::too_large(format!("{} is larger than a message of {max} bytes", path.display())));
    }
    Ok(contents)
}

/// Standard output, whose reader may go away.
#[derive(Debug)]
pub(crate) struct Out(io::Stdout);

impl Out {
    pub(crate) fn new() -> Self {
        Self(io::stdout())
    }

    /// Prints a line.
    ///
    /// # Errors
    ///
    /// That nobody reads any more (`… | head -1`): time to end.
    pub(crate) fn line(&self, line: impl AsRef<[u8]>) -> io::Result<()> {
        let mut out = self.0.lock();
        out.write_all(line.as_ref())?;
        out.write_all(b"\n")?;
        out.flush()
    }
}
