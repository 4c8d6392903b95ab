//! Commits in the background.
//!
//! What becomes of a commit that it does not wait for, librdkafka tells nobody (rdkafka makes its clients without that
//! callback); and one that the server could not take at once it sends again later, behind what was sent meanwhile, which it
//! then takes back. So a thread of the member's own waits for each, one at a time, and its answer is heard.

use std::sync::Arc;
use std::thread;

use broker_core::{Error, Result};
use crossbeam_channel::{Receiver, Sender};
use rdkafka::TopicPartitionList;
use rdkafka::consumer::{CommitMode, Consumer as _};

use crate::admin::Partition;
use crate::consumer::Client;
use crate::error;

/// The thread ends with this.
pub(crate) struct Committer {
    commits: Sender<(Vec<Partition>, TopicPartitionList)>,
    answers: Receiver<Answer>,
}

/// What became of a commit.
pub(crate) struct Answer {
    /// The partitions it was of.
    pub(crate) partitions: Vec<Partition>,
    pub(crate) result: Result<()>,
}

impl Committer {
    /// `rouse` is sent to when there is an answer.
    pub(crate) fn start(consumer: &Arc<Client>, rouse: Sender<()>) -> Result<Self> {
        let (commits, asked) = crossbeam_channel::unbounded::<(Vec<Partition>, TopicPartitionList)>();
        let (answer, answers) = crossbeam_channel::unbounded();
        let consumer = Arc::clone(consumer);
        let run = move || {
            for (partitions, list) in asked {
                let result = consumer.commit(&list, CommitMode::Sync).map_err(|error| error::failed("commit", &error));
                let _ = answer.send(Answer { partitions, result });
                // Full means that it is roused already.
                let _ = rouse.try_send(());
            }
        };
        let spawned = thread::Builder::new().name("broker-kafka-commit".to_owned()).spawn(run);
        spawned.map_err(|error| Error::backend("start a thread").with_source(error))?;
        Ok(Self { commits, answers })
    }

    /// Sends a commit of `partitions`.
    pub(crate) fn commit(&self, partitions: Vec<Partition>, list: TopicPartitionList) {
        // The thread lives as long as this does.
        let _ = self.commits.send((partitions, list));
    }

    /// The answers that have come.
    pub(crate) fn answers(&self) -> impl Iterator<Item = Answer> {
        self.answers.try_iter()
    }
}
