//! What many push subscriptions and a long backlog hold, server and broker together.

use std::time::Duration;

use broker_core::{Message, PublisherOptions, Topic};
use serde_json::json;
use tokio::net::TcpListener;

use super::Ours;
use super::endpoint::Endpoint;
use crate::Result;
use crate::comparison::Comparison;
use crate::footprint::{Footprint, at_most, resident_bytes};

const SUBSCRIPTIONS: usize = 10_000;

/// Pushed to at a time: each has a connection until it has been idle for a while, and connections
/// are files, of which a process has so many.
const AT_A_TIME: usize = 200;

const BACKLOG: usize = 1_000_000;

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![
        at_most("http/memory/push_subscriptions_10000", Footprint::PushSubscriptions, 200e6),
        at_most("http/memory/backlog_1000000", Footprint::Backlog, 400e6),
    ]
}

/// Bytes of a process with 10,000 push subscriptions, when each has been pushed to and its
/// connections are closed. The endpoint is one listener in the same process, a path each.
pub(crate) async fn push_subscriptions() -> Result<f64> {
    let (ours, endpoint) = (Ours::start().await?, Endpoint::start().await?);
    for number in 0..SUBSCRIPTIONS {
        let url = format!("{}{number}", endpoint.url());
        ours.put(&format!("push-{number}"), json!({"filter": format!("orders.{number}"), "endpoint": url})).await?;
    }
    let all: Vec<_> = (0..SUBSCRIPTIONS).collect();
    for some in all.chunks(AT_A_TIME) {
        let arrived = endpoint.expect(some.len() as u64);
        for number in some {
            let publisher = ours.broker.publisher(&Topic::new(format!("orders.{number}"))?, PublisherOptions::new())?;
            publisher.publish(Message::new("42")).await?;
        }
        arrived.await?;
    }
    // Idle connections are closed after 15 s.
    tokio::time::sleep(Duration::from_secs(20)).await;
    Ok(resident_bytes()? as f64)
}

/// Bytes of a process with 1,000,000 messages of 100 bytes that wait for an endpoint which never
/// answers.
pub(crate) async fn backlog() -> Result<f64> {
    let ours = Ours::start().await?;
    // A listener nobody accepts from: the system takes the connection, and no answer comes.
    let hanging = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", hanging.local_addr()?);
    ours.put("push", json!({"filter": "orders.>", "endpoint": url, "timeout": "10m"})).await?;
    let publisher = ours.broker.publisher(&Topic::new("orders.created")?, PublisherOptions::new())?;
    for number in 0..BACKLOG {
        // A payload of its own each, as messages from outside have.
        publisher.publish(Message::new(format!("{number:0100}"))).await?;
    }
    let status = ours.broker.status().await?;
    let waiting: u64 = status.groups.iter().filter_map(|group| group.lag).sum();
    if waiting != BACKLOG as u64 {
        return Err(format!("{waiting} messages wait where {BACKLOG} are due").into());
    }
    Ok(resident_bytes()? as f64)
}
