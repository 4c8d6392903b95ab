//! The peers' own `ratios`; the project's hands `peers/…` over to it.

use std::process::ExitCode;

use broker_benches::cli::{self, Arguments};
use clap::Parser;

fn main() -> ExitCode {
    cli::run(broker_peers::comparisons(), &Arguments::parse()).into()
}
