//! The subscriptions alive: made, replaced, paused and deleted here, one change at a time.

mod declared;
mod readers;
mod subscribed;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use broker_core::{Broker, ErrorKind, Group, GroupName, Result, Topic};
use http::StatusCode;
use parking_lot::RwLock;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, Notify};
use tokio::time::Instant;

use readers::Readers;
pub(crate) use readers::Reading;
pub(crate) use subscribed::Subscribed;
use subscribed::{How, Inherited};

use super::Shared;
use super::consent::Permission;
use super::groups::{self, Groups};
use super::leases::Tally;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::pull::Pull;
use super::state::{self, Kept};
use crate::SubscriptionSpec;
use crate::push::{Push, PushStatus};

/// Every subscription, by name.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    table: RwLock<BTreeMap<Box<str>, Arc<Subscribed>>>,
    pub(crate) groups: Groups,
    readers: Readers,
    /// Those the operator declared.
    declared: RwLock<BTreeSet<GroupName>>,
    /// Held while something changes: a change asks the broker for several things in turn.
    changing: AsyncMutex<()>,
    /// Counts changes, so that the state file knows what it has written.
    changes: AtomicU64,
    /// Told when there is something new to watch.
    watch: Arc<Notify>,
    watched: std::sync::atomic::AtomicBool,
}

/// That nothing else changes meanwhile.
pub(crate) struct Changing<'a>(#[expect(dead_code, reason = "it is held")] MutexGuard<'a, ()>);

/// What `PUT` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Made,
    Replaced,
    Unchanged,
}

impl Registry {
    /// The subscription called `name`.
    pub(crate) fn find(&self, name: &str) -> Answer<Arc<Subscribed>> {
        GroupName::new(name)?;
        self.table.read().get(name).cloned().ok_or_else(|| missing(name))
    }

    pub(crate) fn len(&self) -> usize {
        self.table.read().len()
    }

    /// How every push is doing, by the name of its subscription.
    pub(crate) fn pushes(&self) -> Vec<(String, PushStatus)> {
        let table = self.table.read();
        let status = |one: &Arc<Subscribed>| one.push().map(|push| (one.name.to_string(), push.status()));
        table.values().filter_map(status).collect()
    }

    /// Subscriptions after `after` in order of name, of those that `seen` lets through, `limit` at most, and whether there are
    /// more of these.
    pub(crate) fn list(
        &self,
        after: Option<&str>,
        limit: usize,
        seen: impl Fn(&Subscribed) -> bool,
    ) -> (Vec<Arc<Subscribed>>, bool) {
        let table = self.table.read();
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let rest = table.range::<str, _>((from, std::ops::Bound::Unbounded)).map(|(_, subscribed)| subscribed);
        let mut rest = rest.filter(|subscribed| seen(subscribed));
        let page: Vec<_> = rest.by_ref().take(limit).cloned().collect();
        (page, rest.next().is_some())
    }

    /// Waits until nothing else changes, and keeps it so.
    pub(crate) async fn begin(&self) -> Changing<'_> {
        Changing(self.changing.lock().await)
    }

    /// Makes or replaces a subscription (or, `only_new`, does not replace it), while nothing else changes. Goes on to its
    /// end whatever becomes of who asked, whose it is then. What the endpoint permitted bounds its rate. What waits to be
    /// made under this name is void then.
    pub(crate) async fn put(
        &self,
        _changing: &Changing<'_>,
        shared: &Arc<Shared>,
        name: GroupName,
        spec: SubscriptionSpec,
        only_new: bool,
        (owner, permission): (Option<GroupName>, Option<Permission>),
    ) -> Answer<(Put, Arc<Subscribed>)> {
        if shared.is_draining() {
            return Err(Problem::draining());
        }
        let group = group_of(&name, &spec);
        let have = self.table.read().get(name.as_str()).cloned();
        let done = match have {
            None => (Put::Made, self.make(shared, name, group, spec, (owner, permission)).await?),
            Some(_) if only_new => {
                return Err(Problem::new(
                    StatusCode::PRECONDITION_FAILED,
                    ErrorKind::Conflict,
                    format!("if-none-match: subscription {name} is there already"),
                ));
            }
            Some(have) => self.replace(shared, have, group, spec, (owner, permission)).await?,
        };
        shared.asked.void(&done.1.name);
        self.redirect(shared, &done.1.group).await;
        Ok(done)
    }

    async fn make(
        &self,
        shared: &Arc<Shared>,
        name: GroupName,
        group: Group,
        mut spec: SubscriptionSpec,
        (owner, permission): (Option<GroupName>, Option<Permission>),
    ) -> Answer<Arc<Subscribed>> {
        self.check_room(shared.limits().subscriptions, owner.as_ref())?;
        limit(&mut spec, permission.as_ref());
        self.groups.join(&*shared.broker, &group, &spec).await?;
        let inherited = Inherited { owner, permission, ..Inherited::default() };
        match self.insert(shared, name, group.clone(), spec, inherited) {
            Ok(made) => Ok(made),
            Err(error) => {
                if self.groups.leave(&group) {
                    shared.broker.delete_group(&group).await?;
                }
                Err(error.into())
            }
        }
    }

    /// Refuses one more than `max`, and to an identity another while it has as many as are free.
    fn check_room(&self, max: usize, owner: Option<&GroupName>) -> Answer<()> {
        let table = self.table.read();
        let free = max.saturating_sub(table.len());
        let count = |owner| table.values().filter(|one| one.owner.read().as_ref() == Some(owner)).count();
        // While more are free than there are nobody has as many.
        let own = owner.filter(|_| table.len() >= free).map(|owner| (owner, count(owner)));
        let why = match own {
            _ if free == 0 => format!("there are {max} subscriptions, which is the most"),
            Some((owner, own)) if own > 0 && own >= free => format!(
                "{owner} has {own} of the {max} subscriptions, and no more than that are left, which are for others"
            ),
            _ => return Ok(()),
        };
        Err(Problem::too_many(format!("{why}; delete one first")).counted(Refusal::Subscriptions))
    }

    /// Where the work of a group's members is counted: with the subscription that is pulled from it, if there is one.
    pub(crate) fn tally(&self, group: &Group) -> Arc<Tally> {
        let table = self.table.read();
        let pulled = table.values().filter(|subscribed| subscribed.group == *group).find_map(|one| one.pull());
        pulled.map(|pull| Arc::clone(pull.holder.tally())).unwrap_or_default()
    }

    /// Subscriptions that are pulled from this group were in use until now.
    fn used(&self, group: &Group) {
        let table = self.table.read();
        table.values().filter(|one| one.group == *group).filter_map(|one| one.pull()).for_each(Pull::used);
    }

    /// Whether all that is pulled from this group is paused; nothing that is pulled, nothing that is paused.
    pub(crate) fn pauses(&self, group: &Group) -> bool {
        let table = self.table.read();
        let pulled = table.values().filter(|one| one.group == *group && one.pull().is_some());
        let paused: Vec<_> = pulled.map(|one| one.is_paused()).collect();
        !paused.is_empty() && paused.iter().all(|paused| *paused)
    }

    /// When a pull subscription expires, unless somebody pulls, reads its group or holds a lease before.
    fn expires(&self, subscribed: &Subscribed, pull: &Pull) -> Option<Instant> {
        let read = self.readers.read(&subscribed.group);
        subscribed.spec.expires.map(|after| if read { Instant::now() + after } else { pull.expires(after) })
    }

    /// How long what is lent of a group is, as the subscription that is pulled from it says.
    pub(crate) fn lease(&self, group: &Group) -> Option<Duration> {
        let table = self.table.read();
        let pulled = table.values().find(|subscribed| subscribed.group == *group && subscribed.pull().is_some());
        pulled.map(|subscribed| subscribed.spec.timeout)
    }

    /// Sees that a subscription has `group`: makes one to pull, called as the group, if there is none.
    /// Tells whether it did.
    pub(crate) async fn stand_for(
        &self,
        shared: &Arc<Shared>,
        group: &Group,
        owner: Option<GroupName>,
    ) -> Answer<bool> {
        let stands = || self.groups.settings(group).is_some();
        if stands() {
            return Ok(false);
        }
        let (name, spec) = (&group.name, SubscriptionSpec::new(group.filter.clone()));
        let changing = self.begin().await;
        match self.put(&changing, shared, name.clone(), spec, true, (owner, None)).await {
            Ok(_) => Ok(true),
            // Somebody else made it meanwhile.
            Err(_) if stands() => Ok(false),
            Err(_) if self.find(name.as_str()).is_ok() => Err(Problem::conflict(format!(
                "subscription {name} has another filter or group than group {group}; name another group"
            ))),
            Err(problem) => Err(problem),
        }
    }

    async fn replace(
        &self,
        shared: &Arc<Shared>,
        have: Arc<Subscribed>,
        group: Group,
        mut spec: SubscriptionSpec,
        (owner, permission): (Option<GroupName>, Option<Permission>),
    ) -> Answer<(Put, Arc<Subscribed>)> {
        have.check_stays(&group, &spec)?;
        spec.start.clone_from(&have.spec.start);
        let same = spec.endpoint == have.spec.endpoint;
        let permission = permission.or_else(|| have.permission.read().clone().filter(|_| same));
        limit(&mut spec, permission.as_ref());
        self.groups.alter(&*shared.broker, &group, &spec).await?;
        if spec == *have.spec {
            if *have.permission.read() != permission {
                *have.permission.write() = permission;
                self.changed();
                have.reconsider(shared);
            }
            if have.owner() != owner {
                *have.owner.write() = owner;
                self.changed();
                have.reauthorize(shared);
            }
            return Ok((Put::Unchanged, have));
        }
        let disabled = have.push().is_some_and(Push::is_disabled) && same;
        let inherited = Inherited { paused: have.is_paused(), disabled, owner, permission };
        let replaced = self.insert(shared, have.name.clone(), group, spec, inherited)?;
        have.end(shared);
        Ok((Put::Replaced, replaced))
    }

    /// Starts a life and puts it into the table.
    fn insert(
        &self,
        shared: &Arc<Shared>,
        name: GroupName,
        group: Group,
        spec: SubscriptionSpec,
        inherited: Inherited,
    ) -> Result<Arc<Subscribed>> {
        let settings = self.groups.settings(&group);
        let subscribed = Arc::new(Subscribed::start(shared, name, (group, settings), spec, inherited)?);
        self.table.write().insert(subscribed.name.as_str().into(), Arc::clone(&subscribed));
        self.readers.tell(&subscribed.group);
        // Once it is in the table: options that change from now on find it there.
        subscribed.reconsider(shared);
        subscribed.reauthorize(shared);
        if subscribed.pull().is_some() {
            self.watch(shared);
        }
        self.changed();
        Ok(subscribed)
    }

    /// Deletes a subscription, and with the last of a group its backlog, unless that is kept.
    pub(crate) async fn delete(&self, _changing: &Changing<'_>, shared: &Shared, name: &str, keep: bool) -> Answer<()> {
        let subscribed = self.find(name)?;
        self.remove(shared, &subscribed, keep).await
    }

    async fn remove(&self, shared: &Shared, subscribed: &Subscribed, keep: bool) -> Answer<()> {
        self.table.write().remove(subscribed.name.as_str());
        shared.asked.void(&subscribed.name);
        self.changed();
        subscribed.end(shared);
        let last = self.groups.leave(&subscribed.group);
        self.readers.tell(&subscribed.group);
        if !last {
            self.redirect(shared, &subscribed.group).await;
        } else if !keep {
            shared.broker.delete_group(&subscribed.group).await?;
        }
        Ok(())
    }

    /// Where the dead letters of a group go that has `now`, as its members say: what one says that is gone, or whose owner
    /// has no right to it any more, is said no more.
    fn dead_letter(&self, shared: &Shared, group: &Group, now: Option<&Topic>) -> Option<Topic> {
        let table = self.table.read();
        let members = table.values().filter(|one| one.group == *group);
        let mut said: Vec<_> = members
            .filter(|one| one.spec.dead_letter.is_some() && !shared.gate.disowns(one.owner().as_ref(), &one.spec))
            .map(|one| one.spec.dead_letter.as_ref())
            .collect();
        // The last change counts while somebody stands by it.
        said.sort_by_key(|said| *said != now);
        said.first().copied().flatten().cloned()
    }

    /// Whether dead letters of a group go elsewhere than they are to.
    fn misdirects(&self, shared: &Shared, group: &Group) -> bool {
        let Some(settings) = self.groups.settings(group) else { return false };
        let wanted = self.dead_letter(shared, group, settings.dead_letter.as_ref());
        wanted.or_else(|| groups::usual_dead_letter(group)) != settings.dead_letter
    }

    /// Has them go there. To be called while nothing else changes.
    async fn redirect(&self, shared: &Shared, group: &Group) {
        if !self.misdirects(shared, group) {
            return;
        }
        let now = self.groups.settings(group).and_then(|settings| settings.dead_letter);
        let wanted = self.dead_letter(shared, group, now.as_ref());
        match self.groups.redirect(&*shared.broker, group, wanted).await {
            Ok(()) => tracing::info!(%group, "its dead letters go where the members say that stand"),
            Err(error) => {
                tracing::warn!(%group, %error, "its dead letters go on where a member said that does not stand")
            }
        }
    }

    /// Takes up what the endpoint of a subscription permitted, unless it was replaced meanwhile.
    pub(crate) async fn permit(
        &self,
        shared: &Arc<Shared>,
        subscribed: &Arc<Subscribed>,
        permission: Permission,
    ) -> Answer<()> {
        let _changing = self.changing.lock().await;
        match self.find(subscribed.name.as_str()) {
            Ok(have) if Arc::ptr_eq(&have, subscribed) => {
                let (group, spec) = (have.group.clone(), (*have.spec).clone());
                let owner = have.owner();
                self.replace(shared, have, group, spec, (owner, Some(permission))).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Endpoints are asked in another way from now on.
    pub(crate) fn reconsider(&self, shared: &Arc<Shared>) {
        self.table.read().values().for_each(|subscribed| subscribed.reconsider(shared));
    }

    /// The rules have changed: pushes whose owner may no longer have them stop, and those go on whose owner may again.
    /// So does what they say of their groups.
    pub(crate) fn reauthorize(&self, shared: &Arc<Shared>) {
        let all: Vec<_> = self.table.read().values().cloned().collect();
        all.iter().for_each(|subscribed| subscribed.reauthorize(shared));
        let Some(first) = all.first() else { return };
        let groups: BTreeSet<_> = all.iter().map(|one| &one.group).collect();
        let groups: Vec<_> = groups.into_iter().filter(|group| self.misdirects(shared, group)).cloned().collect();
        if !groups.is_empty() {
            let shared = Arc::clone(shared);
            first.runtime.spawn(async move {
                let _changing = shared.registry.begin().await;
                for group in groups {
                    shared.registry.redirect(&shared, &group).await;
                }
            });
        }
    }

    /// Pauses or resumes; what the endpoint had disabled, `resume` enables, and one that has not
    /// consented is asked at once.
    pub(crate) async fn pause(&self, shared: &Arc<Shared>, name: &str, paused: bool) -> Answer<Arc<Subscribed>> {
        let _changing = self.changing.lock().await;
        let subscribed = self.find(name)?;
        subscribed.set_paused(paused);
        if !paused {
            subscribed.reconsider(shared);
        }
        self.readers.tell(&subscribed.group);
        self.changed();
        Ok(subscribed)
    }

    /// A subscription changed by itself: its endpoint said that it is gone.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of the last change.
    pub(crate) fn change(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The state file's text, and the change it is as of.
    pub(crate) fn snapshot(&self) -> (u64, Vec<u8>) {
        // The number is read first: what changes meanwhile is written again.
        let change = self.change();
        let mut writer = state::Writer::new();
        for subscribed in self.table.read().values() {
            let disabled = subscribed.push().is_some_and(Push::is_disabled);
            let declared = self.declared.read().contains(&subscribed.name);
            let states = [subscribed.is_paused(), disabled, declared];
            let (owner, permission) = (subscribed.owner(), subscribed.permission.read());
            writer.push(&subscribed.name, states, owner.as_ref(), permission.as_ref(), subscribed.spec_json());
        }
        (change, writer.finish())
    }

    /// Makes the subscriptions of a state file.
    pub(crate) async fn restore(&self, shared: &Arc<Shared>, kept: Vec<Kept>) -> Result<()> {
        let _changing = self.changing.lock().await;
        // They stood beside each other, whichever of them said what their group has.
        let asked = Groups::asked_by(kept.iter().map(|kept| (group_of(&kept.name, &kept.spec), &kept.spec)));
        for Kept { name, mut spec, paused, disabled, owner, consent: permission, .. } in kept {
            limit(&mut spec, permission.as_ref());
            let group = group_of(&name, &spec);
            self.groups
                .rejoin(&*shared.broker, &group, asked.get(&group).cloned().unwrap_or_default())
                .await
                .map_err(|error| error.context(format!("restore subscription {name}")))?;
            let named = format!("restore subscription {name}");
            let inherited = Inherited { paused, disabled, owner, permission };
            self.insert(shared, name, group, spec, inherited).map_err(|error| error.context(named))?;
        }
        for group in asked.keys() {
            self.redirect(shared, group).await;
        }
        Ok(())
    }

    /// Whether the operator declared it, so that it is not to be changed over the interface.
    pub(crate) fn check_free(&self, name: &str) -> Answer<()> {
        if self.declared.read().iter().any(|declared| declared.as_str() == name) {
            return Err(Problem::conflict(format!(
                "subscription {name} stands in the daemon's configuration; change it there"
            )));
        }
        Ok(())
    }

    /// Takes out of their groups what a shutdown does not wait for: members nobody pulls through,
    /// pushes to endpoints that are away.
    pub(crate) fn prepare_close(&self) {
        for subscribed in self.table.read().values() {
            match &subscribed.how {
                How::Push(push) => push.drain(),
                How::Pull(pull) => pull.leave(),
            }
        }
    }

    /// Starts the one task that deletes expired pull subscriptions and takes idle members out.
    fn watch(&self, shared: &Arc<Shared>) {
        if self.watched.swap(true, Ordering::AcqRel) {
            return self.watch.notify_one();
        }
        let (shared, watch) = (Arc::downgrade(shared), Arc::clone(&self.watch));
        tokio::spawn(async move {
            while let Some(next) = tend(&shared).await {
                let _ = tokio::time::timeout_at(next, watch.notified()).await;
            }
        });
    }
}

/// That there is no subscription called so.
pub(crate) fn missing(name: &str) -> Problem {
    Problem::not_found(format!("there is no subscription {name}; PUT /subscriptions/{name} makes one"))
}

/// The group that a subscription is a member of.
fn group_of(name: &GroupName, spec: &SubscriptionSpec) -> Group {
    Group::new(spec.group.clone().unwrap_or_else(|| name.clone()), spec.filter.clone())
}

/// An endpoint's permission bounds the rate.
fn limit(spec: &mut SubscriptionSpec, permission: Option<&Permission>) {
    if let Some(permission) = permission {
        spec.rate_limit = permission.within(spec.rate_limit);
    }
}

/// How often members are looked at that nobody pulls through.
const IDLE_LOOK: Duration = Duration::from_secs(10);
/// The least: what expires at once but for its readers is not looked at all the time.
const LEAST_LOOK: Duration = Duration::from_millis(50);

/// Deletes what expired and tells when to look again; `None` once the server is gone.
async fn tend(shared: &Weak<Shared>) -> Option<Instant> {
    let shared = shared.upgrade()?;
    let now = Instant::now();
    let mut next = now + IDLE_LOOK;
    let mut expired = Vec::new();
    for subscribed in shared.registry.table.read().values() {
        let Some(pull) = subscribed.pull() else { continue };
        pull.leave_if_idle();
        match shared.registry.expires(subscribed, pull) {
            Some(at) if at <= now => expired.push(Arc::clone(subscribed)),
            Some(at) => next = next.min(at.max(now + LEAST_LOOK)),
            None => {}
        }
    }
    for subscribed in expired {
        let _changing = shared.registry.changing.lock().await;
        // It may have been replaced or used while we waited.
        let alive = shared.registry.find(subscribed.name.as_str()).is_ok_and(|now| Arc::ptr_eq(&now, &subscribed));
        let due = |pull: &Pull| {
            let expires = shared.registry.expires(&subscribed, pull);
            expires.is_some_and(|at| at <= Instant::now())
        };
        if alive && subscribed.pull().is_some_and(due) {
            tracing::info!(name = %subscribed.name, "a pull subscription nobody pulled expired");
            if let Err(problem) = shared.registry.remove(&shared, &subscribed, false).await {
                tracing::warn!(name = %subscribed.name, ?problem, "an expired subscription left its group behind");
            }
        }
    }
    shared.save().await;
    Some(next)
}
