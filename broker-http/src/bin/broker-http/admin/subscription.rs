//! `broker-http subscription`: everything the interface does with subscriptions.

use std::path::PathBuf;
use std::process::ExitCode;

use broker_core::{Error, Result};
use serde_json::{Map, Value};

use super::settle::Settle;
use super::status::{SUBSCRIPTION_COLUMNS, subscription_row, table};
use super::{Daemon, Where, finish, segment};
use crate::output::{fail, print, read_file, say};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// List all: what they want, where it goes, how it is going
    List {
        #[command(flatten)]
        place: Where,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one, every setting filled in
    Show(Named),
    /// Make one, or replace its settings
    Put(Put),
    /// Delete one, and with the last of a group its backlog
    Delete {
        #[command(flatten)]
        named: Named,
        /// Keep the backlog
        #[arg(long)]
        keep: bool,
    },
    /// Push nothing more until resume; the backlog is kept
    Pause(Named),
    /// Push again, also what its endpoint had disabled
    Resume(Named),
    /// Push one marked message, and tell what became of it
    Test(Named),
    /// Show the last pushes
    Attempts(Named),
    /// List the dead letters
    Dead {
        #[command(flatten)]
        named: Named,
        /// Dead letters at most
        #[arg(long)]
        max: Option<u32>,
    },
    /// Push dead letters again
    Redrive {
        #[command(flatten)]
        named: Named,
        /// Dead letters at most; all if it is left out
        #[arg(long)]
        max: Option<u64>,
        /// So many a second
        #[arg(long)]
        rate: Option<f64>,
    },
    /// Delete what a subscription keeps
    Purge {
        #[command(flatten)]
        named: Named,
        /// What: what waits to be delivered, or what was given up on
        what: What,
    },
    /// Take messages of a pull subscription on lease
    Pull {
        #[command(flatten)]
        named: Named,
        /// Messages at most
        #[arg(long, default_value_t = 1)]
        max: u32,
        /// How long to wait for the first
        #[arg(long, default_value = "0s")]
        wait: String,
    },
    /// Settle what was pulled: done, to be tried again, dead, given back, or held for longer
    Settle(Settle),
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum What {
    Backlog,
    Dead,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// The subscription
    name: String,
    #[command(flatten)]
    place: Where,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Put {
    #[command(flatten)]
    named: Named,
    /// The topics it wants
    #[arg(long, required_unless_present = "file")]
    filter: Option<String>,
    /// Where messages are pushed; without one they are pulled
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The group it is a member of; by default one of its own name
    #[arg(long)]
    group: Option<String>,
    /// Any other setting, as in timeout=5s or retry={\"max_attempts\":3}; may be repeated
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = setting)]
    settings: Vec<(String, Value)>,
    /// All settings as JSON; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["filter", "endpoint", "group", "settings"])]
    file: Option<PathBuf>,
}

/// A value is JSON if it reads as JSON, and text otherwise.
fn setting(text: &str) -> std::result::Result<(String, Value), String> {
    let (field, value) = text.split_once('=').ok_or("it looks like FIELD=VALUE")?;
    Ok((field.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::from(value))))
}

/// Bytes of a file of settings; the daemon takes no more.
pub(super) const MAX_FILE: usize = 1 << 20;

impl Put {
    async fn body(&self) -> Result<String> {
        if let Some(file) = &self.file {
            let text = read_file(file, MAX_FILE).await?;
            return String::from_utf8(text).map_err(|_| Error::invalid(format!("{}: it is not UTF-8", file.display())));
        }
        let mut fields = serde_json::Map::new();
        for (field, value) in [("filter", &self.filter), ("endpoint", &self.endpoint), ("group", &self.group)] {
            fields.extend(value.as_ref().map(|value| (field.to_owned(), Value::from(value.as_str()))));
        }
        fields.extend(self.settings.iter().cloned());
        Ok(Value::Object(fields).to_string())
    }
}

pub(crate) async fn run(command: Command) -> ExitCode {
    match command {
        Command::List { place, json } => list(&place, json).await,
        Command::Show(named) => named.ask("GET", "", None).await,
        Command::Put(put) => match put.body().await {
            Ok(body) => put.named.ask("PUT", "", Some(&body)).await,
            Err(error) => fail(&error),
        },
        Command::Delete { named, keep } => named.ask("DELETE", if keep { "?keep=true" } else { "" }, None).await,
        Command::Pause(named) => named.ask("POST", "/pause", None).await,
        Command::Resume(named) => named.ask("POST", "/resume", None).await,
        Command::Test(named) => named.test().await,
        Command::Attempts(named) => named.ask("GET", "/attempts", None).await,
        Command::Dead { named, max } => {
            let query = max.map_or_else(String::new, |max| format!("?max={max}"));
            named.ask("GET", &format!("/dead{query}"), None).await
        }
        Command::Redrive { named, max, rate } => {
            let given = [("max", max.map(Value::from)), ("rate", rate.map(Value::from))];
            let wanted: Map<_, _> =
                given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
            named.ask("POST", "/redrive", Some(&Value::from(wanted).to_string())).await
        }
        Command::Purge { named, what } => {
            let what = match what {
                What::Backlog => "/backlog",
                What::Dead => "/dead",
            };
            named.ask("DELETE", what, None).await
        }
        Command::Pull { named, max, wait } => {
            named.ask("POST", &format!("/pull?max={max}&wait={}", segment(&wait)), None).await
        }
        Command::Settle(settle) => match settle.body().await {
            Ok(body) => settle.named.ask("POST", "/settle", Some(&body)).await,
            Err(error) => fail(&error),
        },
    }
}

impl Named {
    /// The answer says what became of the push; so does how it ends.
    async fn test(&self) -> ExitCode {
        let path = format!("/subscriptions/{}/test", segment(&self.name));
        let answer = match self.place.open() {
            Ok(daemon) => daemon.ask("POST", &path, None).await,
            Err(error) => Err(error),
        };
        let failure =
            answer.as_ref().ok().and_then(|answer| answer.pointer("/test/error")?.as_str().map(str::to_owned));
        let code = finish(answer);
        let Some(failure) = failure else { return code };
        say!("broker-http: the push failed: {failure}");
        ExitCode::FAILURE
    }

    async fn ask(&self, method: &str, rest: &str, body: Option<&str>) -> ExitCode {
        let path = format!("/subscriptions/{}{rest}", segment(&self.name));
        match self.place.open() {
            Ok(daemon) => finish(daemon.ask(method, &path, body).await),
            Err(error) => fail(&error),
        }
    }
}

async fn list(place: &Where, json: bool) -> ExitCode {
    let listed = match place.open() {
        Ok(daemon) => subscriptions(&daemon).await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(all) if json => print(&format!("{:#}\n", Value::from(all))),
        Ok(all) => print(&table(&SUBSCRIPTION_COLUMNS, all.iter().map(|one| subscription_row(one, None)).collect())),
        Err(error) => return fail(&error),
    }
    ExitCode::SUCCESS
}

/// Every subscription that may be seen.
pub(super) async fn subscriptions(daemon: &Daemon) -> Result<Vec<Value>> {
    daemon.all("/subscriptions", "subscriptions").await
}
