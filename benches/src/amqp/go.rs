//! Go's clients: small programs in `benches/peers/go`, each built when it is asked for.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use serde::Deserialize;
use tokio::process::Command;

use super::{Scene, bounded};
use crate::Result;
use crate::sample::Sample;

/// A program, built.
#[derive(Debug)]
pub(super) struct Program(PathBuf);

/// What it prints.
#[derive(Deserialize)]
struct Printed {
    messages_per_second: f64,
    cpu_micros: f64,
}

impl Program {
    /// Builds the program `benches/peers/go/NAME`; its modules come from Go's proxy.
    ///
    /// # Errors
    ///
    /// Where there is no Go, and what its compiler says.
    pub(super) async fn build(name: &str) -> Result<Self> {
        build(name).await.map(Self)
    }

    async fn run(&self, arguments: &[String]) -> Result<Sample> {
        let output = Command::new(&self.0).args(arguments).stderr(Stdio::inherit()).output().await?;
        if !output.status.success() {
            return Err(format!("{} ended with {}", self.0.display(), output.status).into());
        }
        let printed: Printed = serde_json::from_slice(&output.stdout)?;
        Ok(Sample { value: printed.messages_per_second, cpu_micros: Some(printed.cpu_micros) })
    }
}

async fn build(name: &str) -> Result<PathBuf> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers/go").join(name);
    // Beside this program, where cargo cleans up.
    let program = std::env::current_exe()?.with_file_name(format!("go-{name}"));
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-o"]).arg(&program).arg(".").current_dir(source);
    let built = go.status().await.map_err(|error| format!("go, which builds {name}: {error}; install Go"))?;
    if !built.success() {
        return Err(format!("go build of {name} ended with {built}").into());
    }
    Ok(program)
}

/// A round.
pub(super) async fn publish(go: Arc<Program>, scene: Arc<Scene>, messages: u64, window: usize) -> Result<Sample> {
    let arguments = [
        format!("{}/%2f", scene.url),
        scene.exchange().to_owned(),
        scene.topic.to_string(),
        messages.to_string(),
        window.to_string(),
        scene.load.payload.to_string(),
        scene.load.is_persistent().to_string(),
    ];
    bounded("publishing from Go", go.run(&arguments)).await
}
