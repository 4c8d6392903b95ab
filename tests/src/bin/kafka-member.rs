//! A member of a group on Kafka in a process of its own, for tests that kill it:
//! `kafka-member URL GROUP`.
//!
//! Prints `d NUMBER` for each delivery and `a NUMBER` once its ack was taken, acks out of order, and leaves the group
//! when its standard input ends.

use std::io::{Read, Write};

use broker_core::{Broker, BrokerUrl, Group, Result, Subscribe};
use broker_kafka::{KafkaBroker, KafkaConfig};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(group)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: kafka-member URL GROUP");
        std::process::exit(2);
    };
    let broker = KafkaBroker::new(KafkaConfig::from_url(BrokerUrl::parse(&url)?)?);
    let group: Group = group.parse()?;
    let (leave, mut leaving) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = leave.send(());
    });
    let options = Subscribe::group(group.name.clone()).with_max_in_flight(300)?;
    let mut subscription = loop {
        match broker.subscribe(&group.filter, options.clone()).await {
            // The server may be away for longer than is waited for.
            Err(error) if error.is_retryable() => eprintln!("kafka-member: {error}"),
            joined => break joined?,
        }
    };
    let mut batch = Vec::new();
    loop {
        let received = tokio::select! {
            biased;
            _ = &mut leaving => break,
            received = subscription.receive(&mut batch, 100) => received?,
        };
        if received == 0 {
            break;
        }
        let mut said = String::new();
        for delivery in &batch {
            said.push_str(&format!("d {}\n", String::from_utf8_lossy(delivery.message().payload())));
        }
        tell(&said);
        fastrand::shuffle(&mut batch);
        said.clear();
        for delivery in batch.drain(..) {
            let number = String::from_utf8_lossy(delivery.message().payload()).into_owned();
            // One whose partition has moved meanwhile comes again, to whoever has it now.
            if delivery.ack().await.is_ok() {
                said.push_str(&format!("a {number}\n"));
            }
        }
        tell(&said);
    }
    subscription.close().await?;
    broker.close(std::time::Duration::from_secs(20)).await;
    Ok(())
}

/// At once: what a killed process had only buffered would be forgotten.
fn tell(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
