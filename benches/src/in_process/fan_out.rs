//! One publisher, a copy for every subscriber.

use std::hint::black_box;
use std::sync::Arc;

use broker_core::Message;
use bytes::Bytes;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc};

use super::{BATCH, CAPACITY, Due, Load, Run, open, publish_and_close, receive, run, subscribe, topic, versus};
use crate::Result;
use crate::comparison::Comparison;

/// The loads that are compared: about as many deliveries each, so that a round takes a fraction of a
/// second whichever side runs it.
pub const LOADS: [Load; 4] = [
    Load { receivers: 1, payload: 64, messages: 400_000, capacity: CAPACITY },
    Load { receivers: 10, payload: 64, messages: 150_000, capacity: CAPACITY },
    Load { receivers: 100, payload: 64, messages: 30_000, capacity: CAPACITY },
    Load { receivers: 1_000, payload: 64, messages: 4_000, capacity: CAPACITY },
];

/// Ours to one mpsc per subscriber, and to broadcast.
pub(super) fn comparisons() -> Vec<Comparison> {
    let vs_mpsc = LOADS
        .into_iter()
        .zip([1.0, 3.0, 10.0, 10.0])
        .map(|(load, bar)| versus(format!("in_process/fan_out/mpsc_{}", load.receivers), bar, load, ours, mpsc));
    let vs_broadcast = LOADS
        .into_iter()
        .map(|load| versus(format!("in_process/fan_out/broadcast_{}", load.receivers), 1.0, load, ours, broadcast));
    vs_mpsc.chain(vs_broadcast).collect()
}

/// Our broker: every subscriber receives and acks every message.
///
/// # Errors
///
/// The broker's, and a count that is not exact.
pub async fn ours(load: Load) -> Result<Run> {
    let (broker, topic) = (open()?, topic()?);
    let left = Due::new(due(load));
    let mut receivers = Vec::with_capacity(load.receivers);
    for _ in 0..load.receivers {
        let subscription = subscribe(&*broker, &topic, load.capacity, None).await?;
        receivers.push(tokio::spawn(receive(subscription, Arc::clone(&left))));
    }
    run(receivers, publish_and_close(Arc::clone(&broker), topic, load, left)).await?.checked(due(load))
}

/// One tokio mpsc channel per subscriber, of the message itself.
///
/// # Errors
///
/// A count that is not exact.
pub async fn mpsc(load: Load) -> Result<Run> {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..load.receivers).map(|_| mpsc::channel::<Message>(load.capacity)).unzip();
    let receivers = receivers.into_iter().map(|mut receiver| {
        tokio::spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            let mut received = 0;
            while receiver.recv_many(&mut batch, BATCH).await > 0 {
                received += batch.len() as u64;
                for message in batch.drain(..) {
                    black_box(message.payload().len());
                }
            }
            Ok(received)
        })
    });
    let receivers = receivers.collect();
    let publisher = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            let message = Message::new(Bytes::clone(&payload));
            if let Some((last, others)) = senders.split_last() {
                for sender in others {
                    sender.send(message.clone()).await?;
                }
                last.send(message).await?;
            }
        }
        Ok(())
    };
    run(receivers, publisher).await?.checked(due(load))
}

/// Tokio's broadcast channel, which drops what a slow receiver has not taken: what is counted is
/// what was received. The sender, which never waits, lets the receivers run after every batch, or
/// they would receive less still.
///
/// # Errors
///
/// More messages received than were due.
pub async fn broadcast(load: Load) -> Result<Run> {
    let (sender, _) = broadcast::channel::<Message>(load.capacity);
    let receivers = (0..load.receivers).map(|_| tokio::spawn(receive_broadcast(sender.subscribe()))).collect();
    let publisher = async move {
        let payload = load.payload();
        for number in 1..=load.messages {
            // It fails when there is no receiver, and they stay until the sender is gone.
            sender.send(Message::new(Bytes::clone(&payload)))?;
            if number.is_multiple_of(BATCH as u64) {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    };
    let run = run(receivers, publisher).await?;
    if run.received > due(load) { run.checked(due(load)) } else { Ok(run) }
}

async fn receive_broadcast(mut receiver: broadcast::Receiver<Message>) -> Result<u64> {
    let mut received = 0;
    loop {
        match receiver.recv().await {
            Ok(message) => {
                black_box(message.payload().len());
                received += 1;
            }
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return Ok(received),
        }
        for _ in 1..BATCH {
            match receiver.try_recv() {
                Ok(message) => {
                    black_box(message.payload().len());
                    received += 1;
                }
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
    }
}

/// Messages to be received, by all subscribers together.
pub fn due(load: Load) -> u64 {
    load.messages * load.receivers as u64
}
