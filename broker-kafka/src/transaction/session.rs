//! The transactional producer: one transaction after another, and a client made anew where one has ended badly.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use broker_core::{Error, ErrorKind, Message, Result, Topic};
use parking_lot::Mutex;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rustc_hash::{FxHashMap, FxHashSet};

use super::Offsets;
use super::outcome::{Aborted, Ended, Outcome, Outcomes, Place, Round, not_known, unknown};
use crate::admin::Admin;
use crate::client::{self, Role, millis, rest};
use crate::wire::Written;
use crate::{KafkaConfig, error, record};

/// The longest that the server lets a transaction be open by default (`transaction.max.timeout.ms`).
const MAX_TRANSACTION: Duration = Duration::from_secs(15 * 60);

type Client = ThreadedProducer<Outcomes>;

pub(super) struct Session {
    config: Arc<KafkaConfig>,
    admin: Arc<Admin>,
    outcomes: Arc<Mutex<Round>>,
    client: Option<Client>,
    /// Another producer has taken the transactional id: this one is out for good.
    fenced: Option<Error>,
    /// Topics that are there.
    known: FxHashSet<Topic>,
}

impl Session {
    pub(super) fn new(config: &Arc<KafkaConfig>, admin: &Arc<Admin>) -> Self {
        Self {
            config: Arc::clone(config),
            admin: Arc::clone(admin),
            outcomes: Arc::default(),
            client: None,
            fenced: None,
            known: FxHashSet::default(),
        }
    }

    /// One transaction: where each record is. If it is aborted there is none of them; only where nothing is known of its
    /// commit, there may be all.
    pub(super) fn transact(
        &mut self,
        messages: &[(&Topic, &Message)],
        offsets: &[Offsets],
    ) -> std::result::Result<Vec<Place>, Aborted> {
        match self.attempt(messages, offsets) {
            // It is looked up again, and made where that is allowed.
            Err(aborted) if aborted.deleted => self.attempt(messages, offsets),
            ended => ended,
        }
    }

    fn attempt(
        &mut self,
        messages: &[(&Topic, &Message)],
        offsets: &[Offsets],
    ) -> std::result::Result<Vec<Place>, Aborted> {
        self.find(messages)?;
        self.outcomes.lock().begin(messages.len());
        let none = |cause| Aborted { cause, own: vec![None; messages.len()], deleted: false };
        let client = self.client().map_err(none)?;
        let begun = Instant::now();
        let started = client.begin_transaction().map_err(|error| error::failed("begin a transaction", &error));
        let filled = started.and_then(|()| self.fill(messages, offsets));
        let committed = filled.map_err(Ended::Aborted).and_then(|()| self.commit(begun));
        let outcomes = std::mem::take(&mut self.outcomes.lock().outcomes);
        let placed = committed.and_then(|()| {
            let places = outcomes.iter().map(|outcome| outcome.clone().unwrap_or_else(|| Err(unknown())));
            places.collect::<Result<_>>().map_err(Ended::Aborted)
        });
        placed.map_err(|ended| {
            let cause = match ended {
                Ended::Aborted(cause) => {
                    self.abort();
                    tracing::warn!(%cause, "a transaction was aborted");
                    cause
                }
                Ended::Unknown(cause) => {
                    tracing::warn!(%cause, "whether a transaction was committed is not known");
                    self.end();
                    return none(cause);
                }
            };
            self.end();
            // What failed by itself says how; what was purged, or had been written, failed with it.
            let own = |outcome: Option<Outcome>| outcome?.err().filter(|own| own.kind() != ErrorKind::Closed);
            let own: Vec<_> = outcomes.into_iter().map(own).collect();
            let mut deleted = false;
            for ((topic, _), own) in messages.iter().zip(&own) {
                if own.as_ref().is_some_and(|own| own.kind() == ErrorKind::NotFound) {
                    deleted |= self.known.remove(*topic);
                }
            }
            Aborted { cause, own, deleted }
        })
    }

    /// Finds or creates the topics.
    fn find(&mut self, messages: &[(&Topic, &Message)]) -> std::result::Result<(), Aborted> {
        let mut missing: FxHashMap<&Topic, Error> = FxHashMap::default();
        for (topic, _) in messages {
            if self.known.contains(*topic) || missing.contains_key(topic) {
                continue;
            }
            match self.admin.ensure_topic(topic) {
                Ok(()) => drop(self.known.insert((*topic).clone())),
                Err(error) => drop(missing.insert(topic, error.context(format_args!("publish to {topic}")))),
            }
        }
        let own: Vec<_> = messages.iter().map(|(topic, _)| missing.get(topic).cloned()).collect();
        match own.iter().flatten().next().cloned() {
            None => Ok(()),
            Some(cause) => Err(Aborted { cause, own, deleted: false }),
        }
    }

    fn fill(&self, messages: &[(&Topic, &Message)], offsets: &[Offsets]) -> Result<()> {
        let Some(client) = &self.client else { return Err(unknown()) };
        let deadline = Instant::now() + self.config.publish_timeout;
        for (index, (topic, message)) in messages.iter().enumerate() {
            let ticket = self.outcomes.lock().ticket(index);
            let failed = |error: Error| {
                self.outcomes.lock().set(ticket, Err(error.clone()));
                error
            };
            let encoded = record::encode::<Written>(topic, message, None, self.config.format).map_err(failed)?;
            let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic.as_str(), ticket);
            record.payload = encoded.payload.as_deref();
            record.key = encoded.key;
            record.timestamp = encoded.timestamp;
            record.headers = encoded.headers.map(OwnedHeaders::from);
            loop {
                match client.send(record) {
                    Ok(()) => break,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again))
                        if Instant::now() < deadline =>
                    {
                        record = again;
                        rest(Duration::from_millis(1));
                    }
                    Err((error, _)) => {
                        return Err(failed(error::failed(format_args!("publish to {topic}"), &error)));
                    }
                }
            }
        }
        let timeout = self.config.publish_timeout;
        offsets.iter().try_for_each(|(offsets, group)| {
            let sent = self.patiently(timeout, || client.send_offsets_to_transaction(offsets, group, timeout));
            sent.map_err(|error| error::failed("commit offsets in a transaction", &error))
        })
    }

    /// Commits. What is not written in time is not asked to be, and known to be nothing. A commit that is not answered is
    /// asked for again, for as long as a question may take: the server says the same of it as often as it is asked.
    fn commit(&self, begun: Instant) -> std::result::Result<(), Ended> {
        let Some(client) = &self.client else { return Err(Ended::Aborted(unknown())) };
        let ask = |patience: Duration| {
            let left = patience.saturating_sub(begun.elapsed());
            self.patiently(left, || client.commit_transaction(left))
        };
        let mut committed = ask(self.config.publish_timeout);
        if committed.as_ref().is_err_and(may_be_retried) {
            committed = ask(self.open());
        }
        committed.map_err(|error| {
            let failed = error::failed("commit a transaction", &error);
            match error {
                // Librdkafka says so where it has not asked yet. The rest includes answers that did not come in time.
                // Nobody looks it up later: where it is not answered, nothing else would be. The next transaction begins with
                // what the server does of it, which is to go on with a commit that it was told of, and to abort all else.
                KafkaError::Transaction(error) if !error.txn_requires_abort() => Ended::Unknown(not_known(&failed)),
                _ => Ended::Aborted(failed),
            }
        })?;
        // A record that failed fails its transaction; should one not, it is said.
        match self.outcomes.lock().outcomes.iter().flatten().find_map(|outcome| outcome.as_ref().err().cloned()) {
            Some(error) => Err(Ended::Aborted(error)),
            None => Ok(()),
        }
    }

    /// Asks again while librdkafka says that it may be.
    fn patiently(
        &self,
        patience: Duration,
        mut ask: impl FnMut() -> std::result::Result<(), KafkaError>,
    ) -> std::result::Result<(), KafkaError> {
        let deadline = Instant::now() + patience;
        loop {
            match ask() {
                Err(error) if may_be_retried(&error) && Instant::now() < deadline => rest(Duration::from_millis(20)),
                outcome => return outcome,
            }
        }
    }

    /// After this nothing of the transaction is there, for who reads what is committed.
    fn abort(&self) {
        if let Some(client) = &self.client {
            // What it leaves open the next producer with its id aborts.
            let patience = self.config.publish_timeout;
            let _ = self.patiently(patience, || client.abort_transaction(self.config.connect_timeout));
        }
    }

    /// The client is made anew for the next transaction: where the server has refused a batch, librdkafka goes on with
    /// sequence numbers that the server does not expect; and what a commit has come to must be settled first, which
    /// beginning with transactions does.
    fn end(&mut self) {
        let Some(client) = self.client.take() else { return };
        if let Some((code, why)) = client.client().fatal_error() {
            let fenced = error::code_kind(code) == ErrorKind::Conflict;
            self.fenced =
                fenced.then(|| Error::conflict(format!("another producer has the same transactional_id: {why}")));
        }
        // Ending it may wait for its connections.
        let _ = thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(move || drop(client));
    }

    fn client(&mut self) -> Result<&Client> {
        if let Some(fenced) = &self.fenced {
            return Err(fenced.clone());
        }
        // One that ended while there was nothing to do has nothing of ours with it.
        if self.client.as_ref().is_some_and(|client| client.client().fatal_error().is_some()) {
            self.end();
            if let Some(fenced) = &self.fenced {
                return Err(fenced.clone());
            }
        }
        let client = match self.client.take() {
            Some(client) => client,
            None => self.make()?,
        };
        Ok(self.client.insert(client))
    }

    /// How long a transaction may be open, before the server aborts it.
    fn open(&self) -> Duration {
        let timeout = self.config.publish_timeout.min(MAX_TRANSACTION);
        (timeout + self.config.connect_timeout).min(MAX_TRANSACTION)
    }

    fn make(&self) -> Result<Client> {
        let config = &self.config;
        let id = config.transactional_id.as_deref().unwrap_or_default();
        let timeout = config.publish_timeout.min(MAX_TRANSACTION);
        let mut settings = client::settings(
            config,
            &[
                ("transactional.id", id),
                ("linger.ms", "0"),
                ("compression.type", config.compression.as_str()),
                ("message.timeout.ms", &millis(timeout)),
                ("transaction.timeout.ms", &millis(self.open())),
                ("topic.metadata.propagation.max.ms", client::PROPAGATION_MILLIS),
                ("partitioner", "murmur2_random"),
            ],
        );
        client::hand_on(&mut settings, config, Role::Producer);
        let health = Arc::clone(self.admin.health());
        let context = Outcomes { outcomes: Arc::clone(&self.outcomes), health: Arc::clone(&health) };
        let client = Client::from_config_and_context(&settings, context).map_err(|error| client::not_made(&error))?;
        let begun = self.patiently(config.publish_timeout, || client.init_transactions(config.connect_timeout));
        begun.map_err(|error| health.explain(error::failed("begin with transactions", &error)))?;
        Ok(client)
    }
}

fn may_be_retried(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.is_retriable())
}

#[cfg(test)]
mod tests {
    use broker_core::BrokerUrl;
    use rdkafka::bindings::rd_kafka_test_fatal_error;
    use rdkafka::mocking::MockCluster;
    use rdkafka::types::RDKafkaRespErr;

    use super::*;

    #[test]
    #[allow(unsafe_code, reason = "nothing that a server does ends a client that has nothing to do")]
    fn a_client_that_ended_while_idle_fails_no_transaction() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("orders", 1, 1).unwrap();
        let url = format!("kafka://{}?transactional_id=idle", cluster.bootstrap_servers());
        let config = Arc::new(KafkaConfig::from_url(BrokerUrl::parse(&url).unwrap()).unwrap());
        let admin = Arc::new(Admin::new(Arc::clone(&config)));
        let mut session = Session::new(&config, &admin);
        let (topic, message) = (Topic::new("orders").unwrap(), Message::new("1"));
        for round in 0..3 {
            let placed = session.transact(&[(&topic, &message), (&topic, &message)], &[]);
            assert_eq!(placed.map_err(Aborted::first).unwrap().len(), 2, "{round}");
            let idle = session.client.as_ref().unwrap().client();
            let code = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
            // SAFETY: the client lives, and the reason is a string that ends; librdkafka copies it.
            unsafe { rd_kafka_test_fatal_error(idle.native_ptr(), code, c"a test".as_ptr()) };
            assert!(idle.fatal_error().is_some());
        }
    }
}
