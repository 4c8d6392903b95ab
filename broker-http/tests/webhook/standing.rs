//! Subscriptions that stand without their endpoint's consent: nothing is pushed before it is given.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::routing::post;
use broker_core::{BrokerExt, Message, Topic};
use broker_http::{ServerOptions, SubscriptionSpec};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::support::{Running, send, serve, soon};

/// A service that consents to whom it is told to.
struct Service {
    address: SocketAddr,
    says: Arc<Mutex<Says>>,
    asked: Arc<AtomicUsize>,
    told: mpsc::UnboundedReceiver<HeaderMap>,
    pushed: mpsc::UnboundedReceiver<Bytes>,
}

#[derive(Default)]
struct Says {
    origin: Option<&'static str>,
    rate: Option<&'static str>,
}

impl Service {
    async fn start() -> Self {
        let (says, asked) = (Arc::<Mutex<Says>>::default(), Arc::<AtomicUsize>::default());
        let ((tell, told), (push, pushed)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let options = {
            let (says, asked) = (Arc::clone(&says), Arc::clone(&asked));
            async move |headers: HeaderMap| {
                asked.fetch_add(1, Ordering::SeqCst);
                let mut answer = HeaderMap::new();
                let says = says.lock();
                says.origin.map(|origin| answer.insert("webhook-allowed-origin", origin.parse().unwrap()));
                says.rate.map(|rate| answer.insert("webhook-allowed-rate", rate.parse().unwrap()));
                let _ = tell.send(headers);
                answer
            }
        };
        let hook = post(async move |body: Bytes| drop(push.send(body))).options(options);
        Self { address: serve(Router::new().route("/hook", hook)).await, says, asked, told, pushed }
    }

    fn spec(&self) -> Value {
        json!({"filter": "orders", "endpoint": format!("http://{}/hook", self.address)})
    }

    fn consents_to(&self, origin: &'static str, rate: Option<&'static str>) {
        *self.says.lock() = Says { origin: Some(origin), rate };
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn pushed(&mut self) -> Bytes {
        soon(self.pushed.recv()).await.unwrap()
    }
}

fn keeping(state: &Path) -> ServerOptions {
    ServerOptions::new().with_state(state)
}

fn asking(options: ServerOptions) -> ServerOptions {
    options.with_webhook_origin("broker.example").unwrap()
}

async fn publish(running: &Running, payload: &'static str) {
    running.broker.publish(&Topic::new("orders").unwrap(), Message::new(payload)).await.unwrap();
}

async fn get(running: &Running) -> Value {
    let (status, view) = running.send(Method::GET, "/subscriptions/s", json!("")).await;
    assert_eq!(status, 200);
    view
}

/// Waits until the subscription is in this state.
async fn becomes(running: &Running, state: &str) -> Value {
    soon(async {
        loop {
            let view = get(running).await;
            if view["status"]["state"] == state {
                return view;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await
}

fn development() -> ServerOptions {
    ServerOptions::new().with_development(true)
}

#[tokio::test]
async fn who_was_never_asked_is_asked_after_a_restart_and_pushes_wait() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let mut service = Service::start().await;
    let running = Running::start(keeping(&state)).await;
    assert_eq!(running.put("s", service.spec()).await.0, 201);
    publish(&running, "not asked").await;
    assert_eq!(service.pushed().await, "not asked");
    assert_eq!(service.asked(), 0);
    drop(running);

    let running = Running::start(asking(keeping(&state))).await;
    let told = soon(service.told.recv()).await.unwrap();
    assert_eq!(told["webhook-request-origin"], "broker.example");
    publish(&running, "waits").await;
    let error = soon(async {
        loop {
            let view = get(&running).await;
            assert_eq!(view["status"]["state"], "unconsented");
            if let Some(error) = view["status"]["last_error"].as_str() {
                return error.to_owned();
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(error.contains("WebHook-Allowed-Origin"), "{error}");
    let (status, answer) = running.send(Method::POST, "/subscriptions/s/test", json!("")).await;
    assert_eq!((status, answer["detail"].as_str().unwrap().contains("not consented")), (409, true), "{answer}");
    let metrics = send(running.address, Request::get("/metrics").body(Bytes::new()).unwrap()).await;
    let metrics = String::from_utf8(metrics.body().to_vec()).unwrap();
    assert!(metrics.contains("broker_push_states{state=\"unconsented\"} 1"), "{metrics}");
    assert_eq!(get(&running).await["status"]["lag"], 1);
    assert!(service.pushed.try_recv().is_err());

    // Asked again by itself, it consents.
    service.consents_to("broker.example", None);
    assert_eq!(service.pushed().await, "waits");
    becomes(&running, "active").await;
    let asked = service.asked();
    soon(async {
        while !std::fs::read_to_string(&state).unwrap().contains(r#""consent":{"origin":"broker.example"}"#) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(running);

    // And is not asked a second time.
    let running = Running::start(asking(keeping(&state))).await;
    becomes(&running, "active").await;
    publish(&running, "consented").await;
    assert_eq!(service.pushed().await, "consented");
    assert_eq!(service.asked(), asked);
    drop(running);

    // In another name it is.
    let running = Running::start(keeping(&state).with_webhook_origin("other.example").unwrap()).await;
    becomes(&running, "unconsented").await;
}

#[tokio::test]
async fn consent_given_when_it_was_made_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let mut service = Service::start().await;
    service.consents_to("*", Some("60"));
    let running = Running::start(asking(keeping(&state))).await;
    assert_eq!(running.put("s", service.spec()).await.0, 201);
    drop(running);
    let running = Running::start(asking(keeping(&state))).await;
    publish(&running, "kept").await;
    assert_eq!(service.pushed().await, "kept");
    let view = get(&running).await;
    assert_eq!((&view["rate_limit"], &view["status"]["state"], service.asked()), (&json!(1.0), &json!("active"), 1));
}

#[tokio::test]
async fn switched_on_at_work_it_holds_what_stands() {
    let mut service = Service::start().await;
    let running = Running::start(ServerOptions::new()).await;
    assert_eq!(running.put("s", service.spec()).await.0, 201);
    publish(&running, "before").await;
    assert_eq!(service.pushed().await, "before");
    running.server.set_options(asking(development()));
    publish(&running, "after").await;
    becomes(&running, "unconsented").await;
    // An operator who has put it right need not wait.
    service.consents_to("Broker.Example", Some("120"));
    assert_eq!(running.send(Method::POST, "/subscriptions/s/resume", json!("")).await.0, 200);
    assert_eq!(service.pushed().await, "after");
    assert_eq!(becomes(&running, "active").await["rate_limit"], 2.0);
    // Options that ask the same ask nobody; without an origin nobody needs to consent.
    let asked = service.asked();
    running.server.set_options(asking(development()));
    assert_eq!((get(&running).await["status"]["state"].as_str(), service.asked()), (Some("active"), asked));
    running.server.set_options(development().with_webhook_origin("other.example").unwrap());
    assert_eq!(get(&running).await["status"]["state"], "unconsented");
    running.server.set_options(development());
    assert_eq!(get(&running).await["status"]["state"], "active");
}

#[tokio::test]
async fn what_is_declared_is_asked_too() {
    let mut service = Service::start().await;
    let spec = SubscriptionSpec::from_json(service.spec().to_string().as_bytes()).unwrap();
    let declared = BTreeMap::from([("s".parse().unwrap(), spec)]);
    let options = asking(ServerOptions::new()).with_subscriptions(declared.clone());
    let running = Running::start(options).await;
    publish(&running, "waits").await;
    becomes(&running, "unconsented").await;
    assert!(service.pushed.try_recv().is_err());
    service.consents_to("broker.example", Some("600"));
    assert_eq!(service.pushed().await, "waits");
    let asked = service.asked();
    // Declared again it keeps what its endpoint said; with another endpoint it does not.
    running.server.set_subscriptions(&declared).await.unwrap();
    let view = get(&running).await;
    assert_eq!((&view["rate_limit"], &view["status"]["state"]), (&json!(10.0), &json!("active")));
    assert_eq!(service.asked(), asked);
    let other = Service::start().await;
    let spec = SubscriptionSpec::from_json(other.spec().to_string().as_bytes()).unwrap();
    running.server.set_subscriptions(&BTreeMap::from([("s".parse().unwrap(), spec)])).await.unwrap();
    becomes(&running, "unconsented").await;
}

#[tokio::test]
async fn what_stands_may_be_permitted_by_callback() {
    let mut service = Service::start().await;
    let running = Running::start(ServerOptions::new()).await;
    assert_eq!(running.put("s", service.spec()).await.0, 201);
    running.server.set_options(asking(development()).with_webhook_callback("http://broker.example").unwrap());
    publish(&running, "waits").await;
    let told = soon(service.told.recv()).await.unwrap();
    let url = told["webhook-request-callback"].to_str().unwrap().to_owned();
    becomes(&running, "unconsented").await;
    let path = url.strip_prefix("http://broker.example").unwrap();
    let request = Request::post(path).header("webhook-allowed-rate", "300").body(Bytes::new()).unwrap();
    assert_eq!(send(running.address, request).await.status(), StatusCode::OK);
    assert_eq!(service.pushed().await, "waits");
    assert_eq!(becomes(&running, "active").await["rate_limit"], 5.0);
}

#[tokio::test]
async fn a_file_from_before_this_was_kept_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let mut service = Service::start().await;
    let kept = json!({"version": 1, "subscriptions": [{"name": "s", "spec": service.spec()}]});
    std::fs::write(&state, kept.to_string()).unwrap();
    let running = Running::start(keeping(&state)).await;
    becomes(&running, "active").await;
    publish(&running, "kept").await;
    assert_eq!(service.pushed().await, "kept");
}
