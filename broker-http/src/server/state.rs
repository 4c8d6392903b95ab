//! `--state FILE`: the subscriptions, kept over a restart.
//!
//! The whole file is written anew, beside the old one, and takes its place only when it is safe on
//! disk: at every moment one complete file stands there. It may hold secrets, so that only its
//! owner may read it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use broker_core::{Error, GroupName, Result};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::consent::Permission;
use crate::SubscriptionSpec;

/// Bytes of a file that are read; no server keeps as many subscriptions.
const MAX_BYTES: u64 = 1 << 30;

/// The file's content. [`Writer`] writes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<'a> {
    version: u32,
    /// Each is read by itself, so that all that is wrong is told at once.
    #[serde(borrow)]
    subscriptions: Vec<&'a RawValue>,
}

/// Subscriptions that are no good and are told of by name.
const MAX_TOLD: usize = 10;

/// One subscription as it is kept.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    pub(crate) name: GroupName,
    pub(crate) spec: SubscriptionSpec,
    /// Whether it was paused.
    #[serde(default)]
    pub(crate) paused: bool,
    /// Whether its endpoint said that it is gone for good.
    #[serde(default)]
    pub(crate) disabled: bool,
    /// Whether it was there because the operator declared it: no longer declared, it goes.
    #[serde(default)]
    pub(crate) declared: bool,
    /// The identity that had it made, or changed it last; it is the operator's if there was none.
    #[serde(default)]
    pub(crate) owner: Option<GroupName>,
    /// Its endpoint's consent to pushes, if it was asked.
    #[serde(default)]
    pub(crate) consent: Option<Permission>,
}

/// Puts the file's text together: one subscription a line, each written out only once in its life,
/// so that a change among many costs copying and no more.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new() -> Self {
        Self(br#"{"version":1,"subscriptions":["#.to_vec())
    }

    /// Adds a subscription; `spec` is its JSON.
    pub(crate) fn push(
        &mut self,
        name: &GroupName,
        [paused, disabled, declared]: [bool; 3],
        owner: Option<&GroupName>,
        consent: Option<&Permission>,
        spec: &str,
    ) {
        let comma = if self.0.ends_with(b"[") { "" } else { "," };
        let paused = if paused { r#""paused":true,"# } else { "" };
        let disabled = if disabled { r#""disabled":true,"# } else { "" };
        let declared = if declared { r#""declared":true,"# } else { "" };
        let owner = owner.map(|owner| format!(r#""owner":"{owner}","#)).unwrap_or_default();
        let consent = consent.and_then(|consent| serde_json::to_string(consent).ok());
        let consent = consent.map(|consent| format!(r#""consent":{consent},"#)).unwrap_or_default();
        // A name's grammar needs no escaping; writing to a vector cannot fail.
        let states = format!("{paused}{disabled}{declared}{owner}{consent}");
        let _ = write!(self.0, "{comma}\n{{\"name\":\"{name}\",{states}\"spec\":{spec}}}");
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(b"\n]}\n");
        self.0
    }
}

/// Where the subscriptions are kept.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// What was last written, by the number of the change.
    written: tokio::sync::Mutex<u64>,
}

impl StateFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, written: tokio::sync::Mutex::new(0) }
    }

    /// Reads the file; one that is not there yet has no subscription.
    ///
    /// # Errors
    ///
    /// That it cannot be read, or is none of ours; it is never overwritten then.
    pub(crate) async fn load(&self) -> Result<Vec<Kept>> {
        let path = self.path.clone();
        blocking(move || read(&path)).await
    }

    /// Writes what `snapshot` tells, unless change number `change` is written already: many changes
    /// at once are one write.
    pub(crate) async fn save(&self, change: u64, snapshot: impl FnOnce() -> (u64, Vec<u8>)) -> Result<()> {
        let mut written = self.written.lock().await;
        if *written >= change {
            return Ok(());
        }
        let (change, text) = snapshot();
        let path = self.path.clone();
        blocking(move || {
            write(&path, &text).map_err(|error| {
                Error::unavailable(format!("state file {}: it cannot be written: {error}", path.display()))
            })
        })
        .await?;
        *written = change;
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Error::closed("the runtime is shutting down")))
}

fn read(path: &Path) -> Result<Vec<Kept>> {
    let fails = |why: &dyn std::fmt::Display| {
        Error::invalid(format!(
            "state file {}: {why}; repair it (each subscription is a line), or move it away to begin without subscriptions",
            path.display()
        ))
    };
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        metadata => metadata.map_err(|error| fails(&error))?,
    };
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(fails(&"it is no file of a server's subscriptions"));
    }
    let text = std::fs::read(path).map_err(|error| fails(&error))?;
    parse(&text).map_err(|why| fails(&why))
}

/// The subscriptions of a file's text; what is wrong with it otherwise, of every subscription that is no good.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Kept>, String> {
    let saved: Saved<'_> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if saved.version != 1 {
        return Err(format!("version {} is unknown, 1 is expected", saved.version));
    }
    let (mut kept, mut wrong) = (Vec::with_capacity(saved.subscriptions.len()), Vec::new());
    for (index, json) in saved.subscriptions.into_iter().enumerate() {
        match read_one(json) {
            Ok(one) => kept.push(one),
            Err(why) => wrong.push(format!("{}: {why}", called(index, json))),
        }
    }
    if wrong.is_empty() {
        return Ok(kept);
    }
    let more = wrong.len().saturating_sub(MAX_TOLD);
    wrong.truncate(MAX_TOLD);
    let more = if more > 0 { format!("; and {more} more are no good") } else { String::new() };
    Err(format!("{}{more}", wrong.join("; ")))
}

/// One of them; what is wrong with it otherwise, by its field. It may have been good when it was kept, by the rules of
/// then.
fn read_one(json: &RawValue) -> Result<Kept, String> {
    let mut reader = serde_json::Deserializer::from_str(json.get());
    let kept: Kept = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let why = error.inner().to_string();
        // Where in its own text, which is not where in the file.
        let why = why.rsplit_once(" at line ").map_or(why.as_str(), |(why, _)| why);
        format!("{}: {why}", error.path())
    })?;
    kept.spec.check().map_err(|error| format!("spec.{}", error.message()))?;
    Ok(kept)
}

fn called(index: usize, json: &RawValue) -> String {
    #[derive(Deserialize)]
    struct Named {
        name: GroupName,
    }
    let named = serde_json::from_str::<Named>(json.get());
    named.map_or_else(|_| format!("subscription number {}", index + 1), |Named { name }| format!("subscription {name}"))
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    let mut file = private(&beside)?;
    file.write_all(text)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&beside, path)?;
    // The rename itself is on disk once its folder is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// A new, empty file that only its owner may read.
fn private(path: &Path) -> io::Result<File> {
    // One left by a crash may have other permissions.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(name: &str) -> Kept {
        let json = format!(
            r#"{{"name":"{name}","spec":{{"filter":"orders.>","endpoint":"http://127.0.0.1:1/","signing":{{"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}}}},"paused":true,"owner":"billing","consent":{{"origin":"broker.example","rate":2.5}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn text(kept: &[Kept]) -> Vec<u8> {
        let mut writer = Writer::new();
        for Kept { name, spec, paused, disabled, declared, owner, consent } in kept {
            let spec = serde_json::to_string(spec).unwrap();
            writer.push(name, [*paused, *disabled, *declared], owner.as_ref(), consent.as_ref(), &spec);
        }
        writer.finish()
    }

    #[tokio::test]
    async fn what_was_saved_is_loaded_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        let state = StateFile::new(path.clone());
        assert!(state.load().await.unwrap().is_empty());
        state.save(1, || (3, text(&[kept("a"), kept("b")]))).await.unwrap();
        assert_eq!(StateFile::new(path.clone()).load().await.unwrap(), [kept("a"), kept("b")]);
        // Written already as part of change 3.
        state.save(2, || unreachable!()).await.unwrap();
        #[cfg(unix)]
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions()) & 0o777,
            0o600
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_broken_file_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        for (text, named) in [
            ("", "EOF"),
            ("{\"version\":2,\"subscriptions\":[]}", "version 2"),
            (
                "{\"version\":1,\"subscriptions\":[{\"name\":\"a\",\"spec\":{\"filter\":\"a..b\"}}]}",
                "subscription a: spec.filter: ",
            ),
            (
                "{\"version\":1,\"subscriptions\":[{\"name\":\"a\",\"spec\":{\"filter\":\"a\",\"timeout\":\"0s\"}}]}",
                "subscription a: spec.timeout: ",
            ),
            ("{\"version\":1,\"subscriptions\":[{\"name\":\"a b\"}]}", "subscription number 1: name: "),
            ("{\"version\":1,\"subscriptions\":[]}x", "trailing"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = StateFile::new(path.clone()).load().await.unwrap_err();
            assert!(error.message().contains(named) && error.message().contains("state.json"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    /// A daemon that is newer than its file has rules that the file was written without.
    #[test]
    fn all_that_is_no_good_any_more_is_told_at_once() {
        let one =
            |name: &str, headers: &str| format!(r#"{{"name":"{name}","spec":{{"filter":"a","headers":{headers}}}}}"#);
        let file = |all: &[String]| format!(r#"{{"version":1,"subscriptions":[{}]}}"#, all.join(",\n"));
        let (bad, twice) = (r#"{"x-key":"Bearer é"}"#, r#"{"X-Key":"s3cret","x-key":"s3cret"}"#);
        let why = parse(file(&[one("a", bad), one("b", "{}"), one("c", twice)]).as_bytes()).unwrap_err();
        assert!(why.starts_with("subscription a: spec.headers.x-key: ") && !why.contains("at line"), "{why}");
        assert!(why.contains("; subscription c: spec.headers.") && !why.contains("subscription b"), "{why}");
        assert!(!why.contains("s3cret") && !why.contains("Bearer"), "{why}");
        let many: Vec<_> = (0..25).map(|number| one(&format!("s{number}"), bad)).collect();
        let why = parse(file(&many).as_bytes()).unwrap_err();
        assert!(why.ends_with("; and 15 more are no good") && why.matches("x-key").count() == 10, "{why}");
    }

    #[tokio::test]
    async fn a_folder_that_is_not_there_is_an_error() {
        let state = StateFile::new("/nowhere-at-all/state.json".into());
        let error = state.save(1, || (1, text(&[]))).await.unwrap_err();
        assert_eq!(error.kind(), broker_core::ErrorKind::Unavailable);
    }
}
