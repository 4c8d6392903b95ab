//! Ours, publishing.

use std::collections::VecDeque;
use std::sync::Arc;

use broker_core::{Message, PublisherOptions};

use super::{Scene, timed};
use crate::Result;
use crate::sample::Sample;

/// A round: publishes with at most `window` confirms outstanding.
pub(super) async fn ours(scene: Arc<Scene>, messages: u64, window: usize) -> Result<Sample> {
    scene.purge().await?;
    timed(messages, publish(&scene, messages, window)).await
}

pub(super) async fn publish(scene: &Scene, messages: u64, window: usize) -> Result<()> {
    let publisher = scene.broker.publisher(&scene.topic, PublisherOptions::new())?;
    let body = scene.load.body();
    let mut publishes = VecDeque::with_capacity(window);
    for _ in 0..messages {
        if publishes.len() == window
            && let Some(publish) = publishes.pop_front()
        {
            routed(publish.await?)?;
        }
        publishes.push_back(publisher.publish(Message::new(body.clone())));
    }
    for publish in publishes {
        routed(publish.await?)?;
    }
    Ok(())
}

fn routed(receipt: broker_core::Receipt) -> Result<()> {
    if receipt.routed == Some(true) { Ok(()) } else { Err("a message was confirmed, and reached no queue".into()) }
}
