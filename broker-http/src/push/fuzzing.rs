//! Ways for fuzzing to what the engine decodes of an endpoint's answer, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use broker_core::{RetryPolicy, Settlement};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue};
use serde_json::Value;

use super::consent;
use super::verdict::{Answer, Decision, Health, Outcome, judge, judge_items, settlement};
use crate::retry_after::MAX_RETRY_AFTER;

/// The whole of an answer to a push.
pub fn push_answer(status: u16, headers: &HeaderMap, body: &[u8]) {
    let now = || SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    let answer = Outcome::Answer(Answer { status, headers: headers.clone(), body: body.to_vec() });
    let verdict = judge(&answer, &BTreeMap::new(), now);
    assert_eq!(verdict.status, Some(status));
    assert_eq!(verdict.reason.is_empty(), verdict.decision == Decision::Ack);
    let json = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let asked = json.get("status").and_then(Value::as_str);
    match &verdict.decision {
        Decision::Ack => assert!((200..300).contains(&status) && verdict.health == Health::Well),
        Decision::Retry { floor, .. } => {
            assert!(status != 200 || asked == Some("RETRY"));
            assert!(*floor <= Some(MAX_RETRY_AFTER));
            let text = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).unwrap_or_default();
            if let Ok(seconds) = text.parse::<u32>() {
                let wait = Duration::from_secs(seconds.into()).min(MAX_RETRY_AFTER);
                // Seconds are digits alone (RFC 9110, section 10.2.3); the parser of numbers takes `+60` too.
                assert_eq!(*floor, (!text.starts_with('+')).then_some(wait));
            }
        }
        Decision::Reject => assert!(if status == 200 { asked == Some("DROP") } else { (400..500).contains(&status) }),
        Decision::Keep => assert_eq!((status, verdict.health), (410, Health::Gone)),
    }
    let policy = RetryPolicy::default();
    for attempt in [1, 2, u32::MAX] {
        match settlement(&verdict.decision, verdict.status, &verdict.reason, &policy, attempt, None) {
            Some(Settlement::Retry { after: Some(after), .. }) => {
                let Decision::Retry { floor, .. } = verdict.decision else { continue };
                assert!(floor.is_none_or(|floor| floor <= after));
                assert!(after <= policy.ceiling(u32::MAX).max(floor.unwrap_or_default()));
            }
            Some(_) => {}
            None => assert!(verdict.decision == Decision::Keep && policy.is_exhausted(attempt)),
        }
    }
    items(body, &json);
}

/// What the answer says of a batch: only what is said to have succeeded is acked.
fn items(body: &[u8], json: &Value) {
    let said = json.get("statuses").and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |entry: &Value, field: &str| entry.get(field).and_then(Value::as_str).map(str::to_owned);
    let mut ids: Vec<String> = said.iter().filter_map(|entry| text(entry, "id")).collect();
    ids.push("one that nobody names".to_owned());
    let Some(items) = judge_items(body, ids.iter().map(|id| Cow::Borrowed(id.as_str()))) else { return };
    assert_eq!(items.len(), ids.len());
    for (index, item) in items.iter().enumerate() {
        assert_eq!(item.reason.is_empty(), item.decision == Decision::Ack);
        // The ids were asked for in the order of the entries, so that each has its own, whatever repeats.
        let status = said.get(index).and_then(|entry| text(entry, "status"));
        match item.decision {
            Decision::Ack => assert_eq!(status.as_deref(), Some("SUCCESS")),
            Decision::Reject => assert_eq!(status.as_deref(), Some("DROP")),
            Decision::Retry { slow, floor } => assert!(!slow && floor.is_none()),
            Decision::Keep => panic!("a message of a batch is kept"),
        }
    }
}

/// The answer to being asked whether pushes are wanted.
pub fn consent_answer(headers: &HeaderMap) {
    let origin = HeaderValue::from_static("broker.example");
    let Ok(rate) = consent::read(headers, &origin) else { return };
    assert!(headers.contains_key(consent::ALLOWED_ORIGIN));
    assert!(rate.is_none_or(|rate| rate > 0.0 && rate.is_finite()));
}
