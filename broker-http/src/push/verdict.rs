//! What an answer of the endpoint means: for the message, and for the endpoint.
//!
//! One table, row by row; no time, no socket. The message is acked, retried, dead-lettered or kept;
//! apart from that the endpoint is seen to be well, failing, overloaded or gone, which moves its
//! window and its breaker.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime};

use broker_core::{Failure, RetryPolicy, Settlement};
use http::HeaderMap;
use serde::Deserialize;

use crate::StatusVerdict;
use crate::retry_after::retry_after;

/// Letters of a reason that are kept.
const MAX_REASON: usize = 300;

/// What came of one request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The endpoint answered, wholly or with more than we read.
    Answer(Answer),
    /// No whole answer in time.
    TimedOut(Duration),
    /// No connection, or one that broke before the whole answer was there; the reason.
    Failed(String),
}

/// An answer, as far as it matters.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// The HTTP status.
    pub(crate) status: u16,
    /// Its headers.
    pub(crate) headers: HeaderMap,
    /// The body, cut where we stop reading.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    fn retry_after(&self, now: fn() -> SystemTime) -> Option<Duration> {
        retry_after(&self.headers, now)
    }
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decision {
    /// Done.
    Ack,
    /// Push it again: after the usual backoff, or at its slow end, and no sooner than the floor.
    Retry { slow: bool, floor: Option<Duration> },
    /// Dead-letter it at once.
    Reject,
    /// Neither: it stays for the time the subscription is enabled again.
    Keep,
}

impl Decision {
    const RETRY: Self = Self::Retry { slow: false, floor: None };
}

/// How the endpoint is seen to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// It answers, whatever it thinks of the message.
    Well,
    /// It fails: counts towards the breaker.
    Failing,
    /// It fails because there is too much: halves the window, and counts towards the breaker.
    Overloaded,
    /// It is gone for good: disables the subscription.
    Gone,
}

/// What an outcome means.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) decision: Decision,
    pub(crate) health: Health,
    /// The HTTP status, if there was an answer.
    pub(crate) status: Option<u16>,
    /// Why, unless it is an ack.
    pub(crate) reason: Cow<'static, str>,
}

impl Verdict {
    /// Whether the body of a success asks for it, and so means all that it answers.
    pub(crate) fn is_asked_for(&self) -> bool {
        self.status.is_some_and(|status| (200..300).contains(&status))
    }
}

/// The table. `now` is asked for a `Retry-After` that is a date.
pub(crate) fn judge(outcome: &Outcome, own: &BTreeMap<u16, StatusVerdict>, now: fn() -> SystemTime) -> Verdict {
    let answer = match outcome {
        Outcome::Answer(answer) => answer,
        Outcome::TimedOut(limit) => {
            let reason = format!("timed out after {}", broker_core::format_duration(*limit));
            return Verdict {
                decision: Decision::RETRY,
                health: Health::Overloaded,
                status: None,
                reason: reason.into(),
            };
        }
        Outcome::Failed(reason) => {
            return Verdict {
                decision: Decision::RETRY,
                health: Health::Failing,
                status: None,
                // A certificate's names, for one, are the endpoint's to choose.
                reason: reason.chars().take(MAX_REASON).collect::<String>().into(),
            };
        }
    };
    let status = answer.status;
    let (decision, health) = match own.get(&status) {
        Some(StatusVerdict::Ack) => (Decision::Ack, Health::Well),
        Some(StatusVerdict::Reject) => (Decision::Reject, Health::Well),
        Some(StatusVerdict::Retry) => (retry(answer, false, now), failing(status)),
        None => match status {
            200 => match Asked::read(&answer.body) {
                Some(Asked::Retry) => (retry(answer, false, now), Health::Well),
                Some(Asked::Drop) => (Decision::Reject, Health::Well),
                None => (Decision::Ack, Health::Well),
            },
            201..=299 => (Decision::Ack, Health::Well),
            400 | 413 | 415 | 422 => (Decision::Reject, Health::Well),
            410 => (Decision::Keep, Health::Gone),
            401 | 403 | 404 => (retry(answer, true, now), Health::Failing),
            _ => (retry(answer, false, now), failing(status)),
        },
    };
    let reason = match (&decision, status) {
        (Decision::Ack, _) => Cow::Borrowed(""),
        (Decision::Reject, 200) => "the endpoint answered 200 with status DROP".into(),
        (_, 200) => "the endpoint answered 200 with status RETRY".into(),
        (_, 300..=399) => format!("the endpoint answered {status}; redirects are not followed").into(),
        _ => format!("the endpoint answered {status}").into(),
    };
    Verdict { decision, health, status: Some(status), reason }
}

fn failing(status: u16) -> Health {
    if matches!(status, 429 | 503) { Health::Overloaded } else { Health::Failing }
}

fn retry(answer: &Answer, slow: bool, now: fn() -> SystemTime) -> Decision {
    Decision::Retry { slow, floor: answer.retry_after(now) }
}

/// What the body of a 200 may ask for instead of the ack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Retry,
    Drop,
}

impl Asked {
    fn word(word: &str) -> Option<Self> {
        match word {
            "RETRY" => Some(Self::Retry),
            "DROP" => Some(Self::Drop),
            _ => None,
        }
    }

    /// `{"status": "RETRY"}` or `{"status": "DROP"}`; anything else asks for nothing.
    fn read(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Body<'a> {
            #[serde(borrow)]
            status: Cow<'a, str>,
        }
        if !looks_like_an_object(body) {
            return None;
        }
        serde_json::from_slice::<Body<'_>>(body).ok().and_then(|body| Self::word(&body.status))
    }
}

/// Most bodies are empty or prose: not worth a parser.
fn looks_like_an_object(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

/// A batch's verdict for one of its messages, where the answer speaks of them one by one.
#[derive(Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) decision: Decision,
    pub(crate) reason: &'static str,
}

/// What an answer of success says of each message of a batch, in the order of `ids`:
/// `{"statuses": [{"id": "…", "status": "SUCCESS|RETRY|DROP"}]}`. `None` if it says nothing of
/// them, so that the verdict for the whole holds.
///
/// Of an id that is there several times (events are told apart by source and id, `CloudEvents` 1.0,
/// section 3.1.1) the first entry is the first message's, and so on. A message it leaves out is retried.
/// An answer that began to speak and broke off, or uses other words, acks nothing: a message pushed
/// twice is the smaller harm.
pub(crate) fn judge_items<'a>(body: &[u8], ids: impl Iterator<Item = Cow<'a, str>>) -> Option<Vec<Item>> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        statuses: Option<Vec<Status<'a>>>,
    }
    #[derive(Deserialize)]
    struct Status<'a> {
        #[serde(borrow)]
        id: Cow<'a, str>,
        #[serde(borrow)]
        status: Cow<'a, str>,
    }
    if !looks_like_an_object(body) {
        return None;
    }
    let retry = |reason| Item { decision: Decision::RETRY, reason };
    let Ok(read) = serde_json::from_slice::<Body<'_>>(body) else {
        return Some(ids.map(|_| retry("the endpoint's answer to the batch cannot be read")).collect());
    };
    let mut by_id = rustc_hash::FxHashMap::<_, VecDeque<_>>::default();
    for Status { id, status } in read.statuses? {
        by_id.entry(id).or_default().push_back(status);
    }
    let judge = |id: Cow<'a, str>| match by_id.get_mut(&id).and_then(VecDeque::pop_front).as_deref() {
        Some("SUCCESS") => Item { decision: Decision::Ack, reason: "" },
        Some("RETRY") => retry("the endpoint answered RETRY for this message of the batch"),
        Some("DROP") => {
            Item { decision: Decision::Reject, reason: "the endpoint answered DROP for this message of the batch" }
        }
        Some(_) => retry("the endpoint answered neither SUCCESS, RETRY nor DROP for this message of the batch"),
        None => retry("the endpoint's answer left this message of the batch out"),
    };
    Some(ids.map(judge).collect())
}

/// The settlement of delivery number `attempt`, which is not pushed again before `least` is over. `None` keeps it in hand.
///
/// The wait is drawn here only where the group's own draw would not do: `Retry-After` is a floor
/// under the backoff, and the slow end is the upper half of the longest backoff.
pub(crate) fn settlement(
    decision: &Decision,
    status: Option<u16>,
    reason: &str,
    policy: &RetryPolicy,
    attempt: u32,
    least: Option<Duration>,
) -> Option<Settlement> {
    let failure = || {
        let failure = Failure::new(reason);
        match status {
            Some(status) => failure.with_status(status.to_string()),
            None => failure,
        }
    };
    Some(match decision {
        Decision::Ack => Settlement::Ack,
        Decision::Reject => Settlement::Reject(failure()),
        Decision::Retry { slow, floor } => {
            let floor = (*floor).max(least);
            let drawn = if *slow {
                Some(policy.ceiling(u32::MAX).mul_f64(0.5 + fastrand::f64() / 2.0))
            } else {
                floor.map(|_| policy.backoff(attempt))
            };
            Settlement::Retry { after: drawn.max(floor), failure: Some(failure()) }
        }
        // What would be its last failure must not cost a message that is to be kept.
        Decision::Keep if policy.is_exhausted(attempt) => return None,
        Decision::Keep => Settlement::Retry { after: Some(Duration::ZERO), failure: Some(failure()) },
    })
}

#[cfg(test)]
mod tests {
    use http::header::RETRY_AFTER;

    use super::*;

    const NOW: fn() -> SystemTime = || SystemTime::UNIX_EPOCH;

    fn answer(status: u16, retry_after: Option<&str>, body: &str) -> Outcome {
        let retry_after = retry_after.map(|text| (RETRY_AFTER, text.parse().unwrap()));
        Outcome::Answer(Answer { status, headers: retry_after.into_iter().collect(), body: body.as_bytes().to_vec() })
    }

    fn verdict(status: u16, body: &str) -> (Decision, Health) {
        let verdict = judge(&answer(status, None, body), &BTreeMap::new(), NOW);
        assert_eq!(verdict.status, Some(status));
        assert_eq!(verdict.reason.is_empty(), verdict.decision == Decision::Ack);
        (verdict.decision, verdict.health)
    }

    #[test]
    fn the_table() {
        const SLOW: Decision = Decision::Retry { slow: true, floor: None };
        for status in 200..=299 {
            assert_eq!(verdict(status, ""), (Decision::Ack, Health::Well), "{status}");
        }
        for status in 300..=399 {
            assert_eq!(verdict(status, ""), (Decision::RETRY, Health::Failing), "{status}");
        }
        for status in 400..=599 {
            let expected = match status {
                400 | 413 | 415 | 422 => (Decision::Reject, Health::Well),
                401 | 403 | 404 => (SLOW, Health::Failing),
                410 => (Decision::Keep, Health::Gone),
                429 | 503 => (Decision::RETRY, Health::Overloaded),
                _ => (Decision::RETRY, Health::Failing),
            };
            assert_eq!(verdict(status, ""), expected, "{status}");
        }
        for status in [100, 101, 600, 999] {
            assert_eq!(verdict(status, ""), (Decision::RETRY, Health::Failing), "{status}");
        }
        let timeout = judge(&Outcome::TimedOut(Duration::from_secs(10)), &BTreeMap::new(), NOW);
        assert_eq!((timeout.decision, timeout.health, timeout.status), (Decision::RETRY, Health::Overloaded, None));
        assert_eq!(timeout.reason, "timed out after 10s");
        let refused = judge(&Outcome::Failed("connection refused".into()), &BTreeMap::new(), NOW);
        assert_eq!((refused.decision, refused.health, refused.status), (Decision::RETRY, Health::Failing, None));
        assert_eq!(refused.reason, "connection refused");
        let endless = judge(&Outcome::Failed("ä".repeat(100_000)), &BTreeMap::new(), NOW);
        assert_eq!(endless.reason, "ä".repeat(MAX_REASON));
    }

    #[test]
    fn the_body_of_a_200_overrides() {
        for (body, decision) in [
            (r#"{"status":"RETRY"}"#, Decision::RETRY),
            (" \n{\"status\":\"R\\u0045TRY\",\"why\":[1]}", Decision::RETRY),
            (r#"{"status":"DROP"}"#, Decision::Reject),
            (r#"{"status":"SUCCESS"}"#, Decision::Ack),
            (r#"{"status":"retry"}"#, Decision::Ack),
            (r#"{"status":500}"#, Decision::Ack),
            (r#"{"status":"RETRY""#, Decision::Ack),
            (r#"["status","RETRY"]"#, Decision::Ack),
            ("RETRY", Decision::Ack),
            ("{", Decision::Ack),
        ] {
            assert_eq!(verdict(200, body), (decision, Health::Well), "{body}");
        }
        assert_eq!(verdict(201, r#"{"status":"RETRY"}"#).0, Decision::Ack);
        assert_eq!(verdict(400, r#"{"status":"RETRY"}"#).0, Decision::Reject);
    }

    #[test]
    fn a_subscription_may_see_it_otherwise() {
        let own = BTreeMap::from([
            (400, StatusVerdict::Retry),
            (410, StatusVerdict::Ack),
            (503, StatusVerdict::Retry),
            (500, StatusVerdict::Reject),
            (200, StatusVerdict::Ack),
        ]);
        let verdict = |status, body| {
            let verdict = judge(&answer(status, None, body), &own, NOW);
            (verdict.decision, verdict.health)
        };
        assert_eq!(verdict(400, ""), (Decision::RETRY, Health::Failing));
        assert_eq!(verdict(410, ""), (Decision::Ack, Health::Well));
        assert_eq!(verdict(503, ""), (Decision::RETRY, Health::Overloaded));
        assert_eq!(verdict(500, ""), (Decision::Reject, Health::Well));
        assert_eq!(verdict(200, r#"{"status":"DROP"}"#), (Decision::Ack, Health::Well));
        assert_eq!(verdict(422, ""), (Decision::Reject, Health::Well));
    }

    #[test]
    fn retry_after_is_a_floor_under_every_retry() {
        for status in [301, 404, 408, 409, 425, 429, 500, 503, 599] {
            let verdict = judge(&answer(status, Some("7"), ""), &BTreeMap::new(), NOW);
            assert!(
                matches!(verdict.decision, Decision::Retry { floor: Some(floor), .. } if floor.as_secs() == 7),
                "{status}"
            );
        }
    }

    #[test]
    fn a_batch_is_judged_item_by_item() {
        let judged = |body: &str| {
            judge_items(body.as_bytes(), ["a", "b", "c", "d"].into_iter().map(Cow::from))
                .map(|items| items.into_iter().map(|item| item.decision).collect::<Vec<_>>())
        };
        let (ack, retry, drop) = (Decision::Ack, Decision::RETRY, Decision::Reject);
        assert_eq!(
            judged(
                r#"{"statuses":[{"id":"c","status":"DROP"},{"id":"a","status":"SUCCESS"},{"id":"b","status":"RETRY"},
                    {"id":"a","status":"DROP"},{"id":"unknown","status":"DROP"}]}"#
            ),
            Some(vec![ack, retry.clone(), drop, retry.clone()])
        );
        assert_eq!(judged(r#"{"statuses":[]}"#), Some(vec![retry.clone(); 4]));
        assert_eq!(judged(r#"{"statuses":[{"id":"a","status":"OK"}]}"#), Some(vec![retry.clone(); 4]));
        for broken in ["{", r#"{"statuses":[{"id":"a","status":"SUCC"#, r#"{"statuses":"SUCCESS"}"#] {
            assert_eq!(judged(broken), Some(vec![retry.clone(); 4]), "{broken}");
        }
        for silent in ["", "ok", "[]", r#"{"ok":true}"#, r#"{"statuses":null}"#] {
            assert_eq!(judged(silent), None, "{silent}");
        }
    }

    #[test]
    fn each_message_of_one_id_has_its_own_entry() {
        let judged = |body: &str| {
            judge_items(body.as_bytes(), ["1", "2", "1", "1"].into_iter().map(Cow::from))
                .map(|items| items.into_iter().map(|item| item.decision).collect::<Vec<_>>())
        };
        assert_eq!(
            judged(
                r#"{"statuses":[{"id":"1","status":"SUCCESS"},{"id":"1","status":"RETRY"},{"id":"2","status":"SUCCESS"},
                    {"id":"1","status":"DROP"}]}"#
            ),
            Some(vec![Decision::Ack, Decision::Ack, Decision::RETRY, Decision::Reject])
        );
        assert_eq!(
            judged(r#"{"statuses":[{"id":"1","status":"SUCCESS"}]}"#),
            Some(vec![Decision::Ack, Decision::RETRY, Decision::RETRY, Decision::RETRY]),
            "what is said of one is not said of another"
        );
    }

    #[test]
    fn settlements() {
        let (initial, max) = (Duration::from_secs(1), Duration::from_secs(600));
        let policy = RetryPolicy::default().with_backoff(initial, max, 2.0).unwrap().with_max_attempts(3).unwrap();
        let after = |decision, attempt| match settlement(&decision, Some(500), "because", &policy, attempt, None) {
            Some(Settlement::Retry { after, failure: Some(failure) }) => {
                assert_eq!((failure.reason(), failure.status()), ("because", Some("500")));
                after
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(settlement(&Decision::Ack, Some(200), "", &policy, 1, None), Some(Settlement::Ack));
        let rejected = settlement(&Decision::Reject, None, "because", &policy, 1, None);
        assert_eq!(rejected, Some(Settlement::Reject(Failure::new("because"))));
        assert_eq!(after(Decision::RETRY, 1), None, "the group draws");
        let floor = Duration::from_secs(5);
        for _ in 0..100 {
            assert_eq!(after(Decision::Retry { slow: false, floor: Some(floor) }, 1), Some(floor));
            let slow = after(Decision::Retry { slow: true, floor: None }, 1).unwrap();
            assert!((max / 2..=max).contains(&slow), "{slow:?}");
            let spaced = settlement(&Decision::RETRY, None, "", &policy, 1, Some(floor));
            assert!(matches!(spaced, Some(Settlement::Retry { after: Some(after), .. }) if after >= floor));
            let both = after(Decision::Retry { slow: true, floor: Some(max) }, 1).unwrap();
            assert_eq!(both, max);
        }
        assert_eq!(after(Decision::Keep, 2), Some(Duration::ZERO));
        assert_eq!(settlement(&Decision::Keep, Some(410), "", &policy, 3, None), None, "kept in hand");
    }
}
