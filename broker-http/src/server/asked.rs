//! Subscriptions that wait for their endpoint's permission, given by a callback: CloudEvents' "HTTP 1.1
//! Web Hooks for Event Delivery" 1.0, section 4.1.3.
//!
//! An endpoint that answers the handshake without `WebHook-Allowed-Origin` may consent later, by a
//! `GET` or `POST` of the URL it was told; so may whoever runs it, by hand. Until then there is no
//! subscription, only what was asked for, bounded in number, in bytes and in time.

use std::collections::HashMap;
use std::sync::Arc;
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
use super::memory::Reservation;
use super::problem::{Answer, Problem};
use super::query::{Query, name_in_path};
use super::subscriptions::{finish, respond};
use crate::SubscriptionSpec;
use crate::push::consent;

/// Subscriptions that may wait at a time.
const MAX_WAITING: usize = 1_000;
/// How long one waits.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What waits for permission, by the name it is to have; asked for again, it waits anew.
#[derive(Debug, Default)]
pub(crate) struct Asked(Mutex<HashMap<GroupName, Waiting>>);

#[derive(Debug)]
struct Waiting {
    key: String,
    spec: SubscriptionSpec,
    only_new: bool,
    until: Instant,
    /// What its settings hold.
    _reservation: Reservation,
}

impl Asked {
    /// Has a subscription wait; the URL at which permission is given. To be called before the endpoint
    /// is asked, since it may call back at once.
    ///
    /// # Errors
    ///
    /// 429 where as many as may wait do.
    pub(crate) fn wait(
        &self,
        base: &str,
        name: &GroupName,
        spec: &SubscriptionSpec,
        only_new: bool,
        reservation: Reservation,
    ) -> Answer<HeaderValue> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| Error::unavailable(format!("no random numbers: {error}")))?;
        let key = URL_SAFE_NO_PAD.encode(random);
        let url = HeaderValue::try_from(format!("{base}/consent/{name}?key={key}"))
            .map_err(|_| Error::invalid("the callback's URL cannot be sent"))?;
        let mut waiting = self.0.lock();
        let now = Instant::now();
        waiting.retain(|_, waiting| waiting.until > now);
        if waiting.len() >= MAX_WAITING && !waiting.contains_key(name) {
            return Err(Problem::too_many(format!(
                "{MAX_WAITING} subscriptions wait for the permission of their endpoints, which is the most; try again later"
            )));
        }
        let (spec, until) = (spec.clone(), now + KEPT);
        let entry = Waiting { key, spec, only_new, until, _reservation: reservation };
        waiting.insert(name.clone(), entry);
        Ok(url)
    }

    /// It need not wait: the endpoint has said yes or no.
    pub(crate) fn forget(&self, name: &GroupName) {
        self.0.lock().remove(name);
    }

    /// Permission was given by whoever knows the key; what waited for it.
    fn given(&self, name: &str, key: &str) -> Option<(GroupName, SubscriptionSpec, bool)> {
        let mut waiting = self.0.lock();
        let (_, found) = waiting.iter().find(|(have, _)| have.as_str() == name)?;
        if found.until <= Instant::now() || !bool::from(found.key.as_bytes().ct_eq(key.as_bytes())) {
            return None;
        }
        let name = GroupName::new(name).ok()?;
        let Waiting { spec, only_new, .. } = waiting.remove(&name)?;
        Some((name, spec, only_new))
    }
}

/// `GET` and `POST /consent/{name}?key=`
pub(crate) async fn consent(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer<Response> {
    let mut query = Query::of(&uri);
    let key = query.text("key")?.unwrap_or_default();
    query.finish()?;
    let rate = consent::allowed_rate(&headers).map_err(Problem::invalid)?;
    let name = name_in_path(&uri)?;
    // Which of them is wrong is nobody's business.
    let Some((name, mut spec, only_new)) = shared.asked.given(&name, &key) else {
        return Err(Problem::not_found(
            "nothing waits for this permission: it was given, is too old, or the key is another",
        ));
    };
    spec.rate_limit = consent::within(spec.rate_limit, rate);
    finish(async move {
        shared.registry.check_free(name.as_str())?;
        shared.registry.put(&shared, name.clone(), spec, only_new).await?;
        shared.try_save().await?;
        Ok(respond(StatusCode::OK, &json!({ "subscription": name, "consent": "given" })))
    })
    .await
}
