//! What somebody was let do, for as long as it is so: what waits or goes on is held to the rules of now, not to those it
//! began under.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use broker_core::{GroupName, TopicFilter};

use super::super::Shared;
use super::super::leases::Borrower;
use super::super::problem::Answer;
use super::{Action, Caller, Gate, Shown, unauthorized};

/// That a caller, or everybody where nobody need be known, may do this on these topics.
pub(crate) struct Right {
    shared: Arc<Shared>,
    caller: Option<Caller>,
    actions: &'static [Action],
    filter: TopicFilter,
    /// The change of the rules as of which it was looked at last, and held.
    held: AtomicU64,
}

/// Ends once what was allowed is so no more.
pub(crate) type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

/// No change of the rules has this number.
const NEVER: u64 = u64::MAX;

impl Right {
    pub(crate) fn of(
        shared: &Arc<Shared>,
        caller: Option<Caller>,
        actions: &'static [Action],
        filter: TopicFilter,
    ) -> Arc<Self> {
        Arc::new(Self { shared: Arc::clone(shared), caller, actions, filter, held: AtomicU64::new(NEVER) })
    }

    /// Whose is what is made for it.
    pub(crate) fn owner(&self) -> Option<GroupName> {
        self.caller.as_ref().and_then(Caller::owner)
    }

    /// Who borrows by it.
    pub(crate) fn borrower(&self) -> Borrower {
        self.caller.as_ref().map_or_else(Borrower::default, |caller| Borrower::counted_by(caller.leases()))
    }

    /// Whose name is told where something is refused to it.
    pub(crate) fn name(&self) -> Option<&str> {
        self.caller.as_ref().map(Caller::name)
    }

    /// Whether it is so now.
    pub(crate) fn holds(&self) -> bool {
        self.check().is_ok()
    }

    /// Refuses what is allowed no more, as the next request would be: 401 where what was shown is nobody's now, or
    /// somebody else's, and 403 where no rule allows it.
    pub(crate) fn check(&self) -> Answer<()> {
        // Read first: rules that come meanwhile are looked at again.
        let change = *self.shared.gate.changed.borrow();
        let by_certificate = matches!(&self.caller, Some(Caller { shown: Shown::Certificate(_), .. }));
        if self.held.load(Ordering::Acquire) == change && !by_certificate {
            return Ok(());
        }
        self.look()?;
        self.held.store(change, Ordering::Release);
        Ok(())
    }

    fn look(&self) -> Answer<()> {
        let Some(now) = self.shared.gate.known_now(self.caller.as_ref())? else { return Ok(()) };
        self.actions.iter().try_for_each(|action| now.check(*action, &self.filter))
    }

    /// Waits until it is so no more.
    pub(crate) fn ended(self: &Arc<Self>) -> Ended {
        let right = Arc::clone(self);
        let mut changed = self.shared.gate.changed.subscribe();
        Box::pin(async move {
            while right.holds() {
                // It lives as long as what is held here.
                let changed = changed.changed();
                match right.caller.as_ref().map(|caller| &caller.shown) {
                    Some(Shown::Certificate(presented)) => {
                        tokio::select! {
                            _ = changed => {}
                            () = presented.may_differ() => {}
                        }
                    }
                    _ => drop(changed.await),
                }
            }
        })
    }
}

impl Gate {
    /// Who made a request, by what it showed then and the rules of now; `None` where nobody need be known.
    ///
    /// # Errors
    ///
    /// 401 where that is nobody's now, or somebody else's.
    pub(super) fn known_now(&self, caller: Option<&Caller>) -> Answer<Option<Caller>> {
        let access = Arc::clone(&self.access.read());
        if access.is_open() {
            return Ok(None);
        }
        let known = caller.and_then(|before| {
            let known = access.by(&before.shown).filter(|known| known.identity.name == before.name())?;
            Some(Caller { known: Arc::clone(known), shown: before.shown.clone() })
        });
        known.map(Some).ok_or_else(|| unauthorized("who asked for this is nobody here any more"))
    }
}

impl fmt::Debug for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Right").field("actions", &self.actions).field("filter", &self.filter).finish_non_exhaustive()
    }
}
