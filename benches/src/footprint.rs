//! Memory, as the machine sees it.
//!
//! The memory of a process is no use after a thousand rounds of other things, so each measurement is
//! a process of its own: this program, started again with `--footprint`.

use std::process::Stdio;

use clap::ValueEnum;

use crate::comparison::{Comparison, Pair, Unit};
use crate::http::Endpoint;
use crate::{Failure, Result, http, in_process};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Footprint {
    /// An idle subscription, with a topic of its own.
    Subscription,
    /// An idle topic that was published to and has a publisher.
    Topic,
    /// 10,000 push subscriptions to distinct endpoints, all of which were pushed to.
    PushSubscriptions,
    /// A backlog of 1,000,000 messages of 100 bytes that wait for an endpoint.
    Backlog,
}

/// A comparison of the bytes that are held to the bytes that are allowed.
pub(crate) fn at_most(name: &str, what: Footprint, allowed: f64) -> Comparison {
    Comparison::new(name, Unit::Bytes, 1.0, async move || {
        Ok(Pair::new(move || in_own_process(what), move || async move { Ok(allowed) }))
    })
}

async fn in_own_process(what: Footprint) -> Result<f64> {
    let value = what.to_possible_value().ok_or("it has no name")?;
    // Here, so that what the endpoint holds is not counted.
    let endpoint = Endpoint::start().await?;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["--footprint", value.get_name(), "--endpoint", &endpoint.url()]);
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    if !output.status.success() {
        return Err(format!("measuring {what:?} ended with {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Bytes held; for a process that has done nothing else. `endpoint` is the URL of one in another
/// process.
///
/// # Errors
///
/// The broker's, and where the system does not tell a process's memory.
pub async fn measure(what: Footprint, endpoint: &str) -> Result<f64> {
    match what {
        Footprint::Subscription => in_process::footprint::subscription().await,
        Footprint::Topic => in_process::footprint::topic().await,
        Footprint::PushSubscriptions => http::footprint::push_subscriptions(endpoint).await,
        Footprint::Backlog => http::footprint::backlog().await,
    }
}

/// Bytes of this process that are in memory: `VmRSS` of Linux's `/proc/self/status`.
pub(crate) fn resident_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| format!("reading /proc/self/status, which is Linux's: {error}"))?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kilobytes: u64 = kilobytes.ok_or_else(|| Failure::from("/proc/self/status has no VmRSS"))?.trim().parse()?;
    Ok(kilobytes * 1024)
}
