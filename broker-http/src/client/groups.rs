//! Groups and copies of one's own, as pull subscriptions of the daemon.
//!
//! A group's members share one pull subscription, whose name is told by the group's alone; nobody
//! who leaves deletes it. A copy of one's own has a random name, and expires when its client is
//! gone without a word.

use std::time::Duration;

use broker_core::{Error, ErrorKind, Group, GroupName, GroupOptions, MessageId, Result, TopicFilter};
use http::header::IF_NONE_MATCH;
use http::{HeaderValue, Method, StatusCode};
use sha2::{Digest, Sha256};

use super::error::refused;
use super::http::Call;
use super::shared::Shared;
use super::wire::{self, Page, View};
use crate::SubscriptionSpec;

/// How long a copy of one's own outlives a client that has died.
pub(super) const EXPIRES: Duration = Duration::from_secs(120);

/// What the daemon counts of a subscription that many share; each member has a bound of its own.
const SHARED_MAX_IN_FLIGHT: u32 = 65_535;

/// Bytes of an answer that lists subscriptions.
pub(super) const LIST_ANSWER: usize = 64 << 20;

/// A subscription that stands at the daemon, and all it takes to make it again.
#[derive(Clone, Debug)]
pub(super) struct Standing {
    pub(super) name: GroupName,
    pub(super) group: Group,
    pub(super) options: GroupOptions,
    /// Whether it is a copy of one's own.
    pub(super) own: bool,
}

impl Standing {
    pub(super) fn of_group(group: &Group, options: GroupOptions) -> Result<Self> {
        Ok(Self { name: subscription_name(group)?, group: group.clone(), options, own: false })
    }

    pub(super) fn of_ones_own(filter: &TopicFilter, options: GroupOptions) -> Result<Self> {
        let name = GroupName::new(format!("{COPY}{}", MessageId::random()))?;
        Ok(Self { group: Group::new(name.clone(), filter.clone()), name, options, own: true })
    }

    fn spec(&self, lease: Duration) -> SubscriptionSpec {
        let mut spec = SubscriptionSpec::new(self.group.filter.clone());
        spec.group = (!self.own).then(|| self.group.name.clone());
        spec.start.clone_from(&self.options.start);
        spec.ordered = self.options.ordered;
        spec.backlog = self.options.backlog;
        spec.retry = self.options.retry;
        spec.dead_letter.clone_from(&self.options.dead_letter);
        spec.max_in_flight = SHARED_MAX_IN_FLIGHT;
        spec.timeout = lease;
        spec.expires = self.own.then_some(EXPIRES.max(lease));
        spec
    }
}

/// How the names of copies of one's own begin.
pub(super) const COPY: &str = "copy-";

/// The subscription that a group's members share: the group's name, and a hash that tells filters
/// apart.
fn subscription_name(group: &Group) -> Result<GroupName> {
    let hash = Sha256::digest(group.to_string());
    let hash: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // 128 bytes are allowed; the hash is over the whole name, so that a cut one is still its own.
    let name: String = group.name.as_str().chars().take(115).collect();
    GroupName::new(format!("{name}-{hash}"))
}

/// Makes sure that a subscription stands; whether it was made now.
///
/// # Errors
///
/// [`Conflict`](ErrorKind::Conflict) if it stands with other settings than were asked for, and
/// [`Unsupported`](ErrorKind::Unsupported) if it has no bound and one was asked for.
pub(super) async fn stand(shared: &Shared, standing: &Standing) -> Result<bool> {
    // Others may make it and delete it between our two requests, but hardly for ever.
    for _ in 0..5 {
        if !standing.own
            && let Some(view) = view(shared, standing.name.as_str()).await?
        {
            check_is(&view, &standing.group)?;
            if standing.options.backlog.is_some() && view.backlog.is_none() {
                return Err(Error::unsupported("backlog: the broker behind the daemon bounds none; leave backlog out"));
            }
            standing.options.check_joins(&standing.group, &view.settings()?)?;
            return Ok(false);
        }
        if make(shared, standing).await? {
            return Ok(true);
        }
    }
    Err(Error::conflict(format!("group {} is made and deleted by others all the time", standing.group)))
}

/// Makes a subscription unless there is one of its name.
async fn make(shared: &Shared, standing: &Standing) -> Result<bool> {
    let path = format!("/subscriptions/{}", standing.name);
    let options = shared.http.options();
    let json = serde_json::to_vec(&standing.spec(options.lease))
        .map_err(|error| Error::codec("the subscription cannot be written as JSON").with_source(error))?;
    let mut call = Call::new(Method::PUT, &path, options.timeout).json(json);
    call.headers.insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
    let answer = shared.patient(call).await?;
    match answer.status {
        StatusCode::PRECONDITION_FAILED => Ok(standing.own),
        status if status.is_success() => Ok(true),
        status => Err(refused(status, &answer.headers, &answer.body).context(format!("group {}", standing.group))),
    }
}

/// The subscription called `name`.
pub(super) async fn view(shared: &Shared, name: &str) -> Result<Option<View>> {
    let path = format!("/subscriptions/{name}");
    let answer = shared.patient(Call::new(Method::GET, &path, shared.http.options().timeout)).await?;
    match answer.status {
        StatusCode::NOT_FOUND => Ok(None),
        status if status.is_success() => wire::read("subscription", &answer.body).map(Some),
        status => Err(refused(status, &answer.headers, &answer.body)),
    }
}

fn check_is(view: &View, group: &Group) -> Result<()> {
    if view.filter == group.filter && view.group_name() == group.name.as_str() {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "subscription {} of the daemon, which stands for group {group}, is one of {}@{}; delete it, or call the group otherwise",
        view.name,
        view.group_name(),
        view.filter
    )))
}

/// Every subscription of the daemon.
pub(super) async fn list(shared: &Shared) -> Result<Vec<View>> {
    let mut views = Vec::new();
    let mut path = "/subscriptions".to_owned();
    loop {
        let mut call = Call::new(Method::GET, &path, shared.http.options().timeout);
        call.limit = LIST_ANSWER;
        let answer = shared.expect(call).await?;
        let page: Page = wire::read("list of subscriptions", &answer.body)?;
        let empty = page.subscriptions.is_empty();
        views.extend(page.subscriptions);
        match page.next {
            Some(next) if !empty => path = next_page(&next),
            _ => return Ok(views),
        }
    }
}

/// `next` is where the next page is, or the name after which it begins.
fn next_page(next: &str) -> String {
    if next.starts_with('/') {
        return next.to_owned();
    }
    let after: String = form_urlencoded::byte_serialize(next.as_bytes()).collect();
    format!("/subscriptions?next={after}")
}

/// Subscriptions that share the backlog of `group`.
pub(super) async fn of_group(shared: &Shared, group: &Group) -> Result<Vec<View>> {
    let mut views = list(shared).await?;
    views.retain(|view| view.filter == group.filter && view.group_name() == group.name.as_str());
    Ok(views)
}

/// A subscription of `group`, ours if it stands.
///
/// # Errors
///
/// [`NotFound`](ErrorKind::NotFound) if the group has none.
pub(super) async fn find(shared: &Shared, group: &Group) -> Result<String> {
    let ours = subscription_name(group)?;
    if let Some(view) = view(shared, ours.as_str()).await?
        && check_is(&view, group).is_ok()
    {
        return Ok(view.name);
    }
    let first = of_group(shared, group).await?.into_iter().next();
    first.map(|view| view.name).ok_or_else(|| Error::not_found(format!("there is no group {group}")))
}

/// Deletes a group: every subscription of it, and its backlog with the last one. False if there was
/// none.
pub(super) async fn delete(shared: &Shared, group: &Group) -> Result<bool> {
    let mut deleted = false;
    for view in of_group(shared, group).await? {
        let path = format!("/subscriptions/{}", view.name);
        match shared.expect(Call::new(Method::DELETE, &path, shared.http.options().timeout)).await {
            Ok(_) => deleted = true,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.context(format!("delete group {group}"))),
        }
    }
    Ok(deleted)
}

/// Changes a group's settings.
pub(super) async fn alter(shared: &Shared, group: &Group, options: GroupOptions) -> Result<()> {
    let name = find(shared, group).await?;
    if options.start.is_some() {
        return Err(Error::conflict(format!("group {group}: start counted when it was created; leave it out")));
    }
    let path = format!("/subscriptions/{name}");
    let timeout = shared.http.options().timeout;
    let answer = shared.expect(Call::new(Method::GET, &path, timeout)).await?;
    let mut fields: serde_json::Map<String, serde_json::Value> = wire::read("subscription", &answer.body)?;
    let spec = Standing::of_group(group, options)?.spec(timeout);
    let asked = serde_json::to_value(spec)
        .map_err(|error| Error::codec("the subscription cannot be written as JSON").with_source(error))?;
    fields.retain(|field, value| !value.is_null() && !matches!(field.as_str(), "name" | "status"));
    for field in ["ordered", "backlog", "retry", "dead_letter"] {
        if let Some(value) = asked.get(field) {
            fields.insert(field.to_owned(), value.clone());
        }
    }
    let json = serde_json::Value::Object(fields).to_string();
    shared.expect(Call::new(Method::PUT, &path, timeout).json(json)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_by_the_group_alone_and_fits() {
        let name = |group: &str| subscription_name(&group.parse().unwrap()).unwrap().to_string();
        assert_eq!(name("billing@orders.>"), name("billing@orders.>"));
        assert_ne!(name("billing@orders.>"), name("billing@orders.*"));
        assert!(name("billing@orders.>").starts_with("billing-"));
        let long = format!("{}.{}", "x".repeat(114), "y".repeat(13));
        let other = format!("{}.{}", "x".repeat(114), "z".repeat(13));
        assert_ne!(name(&format!("{long}@a")), name(&format!("{other}@a")));
    }
}
