//! The engine embedded in a service, which publishes without a socket, beside the same engine behind the
//! daemon's interface: every message published over HTTP. Broker, subscription and endpoint are the same.

use std::sync::Arc;
use std::time::Instant;

use super::load::{closed_loop, publish_request};
use super::push::{MESSAGES, Pushing, TOPIC, rounds};
use super::{CONNECTIONS, PAYLOAD};
use crate::Result;
use crate::comparison::{Comparison, Pair, Unit};

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![Comparison::new("http/embedded", Unit::DeliveriesPerSecond, 1.25, async || {
        let embedded = Arc::new(Pushing::start("single", MESSAGES).await?);
        let behind = Arc::new(Pushing::start("single", MESSAGES).await?);
        Ok(Pair::new(rounds(embedded), move || over_http(Arc::clone(&behind))))
    })]
}

/// Publishes a round's messages over sockets, and waits until the endpoint has them all.
async fn over_http(behind: Arc<Pushing>) -> Result<f64> {
    let address = behind.ours.address;
    let request = publish_request(address, TOPIC, "application/octet-stream", &[b'x'; PAYLOAD]);
    let arrived = behind.endpoint.expect(MESSAGES as u64);
    let began = Instant::now();
    closed_loop(address, CONNECTIONS, MESSAGES / CONNECTIONS, request).await?;
    arrived.await?;
    Ok(MESSAGES as f64 / began.elapsed().as_secs_f64())
}
