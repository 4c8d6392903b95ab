//! Ways for fuzzing to what the client decodes of the daemon's answers, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use std::fmt::Debug;
use std::time::Duration;

use broker_core::{Error, ErrorKind, Failure, Receipt, Settlement, Topic};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::able::{MAX_IN_FLIGHT, Ready};
use super::error::refused;
use super::keeping::Body;
use super::lane::Unsettled;
use super::wire::{Accepted, Dead, Letter, Outcome, Page, Pulled, Purged, Redriven, Results, Settled, View, read};
use crate::event::{Options, json};
use crate::retry_after::MAX_RETRY_AFTER;
use crate::server::problem::Problem;
use crate::server::publish::write_receipt;
use crate::server::pull::Settlements;

/// An answer to any of the client's requests.
pub fn daemon_answer(status: StatusCode, headers: &HeaderMap, body: &[u8]) {
    error(refused(status, headers, body));
    if let Some(accepted) = expected::<Accepted>(body) {
        receipt(accepted.into_receipt());
    }
    if let Some(Results { results }) = expected(body) {
        results.into_iter().map(Outcome::into_result).for_each(receipt);
    }
    if let Some(pulled) = expected(body) {
        leases(pulled);
    }
    if let Some(view) = expected::<View>(body) {
        settings(&view);
    }
    if let Some(page) = expected::<Page>(body) {
        page.subscriptions.iter().for_each(settings);
    }
    if let Some(Dead { dead }) = expected(body) {
        for letter in dead.into_iter().map(Letter::into_dead_letter) {
            letter.map_or_else(error, drop);
        }
    }
    if let Some(ready) = expected::<Ready>(body) {
        assert!(ready.capabilities().max_in_flight <= MAX_IN_FLIGHT);
    }
    expected::<Settled>(body);
    expected::<Purged>(body);
    expected::<Redriven>(body);
}

fn expected<'a, T: Deserialize<'a> + Debug>(body: &'a [u8]) -> Option<T> {
    read("x", body).inspect_err(|error| assert_eq!(error.kind(), ErrorKind::Backend)).ok()
}

/// Words and waits from outside are bounded; a daemon says an error so that it is read the same.
fn error(error: Error) {
    assert_ne!(error.kind(), ErrorKind::Closed, "it is the daemon that is closing");
    assert!(error.retry_after() <= Some(MAX_RETRY_AFTER));
    assert!(error.message().len() <= 1_024 && !error.message().contains(char::is_control), "{error:?}");
    let problem = Problem::from(error.clone());
    let json = serde_json::to_vec(&problem).expect("numbers and text");
    let again = refused(problem.status(), &HeaderMap::new(), &json);
    assert_eq!((again.kind(), again.message()), (error.kind(), error.message()));
}

/// A receipt that a daemon writes is read the same.
fn receipt(read_one: Result<Receipt, Error>) {
    let receipt = match read_one {
        Ok(receipt) => receipt,
        Err(refused) => return error(refused),
    };
    let topic = Topic::new("orders.created").expect("a topic");
    let mut json = Vec::new();
    write_receipt(&mut json, &topic, &receipt);
    let again = read::<Accepted>("x", &json).and_then(Accepted::into_receipt);
    assert_eq!(again.expect("our own JSON"), receipt);
}

/// Leases are named to the daemon as it named them, however odd.
fn leases(Pulled { deliveries, .. }: Pulled<'_>) {
    let mut unsettled = Vec::new();
    for (index, leased) in deliveries.into_iter().enumerate() {
        let _ = json::decode(leased.event.get().as_bytes(), &Options::default(), None);
        let settlement = match index % 4 {
            0 => Settlement::Ack,
            1 => Settlement::Release,
            2 => {
                let after = Some(Duration::from_nanos(u64::from(leased.attempt)));
                Settlement::Retry { after, failure: Some(Failure::new("busy").with_status("503")) }
            }
            _ => Settlement::Reject(Failure::new("no")),
        };
        unsettled.push(Unsettled { lease: leased.lease, settlement, ticket: None });
    }
    let json = serde_json::to_vec(&Body::of(&unsettled)).expect("text");
    let settlements: Settlements = crate::server::body::read_json(&json).expect("our own JSON").expect("a body");
    let plan = settlements.plan().expect("our own settlements");
    assert_eq!(plan.settle.len(), unsettled.len());
    for (lease, planned) in plan.settle {
        let same = |sent: &&Unsettled| *sent.lease == *lease && means(&sent.settlement, &planned);
        assert!(unsettled.iter().any(|sent| same(&sent)), "{lease}: {planned:?}");
    }
}

/// Whether what arrived is what was sent: a wait in whole milliseconds, no shorter.
fn means(sent: &Settlement, arrived: &Settlement) -> bool {
    match (sent, arrived) {
        (Settlement::Retry { after: Some(sent), failure }, Settlement::Retry { after: Some(after), failure: told }) => {
            failure == told && (*sent..*sent + Duration::from_millis(1)).contains(after)
        }
        (sent, arrived) => sent == arrived,
    }
}

/// A group's settings, of a subscription.
fn settings(view: &View) {
    match view.settings() {
        Ok(_) => assert!(!view.group_name().is_empty()),
        Err(refused) => assert_eq!(refused.kind(), ErrorKind::Invalid),
    }
}
