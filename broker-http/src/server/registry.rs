//! The subscriptions alive: made, replaced, paused and deleted here, one change at a time.

mod declared;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use broker_core::{Broker, ErrorKind, Group, GroupName, Result};
use http::StatusCode;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, Notify};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::consent::{self, Permission};
use super::groups::Groups;
use super::leases::Tally;
use super::memory::Reservation;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::pull::Pull;
use super::state::{self, Kept};
use crate::SubscriptionSpec;
use crate::push::{Push, PushOptions, PushStatus};

/// Every subscription, by name.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    table: RwLock<BTreeMap<Box<str>, Arc<Subscribed>>>,
    pub(crate) groups: Groups,
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

/// One life of a subscription: replaced when its settings change.
pub(crate) struct Subscribed {
    pub(crate) name: GroupName,
    pub(crate) spec: Arc<SubscriptionSpec>,
    pub(crate) group: Group,
    how: How,
    paused: RwLock<bool>,
    /// Told when a pause ends.
    unpaused: Notify,
    /// The settings as the state file has them, secrets included; written once they are asked for.
    json: OnceLock<Box<str>>,
    /// The identity that had it made, or changed it last.
    owner: RwLock<Option<GroupName>>,
    /// Whether its pushes are held because its owner may not have them.
    disowned: Mutex<bool>,
    /// Its endpoint's consent to pushes, if it was asked and gave it.
    permission: RwLock<Option<Permission>>,
    /// Asks for it while it lacks.
    seeking: Mutex<Option<AbortOnDropHandle<()>>>,
    /// Where it was made, for what is begun elsewhere.
    pub(crate) runtime: Handle,
    /// What its settings take.
    _room: Reservation,
}

/// What a life takes over from the one before it.
#[derive(Default)]
struct Inherited {
    paused: bool,
    disabled: bool,
    owner: Option<GroupName>,
    permission: Option<Permission>,
}

impl fmt::Debug for Subscribed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribed").field("name", &self.name).field("spec", &self.spec).finish_non_exhaustive()
    }
}

enum How {
    Push(Push),
    Pull(Pull),
}

/// What `PUT` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Made,
    Replaced,
    Unchanged,
}

impl Subscribed {
    pub(crate) fn push(&self) -> Option<&Push> {
        match &self.how {
            How::Push(push) => Some(push),
            How::Pull(_) => None,
        }
    }

    pub(crate) fn pull(&self) -> Option<&Pull> {
        match &self.how {
            How::Push(_) => None,
            How::Pull(pull) => Some(pull),
        }
    }

    fn spec_json(&self) -> &str {
        // What was read as JSON can be written as JSON.
        self.json.get_or_init(|| serde_json::to_string(&*self.spec).unwrap_or_default().into())
    }

    pub(crate) fn is_paused(&self) -> bool {
        *self.paused.read()
    }

    /// The identity that answers for it; the operator does if there is none.
    pub(crate) fn owner(&self) -> Option<GroupName> {
        self.owner.read().clone()
    }

    /// Refuses a change of what stays as it is for life.
    fn check_stays(&self, group: &Group, spec: &SubscriptionSpec) -> Answer<()> {
        let fixed = |what: &str, before: String, after: String| {
            Problem::conflict(format!(
                "{what} of subscription {} would change from {before} to {after}; delete it first, or take another name",
                self.name
            ))
        };
        if spec.filter != self.spec.filter {
            return Err(fixed("filter", self.spec.filter.to_string(), spec.filter.to_string()));
        }
        if group.name != self.group.name {
            return Err(fixed("group", self.group.name.to_string(), group.name.to_string()));
        }
        // It counted when the group was made: left out now, it says nothing.
        let begun = self.spec.start.clone().unwrap_or_default();
        match &spec.start {
            Some(start) if *start != begun => Err(fixed("start", begun.to_string(), start.to_string())),
            _ => Ok(()),
        }
    }

    /// Waits for the end of a pause, until `deadline` at most.
    pub(crate) async fn resumed(&self, deadline: Instant, draining: &CancellationToken) {
        let unpaused = self.unpaused.notified();
        tokio::pin!(unpaused);
        unpaused.as_mut().enable();
        if self.is_paused() {
            tokio::select! {
                () = unpaused => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = draining.cancelled() => {}
            }
        }
    }

    /// Holds pushes while they lack a consent that is needed, and asks for it, at once.
    fn reconsider(self: &Arc<Self>, shared: &Arc<Shared>) {
        let Some(push) = self.push() else { return };
        let mut seeking = self.seeking.lock();
        let lacks = shared.lacks_consent(self.permission.read().as_ref());
        push.set_unconsented(lacks);
        *seeking = lacks.then(|| consent::seek(shared, self));
    }

    /// Holds pushes while their owner may not have them pushed.
    fn reauthorize(&self, shared: &Shared) {
        let Some(push) = self.push() else { return };
        // Held, so that of two changes the later one counts.
        let mut held = self.disowned.lock();
        let owner = self.owner();
        let disowned = shared.gate.disowns(owner.as_ref(), &self.spec);
        push.set_unauthorized(disowned);
        match (std::mem::replace(&mut *held, disowned), disowned) {
            (false, true) => tracing::warn!(
                subscription = %self.name, identity = owner.as_ref().map_or("", GroupName::as_str),
                "the identity that had it pushed may no longer: it is held until that changes or another takes it over by PUT"
            ),
            (true, false) => tracing::info!(subscription = %self.name, "it may be pushed again, and goes on"),
            _ => {}
        }
    }

    /// Ends this life: what is in flight is settled as it comes in, leases come back at once.
    fn end(&self, shared: &Shared) {
        *self.seeking.lock() = None;
        match &self.how {
            How::Push(push) => push.stop(),
            How::Pull(pull) => {
                pull.leave();
                shared.leases.release_all(&pull.holder);
            }
        }
    }

    fn set_paused(&self, paused: bool) {
        *self.paused.write() = paused;
        match &self.how {
            How::Push(push) if paused => push.pause(),
            How::Push(push) => push.resume(),
            How::Pull(pull) if paused => pull.leave(),
            How::Pull(_) => self.unpaused.notify_waiters(),
        }
    }
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

    /// Makes or replaces a subscription (or, `only_new`, does not replace it). Goes on to its end
    /// whatever becomes of who asked, whose it is then. What the endpoint permitted bounds its rate.
    pub(crate) async fn put(
        &self,
        shared: &Arc<Shared>,
        name: GroupName,
        spec: SubscriptionSpec,
        only_new: bool,
        by: (Option<GroupName>, Option<Permission>),
    ) -> Answer<(Put, Arc<Subscribed>)> {
        let changing = self.begin().await;
        self.put_alone(&changing, shared, name, spec, only_new, by).await
    }

    /// Waits until nothing else changes, and keeps it so.
    pub(crate) async fn begin(&self) -> Changing<'_> {
        Changing(self.changing.lock().await)
    }

    /// As [`put`](Self::put), where nothing else changes. What waits to be made under this name is void then.
    pub(crate) async fn put_alone(
        &self,
        _changing: &Changing<'_>,
        shared: &Arc<Shared>,
        name: GroupName,
        spec: SubscriptionSpec,
        only_new: bool,
        by: (Option<GroupName>, Option<Permission>),
    ) -> Answer<(Put, Arc<Subscribed>)> {
        let done = self.make_or_replace(shared, name, spec, only_new, by).await?;
        shared.asked.void(&done.1.name);
        Ok(done)
    }

    async fn make_or_replace(
        &self,
        shared: &Arc<Shared>,
        name: GroupName,
        mut spec: SubscriptionSpec,
        only_new: bool,
        (owner, permission): (Option<GroupName>, Option<Permission>),
    ) -> Answer<(Put, Arc<Subscribed>)> {
        if shared.is_draining() {
            return Err(Problem::draining());
        }
        let group = group_of(&name, &spec);
        let have = self.table.read().get(name.as_str()).cloned();
        match have {
            None => {
                let max = shared.limits().subscriptions;
                if self.len() >= max {
                    return Err(Problem::too_many(format!(
                        "there are {max} subscriptions, which is the most; delete one first"
                    ))
                    .counted(Refusal::Subscriptions));
                }
                limit(&mut spec, permission.as_ref());
                self.groups.join(&*shared.broker, &group, &spec).await?;
                let inherited = Inherited { owner, permission, ..Inherited::default() };
                match self.insert(shared, name, group.clone(), spec, inherited) {
                    Ok(made) => Ok((Put::Made, made)),
                    Err(error) => {
                        if self.groups.leave(&group) {
                            shared.broker.delete_group(&group).await?;
                        }
                        Err(error.into())
                    }
                }
            }
            Some(_) if only_new => Err(Problem::new(
                StatusCode::PRECONDITION_FAILED,
                ErrorKind::Conflict,
                format!("if-none-match: subscription {name} is there already"),
            )),
            Some(have) => self.replace(shared, have, group, spec, (owner, permission)).await,
        }
    }

    /// Where the work of a group's members is counted: with the subscription that is pulled from it, if there is one.
    pub(crate) fn tally(&self, group: &Group) -> Arc<Tally> {
        let table = self.table.read();
        let pulled = table.values().filter(|subscribed| subscribed.group == *group).find_map(|one| one.pull());
        pulled.map(|pull| Arc::clone(pull.holder.tally())).unwrap_or_default()
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
        match self.put(shared, name.clone(), spec, true, (owner, None)).await {
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
        let spec = Arc::new(spec);
        let Inherited { paused, disabled, owner, permission } = inherited;
        let how = match spec.endpoint {
            Some(_) => {
                let mut options = PushOptions::new(name.clone(), self.pushed_as(&group, &spec)).with_paused(paused);
                options.disabled = disabled;
                options.unconsented = shared.lacks_consent(permission.as_ref());
                // It is told of once it is in the table.
                options.unauthorized = shared.gate.disowns(owner.as_ref(), &spec);
                How::Push(shared.start_push(options)?)
            }
            None => How::Pull(Pull::new()),
        };
        let mut room = shared.ledger.grant();
        // As they are and as the state file has them.
        room.add(2 * serde_json::to_vec(&*spec).map_or(0, |json| json.len() as u64));
        let subscribed = Arc::new(Subscribed {
            name: name.clone(),
            spec,
            group,
            how,
            paused: RwLock::new(paused),
            unpaused: Notify::new(),
            json: OnceLock::new(),
            owner: RwLock::new(owner),
            disowned: Mutex::new(false),
            permission: RwLock::new(permission),
            seeking: Mutex::default(),
            runtime: Handle::current(),
            _room: room,
        });
        self.table.write().insert(name.as_str().into(), Arc::clone(&subscribed));
        // Once it is in the table: options that change from now on find it there.
        subscribed.reconsider(shared);
        subscribed.reauthorize(shared);
        if subscribed.pull().is_some() {
            self.watch(shared);
        }
        self.changed();
        Ok(subscribed)
    }

    /// What a push goes by: a retry policy it does not say itself is its group's.
    fn pushed_as(&self, group: &Group, spec: &Arc<SubscriptionSpec>) -> Arc<SubscriptionSpec> {
        match self.groups.settings(group) {
            Some(settings) if settings.retry != spec.retry.unwrap_or_default() => {
                let mut spec = (**spec).clone();
                spec.retry = Some(settings.retry);
                Arc::new(spec)
            }
            _ => Arc::clone(spec),
        }
    }

    /// Deletes a subscription, and with the last of a group its backlog, unless that is kept.
    pub(crate) async fn delete(&self, shared: &Shared, name: &str, keep: bool) -> Answer<()> {
        let _changing = self.changing.lock().await;
        let subscribed = self.find(name)?;
        self.remove(shared, &subscribed, keep).await
    }

    async fn remove(&self, shared: &Shared, subscribed: &Subscribed, keep: bool) -> Answer<()> {
        self.table.write().remove(subscribed.name.as_str());
        shared.asked.void(&subscribed.name);
        self.changed();
        subscribed.end(shared);
        if self.groups.leave(&subscribed.group) && !keep {
            shared.broker.delete_group(&subscribed.group).await?;
        }
        Ok(())
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
    pub(crate) fn reauthorize(&self, shared: &Shared) {
        self.table.read().values().for_each(|subscribed| subscribed.reauthorize(shared));
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

/// Deletes what expired and tells when to look again; `None` once the server is gone.
async fn tend(shared: &Weak<Shared>) -> Option<Instant> {
    let shared = shared.upgrade()?;
    let now = Instant::now();
    let mut next = now + IDLE_LOOK;
    let mut expired = Vec::new();
    for subscribed in shared.registry.table.read().values() {
        let Some(pull) = subscribed.pull() else { continue };
        pull.leave_if_idle();
        match subscribed.spec.expires.map(|after| pull.expires(after)) {
            Some(at) if at <= now => expired.push(Arc::clone(subscribed)),
            Some(at) => next = next.min(at),
            None => {}
        }
    }
    for subscribed in expired {
        let _changing = shared.registry.changing.lock().await;
        // It may have been replaced or pulled while we waited.
        let alive = shared.registry.find(subscribed.name.as_str()).is_ok_and(|now| Arc::ptr_eq(&now, &subscribed));
        let due = |pull: &Pull| subscribed.spec.expires.is_some_and(|after| pull.expires(after) <= Instant::now());
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
