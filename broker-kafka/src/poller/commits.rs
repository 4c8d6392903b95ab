//! What the server is told of how far the group is.

use std::time::Instant;

use broker_core::{Error, ErrorKind, Result};
use rdkafka::TopicPartitionList;
use rdkafka::consumer::{CommitMode, Consumer as _};

use super::Poller;
use crate::admin::Partition;
use crate::committer::Answer;
use crate::progress::Progress;
use crate::state::Place;
use crate::stored::Stored;
use crate::{error, group};

impl Poller {
    pub(super) fn commit(&mut self) {
        if self.member.group.is_none() {
            return;
        }
        self.hear_answers();
        let now = Instant::now();
        if now < self.next_commit {
            return;
        }
        self.next_commit = now + self.admin.config().commit_interval;
        let (commits, held_back) = self.member.state(|state| (state.commits(), state.is_held_back()));
        self.held_back = held_back;
        if commits.is_empty() {
            return;
        }
        let partitions = carried(&commits);
        match self.commit_list(&commits) {
            Ok(list) => self.committer.commit(partitions, list),
            Err(error) => {
                self.member.state(|state| state.answered(&partitions));
                self.not_committed(&partitions, error);
            }
        }
    }

    fn hear_answers(&mut self) {
        let answers: Vec<Answer> = self.committer.answers().collect();
        if self.held_back && !answers.is_empty() {
            self.next_commit = Instant::now();
        }
        for Answer { partitions, result } in answers {
            self.member.state(|state| state.answered(&partitions));
            match result {
                Ok(()) => self.admin.health().recovered(),
                Err(error) => self.not_committed(&partitions, error),
            }
        }
    }

    /// Commits for the last time, and waits until the server has it; false if it may have it a moment later, and who
    /// tries again unseals what is to be in it. Until `patience` it waits for what was sent in the background.
    pub(super) fn commit_now(&mut self, places: Option<&[Place]>, patience: Instant) -> bool {
        if self.member.group.is_none() {
            return true;
        }
        self.hear_answers();
        if Instant::now() < patience && self.member.state(|state| state.is_committing(places)) {
            return false;
        }
        let commits = self.member.state(|state| state.last_commits(places));
        if commits.is_empty() {
            return true;
        }
        let sent = self.commit_list(&commits).and_then(|list| {
            self.consumer.commit(&list, CommitMode::Sync).map_err(|error| error::failed("commit", &error))
        });
        let Err(error) = sent else { return true };
        let passing = error.kind() == ErrorKind::Unavailable;
        self.not_committed(&carried(&commits), error);
        !passing
    }

    fn commit_list(&self, commits: &[(Partition, Progress)]) -> Result<TopicPartitionList> {
        group::commit_list(&Stored::new(&self.member.entry.settings()), commits)
    }

    /// The server has not taken a commit of these: it is to be said again.
    fn not_committed(&self, partitions: &[Partition], error: Error) {
        self.member.state(|state| state.not_committed(partitions));
        self.report_error(Err(error));
    }
}

fn carried(commits: &[(Partition, Progress)]) -> Vec<Partition> {
    commits.iter().map(|(partition, _)| partition.clone()).collect()
}
