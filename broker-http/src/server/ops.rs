//! What operators ask for: health, readiness, metrics, topics and the description of the interface.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use broker_core::Error;
use http::{HeaderValue, StatusCode, Uri, header};
use serde_json::json;

use super::Shared;
use super::metrics::Gauges;
use super::problem::{Answer, Problem};
use super::query::{Query, no_query};
use super::subscriptions::{DEFAULT_PAGE, MAX_PAGE, respond};

/// The OpenAPI document; a test compares it with the routes.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// `GET /healthz`: the process is alive.
pub(crate) async fn healthz(uri: Uri) -> Answer<&'static str> {
    no_query(&uri)?;
    Ok("ok\n")
}

/// `GET /readyz`: it takes requests, and so does the broker behind it; says what that one can do, and to admins
/// where it is and what is wrong with it.
pub(crate) async fn readyz(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if let Err(problem) = no_query(request.uri()) {
        return problem.into_response();
    }
    if shared.is_draining() {
        return Problem::draining().into_response();
    }
    let is_admin = shared.gate.is_admin(request.extensions().get(), request.headers());
    let (state, problem) = match shared.broker.status().await {
        Ok(status) if matches!(status.state, broker_core::State::Active) => {
            let mut ready = json!({ "status": "ready", "capabilities": shared.broker.capabilities() });
            if let Some(fields) = ready.as_object_mut().filter(|_| is_admin) {
                fields.insert("broker".to_owned(), status.name.into());
            }
            return respond(StatusCode::OK, &ready);
        }
        Ok(status) => {
            let error = status.last_error.map(|error| format!(": {error}")).unwrap_or_default();
            let state = serde_json::to_value(status.state).unwrap_or_default();
            let state = state.as_str().unwrap_or("not active").to_owned();
            let told = Problem::from(Error::unavailable(format!("the broker {} is {state}{error}", status.name)));
            (state, told)
        }
        Err(error) => ("out of reach".to_owned(), Problem::from(error)),
    };
    if is_admin {
        return problem.into_response();
    }
    Problem::from(Error::unavailable(format!("not ready: the broker is {state}"))).into_response()
}

/// `GET /metrics`
pub(crate) async fn metrics(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    no_query(&uri)?;
    let gauges = Gauges {
        connections: shared.connections.open(),
        subscriptions: shared.registry.len(),
        leases: shared.leases.lent(),
        streams: shared.streams.load(std::sync::atomic::Ordering::Acquire),
        topics: shared.publishers.len(),
        memory: usize::try_from(shared.ledger.held()).unwrap_or(usize::MAX),
        memory_limit: usize::try_from(shared.ledger.max()).unwrap_or(usize::MAX),
    };
    // A broker that cannot be asked takes nothing away from what is counted here.
    let status = shared.broker.status().await.ok();
    let text = shared.metrics.render(gauges, &shared.registry.pushes(), status.as_ref());
    Ok(typed("text/plain; version=0.0.4; charset=utf-8", text))
}

/// `GET /openapi.json`
pub(crate) async fn openapi(uri: Uri) -> Answer {
    no_query(&uri)?;
    Ok(typed("application/json", OPENAPI))
}

fn typed(content_type: &'static str, body: impl IntoResponse) -> Response {
    let mut response = body.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// `GET /topics`: those lately published to through this server.
pub(crate) async fn topics(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    let mut query = Query::of(&uri);
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(DEFAULT_PAGE);
    let after = query.text("next")?;
    query.finish()?;
    let (topics, more) = shared.publishers.list(after.as_deref(), limit);
    let next = topics.last().filter(|_| more).map(|last| last.name().to_owned());
    Ok(respond(StatusCode::OK, &json!({ "topics": topics, "next": next })))
}

/// Any other path.
pub(crate) async fn no_route(uri: Uri) -> Problem {
    let shown: String = uri.path().chars().take(100).collect();
    Problem::not_found(format!("there is nothing at {shown:?}; GET /openapi.json lists what there is"))
}

/// A path with another method.
pub(crate) async fn no_method(method: http::Method, uri: Uri) -> Problem {
    let shown: String = uri.path().chars().take(100).collect();
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        broker_core::ErrorKind::Invalid,
        format!("{method} means nothing at {shown:?}; the header allow says what does"),
    )
}
