//! `cargo run --release --bin ratios -- NAME…`: see the package's README.

use std::process::ExitCode;

use broker_benches::cli::{self, Arguments, Outcome};
use broker_benches::peers;
use clap::Parser;

/// The daemon's, for both sides of every comparison.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let theirs: Vec<_> = arguments.names.extract_if(.., |name| peers::is_peers(name)).collect();

    let mut outcome = Outcome::Holds;
    if theirs.is_empty() || !arguments.names.is_empty() {
        outcome = cli::run(broker_benches::comparisons(), &arguments);
    }
    if !theirs.is_empty() {
        outcome = outcome.max(peers::run(&theirs, &arguments));
    }
    if arguments.list {
        peers::list();
    }
    outcome.into()
}
