//! RustStream's memory broker: an unbounded queue per subscriber, messages taken one by one.

use std::hint::black_box;
use std::pin::pin;

use ::ruststream::memory::MemoryBroker;
use ::ruststream::{IncomingMessage, OutgoingMessage, Publisher, Subscriber};
use broker_benches::Result;
use broker_benches::in_process::{Load, Run, fan_out};
use bytes::BytesMut;
use futures_util::StreamExt;

const NAME: &str = "bench";

pub(crate) async fn run(load: Load) -> Result<Run> {
    let broker = MemoryBroker::new();
    let mut receivers = Vec::with_capacity(load.receivers);
    for _ in 0..load.receivers {
        let mut subscriber = broker.subscribe(NAME);
        receivers.push(tokio::spawn(async move {
            let mut received = 0;
            let mut stream = pin!(subscriber.stream());
            while received < load.messages {
                let Some(message) = stream.next().await else { break };
                let message = message?;
                black_box(message.payload().len());
                message.ack().await?;
                received += 1;
            }
            Ok(received)
        }));
    }
    let publisher = broker.publisher();
    let publishing = async move {
        let payload = load.payload();
        for _ in 0..load.messages {
            // It takes a buffer of its own for each message.
            let message = OutgoingMessage::produced(NAME, BytesMut::from(payload.as_ref()));
            publisher.publish(message, None).await?;
        }
        Ok(())
    };
    broker_benches::in_process::run(receivers, publishing).await?.checked(fan_out::due(load))
}
