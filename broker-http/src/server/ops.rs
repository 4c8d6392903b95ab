//! What operators ask for: health, readiness, metrics, topics and the description of the interface.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, Uri, header};
use serde_json::json;

use super::Shared;
use super::metrics::Gauges;
use super::problem::{Answer, Problem};
use super::publish::json_response;
use super::query::{Query, no_query};
use super::reader::Reader;
use super::subscriptions::{DEFAULT_PAGE, LIST_BYTES, MAX_PAGE};

/// The OpenAPI document; a test compares it with the routes.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// `GET /healthz`: the process is alive.
pub(crate) async fn healthz(uri: Uri) -> Answer<&'static str> {
    no_query(&uri)?;
    Ok("ok\n")
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
    // A broker that cannot be asked, or not soon, takes nothing away from what is counted here.
    let status = shared.told.soon(&shared.broker).await;
    let text = shared.metrics.render(gauges, &shared.registry.pushes(), status.as_deref());
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
pub(crate) async fn topics(State(shared): State<Arc<Shared>>, reader: Reader, uri: Uri) -> Answer {
    let mut query = Query::of(&uri);
    let limit = query.number("limit", 1..=MAX_PAGE)?.unwrap_or(DEFAULT_PAGE);
    let after = query.text("next")?;
    query.finish()?;
    let turn = reader.soon(LIST_BYTES..=LIST_BYTES).await?;
    let (topics, more) = shared.publishers.list(after.as_deref(), limit);
    let next = topics.last().filter(|_| more).map(|last| last.name().to_owned());
    let topics = json!({ "topics": topics, "next": next }).to_string().into_bytes();
    Ok(json_response(StatusCode::OK, reader.answer(turn, topics)))
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
