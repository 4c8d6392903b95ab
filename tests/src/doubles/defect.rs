//! What can be wrong with a double: hooks where it does something else than the broker it wraps.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, Delivery, DrainReport, Group, GroupOptions, Message, Publish, PublishBatch,
    Publisher, PublisherOptions, Result, Settle, Settlement, Status, Subscribe, Subscription, Topic, TopicFilter,
};
use parking_lot::Mutex;

/// A delivery handed out and not settled yet.
pub(crate) type Slot = Arc<Mutex<Option<Delivery>>>;

/// Every delivery a double has handed out, in order.
#[derive(Default)]
pub(crate) struct Trail(Mutex<Vec<Slot>>);

impl Trail {
    /// Adds a delivery; its place and its slot.
    pub(crate) fn add(&self, delivery: Delivery) -> (usize, Slot) {
        let slot: Slot = Arc::new(Mutex::new(Some(delivery)));
        let mut slots = self.0.lock();
        slots.push(Arc::clone(&slot));
        (slots.len() - 1, slot)
    }

    /// Takes the delivery at `place`, unless it was settled.
    pub(crate) fn take(&self, place: usize) -> Option<Delivery> {
        let slot = self.0.lock().get(place).map(Arc::clone)?;
        slot.lock().take()
    }

    /// Puts a delivery at `place`.
    pub(crate) fn put(&self, place: usize, delivery: Delivery) {
        if let Some(slot) = self.0.lock().get(place) {
            *slot.lock() = Some(delivery);
        }
    }

    /// Takes every delivery not settled, those before `place` only.
    pub(crate) fn take_before(&self, place: usize) -> Vec<Delivery> {
        let slots: Vec<Slot> = self.0.lock().iter().take(place).map(Arc::clone).collect();
        slots.iter().filter_map(|slot| slot.lock().take()).collect()
    }
}

/// Declares the hooks: a field, and a method that sets it.
macro_rules! hooks {
    ($($(#[$doc:meta])* $name:ident: $hook:ty;)*) => {
        /// What a double does wrong; a hook that is not set does right.
        #[derive(Default)]
        pub(crate) struct Defect {
            $($(#[$doc])* pub(crate) $name: Option<Box<$hook>>,)*
            pub(crate) trail: Trail,
        }

        impl Defect {
            $($(#[$doc])*
            pub(crate) fn $name(mut self, hook: Box<$hook>) -> Self {
                self.$name = Some(hook);
                self
            })*
        }
    };
}

pub(crate) type SubscribeHook =
    dyn Fn(Arc<dyn Broker>, TopicFilter, Subscribe) -> BoxFuture<'static, Result<Subscription>> + Send + Sync;
pub(crate) type CreateHook =
    dyn Fn(Arc<dyn Broker>, Group, GroupOptions) -> BoxFuture<'static, Result<bool>> + Send + Sync;
pub(crate) type CloseHook = dyn Fn(Arc<dyn Broker>, Duration) -> BoxFuture<'static, DrainReport> + Send + Sync;

hooks! {
    /// Opening a handle.
    opening: dyn Fn() + Send + Sync;
    /// What it says it can do.
    capabilities: dyn Fn(&mut Capabilities) + Send + Sync;
    /// Making a publisher.
    publisher: dyn Fn(&dyn Broker, &Topic, PublisherOptions) -> Result<Publisher> + Send + Sync;
    /// Publishing a message.
    publish: dyn Fn(&Publisher, Message) -> Publish + Send + Sync;
    /// Publishing a batch.
    publish_batch: dyn Fn(&Publisher, Vec<Message>) -> PublishBatch + Send + Sync;
    /// Subscribing.
    subscribe: SubscribeHook;
    /// Creating a group ahead.
    create_group: CreateHook;
    /// The settings a group is made with.
    settings: dyn Fn(&mut GroupOptions) + Send + Sync;
    /// How long receiving is held up.
    hold: dyn Fn() -> Option<Duration> + Send + Sync;
    /// How often a delivery is handed out.
    copies: dyn Fn(&Delivery) -> usize + Send + Sync;
    /// The message as a receiver sees it.
    message: dyn Fn(&Message) -> Message + Send + Sync;
    /// The attempt as a receiver sees it.
    attempt: dyn Fn(u32) -> u32 + Send + Sync;
    /// Settling the delivery at a place of the trail.
    settle: dyn Fn(&Trail, usize, Delivery, Settlement) -> Settle + Send + Sync;
    /// Dropping a delivery unsettled.
    abandon: dyn Fn(Delivery) + Send + Sync;
    /// Telling a gap.
    silent: dyn Fn() -> bool + Send + Sync;
    /// Unsubscribing: what becomes of the subscription.
    leave: dyn Fn(&Trail, Arc<dyn Broker>, Option<Group>, Subscription) + Send + Sync;
    /// The status.
    status: dyn Fn(&mut Status) + Send + Sync;
    /// Closing.
    close: CloseHook;
}

impl fmt::Debug for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Defect")
    }
}
