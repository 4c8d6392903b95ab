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
        let owning = self.lacks_to_own(&spec.filter).map(|action| (action, spec.filter.clone()));
        owning.or_else(|| publishes.filter(|(action, filter)| !self.may(*action, filter)))
    }

    /// The first right that it lacks to make, change or delete a subscription to `filter`. Each can take messages out of
    /// its group, whoever else they are for: a push is settled by its endpoint's answer, another backlog or `expires` drops
    /// some, and the backlog goes with the last of a group.
    fn lacks_to_own(&self, filter: &TopicFilter) -> Option<Action> {
        if self.may(Action::Admin, filter) {
            return None;
        }
        OWNING.into_iter().find(|action| !self.may(*action, filter))
    }
}

/// What it takes to own a subscription, for who is no admin.
const OWNING: [Action; 2] = [Action::Subscribe, Action::Settle];

impl Caller {
    /// Refuses to make, change or delete a subscription to `filter` to who may not.
    pub(super) fn check_owning(&self, filter: &TopicFilter) -> Answer<()> {
        self.known.identity.lacks_to_own(filter).map_or(Ok(()), |action| self.check(action, filter))
    }

    /// Whether it may.
    pub(crate) fn may_own(&self, filter: &TopicFilter) -> bool {
        self.known.identity.lacks_to_own(filter).is_none()
    }

    /// The same, where it is not known yet of what filter.
    pub(super) fn check_owning_at_all(&self) -> Answer<()> {
        let lacks = OWNING.into_iter().find(|action| !self.may_at_all(*action));
        match lacks.filter(|_| !self.may_at_all(Action::Admin)) {
            Some(action) => Err(self.forbidden(&format!("{action} on any topic"))),
            None => Ok(()),
        }
    }

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
