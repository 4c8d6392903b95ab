//! Who was let in and is refused later: a password that counts no more, a right that is taken away. Both come back.

use std::io::{Read as _, Write as _};

use broker_core::{Broker as _, State, Subscription};
use broker_tests::Proxy;

use super::*;

/// The listener's three ports, and the login; `None` on a server that is not ours.
fn link() -> Option<(String, String, String, String)> {
    let server = server();
    let mut ports = server.values.get("KAFKA_SASL_LINK")?.split(':').map(|port| format!("127.0.0.1:{port}"));
    Some((ports.next()?, ports.next()?, ports.next()?, server.values.get("KAFKA_LOGIN")?.clone()))
}

fn open(address: &str, login: &str, parameters: &str) -> Result<KafkaBroker> {
    let url = format!("kafka://{login}@{address}?partitions=1&metadata_refresh=1s&commit_interval=100ms&{parameters}");
    Ok(KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(&url)?)?))
}

/// A proxy where clients are told to come back to; the one before may just be giving up the port.
async fn stand(told: &str, upstream: &str) -> Proxy {
    for _ in 0..200 {
        if let Ok(proxy) = Proxy::start_at(told, upstream).await {
            return proxy;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{told} cannot be had");
}

/// The status, once the last error of its group says `what`.
async fn told(broker: &KafkaBroker, what: &str) -> Result<broker_core::Status> {
    let mut status = broker.status().await?;
    for _ in 0..300 {
        if status.groups[0].last_error.as_ref().is_some_and(|last| last.contains(what)) {
            return Ok(status);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        status = broker.status().await?;
    }
    panic!("it says nothing of {what}: {status:?}");
}

/// A server of ours that an older `tests/servers` has set up has no such listener either.
fn no_link() -> Result<()> {
    let why = "it has no listener where a password counts no more; `tests/servers down` where it is ours";
    writeln!(std::io::stderr(), "no control: {why}").expect("standard error");
    Ok(())
}

async fn acked(subscription: &mut Subscription, expected: &str) -> Result<()> {
    let delivery = take(subscription, 1).await?.remove(0);
    assert_eq!(payload(&delivery), expected);
    delivery.ack().await
}

/// The connections break, and who comes back is refused, for longer than a first connection may take: subscriptions and
/// publishes wait it out.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_is_refused_for_a_while_ends_nothing() -> Result<()> {
    let Some((told_port, opens, shuts, login)) = link() else {
        return no_link();
    };
    let topic = topic("refused")?;
    let group: Group = format!("refused@{topic}").parse()?;
    let proxy = stand(&told_port, &opens).await;
    let broker = Arc::new(open(&told_port, &login, "connect_timeout=2s&publish_timeout=300s")?);
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let mut alone = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    broker.publish(&topic, Message::new("before")).await?;
    acked(&mut alone, "before").await?;
    let held = take(&mut member, 1).await?.remove(0);

    drop(proxy);
    let proxy = stand(&told_port, &shuts).await;
    let status = told(&broker, "SASL authentication error").await?;
    assert_eq!((status.state, status.groups[0].state), (State::Connecting, State::Connecting));
    let publishing = tokio::spawn({
        let (broker, topic) = (Arc::clone(&broker), topic.clone());
        async move { broker.publish(&topic, Message::new("meanwhile")).await }
    });
    for subscription in [&mut member, &mut alone] {
        assert!(is_quiet_for(subscription, Duration::from_secs(3)).await, "it ended");
    }
    assert!(!publishing.is_finished(), "{:?}", publishing.await);
    held.ack().await?;

    drop(proxy);
    let proxy = stand(&told_port, &opens).await;
    publishing.await.expect("a task")?;
    for subscription in [&mut member, &mut alone] {
        acked(subscription, "meanwhile").await?;
    }
    broker.publish(&topic, Message::new("after")).await?;
    for subscription in [&mut member, &mut alone] {
        acked(subscription, "after").await?;
    }
    let status = broker.status().await?;
    assert_eq!((status.state, status.last_error), (State::Active, None));
    drop((member, alone));
    close(&broker).await;
    assert_eq!(committed(&group, &topic), Some(3));
    drop(proxy);
    Ok(())
}

/// What somebody may do, and so nobody else: of a topic or group of which nothing is said everybody may do everything.
struct Right<'a> {
    /// Kafka's numbers: 2 is a topic, 3 a group.
    kind: u8,
    name: &'a str,
    principal: &'a str,
    /// 4 is to write, and to be told of.
    operation: u8,
}

impl Right<'_> {
    /// From now on it counts. The clients that we have know no such request ("Kafka protocol guide", CreateAcls).
    fn give(&self) {
        self.ask(30);
    }

    /// Everybody may do everything (DeleteAcls).
    fn take_back(&self) {
        self.ask(31);
    }

    fn ask(&self, request: u16) {
        let (text, literal, allow) =
            (|text: &str| [&(text.len() as u16).to_be_bytes()[..], text.as_bytes()].concat(), 3, 3);
        let (version, number, one) = ([0, 1], [0, 0, 0, 7], [0, 0, 0, 1]);
        let head = [&request.to_be_bytes()[..], &version, &number, &text("suite"), &one].concat();
        let what = [&[self.kind][..], &text(self.name), &[literal], &text(self.principal), &text("*")].concat();
        let asked = [head, what, vec![self.operation, allow]].concat();
        let mut stream = std::net::TcpStream::connect(server().url.trim_start_matches("kafka://")).unwrap();
        stream.write_all(&[&(asked.len() as u32).to_be_bytes()[..], &asked].concat()).unwrap();
        let mut answer = [0; 4 + 4 + 4 + 4 + 2];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0, 0, 0, 1, 0, 0], "one answer, without an error");
    }
}

/// The right to read a topic is taken away and given back: whoever read before reads on, and has lost nothing. Who begins
/// while it is missing is told so.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_for_a_while_ends_nothing() -> Result<()> {
    let (Some((.., login)), Some(address)) = (link(), server().values.get("KAFKA_SASL")) else {
        return no_link();
    };
    let user = format!("User:{}", login.split(':').next().unwrap());
    let other = broker("")?;
    // To hear of the topic is left, or not even that.
    for principal in [user.as_str(), "User:nobody"] {
        let topic = topic("right")?;
        let group: Group = format!("right@{topic}").parse()?;
        let broker = open(address, &login, "connect_timeout=60s")?;
        let mut member = join(&broker, &group, GroupOptions::new()).await?;
        other.publish(&topic, Message::new("before")).await?;
        acked(&mut member, "before").await?;
        while committed(&group, &topic) != Some(1) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }

        let right = Right { kind: 2, name: topic.as_str(), principal, operation: 4 };
        right.give();
        if principal == user {
            told(&broker, "authorization failed").await?;
            let late = async {
                let mut late = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
                late.next().await.map(drop)
            };
            let error = tokio::time::timeout(Duration::from_secs(30), late).await.expect("an end").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        } else {
            tokio::time::sleep(Duration::from_secs(3)).await;
            // What it is not told is not known, and the rest is.
            let status = broker.status().await?;
            assert_eq!((status.state, status.groups[0].lag), (State::Active, None), "{status:?}");
            assert!(status.last_error.as_ref().is_some_and(|last| last.contains("authorization failed")), "{status:?}");
        }
        other.publish(&topic, Message::new("meanwhile")).await?;
        assert!(is_quiet_for(&mut member, Duration::from_secs(3)).await, "{principal}: it ended, or reads on");

        right.take_back();
        acked(&mut member, "meanwhile").await?;
        broker.publish(&topic, Message::new("after")).await?;
        acked(&mut member, "after").await?;
        close(&broker).await;
        assert_eq!(committed(&group, &topic), Some(3), "{principal}");
        other.delete_group(&group).await?;
    }
    close(&other).await;
    Ok(())
}

/// The same of the group: what is settled meanwhile is committed when it may be.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_to_a_group_that_is_taken_away_for_a_while_loses_no_ack() -> Result<()> {
    let (Some((.., login)), Some(address)) = (link(), server().values.get("KAFKA_SASL")) else {
        return no_link();
    };
    let (other, topic) = (broker("")?, topic("right")?);
    let group: Group = format!("right@{topic}").parse()?;
    let broker = open(address, &login, "connect_timeout=2s")?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    other.publish(&topic, Message::new("before")).await?;
    acked(&mut member, "before").await?;
    while committed(&group, &topic) != Some(1) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let name = group.to_string();
    let right = Right { kind: 3, name: &name, principal: "User:nobody", operation: 3 };
    right.give();
    other.publish(&topic, Message::new("meanwhile")).await?;
    acked(&mut member, "meanwhile").await?;
    told(&broker, "authorization failed").await?;
    right.take_back();
    other.publish(&topic, Message::new("after")).await?;
    acked(&mut member, "after").await?;
    close(&broker).await;
    assert_eq!(committed(&group, &topic), Some(3));
    other.delete_group(&group).await?;
    close(&other).await;
    Ok(())
}
