//! Doubles that publish wrongly.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{Error, Message, Operation, Publish, PublishBatch, Publisher, Receipt, Settlement, Topic};
use parking_lot::Mutex;

use super::{Defect, Double};

/// Says that a message was taken, and does nothing with it.
fn swallow(message: &Message) -> Publish {
    Operation::ready(Ok(Receipt::new(message.id().clone())))
}

/// The message with all it carries but its times of delivery and expiry.
fn undated(message: &Message) -> Message {
    let mut copy = if message.is_tombstone() { Message::tombstone() } else { Message::new(message.payload().clone()) }
        .with_id(message.id().clone())
        .with_timestamp(message.timestamp())
        .with_headers(message.headers().clone());
    if let Some(key) = message.key() {
        copy = copy.with_key(key.clone());
    }
    match message.content_type() {
        Some(content_type) => copy.clone().with_content_type(content_type).unwrap_or(copy),
        None => copy,
    }
}

fn changed(change: fn(Message) -> Message) -> Defect {
    Defect::default().publish(Box::new(move |publisher, message| publisher.publish(change(message))))
}

pub(super) const DOUBLES: &[Double] = &[
    Double::new(
        "loses every tenth message",
        &[
            ("A1", "received: no delivery within"),
            ("A6", "received: no delivery within"),
            ("B1", "received: no delivery within"),
            ("G6", "received: no delivery within"),
        ],
        || {
            let count = AtomicUsize::new(0);
            Defect::default().publish(Box::new(move |publisher, message| {
                if count.fetch_add(1, Ordering::SeqCst) % 10 == 9 {
                    return swallow(&message);
                }
                publisher.publish(message)
            }))
        },
    ),
    Double::new(
        "publishes every twentieth message twice",
        &[("A1", "messages are missing"), ("A6", "an unexpected delivery: message"), ("B1", "messages are missing")],
        || {
            let count = AtomicUsize::new(0);
            Defect::default().publish(Box::new(move |publisher, message| {
                if count.fetch_add(1, Ordering::SeqCst) % 20 == 19 {
                    drop(publisher.publish(message.clone()));
                }
                publisher.publish(message)
            }))
        },
    ),
    Double::new("knows ten topics", &[("A6", "received: no delivery within")], || {
        let known = Mutex::new(BTreeSet::<Topic>::new());
        Defect::default().publish(Box::new(move |publisher, message| {
            let mut known = known.lock();
            if known.len() >= 10 && !known.contains(publisher.topic()) {
                return swallow(&message);
            }
            known.insert(publisher.topic().clone());
            publisher.publish(message)
        }))
    }),
    Double::new("drops what comes while it is busy", &[("A7", "received: no delivery within")], || {
        // Room for a hundred messages, which nobody makes again.
        let count = AtomicUsize::new(0);
        Defect::default().publish(Box::new(move |publisher, message| {
            if count.fetch_add(1, Ordering::SeqCst) >= 100 {
                return swallow(&message);
            }
            publisher.publish(message)
        }))
    }),
    Double::new("signs the publisher's messages", &[("A12", "was added")], || {
        changed(|message| message.clone().with_header("via", "double").unwrap_or(message))
    }),
    Double::new("takes less than it says", &[("A4", "bytes of payload, key and headers; this broker takes")], || {
        Defect::default().capabilities(Box::new(|can| can.max_message_bytes += 1))
    }),
    Double::new(
        "takes more than it says",
        &[(
            "A4",
            "publishing one byte more than the largest message succeeded; it should have been refused as too large",
        )],
        || Defect::default().capabilities(Box::new(|can| can.max_message_bytes -= 1)),
    ),
    Double::new(
        "sends a batch from its end",
        &[("A9", "messages of one key and one batch arrived out of order")],
        || {
            Defect::default().publish_batch(Box::new(|publisher, mut messages| {
                messages.reverse();
                let batch = publisher.publish_batch(messages);
                PublishBatch::boxed(async move {
                    let mut results = batch.await?;
                    results.reverse();
                    Ok(results)
                })
            }))
        },
    ),
    Double::new(
        "mixes up the results of a batch",
        &[("A9", "the results are not in the order of the messages")],
        || {
            Defect::default().publish_batch(Box::new(|publisher, messages| {
                let batch = publisher.publish_batch(messages);
                PublishBatch::boxed(async move {
                    let mut results = batch.await?;
                    results.reverse();
                    Ok(results)
                })
            }))
        },
    ),
    Double::new("publishes nothing while a delivery is unsettled", &[("A13", "no delivery within")], || {
        let in_flight = Arc::new(AtomicUsize::new(0));
        let (taken, given) = (Arc::clone(&in_flight), Arc::clone(&in_flight));
        Defect::default()
            .copies(Box::new(move |_| {
                taken.fetch_add(1, Ordering::SeqCst);
                1
            }))
            .settle(Box::new(move |_, _, delivery, settlement| {
                given.fetch_sub(1, Ordering::SeqCst);
                delivery.settle(settlement)
            }))
            .publish(Box::new(move |publisher, message| {
                let (publisher, in_flight) = (publisher.clone(), Arc::clone(&in_flight));
                Operation::boxed(async move {
                    while in_flight.load(Ordering::SeqCst) > 0 {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    publisher.publish(message).await
                })
            }))
    }),
    Double::new(
        "goes on with a publish that was dropped",
        &[("E5", "a publish that waited for room was dropped, and published all the same")],
        || {
            Defect::default().publish(Box::new(|publisher, message| {
                let publish = publisher.publish(message);
                if publish.is_ready() {
                    return publish;
                }
                let going_on = tokio::spawn(publish);
                Operation::boxed(async { going_on.await.unwrap_or_else(|_| Err(Error::closed("the runtime ended"))) })
            }))
        },
    ),
    Double::new(
        "publishes later, and forgets on close",
        &[("E7", "received: the subscription ended while a delivery was expected")],
        || {
            Defect::default().publish(Box::new(|publisher, message| {
                let publisher = publisher.clone();
                let later = tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    publisher.publish(message).await
                });
                Operation::boxed(async { later.await.unwrap_or_else(|_| Err(Error::closed("the runtime ended"))) })
            }))
        },
    ),
    Double::new("has no delivery times", &[("G7", "messages are missing")], || changed(|message| undated(&message))),
    Double::new("has no expiry", &[("F8", "messages are missing")], || changed(|message| undated(&message))),
    Double::new(
        "deduplicates nothing",
        &[("G8", "of two messages with one deduplication key none was the duplicate")],
        || changed(|message| undated(&message)),
    ),
    Double::new(
        "denies what it can do",
        &[
            ("G7", "publishing with a delay succeeded; it should have been refused as unsupported"),
            (
                "G8",
                "a message with a delivery time, which is not declared, succeeded; it should have been refused as unsupported",
            ),
        ],
        || Defect::default().capabilities(Box::new(|can| can.delay = broker_core::Support::None)),
    ),
    Double::new(
        "promises what it cannot do",
        &[
            ("B5", "starting at earliest succeeded; it should have been refused as unsupported"),
            ("G2", "a broker that starts at positions does not tell them in receipts"),
            (
                "G8",
                "a group with start at a position is declared, and failed: unsupported: the in-process broker has no positions to start at: use new, earliest or a time",
            ),
        ],
        || {
            Defect::default().capabilities(Box::new(|can| {
                can.start_position = broker_core::Support::Full;
                can.start_earliest = broker_core::Support::None;
            }))
        },
    ),
    Double::new(
        "needs no route",
        &[("F6", "publishing to nobody with require_route succeeded; it should have been refused as unroutable")],
        || {
            Defect::default().publisher(Box::new(|broker, topic, options| {
                broker.publisher(topic, options.with_require_route(false))
            }))
        },
    ),
    Double::new(
        "does not know a topic until it was prepared",
        &[("E6", "topics need not exist, and publishing to a new one failed: not found: topic")],
        || {
            Defect::default().publisher(Box::new(|broker, topic, options| {
                // Only E6 publishes where nobody prepared anything.
                if topic.as_str().ends_with(".missing") {
                    return Err(Error::not_found(format!("topic {topic} does not exist")));
                }
                broker.publisher(topic, options)
            }))
        },
    ),
    Double::new("waits for ever for a topic to exist", &[("E6", "publishing did not end within")], || {
        Defect::default().publish(Box::new(|publisher: &Publisher, message| {
            if publisher.topic().as_str().ends_with(".missing") {
                return Operation::boxed(std::future::pending());
            }
            publisher.publish(message)
        }))
    }),
    Double::new(
        "stops at the first failing handler",
        &[("C7", "the message being retried after a panic and an error did not end within")],
        || {
            let stopped = Arc::new(AtomicBool::new(false));
            let stop = Arc::clone(&stopped);
            Defect::default()
                .settle(Box::new(move |_, _, delivery, settlement| {
                    if matches!(&settlement, Settlement::Retry { failure: Some(_), .. }) {
                        stop.store(true, Ordering::SeqCst);
                    }
                    delivery.settle(settlement)
                }))
                .hold(Box::new(move || stopped.load(Ordering::SeqCst).then_some(Duration::from_secs(3600))))
        },
    ),
];
