//! What many push subscriptions and a long backlog hold, server and broker together.

use std::time::Duration;

use broker_core::{Message, PublisherOptions, Topic};
use bytes::Bytes;
use serde_json::json;
use tokio::net::TcpListener;

use super::{Ours, bounded};
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
/// connections are closed. `endpoint` is one listener in another process, and each subscription's own
/// is a path there.
pub(crate) async fn push_subscriptions(endpoint: &str) -> Result<f64> {
    let ours = Ours::start().await?;
    for number in 0..SUBSCRIPTIONS {
        let spec = json!({"filter": format!("orders.{number}"), "endpoint": format!("{endpoint}{number}")});
        ours.put(&format!("push-{number}"), spec).await?;
    }
    let all: Vec<_> = (0..SUBSCRIPTIONS).collect();
    for some in all.chunks(AT_A_TIME) {
        for number in some {
            let publisher = ours.broker.publisher(&Topic::new(format!("orders.{number}"))?, PublisherOptions::new())?;
            publisher.publish(Message::new("42")).await?;
        }
        bounded("pushing to all", async {
            while waiting(&ours).await? > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        })
        .await?;
    }
    // Idle connections are closed after 15 s.
    tokio::time::sleep(Duration::from_secs(20)).await;
    Ok(resident_bytes()? as f64)
}

/// Messages that no endpoint has taken yet.
async fn waiting(ours: &Ours) -> Result<u64> {
    Ok(ours.broker.status().await?.groups.iter().filter_map(|group| group.lag).sum())
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
        // A payload of its own each, and no larger than it is, as messages from outside have.
        let payload = Bytes::copy_from_slice(format!("{number:0100}").as_bytes());
        publisher.publish(Message::new(payload)).await?;
    }
    let waiting = waiting(&ours).await?;
    if waiting != BACKLOG as u64 {
        return Err(format!("{waiting} messages wait where {BACKLOG} are due").into());
    }
    Ok(resident_bytes()? as f64)
}
