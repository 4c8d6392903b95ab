//! Doubles that settle wrongly.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{Delivery, Failure, Operation, Settle, Settlement};
use parking_lot::Mutex;

use super::{Defect, Double, LEASE};

/// Settles otherwise than asked.
fn settled(change: fn(&Delivery, Settlement) -> Settlement) -> Defect {
    Defect::default().settle(Box::new(move |_, _, delivery, settlement| {
        let settlement = change(&delivery, settlement);
        delivery.settle(settlement)
    }))
}

/// The retry policy with another number of attempts.
fn attempts(change: fn(u32) -> u32) -> Defect {
    Defect::default().settings(Box::new(move |settings| {
        settings.retry = settings.retry.and_then(|retry| retry.with_max_attempts(change(retry.max_attempts())).ok());
    }))
}

const fn retry(after: Option<Duration>) -> Settlement {
    Settlement::Retry { after, failure: None }
}

pub(super) const DOUBLES: &[Double] = &[
    Double::new(
        "forgets an ack",
        &[
            ("C1", "an unexpected delivery: message"),
            ("C5", "messages are missing"),
            ("E8", "messages stayed, the report says"),
        ],
        || {
            settled(
                |delivery, settlement| {
                    if settlement == Settlement::Ack && delivery.attempt() == 1 { retry(None) } else { settlement }
                },
            )
        },
    ),
    Double::new("forgets an ack when its lease ends", &[("C1", "an unexpected delivery: message")], || {
        settled(|delivery, settlement| match settlement {
            Settlement::Ack if delivery.attempt() == 1 => retry(Some(LEASE * 5 / 4)),
            other => other,
        })
    }),
    Double::new("acks cumulatively", &[("C5", "received: no delivery within")], || {
        Defect::default().settle(Box::new(|trail, place, delivery, settlement| {
            if settlement == Settlement::Ack {
                for earlier in trail.take_before(place) {
                    drop(earlier.ack());
                }
            }
            delivery.settle(settlement)
        }))
    }),
    Double::new("settles the neighbour", &[("G1", "messages are missing")], || {
        Defect::default().settle(Box::new(|trail, place, delivery, settlement| match trail.take(place ^ 1) {
            Some(neighbour) => {
                trail.put(place ^ 1, delivery);
                neighbour.settle(settlement)
            }
            None => delivery.settle(settlement),
        }))
    }),
    Double::new(
        "acks what should be retried",
        &[
            ("C2", "in a group: no delivery within"),
            ("C8", "no delivery within"),
            ("C9", "no delivery within"),
            ("G1", "received: no delivery within"),
            ("G6", "received: no delivery within"),
        ],
        || {
            settled(
                |_, settlement| {
                    if matches!(settlement, Settlement::Retry { .. }) { Settlement::Ack } else { settlement }
                },
            )
        },
    ),
    Double::new(
        "drops what is rejected",
        &[
            ("C3", "the dead-letter topic: no delivery within"),
            ("G1", "received: no delivery within"),
            ("G3", "no delivery within"),
        ],
        || {
            settled(
                |_, settlement| if matches!(settlement, Settlement::Reject(_)) { Settlement::Ack } else { settlement },
            )
        },
    ),
    Double::new("retries what is rejected", &[("C3", "an unexpected delivery: message")], || {
        settled(|_, settlement| if matches!(settlement, Settlement::Reject(_)) { retry(None) } else { settlement })
    }),
    Double::new("forgets why", &[("C3", "the dead letter's reason is")], || {
        settled(|_, settlement| match settlement {
            Settlement::Reject(_) => Settlement::Reject(Failure::new("rejected")),
            other => other,
        })
    }),
    Double::new("settles only while it is waited for", &[("C4", "an unexpected delivery: message")], || {
        Defect::default().settle(Box::new(|_, _, delivery, settlement| {
            Operation::boxed(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                delivery.settle(settlement).await
            })
        }))
    }),
    Double::new(
        "acks what is dropped",
        &[
            ("C6", "after a drop: no delivery within"),
            ("C9", "no delivery within"),
            ("C11", "after an aborted task: no delivery within"),
            ("F3", "are still to come: no delivery within"),
        ],
        || Defect::default().abandon(Box::new(|delivery| drop(delivery.ack()))),
    ),
    Double::new(
        "forgets what is dropped",
        &[
            ("C5", "received: no delivery within"),
            ("C6", "after a drop: no delivery within"),
            ("C8", "no delivery within"),
        ],
        || {
            let forgotten: Arc<Mutex<Vec<Delivery>>> = Arc::default();
            Defect::default().abandon(Box::new(move |delivery| forgotten.lock().push(delivery)))
        },
    ),
    Double::new(
        "dead-letters at the first failure",
        &[("C7", "the message being retried after a panic and an error did not end within")],
        || {
            settled(|_, settlement| match settlement {
                Settlement::Retry { failure: Some(failure), .. } => Settlement::Reject(failure),
                other => other,
            })
        },
    ),
    Double::new("counts what is given back as an attempt", &[("C8", "says it is attempt")], || {
        settled(|_, settlement| if settlement == Settlement::Release { retry(None) } else { settlement })
    }),
    Double::new("never gives up", &[("C9", "an unexpected delivery: message")], || attempts(|_| 1_000)),
    Double::new("gives up one attempt late", &[("C9", "an unexpected delivery: message")], || {
        attempts(|most| most + 1)
    }),
    Double::new("gives up one attempt early", &[("C9", "no delivery within")], || {
        attempts(|most| most.saturating_sub(1).max(1))
    }),
    Double::new("redelivers early", &[("C10", "came back after")], || {
        settled(|_, settlement| match settlement {
            Settlement::Retry { failure, .. } => Settlement::Retry { after: None, failure },
            other => other,
        })
    }),
    Double::new("stands still while a retry waits", &[("D5", "while one message waits for its retry")], || {
        let until: Arc<Mutex<Option<Instant>>> = Arc::default();
        let held = Arc::clone(&until);
        Defect::default()
            .settle(Box::new(move |_, _, delivery, settlement| {
                if let Settlement::Retry { after: Some(after), .. } = &settlement {
                    // A little longer than the retry: then it is among what comes first.
                    *until.lock() = Some(Instant::now() + *after + Duration::from_millis(50));
                }
                delivery.settle(settlement)
            }))
            .hold(Box::new(move || {
                let rest = held.lock().map(|until| until.saturating_duration_since(Instant::now()));
                rest.filter(|rest| !rest.is_zero())
            }))
    }),
    Double::new(
        "calls a drain that was cut complete",
        &[
            ("C11", "a handler was cut short and the drain called complete"),
            ("E3", "a delivery was unsettled and the drain called complete"),
        ],
        || {
            Defect::default().close(Box::new(|broker, deadline| {
                Box::pin(async move {
                    let mut report = broker.close(deadline).await;
                    report.complete = true;
                    report.in_flight = 0;
                    report
                })
            }))
        },
    ),
    Double::new("acks later, and forgets on close", &[("E8", "every delivery was acked, the report says")], || {
        Defect::default()
            .settle(Box::new(|_, _, delivery, settlement| {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let _ = delivery.settle(settlement).await;
                });
                Settle::done()
            }))
            .close(Box::new(|broker, _| Box::pin(async move { broker.close(Duration::ZERO).await })))
    }),
];
