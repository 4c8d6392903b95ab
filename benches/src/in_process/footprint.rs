//! What an idle subscription and an idle topic hold, as the machine sees it.
//!
//! The memory of a process is no use after a thousand rounds of other things, so each measurement is
//! a process of its own: this program, started again with `--footprint`.

use std::process::Stdio;

use broker_core::{Message, PublisherOptions, Topic};
use clap::ValueEnum;

use super::{open, subscribe};
use crate::comparison::{Comparison, Pair, Unit};
use crate::{Failure, Result};

/// What is measured, and the most bytes one may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Footprint {
    /// A subscription, with a topic of its own.
    Subscription,
    /// A topic that was published to and has a publisher.
    Topic,
}

/// How many are made, the first few of them before the memory is read.
const COUNT: usize = 50_000;
const WARM_UP: usize = 1_000;

/// Bytes held to the bytes allowed.
pub(super) fn comparisons() -> Vec<Comparison> {
    [(Footprint::Subscription, "subscription", 4096.0), (Footprint::Topic, "topic", 1024.0)]
        .into_iter()
        .map(|(what, name, allowed)| {
            let name = format!("in_process/idle/{name}");
            Comparison::new(name, Unit::Bytes, 1.0, async move || {
                Ok(Pair::new(move || in_own_process(what), move || async move { Ok(allowed) }))
            })
        })
        .collect()
}

/// Bytes of one, measured in a process of its own.
async fn in_own_process(what: Footprint) -> Result<f64> {
    let value = what.to_possible_value().ok_or("it has no name")?;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["--footprint", value.get_name()]).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    if !output.status.success() {
        return Err(format!("measuring {what:?} ended with {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Bytes of one; for a process that has done nothing else.
///
/// # Errors
///
/// The broker's, and where the system does not tell a process's memory.
pub async fn measure(what: Footprint) -> Result<f64> {
    let broker = open()?;
    let mut subscriptions = Vec::with_capacity(COUNT);
    let mut publishers = Vec::with_capacity(COUNT);
    let mut before = 0;
    for number in 0..COUNT {
        if number == WARM_UP {
            before = resident_bytes()?;
        }
        let topic = Topic::new(format!("bench.idle.{number}"))?;
        match what {
            Footprint::Subscription => subscriptions.push(subscribe(&*broker, &topic, None).await?),
            Footprint::Topic => {
                let publisher = broker.publisher(&topic, PublisherOptions::new())?;
                publisher.publish(Message::new("")).await?;
                publishers.push(publisher);
            }
        }
    }
    let held = resident_bytes()?.saturating_sub(before);
    Ok(held as f64 / (COUNT - WARM_UP) as f64)
}

/// Bytes of this process that are in memory: `VmRSS` of Linux's `/proc/self/status`.
fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| format!("reading /proc/self/status, which is Linux's: {error}"))?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = kilobytes.ok_or_else(|| Failure::from("/proc/self/status has no VmRSS"))?.trim().parse()?;
    Ok(kilobytes * 1024)
}
