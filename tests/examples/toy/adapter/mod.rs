//! A broker in four files: one mutex, one queue a group, and no more than it declares.

mod broker;
mod publisher;
mod queues;
mod subscription;

use std::sync::Arc;

use broker_core::{Broker, Result};
use broker_tests::{Harness, Place, Timing};

pub(crate) use broker::Toy;

/// What the suite needs to know of a toy.
#[derive(Debug)]
pub(crate) struct ToyHarness(Toy);

impl ToyHarness {
    pub(crate) fn new() -> Self {
        Self(Toy::new())
    }
}

impl Harness for ToyHarness {
    fn name(&self) -> String {
        "toy:".to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(self.0.clone()))
    }

    fn place(&self) -> Place {
        Place::InProcess
    }

    fn timing(&self) -> Timing {
        Timing::in_process()
    }
}
