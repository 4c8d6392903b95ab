//! The subscriptions that an operator declared: whether they can be, and that they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use broker_core::{Broker, Group, GroupName, GroupSettings};
use http::StatusCode;

use super::super::Shared;
use super::super::groups::Groups;
use super::super::problem::{Answer, Problem};
use super::{Registry, Subscribed, group_of};
use crate::SubscriptionSpec;

impl Registry {
    /// Refuses declared subscriptions that those which stand cannot become, that could not stand beside each other, or
    /// that are more than `most` with those made over the interface: now, or when they are made anew at the next start.
    pub(crate) fn check_declared(
        &self,
        broker: &dyn Broker,
        wanted: &BTreeMap<GroupName, SubscriptionSpec>,
        most: usize,
    ) -> Answer<()> {
        let (table, declared) = (self.table.read(), self.declared.read());
        let is_own = |one: &&Arc<Subscribed>| !declared.contains(&one.name) && !wanted.contains_key(&one.name);
        let own: Vec<_> = table.values().filter(is_own).collect();
        // Those that stand may be more than a limit allows now.
        let grows = wanted.keys().any(|name| !table.contains_key(name.as_str()));
        let beside = if grows { own.len() } else { 0 };
        if wanted.len() + beside > most {
            let beside = if beside > 0 { format!(" beside {beside} made over the interface") } else { String::new() };
            let declared = wanted.len();
            return Err(Problem::invalid(format!(
                "{declared} subscriptions are declared{beside}, and limits.subscriptions is {most}"
            )));
        }
        let mut groups: BTreeMap<Group, (String, GroupSettings)> = BTreeMap::new();
        for (name, spec) in wanted {
            let named = |problem: Problem| problem.context(format!("subscription {name}"));
            let group = group_of(name, spec);
            let have = table.get(name.as_str());
            if let Some(have) = have {
                have.check_stays(&group, spec).map_err(named)?;
            }
            let first = match groups.get(&group) {
                Some(first) => Some(first.clone()),
                None => {
                    let settings = Groups::first(broker, &group, spec).map_err(|error| named(error.into()))?;
                    let alone = table.values().filter(|one| one.group == group).count() == 1;
                    if let Some(stands) = self.groups.settings(&group).filter(|_| have.is_some())
                        && (alone || spec.ordered.is_some())
                        && stands.ordered != settings.ordered
                    {
                        return Err(named(Problem::conflict(format!(
                            "ordered would change from {} to {}, and it is fixed when a group is made; declare it under another \
                            name, and leave the old one until it is empty",
                            stands.ordered, settings.ordered
                        ))));
                    }
                    groups.insert(group.clone(), (format!("subscription {name}"), settings));
                    // A new one joins what somebody else has made.
                    let made = own.iter().find(|one| one.group == group).filter(|_| have.is_none());
                    made.and_then(|one| Some((format!("subscription {}", one.name), self.groups.settings(&one.group)?)))
                }
            };
            if let Some((other, settings)) = first
                && let Some(option) = Groups::difference(spec, &settings)
            {
                return Err(named(Problem::conflict(format!(
                    "{option} is not what {other} has, which is of the same group; say the same, or leave it out"
                ))));
            }
        }
        Ok(())
    }

    /// Brings the declared subscriptions to what is declared now; tells which could not be. One that
    /// is declared no more goes, and its backlog stays for whoever may declare it again.
    pub(crate) async fn declare(
        &self,
        shared: &Arc<Shared>,
        wanted: &BTreeMap<GroupName, SubscriptionSpec>,
    ) -> Vec<(GroupName, Problem)> {
        let before = std::mem::replace(&mut *self.declared.write(), wanted.keys().cloned().collect());
        let mut failed = Vec::new();
        for name in before.into_iter().filter(|name| !wanted.contains_key(name)) {
            match self.delete(&self.begin().await, shared, name.as_str(), true).await {
                // It could not be made, or has expired.
                Err(problem) if problem.status() == StatusCode::NOT_FOUND => {}
                Err(problem) => failed.push((name, problem)),
                Ok(()) => {}
            }
        }
        for (name, spec) in wanted {
            let allowed = spec.endpoint.as_ref().map_or(Ok(()), |endpoint| shared.check_endpoint(endpoint));
            let put = match allowed {
                Ok(()) => self
                    .put(&self.begin().await, shared, name.clone(), spec.clone(), false, (None, None))
                    .await
                    .map(drop),
                Err(problem) => Err(problem),
            };
            if let Err(problem) = put {
                failed.push((name.clone(), problem));
            }
        }
        failed
    }
}
