//! Ways for fuzzing to what the server decodes of a request's body, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use std::time::Duration;

use broker_core::Settlement;
use http::Uri;
use serde_json::Value;

use super::body::read_json;
use super::frames::{Frames, Heard};
use super::leases::LeaseId;
use super::pull::{MAX_HOLD, MAX_PULL, MAX_WAIT, Plan, Settlements, Wanted};
use super::socket::Told;
use super::state::{Kept, Writer, parse};
use super::subscriptions::Redrive;

/// The body of `/settle`: every lease that is named is planned for once, in the order of the fields and
/// their entries, and no wait is beyond its bound.
pub fn settlements(body: &[u8]) {
    if let Ok(Some(settlements)) = read_json::<Settlements>(body) {
        planned(settlements, body);
    }
}

/// A frame of a WebSocket: what is settled there is what the same body settles.
pub fn frame(frame: &[u8]) {
    let told = Told::read(frame);
    let object = frame.trim_ascii_start().first() == Some(&b'{');
    let same = object.then(|| read_json::<Settlements>(frame));
    match told {
        Ok(Told::Settlements(settlements)) => {
            assert!(matches!(same, Some(Ok(Some(_)))), "a body of the same bytes is refused");
            planned(settlements, frame);
        }
        Ok(Told::Credit(credit)) => {
            let json: Value = serde_json::from_slice(frame).expect("what was read is JSON");
            assert_eq!(json["credit"], credit);
        }
        Err(problem) => {
            assert_eq!(problem.status(), 400);
            assert!(!matches!(same, Some(Ok(Some(_)))), "a body of the same bytes is taken");
        }
    }
}

fn planned(settlements: Settlements, json: &[u8]) {
    let plan = match settlements.plan() {
        Ok(plan) => plan,
        Err(problem) => return assert_eq!(problem.status(), 400),
    };
    let json: Value = serde_json::from_slice(json).expect("what was read is JSON");
    let named = |field: &str| -> Vec<String> {
        let entries = json.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
        let lease = |entry: &Value| entry.get("lease").unwrap_or(entry).as_str().map(str::to_owned);
        entries.iter().filter_map(lease).collect()
    };
    let Plan { settle, extend } = plan;
    let ends: Vec<_> = ["ack", "release", "retry", "reject"].into_iter().flat_map(named).collect();
    assert!(settle.iter().map(|(lease, _)| lease).eq(&ends));
    assert!(extend.iter().map(|(lease, _)| lease).eq(&named("extend")));
    for (lease, settlement) in &settle {
        if let Settlement::Retry { after, .. } = settlement {
            assert!(*after <= Some(MAX_HOLD));
        }
        // A lease has one name.
        if let Ok(id) = lease.parse::<LeaseId>() {
            assert_eq!(id.to_string(), *lease);
        }
    }
    assert!(extend.iter().all(|(_, hold)| (Duration::from_nanos(1)..=MAX_HOLD).contains(hold)));
}

/// What a connection of HTTP/2 reads and writes, cut anyhow: the followers of its frames see what they see of it in one
/// piece, and of what is read it is known at each cut whether something is begun. The first bytes say how it is cut.
pub fn connection(input: &[u8]) {
    let Some(([given, count], rest)) = input.split_first_chunk() else { return };
    let (cuts, bytes) = rest.split_at(rest.len().min(usize::from(count % 16)));
    let mut pieces = Vec::new();
    let (mut uncut, mut sizes) = (bytes, cuts.iter().cycle());
    while !uncut.is_empty() {
        let size = sizes.next().map_or(uncut.len(), |size| usize::from(*size) + 1);
        let (piece, later) = uncut.split_at(size.min(uncut.len()));
        pieces.push(piece);
        uncut = later;
    }
    let written = |pieces: &[&[u8]]| {
        let (mut frames, mut seen) = (Frames::default(), Vec::new());
        pieces.iter().for_each(|piece| frames.written(piece, usize::from(*given), |refusal| seen.push(refusal)));
        (seen, frames.asked())
    };
    assert_eq!(written(&pieces), written(&[bytes]));
    let (mut heard, mut read) = (Heard::default(), 0);
    let mut whole = Heard::default();
    whole.read(bytes);
    for piece in pieces {
        heard.read(piece);
        read += piece.len();
        let so_far = bytes.get(..read).expect("it is a part of all");
        assert_eq!(heard.has_begun(), has_begun(so_far), "after {read} bytes");
    }
    assert_eq!(heard.said(), whole.said());
}

/// Read frame by frame: whether the last of them, a head, or what a connection begins with, is not whole.
fn has_begun(bytes: &[u8]) -> bool {
    const PREFACE: usize = 24;
    let Some(mut frames) = bytes.get(PREFACE..) else { return !bytes.is_empty() };
    let mut open = false;
    while let Some(([l0, l1, l2, kind, flags, _, _, _, _], rest)) = frames.split_first_chunk() {
        // HEADERS and CONTINUATION, with END_HEADERS or without.
        if matches!(kind, 1 | 9) {
            open = flags & 4 == 0;
        }
        let Some(next) = rest.get(u32::from_be_bytes([0, *l0, *l1, *l2]) as usize..) else { return true };
        frames = next;
    }
    open || !frames.is_empty()
}

/// The query of `/pull`.
pub fn pull(query: &str) {
    let Ok(uri) = format!("/subscriptions/a/pull?{query}").parse::<Uri>() else { return };
    let wanted = match Wanted::read(&uri) {
        Ok(wanted) => wanted,
        Err(problem) => return assert_eq!(problem.status(), 400),
    };
    assert!((1..=MAX_PULL).contains(&wanted.max) && wanted.wait <= MAX_WAIT);
    let again = format!("/x/a?max={}&wait={}", wanted.max, broker_core::format_duration(wanted.wait));
    assert_eq!(Wanted::read(&again.parse().expect("a path")).expect("our own query"), wanted);
}

/// The body of `/redrive`.
pub fn redrive(body: &[u8]) {
    let Ok(redrive) = Redrive::read(body) else { return };
    match redrive.bounds() {
        Ok((max, rate)) => assert!(max > 0 && rate.is_none_or(|rate| (0.001..=1e6).contains(&rate))),
        Err(problem) => assert_eq!(problem.status(), 400),
    }
}

/// The file that keeps the subscriptions: what was taken is written so that it is read the same.
pub fn state(text: &[u8]) {
    let Ok(kept) = parse(text) else { return };
    let mut writer = Writer::new();
    for Kept { name, spec, paused, disabled, declared, owner, consent } in &kept {
        let spec = serde_json::to_string(spec).expect("settings are JSON");
        writer.push(name, [*paused, *disabled, *declared], owner.as_ref(), consent.as_ref(), &spec);
    }
    assert_eq!(parse(&writer.finish()).expect("our own file"), kept);
}
