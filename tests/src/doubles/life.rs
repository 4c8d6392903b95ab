//! Doubles that live and die wrongly.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use broker_core::{DrainReport, Error, Subscription};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{Defect, Double};

pub(super) const DOUBLES: &[Double] = &[
    Double::new("publishes after close", &[("E1", "a subscription after close: the subscription did not end")], || {
        Defect::default().close(Box::new(|_, _| Box::pin(std::future::ready(DrainReport::new(false)))))
    }),
    Double::new("reports otherwise at the second close", &[("E2", "three closes report")], || {
        let count = Arc::new(AtomicUsize::new(0));
        Defect::default().close(Box::new(move |broker, deadline| {
            let count = Arc::clone(&count);
            Box::pin(async move {
                let mut report = broker.close(deadline).await;
                report.complete = count.fetch_add(1, Ordering::SeqCst) == 0;
                report
            })
        }))
    }),
    Double::new("never ends the second close", &[("E2", "close did not end within")], || {
        let closing = Arc::new(AtomicBool::new(false));
        Defect::default().close(Box::new(move |broker, deadline| {
            let closing = closing.swap(true, Ordering::SeqCst);
            Box::pin(async move {
                if closing {
                    std::future::pending::<()>().await;
                }
                broker.close(deadline).await
            })
        }))
    }),
    Double::new(
        "waits for every settlement, whatever the deadline",
        &[("C11", "close did not end within"), ("E3", "close with a deadline of")],
        || {
            Defect::default()
                .close(Box::new(|broker, _| Box::pin(async move { broker.close(Duration::from_secs(3600)).await })))
        },
    ),
    Double::new("waits for nothing", &[("E9", "close did not wait for the handler in flight")], || {
        Defect::default().close(Box::new(|broker, _| Box::pin(async move { broker.close(Duration::ZERO).await })))
    }),
    Double::new("loses count of what stays", &[("E8", "messages stayed, the report says")], || {
        Defect::default().close(Box::new(|broker, deadline| {
            Box::pin(async move {
                let mut report = broker.close(deadline).await;
                report.undelivered = 0;
                report
            })
        }))
    }),
    Double::new(
        "keeps delivering after unsubscribing",
        &[
            ("B6", "two groups and one subscriber are left, matched"),
            ("E4", "the status forgetting a dropped subscription did not end within"),
            ("E12", "every subscription being gone did not end within"),
        ],
        || {
            // The task of a subscription that was dropped goes on receiving.
            Defect::default().leave(Box::new(|_, _, _, mut subscription| {
                tokio::spawn(async move {
                    let mut kept = Vec::new();
                    while let Ok(Some(delivery)) = subscription.next().await {
                        kept.push(delivery);
                    }
                });
            }))
        },
    ),
    Double::new(
        "ends a group with its last member",
        &[("E4", "received: no delivery within"), ("E13", "received: no delivery within")],
        || {
            Defect::default().leave(Box::new(|_, broker, group, subscription| {
                drop(subscription);
                if let Some(group) = group {
                    // The in-process broker answers at once.
                    let _ = futures_util::FutureExt::now_or_never(broker.delete_group(&group));
                }
            }))
        },
    ),
    Double::new(
        "lets go of what a member that leaves holds",
        &[("D7", "holds the first of each key: an unexpected delivery: message")],
        || {
            Defect::default().leave(Box::new(|trail, _, _, subscription| {
                drop(subscription);
                // Whoever holds one does not hear of it.
                trail.take_before(usize::MAX).into_iter().for_each(|delivery| drop(delivery.ack()));
            }))
        },
    ),
    Double::new(
        "subscribes for good once asked",
        &[("E5", "a cancelled subscribe leaving nothing did not end within")],
        || {
            Defect::default().subscribe(Box::new(|broker, filter, options| {
                let (tell, told) = tokio::sync::oneshot::channel();
                tokio::spawn(async move {
                    let subscribed = broker.subscribe(&filter, options).await;
                    if let Err(Ok(subscription)) = tell.send(subscribed) {
                        // Nobody waits for it any more: it stays.
                        let _stays: Subscription = subscription;
                        std::future::pending::<()>().await;
                    }
                });
                Box::pin(async { told.await.unwrap_or_else(|_| Err(Error::closed("the runtime ended"))) })
            }))
        },
    ),
    Double::new("needs a runtime to be made", &[("E10", "opening a broker outside a runtime panicked")], || {
        Defect::default().opening(Box::new(|| drop(Handle::current().spawn(async {}))))
    }),
    Double::new("is bound to the runtime it first saw", &[("E11", "subscribing did not end within")], || {
        let first: Arc<Mutex<Option<tokio::runtime::Id>>> = Arc::default();
        Defect::default().subscribe(Box::new(move |broker, filter, options| {
            let first = Arc::clone(&first);
            Box::pin(async move {
                let here = Handle::current().id();
                if *first.lock().get_or_insert(here) != here {
                    elsewhere().await;
                }
                broker.subscribe(&filter, options).await
            })
        }))
    }),
];

/// What happens to work spawned where nobody looks.
fn elsewhere() -> impl Future<Output = ()> {
    std::future::pending()
}
