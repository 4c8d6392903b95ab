//! Ways for fuzzing to what the server decodes of a request's body, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use std::time::Duration;

use broker_core::Settlement;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Request, Uri, header};
use serde_json::Value;

use super::body::read_json;
use super::frames::{Frames, Heard};
use super::idempotency::{Fingerprint, Key};
use super::inflate::{Encoding, Inflating, inflate};
use super::leases::LeaseId;
use super::memory::Ledger;
use super::pull::{MAX_HOLD, MAX_PULL, MAX_WAIT, Plan, Settlements, Wanted};
use super::socket::Told;
use super::state::{Kept, Writer, parse};
use super::stream::last_seen;
use super::subscriptions::Redrive;
use super::upgrade::Upgrade;
use super::{acceptable, codings, item};
use crate::event::{LINES_TYPE, percent};

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

/// A compressed body: what comes of it is bounded, counted, and the same whatever pieces it arrives in. The first byte says
/// how it is compressed and how much memory there is, the second how it is cut.
pub fn body(input: &[u8]) {
    const LIMIT: usize = 1 << 20;
    let Some(([kind, size], packed)) = input.split_first_chunk() else { return };
    let encoding = if kind & 1 == 0 { Encoding::Gzip } else { Encoding::Zstd };
    let room = if kind & 2 == 0 { u64::MAX } else { 512 << 10 };
    let ledger = Ledger::new(room, room);
    let mut reservation = ledger.room();
    if reservation.grow(packed.len() as u64).is_err() {
        return;
    }
    let whole = inflate(encoding, Bytes::copy_from_slice(packed), LIMIT, reservation);
    let whole = whole.now_or_never().expect("one that is small is inflated at once");
    let whole = match whole {
        Ok((inflated, reservation)) => {
            assert!(inflated.len() <= LIMIT && inflated.len() as u64 <= room);
            assert_eq!((reservation.bytes(), ledger.held()), (inflated.len() as u64, inflated.len() as u64));
            Some(inflated)
        }
        Err(problem) => {
            assert!(matches!(problem.status().as_u16(), 400 | 413 | 503), "{problem:?}");
            // With memory enough it may be good.
            if room < u64::MAX && problem.status() != 400 {
                return;
            }
            None
        }
    };
    assert_eq!(ledger.held(), 0);
    assert_eq!(in_pieces(encoding, packed, usize::from(*size) + 1, LIMIT), whole);
}

/// What comes of a body that arrives in pieces of so many bytes, unless it is broken or more than `limit`.
fn in_pieces(encoding: Encoding, packed: &[u8], size: usize, limit: usize) -> Option<Bytes> {
    let mut inflating = Inflating::new(encoding);
    let mut inflated = Vec::new();
    for arrived in packed.chunks(size) {
        inflating.feed(Bytes::copy_from_slice(arrived));
        while let Some(piece) = inflating.next() {
            let piece = piece.ok()?;
            // A kibibyte of gzip is a mebibyte at most, and a block of zstd is less.
            assert!(piece.len() <= 2 << 20);
            inflated.extend_from_slice(&piece);
            if inflated.len() > limit {
                return None;
            }
        }
    }
    inflated.extend_from_slice(&inflating.finish().ok()?);
    (inflated.len() <= limit).then(|| inflated.into())
}

/// The headers of a request, as far as somebody reads more of them than a name.
pub fn request_headers(query: Option<&str>, headers: &HeaderMap) {
    let refused = |problem: super::problem::Problem, allowed: &[u16]| {
        assert!(allowed.contains(&problem.status().as_u16()), "{problem:?}");
    };
    let of = |headers: &HeaderMap| Key::of(headers, "orders.created", None);
    match of(headers) {
        Ok(key) => {
            assert_eq!(key.is_some(), headers.contains_key("idempotency-key"));
            if let Some(value) = headers.get("idempotency-key") {
                // In quotes it is the same key.
                let text = value.to_str().ok().and_then(item::read).expect("it was read");
                let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
                let mut again = HeaderMap::new();
                again.insert("idempotency-key", quoted.parse().expect("visible ASCII"));
                assert!(of(&again).is_ok_and(|again| again == key), "{quoted}");
            }
        }
        Err(problem) => refused(problem, &[400]),
    }
    assert_eq!(Fingerprint::of(query, headers, b"x"), Fingerprint::of(query, &headers.clone(), b"x"));
    for media_type in [LINES_TYPE, "text/event-stream"] {
        assert!(!(acceptable::names(headers, media_type) && acceptable::refuses(headers, media_type)), "{media_type}");
    }
    if let Some(id) = headers.get("last-event-id").and_then(last_seen) {
        // What a reader was given it brings back, and names the same.
        let given = percent::encode_field(&id.to_string()).into_owned();
        let given = HeaderValue::from_bytes(given.as_bytes()).expect("an id has no control characters");
        assert_eq!(last_seen(&given), Some(id));
    }
    match Encoding::of(headers) {
        Ok(encoding) => assert!(encoding.is_none() || headers.contains_key(header::CONTENT_ENCODING)),
        Err(problem) => refused(problem, &[415]),
    }
    codings::check(headers).unwrap_or_else(|problem| refused(problem, &[400, 501]));
    let mut request = Request::new(());
    *request.headers_mut() = headers.clone();
    match Upgrade::of(&mut request.into_parts().0) {
        Ok(upgrade) => assert!(upgrade.is_none(), "there is no connection to take over"),
        Err(problem) => refused(problem, &[400]),
    }
}
