//! The contract, kept by a daemon at the other end of HTTP.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, Connector, DeadLetter, DrainReport, Error, ErrorKind, Group, GroupOptions,
    GroupStatus, Publisher, PublisherOptions, Result, State, Status, Subscribe, Subscription, SubscriptionStatus,
    Topic, TopicFilter,
};
use http::Method;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use super::able::{self, MAX_IN_FLIGHT, Ready};
use super::config::HttpOptions;
use super::groups::{self, COPY, Standing};
use super::http::{Call, Http};
use super::keeping;
use super::lane::{HttpConsumer, Lane};
use super::publisher::{HttpProducer, Queue};
use super::shared::Shared;
use super::wire::{self, Dead, Purged, Redriven, View};

/// A broker that is a `broker-http` daemon, reached over HTTP.
///
/// It loses nothing of a message. Publishes of one [`Publisher`] go in the order of the calls, one
/// request at a time; what queues up meanwhile goes together. Subscriptions pull when somebody
/// waits for deliveries, hold them by leases that are extended while they are held, and settle in
/// the background.
///
/// A group is a pull subscription of the daemon that its members share, with the group's name and a
/// hash of its filter as its name; a subscription without group has one of its own, deleted when it
/// ends. After the daemon was away, subscriptions it has forgotten are made again, and tell of the
/// gap.
///
/// HTTP carries all of the contract: what it can do is what the broker behind the daemon can, which
/// it learns when it [connects](Broker::connect).
///
/// A publish whose connection is lost before the answer ends as
/// [`Unavailable`](ErrorKind::Unavailable): its outcome is unknown, and trying again may publish it
/// twice (which a deduplication key prevents). Where the connection was kept from before and not one
/// byte of an answer came, the daemon had most likely closed it already: it is sent once more. What
/// did not leave this process is tried again until the timeout is over.
///
/// *Dropping* it closes it without waiting.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
/// use broker_core::{Broker, BrokerExt, GroupName, Message, Subscribe, Topic, TopicFilter};
/// use broker_http::client::{HttpBroker, HttpOptions};
///
/// let broker = HttpBroker::new(HttpOptions::from_url("http://127.0.0.1:2757")?);
/// broker.connect().await?;
/// let billing = Subscribe::group(GroupName::new("billing")?);
/// let mut orders = broker.subscribe(&TopicFilter::new("orders.>")?, billing).await?;
/// broker.publish(&Topic::new("orders.created")?, Message::new("42")).await?;
/// orders.next().await?.expect("open").ack().await?;
/// # Ok(()) }
/// ```
pub struct HttpBroker {
    name: String,
    pub(super) shared: Arc<Shared>,
    report: Mutex<Option<DrainReport>>,
}

/// How long what is still held at the end of [`close`](Broker::close) may take to be given back.
const GIVING_BACK: Duration = Duration::from_millis(500);

/// The connector of the schemes `http` and `https`, for [`Connectors`](broker_core::Connectors).
///
/// ```
/// let mut connectors = broker_core::Connectors::new();
/// connectors.add(["http", "https"], broker_http::client::connector());
/// assert_eq!(connectors.open("http://127.0.0.1:2757")?.name(), "http://127.0.0.1:2757");
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn connector() -> impl Connector + Copy + 'static {
    |url| {
        let options = HttpOptions::from_broker_url(url)?;
        Ok(Arc::new(HttpBroker::new(options)) as Arc<dyn Broker>)
    }
}

impl HttpBroker {
    /// A broker with these options; does no I/O.
    pub fn new(options: HttpOptions) -> Self {
        Self { name: options.name(), shared: Arc::new(Shared::new(Http::new(options))), report: Mutex::default() }
    }

    /// Asks the daemon for something beyond the contract: a method and a path of its interface, with
    /// JSON or without. What is answered is the body.
    ///
    /// ```no_run
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use broker_http::client::{HttpBroker, HttpOptions};
    ///
    /// let daemon = HttpBroker::new(HttpOptions::from_url("http://127.0.0.1:2757")?);
    /// let paused = daemon.request("POST", "/subscriptions/billing/pause", None).await?;
    /// # let _ = paused;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// What the daemon says, or that it cannot be asked.
    pub async fn request(&self, method: &str, path: &str, json: Option<String>) -> Result<bytes::Bytes> {
        let parsed = Method::from_bytes(method.as_bytes());
        let method = parsed.map_err(|_| Error::invalid(format!("{method:?} is no method of HTTP")))?;
        let path: http::uri::PathAndQuery =
            path.parse().map_err(|_| Error::invalid("it is a path and a query, as in /subscriptions?limit=10"))?;
        let mut call = Call::new(method, path.as_str(), self.timeout());
        call.limit = groups::LIST_ANSWER;
        if let Some(json) = json {
            call = call.json(json);
        }
        Ok(self.shared.expect(call).await?.body)
    }

    fn lanes(&self) -> Vec<Arc<Lane>> {
        self.shared.lanes.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// The queue of a topic, shared by everybody who publishes to it.
    fn queue(&self, topic: &Topic, require_route: bool) -> Arc<Queue> {
        let mut queues = self.shared.queues.lock();
        let key = (topic.clone(), require_route);
        if let Some(queue) = queues.get(&key).and_then(Weak::upgrade) {
            return queue;
        }
        if queues.len() >= 1_024 {
            queues.retain(|_, queue| queue.strong_count() > 0);
        }
        let queue = Arc::new(Queue::new(Arc::clone(&self.shared), topic.clone(), require_route));
        queues.insert(key, Arc::downgrade(&queue));
        queue
    }

    fn timeout(&self) -> Duration {
        self.shared.http.options().timeout
    }

    /// A request about a group's subscription.
    async fn of_group(&self, method: Method, group: &Group, rest: &str, body: Option<String>) -> Result<bytes::Bytes> {
        self.shared.check_open()?;
        let name = groups::find(&self.shared, group).await?;
        let path = format!("/subscriptions/{name}/{rest}");
        let mut call = Call::new(method, &path, self.timeout());
        call.limit = groups::LIST_ANSWER;
        if let Some(body) = body {
            call = call.json(body);
        }
        Ok(self.shared.expect(call).await.map_err(|error| error.context(format!("group {group}")))?.body)
    }

    async fn drain(&self, deadline: Duration) -> DrainReport {
        let until = Instant::now() + deadline;
        let shared = &self.shared;
        shared.closing.cancel();
        for lane in self.lanes() {
            lane.leave();
        }
        shared.tasks.close();
        let ended = timeout_at(until, shared.tasks.wait()).await.is_ok();
        if let Some(report) = self.report.lock().clone() {
            return report;
        }
        let held = |lane: Arc<Lane>| {
            let held = lane.state.lock().held;
            (held, lane)
        };
        let held: Vec<_> = self.lanes().into_iter().map(held).collect();
        shared.closed.cancel();
        let mut report = DrainReport::new(true);
        report.complete = ended;
        report.in_flight = held.iter().map(|(held, _)| *held as u64).sum();
        // Cut short, tasks fail what they held.
        let _ = timeout(GIVING_BACK, shared.tasks.wait()).await;
        report.unconfirmed = shared.unconfirmed();
        let report = self.report.lock().get_or_insert(report).clone();
        // Nobody can settle them any more: others need not wait until the leases end.
        let give_back =
            held.iter().filter(|(held, _)| *held > 0).map(|(_, lane)| keeping::release_all(lane, GIVING_BACK));
        if shared.is_connected() {
            let _ = timeout(GIVING_BACK, futures_util::future::join_all(give_back)).await;
        }
        shared.http.disconnect();
        report
    }
}

impl Drop for HttpBroker {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.closed.cancel();
    }
}

impl Broker for HttpBroker {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        let mut can = self.shared.able.lock().clone().unwrap_or_else(able::unasked);
        can.max_message_bytes = can.max_message_bytes.min(self.shared.http.options().max_message_bytes);
        can
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.shared.check_open()?;
            let within = self.shared.http.options().connect_timeout;
            let answer = self.shared.call(Call::new(Method::GET, "/readyz", within)).await?;
            if answer.status.is_success() {
                // Another daemon than ours may be ready in other words.
                let ready: Ready = serde_json::from_slice(&answer.body).unwrap_or_default();
                *self.shared.able.lock() = Some(ready.capabilities());
                return Ok(());
            }
            let error = super::error::refused(answer.status, &answer.headers, &answer.body);
            Err(match error.kind() {
                ErrorKind::Unauthorized => error,
                _ => Error::unavailable(format!("{} is not ready: {}", self.name, error.message())),
            })
        })
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.shared.check_open()?;
        let queue = self.queue(topic, options.require_route);
        Publisher::new(topic.clone(), self.capabilities().max_message_bytes, Arc::new(HttpProducer(queue)))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let filter = filter.clone();
        Box::pin(async move {
            self.shared.check_open()?;
            if options.max_in_flight() > MAX_IN_FLIGHT {
                return Err(Error::invalid(format!(
                    "max_in_flight is {}: the daemon lends {MAX_IN_FLIGHT} at most",
                    options.max_in_flight()
                )));
            }
            let standing = match options.group_name() {
                Some(name) => Standing::of_group(&Group::new(name.clone(), filter), options.options().clone())?,
                None => Standing::of_ones_own(&filter, options.options().clone())?,
            };
            let lane = Lane::new(Arc::clone(&self.shared), standing, options.max_in_flight());
            // Made before the subscription: dropped with this future, it takes a copy along.
            let consumer = HttpConsumer::new(Arc::clone(&lane));
            groups::stand(&self.shared, &lane.standing).await?;
            self.shared.check_open()?;
            lane.tell([]);
            Ok(Subscription::new(consumer))
        })
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        Box::pin(async move {
            self.shared.check_open()?;
            let standing = Standing::of_group(&group, options)?;
            let stood = groups::find(&self.shared, &group).await;
            let made = groups::stand(&self.shared, &standing).await?;
            match stood {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(made),
                Err(error) => Err(error),
                // It had subscriptions of other names, and has one of ours now.
                Ok(_) => Ok(false),
            }
        })
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        let group = group.clone();
        Box::pin(async move {
            self.shared.check_open()?;
            groups::alter(&self.shared, &group, options).await
        })
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        Box::pin(async move {
            self.shared.check_open()?;
            groups::delete(&self.shared, &group).await
        })
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move {
            let answer = self.of_group(Method::DELETE, &group, "backlog", None).await?;
            wire::read("purge", &answer).map(|Purged { purged }| purged)
        })
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        let group = group.clone();
        Box::pin(async move {
            let path = format!("dead?max={}", max.clamp(1, 1_000));
            let answer = self.of_group(Method::GET, &group, &path, None).await?;
            let Dead { dead } = wire::read("dead letters", &answer)?;
            dead.into_iter().take(max).map(wire::Letter::into_dead_letter).collect()
        })
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move {
            let answer = self.of_group(Method::DELETE, &group, "dead", None).await?;
            wire::read("purge", &answer).map(|Purged { purged }| purged)
        })
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move {
            let body = serde_json::json!({ "max": max }).to_string();
            let answer = self.of_group(Method::POST, &group, "redrive", Some(body)).await?;
            wire::read("redrive", &answer).map(|Redriven { redriven }| redriven)
        })
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        Box::pin(async move {
            let state = match () {
                () if self.shared.closed.is_cancelled() => State::Closed,
                () if self.shared.closing.is_cancelled() => State::Closing,
                () if self.shared.is_connected() && self.shared.last_error().is_none() => State::Active,
                () => State::Connecting,
            };
            let mut status = Status::new(&self.name, state);
            status.last_error = self.shared.last_error().map(|error| error.to_string());
            // Closed, it still says what it knows by itself.
            if state == State::Closed {
                return Ok(status);
            }
            let views = groups::list(&self.shared).await?;
            status.state = if state == State::Connecting { State::Active } else { state };
            status.last_error = None;
            let lanes = self.lanes();
            for view in views {
                match lanes.iter().find(|lane| lane.standing.own && lane.standing.name.as_str() == view.name) {
                    Some(lane) => status.subscriptions.push(subscription_status(lane, &view)),
                    None => group_status(&mut status, &view),
                }
            }
            Ok(status)
        })
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        Box::pin(self.drain(deadline))
    }
}

fn subscription_status(lane: &Lane, view: &View) -> SubscriptionStatus {
    let mut status = SubscriptionStatus::new(lane.filter().clone(), State::Active);
    status.lag = view.status.lag;
    status.in_flight = view.status.in_flight;
    status.counts = lane.state.lock().counts;
    status.last_error.clone_from(&view.status.last_error);
    status
}

/// Adds a subscription's group, unless another subscription of it was there.
fn group_status(status: &mut Status, view: &View) {
    // Copies of other clients are no groups.
    let copy = view.group.is_none() && view.expires.is_some() && view.name.starts_with(COPY);
    let Some(name) = view.group_name().parse().ok().filter(|_| !copy) else { return };
    let group = Group::new(name, view.filter.clone());
    if let Some(have) = status.groups.iter_mut().find(|have| have.group == group) {
        have.in_flight = have.in_flight.zip(view.status.in_flight).map(|(one, two)| one + two);
        return;
    }
    let mut of_group = GroupStatus::new(group, State::Active);
    of_group.lag = view.status.lag;
    of_group.lag_bytes = view.status.lag_bytes;
    of_group.in_flight = view.status.in_flight;
    // Its members as the daemon counts them are its own: one for all who pull.
    of_group.dead_letters = view.status.dead_letters;
    of_group.counts = view.status.counts.into();
    of_group.last_error.clone_from(&view.status.last_error);
    status.groups.push(of_group);
}

/// Without credentials.
impl fmt::Debug for HttpBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpBroker").field("options", self.shared.http.options()).finish_non_exhaustive()
    }
}
