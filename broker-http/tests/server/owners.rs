//! Whose a subscription is: its pushes end with the right of the identity that had them made, and lose nothing.

use std::collections::BTreeMap;
use std::path::Path;

use axum::Router;
use axum::routing::post;
use broker_http::{Access, Action, Identity, ServerOptions, SubscriptionSpec, TokenHash};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::support::{Reply, Running, soon};

/// An endpoint that takes everything, and what it was told.
struct Endpoint {
    spec: String,
    told: mpsc::UnboundedReceiver<String>,
}

impl Endpoint {
    async fn start() -> Self {
        let (tell, told) = mpsc::unbounded_channel();
        let app = Router::new().route("/hook", post(async move |body: String| drop(tell.send(body))));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let spec = format!(r#"{{"filter":"orders.>","endpoint":"http://{}/hook"}}"#, listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { spec, told }
    }

    async fn hears(&mut self, message: &str) {
        assert_eq!(soon(self.told.recv()).await.as_deref(), Some(message));
    }
}

fn who(name: &str, actions: impl IntoIterator<Item = Action>, topics: &str) -> Identity {
    Identity::new(name).unwrap().with_token(TokenHash::of(name)).allowing(actions, [topics.parse().unwrap()])
}

fn maker(topics: &str) -> Identity {
    who("maker", [Action::Subscribe, Action::Settle], topics)
}

/// An operator, somebody who sees, and others.
fn access<const N: usize>(others: [Identity; N]) -> Access {
    let ops = who("ops", [Action::Publish, Action::Admin], ">");
    let reader = who("reader", [Action::Subscribe, Action::Settle], "orders.>");
    Access::new([ops, reader].into_iter().chain(others)).unwrap()
}

fn kept(state: &Path, access: Access) -> ServerOptions {
    ServerOptions::new().with_state(state).with_access(access)
}

async fn ask(running: &Running, who: &str, request: &str, body: &str) -> Reply {
    running.send(request, &[("authorization", &format!("Bearer {who}"))], body).await
}

async fn publish(running: &Running, message: &str) {
    assert_eq!(ask(running, "ops", "POST /topics/orders.a", message).await.status, 202);
}

async fn view(running: &Running, who: &str) -> Value {
    let reply = ask(running, who, "GET /subscriptions/q", "").await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

/// Asserts that its pushes are held with this many messages waiting.
async fn is_held(running: &Running, lag: u64) {
    let view = view(running, "ops").await;
    assert_eq!((&view["status"]["state"], &view["status"]["lag"]), (&json!("unauthorized"), &json!(lag)), "{view}");
    let why = view["status"]["last_error"].as_str().unwrap();
    assert!(why.contains("PUT it as an identity that may") && !why.contains("maker"), "{why}");
    let metrics = ask(running, "ops", "GET /metrics", "").await.text();
    assert!(metrics.contains("broker_push_states{state=\"unauthorized\"} 1\n"), "{metrics}");
}

#[tokio::test]
async fn pushes_end_with_the_right_of_whoever_had_them_made_and_go_on_with_it() {
    let mut endpoint = Endpoint::start().await;
    let running = Running::with(ServerOptions::new().with_access(access([maker("orders.>")]))).await;
    let made = ask(&running, "maker", "PUT /subscriptions/q", &endpoint.spec).await;
    assert_eq!((made.status, &made.json()["owner"]), (201, &json!("maker")));
    publish(&running, "1").await;
    endpoint.hears("1").await;
    // Removed; and there with other rules.
    for (count, (without, said)) in [(access([]), "2"), (access([maker("other")]), "3")].into_iter().enumerate() {
        running.server.set_access(without);
        publish(&running, said).await;
        is_held(&running, 1).await;
        assert!(endpoint.told.is_empty(), "{count}");
        // No resuming lifts it, and no test of the old rules by who only sees it.
        assert_eq!(ask(&running, "ops", "POST /subscriptions/q/resume", "").await.status, 200);
        is_held(&running, 1).await;
        let tested = ask(&running, "ops", "POST /subscriptions/q/test", "").await;
        tested.is_problem(409, "PUT it as an identity that may");
        assert!(endpoint.told.is_empty(), "{count}: not even a test");
        running.server.set_access(access([maker("orders.>")]));
        endpoint.hears(said).await;
    }
    // Whose it is, is its owner's and the admins' business.
    assert_eq!(view(&running, "ops").await["owner"], "maker");
    assert_eq!(view(&running, "maker").await["owner"], "maker");
    assert_eq!(view(&running, "reader").await.get("owner"), None);
    let listed = ask(&running, "reader", "GET /subscriptions", "").await.json();
    assert_eq!(listed["subscriptions"][0].get("owner"), None, "{listed}");
}

#[tokio::test]
async fn another_takes_it_over_with_the_same_settings() {
    for takes in ["ops", "reader"] {
        let mut endpoint = Endpoint::start().await;
        let running = Running::with(ServerOptions::new().with_access(access([maker("orders.>")]))).await;
        assert_eq!(ask(&running, "maker", "PUT /subscriptions/q", &endpoint.spec).await.status, 201);
        running.server.set_access(access([]));
        publish(&running, "1").await;
        is_held(&running, 1).await;
        let taken = ask(&running, takes, "PUT /subscriptions/q", &endpoint.spec).await;
        assert_eq!((taken.status, &taken.json()["owner"]), (200, &json!(takes)));
        endpoint.hears("1").await;
        assert_eq!(view(&running, "ops").await["status"]["state"], "active");
    }
}

#[tokio::test]
async fn a_right_to_the_dead_letter_topic_it_names_belongs_to_it() {
    let endpoint = Endpoint::start().await;
    let publishes = |topics: &str| maker("orders.>").allowing([Action::Publish], [topics.parse().unwrap()]);
    let running = Running::with(ServerOptions::new().with_access(access([publishes("given.up")]))).await;
    let spec = endpoint.spec.replace('}', r#","dead_letter":"given.up"}"#);
    assert_eq!(ask(&running, "maker", "PUT /subscriptions/q", &spec).await.status, 201);
    running.server.set_access(access([publishes("other")]));
    is_held(&running, 0).await;
}

/// What a member says of its group counts while it stands: with its right, or with itself, its dead-letter topic goes.
#[tokio::test]
async fn a_group_keeps_no_dead_letter_topic_of_who_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let made = || maker("orders.>").allowing([Action::Publish], ["given.up".parse().unwrap()]);
    let running = Running::with(kept(&state, access([made()]))).await;
    let spec = r#"{"filter":"orders.>","group":"g","dead_letter":"given.up"}"#;
    assert_eq!(ask(&running, "maker", "PUT /subscriptions/a", spec).await.status, 201);
    let spec = r#"{"filter":"orders.>","group":"g"}"#;
    assert_eq!(ask(&running, "reader", "PUT /subscriptions/b", spec).await.status, 201);
    let goes_to = async |running: &Running, topic: &str| {
        soon(async {
            while ask(running, "ops", "GET /subscriptions/b", "").await.json()["dead_letter"] != topic {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    goes_to(&running, "given.up").await;
    running.server.set_access(access([]));
    goes_to(&running, "dead.g").await;
    // And so it is: a message that is given up is there.
    assert_eq!(ask(&running, "ops", "PUT /subscriptions/d", r#"{"filter":"dead.g"}"#).await.status, 201);
    publish(&running, "1").await;
    let pulled = ask(&running, "reader", "POST /subscriptions/b/pull?wait=20s", "").await.json();
    let settled = json!({"reject": [{"lease": pulled["deliveries"][0]["lease"], "reason": "no"}]}).to_string();
    assert_eq!(ask(&running, "reader", "POST /subscriptions/b/settle", &settled).await.status, 200);
    assert_eq!(ask(&running, "ops", "GET /subscriptions/d", "").await.json()["status"]["lag"], 1);
    // It comes back with the right, and goes with the subscription; a start knows both.
    running.server.set_access(access([made()]));
    goes_to(&running, "given.up").await;
    running.server.drain(std::time::Duration::from_secs(20)).await;
    let without = Running::with(kept(&state, access([]))).await;
    goes_to(&without, "dead.g").await;
    without.server.drain(std::time::Duration::from_secs(20)).await;
    let again = Running::with(kept(&state, access([made()]))).await;
    goes_to(&again, "given.up").await;
    assert_eq!(ask(&again, "ops", "DELETE /subscriptions/a", "").await.status, 204);
    goes_to(&again, "dead.g").await;
}

#[tokio::test]
async fn a_restart_knows_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let mut endpoint = Endpoint::start().await;
    let before = Running::with(kept(&state, access([maker("orders.>")]))).await;
    assert_eq!(ask(&before, "maker", "PUT /subscriptions/q", &endpoint.spec).await.status, 201);
    before.server.drain(std::time::Duration::from_secs(20)).await;
    let saved = std::fs::read_to_string(&state).unwrap();
    assert!(saved.contains(r#""owner":"maker","#), "{saved}");

    let after = Running::with(kept(&state, access([]))).await;
    publish(&after, "1").await;
    is_held(&after, 1).await;
    assert!(endpoint.told.is_empty());
    after.server.set_access(access([maker("orders.>")]));
    endpoint.hears("1").await;
    after.server.drain(std::time::Duration::from_secs(20)).await;

    // A file from before owners were kept: what stands in it is the operator's.
    std::fs::write(&state, saved.replace(r#""owner":"maker","#, "")).unwrap();
    let old = Running::with(kept(&state, access([]))).await;
    publish(&old, "2").await;
    endpoint.hears("2").await;
    assert_eq!(view(&old, "ops").await.get("owner"), None);
    old.server.drain(std::time::Duration::from_secs(20)).await;

    // So is what is declared, whoever made it before.
    std::fs::write(&state, &saved).unwrap();
    let spec = SubscriptionSpec::from_json(endpoint.spec.as_bytes()).unwrap();
    let declared = BTreeMap::from([("q".parse().unwrap(), spec)]);
    let declares = Running::with(kept(&state, access([])).with_subscriptions(declared)).await;
    publish(&declares, "3").await;
    endpoint.hears("3").await;
}

#[tokio::test]
async fn what_was_made_while_nobody_was_known_is_the_operators() {
    let mut endpoint = Endpoint::start().await;
    let running = Running::start().await;
    assert_eq!(running.put("q", &endpoint.spec).await.status, 201);
    running.server.set_access(access([]));
    publish(&running, "1").await;
    endpoint.hears("1").await;
    // And what is held goes on where nobody need be known any more.
    running.server.set_access(access([maker("orders.>")]));
    assert_eq!(ask(&running, "maker", "PUT /subscriptions/q", &endpoint.spec).await.status, 200);
    running.server.set_access(access([]));
    publish(&running, "2").await;
    is_held(&running, 1).await;
    running.server.set_access(Access::default());
    endpoint.hears("2").await;
}

#[tokio::test]
async fn who_asks_slowly_is_held_to_the_rules_of_now() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let running = Running::with(ServerOptions::new().with_access(access([maker("orders.>")]))).await;
    let spec = r#"{"filter":"orders.>"}"#;
    let mut slow = running.connect().await;
    let head = format!(
        "PUT /subscriptions/q HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer maker\r\nexpect: 100-continue\r\n\
        connection: close\r\ncontent-length: {}\r\n\r\n",
        spec.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    crate::support::read_until(&mut slow, "100 Continue\r\n\r\n").await;
    running.server.set_access(access([]));
    slow.write_all(spec.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(slow.read_to_end(&mut answer)).await.unwrap();
    Reply::parse(&answer).is_problem(401, "nobody here any more");
    assert_eq!(ask(&running, "ops", "GET /subscriptions/q", "").await.status, 404);
}
