//! The endpoint that pushes arrive at, the same for both sides.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use serde::de::IgnoredAny;
use tokio::sync::Notify;

use super::{bare, bounded};
use crate::Result;

/// A bare server that counts the messages it receives.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    messages: AtomicU64,
    /// The count that somebody waits for.
    target: AtomicU64,
    reached: Notify,
    first: OnceLock<(HeaderMap, Bytes)>,
}

impl Endpoint {
    pub(crate) async fn start() -> Result<Self> {
        let seen = Arc::<Seen>::default();
        let counting = Arc::clone(&seen);
        let address = bare::serve(move |headers, body| {
            let messages = match headers.get(CONTENT_TYPE).map(|value| value.as_bytes()) {
                // As a receiver does that wants to know what is in it.
                Some(b"application/cloudevents-batch+json") => {
                    serde_json::from_slice::<Vec<IgnoredAny>>(&body).map_or(0, |batch| batch.len() as u64)
                }
                _ => 1,
            };
            counting.first.get_or_init(|| (headers.clone(), body));
            let before = counting.messages.fetch_add(messages, Ordering::AcqRel);
            let target = counting.target.load(Ordering::Acquire);
            if before < target && before + messages >= target {
                counting.reached.notify_one();
            }
            bare::answer(StatusCode::NO_CONTENT, None, Bytes::new())
        })
        .await?;
        Ok(Self { address, seen })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// Expects so many messages more than have arrived; the future is ready when they have.
    pub(crate) fn expect(&self, messages: u64) -> impl Future<Output = Result<()>> + use<> {
        let seen = Arc::clone(&self.seen);
        let target = seen.messages.load(Ordering::Acquire) + messages;
        seen.target.store(target, Ordering::Release);
        async move {
            bounded("a push", async {
                while seen.messages.load(Ordering::Acquire) < target {
                    seen.reached.notified().await;
                }
                Ok(())
            })
            .await?;
            match seen.messages.load(Ordering::Acquire) - target {
                0 => Ok(()),
                more => Err(format!("{more} messages arrived that were not due").into()),
            }
        }
    }

    /// The headers and the body of the first request there was.
    pub(crate) fn first(&self) -> Option<&(HeaderMap, Bytes)> {
        self.seen.first.get()
    }
}
