//! `broker-http topic`: the topics of a daemon.

use std::process::ExitCode;

use serde_json::Value;

use super::Where;
use super::status::{Cells, table};
use crate::output::{fail, print};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// List the topics in use: messages published, bytes held, the last time
    List {
        #[command(flatten)]
        place: Where,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn run(command: Command) -> ExitCode {
    let Command::List { place, json } = command;
    let listed = match place.open() {
        Ok(daemon) => daemon.all("/topics", "topics").await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(topics) if json => print(&format!("{:#}\n", Value::from(topics))),
        Ok(topics) => {
            let rows = topics.iter().map(|topic| {
                let cells = Cells(topic);
                vec![
                    cells.text("name"),
                    cells.text("published"),
                    cells.text("held_bytes"),
                    cells.text("last_published"),
                ]
            });
            print(&table(&["TOPIC", "PUBLISHED", "HELD BYTES", "LAST PUBLISHED"], rows.collect()));
        }
        Err(error) => return fail(&error),
    }
    ExitCode::SUCCESS
}
