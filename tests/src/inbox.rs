//! Receiving with patience: every wait ends, and says what it waited for.

use std::fmt;
use std::time::Duration;

use broker_core::{Delivery, Message, Received, Subscription};

use crate::messages::{same_set, shown};
use crate::patience::within;
use crate::{Attempt, Failed, Timing};

/// A subscription, received from with patience.
pub struct Inbox {
    subscription: Subscription,
    timing: Timing,
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inbox")
    }
}

impl Inbox {
    /// Over a subscription.
    pub fn new(subscription: Subscription, timing: Timing) -> Self {
        Self { subscription, timing }
    }

    /// The subscription itself.
    pub fn subscription(&mut self) -> &mut Subscription {
        &mut self.subscription
    }

    /// The subscription itself.
    pub fn into_subscription(self) -> Subscription {
        self.subscription
    }

    /// The next delivery.
    ///
    /// # Errors
    ///
    /// If none comes, or the subscription ended.
    pub async fn one(&mut self) -> Attempt<Delivery> {
        let patience = self.timing.arrival();
        match within(patience, self.subscription.next()).await {
            Some(Ok(Some(delivery))) => Ok(delivery),
            Some(Ok(None)) => Err(Failed("the subscription ended while a delivery was expected".to_owned())),
            Some(Err(error)) => Err(Failed(format!("the subscription failed: {error}"))),
            None => Err(Failed(format!("no delivery within {patience:?}"))),
        }
    }

    /// The next delivery, acked.
    ///
    /// # Errors
    ///
    /// If none comes or the ack is not taken.
    pub async fn acked(&mut self) -> Attempt<Received> {
        let delivery = self.one().await?;
        let received = delivery.received().clone();
        self.settled(delivery.ack()).await?;
        Ok(received)
    }

    /// Waits for a settlement to be taken.
    ///
    /// # Errors
    ///
    /// If it is not.
    pub async fn settled(&mut self, settle: broker_core::Settle) -> Attempt {
        settled(self.timing.patience, settle).await
    }

    /// `count` deliveries, none settled.
    ///
    /// # Errors
    ///
    /// If fewer come.
    pub async fn take(&mut self, count: usize) -> Attempt<Vec<Delivery>> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let delivery = self.one().await;
            taken.push(delivery.map_err(|failed| failed.context(format!("{} of {count} received", taken.len())))?);
        }
        Ok(taken)
    }

    /// `count` deliveries, each acked.
    ///
    /// # Errors
    ///
    /// If fewer come or an ack is not taken.
    pub async fn take_acked(&mut self, count: usize) -> Attempt<Vec<Received>> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let received = self.acked().await;
            taken.push(received.map_err(|failed| failed.context(format!("{} of {count} received", taken.len())))?);
        }
        Ok(taken)
    }

    /// Exactly these messages, in any order, each acked; and nothing more.
    ///
    /// # Errors
    ///
    /// If one is missing, comes twice, or another comes.
    pub async fn expect(&mut self, messages: &[Message]) -> Attempt<Vec<Received>> {
        let received = self.take_acked(messages.len()).await?;
        same_set(messages, &received)?;
        self.quiet().await?;
        Ok(received)
    }

    /// Nothing comes.
    ///
    /// # Errors
    ///
    /// If something does, or the subscription ends.
    pub async fn quiet(&mut self) -> Attempt {
        self.quiet_for(self.timing.quiet).await
    }

    /// Nothing comes for so long.
    ///
    /// # Errors
    ///
    /// If something does, or the subscription ends.
    pub async fn quiet_for(&mut self, time: Duration) -> Attempt {
        match tokio::time::timeout(time, self.subscription.next()).await {
            Err(_) => Ok(()),
            Ok(Ok(Some(delivery))) => Err(Failed(format!(
                "an unexpected delivery: {} on {}, attempt {}",
                shown(delivery.message()),
                delivery.topic(),
                delivery.attempt()
            ))),
            Ok(Ok(None)) => Err(Failed("the subscription ended".to_owned())),
            Ok(Err(error)) => Err(Failed(format!("the subscription failed: {error}"))),
        }
    }

    /// The subscription ends, without an error.
    ///
    /// # Errors
    ///
    /// If it delivers, fails or stays open.
    pub async fn ended(&mut self) -> Attempt {
        match within(self.timing.patience, self.subscription.next()).await {
            Some(Ok(None)) => Ok(()),
            Some(Ok(Some(delivery))) => Err(Failed(format!("an unexpected delivery: {}", shown(delivery.message())))),
            Some(Err(error)) => Err(Failed(format!("the subscription failed: {error}"))),
            None => Err(Failed("the subscription did not end".to_owned())),
        }
    }

    /// Unsubscribes.
    ///
    /// # Errors
    ///
    /// If the broker does not hear of it.
    pub async fn close(self) -> Attempt {
        let patience = self.timing.patience;
        match within(patience, self.subscription.close()).await {
            Some(closed) => Ok(closed?),
            None => Err(Failed(format!("closing a subscription did not end within {patience:?}"))),
        }
    }
}

/// Waits for a settlement to be taken.
pub(crate) async fn settled(patience: Duration, settle: broker_core::Settle) -> Attempt {
    match within(patience, settle).await {
        Some(taken) => taken.map_err(|error| Failed(format!("a settlement was not taken: {error}"))),
        None => Err(Failed(format!("a settlement did not end within {patience:?}"))),
    }
}
