//! A server in miniature: the in-process broker behind a line that can be cut, so that the checks of
//! faults have something to catch. Right unless a flaw is set.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use broker_core::{
    BoxFuture, Broker, Capabilities, Consumer, DeadLetter, Deliveries, Delivery, DrainReport, Error, Gap, Group,
    GroupOptions, Message, Operation, Producer, Publish, PublishBatch, Publisher, PublisherOptions, Receipt, Received,
    Result, Settle, Settlement, Status, Subscribe, Subscription, Topic, TopicFilter,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Double;
use crate::{Harness, InProcess, Link, Secret, Timing};

/// The checks that this server is for.
pub(super) const CHECKS: &[&str] = &["E10", "E14", "F1", "F2", "F4", "F7", "F9", "G4", "G5"];

pub(super) const DOUBLES: &[Double] = &[
    Double::remote("connects when it is made", &[("E10", "opening made")], |flaws| flaws.dials_at_open = true),
    Double::remote(
        "waits for the server at close",
        &[("E14", "close with the broker down did not end within")],
        |flaws| flaws.close_waits = true,
    ),
    Double::remote(
        "takes what it cannot send",
        &[
            ("E14", "a publish succeeded with the broker down"),
            ("F1", "receiving what was published did not end within"),
            (
                "F7",
                "publishing to a broker that answers nothing succeeded; it should have been refused as timeout or unavailable",
            ),
        ],
        |flaws| flaws.pretends = true,
    ),
    Double::remote(
        "is lost with its connection",
        &[
            ("F1", "receiving what was published did not end within"),
            ("F2", "receiving what was published did not end within"),
        ],
        |flaws| flaws.never_resumes = true,
    ),
    Double::remote("is wedged by what it cannot decode", &[("F4", "around bytes that are no message")], |flaws| {
        flaws.wedged = true
    }),
    Double::remote(
        "waits for a stalled server for ever",
        &[("F7", "a broker that answers nothing: publishing did not end within")],
        |flaws| flaws.waits_for_ever = true,
    ),
    Double::remote(
        "connects to nobody for ever",
        &[("F9", "connecting to a broker that is not there did not end within")],
        |flaws| flaws.dials_for_ever = true,
    ),
    Double::remote(
        "calls itself connected to nobody",
        &[(
            "F9",
            "connecting to a broker that is not there succeeded; it should have been refused as unavailable or timeout",
        )],
        |flaws| flaws.connects_to_nobody = true,
    ),
    Double::remote("leaks a password into an error", &[("G4", "a credential is seen in connecting")], |flaws| {
        flaws.leaks_in_errors = true
    }),
    Double::remote("leaks a password into its Debug", &[("G4", "a credential is seen in Debug")], |flaws| {
        flaws.leaks_in_debug = true
    }),
    Double::remote("leaks a password into the log", &[("G4", "a credential is seen in the log")], |flaws| {
        flaws.leaks_in_log = true
    }),
    Double::remote(
        "hides its raw client",
        &[("G5", "the adapter has a raw client, and it cannot be reached through the broker")],
        |flaws| flaws.hides_client = true,
    ),
];

/// What is wrong with it.
#[derive(Clone, Debug, Default)]
pub(super) struct Flaws {
    dials_at_open: bool,
    close_waits: bool,
    pretends: bool,
    never_resumes: bool,
    wedged: bool,
    waits_for_ever: bool,
    dials_for_ever: bool,
    connects_to_nobody: bool,
    leaks_in_errors: bool,
    leaks_in_debug: bool,
    leaks_in_log: bool,
    hides_client: bool,
}

/// How long a call waits for an answer.
const TIMEOUT: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Down,
    Stalled,
}

/// The line between clients and the server.
#[derive(Debug)]
struct Line {
    state: watch::Sender<State>,
    dialled: AtomicU64,
    /// It was cut, and a flawed client never notices that it is back.
    torn: AtomicBool,
    garbage: AtomicBool,
    flaws: Flaws,
    secret: Option<String>,
}

impl Line {
    fn new(flaws: Flaws, state: State, secret: Option<String>) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(state),
            dialled: AtomicU64::new(0),
            torn: AtomicBool::new(false),
            garbage: AtomicBool::new(false),
            flaws,
            secret,
        })
    }

    fn state(&self) -> State {
        *self.state.borrow()
    }

    fn set(&self, state: State) {
        if state != State::Up {
            self.torn.store(true, Ordering::SeqCst);
        }
        self.state.send_replace(state);
    }

    fn is_up(&self) -> bool {
        self.state() == State::Up
    }

    /// Deliveries come through.
    fn delivers(&self) -> bool {
        let lost = self.flaws.never_resumes && self.torn.load(Ordering::SeqCst);
        let wedged = self.flaws.wedged && self.garbage.load(Ordering::SeqCst);
        self.is_up() && !lost && !wedged
    }

    fn away(&self) -> Error {
        let to = match &self.secret {
            Some(secret) if self.flaws.leaks_in_errors => format!("user:{secret}@server"),
            _ => "server".to_owned(),
        };
        if let (Some(secret), true) = (&self.secret, self.flaws.leaks_in_log) {
            tracing::warn!(%secret, "could not connect");
        }
        Error::unavailable(format!("connect to {to}: nobody is there"))
    }

    /// Waits until it is up, as long as a call waits.
    async fn reach(&self, for_ever: bool) -> Result<()> {
        let mut state = self.state.subscribe();
        match self.state() {
            State::Down if !for_ever => Err(self.away()),
            _ => {
                let up = state.wait_for(|state| *state == State::Up);
                if for_ever {
                    let _ = up.await;
                    return Ok(());
                }
                tokio::time::timeout(TIMEOUT, up)
                    .await
                    .map(drop)
                    .map_err(|_| Error::timeout(format!("the server did not answer within {TIMEOUT:?}")))
            }
        }
    }
}

/// A server of its own for a check.
#[derive(Debug)]
pub(super) struct Remote {
    server: InProcess,
    /// Holds the server while no client does.
    kept: Result<Arc<dyn Broker>>,
    line: Arc<Line>,
    flaws: Flaws,
    timing: Timing,
}

impl Remote {
    pub(super) fn new(flaws: Flaws, timing: Timing) -> Self {
        let server = InProcess::new();
        Self { kept: server.open(), server, line: Line::new(flaws.clone(), State::Up, None), flaws, timing }
    }

    fn client(&self, line: &Arc<Line>) -> Result<Arc<dyn Broker>> {
        self.kept.as_ref().map_err(Error::clone)?;
        Client::open(self.server.open()?, Arc::clone(line))
    }
}

impl Harness for Remote {
    fn name(&self) -> String {
        "remote double".to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        self.client(&self.line)
    }

    fn timing(&self) -> Timing {
        self.timing
    }

    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        let opened = self.server.open();
        let line = Line::new(self.flaws.clone(), State::Up, None);
        Box::pin(async move { Ok(Some(Arc::new(Cuttable { server: opened?, line }) as Arc<dyn Link>)) })
    }

    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        Some(self.client(&Line::new(self.flaws.clone(), State::Down, None)))
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-double".to_owned();
        let opened = self.client(&Line::new(self.flaws.clone(), State::Down, Some(text.clone())));
        Some(Secret { text, opened })
    }

    fn inject<'a>(&'a self, _: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        self.line.garbage.store(true, Ordering::SeqCst);
        Box::pin(std::future::ready(Some(Err(Error::codec("that is no message")))))
    }

    fn raw_client<'a>(&'a self, _: &'a dyn Broker) -> BoxFuture<'a, Option<bool>> {
        Box::pin(std::future::ready(Some(!self.flaws.hides_client)))
    }
}

#[derive(Debug)]
struct Cuttable {
    server: Arc<dyn Broker>,
    line: Arc<Line>,
}

impl Cuttable {
    fn set(&self, state: State) -> BoxFuture<'_, ()> {
        self.line.set(state);
        Box::pin(std::future::ready(()))
    }
}

impl Link for Cuttable {
    fn open(&self) -> Result<Arc<dyn Broker>> {
        Client::open(Arc::clone(&self.server), Arc::clone(&self.line))
    }

    fn connections(&self) -> Option<u64> {
        Some(self.line.dialled.load(Ordering::SeqCst))
    }

    fn cut(&self) -> BoxFuture<'_, ()> {
        self.line.set(State::Down);
        self.set(State::Up)
    }

    fn down(&self) -> BoxFuture<'_, ()> {
        self.set(State::Down)
    }

    fn stall(&self) -> BoxFuture<'_, ()> {
        self.set(State::Stalled)
    }

    fn up(&self) -> BoxFuture<'_, ()> {
        self.set(State::Up)
    }
}

/// A handle: a connection of its own, whose end is not the server's.
struct Client {
    server: Arc<dyn Broker>,
    line: Arc<Line>,
    closed: CancellationToken,
    unsettled: Arc<AtomicUsize>,
}

impl Client {
    fn open(server: Arc<dyn Broker>, line: Arc<Line>) -> Result<Arc<dyn Broker>> {
        if line.flaws.dials_at_open {
            line.dialled.fetch_add(1, Ordering::SeqCst);
        }
        Ok(Arc::new(Self { server, line, closed: CancellationToken::new(), unsettled: Arc::default() }))
    }

    fn check_open(&self) -> Result<()> {
        if self.closed.is_cancelled() { Err(Error::closed("the broker was closed")) } else { Ok(()) }
    }

    /// A call to the server.
    fn call<'a, T: Send + 'a>(
        &'a self,
        call: impl FnOnce(&'a dyn Broker) -> BoxFuture<'a, Result<T>> + Send + 'a,
    ) -> BoxFuture<'a, Result<T>> {
        Box::pin(async move {
            self.check_open()?;
            self.line.dialled.fetch_add(1, Ordering::SeqCst);
            self.line.reach(self.line.flaws.waits_for_ever).await?;
            call(&*self.server).await
        })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Client");
        if self.line.flaws.leaks_in_debug {
            out.field("secret", &self.line.secret);
        }
        out.finish_non_exhaustive()
    }
}

impl Broker for Client {
    fn name(&self) -> &str {
        "remote:"
    }

    fn capabilities(&self) -> Capabilities {
        self.server.capabilities()
    }

    fn connect(&self) -> BoxFuture<'_, Result<()>> {
        if self.line.flaws.connects_to_nobody {
            return Box::pin(std::future::ready(self.check_open()));
        }
        if self.line.flaws.dials_for_ever && !self.line.is_up() {
            return Box::pin(std::future::pending());
        }
        self.call(|server| server.connect())
    }

    fn publisher(&self, topic: &Topic, options: PublisherOptions) -> Result<Publisher> {
        self.check_open()?;
        let publisher = self.server.publisher(topic, options)?;
        let producer = RemoteProducer { publisher, line: Arc::clone(&self.line), closed: self.closed.clone() };
        Publisher::new(topic.clone(), self.capabilities().max_message_bytes, Arc::new(producer))
    }

    fn subscribe(&self, filter: &TopicFilter, options: Subscribe) -> BoxFuture<'_, Result<Subscription>> {
        let filter = filter.clone();
        Box::pin(async move {
            let subscription =
                self.call(move |server| Box::pin(async move { server.subscribe(&filter, options).await }));
            Ok(Subscription::new(RemoteConsumer {
                inner: subscription.await?,
                line: Arc::clone(&self.line),
                change: None,
                ended: self.closed.clone().cancelled_owned().into(),
                unsettled: Arc::clone(&self.unsettled),
                batch: Vec::new(),
            }))
        })
    }

    fn create_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.create_group(&group, options).await }))
    }

    fn alter_group(&self, group: &Group, options: GroupOptions) -> BoxFuture<'_, Result<()>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.alter_group(&group, options).await }))
    }

    fn delete_group(&self, group: &Group) -> BoxFuture<'_, Result<bool>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.delete_group(&group).await }))
    }

    fn purge_group(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.purge_group(&group).await }))
    }

    fn dead_letters(&self, group: &Group, max: usize) -> BoxFuture<'_, Result<Vec<DeadLetter>>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.dead_letters(&group, max).await }))
    }

    fn purge_dead_letters(&self, group: &Group) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.purge_dead_letters(&group).await }))
    }

    fn redrive(&self, group: &Group, max: u64) -> BoxFuture<'_, Result<u64>> {
        let group = group.clone();
        self.call(move |server| Box::pin(async move { server.redrive(&group, max).await }))
    }

    fn status(&self) -> BoxFuture<'_, Result<Status>> {
        self.call(|server| server.status())
    }

    fn close(&self, deadline: Duration) -> BoxFuture<'_, DrainReport> {
        Box::pin(async move {
            let drained = async {
                while self.unsettled.load(Ordering::SeqCst) > 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                let _ = self.line.reach(true).await;
            };
            let mut report = DrainReport::new(true);
            if self.line.flaws.close_waits {
                drained.await;
            } else {
                report.complete = tokio::time::timeout(deadline, drained).await.is_ok();
            }
            report.in_flight = self.unsettled.load(Ordering::SeqCst) as u64;
            self.closed.cancel();
            report
        })
    }
}

struct RemoteProducer {
    publisher: Publisher,
    line: Arc<Line>,
    closed: CancellationToken,
}

impl Producer for RemoteProducer {
    fn publish(&self, message: Message) -> Publish {
        if self.closed.is_cancelled() {
            return Operation::ready(Err(Error::closed("the broker was closed")));
        }
        match self.line.state() {
            State::Up => self.publisher.publish(message),
            _ if self.line.flaws.pretends => Operation::ready(Ok(Receipt::new(message.id().clone()))),
            _ => {
                let (line, publisher) = (Arc::clone(&self.line), self.publisher.clone());
                Operation::boxed(async move {
                    line.reach(line.flaws.waits_for_ever).await?;
                    publisher.publish(message).await
                })
            }
        }
    }

    fn publish_batch(&self, messages: Vec<Message>) -> PublishBatch {
        let publishes: Vec<Publish> = messages.into_iter().map(|message| self.publish(message)).collect();
        Operation::boxed(async { Ok(futures_util::future::join_all(publishes).await) })
    }
}

/// Ready when something happened that a waiting receiver should look at.
struct Event(Pin<Box<dyn Future<Output = ()> + Send>>);

impl<F: Future<Output = ()> + Send + 'static> From<F> for Event {
    fn from(future: F) -> Self {
        Self(Box::pin(future))
    }
}

struct RemoteConsumer {
    inner: Subscription,
    line: Arc<Line>,
    change: Option<Event>,
    ended: Event,
    unsettled: Arc<AtomicUsize>,
    batch: Vec<Delivery>,
}

impl Consumer for RemoteConsumer {
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut Vec<Delivery>, limit: usize) -> Poll<Result<usize>> {
        if self.ended.0.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(0));
        }
        loop {
            // Before looking: a change in between must not be missed.
            let mut state = self.line.state.subscribe();
            if self.line.delivers() {
                break;
            }
            let change = self.change.get_or_insert_with(|| Event::from(async move { drop(state.changed().await) }));
            ready!(change.0.as_mut().poll(cx));
            self.change = None;
        }
        let count = ready!(self.inner.poll_receive(cx, &mut self.batch, limit))?;
        for delivery in self.batch.drain(..) {
            self.unsettled.fetch_add(1, Ordering::SeqCst);
            let remote = RemoteDelivery {
                received: delivery.received().clone(),
                delivery: Mutex::new(Some(delivery)),
                line: Arc::clone(&self.line),
                unsettled: Arc::clone(&self.unsettled),
            };
            batch.push(Delivery::new(Arc::new(remote), 0));
        }
        Poll::Ready(Ok(count))
    }

    fn gap(&mut self) -> Option<Gap> {
        self.inner.gap()
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct RemoteDelivery {
    received: Received,
    delivery: Mutex<Option<Delivery>>,
    line: Arc<Line>,
    unsettled: Arc<AtomicUsize>,
}

impl Deliveries for RemoteDelivery {
    fn message(&self, _: u32) -> &Message {
        self.received.message()
    }

    fn topic(&self, _: u32) -> &Topic {
        self.received.topic()
    }

    fn attempt(&self, _: u32) -> u32 {
        self.received.attempt()
    }

    fn settle(&self, _: u32, settlement: Settlement) -> Settle {
        self.unsettled.fetch_sub(1, Ordering::SeqCst);
        let delivery = self.delivery.lock().take();
        match delivery {
            Some(delivery) if self.line.is_up() => delivery.settle(settlement),
            // Dropped: it comes back.
            _ => Operation::ready(Err(self.line.away())),
        }
    }

    fn abandon(&self, _: u32) {
        self.unsettled.fetch_sub(1, Ordering::SeqCst);
        drop(self.delivery.lock().take());
    }
}
