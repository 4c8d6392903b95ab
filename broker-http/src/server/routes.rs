//! The table of routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use http::{Method, header};

use super::problem::Answer;
use super::{Shared, body, ops, origin, publish, pull, stream, subscriptions};

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
        ("/healthz", get(ops::healthz)),
        ("/readyz", get(ops::readyz)),
        ("/metrics", get(ops::metrics)),
        ("/openapi.json", get(ops::openapi)),
    ]
}

/// Before every route: may this request be made from where it comes?
pub(crate) async fn check(shared: &Shared, request: Request) -> Answer<Request> {
    let options = &shared.options;
    match origin::check(options.is_development(), options.allowed_origins(), request.uri(), request.headers()) {
        Ok(()) => Ok(request),
        Err(problem) => {
            let (parts, body) = request.into_parts();
            Err(body::refuse(&parts.headers, body, shared.limits(), problem).await)
        }
    }
}

async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let request = match check(&shared, request).await {
        Ok(request) => request,
        Err(problem) => return problem.into_response(),
    };
    // From here on a web page is one that may: its browser is told so.
    let asks = origin.is_some() && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match request.method() {
        &Method::OPTIONS if asks => origin::preflight(request.headers()),
        _ => next.run(request).await,
    };
    if let Some(origin) = origin {
        origin::allow(origin, response.headers_mut());
    }
    response
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
