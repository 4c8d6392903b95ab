//! The broker: what is shared, and the contract's methods.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, DeadLetter, DrainReport, Error, Group, GroupOptions, Message, Operation, Producer,
    Publish, PublishBatch, Publisher, PublisherOptions, Result, State, Status, Subscribe, Subscription, Support, Topic,
    TopicFilter,
};
use lapin::types::ShortString;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::AmqpOptions;
use crate::balance::{self, Receivers};
use crate::consumer::{self, Receiver};
use crate::link::{Link, LinkState, Live, closed};
use crate::member::{Known, Member};
use crate::naming::short;
use crate::topology::{self, QueueState};
use crate::wire::Travel;
use crate::writer::{Envelope, Route, Writer};
use crate::{dead_letters, groups};

/// What AMQP's prefetch can count.
const MAX_IN_FLIGHT: usize = u16::MAX as usize;

/// A broker on RabbitMQ; see the [crate documentation](crate).
///
/// It runs on the tokio runtime that it is first used on, and serves any other as long as that one lives; when that one ends, it is
/// closed. *Dropping* the last handle breaks the connections; the server gives what was unsettled to others.
///
/// ```
/// use broker_amqp::{AmqpBroker, AmqpOptions};
/// use broker_core::{Broker, BrokerUrl};
///
/// let url = BrokerUrl::parse("amqp://user:secret@localhost")?;
/// let broker = AmqpBroker::new(AmqpOptions::from_url(url)?);
/// assert_eq!(broker.name(), "amqp://localhost");
/// # Ok::<(), broker_core::Error>(())
/// ```
pub struct AmqpBroker {
    pub(crate) shared: Arc<Shared>,
}

/// What every part of a broker has.
pub(crate) struct Shared {
    pub(crate) options: Arc<AmqpOptions>,
    pub(crate) writer: Arc<Writer>,
    /// Publishing and consuming each have a connection, so that a blocked publisher stops no ack.
    publishing: Arc<Link>,
    pub(crate) consuming: Arc<Link>,
    /// Declaring and asking have another: of what is missing or differs the server tells by closing the channel, of which a
    /// connection bears so many.
    asking: Arc<Link>,
    members: Mutex<Vec<Arc<Member>>>,
    groups: Mutex<BTreeMap<Group, Arc<Known>>>,
    started: Mutex<Option<Handle>>,
    /// Whether its runtime has ended under it.
    is_orphan: Arc<AtomicBool>,
    /// Intake is over.
    pub(crate) closing: CancellationToken,
    /// Everything is.
    pub(crate) closed: CancellationToken,
    report: Mutex<Option<watch::Receiver<Option<DrainReport>>>>,
}

impl Shared {
    fn check_open(&self) -> Result<()> {
        match () {
            () if self.is_orphan.load(Ordering::Acquire) => Err(orphaned()),
            () if self.closing.is_cancelled() => Err(closed()),
            () => Ok(()),
        }
    }

    /// Starts the tasks, on the runtime of whoever first needs them.
    pub(crate) fn start(&self) -> Result<()> {
        self.check_open()?;
        let mut started = self.started.lock();
        if started.is_none() {
            let handle = Handle::try_current()
                .map_err(|_| Error::invalid("RabbitMQ is used from within a tokio runtime, and there is none here"))?;
            handle.spawn(Arc::clone(&self.publishing).run());
            handle.spawn(Arc::clone(&self.consuming).run());
            handle.spawn(Arc::clone(&self.writer).run());
            let (closing, closed) = (self.closing.clone(), self.closed.clone());
            handle.spawn(Running { closing, closed, is_orphan: Arc::clone(&self.is_orphan) }.run());
            *started = Some(handle);
        }
        Ok(())
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(handle) = &*self.started.lock() {
            handle.spawn(task);
        }
    }

    /// The connection for declaring and asking.
    pub(crate) async fn connection(&self) -> Result<Live> {
        self.start()?;
        self.settling_connection().await
    }

    /// The same, for what is in flight already: it is settled until the broker is closed.
    pub(crate) async fn settling_connection(&self) -> Result<Live> {
        let runtime = self.started.lock().clone().ok_or_else(closed)?;
        self.asking.on_demand(&runtime).await
    }

    /// The same for who does not wait until it is tried again: why there is none, where that is known.
    pub(crate) async fn connection_now(&self) -> Result<Live> {
        let LinkState { live, last_error, .. } = self.asking.state();
        match last_error.filter(|_| live.is_none()) {
            Some(error) => Err(error),
            None => self.connection().await,
        }
    }

    /// The state of a queue; `None` if there is no such queue.
    pub(crate) async fn queue_state(&self, queue: &ShortString) -> Result<Option<QueueState>> {
        let live = self.settling_connection().await?;
        self.bounded(topology::queue_state(&live, queue)).await
    }

    /// An exchange of a few words with the server, for as long as connecting may take at most.
    pub(crate) async fn bounded<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            () = self.closed.cancelled() => Err(closed()),
            done = timeout(self.options.connect_timeout, work) => done.unwrap_or_else(|_| {
                Err(Error::timeout(format!("RabbitMQ did not answer within {:?}", self.options.connect_timeout)))
            }),
        }
    }

    /// Waits before something is tried again, unless the broker closes.
    pub(crate) async fn pause(&self, time: Duration) -> Result<()> {
        tokio::select! {
            () = self.closed.cancelled() => Err(closed()),
            () = tokio::time::sleep(time) => Ok(()),
        }
    }

    /// What is known of a group: what was known already, unless that is of an earlier one of the name.
    pub(crate) fn know(&self, group: &Group, known: Known) -> Arc<Known> {
        let mut groups = self.groups.lock();
        match groups.get(group) {
            Some(before) if before.settings == known.settings && before.queues == known.queues => Arc::clone(before),
            _ => {
                let known = Arc::new(known);
                groups.insert(group.clone(), Arc::clone(&known));
                known
            }
        }
    }

    /// As [`know`](Self::know), of one that a member goes by.
    pub(crate) fn remember(&self, group: &Group, known: &Arc<Known>) {
        self.groups.lock().entry(group.clone()).or_insert_with(|| Arc::clone(known));
    }

    pub(crate) fn forget(&self, group: &Group) {
        self.groups.lock().remove(group);
    }

    pub(crate) fn groups(&self) -> Vec<(Group, Arc<Known>)> {
        self.groups.lock().iter().map(|(group, known)| (group.clone(), Arc::clone(known))).collect()
    }

    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        self.members.lock().clone()
    }

    pub(crate) fn leave(&self, member: &Arc<Member>) {
        self.members.lock().retain(|other| !Arc::ptr_eq(other, member));
    }

    fn state(&self) -> State {
        if self.closed.is_cancelled() {
            State::Closed
        } else if self.closing.is_cancelled() {
            State::Closing
        } else if [&self.publishing, &self.consuming].iter().all(|link| link.state().live.is_some()) {
            State::Active
        } else {
            State::Connecting
        }
    }

    fn last_error(&self) -> Option<String> {
        let error = self.publishing.state().last_error.or_else(|| self.consuming.state().last_error);
        error.map(|error| error.to_string())
    }

    /// The end: until the deadline deliveries are settled and publishes confirmed, then it is over.
    async fn drain(self: Arc<Self>, deadline: Instant) -> DrainReport {
        let settled = async {
            loop {
                let members = self.members();
                if members.is_empty() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            self.writer.flushed().await;
        };
        let complete = tokio::time::timeout_at(deadline, settled).await.is_ok();
        let mut report = DrainReport::new(true);
        report.in_flight = self.members().iter().map(|member| member.handed()).sum();
        report.unconfirmed = self.writer.pending() as u64;
        report.complete = complete && report.unconfirmed == 0;
        // A word of goodbye, also after the deadline, but not one that would keep anybody.
        let patience = deadline
            .saturating_duration_since(Instant::now())
            .clamp(Duration::from_millis(100), Duration::from_secs(1));
        if complete {
            tokio::join!(
                self.publishing.goodbye(patience),
                self.consuming.goodbye(patience),
                self.asking.goodbye(patience)
            );
        }
        self.closed.cancel();
        for member in self.members() {
            member.end(Ok(()));
        }
        report
    }
}

impl AmqpBroker {
    /// Makes the broker; does no I/O.
    pub fn new(options: AmqpOptions) -> Self {
        let options = Arc::new(options);
        let closed = CancellationToken::new();
        let link = |purpose| Arc::new(Link::new(purpose, Arc::clone(&options), closed.clone()));
        let (publishing, consuming) = (link("publish"), link("consume"));
        let asking = Arc::new(Link::new("manage", Arc::clone(&options), closed.clone()).replaced());
        let shared = Shared {
            writer: Arc::new(Writer::new(
                Arc::clone(&options),
                Arc::clone(&publishing),
                Arc::clone(&asking),
                closed.clone(),
            )),
            options,
            publishing,
            consuming,
            asking,
            members: Mutex::default(),
            groups: Mutex::default(),
            started: Mutex::default(),
            is_orphan: Arc::default(),
            closing: CancellationToken::new(),
            closed,
            report: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The connection to RabbitMQ that consumes, for what this crate does not do.
    ///
    /// # Errors
    ///
    /// As [`connect`](Broker::connect).
    pub async fn raw(&self) -> Result<Arc<lapin::Connection>> {
        self.shared.start()?;
        let deadline = Instant::now() + self.shared.options.connect_timeout;
        Ok(self.shared.consuming.live(deadline, false).await?.connection)
    }

    async fn open(&self, filter: &TopicFilter, options: Subscribe) -> Result<Subscription> {
        let shared = &self.shared;
        if options.max_in_flight() > MAX_IN_FLIGHT {
            return Err(Error::invalid(format!(
                "max_in_flight is {}: RabbitMQ counts {MAX_IN_FLIGHT} at most",
                options.max_in_flight()
            )));
        }
        shared.start()?;
        let (group, known) = match options.group_name() {
            Some(name) => {
                let group = Group::new(name.clone(), filter.clone());
                let (known, _) = groups::ensure(shared, &group, options.options()).await?;
                (Some(group), known)
            }
            None => (None, Arc::new(groups::alone(options.options(), &shared.options)?)),
        };
        let queues = known.queues.len();
        if options.max_in_flight() < queues {
            return Err(Error::invalid(format!(
                "max_in_flight is {}: the group has {queues} queues, and each needs one at least",
                options.max_in_flight()
            )));
        }
        let prefetch = u16::try_from(options.max_in_flight() / queues.max(1)).unwrap_or(u16::MAX);
        let join = async |queue: ShortString| {
            let (known, filter) = (Arc::clone(&known), filter.clone());
            let member = Arc::new(Member::new(Arc::clone(shared), group.clone(), known, filter, queue, prefetch));
            shared.members.lock().push(Arc::clone(&member));
            let (ready, standing) = oneshot::channel();
            // Dropped before it stands, it takes the subscription with it.
            let receiver = Receiver { member: Arc::clone(&member) };
            shared.spawn(consumer::run(member, ready));
            standing.await.unwrap_or_else(|_| Err(closed()))?;
            Ok(receiver)
        };
        match known.queues.as_slice() {
            [] => Ok(Subscription::new(join(ShortString::default()).await?)),
            [queue] => Ok(Subscription::new(join(queue.clone()).await?)),
            several => {
                let mut receivers = Vec::with_capacity(several.len());
                for queue in several {
                    receivers.push(join(queue.clone()).await?);
                }
                let members = receivers.iter().map(|receiver| Arc::clone(&receiver.member)).collect();
                shared.spawn(balance::run(members));
                Ok(Subscription::new(Receivers::new(receivers)))
            }
        }
    }
}

impl Broker for AmqpBroker {
    fn name(&self) -> &str {
        &self.shared.options.url
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&self.shared.options)
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.shared.start()?;
            let deadline = Instant::now() + self.shared.options.connect_timeout;
            self.shared.publishing.live(deadline, false).await?;
            self.shared.consuming.live(deadline, false).await.map(drop)
        })
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.shared.check_open()?;
        short("topic", topic.as_str())?;
        let producer = TopicProducer {
            shared: Arc::clone(&self.shared),
            topic: topic.clone(),
            require_route: options.require_route,
        };
        Publisher::new(topic.clone(), self.shared.options.max_message_bytes, Arc::new(producer))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let filter = filter.clone();
        Box::pin(async move { self.open(&filter, options).await })
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        Box::pin(async move { Ok(groups::ensure(&self.shared, &group, &options).await?.1) })
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        let group = group.clone();
        Box::pin(async move { groups::alter(&self.shared, &group, &options).await })
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        Box::pin(async move { groups::delete(&self.shared, &group).await })
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move { groups::purge(&self.shared, &group).await })
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        let group = group.clone();
        Box::pin(async move { dead_letters::show(&self.shared, &group, max).await })
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move { dead_letters::purge(&self.shared, &group).await })
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        Box::pin(async move { dead_letters::redrive(&self.shared, &group, max).await })
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        Box::pin(async {
            let shared = &self.shared;
            let mut status = Status::new(self.name(), shared.state());
            status.last_error = shared.last_error();
            groups::status(shared, &mut status).await?;
            Ok(status)
        })
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        let shared = Arc::clone(&self.shared);
        let mut report = {
            let mut report = shared.report.lock();
            match &*report {
                Some(report) => report.clone(),
                None => {
                    let (done, receiver) = watch::channel(None);
                    *report = Some(receiver.clone());
                    shared.closing.cancel();
                    let deadline = Instant::now() + deadline.min(Duration::from_secs(365 * 24 * 3600));
                    let draining = Arc::clone(&shared);
                    let drain = async move {
                        let report = draining.drain(deadline).await;
                        done.send_replace(Some(report));
                    };
                    let started = shared.started.lock().is_some();
                    if started {
                        shared.spawn(drain);
                    } else {
                        shared.closed.cancel();
                        drop(drain);
                        let (_, finished) = watch::channel(Some(DrainReport::new(true)));
                        *report = Some(finished.clone());
                        return Box::pin(async { DrainReport::new(true) });
                    }
                    receiver
                }
            }
        };
        Box::pin(async move {
            let report = report.wait_for(Option::is_some).await.ok().and_then(|report| report.clone());
            // The drain's runtime ended first: nothing is known but that it is over.
            report.unwrap_or_else(|| {
                let mut report = DrainReport::new(true);
                report.complete = false;
                report
            })
        })
    }
}

pub(crate) fn orphaned() -> Error {
    Error::closed("the runtime that the broker was first used on has ended, and the broker with it: open another")
}

/// What goes with the runtime that a broker runs on.
struct Running {
    closing: CancellationToken,
    closed: CancellationToken,
    is_orphan: Arc<AtomicBool>,
}

impl Running {
    async fn run(self) {
        self.closed.cancelled().await;
    }
}

/// The connections are gone, and the tasks that made them again: nobody is to wait for any.
impl Drop for Running {
    fn drop(&mut self) {
        if self.closed.is_cancelled() {
            return;
        }
        tracing::warn!("the runtime that a RabbitMQ broker ran on has ended: the broker is closed");
        self.is_orphan.store(true, Ordering::Release);
        self.closing.cancel();
        self.closed.cancel();
    }
}

/// Once the last handle is gone, nothing is waited for.
impl Drop for AmqpBroker {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.closed.cancel();
    }
}

impl fmt::Debug for AmqpBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpBroker").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

fn capabilities(options: &AmqpOptions) -> Capabilities {
    let mut can = Capabilities::all();
    can.max_message_bytes = options.max_message_bytes;
    can.max_in_flight = MAX_IN_FLIGHT;
    can.durable = true;
    can.start_earliest = Support::None;
    can.start_time = Support::None;
    can.start_position = Support::None;
    can.deduplication = Support::None;
    can.matched = false;
    // One member at a time receives, and a lost connection forgets which attempt it was.
    can.ordered = Support::Limited;
    can.delay = Support::Limited;
    can.overflow_wait = Support::None;
    can.overflow_reject = Support::None;
    can.overflow_drop_oldest = Support::None;
    can
}

struct TopicProducer {
    shared: Arc<Shared>,
    topic: Topic,
    require_route: bool,
}

impl Producer for TopicProducer {
    fn publish(&self, message: Message) -> Publish {
        if let Err(error) = self.shared.start() {
            return Operation::from(error);
        }
        if self.require_route && message.deliver_at().is_some() {
            return Operation::from(Error::unsupported(
                "require_route with a delivery time: where a message goes is known when it is due",
            ));
        }
        self.shared.writer.submit(Envelope {
            route: Route::Topic(self.topic.clone()),
            message,
            travel: Travel::default(),
            require_route: self.require_route,
        })
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        if let Err(error) = self.shared.start() {
            return Operation::from(error);
        }
        let publishes: Vec<Publish> = messages.into_iter().map(|message| self.publish(message)).collect();
        Operation::boxed(async move { Ok(futures_util::future::join_all(publishes).await) })
    }
}
