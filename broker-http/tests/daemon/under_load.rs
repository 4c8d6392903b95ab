//! SIGTERM under load, in memory: what was acknowledged is pushed, or the report names it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::support::{Daemon, endpoint, header, soon};

/// Publishes until the daemon takes no more; the ids it acknowledged.
pub(crate) async fn publish(daemon: &Daemon, publishers: usize) -> BTreeSet<String> {
    let publishing = (0..publishers).map(|publisher| async move {
        let mut acknowledged = Vec::new();
        for index in 0.. {
            let id = format!("{publisher}-{index}");
            let request = format!("POST /topics/load?id={id}");
            // It may be gone at any moment.
            match tokio::time::timeout(Duration::from_secs(30), daemon.try_send(&request, "x")).await {
                Ok(Ok(202)) => acknowledged.push(id),
                _ => break,
            }
        }
        acknowledged
    });
    futures_util::future::join_all(publishing).await.into_iter().flatten().collect()
}

/// How many of the shutdown's report stayed behind: in flight, and undelivered.
fn stayed(said: &str) -> usize {
    let count = |what: &str| {
        let before = said.split(what).next().filter(|before| before.len() < said.len());
        before.and_then(|before| before.split_whitespace().last()?.parse::<usize>().ok()).unwrap_or(0)
    };
    count(" in flight") + count(" undelivered")
}

async fn drained(drain: &str, slow: bool) -> (Option<i32>, String, BTreeSet<String>, BTreeSet<String>) {
    let (hook, mut told) = endpoint(&[]).await;
    let mut daemon = Daemon::start(&["--drain", drain]).await;
    let mut spec = json!({"filter": "load", "endpoint": format!("http://{hook}/")});
    if slow {
        spec["rate_limit"] = json!(20);
    }
    assert_eq!(daemon.send("PUT /subscriptions/q", &spec.to_string()).await.0, 201);
    let pushed = Arc::new(parking_lot::Mutex::new(BTreeSet::new()));
    let counting = tokio::spawn({
        let pushed = Arc::clone(&pushed);
        async move {
            while let Some(request) = told.recv().await {
                pushed.lock().insert(header(&request, "ce-id").unwrap().to_owned());
            }
        }
    });
    let terminate = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        daemon.signal("-TERM");
    };
    let (acknowledged, ()) = soon(async { tokio::join!(publish(&daemon, 8), terminate) }).await;
    let mut said = String::new();
    soon(daemon.stderr.read_to_string(&mut said)).await.unwrap();
    let code = soon(daemon.child.wait()).await.unwrap().code();
    counting.abort();
    let pushed = pushed.lock().clone();
    (code, said, acknowledged, pushed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_ends_by_itself_has_pushed_all_that_was_acknowledged() {
    let (code, said, acknowledged, pushed) = drained("30s", false).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(acknowledged.len() > 20, "{}", acknowledged.len());
    let missing: Vec<_> = acknowledged.difference(&pushed).take(5).collect();
    assert!(missing.is_empty(), "acknowledged and not pushed: {missing:?}; {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_cut_names_as_many_as_it_lost() {
    let (code, said, acknowledged, pushed) = drained("300ms", true).await;
    assert_eq!(code, Some(3), "{said}");
    let missing = acknowledged.difference(&pushed).count();
    assert!(missing > 0 && said.contains("lost"), "{missing}: {said}");
    // What is settled is not said to be lost; a push whose answer was cut off may be.
    let named = stayed(&said);
    assert!(
        (missing..=missing + 64).contains(&named),
        "{missing} were not pushed, and the report names {named}: {said}"
    );
}
