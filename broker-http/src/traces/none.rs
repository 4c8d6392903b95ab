//! What stands in where there are no traces.

use broker_core::{Delivery, Error, Message, Topic};
use http::HeaderMap;

use crate::push::{Outcome, Target, Verdict};

#[derive(Clone, Debug, Default)]
pub(crate) struct Traces(());

#[derive(Clone, Debug)]
pub(crate) struct Parent;

pub(crate) struct Publishing;

pub(crate) struct Processing;

pub(crate) struct Pushing;

impl Traces {
    pub(crate) fn parent(&self, _: &HeaderMap) -> Parent {
        Parent
    }

    pub(crate) fn publish(&self, _: &Topic, _: &mut Message) -> Publishing {
        Publishing
    }

    pub(crate) fn publish_many(&self, _: &Topic, _: &Parent, _: &mut [Message]) -> Publishing {
        Publishing
    }

    pub(crate) fn process(&self, _: &str, _: &broker_core::Group, _: &[Delivery]) -> Processing {
        Processing
    }
}

impl Publishing {
    pub(crate) fn failed(&mut self, _: &Error) {}
}

impl Processing {
    pub(crate) fn push(&self, _: &Target) -> Pushing {
        Pushing
    }

    pub(crate) fn judged(&mut self, _: &Verdict) {}

    pub(crate) fn over(self) {}
}

impl Pushing {
    pub(crate) fn inject(&self, _: &mut HeaderMap) {}

    pub(crate) fn over(self, _: &Outcome) {}
}
