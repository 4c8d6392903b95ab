//! What a request needs a right to, by its method and path: one table, so that a route which is not
//! in it is nobody's.

use std::borrow::Cow;
use std::sync::Arc;

use broker_core::TopicFilter;
use http::{HeaderMap, Method, Uri, header};
use percent_encoding::percent_decode_str;

use super::super::Shared;
use super::super::problem::{Answer, Problem};
use super::super::registry::{Subscribed, missing};
use super::{Action, Caller};

/// The right a request needs.
#[derive(Debug, PartialEq)]
pub(super) enum Need {
    /// None: what load balancers and programmers ask.
    Nobody,
    /// To be anybody: the answer shows what may be seen.
    Anybody,
    /// These on topics.
    Topics(Vec<Action>, TopicFilter),
    /// This on the topics of a subscription.
    Subscription(Action, String),
    /// To make or change a subscription.
    Making(String),
    /// To delete one.
    Deleting(String),
}

impl Need {
    pub(super) fn of(method: &Method, uri: &Uri, headers: &HeaderMap) -> Self {
        let mut segments = uri.path().trim_start_matches('/').split('/');
        let mut next = || segments.next().map(|segment| percent_decode_str(segment).decode_utf8_lossy());
        let (first, second, third, rest) = (next(), next(), next(), next());
        let path = (first.as_deref().unwrap_or_default(), second, third.as_deref(), rest.is_some());
        match path {
            ("healthz" | "readyz" | "openapi.json", None, None, false) => Self::Nobody,
            // Who knows its key.
            ("consent", Some(_), None, false) => Self::Nobody,
            ("metrics" | "topics", None, None, false) => Self::everything(Action::Admin),
            ("topics", Some(topic), None, false) => Self::topics(vec![Action::Publish], &topic),
            // A WebSocket settles what it reads.
            ("topics", Some(filter), Some("stream"), false) if headers.contains_key(header::UPGRADE) => {
                Self::topics(vec![Action::Subscribe, Action::Settle], &filter)
            }
            ("topics", Some(filter), Some("stream"), false) => Self::topics(vec![Action::Subscribe], &filter),
            ("subscriptions", None, None, false) => Self::Anybody,
            ("subscriptions", Some(name), third, false) => {
                let action = match third {
                    None if method == Method::PUT => return Self::Making(Cow::into_owned(name)),
                    None if method == Method::DELETE => return Self::Deleting(Cow::into_owned(name)),
                    None | Some("pause" | "resume" | "attempts") => Action::Subscribe,
                    Some("pull" | "settle") => Action::Settle,
                    Some("dead") if method != Method::DELETE => Action::Subscribe,
                    // Test, redrive, purge, and whatever is to come.
                    Some(_) => Action::Admin,
                };
                Self::Subscription(action, Cow::into_owned(name))
            }
            _ => Self::everything(Action::Admin),
        }
    }

    fn everything(action: Action) -> Self {
        Self::topics(vec![action], ">")
    }

    /// What is no filter is refused for what it is, once it is known who asks.
    fn topics(actions: Vec<Action>, filter: &str) -> Self {
        TopicFilter::new(filter).map_or(Self::Anybody, |filter| Self::Topics(actions, filter))
    }

    pub(super) fn check(&self, shared: &Shared, caller: &Caller) -> Answer<()> {
        match self {
            Self::Nobody | Self::Anybody => Ok(()),
            Self::Topics(actions, filter) => actions.iter().try_for_each(|action| caller.check(*action, filter)),
            Self::Subscription(action, name) => match seen(shared, caller, name) {
                Ok(subscribed) => caller.check(*action, &subscribed.spec.filter),
                Err(missing) if caller.may_at_all(*action) => Err(missing),
                Err(_) => Err(caller.forbidden(&format!("{action} on any topic"))),
            },
            Self::Deleting(name) => match seen(shared, caller, name) {
                Ok(subscribed) => caller.check_owning(&subscribed.spec.filter),
                Err(missing) => {
                    caller.check_owning_at_all()?;
                    // One that waits for its endpoint's consent can be taken back.
                    let mut waiting = shared.asked.filters(name);
                    waiting.retain(|filter| caller.may_see(filter) || caller.may_own(filter));
                    match waiting.first() {
                        None => Err(missing),
                        Some(_) if waiting.iter().any(|filter| caller.may_own(filter)) => Ok(()),
                        Some(filter) => caller.check_owning(filter),
                    }
                }
            },
            Self::Making(name) => match seen(shared, caller, name) {
                Ok(subscribed) => caller.check_owning(&subscribed.spec.filter),
                Err(_) => {
                    caller.check_owning_at_all()?;
                    // It cannot be hidden that a name is taken, only what has it.
                    match shared.registry.find(name) {
                        Ok(_) => Err(Problem::conflict(format!("the name {name} is taken; take another"))),
                        Err(_) => Ok(()),
                    }
                }
            },
        }
    }
}

/// A subscription that the caller may know of; any other is answered as if there were none.
fn seen(shared: &Shared, caller: &Caller, name: &str) -> Answer<Arc<Subscribed>> {
    let found = shared.registry.find(name)?;
    if caller.may_see(&found.spec.filter) { Ok(found) } else { Err(missing(name)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(actions: &[Action], filter: &str) -> Need {
        Need::Topics(actions.to_vec(), filter.parse().unwrap())
    }

    fn of(action: Action, name: &str) -> Need {
        Need::Subscription(action, name.to_owned())
    }

    #[test]
    fn every_route_has_its_need() {
        use Action::{Admin, Publish, Settle, Subscribe};
        for (request, need) in [
            ("GET /healthz", Need::Nobody),
            ("GET /readyz", Need::Nobody),
            ("GET /openapi.json", Need::Nobody),
            ("POST /consent/q?key=1", Need::Nobody),
            ("GET /metrics", on(&[Admin], ">")),
            ("GET /topics?limit=1", on(&[Admin], ">")),
            ("POST /topics/a.b?key=1", on(&[Publish], "a.b")),
            ("POST /topics/a%2Eb", on(&[Publish], "a.b")),
            ("GET /topics/a.%3E/stream", on(&[Subscribe], "a.>")),
            ("GET /subscriptions", Need::Anybody),
            ("GET /subscriptions/q", of(Subscribe, "q")),
            ("PUT /subscriptions/q", Need::Making("q".to_owned())),
            ("DELETE /subscriptions/%71", Need::Deleting("q".to_owned())),
            ("POST /subscriptions/q/pause", of(Subscribe, "q")),
            ("POST /subscriptions/q/resume", of(Subscribe, "q")),
            ("GET /subscriptions/q/attempts", of(Subscribe, "q")),
            ("GET /subscriptions/q/dead", of(Subscribe, "q")),
            ("DELETE /subscriptions/q/dead", of(Admin, "q")),
            ("DELETE /subscriptions/q/backlog", of(Admin, "q")),
            ("POST /subscriptions/q/test", of(Admin, "q")),
            ("POST /subscriptions/q/redrive", of(Admin, "q")),
            ("POST /subscriptions/q/pull?wait=1s", of(Settle, "q")),
            ("POST /subscriptions/q/settle", of(Settle, "q")),
            ("GET /", on(&[Admin], ">")),
            ("GET //healthz", Need::Nobody),
            ("GET /healthz/x", on(&[Admin], ">")),
            ("GET /subscriptions/q/dead/x", on(&[Admin], ">")),
            ("GET /elsewhere", on(&[Admin], ">")),
            ("POST /topics/a..b", Need::Anybody),
        ] {
            let (method, uri) = request.split_once(' ').unwrap();
            let have = Need::of(&method.parse().unwrap(), &uri.parse().unwrap(), &HeaderMap::new());
            assert_eq!(have, need, "{request}");
        }
        let mut upgrade = HeaderMap::new();
        upgrade.insert(header::UPGRADE, "websocket".parse().unwrap());
        let socket = Need::of(&Method::GET, &"/topics/a/stream".parse().unwrap(), &upgrade);
        assert_eq!(socket, on(&[Subscribe, Settle], "a"));
    }
}
