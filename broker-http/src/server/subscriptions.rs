//! `/subscriptions`: the requests that make, show and steer subscriptions.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use broker_core::{GroupName, GroupStatus, Status, TopicFilter};
use http::{HeaderMap, StatusCode, Uri, header};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::access::Caller;
use super::asked::Pending;
use super::consent::Consent;
use super::groups::bounds_backlogs;
use super::problem::{Answer, Problem};
use super::publish::json_response;
use super::pull::FULL_BYTES;
use super::query::{Query, name_in_path, no_query};
use super::reader::Reader;
use super::redrives::Claim;
use super::registry::{Put, Subscribed};
use super::{Shared, body};
use crate::SubscriptionSpec;
use crate::event::{self, Envelope};
use crate::null;
use crate::outgoing::Turn;
use crate::push::PushState;
use crate::spec::REDACTED;

/// Entries of a page.
pub(crate) const MAX_PAGE: usize = 1_000;
pub(crate) const DEFAULT_PAGE: usize = 100;

/// Bytes that a list is thought to have before it is encoded.
pub(crate) const LIST_BYTES: u64 = 64 << 10;

/// Bytes of a subscription's settings: they are held as long as it stands.
const SPEC_BYTES: usize = 64 << 10;

/// Why pushes are held whose owner may not have them, and what to do.
const DISOWNED: &str = "the identity that had it pushed may no longer subscribe to its filter, or publish to the dead-letter \
    topic it names: PUT it as an identity that may, or give that right back; its backlog is kept";

/// Finishes a change whatever becomes of who asked for it.
pub(crate) async fn finish<T: Send + 'static>(change: impl Future<Output = Answer<T>> + Send + 'static) -> Answer<T> {
    tokio::spawn(change).await.unwrap_or_else(|_| Err(Problem::draining()))
}

pub(crate) fn respond(status: StatusCode, json: &Value) -> Response {
    json_response(status, json.to_string().into_bytes())
}

/// `PUT /subscriptions/{name}`
pub(crate) async fn put(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    no_query(&uri)?;
    let name = GroupName::new(&*name_in_path(&uri)?)?;
    let (json, reservation) = body::collect_json(&headers, body, &shared, caller.as_deref()).await?;
    if json.len() > SPEC_BYTES {
        return Err(Problem::too_large(format!("a subscription's settings have {SPEC_BYTES} bytes of JSON at most")));
    }
    let spec = SubscriptionSpec::from_json(&json)?;
    let caller = caller.map(|Extension(caller)| caller);
    shared.gate.check_subscription(caller.as_ref(), &spec)?;
    shared.registry.check_free(name.as_str())?;
    if let Some(endpoint) = &spec.endpoint {
        shared.check_endpoint(endpoint)?;
    }
    let only_new = match headers.get(header::IF_NONE_MATCH) {
        None => false,
        Some(tag) if tag == "*" => true,
        Some(_) => {
            return Err(Problem::invalid("if-none-match: only * means something here: make it, replace nothing"));
        }
    };
    finish(async move {
        let owner = caller.as_ref().and_then(Caller::owner);
        let making = shared.asked.begin(&name, &spec.filter);
        let taken_back = || {
            Problem::conflict(format!("subscription {name} is not made: it was deleted while its endpoint was asked"))
        };
        let pending = Pending::Make {
            spec: Box::new(spec.clone()),
            only_new,
            caller: caller.clone(),
            reservation,
            making: Arc::clone(&making),
        };
        let asked = making.taken_back.run_until_cancelled(shared.ask_endpoint(&name, &spec, pending)).await;
        let permission = match asked.ok_or_else(taken_back)?? {
            Consent::NeedNot => None,
            Consent::Given(permission) => Some(permission),
            // Said too where it has called back already: it may still be about to be made.
            Consent::Later => {
                return Ok(respond(StatusCode::ACCEPTED, &json!({ "name": name, "consent": "awaited" })));
            }
        };
        // The endpoint may have taken its time.
        shared.gate.check_subscription(caller.as_ref(), &spec)?;
        let changing = shared.registry.begin().await;
        if making.taken_back.is_cancelled() {
            return Err(taken_back());
        }
        let by = (owner, permission);
        let (put, subscribed) = shared.registry.put(&changing, &shared, name.clone(), spec, only_new, by).await?;
        drop((changing, making));
        shared.try_save().await?;
        let status = if put == Put::Made { StatusCode::CREATED } else { StatusCode::OK };
        Ok(respond(status, &view(&shared, &subscribed, caller.as_ref(), None)))
    })
    .await
}

/// `GET /subscriptions/{name}`
pub(crate) async fn get(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let turn = reader.soon(LIST_BYTES..=LIST_BYTES).await?;
    show(&shared, caller.as_deref(), (&reader, turn), &subscribed).await
}

/// What there is of it, told in a turn of the reader's.
async fn show(
    shared: &Shared,
    caller: Option<&Caller>,
    (reader, turn): (&Reader, Turn),
    subscribed: &Subscribed,
) -> Answer {
    let status = shared.broker.status().await?;
    let view = view(shared, subscribed, caller, Some(&status)).to_string().into_bytes();
    Ok(json_response(StatusCode::OK, reader.answer(turn, view)))
}

/// `DELETE /subscriptions/{name}`
pub(crate) async fn delete(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    uri: Uri,
) -> Answer<StatusCode> {
    let mut query = Query::of(&uri);
    let keep = query.parsed::<bool>("keep")?.unwrap_or(false);
    query.finish()?;
    let name = name_in_path(&uri)?.into_owned();
    shared.registry.check_free(&name)?;
    finish(async move {
        let changing = shared.registry.begin().await;
        let may = |filter: &TopicFilter| caller.as_ref().is_none_or(|Extension(caller)| caller.may_own(filter));
        let taken_back = shared.asked.take_back(&name, may);
        match shared.registry.delete(&changing, &shared, &name, keep).await {
            // It only waited for its endpoint's consent.
            Err(problem) if taken_back && problem.status() == StatusCode::NOT_FOUND => {}
            deleted => deleted?,
        }
        drop(changing);
        shared.try_save().await?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// `GET /subscriptions`
pub(crate) async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
) -> Answer {
    let mut query = Query::of(&uri);
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(DEFAULT_PAGE);
    let after = query.text("next")?;
    query.finish()?;
    let seen = |subscribed: &Subscribed| {
        caller.as_ref().is_none_or(|Extension(caller)| caller.may_see(&subscribed.spec.filter))
    };
    let (page, more) = shared.registry.list(after.as_deref(), limit, seen);
    let status = shared.broker.status().await?;
    let next = page.last().filter(|_| more).map(|last| last.name.to_string());
    let turn = reader.soon(LIST_BYTES..=FULL_BYTES as u64).await?;
    let mut out = br#"{"subscriptions":["#.to_vec();
    let mut last = None;
    for subscribed in &page {
        if last.is_some() {
            out.push(b',');
        }
        out.extend_from_slice(view(&shared, subscribed, caller.as_deref(), Some(&status)).to_string().as_bytes());
        last = Some(subscribed);
        if out.len() >= turn.bytes() {
            break;
        }
    }
    // A page that is full before its end goes on behind what it has.
    let next = last.filter(|_| out.len() >= turn.bytes()).map(|last| last.name.to_string()).or(next);
    out.extend_from_slice(format!(r#"],"next":{}}}"#, json!(next)).as_bytes());
    Ok(json_response(StatusCode::OK, reader.answer(turn, out)))
}

/// `POST /subscriptions/{name}/pause`
pub(crate) async fn pause(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
) -> Answer {
    set_paused(shared, caller, reader, uri, true).await
}

/// `POST /subscriptions/{name}/resume`
pub(crate) async fn resume(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
) -> Answer {
    set_paused(shared, caller, reader, uri, false).await
}

async fn set_paused(
    shared: Arc<Shared>,
    caller: Option<Extension<Caller>>,
    reader: Reader,
    uri: Uri,
    paused: bool,
) -> Answer {
    no_query(&uri)?;
    let name = name_in_path(&uri)?.into_owned();
    // Before anything changes: what is done is told.
    let turn = reader.soon(LIST_BYTES..=LIST_BYTES).await?;
    finish(async move {
        let subscribed = shared.registry.pause(&shared, &name, paused).await?;
        shared.try_save().await?;
        show(&shared, caller.as_deref(), (&reader, turn), &subscribed).await
    })
    .await
}

/// `POST /subscriptions/{name}/test`
pub(crate) async fn test(State(shared): State<Arc<Shared>>, caller: Option<Extension<Caller>>, uri: Uri) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let push = subscribed.push().ok_or_else(|| {
        Problem::conflict(format!("subscription {} has no endpoint to test; it is pulled", subscribed.name))
    })?;
    if push.is_unconsented() {
        return Err(Problem::conflict(format!(
            "the endpoint of subscription {} has not consented to pushes; it is asked",
            subscribed.name
        )));
    }
    if push.is_unauthorized() {
        return Err(Problem::conflict(format!("subscription {}: {DISOWNED}", subscribed.name)));
    }
    let outcome = push.test().await;
    let status = shared.broker.status().await?;
    let mut view = view(&shared, &subscribed, caller.as_deref(), Some(&status));
    set(&mut view, "test", attempt_view(&outcome));
    Ok(respond(StatusCode::OK, &view))
}

/// `GET /subscriptions/{name}/attempts`
pub(crate) async fn attempts(State(shared): State<Arc<Shared>>, reader: Reader, uri: Uri) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let turn = reader.soon(LIST_BYTES..=LIST_BYTES).await?;
    let attempts: Vec<_> =
        subscribed.push().map(|push| push.attempts().iter().map(attempt_view).collect()).unwrap_or_default();
    let attempts = json!({ "attempts": attempts }).to_string().into_bytes();
    Ok(json_response(StatusCode::OK, reader.answer(turn, attempts)))
}

fn attempt_view(attempt: &crate::push::Attempt) -> Value {
    serde_json::to_value(attempt).unwrap_or_default()
}

/// `GET /subscriptions/{name}/dead`
pub(crate) async fn dead(State(shared): State<Arc<Shared>>, reader: Reader, uri: Uri) -> Answer {
    let mut query = Query::of(&uri);
    let max = query.number("max", 1..=MAX_PAGE)?.unwrap_or(DEFAULT_PAGE);
    query.finish()?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let letters = shared.broker.dead_letters(&subscribed.group, max).await?;
    let first = letters.first().map_or(LIST_BYTES, |letter| event::json::about(&letter.message));
    let turn = reader.soon(first..=first.max(FULL_BYTES as u64)).await?;
    let mut out = br#"{"dead":["#.to_vec();
    let mut more = false;
    for (index, letter) in letters.iter().enumerate() {
        if out.len() >= turn.bytes() {
            more = true;
            break;
        }
        out.extend_from_slice(if index > 0 { br#",{"event":"# } else { br#"{"event":"# });
        let envelope = Envelope {
            topic: &letter.topic,
            message: &letter.message,
            subscription: Some(subscribed.name.as_str()),
            attempt: None,
        };
        event::json::encode(envelope, &mut out);
        let story = json!({
            "reason": letter.failure.reason(),
            "status": letter.failure.status(),
            "attempts": letter.attempts,
            "topic": letter.topic,
            "group": letter.group,
            "first": letter.first,
            "last": letter.last,
        });
        // One object: the story follows the event.
        out.push(b',');
        out.extend_from_slice(story.to_string().as_bytes().get(1..).unwrap_or_default());
    }
    out.push(b']');
    if more {
        out.extend_from_slice(br#","more":true"#);
    }
    out.push(b'}');
    Ok(json_response(StatusCode::OK, reader.answer(turn, out)))
}

/// `DELETE /subscriptions/{name}/dead`
pub(crate) async fn purge_dead(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let purged = shared.broker.purge_dead_letters(&subscribed.group).await?;
    Ok(respond(StatusCode::OK, &json!({ "purged": purged })))
}

/// `DELETE /subscriptions/{name}/backlog`
pub(crate) async fn purge_backlog(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let purged = shared.broker.purge_group(&subscribed.group).await?;
    Ok(respond(StatusCode::OK, &json!({ "purged": purged })))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Redrive {
    max: Option<u64>,
    rate: Option<f64>,
}

impl Redrive {
    pub(crate) fn read(json: &[u8]) -> Answer<Self> {
        null::refuse(json)?;
        Ok(body::read_json(json)?.unwrap_or_default())
    }

    /// How many dead letters at most, and how many a second if there is a bound.
    pub(crate) fn bounds(self) -> Answer<(u64, Option<f64>)> {
        if self.max == Some(0) {
            return Err(Problem::invalid("max: it is 1 or more; leave it out for all"));
        }
        if self.rate.is_some_and(|rate| !rate.is_finite() || !(0.001..=1e6).contains(&rate)) {
            return Err(Problem::invalid("rate: it is messages a second, from 0.001 to 1000000"));
        }
        Ok((self.max.unwrap_or(u64::MAX), self.rate))
    }
}

/// `POST /subscriptions/{name}/redrive`
pub(crate) async fn redrive(
    State(shared): State<Arc<Shared>>,
    caller: Option<Extension<Caller>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    no_query(&uri)?;
    let subscribed = shared.registry.find(&name_in_path(&uri)?)?;
    let wanted = body::json::<Box<RawValue>>(&headers, body, &shared, caller.as_deref()).await?;
    let wanted = wanted.map(|json| Redrive::read(json.get().as_bytes())).transpose()?;
    let (max, rate) = wanted.unwrap_or_default().bounds()?;
    // To its end whatever becomes of who asked: what is moved is counted, and nobody moves it meanwhile.
    let redriven = finish(async move {
        let (broker, group) = (&*shared.broker, &subscribed.group);
        let Some(rate) = rate else { return Ok(shared.redrives.at_once(broker, group, max).await?) };
        let claim = shared.redrives.claim(broker, group, max).await?;
        let count = claim.left();
        tokio::spawn(redrive_slowly(Arc::clone(&shared), subscribed, claim, rate));
        Ok(count)
    })
    .await?;
    Ok(respond(StatusCode::ACCEPTED, &json!({ "redriven": redriven })))
}

/// Redrives one after another, or at high rates a few at a time.
async fn redrive_slowly(shared: Arc<Shared>, subscribed: Arc<Subscribed>, mut claim: Claim, rate: f64) {
    let at_once = (rate / 100.0).ceil().max(1.0);
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(at_once / rate));
    while claim.left() > 0 {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.draining.cancelled() => break,
        }
        match claim.step(&*shared.broker, &subscribed.group, at_once as u64).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, name = %subscribed.name, "a redrive ended early");
                break;
            }
        }
    }
    claim.end().await;
}

/// A subscription as it is shown to somebody: every default filled in that its broker keeps, no secret.
fn view(shared: &Shared, subscribed: &Subscribed, caller: Option<&Caller>, status: Option<&Status>) -> Value {
    let mut view = serde_json::to_value(&*subscribed.spec).unwrap_or_default();
    set(&mut view, "name", json!(subscribed.name));
    set(&mut view, "group", json!(subscribed.group.name));
    if let Some(settings) = shared.registry.groups.settings(&subscribed.group) {
        set(&mut view, "start", json!(settings.start));
        set(&mut view, "ordered", json!(settings.ordered));
        set(&mut view, "retry", json!(settings.retry));
        if bounds_backlogs(&*shared.broker) {
            set(&mut view, "backlog", json!(settings.backlog));
        }
        set(&mut view, "dead_letter", json!(settings.dead_letter));
    }
    redact(&mut view);
    if let Some(owner) = subscribed.owner()
        && caller.is_none_or(|caller| caller.may_see_owner(&owner, &subscribed.spec.filter))
    {
        set(&mut view, "owner", json!(owner));
    }
    let group = status.and_then(|status| status.group(&subscribed.group));
    set(&mut view, "status", status_view(subscribed, status.is_some(), group));
    view
}

/// Puts stars in place of secrets.
fn redact(view: &mut Value) {
    let secrets: [(&str, Option<&[&str]>); 3] =
        [("headers", None), ("signing", Some(&["secret", "previous"])), ("tls", Some(&["key"]))];
    for (field, values) in secrets {
        let Some(object) = view.get_mut(field).and_then(Value::as_object_mut) else { continue };
        for (name, value) in object {
            if values.is_none_or(|values| values.contains(&name.as_str())) {
                *value = Value::from(REDACTED);
            }
        }
    }
}

fn status_view(subscribed: &Subscribed, asked: bool, group: Option<&GroupStatus>) -> Value {
    // Just made, there is nothing to ask the broker for.
    let lag = if asked { group.and_then(|group| group.lag) } else { Some(0) };
    let last_error = group.and_then(|group| group.last_error.clone());
    let mut view = match (subscribed.push(), subscribed.pull()) {
        (Some(push), _) => {
            let own = push.status();
            json!({
                "lag": lag,
                "in_flight": own.in_flight,
                "state": match own.state {
                    // A group deleted under it, or the broker closed: it takes an operator to go on.
                    PushState::Ended => PushState::Disabled,
                    state => state,
                },
                "last_error": match own.state {
                    // Whose it is, is shown to whom it concerns.
                    PushState::Unauthorized => Some(DISOWNED.to_owned()),
                    _ => own.last_error.or(last_error),
                },
                "last_success": own.last_success,
            })
        }
        (None, pull) => json!({
            "lag": lag,
            "in_flight": pull.map_or(0, |pull| pull.holder.tally().lent()),
            "state": if subscribed.is_paused() { "paused" } else { "active" },
            "last_error": last_error,
            "last_success": pull.and_then(|pull| pull.holder.tally().last_success()),
        }),
    };
    if let Some(group) = group {
        set(&mut view, "lag_bytes", json!(group.lag_bytes));
        set(&mut view, "members", json!(group.members));
        set(&mut view, "dead_letters", json!(group.dead_letters));
        set(&mut view, "counts", json!(group.counts));
    }
    view
}

fn set(view: &mut Value, field: &str, value: Value) {
    if let Some(object) = view.as_object_mut() {
        object.insert(field.to_owned(), value);
    }
}
