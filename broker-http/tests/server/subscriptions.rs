//! `/subscriptions` and what hangs on them.

use serde_json::{Value, json};

use crate::support::Running;

#[tokio::test]
async fn a_subscription_is_made_shown_replaced_and_deleted() {
    let running = Running::start().await;
    let made = running.put("billing", r#"{"filter":"orders.>"}"#).await;
    assert_eq!(made.status, 201);
    let shown = running.get("/subscriptions/billing").await.json();
    for (field, value) in [
        ("name", json!("billing")),
        ("group", json!("billing")),
        ("start", json!("new")),
        ("mode", json!("binary")),
        ("batch", json!({"max": 100, "wait": "10ms"})),
        ("ordered", json!(false)),
        ("max_in_flight", json!(64)),
        ("timeout", json!("10s")),
        ("retry", json!({"max_attempts": 20, "initial": "1s", "max": "10m", "multiplier": 2.0})),
        ("backlog", json!({"max_messages": 1_000_000, "max_bytes": 268_435_456, "overflow": "reject"})),
        ("dead_letter", json!("dead.billing")),
    ] {
        assert_eq!(shown[field], value, "{field}");
    }
    for (field, value) in [
        ("lag", json!(0)),
        ("in_flight", json!(0)),
        ("state", json!("active")),
        ("last_error", Value::Null),
        ("last_success", Value::Null),
    ] {
        assert_eq!(shown["status"][field], value, "{field}");
    }

    assert_eq!(running.put("billing", r#"{"filter":"orders.>"}"#).await.status, 200);
    let replaced = running.put("billing", r#"{"filter":"orders.>","timeout":"1s","retry":{"max_attempts":3}}"#).await;
    assert_eq!((replaced.status, &replaced.json()["retry"]["max_attempts"]), (200, &json!(3)));
    running.put("billing", r#"{"filter":"orders.*"}"#).await.is_problem(409, "filter of subscription billing");
    running
        .put("billing", r#"{"filter":"orders.>","group":"x"}"#)
        .await
        .is_problem(409, "group of subscription billing");
    running
        .put("billing", r#"{"filter":"orders.>","start":"earliest"}"#)
        .await
        .is_problem(409, "start of subscription");

    let gone = running.delete("/subscriptions/billing").await;
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    running.get("/subscriptions/billing").await.is_problem(404, "billing");
    running.delete("/subscriptions/billing").await.is_problem(404, "billing");
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let running = Running::start().await;
    for (body, detail) in [
        ("", "subscription"),
        ("[]", "subscription"),
        ("{}", "filter"),
        (r#"{"filter":"a.>.b"}"#, "filter"),
        (r#"{"filter":"a","colour":"red"}"#, "colour"),
        (r#"{"filter":"a","max_in_flight":0}"#, "max_in_flight"),
        (r#"{"filter":"a","timeout":"-1s"}"#, "timeout"),
        (r#"{"filter":"a","endpoint":"http://user:secret@127.0.0.1/"}"#, "user information"),
        (r#"{"filter":"a","endpoint":"gopher://x"}"#, "http nor https"),
        (r#"{"filter":"a","retry":{"max_attempts":0}}"#, "max_attempts"),
        (r#"{"filter":"a","filters":[{"exact":{}}]}"#, "exact"),
        (r#"{"filter":"a","dead_letter":"broker-x"}"#, "dead_letter"),
    ] {
        let reply = running.put("a", body).await;
        reply.is_problem(400, detail);
        assert!(!reply.text().contains("secret"), "{}", reply.text());
    }
    running.put("a@b", r#"{"filter":"a"}"#).await.is_problem(400, "group name");
    running.put(&"x".repeat(129), r#"{"filter":"a"}"#).await.is_problem(400, "129 bytes");
    running.get("/subscriptions/none").await.is_problem(404, "none");
    running.get("/subscriptions?colour=red").await.is_problem(400, "colour");
    running.get("/subscriptions?limit=0").await.is_problem(400, "limit");
    running.delete("/subscriptions/a?keep=maybe").await.is_problem(400, "keep");
    for path in ["pause", "resume", "test", "pull", "redrive", "settle"] {
        running.post(&format!("/subscriptions/none/{path}"), "{}").await.is_problem(404, "none");
    }
}

/// What every request may meet before anybody looks at what it asks for.
#[tokio::test]
async fn the_document_tells_what_every_request_may_be_answered() {
    let running = Running::start().await;
    let document = running.get("/openapi.json").await.json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
            for status in ["403", "408", "414", "429", "431", "503"] {
                assert!(operation["responses"][status].is_object(), "{method} {path}: {status}");
            }
        }
    }
}

#[tokio::test]
async fn other_methods_and_paths_are_problems_too() {
    let running = Running::start().await;
    running.get("/").await.is_problem(404, "openapi.json");
    running.get("/subscriptions/a/b/c").await.is_problem(404, "nothing");
    let reply = running.send("PATCH /subscriptions/a", &[], "").await;
    reply.is_problem(405, "PATCH");
    let allowed = reply.header("allow").unwrap();
    assert!(["GET", "PUT", "DELETE"].iter().all(|method| allowed.contains(method)), "{allowed}");
    assert_eq!(running.get("/healthz").await.status, 200);
    assert_eq!(running.get("/readyz").await.status, 200);
    assert_eq!(running.get("/openapi.json").await.json()["openapi"], "3.1.0");
}

#[tokio::test]
async fn secrets_are_never_read_back() {
    let running = Running::start().await;
    let spec = r#"{"filter":"a","headers":{"x-api-key":"hunter2"},
        "signing":{"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw","previous":"whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"}}"#;
    for reply in
        [running.put("a", spec).await, running.get("/subscriptions/a").await, running.get("/subscriptions").await]
    {
        let text = reply.text();
        assert!(!text.contains("hunter2") && !text.contains("MfKQ") && !text.contains("C2FV"), "{text}");
        assert!(text.contains("x-api-key"), "{text}");
    }
    // What is shown is not taken for the secret.
    running.put("a", r#"{"filter":"a","headers":{"x-api-key":"***"}}"#).await.is_problem(400, "x-api-key");
}

#[tokio::test]
async fn subscriptions_share_a_group_until_the_last_one_goes() {
    let running = Running::start().await;
    running.put("one", r#"{"filter":"a","group":"shared","retry":{"max_attempts":5}}"#).await;
    assert_eq!(running.put("two", r#"{"filter":"a","group":"shared"}"#).await.json()["retry"]["max_attempts"], 5);
    running
        .put("three", r#"{"filter":"a","group":"shared","retry":{"max_attempts":6}}"#)
        .await
        .is_problem(409, "retry");
    assert_eq!(running.post("/topics/a", "1").await.json()["matched"], 1);
    assert_eq!(running.delete("/subscriptions/one").await.status, 204);
    assert_eq!(running.get("/subscriptions/two").await.json()["status"]["lag"], 1);

    // Kept: the backlog waits for the next subscription of the group.
    assert_eq!(running.delete("/subscriptions/two?keep=true").await.status, 204);
    running.post("/topics/a", "2").await;
    running.put("two", r#"{"filter":"a","group":"shared"}"#).await;
    assert_eq!(running.pull("two", "").await.len(), 2);
    // Not kept: it is gone with the last.
    assert_eq!(running.delete("/subscriptions/two").await.status, 204);
    assert_eq!(running.post("/topics/a", "3").await.json()["matched"], 0);
}

#[tokio::test]
async fn two_subscriptions_without_a_group_are_two_groups() {
    let running = Running::start().await;
    running.put("one", r#"{"filter":"a"}"#).await;
    running.put("two", r#"{"filter":"a"}"#).await;
    assert_eq!(running.post("/topics/a", "1").await.json()["matched"], 2);
}

#[tokio::test]
async fn subscriptions_are_listed_page_by_page() {
    let running = Running::start().await;
    for name in ["b", "a", "c"] {
        running.put(name, r#"{"filter":"x"}"#).await;
    }
    let names = |page: &Value| {
        let page = page["subscriptions"].as_array().unwrap();
        page.iter().map(|subscription| subscription["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let page = running.get("/subscriptions?limit=2").await.json();
    assert_eq!((names(&page), &page["next"]), (vec!["a".to_owned(), "b".to_owned()], &json!("b")));
    let page = running.get("/subscriptions?limit=2&next=b").await.json();
    assert_eq!((names(&page), &page["next"]), (vec!["c".to_owned()], &Value::Null));
}

#[tokio::test]
async fn dead_letters_are_listed_redriven_and_purged() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","retry":{"max_attempts":1}}"#).await;
    running.send("POST /topics/a?id=1", &[("content-type", "application/json")], "{\"a\":1}").await;
    running.post("/topics/a?id=2", "x").await;
    let leases = running.pull("q", "").await;
    let reject = json!({"reject": [{"lease": leases[0].lease, "reason": "no such customer", "status": "422"}]});
    assert!(running.settle("q", reject).await.is_empty());
    // The first attempt was the last.
    assert!(running.settle("q", json!({"retry": [{"lease": leases[1].lease, "reason": "down"}]})).await.is_empty());

    let dead = running.get("/subscriptions/q/dead").await.json()["dead"].clone();
    assert_eq!(dead.as_array().unwrap().len(), 2, "{dead}");
    let first = &dead[0];
    assert_eq!(
        (&first["reason"], &first["status"], &first["attempts"]),
        (&json!("no such customer"), &json!("422"), &json!(1))
    );
    assert_eq!((&first["topic"], &first["group"], &first["event"]["id"]), (&json!("a"), &json!("q@a"), &json!("1")));
    assert_eq!(first["event"]["data"], json!({"a": 1}));
    assert_eq!(running.get("/subscriptions/q/dead?max=1").await.json()["dead"].as_array().unwrap().len(), 1);

    let reply = running.post("/subscriptions/q/redrive", r#"{"max":1}"#).await;
    assert_eq!((reply.status, reply.json()), (202, json!({"redriven": 1})));
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!((&leases[0].event["id"], leases[0].attempt), (&json!("1"), 1));
    running.settle("q", json!({"ack": [leases[0].lease]})).await;

    let reply = running.post("/subscriptions/q/redrive", r#"{"rate":1000}"#).await;
    assert_eq!((reply.status, reply.json()), (202, json!({"redriven": 1})));
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!(leases[0].event["id"], "2");
    running.settle("q", json!({"reject": [{"lease": leases[0].lease}]})).await;
    let purged = running.delete("/subscriptions/q/dead").await;
    assert_eq!((purged.status, purged.json()), (200, json!({"purged": 1})));
    for (bad, detail) in
        [(r#"{"max":0}"#, "max"), (r#"{"rate":0}"#, "rate"), (r#"{"rate":-1}"#, "rate"), (r#"{"x":1}"#, "x")]
    {
        running.post("/subscriptions/q/redrive", bad).await.is_problem(400, detail);
    }
}

/// Has so many dead letters of `q@a`, which it has for itself.
async fn give_up(running: &Running, count: usize) {
    for _ in 0..count {
        assert_eq!(running.post("/topics/a", "x").await.status, 202);
    }
    let mut rejected = 0;
    while rejected < count {
        let leases = running.pull("q", "max=1000&wait=10s").await;
        let reject: Vec<Value> = leases.iter().map(|lease| json!({ "lease": lease.lease })).collect();
        rejected += reject.len();
        assert!(running.settle("q", json!({ "reject": reject })).await.is_empty());
    }
}

#[tokio::test]
async fn redrives_count_what_each_moves() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","max_in_flight":1000}"#).await;
    let redrive = async |body: &str| {
        let reply = running.post("/subscriptions/q/redrive", body).await;
        assert_eq!(reply.status, 202, "{reply:?}");
        reply.json()["redriven"].as_u64().unwrap()
    };
    give_up(&running, 5).await;
    // One moves at once, and the others in the next hour.
    assert_eq!(redrive(r#"{"rate":0.001,"max":3}"#).await, 3);
    assert_eq!(running.pull("q", "max=10&wait=10s").await.len(), 1);
    // What another moves is another's, at whatever rate.
    assert_eq!(redrive(r#"{"max":1}"#).await, 1);
    assert_eq!(redrive(r#"{"rate":1000}"#).await, 1);
    assert_eq!(redrive(r#"{"rate":1000}"#).await, 0);
    assert_eq!(redrive("").await, 0);
    let mut again = 0;
    while again < 2 {
        again += running.pull("q", "max=10&wait=10s").await.len();
    }
    assert_eq!(running.get("/subscriptions/q/dead").await.json()["dead"].as_array().unwrap().len(), 2);
    // Who takes them out himself leaves nothing to move.
    assert_eq!(running.delete("/subscriptions/q/dead").await.json()["purged"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn redrives_at_a_time_count_each_dead_letter_once() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","max_in_flight":1000}"#).await;
    give_up(&running, 50).await;
    let redrive =
        async |body: &str| running.post("/subscriptions/q/redrive", body).await.json()["redriven"].as_u64().unwrap();
    let (slow, some, fast) = (r#"{"rate":1000}"#, r#"{"max":7}"#, r#"{"rate":100000}"#);
    let counts = tokio::join!(
        redrive(slow),
        redrive(some),
        redrive(slow),
        redrive(fast),
        redrive(some),
        redrive(slow),
        redrive("")
    );
    let told: u64 = <[u64; 7]>::from(counts).iter().sum();
    assert_eq!(told, 50, "{counts:?}");
    let mut moved = 0;
    while moved < 50 {
        moved += running.pull("q", "max=100&wait=10s").await.len();
    }
    assert_eq!(moved, 50);
}

#[tokio::test]
async fn a_list_of_large_dead_letters_is_cut_and_says_so() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","retry":{"max_attempts":1}}"#).await;
    for _ in 0..10 {
        assert_eq!(running.post("/topics/a", &"x".repeat(1 << 20)).await.status, 202);
    }
    for lease in running.pull("q", "max=10&wait=5s").await {
        running.settle("q", json!({"reject": [{"lease": lease.lease}]})).await;
    }
    for lease in running.pull("q", "max=10&wait=1s").await {
        running.settle("q", json!({"reject": [{"lease": lease.lease}]})).await;
    }
    let few = running.get("/subscriptions/q/dead?max=2").await.json();
    assert_eq!((few["dead"].as_array().unwrap().len(), &few["more"]), (2, &json!(null)));
    let all = running.get("/subscriptions/q/dead").await.json();
    assert_eq!((all["dead"].as_array().unwrap().len(), &all["more"]), (6, &json!(true)));
}

#[tokio::test]
async fn the_backlog_is_purged() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    for _ in 0..3 {
        running.post("/topics/a", "x").await;
    }
    assert_eq!(running.delete("/subscriptions/q/backlog").await.json(), json!({"purged": 3}));
    assert!(running.pull("q", "").await.is_empty());
}

#[tokio::test]
async fn attribute_filters_decide_what_is_delivered() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a","filters":[{"prefix":{"type":"com.acme."}}]}"#).await;
    running.post("/topics/a?id=1", "x").await;
    running.send("POST /topics/a?id=2", &[("broker-header-ce-type", "com.acme.order")], "x").await;
    let leases = running.pull("q", "wait=10s").await;
    assert_eq!((leases.len(), &leases[0].event["id"]), (1, &json!("2")));
    // What was not wanted is done with.
    assert_eq!(running.get("/subscriptions/q").await.json()["status"]["lag"], 1);
}

#[tokio::test]
async fn a_paused_subscription_gets_nothing_and_loses_nothing() {
    let running = Running::start().await;
    running.put("q", r#"{"filter":"a"}"#).await;
    let paused = running.post("/subscriptions/q/pause", "").await;
    assert_eq!((paused.status, &paused.json()["status"]["state"]), (200, &json!("paused")));
    assert_eq!(running.post("/topics/a", "x").await.json()["matched"], 1);
    assert!(running.pull("q", "").await.is_empty());
    let (leases, resumed) = tokio::join!(running.pull("q", "wait=20s"), running.post("/subscriptions/q/resume", ""));
    assert_eq!((leases.len(), resumed.status), (1, 200));
    assert_eq!(running.get("/subscriptions/q").await.json()["status"]["state"], "active");
}

#[tokio::test]
async fn the_order_of_a_group_that_stands_is_a_conflict_and_says_what_to_do() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":"a"}"#).await.status, 201);
    let ordered = r#"{"filter":"a","ordered":true}"#;
    running.put("q", ordered).await.is_problem(409, "ordered of group q@a would change from false to true");
    running.put("q", ordered).await.is_problem(409, "delete its subscriptions and make them anew");
    assert_eq!(running.get("/subscriptions/q").await.json()["ordered"], false);
    assert_eq!(running.delete("/subscriptions/q").await.status, 204);
    assert_eq!(running.put("q", ordered).await.status, 201);
    // Left out, it goes back to the default, which this group has not.
    running.put("q", r#"{"filter":"a"}"#).await.is_problem(409, "from true to false");
}

#[tokio::test]
async fn put_of_what_get_gave_says_what_to_leave_out() {
    let running = Running::start().await;
    assert_eq!(running.put("q", r#"{"filter":"a"}"#).await.status, 201);
    let mut told = running.get("/subscriptions/q").await.json();
    running.put("q", &told.to_string()).await.is_problem(400, "name, status: a GET tells this beside");
    let fields = told.as_object_mut().unwrap();
    fields.retain(|field, _| field != "name" && field != "status");
    let put = running.put("q", &told.to_string()).await;
    assert_eq!(put.status, 200, "{}", put.text());
}
