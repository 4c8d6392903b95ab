//! What an operator asks of a daemon at work, over its own interface.

mod settle;
pub(crate) mod status;
pub(crate) mod subscription;
pub(crate) mod topic;

use std::process::ExitCode;

use broker_core::{Error, Result};
use broker_http::client::{HttpBroker, HttpOptions};
use serde_json::Value;

use crate::output::{fail, print};

/// What a daemon's URL can say, in `--help`.
pub(crate) const DAEMON_URL: &str = "\
The daemon: http://host:port, https://host:port or unix:/path. As parameters of the URL, as in
https://broker.internal:2757?ca=ca.pem&cert=me.pem&key=me.key:
  ca=FILE             root certificates (PEM) to trust instead of this machine's; https
  cert=FILE key=FILE  a client certificate (PEM) to show, and its private key; https
  token=TOKEN         as --token; TOKEN@ before the host as well
  timeout=10s         how long a request may take, connecting included
  connect_timeout=5s  how long connecting may take";

/// Where the daemon is.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Where {
    /// The daemon: http://host:port, https://host:port or unix:/path
    #[arg(
        long,
        short,
        value_name = "URL",
        long_help = DAEMON_URL,
        env = "BROKER_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:2757"
    )]
    broker: String,
    /// The bearer token of who asks
    #[arg(long, value_name = "TOKEN", env = "BROKER_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

impl Where {
    /// The way to the daemon; connects to nothing yet.
    pub(crate) fn open(&self) -> Result<Daemon> {
        let mut options = HttpOptions::from_url(&self.broker)?;
        if let Some(token) = &self.token {
            options = options.with_token(token)?;
        }
        Ok(Daemon(HttpBroker::new(options)))
    }
}

/// A daemon's interface.
pub(crate) struct Daemon(HttpBroker);

impl Daemon {
    /// Asks for something; what has no body is null.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Result<Value> {
        let answer = self.0.request(method, path, body.map(str::to_owned)).await?;
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer).map_err(|error| {
            Error::codec(format!("{method} {path}: the answer is no JSON ({error}); is this a broker-http?"))
        })
    }

    /// Every page of a list.
    pub(crate) async fn all(&self, path: &str, field: &str) -> Result<Vec<Value>> {
        let (mut all, mut next) = (Vec::new(), String::new());
        loop {
            let mut page = self.ask("GET", &format!("{path}?limit=1000{next}"), None).await?;
            if let Some(entries) = page.get_mut(field).and_then(Value::as_array_mut) {
                all.append(entries);
            }
            match page.get("next").and_then(Value::as_str) {
                Some(name) => next = format!("&next={}", segment(name)),
                None => return Ok(all),
            }
        }
    }
}

/// A name as one segment of a path.
pub(crate) fn segment(name: &str) -> String {
    percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// Prints an answer for people and scripts alike.
pub(crate) fn finish(answer: Result<Value>) -> ExitCode {
    match answer {
        Ok(Value::Null) => ExitCode::SUCCESS,
        Ok(value) => {
            print(&format!("{value:#}\n"));
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}
