//! The table of routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use broker_core::ErrorKind;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};

use super::access::Caller;
use super::problem::{Answer, Problem};
use super::{Shared, asked, codings, ops, origin, publish, pull, ready, stream, subscriptions};

/// Every route of the interface.
pub(crate) fn router(shared: &Arc<Shared>) -> Router {
    let mut router = Router::new();
    for (path, methods) in routes() {
        router = router.route(path, methods);
    }
    router
        .fallback(ops::no_route)
        .method_not_allowed_fallback(ops::no_method)
        .layer(from_fn_with_state(Arc::clone(shared), guard))
        .with_state(Arc::clone(shared))
}

fn routes() -> Vec<(&'static str, MethodRouter<Arc<Shared>>)> {
    vec![
        ("/topics", get(ops::topics)),
        ("/topics/{name}", post(publish::publish)),
        ("/topics/{name}/stream", get(stream::stream)),
        ("/subscriptions", get(subscriptions::list)),
        ("/subscriptions/{name}", get(subscriptions::get).put(subscriptions::put).delete(subscriptions::delete)),
        ("/subscriptions/{name}/pause", post(subscriptions::pause)),
        ("/subscriptions/{name}/resume", post(subscriptions::resume)),
        ("/subscriptions/{name}/test", post(subscriptions::test)),
        ("/subscriptions/{name}/dead", get(subscriptions::dead).delete(subscriptions::purge_dead)),
        ("/subscriptions/{name}/backlog", delete(subscriptions::purge_backlog)),
        ("/subscriptions/{name}/redrive", post(subscriptions::redrive)),
        ("/subscriptions/{name}/attempts", get(subscriptions::attempts)),
        ("/subscriptions/{name}/pull", post(pull::pull)),
        ("/subscriptions/{name}/settle", post(pull::settle)),
        ("/consent/{name}", get(asked::consent).post(asked::consent).head(asked::no_head)),
        ("/healthz", get(ops::healthz)),
        ("/readyz", get(ready::readyz)),
        ("/metrics", get(ops::metrics)),
        ("/openapi.json", get(ops::openapi)),
    ]
}

/// Whether the answer waits for what may never come, so that who has closed his side of the connection is
/// taken for gone: what is written to him from now on would count as read.
pub(crate) fn waits(uri: &Uri) -> bool {
    let path = uri.path();
    path.ends_with("/stream") || path.ends_with("/pull") && uri.query().is_some_and(|query| query.contains("wait="))
}

/// Before every route: may this request be made from where it comes?
pub(crate) async fn check(shared: &Shared, request: Request) -> Answer<Request> {
    let (mut parts, body) = request.into_parts();
    if let Some(caller) = admit(shared, &parts).await? {
        parts.extensions.insert(caller);
    }
    Ok(Request::from_parts(parts, body))
}

async fn admit(shared: &Shared, parts: &Parts) -> Answer<Option<Caller>> {
    let options = shared.options.load();
    let max = shared.limits().uri_bytes;
    let length = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
    if length > max {
        let detail = format!("the path and query have {length} bytes, and {max} are the most");
        return Err(Problem::new(StatusCode::URI_TOO_LONG, ErrorKind::TooLarge, detail));
    }
    codings::check(&parts.headers)?;
    origin::check(options.is_development(), options.allowed_origins(), parts)?;
    if is_preflight(parts) {
        // A browser sends it without credentials; what it asks about is checked when it comes.
        return Ok(None);
    }
    shared.gate.admit(shared, parts.extensions.get(), &parts.method, &parts.uri, &parts.headers).await
}

/// A browser asks ahead whether a page may send a request.
fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS
        && parts.headers.contains_key(header::ORIGIN)
        && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let page = page(&shared, request.headers());
    let mut response = match check(&shared, request).await {
        Ok(request) => serve(request, next).await,
        Err(problem) => problem.into_response(),
    };
    shared.metrics.answered(&response);
    // A refusal as well: a page that cannot read that it shall log in, or wait, can do neither.
    if let Some(page) = page {
        origin::allow(page, response.headers_mut());
    }
    response
}

async fn serve(request: Request, next: Next) -> Response {
    let caller = Caller::of(request.extensions());
    let (parts, body) = request.into_parts();
    if is_preflight(&parts) {
        return origin::preflight(&parts.headers);
    }
    let mut response = next.run(Request::from_parts(parts, body)).await;
    if let Some(caller) = caller {
        caller.tell(response.headers_mut());
    }
    response
}

/// The answer to what is refused before it comes to the routes.
pub(crate) fn refuse(shared: &Shared, headers: &HeaderMap, problem: Problem) -> Response {
    let mut response = problem.into_response();
    shared.metrics.answered(&response);
    if let Some(page) = page(shared, headers) {
        origin::allow(page, response.headers_mut());
    }
    response
}

fn page(shared: &Shared, headers: &HeaderMap) -> Option<HeaderValue> {
    // Hardly a request is a page's.
    if !headers.contains_key(header::ORIGIN) {
        return None;
    }
    let options = shared.options.load();
    origin::page(options.is_development(), options.allowed_origins(), headers)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_openapi_document_has_every_route_and_no_other() {
        let document: serde_json::Value = serde_json::from_str(ops::OPENAPI).unwrap();
        let described: BTreeSet<_> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let served: BTreeSet<_> = routes().into_iter().map(|(path, _)| path).collect();
        assert_eq!(described, served);
    }
}
