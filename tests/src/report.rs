//! What a run showed: one line a check, one table for all brokers.

use std::fmt;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::{CHECKS, Form, Shown, Verdict};

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "detail", rename_all = "snake_case")]
pub enum Outcome {
    /// The contract was kept.
    Pass,
    /// What the broker declares that it cannot do, it refused with the typed error.
    RefusedAsDeclared(String),
    /// The contract was broken.
    Fail(String),
    /// The harness could not bring about what the check needs.
    NoControl(String),
}

impl From<Verdict> for Outcome {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Ok(Shown::Passed) => Self::Pass,
            Ok(Shown::Declared(why)) => Self::RefusedAsDeclared(why),
            Ok(Shown::NoControl(why)) => Self::NoControl(why),
            Err(failed) => Self::Fail(failed.0),
        }
    }
}

/// One check against one broker.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The broker.
    pub broker: String,
    /// The check's id.
    pub check: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// How it saw the broker.
    #[serde(serialize_with = "form_text")]
    pub form: Form,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub millis: u64,
}

fn form_text<S: serde::Serializer>(form: &Form, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(form.as_str())
}

impl Report {
    /// Whether the contract was broken.
    pub fn is_failure(&self) -> bool {
        matches!(self.outcome, Outcome::Fail(_))
    }

    /// Whether it passed, or was refused as declared.
    pub fn is_good(&self) -> bool {
        matches!(self.outcome, Outcome::Pass | Outcome::RefusedAsDeclared(_))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, why) = match &self.outcome {
            Outcome::Pass => ("pass", None),
            Outcome::RefusedAsDeclared(why) => ("refused as declared", Some(why)),
            Outcome::Fail(why) => ("FAIL", Some(why)),
            Outcome::NoControl(why) => ("no control", Some(why)),
        };
        write!(f, "{} {} {} … {word}", self.broker, self.check, self.title)?;
        why.map_or(Ok(()), |why| write!(f, ": {why}"))
    }
}

/// The last line of a run: `"memory:: 58 passed, 3 refused as declared, 0 failed"`.
pub fn summary<'a>(broker: &str, reports: impl IntoIterator<Item = &'a Report>) -> String {
    let (mut passed, mut declared, mut failed, mut no_control) = (0, 0, 0, 0);
    for report in reports.into_iter().filter(|report| report.broker == broker) {
        *match report.outcome {
            Outcome::Pass => &mut passed,
            Outcome::RefusedAsDeclared(_) => &mut declared,
            Outcome::Fail(_) => &mut failed,
            Outcome::NoControl(_) => &mut no_control,
        } += 1;
    }
    let mut line = format!("{broker}: {passed} passed, {declared} refused as declared, {failed} failed");
    if no_control > 0 {
        let _ = write!(line, ", {no_control} without control");
    }
    line
}

/// The brokers of a run, each once, in the order they came.
fn brokers(reports: &[Report]) -> Vec<&str> {
    let mut brokers: Vec<&str> = Vec::new();
    for report in reports {
        if !brokers.contains(&report.broker.as_str()) {
            brokers.push(&report.broker);
        }
    }
    brokers
}

/// One table, checks by brokers. Of several runs of a check the worst counts.
pub fn markdown(reports: &[Report]) -> String {
    let brokers = brokers(reports);
    let mut notes: Vec<String> = Vec::new();
    let mut text = String::from("| | check |");
    for broker in &brokers {
        let _ = write!(text, " {} |", broker.replace('|', "\\|"));
    }
    let _ = write!(text, "\n|---|---|{}\n", "---|".repeat(brokers.len()));
    for check in CHECKS.iter().filter(|check| reports.iter().any(|report| report.check == check.id)) {
        let _ = write!(text, "| {} | {} |", check.id, check.title.replace('*', "\\*").replace('|', "\\|"));
        for broker in &brokers {
            let runs = reports.iter().filter(|report| report.check == check.id && report.broker == *broker);
            let worst = runs.max_by_key(|report| match report.outcome {
                Outcome::Pass => 0,
                Outcome::RefusedAsDeclared(_) => 1,
                Outcome::NoControl(_) => 2,
                Outcome::Fail(_) => 3,
            });
            let cell = match worst.map(|report| &report.outcome) {
                None => String::new(),
                Some(Outcome::Pass) => "pass".to_owned(),
                Some(Outcome::RefusedAsDeclared(why)) => format!("refused{}", note(&mut notes, why)),
                Some(Outcome::NoControl(why)) => format!("no control{}", note(&mut notes, why)),
                Some(Outcome::Fail(_)) => "**fail**".to_owned(),
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    if !notes.is_empty() {
        text.push_str("\nRefused: the broker declares that it cannot do this, and refuses with the typed error.\n\n");
    }
    for (number, note) in notes.iter().enumerate() {
        let _ = writeln!(text, "{}. {note}", number + 1);
    }
    text
}

/// The mark of a footnote, each text once.
fn note(notes: &mut Vec<String>, text: &str) -> String {
    let found = notes.iter().position(|have| have == text);
    let number = found.unwrap_or_else(|| {
        notes.push(text.to_owned());
        notes.len() - 1
    });
    format!(" ({})", number + 1)
}

/// The same as JSON: one array, an object a run of a check.
///
/// # Errors
///
/// None in practice: everything in a report can be written.
pub fn json(reports: &[Report]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(reports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(check: usize, outcome: Outcome) -> Report {
        let check = CHECKS[check];
        Report { broker: "memory:".into(), check: check.id, title: check.title, form: Form::Shared, outcome, millis: 1 }
    }

    #[test]
    fn a_table_has_a_row_a_check_and_shows_the_worst_of_several_runs() {
        let reports = [
            report(0, Outcome::Pass),
            report(0, Outcome::Fail("lost one".into())),
            report(1, Outcome::RefusedAsDeclared("not here".into())),
            report(2, Outcome::RefusedAsDeclared("not here".into())),
        ];
        let table = markdown(&reports);
        assert!(
            table.contains("| A1 | n messages: same set, payload, headers, key, content type, id | **fail** |"),
            "{table}"
        );
        assert_eq!(table.matches("refused (1)").count(), 2, "{table}");
        assert_eq!(summary("memory:", &reports), "memory:: 1 passed, 2 refused as declared, 1 failed");
        let json: serde_json::Value = serde_json::from_str(&json(&reports).unwrap()).unwrap();
        assert_eq!(json[1]["outcome"], "fail");
        assert_eq!(json[1]["detail"], "lost one");
        assert_eq!(json[0]["form"], "arc");
    }
}
