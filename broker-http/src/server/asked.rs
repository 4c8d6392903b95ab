//! What waits for an endpoint's permission, given by a callback: CloudEvents' "HTTP 1.1
//! Web Hooks for Event Delivery" 1.0, section 4.1.3.
//!
//! An endpoint that answers the handshake without `WebHook-Allowed-Origin` may consent later, by a
//! `GET` or `POST` of the URL it was told; so may whoever runs it, by hand. A new
//! subscription is only what was asked for until then, bounded in number, in bytes and in time. It is made by the rules of
//! the time when permission comes, and not at all where the name was given to something else, or taken away, meanwhile:
//! who deletes what only waits takes it back.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use broker_core::{Error, ErrorKind, GroupName, TopicFilter};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use parking_lot::Mutex;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::access::Caller;
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

/// What waits for permission.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// By name and whether it stands already; asked for again, it waits anew.
    waiting: Mutex<HashMap<(GroupName, bool), Waiting>>,
    /// Also what waits for the endpoint's own answer.
    making: Mutex<HashMap<GroupName, Vec<Weak<Making>>>>,
}

/// A subscription that is to be made once its endpoint consents.
#[derive(Debug)]
pub(crate) struct Making {
    filter: TopicFilter,
    /// It was deleted before it was made.
    pub(crate) taken_back: CancellationToken,
}

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
        caller: Option<Caller>,
        /// What its settings hold.
        reservation: Reservation,
        making: Arc<Making>,
    },
    /// What was to be made, and is not: something else became of the name.
    Void,
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
    /// One more is to be made, until it is dropped.
    pub(crate) fn begin(&self, name: &GroupName, filter: &TopicFilter) -> Arc<Making> {
        let one = Arc::new(Making { filter: filter.clone(), taken_back: CancellationToken::new() });
        let mut making = self.making.lock();
        making.retain(|_, all| {
            all.retain(|one| one.strong_count() > 0);
            !all.is_empty()
        });
        making.entry(name.clone()).or_default().push(Arc::downgrade(&one));
        one
    }

    /// What is to be made under this name and was not taken back.
    fn making(&self, name: &str) -> Vec<Arc<Making>> {
        let making = self.making.lock();
        let all = GroupName::new(name).ok().and_then(|name| making.get(&name)).map(Vec::as_slice).unwrap_or_default();
        all.iter().filter_map(Weak::upgrade).filter(|one| !one.taken_back.is_cancelled()).collect()
    }

    /// To which topics they are.
    pub(crate) fn filters(&self, name: &str) -> Vec<TopicFilter> {
        self.making(name).iter().map(|one| one.filter.clone()).collect()
    }

    /// Those of them are not made to whose topics `may` says so; whether there was one.
    pub(crate) fn take_back(&self, name: &str, may: impl Fn(&TopicFilter) -> bool) -> bool {
        let taken: Vec<_> = self.making(name).into_iter().filter(|one| may(&one.filter)).collect();
        taken.iter().for_each(|one| one.taken_back.cancel());
        for waiting in self.waiting.lock().values_mut() {
            if matches!(&waiting.pending, Pending::Make { making, .. } if making.taken_back.is_cancelled()) {
                waiting.pending = Pending::Void;
            }
        }
        !taken.is_empty()
    }

    /// Has it wait; the key with which permission is given, and the URL at which it is. To be called before the endpoint
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
    ) -> Answer<(String, HeaderValue)> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).map_err(|error| Error::unavailable(format!("no random numbers: {error}")))?;
        let key = URL_SAFE_NO_PAD.encode(random);
        let url = HeaderValue::try_from(format!("{base}/consent/{name}?key={key}"))
            .map_err(|_| Error::invalid("the callback's URL cannot be sent"))?;
        let mut waiting = self.waiting.lock();
        let now = Instant::now();
        waiting.retain(|_, waiting| !waiting.is_over(now));
        let entry = (name.clone(), matches!(pending, Pending::Permit(_)));
        if waiting.len() >= MAX_WAITING {
            // That they are void is told while there is room.
            waiting.retain(|_, waiting| !matches!(waiting.pending, Pending::Void));
        }
        // Those that stand are as many as there are subscriptions.
        let new = waiting.keys().filter(|(_, standing)| !standing).count();
        if !entry.1 && new >= MAX_WAITING && !waiting.contains_key(&entry) {
            return Err(Problem::too_many(format!(
                "{MAX_WAITING} subscriptions wait for the permission of their endpoints, which is the most; try again later"
            )));
        }
        waiting.insert(entry, Waiting { key: key.clone(), origin: origin.clone(), until: now + KEPT, pending });
        Ok((key, url))
    }

    /// What has this key need not wait: the endpoint has said yes or no.
    pub(crate) fn forget(&self, name: &GroupName, key: &str) {
        self.given(name, key);
    }

    /// The name was given to something, or taken away: what was asked for it before is not made.
    pub(crate) fn void(&self, name: &GroupName) {
        if let Some(waiting) = self.waiting.lock().get_mut(&(name.clone(), false)) {
            waiting.pending = Pending::Void;
        }
    }

    /// Whether something waits for this key.
    fn knows(&self, name: &GroupName, key: &str) -> bool {
        find(&self.waiting.lock(), name, key).is_some()
    }

    /// Permission was given by whoever knows the key; what waited for it.
    fn given(&self, name: &GroupName, key: &str) -> Option<Waiting> {
        let mut waiting = self.waiting.lock();
        let entry = find(&waiting, name, key)?;
        waiting.remove(&entry)
    }
}

fn find(waiting: &HashMap<(GroupName, bool), Waiting>, name: &GroupName, key: &str) -> Option<(GroupName, bool)> {
    let now = Instant::now();
    [false, true].map(|standing| (name.clone(), standing)).into_iter().find(|entry| {
        let right = |found: &Waiting| !found.is_over(now) && bool::from(found.key.as_bytes().ct_eq(key.as_bytes()));
        waiting.get(entry).is_some_and(right)
    })
}

/// `GET` and `POST /consent/{name}?key=`
pub(crate) async fn consent(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Answer<Response> {
    let mut query = Query::of(&uri);
    let key = query.text("key")?.unwrap_or_default().into_owned();
    query.finish()?;
    let rate = consent::allowed_rate(&headers).map_err(Problem::invalid)?;
    let name = GroupName::new(&*name_in_path(&uri)?)?;
    // Which of them is wrong is nobody's business.
    let waited =
        || Problem::not_found("nothing waits for this permission: it was given, is too old, or the key is another");
    // Who knows no key has no change wait.
    if !shared.asked.knows(&name, &key) {
        return Err(waited());
    }
    finish(async move {
        let changing = shared.registry.begin().await;
        // While nothing changes: it is void, or it is made before anything else becomes of the name.
        let Waiting { origin, pending, .. } = shared.asked.given(&name, &key).ok_or_else(waited)?;
        let permission = Permission::new(&origin, rate);
        match pending {
            Pending::Permit(standing) => {
                drop(changing);
                permit(Arc::clone(&shared), standing.upgrade().ok_or_else(waited)?, permission).await?;
            }
            Pending::Make { making, .. } if making.taken_back.is_cancelled() => return Err(void(&name)),
            Pending::Make { spec, only_new, caller, reservation, making: _making } => {
                shared.gate.check_subscription(caller.as_ref(), &spec).map_err(|_| void(&name))?;
                shared.registry.check_free(name.as_str())?;
                let owner = caller.as_ref().and_then(Caller::owner);
                let by = (owner, Some(permission));
                shared.registry.put(&changing, &shared, name.clone(), *spec, only_new, by).await?;
                drop((changing, reservation));
                shared.try_save().await?;
            }
            Pending::Void => return Err(void(&name)),
        }
        Ok(respond(StatusCode::OK, &json!({ "subscription": name, "consent": "given" })))
    })
    .await
}

/// `HEAD` asks for what a `GET` would say, and changes nothing (RFC 9110, section 9.3.2): scanners of links send it. It is no
/// consent, which a `GET` is because WebHook says so.
pub(crate) async fn no_head() -> impl IntoResponse {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET, POST")])
}

/// It is the endpoint that is told: not who asked, or what has the name.
fn void(name: &GroupName) -> Problem {
    let detail = format!(
        "subscription {name} is not made: who asked for it may not have it any more, or the name was given to something \
         else or taken away meanwhile; it is to be asked for anew"
    );
    Problem::new(StatusCode::GONE, ErrorKind::NotFound, detail)
}
