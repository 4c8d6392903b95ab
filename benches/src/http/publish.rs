//! Publishing: our server, with a subscriber that acks, beside a bare hyper server that reads the
//! body and answers the same bytes. One load generator for both.

use std::sync::Arc;

use broker_core::{Subscribe, TopicFilter};
use bytes::Bytes;
use http::{HeaderValue, StatusCode};

use super::load::{Connection, closed_loop, publish_request};
use super::{CONNECTIONS, Ours, PAYLOAD, bare, drain};
use crate::comparison::{Comparison, Pair, Unit};

const TOPIC: &str = "orders.created";

/// Requests a round on each connection.
const TIMES: usize = 500;

pub(super) fn comparisons() -> Vec<Comparison> {
    vec![Comparison::new("http/publish/hyper", Unit::MessagesPerSecond, 0.85, async || {
        let ours = Arc::new(Ours::start().await?);
        tokio::spawn(drain(ours.broker.subscribe(&TopicFilter::new(TOPIC)?, Subscribe::new()).await?));
        let body = vec![b'x'; PAYLOAD];
        let request = |address| publish_request(address, TOPIC, "application/octet-stream", &body);

        let our_request = request(ours.address);
        let same = Bytes::copy_from_slice(Connection::open(ours.address).await?.exchange(&our_request).await?);
        let theirs = bare::serve(move |_, _| {
            let json = HeaderValue::from_static("application/json");
            bare::answer(StatusCode::ACCEPTED, Some(json), same.clone())
        });
        let theirs = theirs.await?;
        let their_request = request(theirs);

        let ours = move || {
            let (ours, request) = (Arc::clone(&ours), our_request.clone());
            async move { closed_loop(ours.address, CONNECTIONS, TIMES, request).await }
        };
        Ok(Pair::new(ours, move || closed_loop(theirs, CONNECTIONS, TIMES, their_request.clone())))
    })]
}
