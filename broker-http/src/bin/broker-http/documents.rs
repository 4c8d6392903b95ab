//! What is printed for others to keep: completions, the manual page, the table of settings.

use std::io::Write as _;
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
    let all: Vec<_> = command.get_subcommands().filter(|command| command.get_name() != "help").cloned().collect();
    let rendered = opening(command, &all, &mut page).and_then(|()| {
        all.iter().flat_map(|command| std::iter::once(command).chain(command.get_subcommands())).try_for_each(
            |command| {
                let man = clap_mangen::Man::new(command.clone());
                let name = command.get_bin_name().unwrap_or(command.get_name()).to_uppercase();
                page.extend_from_slice(format!(".SH {name}\n").as_bytes());
                man.render_description_section(&mut page)?;
                man.render_options_section(&mut page)
            },
        )
    });
    if let Err(error) = rendered {
        say!("broker-http: the manual page cannot be made: {error}");
        return ExitCode::FAILURE;
    }
    print(&String::from_utf8_lossy(&page));
    ExitCode::SUCCESS
}

/// What comes before the commands. They are named as they are typed: clap_mangen would refer to a page of each.
fn opening(whole: clap::Command, commands: &[clap::Command], page: &mut Vec<u8>) -> std::io::Result<()> {
    let man = clap_mangen::Man::new(whole);
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    writeln!(page, ".SH SUBCOMMANDS")?;
    for command in commands {
        let name = command.get_bin_name().unwrap_or(command.get_name()).replace('-', "\\-");
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        writeln!(page, ".TP\n\\fB{name}\\fR\n{}", about.replace('-', "\\-"))?;
    }
    man.render_extra_section(page)?;
    man.render_version_section(page)
}
