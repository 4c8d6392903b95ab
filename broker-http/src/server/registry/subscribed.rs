//! One life of a subscription.

use std::fmt;
use std::sync::{Arc, OnceLock};

use broker_core::{Group, GroupName, GroupSettings, Result};
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::super::Shared;
use super::super::consent::{self, Permission};
use super::super::memory::Reservation;
use super::super::problem::{Answer, Problem};
use super::super::pull::Pull;
use crate::SubscriptionSpec;
use crate::push::{Push, PushOptions};

/// Replaced when its settings change.
pub(crate) struct Subscribed {
    pub(crate) name: GroupName,
    pub(crate) spec: Arc<SubscriptionSpec>,
    pub(crate) group: Group,
    pub(super) how: How,
    paused: RwLock<bool>,
    /// Told when a pause ends.
    unpaused: Notify,
    /// The settings as the state file has them, secrets included; written once they are asked for.
    json: OnceLock<Box<str>>,
    /// The identity that had it made, or changed it last.
    pub(super) owner: RwLock<Option<GroupName>>,
    /// Whether its pushes are held because its owner may not have them.
    disowned: Mutex<bool>,
    /// Its endpoint's consent to pushes, if it was asked and gave it.
    pub(super) permission: RwLock<Option<Permission>>,
    /// Asks for it while it lacks.
    seeking: Mutex<Option<AbortOnDropHandle<()>>>,
    /// Where it was made, for what is begun elsewhere.
    pub(crate) runtime: Handle,
    /// What its settings take.
    _room: Reservation,
}

/// What a life takes over from the one before it.
#[derive(Default)]
pub(super) struct Inherited {
    pub(super) paused: bool,
    pub(super) disabled: bool,
    pub(super) owner: Option<GroupName>,
    pub(super) permission: Option<Permission>,
}

impl fmt::Debug for Subscribed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribed").field("name", &self.name).field("spec", &self.spec).finish_non_exhaustive()
    }
}

pub(super) enum How {
    Push(Push),
    Pull(Pull),
}

impl Subscribed {
    /// Starts a life; what a push does not say itself it goes by as its group has it.
    pub(super) fn start(
        shared: &Arc<Shared>,
        name: GroupName,
        (group, settings): (Group, Option<GroupSettings>),
        spec: SubscriptionSpec,
        inherited: Inherited,
    ) -> Result<Self> {
        let spec = Arc::new(spec);
        let Inherited { paused, disabled, owner, permission } = inherited;
        let how = match spec.endpoint {
            Some(_) => {
                let mut options = PushOptions::new(name.clone(), pushed_as(settings, &spec)).with_paused(paused);
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
        Ok(Self {
            name,
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
        })
    }

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

    pub(super) fn spec_json(&self) -> &str {
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
    pub(super) fn check_stays(&self, group: &Group, spec: &SubscriptionSpec) -> Answer<()> {
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
    pub(super) fn reconsider(self: &Arc<Self>, shared: &Arc<Shared>) {
        let Some(push) = self.push() else { return };
        let mut seeking = self.seeking.lock();
        let lacks = shared.lacks_consent(self.permission.read().as_ref());
        push.set_unconsented(lacks);
        *seeking = lacks.then(|| consent::seek(shared, self));
    }

    /// Holds pushes while their owner may not have them pushed.
    pub(super) fn reauthorize(&self, shared: &Shared) {
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
    pub(super) fn end(&self, shared: &Shared) {
        *self.seeking.lock() = None;
        match &self.how {
            How::Push(push) => push.stop(),
            How::Pull(pull) => {
                pull.leave();
                shared.leases.release_all(&pull.holder);
            }
        }
    }

    pub(super) fn set_paused(&self, paused: bool) {
        *self.paused.write() = paused;
        match &self.how {
            How::Push(push) if paused => push.pause(),
            How::Push(push) => push.resume(),
            How::Pull(pull) if paused => pull.leave(),
            How::Pull(_) => self.unpaused.notify_waiters(),
        }
    }
}

/// What a push goes by: a retry policy it does not say itself is its group's.
fn pushed_as(group: Option<GroupSettings>, spec: &Arc<SubscriptionSpec>) -> Arc<SubscriptionSpec> {
    match group {
        Some(settings) if settings.retry != spec.retry.unwrap_or_default() => {
            let mut spec = (**spec).clone();
            spec.retry = Some(settings.retry);
            Arc::new(spec)
        }
        _ => Arc::clone(spec),
    }
}
