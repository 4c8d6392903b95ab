//! How a member goes: what is settled is committed, and the group is left.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer as _;
use rdkafka::types::RDKafkaRespErr;

use super::{Poller, REBALANCE};
use crate::consumer::{assign, unassign};

impl Poller {
    /// Takes part in a rebalance that is under way. To go in the middle of one would cost the others a
    /// session timeout: the server reads no goodbye while it holds back its answer to our joining.
    fn await_rebalance(&mut self) {
        let Some(group) = &self.member.group else { return };
        let id = self.admin.config().group_id(group);
        let deadline = Instant::now() + REBALANCE;
        while Instant::now() < deadline && matches!(self.admin.is_stable(&id), Ok(false)) {
            self.serve_events();
            self.finish_leaving();
            let _ = self.roused.recv_timeout(Duration::from_millis(20));
        }
    }

    pub(super) fn leave(mut self) {
        self.await_rebalance();
        self.member.state(|state| self.queues.iter().for_each(|(place, _)| state.let_go(*place)));
        // Acks of before are committed whatever comes after; between two generations the group takes no
        // commit, and what comes next in its rebalance is for this thread to do.
        let deadline = Instant::now() + REBALANCE;
        while !self.commit_now(None, deadline) && Instant::now() < deadline && !self.consumer.assignment_lost() {
            self.member.state(|state| state.unseal(None));
            self.serve_events();
            self.finish_leaving();
            let _ = self.roused.recv_timeout(Duration::from_millis(20));
        }
        self.queues.clear();
        for leaving in std::mem::take(&mut self.leaving) {
            self.report(unassign(&self.consumer, &leaving.partitions));
        }
        for partitions in std::mem::take(&mut self.assigning) {
            self.report(assign(&self.consumer, &partitions));
        }
        self.consumer.context().closing.store(true, Ordering::Release);
        for (what, partitions) in std::mem::take(&mut *self.consumer.context().rebalances.lock()) {
            self.report(match what {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => assign(&self.consumer, &partitions),
                _ => unassign(&self.consumer, &partitions),
            });
        }
        self.unsubscribe();
        let Self { member, consumer, committer, .. } = self;
        drop(committer);
        // Ending a client may take long, or forever; whoever waits for this member does not wait for that.
        let (ended, end) = crossbeam_channel::bounded(1);
        let ending = move || {
            drop(consumer);
            let _ = ended.send(());
        };
        if thread::Builder::new().name("broker-kafka-end".to_owned()).spawn(ending).is_ok() {
            let _ = end.recv_timeout(REBALANCE);
        }
        member.finish();
    }

    /// Leaves the group while the client is as alive as ever: where partitions are taken from one that is being
    /// closed, librdkafka has been seen to wait for itself forever, still a member, its partitions nobody's.
    fn unsubscribe(&self) {
        // A static member does not leave: it is to come back.
        if self.member.group.is_none() || self.admin.config().instance_id.is_some() {
            return;
        }
        self.consumer.unsubscribe();
        let deadline = Instant::now() + REBALANCE;
        while Instant::now() < deadline {
            // Partitions that are taken are let go in the callback.
            let _ = self.consumer.poll(Duration::from_millis(5));
            if self.consumer.assignment().is_ok_and(|assignment| assignment.count() == 0) {
                break;
            }
        }
    }
}
