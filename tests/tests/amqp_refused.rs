//! What RabbitMQ refuses, and how it is told: connections, with what to do about them, and members beyond what a
//! connection holds.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod amqp_server;

use std::time::Duration;

use amqp_server::{TURN, address, ctl, open, ours, printed, server};
use broker_core::{Broker, BrokerExt, ErrorKind, Message, Subscribe, Topic};

const PATIENCE: Duration = Duration::from_secs(10);

/// A name nobody else uses.
fn unique(name: &str) -> String {
    format!("{name}-{:08x}", fastrand::u32(..))
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Why a connection is refused, and what to do about it; of the password nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_says_what_to_do() {
    let _turn = TURN.lock().await;
    let (Some(tls), Some(folder)) = (printed("AMQP_TLS_ADDRESS"), printed("AMQP_TLS")) else {
        println!("no control: neither users nor certificates of the server at AMQP_URL are known");
        return;
    };
    let (plain, user, full) = (address(), unique("stranger"), unique("full"));
    ctl(&["add_user", &user, "sesame"]);
    ctl(&["add_vhost", &full]);
    ctl(&["set_permissions", "-p", &full, &user, ".*", ".*", ".*"]);
    ctl(&["set_vhost_limits", "-p", &full, r#"{"max-connections": 0}"#]);
    let outcomes = [
        (format!("amqp://{user}:sesame@{plain}/absent"), ErrorKind::NotFound, "add_vhost 'absent'"),
        (format!("amqp://{user}:sesame@{plain}"), ErrorKind::Unauthorized, "set_permissions -p '/'"),
        (format!("amqp://{user}:sesame@{plain}/{full}"), ErrorKind::Unavailable, "set_vhost_limits"),
        (format!("amqp://{user}:open-sesame@{plain}"), ErrorKind::Unauthorized, "change_password"),
        (format!("amqps://{user}:sesame@{plain}"), ErrorKind::Unavailable, "speaks no TLS"),
        (format!("amqps://{user}:sesame@{tls}"), ErrorKind::Unavailable, "ca=FILE"),
        (format!("amqps://{user}:sesame@{tls}?ca={folder}/client.pem"), ErrorKind::Unavailable, "ca=FILE"),
        (format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem"), ErrorKind::Unavailable, "cert=FILE"),
        (
            format!("amqps://{user}:sesame@{tls}?ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/server.key"),
            ErrorKind::Unavailable,
            "key=FILE",
        ),
    ]
    .map(async |(url, kind, advice)| {
        let broker = open(&url).unwrap();
        let error = within("connecting", broker.connect()).await.unwrap_err();
        broker.close(PATIENCE).await;
        (url, error, kind, advice)
    });
    let outcomes = futures_util::future::join_all(outcomes).await;
    ctl(&["delete_user", &user]);
    ctl(&["delete_vhost", &full]);
    for (url, error, kind, advice) in outcomes {
        assert_eq!(error.kind(), kind, "{url}: {error}");
        assert!(error.message().contains(advice), "{url}: {error}");
        assert!(!format!("{error:?} {error}").contains("sesame"), "{url}: {error:?}");
    }
}

/// A connection has so many channels, and each member one: beyond them it says so, and there is room again when one leaves.
#[tokio::test(flavor = "multi_thread")]
async fn members_beyond_the_channels_of_a_connection_are_refused() {
    let _turn = TURN.lock().await;
    if !ours() {
        println!("no control: channel_max");
        return;
    }
    let topic = Topic::new(format!("suite.{}", unique("crowd"))).unwrap();
    ctl(&["eval", "application:set_env(rabbit, channel_max, 12)."]);
    let broker = open(server()).unwrap();
    let mut members = Vec::new();
    while members.len() < 12 {
        members.push(broker.subscribe(&(&topic).into(), Subscribe::new()).await.unwrap());
    }
    let refused = broker.subscribe(&(&topic).into(), Subscribe::new()).await.map(drop);
    ctl(&["eval", "application:set_env(rabbit, channel_max, 2047)."]);
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.message().contains("channel_max"), "{error}");
    broker.publish(&topic, Message::new("x")).await.unwrap();
    let left = members.pop().unwrap();
    for member in &mut members {
        within("receiving", member.next()).await.unwrap().unwrap().ack().await.unwrap();
    }
    within("leaving", left.close()).await.unwrap();
    // Its channel is closed a moment later.
    let again = async {
        loop {
            match broker.subscribe(&(&topic).into(), Subscribe::new()).await {
                Ok(member) => return member,
                Err(error) => assert!(error.message().contains("channel_max"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    members.push(within("joining", again).await);
    assert!(broker.close(PATIENCE).await.complete);
}
