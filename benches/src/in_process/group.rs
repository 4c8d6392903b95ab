//! One publisher, one group: its members split the messages.

use std::hint::black_box;
use std::sync::Arc;

use broker_core::Message;
use bytes::Bytes;

use super::{BATCH, CAPACITY, Due, Load, Run, open, publish_and_close, receive, run, subscribe, topic, versus};
use crate::Result;
use crate::comparison::Comparison;

/// The loads that are compared: members of the group.
pub const LOADS: [Load; 2] = [
    Load { receivers: 2, payload: 64, messages: 400_000, capacity: CAPACITY },
    Load { receivers: 16, payload: 64, messages: 400_000, capacity: CAPACITY },
];

/// Ours to a channel whose receiver is shared: being at least as fast as both is being at least as
/// fast as whichever is faster.
pub(super) fn comparisons() -> Vec<Comparison> {
    let vs_flume = LOADS
        .into_iter()
        .map(|load| versus(format!("in_process/group/flume_{}", load.receivers), 1.0, load, ours, flume));
    let vs_async_channel = LOADS.into_iter().map(|load| {
        versus(format!("in_process/group/async_channel_{}", load.receivers), 1.0, load, ours, async_channel)
    });
    vs_flume.chain(vs_async_channel).collect()
}

/// Our broker: members of one group receive and ack.
///
/// # Errors
///
/// The broker's, and a count that is not exact.
pub async fn ours(load: Load) -> Result<Run> {
    let (broker, topic) = (open()?, topic()?);
    let left = Due::new(load.messages);
    let mut members = Vec::with_capacity(load.receivers);
    for _ in 0..load.receivers {
        let subscription = subscribe(&*broker, &topic, load.capacity, Some("workers")).await?;
        members.push(tokio::spawn(receive(subscription, Arc::clone(&left))));
    }
    run(members, publish_and_close(Arc::clone(&broker), topic, load, left)).await?.checked(load.messages)
}

/// flume's bounded channel, its receiver cloned.
///
/// # Errors
///
/// A count that is not exact.
pub async fn flume(load: Load) -> Result<Run> {
    let (sender, receiver) = flume::bounded::<Message>(load.capacity);
    let members = (0..load.receivers).map(|_| {
        let receiver = receiver.clone();
        tokio::spawn(async move {
            let mut received = 0;
            while let Ok(message) = receiver.recv_async().await {
                for message in std::iter::once(message).chain(receiver.try_iter().take(BATCH - 1)) {
                    black_box(message.payload().len());
                    received += 1;
                }
            }
            Ok(received)
        })
    });
    let members = members.collect();
    let publisher = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            sender.send_async(Message::new(Bytes::clone(&payload))).await?;
        }
        Ok(())
    };
    run(members, publisher).await?.checked(load.messages)
}

/// async-channel's bounded channel, its receiver cloned.
///
/// # Errors
///
/// A count that is not exact.
pub async fn async_channel(load: Load) -> Result<Run> {
    let (sender, receiver) = async_channel::bounded::<Message>(load.capacity);
    let members = (0..load.receivers).map(|_| {
        let receiver = receiver.clone();
        tokio::spawn(async move {
            let mut received = 0;
            while let Ok(message) = receiver.recv().await {
                let more = std::iter::from_fn(|| receiver.try_recv().ok()).take(BATCH - 1);
                for message in std::iter::once(message).chain(more) {
                    black_box(message.payload().len());
                    received += 1;
                }
            }
            Ok(received)
        })
    });
    let members = members.collect();
    let publisher = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            sender.send(Message::new(Bytes::clone(&payload))).await?;
        }
        Ok(())
    };
    run(members, publisher).await?.checked(load.messages)
}
