//! The groups that subscriptions of this server share, and what each was set up with.

use std::collections::HashMap;

use broker_core::{Broker, Error, ErrorKind, Group, GroupOptions, GroupSettings, Result, Topic};
use parking_lot::Mutex;

use crate::SubscriptionSpec;

/// Groups by name and filter. Calls that change one come one at a time; see
/// [`Registry`](super::registry::Registry).
#[derive(Debug, Default)]
pub(crate) struct Groups(Mutex<HashMap<Group, Joined>>);

#[derive(Clone, Debug)]
struct Joined {
    settings: GroupSettings,
    subscriptions: usize,
}

/// What a subscription's JSON asks of its group, and nothing else.
fn asked(spec: &SubscriptionSpec) -> GroupOptions {
    let mut options = GroupOptions::new();
    options.start.clone_from(&spec.start);
    options.ordered = spec.ordered;
    options.backlog = spec.backlog;
    options.retry = spec.retry;
    options.dead_letter.clone_from(&spec.dead_letter);
    options
}

/// What a group made here has where nothing is asked: a full one refuses publishers, if its broker
/// can.
pub(crate) fn with_defaults(broker: &dyn Broker, mut options: GroupOptions) -> GroupOptions {
    if options.backlog.is_none() && broker.capabilities().overflow_reject.is_some() {
        options.backlog = Some(SubscriptionSpec::default_backlog());
    }
    options
}

/// Whether a group of this broker has a bound at all.
pub(crate) fn bounds_backlogs(broker: &dyn Broker) -> bool {
    let can = broker.capabilities();
    [can.overflow_wait, can.overflow_reject, can.overflow_drop_oldest].iter().any(|overflow| overflow.is_some())
}

/// Refuses a bound that nobody keeps: what a group is said to have there is a default, which one asked for may equal.
fn check_bound(broker: &dyn Broker, asked: &GroupOptions) -> Result<()> {
    if asked.backlog.is_some() && !bounds_backlogs(broker) {
        return Err(Error::unsupported("backlog: the broker behind this interface bounds none; leave backlog out"));
    }
    Ok(())
}

/// Makes a group with our defaults, or takes it as it is if it stands with others.
async fn ensure(broker: &dyn Broker, group: &Group, asked: GroupOptions) -> Result<()> {
    match broker.create_group(group, with_defaults(broker, asked.clone())).await {
        Err(error) if error.kind() == ErrorKind::Conflict => broker.create_group(group, asked).await.map(drop),
        made => made.map(drop),
    }
}

/// Where dead letters of a group go if nobody says it.
pub(crate) fn usual_dead_letter(group: &Group) -> Option<Topic> {
    GroupOptions::new().resolve(Some(&group.name)).ok()?.dead_letter
}

impl Groups {
    /// Counts one more subscription in, making the group if it is the first.
    ///
    /// # Errors
    ///
    /// That the group has other settings than are asked for, or cannot be made; that its broker has no such bound.
    pub(crate) async fn join(&self, broker: &dyn Broker, group: &Group, spec: &SubscriptionSpec) -> Result<()> {
        let asked = asked(spec);
        check_bound(broker, &asked)?;
        if let Some(settings) = self.settings(group) {
            asked.check_joins(group, &settings)?;
        }
        self.rejoin(broker, group, asked).await
    }

    /// Counts one more subscription in that was a member before, whatever the group has; the first makes the group as `asked`.
    ///
    /// # Errors
    ///
    /// That the group cannot be made so.
    pub(crate) async fn rejoin(&self, broker: &dyn Broker, group: &Group, asked: GroupOptions) -> Result<()> {
        let settings = match self.settings(group) {
            Some(settings) => settings,
            None => {
                let settings = with_defaults(broker, asked.clone()).resolve(Some(&group.name))?;
                ensure(broker, group, asked).await?;
                settings
            }
        };
        self.0.lock().entry(group.clone()).or_insert(Joined { settings, subscriptions: 0 }).subscriptions += 1;
        Ok(())
    }

    /// What these ask of their groups together: of each option, what the first says that says something.
    pub(crate) fn asked_by<'a>(
        members: impl Iterator<Item = (Group, &'a SubscriptionSpec)>,
    ) -> HashMap<Group, GroupOptions> {
        let mut groups: HashMap<Group, GroupOptions> = HashMap::new();
        for (group, spec) in members {
            let (all, one) = (groups.entry(group).or_default(), asked(spec));
            all.start = all.start.take().or(one.start);
            all.ordered = all.ordered.or(one.ordered);
            all.backlog = all.backlog.or(one.backlog);
            all.retry = all.retry.or(one.retry);
            all.dead_letter = all.dead_letter.take().or(one.dead_letter);
        }
        groups
    }

    /// Brings a group to what a changed subscription asks. What it leaves out goes back to the
    /// default if it is the group's only subscription, and stays if it shares the group.
    pub(crate) async fn alter(&self, broker: &dyn Broker, group: &Group, spec: &SubscriptionSpec) -> Result<()> {
        check_bound(broker, &asked(spec))?;
        let Some(joined) = self.0.lock().get(group).cloned() else { return Ok(()) };
        let have = joined.settings;
        let asked = if joined.subscriptions > 1 {
            asked(spec)
        } else {
            let defaults = Self::first(broker, group, spec)?;
            let mut all = GroupOptions::new()
                .with_ordered(defaults.ordered)
                .with_backlog(defaults.backlog)
                .with_retry(defaults.retry);
            all.dead_letter = defaults.dead_letter;
            all
        };
        let mut changes = GroupOptions::new();
        changes.ordered = asked.ordered.filter(|ordered| *ordered != have.ordered);
        changes.backlog = asked.backlog.filter(|backlog| *backlog != have.backlog);
        changes.retry = asked.retry.filter(|retry| *retry != have.retry);
        changes.dead_letter = asked.dead_letter.filter(|topic| Some(topic) != have.dead_letter.as_ref());
        if changes == GroupOptions::new() {
            return Ok(());
        }
        broker.alter_group(group, changes.clone()).await.map_err(|error| match changes.ordered {
            // Another broker may do it; with this one it is the group that stands in the way.
            Some(ordered) if error.kind() == ErrorKind::Unsupported => Error::conflict(format!(
                "ordered of group {group} would change from {} to {ordered}, and it is fixed when the group is made; \
                delete its subscriptions and make them anew, or take another group",
                have.ordered
            )),
            _ => error,
        })?;
        if let Some(joined) = self.0.lock().get_mut(group) {
            let settings = &mut joined.settings;
            settings.ordered = changes.ordered.unwrap_or(settings.ordered);
            settings.backlog = changes.backlog.unwrap_or(settings.backlog);
            settings.retry = changes.retry.unwrap_or(settings.retry);
            settings.dead_letter = changes.dead_letter.or_else(|| settings.dead_letter.take());
        }
        Ok(())
    }

    /// Has a group's dead letters go to this topic from now on, or where they go if nobody says it.
    pub(crate) async fn redirect(&self, broker: &dyn Broker, group: &Group, to: Option<Topic>) -> Result<()> {
        let Some(to) = to.or_else(|| usual_dead_letter(group)) else { return Ok(()) };
        broker.alter_group(group, GroupOptions::new().with_dead_letter(to.clone())).await?;
        if let Some(joined) = self.0.lock().get_mut(group) {
            joined.settings.dead_letter = Some(to);
        }
        Ok(())
    }

    /// Counts a subscription out; true if it was the last.
    pub(crate) fn leave(&self, group: &Group) -> bool {
        let mut groups = self.0.lock();
        let Some(joined) = groups.get_mut(group) else { return false };
        joined.subscriptions -= 1;
        let last = joined.subscriptions == 0;
        if last {
            groups.remove(group);
        }
        last
    }

    /// What a group would be set up with by the first subscription to it.
    ///
    /// # Errors
    ///
    /// That it names what no group may have.
    pub(crate) fn first(broker: &dyn Broker, group: &Group, spec: &SubscriptionSpec) -> Result<GroupSettings> {
        with_defaults(broker, asked(spec)).resolve(Some(&group.name))
    }

    /// The first option in which a subscription differs from a group with these settings.
    pub(crate) fn difference(spec: &SubscriptionSpec, settings: &GroupSettings) -> Option<&'static str> {
        asked(spec).differs_from(settings)
    }

    /// What a group was set up with.
    pub(crate) fn settings(&self, group: &Group) -> Option<GroupSettings> {
        self.0.lock().get(group).map(|joined| joined.settings.clone())
    }
}
