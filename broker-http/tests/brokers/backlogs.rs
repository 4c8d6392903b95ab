//! The bound of a backlog, where the server has none.

use broker_core::{Backlog, Connectors, ErrorKind, Group, GroupName, GroupOptions, TopicFilter};
use serde_json::json;

use crate::support::{Daemon, soon};
use crate::{server, unique};

/// None is shown, and one that is asked for is refused, whatever it is.
async fn there_is_none(kind: &str) {
    let daemon = Daemon::start(&["--broker", &server(kind)]).await;
    let name = unique();
    let path = format!("/subscriptions/{name}");
    let put = |spec: serde_json::Value| {
        let (daemon, request) = (&daemon, format!("PUT {path}"));
        async move { daemon.send(&request, &spec.to_string()).await }
    };
    let default = json!({ "max_messages": 1_000_000, "max_bytes": 268_435_456, "overflow": "wait" });
    let bounded = json!({ "filter": name, "backlog": default });
    assert_eq!(put(bounded.clone()).await.0, 501, "{kind}");
    assert_eq!(put(json!({ "filter": name })).await.0, 201, "{kind}");
    let shown = daemon.json(&format!("GET {path}"), "").await;
    assert!(shown.get("backlog").is_none(), "{kind}: {shown}");
    for overflow in ["wait", "reject", "drop_oldest"] {
        let mut bounded = bounded.clone();
        bounded["backlog"]["overflow"] = json!(overflow);
        let (status, body) = put(bounded).await;
        assert!(status == 501 && body.contains("backlog"), "{kind}: {status} {body}");
    }
    assert_eq!(put(json!({ "filter": name })).await.0, 200, "{kind}");

    // Another that joins its group; and a member over our client, of a group that stands.
    let joins = json!({ "filter": name, "group": name, "backlog": default }).to_string();
    assert_eq!(daemon.send(&format!("PUT {path}-other"), &joins).await.0, 501, "{kind}");
    let mut connectors = Connectors::new();
    connectors.add(["http"], broker_http::client::connector());
    let client = connectors.open(&format!("http://{}", daemon.address)).unwrap();
    let group = Group::new(GroupName::new(format!("{name}-client")).unwrap(), TopicFilter::new(name.clone()).unwrap());
    assert!(soon(client.create_group(&group, GroupOptions::new())).await.unwrap());
    let bounded = GroupOptions::new().with_backlog(Backlog::default());
    let refused = soon(client.create_group(&group, bounded)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{kind}: {refused}");
    assert!(soon(client.delete_group(&group)).await.unwrap());
    assert_eq!(daemon.send(&format!("DELETE {path}"), "").await.0, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_has_none() {
    there_is_none("amqp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_has_none() {
    there_is_none("kafka").await;
}
