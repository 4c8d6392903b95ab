//! What a package installs: the unit as systemd reads it, the configuration, the Containerfile.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{command, run, soon};

fn packaging(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(packaging(name)).unwrap()
}

/// The value of a line of the unit.
fn of_unit(unit: &str, key: &str) -> Vec<String> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned).collect()
}

/// Runs systemd's own checker; where it is missing that is said, not skipped.
fn analyze(args: &[&str]) -> (bool, String) {
    let output = Command::new("systemd-analyze")
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("systemd-analyze: {error}; `apt-get install systemd`, as ./test does"));
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn systemd_reads_the_unit_and_finds_it_hardened() {
    let folder = tempfile::tempdir().unwrap();
    // What it starts and where its manual is are not installed here.
    let unit = read("broker-http.service")
        .replace("/usr/bin/broker-http", env!("CARGO_BIN_EXE_broker-http"))
        .replace("Documentation=man:broker-http(1)\n", "");
    let path = folder.path().join("broker-http.service");
    std::fs::write(&path, &unit).unwrap();
    let path = path.to_str().unwrap();
    let (good, said) = analyze(&["verify", "--man=no", path]);
    // What it says of other units of this machine is none of ours.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("broker-http.service")).collect();
    assert!(good && ours.is_empty(), "{said}");
    // Exposure from 0 to 10, given in tenths: what is left is the network, which it is for.
    let (good, said) = analyze(&["security", "--no-pager", "--offline=true", "--threshold=15", path]);
    assert!(good, "{said}");
    // A directive that is misspelt would be found.
    std::fs::write(path, unit.replace("ProtectHome", "ProtectHouse")).unwrap();
    assert!(analyze(&["verify", "--man=no", path]).1.contains("ProtectHouse"));
}

/// `packaging/try` starts it with them.
#[test]
fn what_only_root_may_read_is_handed_over() {
    let folder = tempfile::tempdir().unwrap();
    let unit = read("broker-http.service")
        .replace("/usr/bin/broker-http", env!("CARGO_BIN_EXE_broker-http"))
        .replace("Documentation=man:broker-http(1)\n", "");
    let path = folder.path().join("broker-http.service");
    std::fs::write(&path, unit).unwrap();
    let dropped = folder.path().join("broker-http.service.d");
    std::fs::create_dir(&dropped).unwrap();
    let credentials = read("credentials.conf");
    let verify = |credentials: &str| {
        std::fs::write(dropped.join("credentials.conf"), credentials).unwrap();
        analyze(&["verify", "--man=no", path.to_str().unwrap()]).1
    };
    let said = verify(&credentials);
    assert!(!said.contains("credentials.conf"), "{said}");
    assert!(verify(&credentials.replace("LoadCredential=", "LoadCredentials=")).contains("LoadCredentials"));
    // What the configuration names is what is handed over.
    let handed = of_unit(&credentials, "LoadCredential");
    assert_eq!(handed.len(), 2);
    for file in handed {
        let (name, from) = file.split_once(':').unwrap();
        assert_eq!(from, format!("/etc/broker-http/{name}"));
        let copy = format!("/run/credentials/broker-http.service/{name}");
        assert!(credentials.contains(&copy) && read("broker.toml").contains(&copy), "{copy}");
    }
    // There or not.
    assert_eq!(of_unit(&read("broker-http.service"), "EnvironmentFile"), ["-/etc/broker-http/environment"]);
}

#[tokio::test]
async fn what_the_unit_starts_is_a_command_with_a_good_configuration() {
    let (code, said) = run(&["check-config", "--config", packaging("broker.toml").to_str().unwrap()]).await;
    assert_eq!(code, Some(0), "{said}");
    let start = of_unit(&read("broker-http.service"), "ExecStart").remove(0);
    let (program, args) = start.split_once(' ').unwrap();
    assert_eq!(program, "/usr/bin/broker-http");
    checks(args.split(' ')).await;
}

/// Whether these arguments would serve with the packaged configuration.
async fn checks(args: impl Iterator<Item = &str>) {
    let config = packaging("broker.toml");
    let args: Vec<_> = args
        .map(|arg| match arg {
            "serve" => "check-config",
            "/etc/broker-http/broker.toml" => config.to_str().unwrap(),
            other => other,
        })
        .collect();
    let (code, said) = run(&args).await;
    assert_eq!(code, Some(0), "{args:?}: {said}");
}

/// `packaging/try` builds it and runs the image, which takes minutes: here what it says is compared with what it is about.
#[tokio::test]
async fn the_containerfile_builds_what_there_is() {
    let text = read("Containerfile");
    let of = |instruction: &str| -> Vec<&str> {
        text.lines().filter_map(|line| line.strip_prefix(instruction)?.strip_prefix(' ')).collect()
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let manifest: toml::Table = std::fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let rust = manifest["workspace"]["package"]["rust-version"].as_str().unwrap();
    let [build, last] = of("FROM")[..] else { panic!("two stages: {text}") };
    assert!(build.starts_with(&format!("rust:{rust}-")) && build.ends_with(" AS build"), "{build}");
    assert_eq!(last, "scratch");

    let cargo = of("RUN").into_iter().find(|run| run.starts_with("cargo build ")).unwrap();
    let words: Vec<_> = cargo.split(' ').collect();
    let after = |word: &str| words[words.iter().position(|have| *have == word).unwrap() + 1];
    let profile = after("--profile");
    assert!(manifest["profile"].get(profile).is_some(), "{cargo}");
    // Package, features and lock file are as cargo has them.
    let args = ["tree", "--offline", "--locked", "-p", after("-p"), "--features", after("--features"), "--depth", "0"];
    let tree = Command::new(env!("CARGO")).args(args).current_dir(&root).output().unwrap();
    assert!(tree.status.success(), "{cargo}: {}", String::from_utf8_lossy(&tree.stderr));

    // What is copied is what was built, and what is started is what was copied.
    let binary = format!("cp target/{profile}/{} /image/usr/bin/", after("-p"));
    assert!(text.contains(&binary) && of("COPY").contains(&"--from=build /image/ /"), "{text}");
    assert_eq!(of("WORKDIR"), ["/src"]);
    assert!(of("COPY").contains(&". ."), "{text}");
    assert_eq!(of("ENTRYPOINT"), ["[\"/usr/bin/broker-http\"]"]);
    let command: Vec<String> = serde_json::from_str(of("CMD")[0]).unwrap();
    checks(command.iter().map(String::as_str)).await;
    // Nobody in particular, and not root; by number, since the image has no names.
    let user = of("USER")[0];
    assert!(user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id >= 1000)), "{user}");
    for setting in of("ENV") {
        let (name, value) = setting.split_once('=').unwrap();
        let (_, settings) = run(&["settings"]).await;
        assert!(settings.contains(&format!("`{name}`")), "{setting}");
        assert!(value.ends_with(of("EXPOSE")[0]), "{setting}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn systemd_is_told_when_it_is_ready_when_it_reloads_and_when_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let mut child = command(&["--listen", "127.0.0.1:0"]).env("NOTIFY_SOCKET", &path).spawn().unwrap();
    let hears = async || {
        let mut told = [0; 128];
        let length = soon(socket.recv(&mut told)).await.unwrap();
        String::from_utf8(told[..length].to_vec()).unwrap()
    };
    let pid = child.id().unwrap().to_string();
    let signal = |signal: &str| assert!(Command::new("kill").args([signal, pid.as_str()]).status().unwrap().success());
    assert_eq!(hears().await, "READY=1");
    signal("-HUP");
    let told = hears().await;
    let since = told.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap_or_else(|| panic!("{told}"));
    assert!(since.parse::<u64>().unwrap() > 0, "{told}");
    assert_eq!(hears().await, "READY=1");
    signal("-TERM");
    assert_eq!(hears().await, "STOPPING=1");
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
}
