//! A broker's column of the project's table: what the test of that broker showed, kept in a file from
//! which `conformance --from` makes the table.

use std::io;
use std::path::Path;

use serde::Deserialize;

use crate::report::{Outcome, Report};
use crate::{CHECKS, json};

/// Keeps what a test of every check showed, as column `name`, in `folder`.
///
/// # Errors
///
/// The file cannot be written.
pub fn keep_column(folder: impl AsRef<Path>, name: &str, reports: &[Report]) -> io::Result<()> {
    let reports: Vec<Report> = reports.iter().map(|it| Report { broker: name.to_owned(), ..it.clone() }).collect();
    let folder = folder.as_ref().join("conformance");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(format!("{name}.json")), json(&reports)?)
}

/// What [`json`] wrote.
///
/// # Errors
///
/// It is not such a text, or names a check that there is not (any more).
pub fn from_json(text: &str) -> Result<Vec<Report>, String> {
    #[derive(Deserialize)]
    struct Row {
        broker: String,
        check: String,
        form: String,
        #[serde(flatten)]
        outcome: Outcome,
        millis: u64,
    }
    let rows: Vec<Row> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let report = |Row { broker, check, form, outcome, millis }: Row| {
        let check = CHECKS.iter().find(|it| it.id == check).ok_or_else(|| format!("there is no check {check:?}"))?;
        Ok(Report { broker, check: check.id, title: check.title, form: form.parse()?, outcome, millis })
    };
    rows.into_iter().map(report).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Form, markdown};

    #[test]
    fn a_kept_column_makes_the_table_that_was_shown() {
        let check = CHECKS[0];
        let shown = |check: crate::Check, outcome| Report {
            broker: "x".into(),
            check: check.id,
            title: check.title,
            form: Form::Shared,
            outcome,
            millis: 7,
        };
        let reports = [shown(check, Outcome::Pass), shown(CHECKS[1], Outcome::RefusedAsDeclared("not here".into()))];
        let folder = tempfile::tempdir().unwrap();
        keep_column(&folder, "memory", &reports).unwrap();
        let text = std::fs::read_to_string(folder.path().join("conformance/memory.json")).unwrap();
        let table = markdown(&from_json(&text).unwrap());
        assert_eq!(table, markdown(&reports).replace(" x ", " memory "));
        assert!(from_json(&text.replace("\"A1\"", "\"Z9\"")).unwrap_err().contains("Z9"));
    }
}
