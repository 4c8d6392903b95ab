//! Channels: one of flume's per subscriber, and async-broadcast's.

use std::hint::black_box;

use broker_benches::Result;
use broker_benches::in_process::{BATCH, Load, Run, fan_out, run};
use broker_core::Message;
use bytes::Bytes;

/// A bounded flume channel per subscriber, of the message itself.
pub(crate) async fn flume(load: Load) -> Result<Run> {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..load.receivers).map(|_| ::flume::bounded::<Message>(load.capacity)).unzip();
    let receivers = receivers.into_iter().map(|receiver| {
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
    let receivers = receivers.collect();
    let publisher = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            let message = Message::new(Bytes::clone(&payload));
            if let Some((last, others)) = senders.split_last() {
                for sender in others {
                    sender.send_async(message.clone()).await?;
                }
                last.send_async(message).await?;
            }
        }
        Ok(())
    };
    run(receivers, publisher).await?.checked(fan_out::due(load))
}

/// async-broadcast's channel, which waits for its slowest receiver.
pub(crate) async fn async_broadcast(load: Load) -> Result<Run> {
    let (sender, receiver) = ::async_broadcast::broadcast::<Message>(load.capacity);
    let receivers = (0..load.receivers).map(|_| {
        let mut receiver = receiver.new_receiver();
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
    let receivers = receivers.collect();
    // It would hold the others back.
    drop(receiver);
    let publisher = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            sender.broadcast(Message::new(Bytes::clone(&payload))).await?;
        }
        Ok(())
    };
    run(receivers, publisher).await?.checked(fan_out::due(load))
}
