//! Who may do what: identities, rules, failed attempts, rates.

use std::time::Duration;

use broker_http::{Access, Action, Identity, ServerOptions, TokenHash};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::support::{PATIENCE, Reply, Running, read_until, soon};

fn identity(name: &str) -> Identity {
    Identity::new(name).unwrap().with_token(TokenHash::of(name))
}

fn access() -> Access {
    let filter = |text: &str| text.parse().unwrap();
    Access::new([
        identity("shop").allowing([Action::Publish], [filter("orders.>"), filter("dead.orders")]),
        identity("billing")
            .allowing([Action::Subscribe, Action::Settle], [filter("orders.>")])
            .allowing([Action::Publish], [filter("dead.orders")]),
        identity("worker").allowing([Action::Settle], [filter("orders.>")]),
        identity("ops").allowing([Action::Admin], [filter(">")]),
        identity("nobody"),
    ])
    .unwrap()
}

async fn guarded() -> Running {
    Running::with(ServerOptions::new().with_access(access())).await
}

async fn ask(running: &Running, who: &str, request: &str, body: &str) -> Reply {
    let bearer = format!("Bearer {who}");
    let headers: &[_] = if who.is_empty() { &[] } else { &[("authorization", bearer.as_str())] };
    running.send(request, headers, body).await
}

#[tokio::test]
async fn each_may_do_what_its_rules_allow_and_nothing_else() {
    let running = guarded().await;
    let orders = r#"{"filter":"orders.>"}"#;
    for (who, request, body, status) in [
        ("", "GET /healthz", "", 200),
        ("", "GET /readyz", "", 200),
        ("", "GET /openapi.json", "", 200),
        ("", "POST /topics/orders.a", "x", 401),
        ("", "GET /metrics", "", 401),
        ("", "GET /nothing", "", 401),
        ("shop", "GET /nothing", "", 403),
        ("ops", "GET /nothing", "", 404),
        ("shop", "POST /topics/orders.a", "x", 202),
        ("shop", "POST /topics/orders", "x", 403),
        ("shop", "POST /topics/other.a", "x", 403),
        ("nobody", "POST /topics/orders.a", "x", 403),
        ("billing", "POST /topics/orders.a", "x", 403),
        ("shop", "PUT /subscriptions/q", orders, 403),
        ("worker", "PUT /subscriptions/q", orders, 403),
        ("billing", "PUT /subscriptions/q", r#"{"filter":">"}"#, 403),
        ("billing", "PUT /subscriptions/q", r#"{"filter":"orders.>","dead_letter":"other"}"#, 403),
        ("billing", "PUT /subscriptions/q", r#"{"filter":"orders.>","dead_letter":"dead.orders"}"#, 201),
        ("ops", "PUT /subscriptions/all", r#"{"filter":">"}"#, 201),
        ("billing", "GET /subscriptions/q", "", 200),
        ("billing", "GET /subscriptions/all", "", 404),
        ("billing", "GET /subscriptions/none", "", 404),
        ("shop", "GET /subscriptions/q", "", 403),
        ("billing", "POST /subscriptions/q/pause", "", 200),
        ("billing", "POST /subscriptions/q/resume", "", 200),
        ("billing", "GET /subscriptions/q/dead", "", 200),
        ("billing", "GET /subscriptions/q/attempts", "", 200),
        ("billing", "POST /subscriptions/q/redrive", "", 403),
        ("billing", "DELETE /subscriptions/q/backlog", "", 403),
        ("billing", "DELETE /subscriptions/q/dead", "", 403),
        ("ops", "POST /subscriptions/q/redrive", "", 202),
        ("ops", "DELETE /subscriptions/q/dead", "", 200),
        ("ops", "POST /subscriptions/q/pull", "", 403),
        ("worker", "POST /subscriptions/q/pull?wait=0s", "", 200),
        ("worker", "POST /subscriptions/q/settle", "{}", 200),
        ("worker", "POST /subscriptions/all/pull?wait=0s", "", 404),
        ("worker", "GET /subscriptions/q", "", 403),
        ("billing", "GET /metrics", "", 403),
        ("ops", "GET /metrics", "", 200),
        ("ops", "GET /topics", "", 200),
        ("shop", "GET /topics/orders.%3E/stream", "", 403),
        ("worker", "DELETE /subscriptions/q", "", 403),
        ("ops", "DELETE /subscriptions/q/backlog", "", 200),
        ("billing", "DELETE /subscriptions/q", "", 204),
    ] {
        let reply = ask(&running, who, request, body).await;
        assert_eq!(reply.status, status, "{who:?} {request}: {}", reply.text());
        match status {
            401 => assert_eq!(reply.header("www-authenticate"), Some("Bearer realm=\"broker-http\"")),
            403 => reply.is_problem(403, &format!("identity {who} may not")),
            _ => {}
        }
    }
    let listed = ask(&running, "billing", "GET /subscriptions", "").await.json();
    assert_eq!(listed["subscriptions"].as_array().unwrap().len(), 0, "what it may not see is not listed");
    let listed = ask(&running, "ops", "GET /subscriptions", "").await.json();
    assert_eq!(listed["subscriptions"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_takes_messages_out_of_a_group_takes_settle_as_well_as_subscribe() {
    let orders = || ["orders.>".parse().unwrap()];
    let all = [Action::Publish, Action::Subscribe, Action::Settle, Action::Admin];
    let access = Access::new([
        identity("ops").allowing(all, [">".parse().unwrap()]),
        identity("reader").allowing([Action::Subscribe], orders()),
        identity("worker").allowing([Action::Settle], orders()),
        identity("both").allowing([Action::Subscribe, Action::Settle], orders()),
        identity("admin").allowing([Action::Admin], orders()),
    ]);
    let running = Running::with(ServerOptions::new().with_access(access.unwrap())).await;
    assert_eq!(ask(&running, "ops", "PUT /subscriptions/q", r#"{"filter":"orders.>"}"#).await.status, 201);
    assert_eq!(ask(&running, "ops", "POST /topics/orders.a", "x").await.status, 202);
    let push = r#"{"filter":"orders.>","endpoint":"http://127.0.0.1:9/"}"#;
    let expires = r#"{"filter":"orders.>","expires":"1ms"}"#;
    let beside = r#"{"filter":"orders.>","group":"q"}"#;
    for (request, body) in [
        ("GET /topics/orders.%3E/stream?group=q", ""),
        ("GET /topics/orders.%3E/stream?gro%75p=q", ""),
        ("DELETE /subscriptions/q", ""),
        ("DELETE /subscriptions/q?keep=true", ""),
        ("PUT /subscriptions/q", push),
        ("PUT /subscriptions/q", expires),
        ("PUT /subscriptions/beside", beside),
    ] {
        ask(&running, "reader", request, body).await.is_problem(403, "identity reader may not settle");
        ask(&running, "worker", request, body).await.is_problem(403, "identity worker may not subscribe");
    }
    // It is all there, and a stream of one's own takes nothing of it.
    stream(&running, "reader").await;
    assert_eq!(ask(&running, "ops", "GET /subscriptions/q", "").await.json()["status"]["lag"], 1);
    for who in ["both", "admin"] {
        assert_eq!(ask(&running, who, "PUT /subscriptions/beside", beside).await.status, 201, "{who}");
        assert_eq!(ask(&running, who, "DELETE /subscriptions/beside", "").await.status, 204, "{who}");
    }
    let group = "GET /topics/orders.%3E/stream?group=q";
    ask(&running, "admin", group, "").await.is_problem(403, "identity admin may not settle");
    let mut reads = running.connect().await;
    let head = format!("{group} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer both\r\n\r\n");
    reads.write_all(head.as_bytes()).await.unwrap();
    read_until(&mut reads, "data: ").await;
}

#[tokio::test]
async fn what_somebody_may_not_see_is_answered_as_if_it_were_not_there() {
    let all = [Action::Publish, Action::Subscribe, Action::Settle, Action::Admin];
    let access = Access::new([
        identity("ops").allowing(all, [">".parse().unwrap()]),
        identity("own").allowing(all, ["own.>".parse().unwrap()]),
        identity("shop").allowing([Action::Publish], [">".parse().unwrap()]),
    ]);
    let running = Running::with(ServerOptions::new().with_access(access.unwrap())).await;
    for (name, filter) in [("a", "own.>"), ("hidden", "secret.>"), ("hidden2", "secret.>"), ("z", "own.>")] {
        let spec = format!(r#"{{"filter":"{filter}"}}"#);
        assert_eq!(ask(&running, "ops", &format!("PUT /subscriptions/{name}"), &spec).await.status, 201);
    }
    for (method, path, body) in [
        ("GET", "", ""),
        ("GET", "?x=1", ""),
        ("DELETE", "", ""),
        ("DELETE", "?keep=what", ""),
        ("PATCH", "", ""),
        ("POST", "/pause", ""),
        ("POST", "/resume", ""),
        ("POST", "/test", ""),
        ("GET", "/attempts", ""),
        ("GET", "/dead", ""),
        ("DELETE", "/dead", ""),
        ("DELETE", "/backlog", ""),
        ("POST", "/redrive", "{}"),
        ("POST", "/pull?wait=0s", ""),
        ("POST", "/pull?max=x", ""),
        ("POST", "/settle", "{"),
    ] {
        for (who, status) in [("own", 404), ("shop", 403)] {
            let [hidden, absent] = ["hidden", "absent"].map(|name| format!("{method} /subscriptions/{name}{path}"));
            let (hidden, absent) = (ask(&running, who, &hidden, body).await, ask(&running, who, &absent, body).await);
            assert_eq!(hidden.status, status, "{who} {method} {path}: {}", hidden.text());
            assert_eq!(hidden.status, absent.status);
            assert_eq!(hidden.text().replace("hidden", "absent"), absent.text());
        }
    }
    // That a name is taken cannot be hidden from who would take it; what has it, can.
    let taken = ask(&running, "own", "PUT /subscriptions/hidden", r#"{"filter":"own.>"}"#).await;
    taken.is_problem(409, "the name hidden is taken");
    assert!(!taken.text().contains("secret"), "{}", taken.text());
    // Pages are of what may be seen, and so is where the next begins.
    let mut listed = Vec::new();
    let mut next = String::new();
    for _ in 0..2 {
        let page = ask(&running, "own", &format!("GET /subscriptions?limit=1{next}"), "").await.json();
        assert_eq!(page["subscriptions"].as_array().unwrap().len(), 1, "{page}");
        listed.push(page["subscriptions"][0]["name"].clone());
        next = page["next"].as_str().map(|next| format!("&next={next}")).unwrap_or_default();
        assert!(!next.contains("hidden"), "{page}");
    }
    assert_eq!((listed, next.as_str()), (vec!["a".into(), "z".into()], ""));
}

#[tokio::test]
async fn the_default_dead_letter_topic_takes_no_right_to_publish() {
    let running = guarded().await;
    assert_eq!(ask(&running, "ops", "PUT /subscriptions/watch", r#"{"filter":"dead.>"}"#).await.status, 201);
    let made = ask(&running, "billing", "PUT /subscriptions/q", r#"{"filter":"orders.>"}"#).await;
    assert_eq!((made.status, made.json()["dead_letter"].as_str()), (201, Some("dead.q")));
    // Named, the same topic takes the right, and so does publishing there.
    let named = r#"{"filter":"orders.>","dead_letter":"dead.q"}"#;
    assert_eq!(ask(&running, "billing", "PUT /subscriptions/q", named).await.status, 403);
    assert_eq!(ask(&running, "billing", "POST /topics/dead.q", "x").await.status, 403);
    // What it rejects goes there all the same: a message of somebody who was allowed to publish it.
    assert_eq!(ask(&running, "shop", "POST /topics/orders.a", "x").await.status, 202);
    let pulled = ask(&running, "billing", "POST /subscriptions/q/pull?wait=20s", "").await.json();
    let settle = serde_json::json!({ "reject": [{ "lease": pulled["deliveries"][0]["lease"] }] }).to_string();
    assert_eq!(
        ask(&running, "billing", "POST /subscriptions/q/settle", &settle).await.json()["gone"],
        serde_json::json!([])
    );
    soon(async {
        while ask(&running, "ops", "GET /subscriptions/watch", "").await.json()["status"]["lag"] != 1 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn rules_change_without_a_restart() {
    let running = guarded().await;
    assert_eq!(ask(&running, "shop", "POST /topics/orders.a", "x").await.status, 202);
    let more = Identity::new("shop").unwrap().with_token(TokenHash::of("rotated"));
    let all = ">".parse().unwrap();
    running.server.set_access(Access::new([more.allowing([Action::Publish], [all])]).unwrap());
    assert_eq!(ask(&running, "shop", "POST /topics/orders.a", "x").await.status, 401);
    assert_eq!(ask(&running, "rotated", "POST /topics/other", "x").await.status, 202);
    running.server.set_access(Access::default());
    assert_eq!(ask(&running, "", "POST /topics/other", "x").await.status, 202);
}

#[tokio::test]
async fn failed_attempts_are_slowed_counted_and_bounded_and_others_are_served() {
    // The second is answered to whoever shows nothing, too.
    tokio::join!(guess_at("/topics"), guess_at("/readyz"));
}

async fn guess_at(path: &str) {
    let running = guarded().await;
    let guess = format!("GET {path}");
    let attempts = futures_util::future::join_all((0..30).map(|_| ask(&running, "wrong", &guess, "")));
    // A good token is not kept waiting by the bad ones of its neighbour.
    let served = async { ask(&running, "shop", "POST /topics/orders.a", "x").await.status };
    let (attempts, served) = tokio::join!(attempts, served);
    assert_eq!(served, 202);
    let refused = attempts.iter().filter(|reply| reply.status == 429).count();
    assert_eq!((refused, attempts.iter().filter(|reply| reply.status == 401).count()), (14, 16));
    assert!(attempts.iter().all(|reply| reply.status != 429 || reply.header("retry-after").is_some()));
    let metrics = ask(&running, "ops", "GET /metrics", "").await.text();
    assert!(metrics.lines().any(|line| line == "broker_refused_total{reason=\"attempts\"} 14"), "{metrics}");
    let unauthenticated = |count: u32| format!("broker_refused_total{{reason=\"unauthenticated\"}} {count}\n");
    assert!(metrics.contains(&unauthenticated(16)), "each counts once: {metrics}");
    // Who does not wait for the answer has failed, too.
    let mut left = running.connect().await;
    let head = format!("{guess} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer wrong\r\n\r\n");
    left.write_all(head.as_bytes()).await.unwrap();
    drop(left);
    soon(async {
        while !ask(&running, "ops", "GET /metrics", "").await.text().contains(&unauthenticated(17)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_rate_is_told_and_kept() {
    let limited = identity("shop").allowing([Action::Publish], [">".parse().unwrap()]).with_rate(0.01, 3);
    let free = identity("free").allowing([Action::Publish], [">".parse().unwrap()]);
    let running = Running::with(ServerOptions::new().with_access(Access::new([limited, free]).unwrap())).await;
    let reply = ask(&running, "shop", "POST /topics/a", "x").await;
    assert_eq!(reply.status, 202);
    assert_eq!(reply.header("ratelimit-policy"), Some("\"identity\";q=3;w=300"));
    assert!(reply.header("ratelimit").unwrap().starts_with("\"identity\";r=2;t="), "{reply:?}");
    // A batch counts by its messages, and may overdraw once.
    let lines = "{\"payload\":1}\n".repeat(5);
    let bearer = [("authorization", "Bearer shop"), ("content-type", "application/x-ndjson")];
    assert_eq!(running.send("POST /topics/a", &bearer, &lines).await.status, 202);
    let reply = ask(&running, "shop", "POST /topics/a", "x").await;
    reply.is_problem(429, "identity shop is over its 0.01 requests");
    let wait: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((300..=500).contains(&wait), "{wait}");
    assert!(reply.header("ratelimit").unwrap().starts_with("\"identity\";r=0;"), "{reply:?}");
    assert_eq!(ask(&running, "free", "POST /topics/a", "x").await.status, 202);
    // Rules that change fill no bucket; another rate begins anew.
    let with_burst =
        |burst| identity("shop").allowing([Action::Publish], ["a".parse().unwrap()]).with_rate(0.01, burst);
    let free = identity("free").allowing([Action::Publish], [">".parse().unwrap()]);
    running.server.set_access(Access::new([with_burst(3), free.clone()]).unwrap());
    assert_eq!(ask(&running, "shop", "POST /topics/a", "x").await.status, 429);
    running.server.set_access(Access::new([with_burst(4), free]).unwrap());
    assert_eq!(ask(&running, "shop", "POST /topics/a", "x").await.status, 202);
    assert_eq!(ask(&running, "free", "POST /topics/a", "x").await.header("ratelimit"), None);
}

/// Whether it is ready is everybody's; where its broker is, an admin's.
#[tokio::test]
async fn readiness_names_the_broker_to_admins_alone() {
    let running = guarded().await;
    for (who, named) in [("", false), ("shop", false), ("ops", true)] {
        let reply = ask(&running, who, "GET /readyz", "").await;
        assert_eq!((reply.status, reply.json()["status"].as_str()), (200, Some("ready")), "{who}");
        assert!(reply.json()["capabilities"].is_object());
        assert_eq!(reply.json().get("broker").is_some(), named, "{who}");
    }
    running.server.set_access(Access::default());
    assert!(ask(&running, "", "GET /readyz", "").await.json().get("broker").is_some(), "everybody is one");

    // Where nobody listens.
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let mut connectors = broker_core::Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    let broker = connectors.open(&format!("http://{free}")).unwrap();
    let running = Running::over(broker, ServerOptions::new().with_access(access())).await;
    for (who, named) in [("", false), ("shop", false), ("ops", true)] {
        let reply = ask(&running, who, "GET /readyz", "").await;
        reply.is_problem(503, if named { &free } else { "not ready: the broker is" });
        assert_eq!(reply.text().contains(&free), named, "{}", reply.text());
        assert_eq!(reply.json()["kind"], "unavailable");
    }
}

#[tokio::test]
async fn what_is_refused_tells_and_costs_of_the_rate() {
    let limited = identity("shop").allowing([Action::Publish], ["a".parse().unwrap()]).with_rate(100.0, 1_000);
    let mut limits = broker_http::Limits::default();
    limits.message_body_bytes = 50;
    let options = ServerOptions::new().with_access(Access::new([limited]).unwrap()).with_limits(limits);
    let running = Running::with(options).await;
    let left = |reply: &Reply| -> u64 {
        let text = reply.header("ratelimit").expect("a rate").to_owned();
        text.split("r=").nth(1).unwrap().split(';').next().unwrap().parse().unwrap()
    };
    for (request, status) in [("POST /topics/a", 202), ("POST /topics/b", 403), ("GET /metrics", 403)] {
        let reply = ask(&running, "shop", request, "x").await;
        assert_eq!((reply.status, reply.header("ratelimit-policy")), (status, Some("\"identity\";q=1000;w=10")));
    }
    // Lines that say nothing, and lines too long to be read.
    for line in ["nope", &"x".repeat(200)] {
        let before = left(&ask(&running, "shop", "POST /topics/a", "x").await);
        let accept = ("accept", "application/x-ndjson");
        let headers = [("authorization", "Bearer shop"), ("content-type", "application/x-ndjson"), accept];
        let reply = running.send("POST /topics/a", &headers, format!("{line}\n").repeat(300)).await;
        assert_eq!(reply.text().matches("\"error\"").count(), 300, "{}", reply.text());
        let after = left(&ask(&running, "shop", "POST /topics/a", "x").await);
        // It fills meanwhile.
        assert!(before - after > 100, "{line}: {before} {after}");
    }
}

#[tokio::test]
async fn an_attempt_under_way_ends_with_its_connection() {
    let running = guarded().await;
    for _ in 0..20 {
        let asking = ask(&running, "wrong", "GET /topics", "");
        let _ = tokio::time::timeout(Duration::from_millis(20), asking).await;
    }
    // Those that left hold no place: this one is slowed, not turned away.
    assert_eq!(soon(ask(&running, "wrong", "GET /topics", "")).await.status, 401);
}

async fn stream(running: &Running, who: &str) -> TcpStream {
    let mut stream = running.connect().await;
    let head =
        format!("GET /topics/orders.a/stream HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {who}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    read_until(&mut stream, ": connected").await;
    stream
}

/// What one identity has filled and nobody takes out leaves as much for others.
#[tokio::test]
async fn one_identity_leaves_topics_for_others() {
    let publishes = |name| identity(name).allowing([Action::Publish], [">".parse().unwrap()]);
    let ops = identity("ops").allowing([Action::Admin], [">".parse().unwrap()]);
    let access = Access::new([publishes("greedy"), publishes("late"), publishes("last"), ops]).unwrap();
    let mut limits = broker_http::Limits::default();
    limits.topics = 4;
    let running = Running::with(ServerOptions::new().with_access(access).with_limits(limits)).await;
    let publish = async |who, topic: &str| ask(&running, who, &format!("POST /topics/{topic}"), "x").await;
    // While nothing is held they are as many as one likes, one after another.
    for topic in 0..20 {
        assert_eq!(publish("greedy", &format!("passing.{topic}")).await.status, 202);
    }
    assert_eq!(ask(&running, "ops", "PUT /subscriptions/q", r#"{"filter":"held.>"}"#).await.status, 201);
    for topic in ["held.a", "held.b"] {
        assert_eq!(publish("greedy", topic).await.status, 202, "{topic}");
    }
    publish("greedy", "held.c").await.is_problem(429, "greedy has 2 of the 4 topics");
    assert_eq!(publish("greedy", "held.a").await.status, 202, "one that is in use");
    assert_eq!(publish("late", "held.c").await.status, 202);
    publish("late", "held.d").await.is_problem(429, "late has 1 of the 4 topics");
    assert_eq!(publish("last", "held.d").await.status, 202);
    for who in ["greedy", "late", "last"] {
        publish(who, "held.e").await.is_problem(429, "there are 4 topics with messages");
    }
    // What is taken out makes room for whoever comes.
    assert_eq!(ask(&running, "ops", "DELETE /subscriptions/q/backlog", "").await.status, 200);
    assert_eq!(publish("greedy", "held.e").await.status, 202);
}

#[tokio::test]
async fn one_identity_leaves_subscriptions_for_others() {
    let makes = |name| identity(name).allowing([Action::Subscribe, Action::Settle], [">".parse().unwrap()]);
    let access = Access::new([makes("greedy"), makes("late"), makes("last")]).unwrap();
    let mut limits = broker_http::Limits::default();
    limits.subscriptions = 4;
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let options = ServerOptions::new().with_access(access).with_limits(limits).with_state(&state);
    let running = Running::with(options.clone()).await;
    let made = async |running: &Running, who, name: &str| {
        ask(running, who, &format!("PUT /subscriptions/{name}"), r#"{"filter":"a"}"#).await
    };
    assert_eq!(made(&running, "greedy", "a").await.status, 201);
    assert_eq!(made(&running, "greedy", "b").await.status, 201);
    made(&running, "greedy", "c").await.is_problem(429, "greedy has 2 of the 4 subscriptions");
    assert_eq!(made(&running, "greedy", "b").await.status, 200, "it is there");
    // One made for a stream is one as well.
    ask(&running, "greedy", "GET /topics/a/stream?group=c", "").await.is_problem(429, "greedy has 2 of the 4");
    // Over a restart they are whose they were.
    assert!(running.server.drain(PATIENCE).await.complete);
    let running = Running::with(options).await;
    made(&running, "greedy", "c").await.is_problem(429, "greedy has 2 of the 4 subscriptions");
    assert_eq!(made(&running, "late", "c").await.status, 201);
    made(&running, "late", "d").await.is_problem(429, "late has 1 of the 4 subscriptions");
    assert_eq!(made(&running, "last", "d").await.status, 201);
    for who in ["greedy", "late", "last"] {
        made(&running, who, "e").await.is_problem(429, "there are 4 subscriptions, which is the most");
    }
    assert_eq!(ask(&running, "greedy", "DELETE /subscriptions/d", "").await.status, 204);
    assert_eq!(ask(&running, "greedy", "DELETE /subscriptions/b", "").await.status, 204);
    assert_eq!(made(&running, "greedy", "e").await.status, 201);
}

#[tokio::test]
async fn one_identity_leaves_leases_for_others() {
    let takes = |name| identity(name).allowing([Action::Settle], [">".parse().unwrap()]);
    let ops = identity("ops").allowing([Action::Publish, Action::Admin], [">".parse().unwrap()]);
    let access = Access::new([takes("greedy"), takes("late"), takes("last"), ops]).unwrap();
    let mut limits = broker_http::Limits::default();
    limits.leases = 4;
    let running = Running::with(ServerOptions::new().with_access(access).with_limits(limits)).await;
    assert_eq!(ask(&running, "ops", "PUT /subscriptions/q", r#"{"filter":"a"}"#).await.status, 201);
    for _ in 0..10 {
        assert_eq!(ask(&running, "ops", "POST /topics/a", "x").await.status, 202);
    }
    let pull = async |who| ask(&running, who, "POST /subscriptions/q/pull?max=10", "").await;
    let leases = |reply: &Reply| -> Vec<String> {
        let deliveries = reply.json()["deliveries"].as_array().unwrap().clone();
        deliveries.iter().map(|delivery| delivery["lease"].as_str().unwrap().to_owned()).collect()
    };
    let greedy = leases(&pull("greedy").await);
    assert_eq!(greedy.len(), 2);
    pull("greedy").await.is_problem(429, "greedy has 2 of the 4 leases");
    assert_eq!(leases(&pull("late").await).len(), 1);
    pull("late").await.is_problem(429, "late has 1 of the 4 leases");
    assert_eq!(leases(&pull("last").await).len(), 1);
    for who in ["greedy", "late", "last"] {
        pull(who).await.is_problem(429, "there are 4 leases");
    }
    // What is settled, by whomever, is its borrower's again to have.
    let acks = serde_json::json!({ "ack": greedy }).to_string();
    assert_eq!(ask(&running, "late", "POST /subscriptions/q/settle", &acks).await.status, 200);
    assert_eq!(leases(&pull("greedy").await).len(), 1);
    pull("late").await.is_problem(429, "late has 1 of the 4 leases");
}

#[tokio::test]
async fn one_identity_leaves_streams_for_others() {
    let reader = |name| identity(name).allowing([Action::Subscribe], ["orders.>".parse().unwrap()]);
    let access = Access::new([reader("greedy"), reader("late"), reader("last")]).unwrap();
    let mut limits = broker_http::Limits::default();
    limits.streams = 4;
    let running = Running::with(ServerOptions::new().with_access(access).with_limits(limits)).await;
    let mut greedy = [stream(&running, "greedy").await, stream(&running, "greedy").await];
    let another = async |who| ask(&running, who, "GET /topics/orders.a/stream", "").await;
    another("greedy").await.is_problem(429, "greedy has 2 of the 4 streams");
    let mut late = stream(&running, "late").await;
    another("late").await.is_problem(429, "late has 1 of the 4 streams");
    let mut last = stream(&running, "last").await;
    for who in ["greedy", "late", "last"] {
        another(who).await.is_problem(429, "there are 4 streams");
    }
    // What was refused holds nothing, and what has ended gives its place back.
    for ended in [&mut late, &mut last, &mut greedy[1]] {
        ended.shutdown().await.unwrap();
        ended.read_to_end(&mut Vec::new()).await.unwrap();
    }
    let _again = stream(&running, "greedy").await;
}

/// Whether it ended by itself: the last chunk is empty.
async fn has_ended(stream: &mut TcpStream) -> bool {
    read_until(stream, "0\r\n\r\n").await.ends_with("0\r\n\r\n")
}

#[tokio::test]
async fn a_stream_ends_when_its_token_or_its_rule_is_taken_away() {
    let all = || [Action::Publish, Action::Subscribe, Action::Settle];
    let orders = || ["orders.>".parse().unwrap()];
    let ops = || identity("ops").allowing([Action::Publish, Action::Admin], [">".parse().unwrap()]);
    let who = |token: &str, name: &str| Identity::new(name).unwrap().with_token(TokenHash::of(token));
    let access = Access::new([
        ops(),
        identity("stays").allowing(all(), orders()),
        identity("ruled").allowing(all(), orders()),
        who("revoked", "rotated").allowing(all(), orders()),
    ]);
    let running = Running::with(ServerOptions::new().with_access(access.unwrap())).await;
    let mut stays = stream(&running, "stays").await;
    let mut ended = [stream(&running, "ruled").await, stream(&running, "revoked").await];
    let mut sockets = Vec::new();
    for name in ["ruled", "revoked"] {
        let mut request = format!("ws://{}/topics/orders.a/stream", running.address).into_client_request().unwrap();
        request.headers_mut().insert("authorization", format!("Bearer {name}").parse().unwrap());
        sockets.push(soon(connect_async(request)).await.unwrap().0);
    }
    let mut lines = running.connect().await;
    let head = "POST /topics/orders.a HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer revoked\r\n\
        content-type: application/x-ndjson\r\naccept: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n\
        e\r\n{\"payload\":1}\n\r\n";
    lines.write_all(head.as_bytes()).await.unwrap();
    read_until(&mut lines, "\"id\"").await;
    assert_eq!(ask(&running, "ops", "POST /topics/orders.a", "x").await.json()["matched"], 5);

    let access = Access::new([
        ops(),
        identity("stays").allowing(all(), orders()),
        identity("ruled").allowing(all(), ["other".parse().unwrap()]),
        who("new", "rotated").allowing(all(), orders()),
    ]);
    running.server.set_access(access.unwrap());
    for stream in &mut ended {
        assert!(has_ended(stream).await);
    }
    for socket in &mut sockets {
        let frame = soon(async {
            loop {
                if let Message::Close(frame) = futures_util::StreamExt::next(socket).await.unwrap().unwrap() {
                    break frame.unwrap();
                }
            }
        });
        assert_eq!(u16::from(frame.await.code), 1008);
    }
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while !answer.ends_with(b"0\r\n\r\n") {
        let read = soon(lines.read(&mut piece)).await.unwrap();
        assert!(read > 0);
        answer.extend_from_slice(&piece[..read]);
    }
    assert!(String::from_utf8_lossy(&answer).contains("no longer allowed"));
    // Whoever still may reads on.
    soon(async {
        while ask(&running, "ops", "POST /topics/orders.a?id=last", "x").await.json()["matched"] != 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    read_until(&mut stays, "id: last").await;

    // So ends what nobody in particular opened, once somebody must be known; and what stands in an open
    // server goes on.
    running.server.set_access(Access::default());
    let mut anybody = running.connect().await;
    anybody.write_all(b"GET /topics/b/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    read_until(&mut anybody, ": connected").await;
    running.server.set_access(Access::new([ops()]).unwrap());
    assert!(has_ended(&mut anybody).await);
}
