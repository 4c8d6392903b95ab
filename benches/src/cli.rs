//! The command line of `ratios`, the same for this package's comparisons and for the peers'.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::Result;
use crate::comparison::Comparison;
use crate::footprint::{self, Footprint};
use crate::measure::measure;

/// Runs named comparisons as interleaved rounds and tells whether their bars hold.
///
/// The exit status is 0 if every bar holds, 1 if one does not, 2 if a name is unknown or a round failed.
#[derive(Debug, Parser)]
#[command(name = "ratios")]
pub struct Arguments {
    /// What to run: a name, or a group (`in_process`, `in_process/fan_out`)
    #[arg(value_name = "NAME", required_unless_present_any = ["list", "footprint"])]
    pub names: Vec<String>,

    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,

    /// Print the names with their bars and run nothing
    #[arg(long)]
    pub list: bool,

    /// Seconds a comparison may take at most, however wide its spread
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// Print the bytes that one of these holds (what a comparison asks of a process of its own)
    #[arg(long, hide = true)]
    footprint: Option<Footprint>,

    /// The endpoint that `--footprint` pushes to
    #[arg(long, hide = true, default_value = "")]
    endpoint: String,
}

/// What running came to, the better first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Every bar holds.
    Holds,
    /// A bar does not hold.
    Falls,
    /// A name is unknown or a round failed: nothing is known.
    Failed,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Holds => Self::SUCCESS,
            Outcome::Falls => Self::FAILURE,
            Outcome::Failed => Self::from(2),
        }
    }
}

/// Does what the arguments ask for with these comparisons.
pub fn run(comparisons: Vec<Comparison>, arguments: &Arguments) -> Outcome {
    if arguments.list {
        for comparison in &comparisons {
            let (name, unit, bars) = (comparison.name(), comparison.unit().as_str(), comparison.bars());
            let at_limit = bars.at_limit.map(|bar| format!("; {bar} where the server is the limit"));
            println!("{name:<42} {}  {unit}{}", bars.usual, at_limit.unwrap_or_default());
        }
        return Outcome::Holds;
    }
    match select(comparisons, &arguments.names).and_then(|chosen| execute(chosen, arguments)) {
        Ok(true) => Outcome::Holds,
        Ok(false) => Outcome::Falls,
        Err(error) => {
            eprintln!("ratios: {error}");
            Outcome::Failed
        }
    }
}

/// The comparisons that these names select, each once.
fn select(comparisons: Vec<Comparison>, names: &[String]) -> Result<Vec<Comparison>> {
    for name in names {
        if !comparisons.iter().any(|comparison| comparison.is_selected_by(name)) {
            let known: Vec<_> = comparisons.iter().map(Comparison::name).collect();
            return Err(format!("no comparison or group is called {name:?}; known: {}", known.join(", ")).into());
        }
    }
    let chosen = |comparison: &Comparison| names.iter().any(|name| comparison.is_selected_by(name));
    Ok(comparisons.into_iter().filter(chosen).collect())
}

/// Runs in tasks of a multi-thread runtime: the thread that blocks on a runtime is a slow place to
/// work.
fn execute(comparisons: Vec<Comparison>, arguments: &Arguments) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let Some(what) = arguments.footprint {
        println!("{}", runtime.block_on(footprint::measure(what, &arguments.endpoint))?);
        return Ok(true);
    }
    let (json, limit) = (arguments.json, Duration::from_secs(arguments.seconds));
    runtime.block_on(async {
        let mut all_hold = true;
        for comparison in comparisons {
            let progress = Progress::begin(comparison.name());
            let measured = tokio::spawn(measure(comparison, limit, progress.reporter())).await;
            progress.end();
            let report = measured??;
            all_hold &= report.holds;
            if json {
                println!("{}", serde_json::to_string(&report)?);
            } else {
                println!("{report}");
            }
        }
        Ok(all_hold)
    })
}

/// One line on standard error, rewritten round by round where that is a terminal.
struct Progress {
    name: String,
    rewrites: bool,
}

impl Progress {
    fn begin(name: &str) -> Self {
        let rewrites = std::io::stderr().is_terminal();
        if !rewrites {
            eprintln!("measuring {name}");
        }
        Self { name: name.to_owned(), rewrites }
    }

    fn reporter(&self) -> impl FnMut(usize, f64) + Send + use<> {
        let (name, rewrites) = (self.name.clone(), self.rewrites);
        move |round, ratio| {
            if rewrites {
                eprint!("\r{name}: round {round}, ratio {ratio:.3} ");
                let _ = std::io::stderr().flush();
            }
        }
    }

    fn end(&self) {
        if self.rewrites {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comparison::{Pair, Unit};

    fn named(names: &[&str]) -> Vec<Comparison> {
        let pair = async || Ok(Pair::new(async || Ok(1.0), async || Ok(1.0)));
        names.iter().map(|name| Comparison::new(*name, Unit::Bytes, 1.0, pair)).collect()
    }

    fn selected(names: &[&str]) -> Result<Vec<String>> {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let chosen = select(named(&["a/b/c", "a/b/d", "a/e", "f/g"]), &names)?;
        Ok(chosen.iter().map(|comparison| comparison.name().to_owned()).collect())
    }

    #[test]
    fn a_groups_name_selects_all_of_it_and_nothing_twice() {
        assert_eq!(selected(&["a"]).unwrap(), ["a/b/c", "a/b/d", "a/e"]);
        assert_eq!(selected(&["a/b/", "a/b/d", "f/g"]).unwrap(), ["a/b/c", "a/b/d", "f/g"]);
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_known() {
        let error = selected(&["a", "a/b/"]).and_then(|_| selected(&["a/x"])).unwrap_err().to_string();
        assert!(error.contains("a/x") && error.contains("f/g"), "{error}");
    }

    #[test]
    fn a_name_is_needed_unless_the_names_are_asked_for() {
        assert!(Arguments::try_parse_from(["ratios"]).is_err());
        assert!(Arguments::try_parse_from(["ratios", "--list"]).is_ok());
        assert!(Arguments::try_parse_from(["ratios", "--seconds", "0", "a"]).is_err());
    }

    #[test]
    fn the_names_of_this_package_are_distinct_and_grouped() {
        let mut names: Vec<_> = crate::comparisons().iter().map(|comparison| comparison.name().to_owned()).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(names.iter().all(|name| name.contains('/') && !name.starts_with("peers/")));
    }
}
