//! A group: its members, what it holds outside the log, and how deliveries are settled.
//!
//! A subscription without group is a group with one member and no name.

mod expiry;
mod members;
mod settlement;
mod state;

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;

use super::Shared;
use super::entry::{Entry, Place, Queued};
use super::lanes::Lanes;
use super::log::{Log, Parts};
use super::tally::{Asked, Sum};
use crate::{Counts, DeadLetter, Error, Group as GroupId, GroupSettings, Timestamp, TopicFilter};

pub(super) use self::expiry::take_expired;
pub(super) use self::members::Received;
pub(super) use self::settlement::Roused;
use self::state::{After, Change, State};

pub(super) struct Group {
    /// `None` for a subscription without group.
    pub(super) id: Option<GroupId>,
    /// Messages of one key one at a time; fixed, unlike the other settings.
    pub(super) ordered: bool,
    shared: Arc<Shared>,
    log: Arc<Log>,
    /// The group's place among the readers of the log; set right after it was made.
    reader: OnceLock<usize>,
    /// Whether somebody waits for settlements, so that a batch must tell each.
    asked: Asked,
    state: Mutex<State>,
}

/// What a group is doing, for its status.
pub(super) struct Snapshot {
    pub(super) lag: Sum,
    pub(super) in_flight: u64,
    pub(super) members: u64,
    pub(super) counts: Counts,
    pub(super) last_error: Option<Arc<str>>,
}

impl Group {
    /// A group that reads `log` from its tail on, and `replay` before.
    pub(super) fn new(shared: &Arc<Shared>, id: Option<GroupId>, settings: GroupSettings, log: &Arc<Log>) -> Arc<Self> {
        let backlog = settings.backlog;
        let group = Arc::new(Self {
            id,
            ordered: settings.ordered,
            shared: Arc::clone(shared),
            log: Arc::clone(log),
            reader: OnceLock::new(),
            // An ordered group needs each settlement, to let the next of the key go.
            asked: Asked::new(settings.ordered),
            state: Mutex::new(State {
                settings,
                ready: VecDeque::new(),
                due: VecDeque::new(),
                timer: None,
                timekeeper: None,
                untold: false,
                lanes: Lanes::default(),
                expiry: None,
                look_from: None,
                story: None,
                members: Vec::new(),
                last_member: 0,
                open: Slab::new(),
                in_flight: 0,
                counts: Counts::default(),
                lost: 0,
                missing: None,
                gap: None,
                last_error: None,
                deleted: false,
            }),
        });
        let mut log = log.lock();
        let reader = log.add_reader(Arc::clone(&group), backlog);
        drop(log);
        let fresh = group.reader.set(reader).is_ok();
        debug_assert!(fresh);
        group
    }

    fn reader(&self) -> usize {
        // Between making the group and setting this, nobody else has the group but the log, which
        // asks for it by its own key.
        self.reader.get().copied().unwrap_or(usize::MAX)
    }

    pub(super) fn filter(&self) -> &TopicFilter {
        &self.log.filter
    }

    pub(super) fn settings(&self) -> GroupSettings {
        self.state.lock().settings.clone()
    }

    /// Gives a new group what topics retain: `past` may repeat what was appended since the group
    /// stands, and belongs between. All of it is put in order; what is appended from here on has later
    /// places. Up to `missing` the past lacks messages; members that have read so far are told.
    pub(super) fn replay(&self, past: Vec<Arc<Entry>>, missing: Option<Place>) {
        let mut state = self.state.lock();
        let mut change = Change::default();
        let mut entries = self.take_all();
        let appended: HashSet<*const Entry> = entries.iter().map(Arc::as_ptr).collect();
        for entry in past.into_iter().filter(|entry| !appended.contains(&Arc::as_ptr(entry))) {
            change.add(entry.size());
            entries.push(entry);
        }
        entries.sort_by_key(|entry| entry.place());
        // Who has nothing from before begins after it.
        state.missing = missing.filter(|_| entries.first().is_some_and(|first| first.place() <= missing));
        let now = self.shared.clock.tick();
        for entry in entries {
            // In its place already, if it is due.
            let due = entry.place().is_none_or(|place| place.tick <= now);
            match self.in_turn(&mut state, Queued::new(entry)) {
                Some(queued) if due => state.ready.push_back(queued),
                Some(queued) => self.dispatch(&mut state, queued),
                None => {}
            }
        }
        let mut after = After::default();
        self.apply(change, &mut after);
        self.finish(state, after);
    }

    /// Takes everything before the group from the log.
    fn take_all(&self) -> Vec<Arc<Entry>> {
        let mut log = self.log.lock();
        let mut entries = Vec::new();
        loop {
            let mut parts = Parts::new();
            if log.take(self.reader(), usize::MAX, &mut parts) == 0 {
                return entries;
            }
            for part in parts {
                entries.extend((part.start..part.start + part.len).filter_map(|slot| part.segment.share(slot)));
            }
        }
    }

    /// Changes the settings, all but where it started.
    pub(super) fn alter(&self, settings: GroupSettings) {
        let mut state = self.state.lock();
        let resume = self.log.lock().set_backlog(self.reader(), settings.backlog);
        let after = After { resume, ..After::default() };
        state.settings = settings;
        self.finish(state, after);
    }

    /// Ends the group: its members end, what it holds is forgotten. Tells whether the log has no
    /// reader left.
    pub(super) fn delete(&self) -> bool {
        let mut state = self.state.lock();
        state.deleted = true;
        state.ready.clear();
        state.due.clear();
        state.timer = None;
        state.lanes.purge();
        state.open.clear();
        let mut after = After::default();
        after.wakers.extend(state.members.iter_mut().filter_map(|member| member.waker.take()));
        let (last, resume) = self.log.lock().remove_reader(self.reader());
        after.resume = resume;
        self.finish(state, after);
        last
    }

    /// Drops what is not in flight; tells how many messages.
    pub(super) fn purge(&self) -> u64 {
        let mut state = self.state.lock();
        let mut after = After::default();
        self.collect_all(&mut state, &mut after);
        let mut log = self.log.lock();
        while log.pass(self.reader(), usize::MAX).is_some() {}
        let held = log.held_by(self.reader());
        let kept: Sum = state.in_flight_sum();
        let purged = Sum { messages: held.messages - kept.messages, bytes: held.bytes - kept.bytes };
        drop(log);
        state.ready.clear();
        state.due.clear();
        state.timer = None;
        state.lanes.purge();
        let mut change = Change::default();
        change.remove(purged);
        self.apply(change, &mut after);
        self.finish(state, after);
        purged.messages
    }

    /// Gives the group messages anew: its own dead letters.
    pub(super) fn redrive(&self, letters: impl Iterator<Item = DeadLetter>) {
        let mut state = self.state.lock();
        let mut change = Change::default();
        let mut after = After::default();
        for letter in letters {
            let entry = Entry::new(letter.topic, letter.message);
            change.add(entry.size());
            self.arrive(&mut state, Queued::new(entry));
        }
        self.apply(change, &mut after);
        state.wake_one(&mut after);
        self.finish(state, after);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut state = self.state.lock();
        let mut after = After::default();
        let now = Timestamp::now();
        self.collect_all(&mut state, &mut after);
        self.expire_all(&mut state, now, &mut after);
        let mut log = self.log.lock();
        log.expire(now);
        after.resume.append(&mut log.take_resumed());
        let (unread, held) = (log.unread(self.reader()), log.held_by(self.reader()));
        let (dropped, expired) = (log.dropped(self.reader()), log.expired(self.reader()));
        drop(log);
        let counts = Counts { dropped, expired: state.counts.expired + expired, ..state.counts };
        let snapshot = Snapshot {
            lag: Sum { messages: unread.messages + held.messages, bytes: unread.bytes + held.bytes },
            in_flight: state.in_flight,
            members: state.members.len() as u64,
            counts,
            last_error: state.last_error.clone(),
        };
        self.finish(state, after);
        snapshot
    }

    /// Whether `close` need not wait for it: nothing in flight, and nothing a member could receive.
    pub(super) fn is_drained(&self) -> bool {
        let mut state = self.state.lock();
        let mut after = After::default();
        self.collect_all(&mut state, &mut after);
        state.fire(self.shared.clock.tick());
        let unread = self.log.lock().unread(self.reader()).messages;
        let deliverable = !state.members.is_empty() && (unread > 0 || !state.ready.is_empty() || !state.due.is_empty());
        let drained = state.in_flight == 0 && !deliverable;
        self.finish(state, after);
        drained
    }

    /// The broker has closed: members end.
    pub(super) fn end(&self) {
        self.tell_settlements();
        let wakers: Vec<Waker> =
            self.state.lock().members.iter_mut().filter_map(|member| member.waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// What a publish at the bound answers.
    pub(super) fn full(&self) -> Error {
        let name =
            self.id.as_ref().map_or_else(|| format!("a subscription to {}", self.filter()), |id| format!("group {id}"));
        Error::unavailable(format!(
            "{name} is at its backlog's bound and rejects more: try again when it has caught up"
        ))
        .with_retry_after(Duration::from_secs(1))
    }
}
