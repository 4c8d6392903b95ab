//! mq-bridge's memory endpoint in subscribe mode: a log of 100,000 messages that drops the oldest,
//! which subscribers read in batches.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use ::mq_bridge::CanonicalMessage;
use ::mq_bridge::endpoints::memory::{MemoryPublisher, MemorySubscriber};
use ::mq_bridge::event_store::get_or_create_event_store;
use ::mq_bridge::models::MemoryConfig;
use ::mq_bridge::traits::{MessageConsumer, MessageDisposition, MessagePublisher};
use broker_benches::Result;
use broker_benches::in_process::{BATCH, Load, Run, fan_out};
use bytes::Bytes;

/// Its stores are global and live as long as the process: every round has one of its own.
static ROUND: AtomicU64 = AtomicU64::new(0);

pub(crate) async fn run(load: Load) -> Result<Run> {
    let topic = format!("bench-{}", ROUND.fetch_add(1, Ordering::Relaxed));
    let config = MemoryConfig { topic: topic.clone(), subscribe_mode: true, ..Default::default() };
    let store = get_or_create_event_store(&topic);
    let mut receivers = Vec::with_capacity(load.receivers);
    for number in 0..load.receivers {
        let id = format!("subscriber-{number}");
        // Or what the others have acked would be gone before this one has begun.
        store.register_subscriber(id.clone()).await;
        let mut subscriber = MemorySubscriber::new(&config, &id)?;
        receivers.push(tokio::spawn(async move {
            let mut received = 0;
            while received < load.messages {
                let batch = subscriber.receive_batch(BATCH).await?;
                for message in &batch.messages {
                    black_box(message.payload.len());
                }
                received += batch.messages.len() as u64;
                (batch.commit)(vec![MessageDisposition::Ack; batch.messages.len()]).await?;
            }
            Ok(received)
        }));
    }
    let publisher = MemoryPublisher::new(&config)?;
    let publishing = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            publisher.send(CanonicalMessage::new_bytes(Bytes::clone(&payload), None)).await?;
        }
        Ok(())
    };
    broker_benches::in_process::run(receivers, publishing).await?.checked(fan_out::due(load))
}
