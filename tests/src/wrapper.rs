//! A broker that hands everything on: what a program puts around a broker must change nothing.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, DeadLetter, DrainReport, Group, GroupOptions, Publisher, PublisherOptions, Result,
    Status, Subscribe, Subscription, Topic, TopicFilter,
};

/// A wrapper without a purpose of its own: every check is run through it as well, so that a broker
/// that depends on its concrete type shows.
#[derive(Clone, Debug)]
pub struct Wrapper(Arc<dyn Broker>);

impl Wrapper {
    /// Around `inner`.
    pub fn new(inner: Arc<dyn Broker>) -> Self {
        Self(inner)
    }
}

#[deny(clippy::missing_trait_methods)]
impl Broker for Wrapper {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        self.0.connect()
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.0.publisher(topic, options)
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        self.0.subscribe(filter, options)
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        self.0.create_group(group, options)
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        self.0.alter_group(group, options)
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        self.0.delete_group(group)
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.0.purge_group(group)
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        self.0.dead_letters(group, max)
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        self.0.purge_dead_letters(group)
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        self.0.redrive(group, max)
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        self.0.status()
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        self.0.close(deadline)
    }
}
