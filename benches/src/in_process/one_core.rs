//! The loads with few receivers once more, publisher and receivers on one thread.
//!
//! A runtime of several threads runs a publisher and its reader now on one core and now on two, and
//! on two every message costs both sides the lines of memory that travel between the cores: what is
//! compared there is that traffic as much as the code. Here it is the code alone, and what a service
//! finds that runs on one core or whose publisher and reader share one.

use tokio::runtime::Builder;

use super::{Load, Run, fan_out, group};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

pub(super) fn comparisons() -> Vec<Comparison> {
    let [one, ..] = fan_out::LOADS;
    let [two, ..] = group::LOADS;
    vec![
        versus("mpsc_1", one, fan_out::ours, fan_out::mpsc),
        versus("broadcast_1", one, fan_out::ours, fan_out::broadcast),
        versus("flume_2", two, group::ours, group::flume),
        versus("async_channel_2", two, group::ours, group::async_channel),
    ]
}

fn versus<O, T>(name: &str, load: Load, ours: fn(Load) -> O, theirs: fn(Load) -> T) -> Comparison
where
    O: Future<Output = Result<Run>> + 'static,
    T: Future<Output = Result<Run>> + 'static,
{
    Comparison::new(format!("in_process/one_core/{name}"), Unit::DeliveriesPerSecond, 1.0, async move || {
        Ok(Pair::new(move || rate(load, ours), move || rate(load, theirs)))
    })
}

/// Runs `side` on a runtime of one thread.
async fn rate<F>(load: Load, side: fn(Load) -> F) -> Result<f64>
where
    F: Future<Output = Result<Run>> + 'static,
{
    let run = move || Builder::new_current_thread().enable_all().build()?.block_on(side(load));
    Ok(tokio::task::spawn_blocking(run).await??.rate())
}
