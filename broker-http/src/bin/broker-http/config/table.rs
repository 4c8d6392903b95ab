//! The table of settings, made from the code that reads them, so that the documentation cannot say
//! otherwise.

use std::fmt::Write as _;

use clap::Args as _;

use super::file::KEYS;
use super::limits;
use crate::serve::Args;

/// The table, in Markdown.
pub(crate) fn markdown() -> String {
    let mut table = String::from("| flag | environment | file | default | |\n|---|---|---|---|---|\n");
    // Writing to a string cannot fail.
    let mut row = |flag: &str, environment: &str, key: &str, default: &str, purpose: &str| {
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) };
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {purpose} |",
            code(flag),
            code(environment),
            code(key),
            code(default)
        );
    };
    let command = Args::augment_args(clap::Command::new("serve"));
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let value = arg.get_value_names().and_then(<[_]>::first).filter(|_| arg.get_action().takes_values());
        // What is meant where it stands alone need not be said.
        let alone = arg.get_num_args().is_some_and(|count| count.min_values() == 0);
        let flag = match value {
            Some(value) if alone => format!("--{long}[={value}]"),
            Some(value) => format!("--{long} {value}"),
            None => format!("--{long}"),
        };
        let environment = arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let (purpose, default) = match help.split_once(" [default: ") {
            Some((purpose, default)) => (purpose, default.trim_end_matches(']')),
            None => (help.as_str(), ""),
        };
        row(&flag, &environment, &file_key(long), default, purpose);
    }
    for (key, default, purpose) in KEYS {
        row("", "", key, default, purpose);
    }
    for (name, default, purpose) in limits::described() {
        row("", "", &format!("limits.{name}"), &default, purpose);
    }
    table
}

/// The keys that stand in the file alone.
pub(super) fn file_keys() -> impl Iterator<Item = String> {
    let limits = limits::described().into_iter().map(|(name, ..)| format!("limits.{name}"));
    KEYS.iter().map(|(key, ..)| (*key).to_owned()).chain(limits)
}

/// What a flag is called in the file.
fn file_key(long: &str) -> String {
    match long.split_once('-') {
        Some((section @ ("tls" | "otlp"), rest)) => format!("{section}.{}", rest.replace('-', "_")),
        _ if long == "config" => String::new(),
        _ => long.replace('-', "_"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_this_table() {
        let readme = include_str!("../../../../README.md");
        let (_, rest) = readme.split_once("<!-- settings -->\n").expect("a marker where the table begins");
        let (have, _) = rest.split_once("<!-- /settings -->").expect("a marker where the table ends");
        assert_eq!(have.trim(), markdown().trim(), "`broker-http settings` prints what should stand there");
    }

    #[test]
    fn every_flag_is_a_key_of_the_file() {
        for line in markdown().lines().skip(2) {
            let mut cells = line.split(" | ");
            let flag = cells.next().unwrap().trim_start_matches("| ").trim_matches('`').to_owned();
            let key = cells.nth(1).unwrap().trim_matches('`').to_owned();
            if key.is_empty() {
                assert!(flag.starts_with("--config"), "{line}");
                continue;
            }
            // A key that is not known is refused by that name.
            let text = match key.split_once('.') {
                _ if key.starts_with('[') => continue,
                Some((section, key)) => format!("[{section}]\n{key} = {{}}"),
                None => format!("{key} = {{}}"),
            };
            let error = super::super::file::parse(&text).unwrap_err();
            assert!(!error.contains("unknown field"), "{line}: {error}");
        }
    }
}
