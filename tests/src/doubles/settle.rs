//! Doubles that settle wrongly.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_core::{Delivery, Failure, Operation, Settle, Settlement};
use parking_lot::Mutex;

use super::{Defect, Double};

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
    Double::new("forgets an ack", &["C1", "C5", "E8"], || {
        settled(
            |delivery, settlement| {
                if settlement == Settlement::Ack && delivery.attempt() == 1 { retry(None) } else { settlement }
            },
        )
    }),
    Double::new("acks cumulatively", &["C5"], || {
        Defect::default().settle(Box::new(|trail, place, delivery, settlement| {
            if settlement == Settlement::Ack {
                for earlier in trail.take_before(place) {
                    drop(earlier.ack());
                }
            }
            delivery.settle(settlement)
        }))
    }),
    Double::new("settles the neighbour", &["G1"], || {
        Defect::default().settle(Box::new(|trail, place, delivery, settlement| match trail.take(place ^ 1) {
            Some(neighbour) => {
                trail.put(place ^ 1, delivery);
                neighbour.settle(settlement)
            }
            None => delivery.settle(settlement),
        }))
    }),
    Double::new("acks what should be retried", &["C2", "C8", "C9", "G1", "G6"], || {
        settled(
            |_, settlement| if matches!(settlement, Settlement::Retry { .. }) { Settlement::Ack } else { settlement },
        )
    }),
    Double::new("drops what is rejected", &["C3", "G1", "G3"], || {
        settled(|_, settlement| if matches!(settlement, Settlement::Reject(_)) { Settlement::Ack } else { settlement })
    }),
    Double::new("retries what is rejected", &["C3"], || {
        settled(|_, settlement| if matches!(settlement, Settlement::Reject(_)) { retry(None) } else { settlement })
    }),
    Double::new("forgets why", &["C3"], || {
        settled(|_, settlement| match settlement {
            Settlement::Reject(_) => Settlement::Reject(Failure::new("rejected")),
            other => other,
        })
    }),
    Double::new("settles only while it is waited for", &["C4"], || {
        Defect::default().settle(Box::new(|_, _, delivery, settlement| {
            Operation::boxed(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                delivery.settle(settlement).await
            })
        }))
    }),
    Double::new("acks what is dropped", &["C6", "C9", "C11", "F3"], || {
        Defect::default().abandon(Box::new(|delivery| drop(delivery.ack())))
    }),
    Double::new("forgets what is dropped", &["C5", "C6", "C8"], || {
        let forgotten: Arc<Mutex<Vec<Delivery>>> = Arc::default();
        Defect::default().abandon(Box::new(move |delivery| forgotten.lock().push(delivery)))
    }),
    Double::new("dead-letters at the first failure", &["C7"], || {
        settled(|_, settlement| match settlement {
            Settlement::Retry { failure: Some(failure), .. } => Settlement::Reject(failure),
            other => other,
        })
    }),
    Double::new("counts what is given back as an attempt", &["C8"], || {
        settled(|_, settlement| if settlement == Settlement::Release { retry(None) } else { settlement })
    }),
    Double::new("never gives up", &["C9"], || attempts(|_| 1_000)),
    Double::new("gives up one attempt late", &["C9"], || attempts(|most| most + 1)),
    Double::new("gives up one attempt early", &["C9"], || attempts(|most| most.saturating_sub(1).max(1))),
    Double::new("redelivers early", &["C10"], || {
        settled(|_, settlement| match settlement {
            Settlement::Retry { failure, .. } => Settlement::Retry { after: None, failure },
            other => other,
        })
    }),
    Double::new("stands still while a retry waits", &["D5"], || {
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
    Double::new("calls a drain that was cut complete", &["C11", "E3"], || {
        Defect::default().close(Box::new(|broker, deadline| {
            Box::pin(async move {
                let mut report = broker.close(deadline).await;
                report.complete = true;
                report.in_flight = 0;
                report
            })
        }))
    }),
    Double::new("acks later, and forgets on close", &["E8"], || {
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
