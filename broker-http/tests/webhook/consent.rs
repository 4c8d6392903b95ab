//! The handshake by which an endpoint says that it wants pushes: both sides of it.

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use broker_http::webhook::{Pushed, Verifier, VerifyLayer};
use broker_http::{Access, Action, Identity, ServerOptions, TokenHash};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, json};

use crate::support::{Running, SECRET, header, send, serve};

async fn asking() -> Running {
    Running::start(ServerOptions::new().with_webhook_origin("broker.example").unwrap()).await
}

fn spec(endpoint: impl std::fmt::Display) -> Value {
    json!({"filter": "orders.>", "endpoint": format!("http://{endpoint}/hook")})
}

/// A service whose answer to `OPTIONS` has these headers.
async fn answering(headers: &'static [(&'static str, &'static str)]) -> std::net::SocketAddr {
    let options = async move || {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(name, value)| drop(map.insert(*name, value.parse().unwrap())));
        map
    };
    serve(Router::new().route("/hook", post(async || ()).options(options))).await
}

#[tokio::test]
async fn who_consents_is_subscribed_and_who_does_not_is_refused() {
    let running = asking().await;
    for (headers, allowed) in [
        (&[("webhook-allowed-origin", "broker.example")][..], true),
        (&[("webhook-allowed-origin", "*"), ("webhook-allowed-rate", "*")], true),
        (&[("allow", "POST")], false),
        (&[("webhook-allowed-origin", "other.example")], false),
        (&[("webhook-allowed-origin", "*"), ("webhook-allowed-rate", "many")], false),
    ] {
        let service = answering(headers).await;
        let (status, answer) = running.put("s", spec(service)).await;
        if allowed {
            assert_eq!(status, 201, "{headers:?}: {answer}");
            running.send(http::Method::DELETE, "/subscriptions/s", json!("")).await;
            continue;
        }
        assert_eq!((status, &answer["kind"]), (403, &json!("unauthorized")), "{headers:?}: {answer}");
        assert!(answer["detail"].as_str().unwrap().contains("WebHook-Allowed-Origin"), "{answer}");
        assert_eq!(running.send(http::Method::GET, "/subscriptions/s", json!("")).await.0, 404);
    }
}

#[tokio::test]
async fn a_refusal_is_no_consent_whatever_it_says_beside() {
    let running = asking().await;
    let options = async || (StatusCode::METHOD_NOT_ALLOWED, [("webhook-allowed-origin", "*")]);
    let service = serve(Router::new().route("/hook", post(async || ()).options(options))).await;
    let (status, answer) = running.put("s", spec(service)).await;
    assert_eq!((status, answer["detail"].as_str().unwrap().contains("OPTIONS with 405")), (403, true), "{answer}");
}

#[tokio::test]
async fn who_does_not_answer_is_told_apart() {
    let running = asking().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hanging = listener.local_addr().unwrap();
    let mut slow = spec(hanging);
    slow["timeout"] = json!("50ms");
    let (status, answer) = running.put("s", slow).await;
    assert_eq!((status, answer["detail"].as_str().unwrap().contains("no answer in time")), (502, true), "{answer}");
    drop(listener);
    let (status, answer) = running.put("s", spec(hanging)).await;
    assert_eq!((status, answer["detail"].as_str().unwrap().contains("refused")), (502, true), "{answer}");
}

#[tokio::test]
async fn the_rate_an_endpoint_allows_is_the_subscriptions() {
    let running = asking().await;
    let service = answering(&[("webhook-allowed-origin", "*"), ("webhook-allowed-rate", "120")]).await;
    let (status, view) = running.put("s", spec(service)).await;
    assert_eq!((status, &view["rate_limit"]), (201, &json!(2.0)));
    let mut slower = spec(service);
    slower["rate_limit"] = json!(0.5);
    assert_eq!(running.put("s", slower).await.1["rate_limit"], 0.5);
    let mut faster = spec(service);
    faster["rate_limit"] = json!(100);
    assert_eq!(running.put("s", faster.clone()).await.1["rate_limit"], 2.0);
    assert_eq!(running.put("s", faster).await, (200, running.put("s", spec(service)).await.1));
}

/// A service that answers `OPTIONS` without a word, and tells where it may consent.
async fn silent() -> (std::net::SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (tell, told) = tokio::sync::mpsc::unbounded_channel();
    let options = async move |headers: HeaderMap| {
        let _ = tell.send(headers["webhook-request-callback"].to_str().unwrap().to_owned());
    };
    (serve(Router::new().route("/hook", post(async || ()).options(options))).await, told)
}

const BASE: &str = "https://broker.example/below";

#[tokio::test]
async fn permission_may_come_later_by_callback() {
    let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
    let running = Running::start(options.with_webhook_callback(BASE).unwrap()).await;
    let (service, mut told) = silent().await;
    let get = async |path: &str| running.send(http::Method::GET, path, json!("")).await;
    for (method, rate, limit) in [(http::Method::GET, None, 5.0), (http::Method::POST, Some("120"), 2.0)] {
        let mut spec = spec(service);
        spec["rate_limit"] = json!(5);
        let (status, answer) = running.put("s", spec.clone()).await;
        assert_eq!((status, answer), (202, json!({"name": "s", "consent": "awaited"})));
        assert_eq!(get("/subscriptions/s").await.0, 404, "before it is asked for there is none");
        let old = told.recv().await.unwrap();
        // Asked again, the first key is worth nothing.
        assert_eq!(running.put("s", spec).await.0, 202);
        let url = told.recv().await.unwrap();
        let path = |url: &str| url.strip_prefix(BASE).unwrap().to_owned();
        assert!(path(&url).starts_with("/consent/s?key=") && url.len() > BASE.len() + 40, "{url}");
        for wrong in
            [path(&old), "/consent/s".to_owned(), path(&url).replace("/s?", "/t?"), path(&url)[..30].to_owned()]
        {
            assert_eq!(get(&wrong).await.0, 404, "{wrong}");
        }
        // Who only looks, as scanners of links do, consents to nothing.
        let look = Request::builder().method(http::Method::HEAD).uri(path(&url)).header("host", "localhost");
        let answer = send(running.address, look.body(Bytes::new()).unwrap()).await;
        assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(answer.headers()["allow"], "GET, POST");
        assert_eq!(get("/subscriptions/s").await.0, 404);
        let mut request = Request::builder().method(&method).uri(path(&url)).header("host", "localhost");
        if let Some(rate) = rate {
            request = request.header("WebHook-Allowed-Rate", rate);
        }
        let answer = send(running.address, request.body(Bytes::new()).unwrap()).await;
        assert_eq!(answer.status(), StatusCode::OK, "{method}");
        assert_eq!(get("/subscriptions/s").await.1["rate_limit"], limit);
        assert_eq!(get(&path(&url)).await.0, 404, "once");
        running.send(http::Method::DELETE, "/subscriptions/s", json!("")).await;
    }
    // Who answers is not waited for.
    let other = answering(&[("webhook-allowed-origin", "other.example")]).await;
    assert_eq!(running.put("s", spec(other)).await.0, 403);
    let consents = answering(&[("webhook-allowed-origin", "*")]).await;
    assert_eq!(running.put("s", spec(consents)).await.0, 201);
}

/// It answers the handshake only after it has consented at the callback.
#[tokio::test]
async fn permission_may_come_before_the_handshake_is_over() {
    let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
    let running = Running::start(options.with_webhook_callback(BASE).unwrap()).await;
    let address = running.address;
    let options = async move |headers: HeaderMap| {
        let path = headers["webhook-request-callback"].to_str().unwrap().strip_prefix(BASE).unwrap().to_owned();
        let request = Request::builder().uri(path).body(Bytes::new()).unwrap();
        assert_eq!(send(address, request).await.status(), StatusCode::OK);
    };
    let service = serve(Router::new().route("/hook", post(async || ()).options(options))).await;
    for _ in 0..2 {
        let (status, answer) = running.put("s", spec(service)).await;
        assert_eq!((status, answer), (202, json!({"name": "s", "consent": "awaited"})));
        assert_eq!(running.send(http::Method::GET, "/subscriptions/s", json!("")).await.0, 200, "it is made");
    }
}

/// An admin, somebody who may all that a subscription takes, and `maker` with these topics.
fn access(maker: Option<&str>) -> Access {
    let who = |name: &str, actions: &[Action], topics: &str| {
        let identity = Identity::new(name).unwrap().with_token(TokenHash::of(name));
        identity.allowing(actions.iter().copied(), [topics.parse().unwrap()])
    };
    let owns = [Action::Subscribe, Action::Settle];
    let others = [who("ops", &[Action::Admin], ">"), who("other", &owns, "orders.>")];
    Access::new(others.into_iter().chain(maker.map(|topics| who("maker", &owns, topics)))).unwrap()
}

async fn ask_as(running: &Running, who: &str, method: http::Method, path: &str, body: Value) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {who}"));
    let answer = send(running.address, request.body(Bytes::from(body.to_string())).unwrap()).await;
    (answer.status().as_u16(), serde_json::from_slice(answer.body()).unwrap_or_default())
}

/// Whatever becomes of the name or of who asked while it waits: it is not made.
#[tokio::test]
async fn permission_that_comes_late_counts_by_what_is_so_now() {
    const S: &str = "/subscriptions/s";
    let (service, mut told) = silent().await;
    let pulled = json!({"filter": "orders.>"});
    for (meanwhile, stands) in [
        ("the maker is removed", false),
        ("its rule is narrowed", false),
        ("another makes it", true),
        ("an admin makes it", true),
        ("it is made and deleted", false),
        ("another takes it over unchanged", true),
        ("it is deleted", false),
    ] {
        let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
        let options = options.with_webhook_callback(BASE).unwrap().with_access(access(Some("orders.>")));
        let running = Running::start(options).await;
        let ask = async |who, method, body: &Value| ask_as(&running, who, method, S, body.clone()).await.0;
        let stood = ["another takes it over unchanged", "it is deleted"].contains(&meanwhile);
        if stood {
            assert_eq!(ask("maker", http::Method::PUT, &pulled).await, 201);
        }
        assert_eq!(ask("maker", http::Method::PUT, &spec(service)).await, 202);
        match meanwhile {
            "the maker is removed" => running.server.set_access(access(None)),
            "its rule is narrowed" => running.server.set_access(access(Some("orders.a"))),
            "another makes it" => assert_eq!(ask("other", http::Method::PUT, &pulled).await, 201),
            "an admin makes it" => assert_eq!(ask("ops", http::Method::PUT, &pulled).await, 201),
            "another takes it over unchanged" => assert_eq!(ask("other", http::Method::PUT, &pulled).await, 200),
            _ => {
                if !stood {
                    assert_eq!(ask("other", http::Method::PUT, &pulled).await, 201);
                }
                assert_eq!(ask("other", http::Method::DELETE, &json!("")).await, 204);
            }
        }
        let before = ask_as(&running, "ops", http::Method::GET, S, json!("")).await;
        assert_eq!(before.0 == 200, stands, "{meanwhile}");
        let path = told.recv().await.unwrap().strip_prefix(BASE).unwrap().to_owned();
        let (status, answer) = running.send(http::Method::POST, &path, json!("")).await;
        assert_eq!(status, 410, "{meanwhile}: {answer}");
        let detail = answer["detail"].as_str().unwrap();
        assert!(["maker", "other", "ops"].iter().all(|name| !detail.contains(&format!(" {name} "))), "{detail}");
        assert_eq!(ask_as(&running, "ops", http::Method::GET, S, json!("")).await, before, "{meanwhile}");
        let groups = running.broker.status().await.unwrap().groups.len();
        assert_eq!(groups, usize::from(stands), "{meanwhile}: no group either");
        assert_eq!(running.send(http::Method::POST, &path, json!("")).await.0, 404, "{meanwhile}: said once");
    }
}

/// What waits can be taken back, by who may delete it.
#[tokio::test]
async fn what_waits_for_its_consent_can_be_deleted() {
    const S: &str = "/subscriptions/s";
    let (service, mut told) = silent().await;
    let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
    let who = |name: &str, actions: &[Action], topics: &str| {
        let identity = Identity::new(name).unwrap().with_token(TokenHash::of(name));
        identity.allowing(actions.iter().copied(), [topics.parse().unwrap()])
    };
    let owns = [Action::Subscribe, Action::Settle];
    let access = Access::new([
        who("maker", &owns, "orders.>"),
        who("reader", &owns[..1], "orders.>"),
        who("stranger", &owns, "other.>"),
    ]);
    let options = options.with_webhook_callback(BASE).unwrap().with_access(access.unwrap());
    let running = Running::start(options).await;
    let ask = async |who, method, body: &Value| ask_as(&running, who, method, S, body.clone()).await.0;
    assert_eq!(ask("maker", http::Method::DELETE, &json!("")).await, 404);
    assert_eq!(ask("maker", http::Method::PUT, &spec(service)).await, 202);
    // To who may not know of it there is none.
    assert_eq!(ask("stranger", http::Method::DELETE, &json!("")).await, 404);
    assert_eq!(ask("reader", http::Method::DELETE, &json!("")).await, 403);
    assert_eq!(ask("maker", http::Method::DELETE, &json!("")).await, 204);
    assert_eq!(ask("maker", http::Method::DELETE, &json!("")).await, 404, "it waits no more");
    let path = told.recv().await.unwrap().strip_prefix(BASE).unwrap().to_owned();
    assert_eq!(running.send(http::Method::POST, &path, json!("")).await.0, 410);
    assert_eq!(ask("maker", http::Method::GET, &json!("")).await, 404);
    // Asked for anew, it waits anew.
    assert_eq!(ask("maker", http::Method::PUT, &spec(service)).await, 202);
    let path = told.recv().await.unwrap().strip_prefix(BASE).unwrap().to_owned();
    assert_eq!(running.send(http::Method::POST, &path, json!("")).await.0, 200);
    assert_eq!(ask("maker", http::Method::GET, &json!("")).await, 200);
}

/// The request that makes it waits, too, while the endpoint thinks.
#[tokio::test]
async fn deleted_while_its_endpoint_is_asked_it_is_not_made() {
    let (asked, mut was_asked) = tokio::sync::mpsc::unbounded_channel();
    let options = async move || {
        asked.send(()).unwrap();
        std::future::pending::<()>().await;
    };
    let service = serve(Router::new().route("/hook", post(async || ()).options(options))).await;
    let running = asking().await;
    let deletes = async {
        was_asked.recv().await.unwrap();
        running.send(http::Method::DELETE, "/subscriptions/s", json!("")).await.0
    };
    let ((status, answer), deleted) = tokio::join!(running.put("s", spec(service)), deletes);
    assert_eq!((status, deleted), (409, 204), "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("deleted while"), "{answer}");
    assert_eq!(running.send(http::Method::GET, "/subscriptions/s", json!("")).await.0, 404);
}

/// The rules change while the endpoint thinks.
#[tokio::test]
async fn a_yes_that_takes_long_counts_by_the_rules_of_now() {
    let (asked, mut was_asked) = tokio::sync::mpsc::unbounded_channel();
    let (say, said) = tokio::sync::watch::channel(false);
    let options = async move || {
        asked.send(()).unwrap();
        said.clone().wait_for(|said| *said).await.unwrap();
        [("webhook-allowed-origin", "*")]
    };
    let service = serve(Router::new().route("/hook", post(async || ()).options(options))).await;
    let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
    let running = Running::start(options.with_access(access(Some("orders.>")))).await;
    let removes = async {
        was_asked.recv().await.unwrap();
        running.server.set_access(access(None));
        say.send(true).unwrap();
    };
    let put = ask_as(&running, "maker", http::Method::PUT, "/subscriptions/s", spec(service));
    let ((status, answer), ()) = tokio::join!(put, removes);
    assert_eq!(status, 401, "{answer}");
    assert_eq!(ask_as(&running, "ops", http::Method::GET, "/subscriptions/s", json!("")).await.0, 404);
}

/// An older request whose endpoint refuses late takes nothing from the newer one that waits.
#[tokio::test]
async fn a_late_refusal_leaves_what_waits_since() {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (say, said) = tokio::sync::watch::channel(false);
    let (asked, mut was_asked) = tokio::sync::mpsc::unbounded_channel();
    let first = async move || {
        asked.send(()).unwrap();
        said.clone().wait_for(|said| *said).await.unwrap();
        [("webhook-allowed-origin", "other.example")]
    };
    let then = async move |headers: HeaderMap| {
        let _ = tell.send(headers["webhook-request-callback"].to_str().unwrap().to_owned());
    };
    let older = serve(Router::new().route("/hook", post(async || ()).options(first))).await;
    let newer = serve(Router::new().route("/hook", post(async || ()).options(then))).await;
    let options = ServerOptions::new().with_webhook_origin("broker.example").unwrap();
    let running = Running::start(options.with_webhook_callback(BASE).unwrap()).await;
    let path = async {
        was_asked.recv().await.unwrap();
        assert_eq!(running.put("s", spec(newer)).await.0, 202);
        say.send(true).unwrap();
        told.recv().await.unwrap().strip_prefix(BASE).unwrap().to_owned()
    };
    let ((status, _), path) = tokio::join!(running.put("s", spec(older)), path);
    assert_eq!(status, 403);
    assert_eq!(running.send(http::Method::POST, &path, json!("")).await.0, 200);
}

#[tokio::test]
async fn our_own_receivers_consent_to_whom_they_know() {
    let running = asking().await;
    for (origins, status) in
        [(&["broker.example"][..], 201), (&["other.example", "*"], 201), (&["other.example"], 403), (&[], 403)]
    {
        let verifier = Verifier::new(SECRET).unwrap().with_allowed_origins(origins.iter().copied());
        let consent = async |State(verifier): State<Verifier>, headers: HeaderMap| verifier.consent(&headers);
        let extractor =
            Router::new().route("/hook", post(async |_: Pushed| ()).options(consent)).with_state(verifier.clone());
        let layer = Router::new().route("/hook", post(async || ())).layer(VerifyLayer::new(verifier));
        for app in [extractor, layer] {
            let service = serve(app).await;
            let mut spec = spec(service);
            spec["rate_limit"] = json!(10);
            assert_eq!(running.put("s", spec).await.0, status, "{origins:?}");
            running.send(http::Method::DELETE, "/subscriptions/s", json!("")).await;
        }
    }
}

#[tokio::test]
async fn consent_says_what_the_standard_asks_for() {
    let verifier = Verifier::new(SECRET).unwrap().with_allowed_origins(["broker.example"]);
    let service = serve(Router::new().route("/hook", post(async || ())).layer(VerifyLayer::new(verifier))).await;
    let ask = |origin: &str, rate: Option<&str>| {
        let mut request = Request::options("/hook").header("WebHook-Request-Origin", origin);
        if let Some(rate) = rate {
            request = request.header("WebHook-Request-Rate", rate);
        }
        send(service, request.body(Bytes::new()).unwrap())
    };
    let answer = ask("Broker.Example", Some("120")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let said = |name| header(answer.headers(), name);
    assert_eq!(said("webhook-allowed-origin"), Some("Broker.Example"));
    assert_eq!((said("webhook-allowed-rate"), said("allow")), (Some("*"), Some("POST")));
    let answer = ask("other.example", None).await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    assert!(header(answer.headers(), "webhook-allowed-origin").is_none());
}
