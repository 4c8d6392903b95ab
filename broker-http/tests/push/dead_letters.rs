//! Dead letters are messages like others: pushed to whoever subscribes to their topic, with their story.

use std::sync::Arc;

use broker_core::{Broker as _, Message};
use broker_http::SubscriptionSpec;
use broker_http::push::{Push, PushOptions};
use serde_json::json;

use crate::support::{Endpoint, QUICK, Reaction, Rig, client, status};

#[tokio::test]
async fn a_dead_letter_is_pushed_with_its_story() {
    let failing =
        Endpoint::always(Reaction::Answer(503, "content-type: text/plain\r\n", "out of order".to_owned())).await;
    let mut mourner = Endpoint::always(status(200)).await;
    let rig = Rig::new(&failing.url(), QUICK).await;
    let spec = json!({"filter": "dead.>", "endpoint": mourner.url()}).to_string();
    let options = PushOptions::new("mourner".parse().unwrap(), SubscriptionSpec::from_json(spec.as_bytes()).unwrap());
    rig.broker.create_group(&options.group, Default::default()).await.unwrap();
    let _push = Push::start(Arc::clone(&rig.broker), options, &client()).unwrap();

    let message = Message::new("42").with_id("order-42".parse().unwrap()).with_header("x-own", "kept").unwrap();
    rig.publish([message]).await;
    let letter = mourner.next().await;
    assert_eq!(letter.text(), "42");
    for (name, value) in [
        ("ce-id", "order-42"),
        ("broker-topic", "dead.billing"),
        ("broker-subscription", "mourner"),
        ("broker-attempt", "1"),
        ("broker-header-x-own", "kept"),
        ("broker-header-broker-dead-topic", "orders.created"),
        ("broker-header-broker-dead-group", "billing@orders.%3E"),
        ("broker-header-broker-dead-attempts", "3"),
        ("broker-header-broker-dead-status", "503"),
    ] {
        let have = letter.header(name).replace('>', "%3E");
        assert_eq!(have, value, "{name}");
    }
    assert!(letter.header("broker-header-broker-dead-reason").contains("503"), "{letter:?}");
    let (first, last) =
        (letter.header("broker-header-broker-dead-first"), letter.header("broker-header-broker-dead-last"));
    assert!(first <= last && first.ends_with('Z'), "{first} {last}");
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn the_trace_goes_on_in_every_mode_of_one_message() {
    for mode in ["binary", "structured", "raw"] {
        let mut endpoint = Endpoint::always(status(200)).await;
        let rig = Rig::new(&endpoint.url(), &format!(r#""mode":"{mode}""#)).await;
        let message = Message::new("42").with_header("traceparent", PARENT).unwrap();
        rig.publish([message.with_header("tracestate", "acme=1").unwrap()]).await;
        let request = endpoint.next().await;
        assert_eq!((request.header("traceparent"), request.header("tracestate")), (PARENT, "acme=1"), "{mode}");
    }
}
