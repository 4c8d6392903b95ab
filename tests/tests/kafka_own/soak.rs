//! A million messages while members come, leave and are killed, and the server restarts twice: the history of
//! every delivery and ack is taken down, and checked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Instant;

use broker_core::Broker as _;
use parking_lot::Mutex;

use super::*;

/// On threads of the test's own, and no runtime's.
#[allow(clippy::disallowed_methods)]
fn rest(duration: Duration) {
    std::thread::sleep(duration);
}

const MESSAGES: usize = 1_000_000;
const BATCH: usize = 1_000;
const PARTITIONS: usize = 12;
const MEMBERS: usize = 4;

/// What a member holds at most: `kafka-member` asks for it.
const IN_FLIGHT: usize = 300;
/// Set in the URL.
const SESSION: Duration = Duration::from_secs(6);
/// The adapter's defaults: `commit_interval`, and how soon a member hears of a rebalance (`heartbeat.interval.ms`).
const COMMIT: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_millis(500);

/// How old acks may be at most that no commit has taken: what a member commits is in its last commit or younger, and
/// the server answers no commit while it holds back its answer to joining or syncing.
///
/// - an ack waits for the next commit: `COMMIT`;
/// - a member joins within a `HEARTBEAT` of the others, and waits for whoever was killed before it could join, too:
///   `HEARTBEAT` + `SESSION`;
/// - then it waits for the assignment, which the leader makes; one that was killed meanwhile is missed after `SESSION`.
///
/// A member that is given partitions commits at once, so that one rebalance after another adds nothing. Only one whose
/// leader was killed ends without that, and two of these in a row are not counted.
const UNCOMMITTED: Duration = COMMIT.saturating_add(HEARTBEAT).saturating_add(SESSION).saturating_add(SESSION);

/// What happened to one message.
#[derive(Clone, Default)]
struct Fate {
    delivered: u32,
    /// The member that acked it, and when.
    acked: Option<(usize, Duration)>,
}

/// A message that came again though it had been acked.
#[derive(Debug)]
struct Again {
    number: usize,
    acked_by: usize,
    acked_at: Duration,
    at: Duration,
}

#[derive(Default)]
struct History {
    fates: Vec<Fate>,
    acked: usize,
    again: Vec<Again>,
    /// When each member acked last.
    last_acks: BTreeMap<usize, Duration>,
    strange: Vec<String>,
}

impl History {
    fn take_down(&mut self, member: usize, line: &str, now: Duration) {
        let parsed = line.split_once(' ').and_then(|(what, number)| Some((what, number.parse::<usize>().ok()?)));
        let Some((what, number)) = parsed.filter(|(_, number)| *number < self.fates.len()) else {
            self.strange.push(line.to_owned());
            return;
        };
        let fate = &mut self.fates[number];
        if what == "d" {
            fate.delivered += 1;
            if let Some((acked_by, acked_at)) = fate.acked {
                self.again.push(Again { number, acked_by, acked_at, at: now });
            }
        } else {
            self.last_acks.insert(member, now);
            if fate.acked.replace((member, now)).is_none() {
                self.acked += 1;
            }
        }
    }
}

struct Member {
    number: usize,
    process: Child,
    reader: JoinHandle<()>,
}

impl Member {
    fn start(number: usize, url: &str, group: &Group, history: &Arc<Mutex<History>>, began: Instant) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_kafka-member"))
            .args([url, &group.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the member's program");
        let out = BufReader::new(process.stdout.take().expect("it is piped"));
        let history = Arc::clone(history);
        let reader = std::thread::spawn(move || {
            // The last line of a process that was killed may be cut.
            for line in out.lines().map_while(|line| line.ok()) {
                history.lock().take_down(number, &line, began.elapsed());
            }
        });
        Self { number, process, reader }
    }

    /// As a crash would.
    fn kill(mut self) {
        self.process.kill().expect("it is ours");
        self.process.wait().expect("it has ended");
        self.reader.join().expect("the reader");
    }

    fn leave(mut self) {
        drop(self.process.stdin.take());
        let status = self.process.wait().expect("it ends");
        assert!(status.success(), "member {}: {status}", self.number);
        self.reader.join().expect("the reader");
    }
}

#[test]
#[ignore = "long: a million messages, some three minutes, and it restarts the server"]
fn a_million_messages_survive_kills_and_restarts() {
    assert!(server().ours, "the server that KAFKA_URL names is not ours to restart");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let unique = format!("{:x}", fastrand::u64(..));
    let url = format!("{}?partitions={PARTITIONS}&librdkafka.session.timeout.ms={}", server().url, SESSION.as_millis());
    let topic = Topic::new(format!("soak.{unique}")).unwrap();
    let group: Group = format!("soak-{unique}@{topic}").parse().unwrap();
    let publisher = KafkaBroker::new(
        KafkaConfig::from_url(broker_core::BrokerUrl::parse(&format!("{url}&publish_timeout=2m")).unwrap()).unwrap(),
    );
    runtime.block_on(publisher.create_group(&group, GroupOptions::new())).unwrap();
    let history = Arc::new(Mutex::new(History { fates: vec![Fate::default(); MESSAGES], ..History::default() }));
    let began = Instant::now();

    // The load: 10,000 a second.
    let publishing = {
        let publish = publisher.publisher(&topic, broker_core::PublisherOptions::new()).unwrap();
        runtime.spawn(async move {
            for from in (0..MESSAGES).step_by(BATCH) {
                let number = |n: usize| Message::new(n.to_string()).with_key(n.to_string());
                let batch = publish.publish_batch((from..from + BATCH).map(number).collect()).await.unwrap();
                batch.into_iter().for_each(|result| drop(result.unwrap()));
                tokio::time::sleep_until((began + Duration::from_millis((from / 10) as u64)).into()).await;
            }
        })
    };
    // Two restarts, on a thread of their own: the members and the load go on meanwhile.
    let restarts = std::thread::spawn(move || {
        let mut restarts = Vec::new();
        for after in [30, 70] {
            rest(Duration::from_secs(after).saturating_sub(began.elapsed()));
            let from = began.elapsed();
            kafka_server::run(&["restart", &server().url]).unwrap();
            restarts.push((from, began.elapsed()));
        }
        restarts
    });

    // Every two seconds one goes, by its own will or not, and another comes.
    let mut members = Vec::new();
    let (mut next, mut kills, mut left) = (0, Vec::new(), Vec::new());
    while history.lock().acked < MESSAGES {
        assert!(began.elapsed() < Duration::from_secs(900), "{} are acked after 15 min", history.lock().acked);
        while members.len() < MEMBERS {
            members.push(Member::start(next, &url, &group, &history, began));
            next += 1;
        }
        rest(Duration::from_secs(2));
        // After the load the rest is to be done by members that stay for a while.
        let settled = publishing.is_finished() && fastrand::u8(..4) > 0;
        if !settled {
            let member = members.swap_remove(fastrand::usize(..members.len()));
            if fastrand::bool() {
                kills.push((member.number, began.elapsed()));
                member.kill();
            } else {
                left.push((member.number, began.elapsed()));
                member.leave();
            }
        }
    }
    members.into_iter().for_each(Member::leave);
    runtime.block_on(publishing).unwrap();
    let restarts = restarts.join().unwrap();

    let history = history.lock();
    let never = history.fates.iter().filter(|fate| fate.acked.is_none() || fate.delivered == 0).count();
    let twice = history.fates.iter().filter(|fate| fate.delivered > 1).count();
    println!(
        "{MESSAGES} messages in {:?}: {next} members, {} killed, {} left, restarts {restarts:?}; {never} lost, {twice} delivered \
         more than once, {} of them after an ack",
        began.elapsed(),
        kills.len(),
        left.len(),
        history.again.len(),
    );
    println!("killed {kills:?}\nleft {left:?}");
    let end = |ends: &[(usize, Duration)], again: &Again| {
        ends.iter().find(|(member, _)| *member == again.acked_by).map(|(_, at)| *at)
    };
    let mut causes: BTreeMap<(&str, usize), (usize, Duration, Duration, Duration)> = BTreeMap::new();
    for again in &history.again {
        let (cause, age) = match (end(&kills, again), end(&left, again)) {
            (Some(at), _) => ("killed", at.saturating_sub(again.acked_at)),
            (_, Some(at)) => ("left", at.saturating_sub(again.acked_at)),
            _ => ("stayed", again.at.saturating_sub(again.acked_at)),
        };
        let entry =
            causes.entry((cause, again.acked_by)).or_insert((0, Duration::ZERO, again.acked_at, again.acked_at));
        *entry = (entry.0 + 1, entry.1.max(age), entry.2.min(again.acked_at), entry.3.max(again.acked_at));
    }
    for ((cause, member), (count, age, first, last)) in &causes {
        println!(
            "came again: {count} acked by member {member}, which was {cause}; acked at most {age:?} before, from {first:?} to {last:?}"
        );
    }
    assert_eq!(never, 0, "lost");
    assert_eq!(history.strange, Vec::<String>::new());
    // What was acked comes again only if no commit with it was taken: it was acked by a member shortly before it was
    // killed, or around the time that the server was away. Then what was in flight before may be in no commit; after it,
    // a member that cannot join in time learns of that within a session.
    let was_killed = |again: &Again| kills.iter().any(|(member, _)| *member == again.acked_by);
    let is_late = |again: &Again| {
        history.last_acks.get(&again.acked_by).is_some_and(|last| again.acked_at + UNCOMMITTED >= *last)
    };
    let away = |again: &Again| {
        let around = |(from, to): &(Duration, Duration)| {
            again.acked_at + UNCOMMITTED >= *from && again.acked_at <= *to + SESSION
        };
        restarts.iter().any(around)
    };
    let excused = |again: &&Again| (was_killed(again) && is_late(again)) || away(again);
    let by_killed = history.again.iter().filter(|again| was_killed(again)).count();
    println!("acked by members that were killed: {by_killed}; by others: {}", history.again.len() - by_killed);
    let unexcused: Vec<_> = history.again.iter().filter(|again| !excused(again)).collect();
    assert!(
        unexcused.is_empty(),
        "{} came again after an ack, unexcused: {:?}, the first of them {:?}",
        unexcused.len(),
        &unexcused[..unexcused.len().min(10)],
        unexcused.first().map(|again| again.number)
    );
    // What was not acked comes again only where whoever held it was killed, or lost its partitions while the server was
    // away: at most what a member may hold, each time.
    let more: usize = history.fates.iter().map(|fate| fate.delivered.saturating_sub(1) as usize).sum();
    let unacked = more.saturating_sub(history.again.len());
    let in_flight = IN_FLIGHT * (kills.len() + MEMBERS * restarts.len());
    println!("came again without an ack: {unacked}, of at most {in_flight} in flight");
    assert!(unacked <= in_flight, "{unacked} came again without an ack; {in_flight} were in flight at most");
    drop(history);
    assert!(runtime.block_on(publisher.delete_group(&group)).unwrap());
    runtime.block_on(publisher.close(Duration::from_secs(10)));
}
