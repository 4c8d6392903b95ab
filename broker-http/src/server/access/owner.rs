//! Who answers for a subscription: a push goes on while nobody asks for it, so that it is held to the rules of whoever
//! had it pushed.

use broker_core::{GroupName, TopicFilter};

use super::super::problem::Answer;
use super::{Action, Caller, Gate, Identity};
use crate::SubscriptionSpec;

impl Identity {
    /// The first right that it lacks to have a subscription of these settings.
    fn lacks_for(&self, spec: &SubscriptionSpec) -> Option<(Action, TopicFilter)> {
        // Dead letters are published there.
        let publishes = spec.dead_letter.as_ref().map(|topic| (Action::Publish, topic.into()));
        let needs = [Some((Action::Subscribe, spec.filter.clone())), publishes];
        needs.into_iter().flatten().find(|(action, filter)| !self.may(*action, filter))
    }
}

impl Caller {
    /// Its name, as an owner's.
    pub(crate) fn owner(&self) -> Option<GroupName> {
        // An identity's name has the grammar.
        GroupName::new(self.name()).ok()
    }

    /// Whether it may know whose a subscription to `filter` is.
    pub(crate) fn may_see_owner(&self, owner: &GroupName, filter: &TopicFilter) -> bool {
        owner.as_str() == self.name() || self.may(Action::Admin, filter)
    }
}

impl Gate {
    /// Refuses a subscription of these settings to who may not have it, by the rules of now: the request may have come
    /// slowly.
    pub(crate) fn check_subscription(&self, caller: Option<&Caller>, spec: &SubscriptionSpec) -> Answer<()> {
        let Some(now) = self.known_now(caller)? else { return Ok(()) };
        match now.known.identity.lacks_for(spec) {
            Some((action, filter)) => now.check(action, &filter),
            None => Ok(()),
        }
    }

    /// Whether the owner of a subscription may no longer have it. What is nobody's is the operator's.
    pub(crate) fn disowns(&self, owner: Option<&GroupName>, spec: &SubscriptionSpec) -> bool {
        let access = self.access.read();
        let Some(owner) = owner.filter(|_| !access.is_open()) else { return false };
        let identity = access.known.iter().map(|known| &known.identity).find(|one| one.name == owner.as_str());
        identity.is_none_or(|identity| identity.lacks_for(spec).is_some())
    }
}
