//! The client against a scripted peer, which misbehaves on purpose, and against a real daemon.

mod daemon;
mod faults;
mod peer;
mod pulls;
mod tls;

use std::time::Duration;

use broker_core::Topic;

use super::{HttpBroker, HttpOptions};

/// Fails a test that hangs instead of letting it.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("it took longer than any test may")
}

fn broker(address: std::net::SocketAddr, query: &str) -> HttpBroker {
    HttpBroker::new(HttpOptions::from_url(&format!("http://hunter2@{address}?{query}")).unwrap())
}

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}
