//! What waits for an endpoint's permission, given by a callback: CloudEvents' "HTTP 1.1
//! Web Hooks for Event Delivery" 1.0, section 4.1.3.
//!
//! An endpoint that answers the handshake without `WebHook-Allowed-Origin` may consent later, by a
//! `GET` or `POST` of the URL it was told; so may whoever runs it, by hand. A new
//! subscription is only what was asked for until then, bounded in number, in bytes and in time.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use broker_core::{Error, GroupName};
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use parking_lot::Mutex;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;

use super::Shared;
use super::consent::{Permission, permit};
use super::memory::Reservation;
use super::problem::{Answer, Problem};
use super::query::{Query, name_in_path};
use super::registry::Subscribed;
use super::subscriptions::{finish, respond};
use crate::SubscriptionSpec;
use crate::push::consent;

/// New subscriptions that may wait at a time.
const MAX_WAITING: usize = 1_000;
/// How long one waits.
pub(crate) const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What waits for permission, by name and whether it stands already; asked for again, it waits anew.
#[derive(Debug, Default)]
pub(crate) struct Asked(Mutex<HashMap<(GroupName, bool), Waiting>>);

#[derive(Debug)]
struct Waiting {
    key: String,
    origin: HeaderValue,
    until: Instant,
    pending: Pending,
}

/// What permission is for.
#[derive(Debug)]
pub(crate) enum Pending {
    /// A subscription that is to be made.
    Make {
        spec: Box<SubscriptionSpec>,
        only_new: bool,
        /// Who asked for it.
        owner: Option<GroupName>,
        /// What its settings hold.
        reservation: Reservation,
    },
    /// One that stands, and pushes nothing before.
    Permit(Weak<Subscribed>),
}

impl Waiting {
    fn is_over(&self, now: Instant) -> bool {
        let gone = matches!(&self.pending, Pending::Permit(subscribed) if subscribed.strong_count() == 0);
        gone || self.until <= now
    }
}

impl Asked {
    /// Has it wait; the URL at which permission is given. To be called before the endpoint
    /// is asked, since it may call back at once.
    ///
    /// # Errors
    ///
    /// 429 where as many new ones as may wait do.
    pub(crate) fn wait(
        &self,
        base: &str,
        name: &GroupName,
        origin: &HeaderValue,
        pending: Pending,
    ) -> Answer<HeaderValue> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| Error::unavailable(format!("no random numbers: {error}")))?;
        let key = URL_SAFE_NO_PAD.encode(random);
        let url = HeaderValue::try_from(format!("{base}/consent/{name}?key={key}"))
            .map_err(|_| Error::invalid("the callback's URL cannot be sent"))?;
        let mut waiting = self.0.lock();
        let now = Instant::now();
        waiting.retain(|_, waiting| !waiting.is_over(now));
        let entry = (name.clone(), matches!(pending, Pending::Permit(_)));
        // Those that stand are as many as there are subscriptions.
        let new = waiting.keys().filter(|(_, standing)| !standing).count();
        if !entry.1 && new >= MAX_WAITING && !waiting.contains_key(&entry) {
            return Err(Problem::too_many(format!(
                "{MAX_WAITING} subscriptions wait for the permission of their endpoints, which is the most; try again later"
            )));
        }
        waiting.insert(entry, Waiting { key, origin: origin.clone(), until: now + KEPT, pending });
        Ok(url)
    }

    /// It need not wait: the endpoint has said yes or no.
    pub(crate) fn forget(&self, name: &GroupName, standing: bool) {
        self.0.lock().remove(&(name.clone(), standing));
    }

    /// Permission was given by whoever knows the key; what waited for it.
    fn given(&self, name: &GroupName, key: &str) -> Option<Waiting> {
        let mut waiting = self.0.lock();
        let now = Instant::now();
        [false, true].into_iter().find_map(|standing| {
            let entry = (name.clone(), standing);
            let found = waiting.get(&entry)?;
            let right = !found.is_over(now) && bool::from(found.key.as_bytes().ct_eq(key.as_bytes()));
            if right { waiting.remove(&entry) } else { None }
        })
    }
}

/// `GET` and `POST /consent/{name}?key=`
pub(crate) async fn consent(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer<Response> {
    let mut query = Query::of(&uri);
    let key = query.text("key")?.unwrap_or_default();
    query.finish()?;
    let rate = consent::allowed_rate(&headers).map_err(Problem::invalid)?;
    let name = GroupName::new(&*name_in_path(&uri)?)?;
    // Which of them is wrong is nobody's business.
    let waited =
        || Problem::not_found("nothing waits for this permission: it was given, is too old, or the key is another");
    let Waiting { origin, pending, .. } = shared.asked.given(&name, &key).ok_or_else(waited)?;
    let permission = Permission::new(&origin, rate);
    let answer = respond(StatusCode::OK, &json!({ "subscription": name, "consent": "given" }));
    match pending {
        Pending::Permit(standing) => {
            permit(shared, standing.upgrade().ok_or_else(waited)?, permission).await?;
        }
        Pending::Make { spec, only_new, owner, reservation } => {
            finish(async move {
                shared.registry.check_free(name.as_str())?;
                shared.registry.put(&shared, name, *spec, only_new, (owner, Some(permission))).await?;
                drop(reservation);
                shared.try_save().await
            })
            .await?;
        }
    }
    Ok(answer)
}
