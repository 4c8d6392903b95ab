//! Which endpoint consented to pushes, and how a subscription gets the consent it lacks.
//!
//! Over the interface an endpoint is asked before its subscription is made. A subscription that stands
//! already (of a state file, of the configuration, or from before endpoints were asked or asked in
//! another name) is asked while it stands: it keeps its backlog, and nothing is pushed before its
//! endpoint consents. What an endpoint said is kept with its subscription, so that a restart asks nobody
//! twice.

use std::sync::{Arc, Weak};
use std::time::Duration;

use broker_core::{ErrorKind, GroupName};
use http::{HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use super::asked::{self, Pending};
use super::problem::{Answer, Problem};
use super::registry::Subscribed;
use super::subscriptions::finish;
use crate::SubscriptionSpec;
use crate::push::consent::{self, Said};

/// Waits before a standing subscription's endpoint is asked again: doubling, from the first to the last.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(600)];
/// Standing subscriptions whose endpoints are asked at a time: a start asks many at once.
pub(crate) const MAX_ASKING: usize = 64;

/// That an endpoint consented.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Permission {
    /// To pushes from this name.
    origin: String,
    /// Of so many requests a second, if it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
}

impl Permission {
    pub(crate) fn new(origin: &HeaderValue, rate: Option<f64>) -> Self {
        Self { origin: origin.to_str().unwrap_or_default().to_owned(), rate }
    }

    /// The lower of what a subscription asks for and what its endpoint allows.
    pub(crate) fn within(&self, asked: Option<f64>) -> Option<f64> {
        match (asked, self.rate) {
            (Some(asked), Some(allowed)) => Some(asked.min(allowed)),
            (asked, allowed) => asked.or(allowed),
        }
    }
}

/// What came of asking.
#[derive(Debug)]
pub(crate) enum Consent {
    /// Nobody is asked here.
    NeedNot,
    Given(Permission),
    /// It may come by callback.
    Later,
}

impl Shared {
    /// Asks the endpoint of `spec` whether it wants pushes, where the options say so; `pending` is done
    /// once it consents later.
    ///
    /// # Errors
    ///
    /// 403 if it does not consent, 502 if it gives no answer.
    pub(crate) async fn ask_endpoint(
        &self,
        name: &GroupName,
        spec: &SubscriptionSpec,
        pending: Pending,
    ) -> Answer<Consent> {
        let options = self.options.load_full();
        let (Some(origin), Some(_)) = (options.origin(), &spec.endpoint) else { return Ok(Consent::NeedNot) };
        let callback =
            options.webhook_callback().map(|base| self.asked.wait(base, name, origin, pending)).transpose()?;
        let said = consent::ask(&self.push_client, spec, origin, callback.as_ref().map(|(_, url)| url)).await;
        if matches!(said, Ok(Said::Nothing)) {
            return Ok(Consent::Later);
        }
        if let Some((key, _)) = &callback {
            self.asked.forget(name, key);
        }
        match said {
            Ok(Said::Yes(rate)) => Ok(Consent::Given(Permission::new(origin, rate))),
            Ok(Said::Nothing) => Ok(Consent::Later),
            Err(error) if error.kind() == ErrorKind::Unauthorized => {
                Err(Problem::new(StatusCode::FORBIDDEN, error.kind(), error.message()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether pushes need a consent that this is not.
    pub(crate) fn lacks_consent(&self, permission: Option<&Permission>) -> bool {
        let options = self.options.load();
        options
            .webhook_origin()
            .is_some_and(|origin| permission.is_none_or(|given| !given.origin.eq_ignore_ascii_case(origin)))
    }
}

/// Asks the endpoint of a standing subscription until it consents; ended by dropping it.
pub(crate) fn seek(shared: &Arc<Shared>, subscribed: &Arc<Subscribed>) -> AbortOnDropHandle<()> {
    let (of, to) = (Arc::downgrade(shared), Arc::downgrade(subscribed));
    AbortOnDropHandle::new(subscribed.runtime.spawn(async move {
        let mut again = AGAIN[0];
        while let Some(wait) = ask(&of, &to, &mut again).await {
            tokio::time::sleep(wait).await;
        }
    }))
}

/// Asks once; tells how long to wait before the next time, if there is to be one.
async fn ask(shared: &Weak<Shared>, subscribed: &Weak<Subscribed>, again: &mut Duration) -> Option<Duration> {
    let (shared, subscribed) = (shared.upgrade()?, subscribed.upgrade()?);
    let push = subscribed.push()?;
    let _asking = tokio::select! {
        asking = shared.asking.acquire() => asking.ok()?,
        () = shared.draining.cancelled() => return None,
    };
    let pending = Pending::Permit(Arc::downgrade(&subscribed));
    match shared.ask_endpoint(&subscribed.name, &subscribed.spec, pending).await {
        Ok(Consent::NeedNot) => return None,
        Ok(Consent::Given(permission)) => {
            permit(Arc::clone(&shared), Arc::clone(&subscribed), permission).await.err()?;
        }
        Ok(Consent::Later) => {
            push.note("endpoint: it was asked whether it wants pushes, and may consent by callback");
            return Some(asked::KEPT);
        }
        Err(problem) => push.note(problem.detail()),
    }
    let wait = again.mul_f64(0.5 + fastrand::f64() / 2.0);
    *again = (*again * 2).min(AGAIN[1]);
    Some(wait)
}

/// Has a standing subscription push, as its endpoint permits.
pub(crate) async fn permit(shared: Arc<Shared>, subscribed: Arc<Subscribed>, permission: Permission) -> Answer<()> {
    finish(async move {
        shared.registry.permit(&shared, &subscribed, permission).await?;
        shared.try_save().await
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_rate_counts() {
        for (asked, allowed, rate) in [
            (None, None, None),
            (Some(2.0), None, Some(2.0)),
            (None, Some(3.0), Some(3.0)),
            (Some(2.0), Some(3.0), Some(2.0)),
            (Some(4.0), Some(3.0), Some(3.0)),
        ] {
            let permission = Permission::new(&HeaderValue::from_static("a"), allowed);
            assert_eq!(permission.within(asked), rate);
        }
    }
}
