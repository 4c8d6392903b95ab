//! What a stream reads: a copy of its own, or a group, as a member of it that a pause sends away.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use broker_core::{Delivery, Gap, Group, Result, Subscribe, Subscription};
use tokio::sync::watch;

use super::Shared;
use super::registry::Reading;

/// What a stream reads.
pub(crate) struct Member {
    /// `None` while the group is left.
    subscription: Option<Subscription>,
    place: Option<Place>,
}

/// Where a member is to be again once the group is no longer paused.
struct Place {
    shared: Arc<Shared>,
    options: Subscribe,
    /// Ends when a subscription of the group has changed since it was asked for the last time.
    changed: Pin<Box<dyn Future<Output = watch::Receiver<()>> + Send>>,
    paused: bool,
    /// Ends when the server closes, which closes the subscriptions that there are.
    closing: Pin<Box<dyn Future<Output = ()> + Send>>,
    joining: Option<Pin<Box<dyn Future<Output = Result<Subscription>> + Send>>>,
    reading: Reading,
}

/// A copy of its own.
impl From<Subscription> for Member {
    fn from(subscription: Subscription) -> Self {
        Self { subscription: Some(subscription), place: None }
    }
}

impl Member {
    /// Joins the group that is read.
    pub(crate) async fn join(shared: &Arc<Shared>, reading: Reading, max_in_flight: usize) -> Result<Self> {
        let Group { name, filter, .. } = reading.group();
        let options = Subscribe::group(name.clone()).with_max_in_flight(max_in_flight)?;
        let paused = shared.registry.pauses(reading.group());
        let subscription = if paused { None } else { Some(shared.broker.subscribe(filter, options.clone()).await?) };
        let mut changes = reading.changes();
        // Whether it is paused is looked at first.
        changes.mark_changed();
        let place = Place {
            shared: Arc::clone(shared),
            options,
            changed: Box::pin(next(changes)),
            paused,
            closing: Box::pin(shared.connections.closing().cancelled_owned()),
            joining: None,
            reading,
        };
        Ok(Self { subscription, place: Some(place) })
    }

    /// As [`Subscription::poll_receive`]; nothing comes while the group is paused, and it ends with the group.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        batch: &mut Vec<Delivery>,
        max: usize,
    ) -> Poll<Result<usize>> {
        if !ready!(self.poll_there(cx))? {
            return Poll::Ready(Ok(0));
        }
        match &mut self.subscription {
            Some(subscription) => subscription.poll_receive(cx, batch, max),
            None => Poll::Ready(Ok(0)),
        }
    }

    /// As [`Subscription::receive`]; where nothing is wanted, it only leaves and joins the group as it is paused and resumed.
    pub(crate) async fn receive(&mut self, batch: &mut Vec<Delivery>, max: usize) -> Result<usize> {
        let mut receiving = Receiving { member: self, waits: false };
        std::future::poll_fn(|cx| match max {
            0 => match ready!(receiving.member.poll_there(cx)) {
                Ok(true) => Poll::Pending,
                ended => Poll::Ready(ended.map(|_| 0)),
            },
            max => {
                let received = receiving.member.poll_receive(cx, batch, max);
                receiving.waits = received.is_pending();
                received
            }
        })
        .await
    }

    /// As [`Subscription::gap`].
    pub(crate) fn gap(&mut self) -> Option<Gap> {
        self.subscription.as_mut()?.gap()
    }

    /// Ready when it is a member; false if there is nothing to be a member of.
    fn poll_there(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool>> {
        let Some(place) = &mut self.place else { return Poll::Ready(Ok(true)) };
        while let Poll::Ready(changes) = place.changed.as_mut().poll(cx) {
            place.changed = Box::pin(next(changes));
            place.paused = place.shared.registry.pauses(place.reading.group());
        }
        if place.paused {
            self.subscription = None;
            place.joining = None;
            ready!(place.closing.as_mut().poll(cx));
            return Poll::Ready(Ok(false));
        }
        if self.subscription.is_some() {
            return Poll::Ready(Ok(true));
        }
        let is_gone = |place: &Place| place.shared.registry.groups.settings(place.reading.group()).is_none();
        if is_gone(place) {
            // It was deleted meanwhile: to join would make it again.
            return Poll::Ready(Ok(false));
        }
        let joining = place.joining.get_or_insert_with(|| {
            let (shared, group) = (Arc::clone(&place.shared), place.reading.group());
            let (filter, options) = (group.filter.clone(), place.options.clone());
            Box::pin(async move { shared.broker.subscribe(&filter, options).await })
        });
        let joined = ready!(joining.as_mut().poll(cx));
        place.joining = None;
        let joined = joined?;
        if is_gone(place) {
            return Poll::Ready(Ok(false));
        }
        self.subscription = Some(joined);
        Poll::Ready(Ok(true))
    }
}

/// A receive that is awaited: tells the broker when it is not awaited any more, so that nothing is kept for who does not come.
struct Receiving<'a> {
    member: &'a mut Member,
    waits: bool,
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        if let (true, Some(subscription)) = (self.waits, &mut self.member.subscription) {
            subscription.stop_waiting();
        }
    }
}

async fn next(mut changes: watch::Receiver<()>) -> watch::Receiver<()> {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    changes
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("subscription", &self.subscription).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use broker_core::Consumer;
    use futures_util::FutureExt as _;

    use super::*;

    /// Has nothing, and counts how often it was told that nobody waits.
    struct Silent(Arc<AtomicUsize>);

    impl Consumer for Silent {
        fn poll_receive(&mut self, _: &mut Context<'_>, _: &mut Vec<Delivery>, _: usize) -> Poll<Result<usize>> {
            Poll::Pending
        }

        fn gap(&mut self) -> Option<Gap> {
            None
        }

        fn stop_waiting(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_receive_that_is_dropped_waits_no_more() {
        let told = Arc::<AtomicUsize>::default();
        let mut member = Member::from(Subscription::new(Silent(Arc::clone(&told))));
        let mut batch = Vec::new();
        assert!(member.receive(&mut batch, 1).now_or_never().is_none());
        assert_eq!(told.load(Ordering::Relaxed), 1);
        // Nothing was waited for.
        assert!(member.receive(&mut batch, 0).now_or_never().is_none());
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }
}
