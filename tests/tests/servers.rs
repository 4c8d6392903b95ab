//! `tests/servers`: what it leaves running holds nothing of whoever called it, and is known by its URL.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::process::{Command, Output};

/// Starts the server, and again with a lock held by the descriptor 8, and says whether it is free afterwards. Who hands on the URL
/// alone is told all that the tests need to control the server.
const RESTART: &str = r#"
printed=$("$1" up "$2")
url=$(sed -n "s/^${2^^}_URL=//p" <<<"$printed")
[ "$(env "${2^^}_URL=$url" "$1" up "$2")" = "$printed" ] || { echo "by its URL: not the same"; exit 1; }
[ "$(env "${2^^}_URL=other:1" "$1" up "$2")" = "${2^^}_URL=other:1" ] || { echo "another's was not used"; exit 1; }
exec 8>"$3"
flock 8
"$1" restart "$url"
exec 8>&-
flock --nonblock "$3" true || { echo "the server holds the lock"; exit 1; }
"#;

fn restart(kind: &str) {
    if std::env::var_os(format!("{}_URL", kind.to_uppercase())).is_some() {
        println!("no control: restart {kind}");
        return;
    }
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("servers");
    let folder = tempfile::tempdir().unwrap();
    let lock = folder.path().join("lock");
    let bash = Command::new("bash").args(["-ec", RESTART, "restart"]).arg(script).arg(kind).arg(lock).output();
    let Output { status, stdout, stderr } = bash.unwrap();
    assert!(status.success(), "{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
}

#[test]
fn rabbitmq_holds_no_lock_of_its_callers() {
    restart("amqp");
}

#[test]
fn kafka_holds_no_lock_of_its_callers() {
    restart("kafka");
}
