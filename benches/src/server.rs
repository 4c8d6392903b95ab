//! The real server behind a comparison: the one that `KIND_URL` names, or one that the project's own
//! `tests/servers` starts.

use std::path::Path;
use std::process::Command;

use crate::Result;

/// The URL of a server of `kind` (`kafka`, `amqp`), which is started if it does not run. It goes on
/// running, for the next comparison; `tests/servers down` ends it.
///
/// # Errors
///
/// What the script says.
pub async fn url(kind: &'static str) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/servers");
    let up = move || Command::new(script).args(["up", kind]).output();
    let output = tokio::task::spawn_blocking(up).await??;
    if !output.status.success() {
        return Err(format!("tests/servers up {kind}: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    let name = format!("{}_URL=", kind.to_uppercase());
    let printed = String::from_utf8(output.stdout)?;
    let url = printed.lines().find_map(|line| line.strip_prefix(&name));
    url.map(str::to_owned).ok_or_else(|| format!("tests/servers up {kind} printed no {name}…").into())
}
