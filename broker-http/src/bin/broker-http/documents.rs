//! What is printed for others to keep: completions, the manual page, the table of settings.

use std::process::ExitCode;

use clap::CommandFactory as _;

use crate::output::{print, say};
use crate::{Cli, config};

/// For which shell.
#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    shell: clap_complete::Shell,
}

pub(crate) fn completions(args: Completions) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "broker-http", &mut script);
    print(&String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}

pub(crate) fn settings() -> ExitCode {
    print(&config::markdown());
    ExitCode::SUCCESS
}

/// One page: the commands after each other, as roff(7).
pub(crate) fn man() -> ExitCode {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    let rendered = clap_mangen::Man::new(command.clone()).render(&mut page).and_then(|()| {
        let all = command.get_subcommands().filter(|command| command.get_name() != "help");
        all.flat_map(|command| std::iter::once(command).chain(command.get_subcommands())).try_for_each(|command| {
            let man = clap_mangen::Man::new(command.clone());
            let name = command.get_bin_name().unwrap_or(command.get_name()).to_uppercase();
            page.extend_from_slice(format!(".SH {name}\n").as_bytes());
            man.render_description_section(&mut page)?;
            man.render_options_section(&mut page)
        })
    });
    if let Err(error) = rendered {
        say!("broker-http: the manual page cannot be made: {error}");
        return ExitCode::FAILURE;
    }
    print(&String::from_utf8_lossy(&page));
    ExitCode::SUCCESS
}
