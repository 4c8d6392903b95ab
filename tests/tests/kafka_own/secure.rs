//! Connections that stand and such that do not: TLS and SASL, on the listeners of the test's own server that want them.

use broker_core::Broker as _;
use broker_tests::{Fault, Proxy};

use super::*;

/// A URL of one of those listeners; `None` on a server that is not ours.
fn url(listener: &str, login: Option<&str>, parameters: &str) -> Option<String> {
    let server = server();
    let address = server.values.get(listener)?;
    let login = login.map(|login| format!("{login}@")).unwrap_or_default();
    let ca = server.values.get("KAFKA_CA")?;
    Some(format!("kafka://{login}{address}?partitions=1&connect_timeout=5s&{}", parameters.replace("CA", ca)))
}

fn open(url: &str) -> Result<KafkaBroker> {
    Ok(KafkaBroker::new(KafkaConfig::from_url(broker_core::BrokerUrl::parse(url)?)?))
}

/// A message there and back, with a group and a topic that is made.
async fn works(url: &str) -> Result<()> {
    let (broker, topic) = (open(url)?, topic("secure")?);
    broker.connect().await?;
    let group: Group = format!("secure@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&topic, Message::new("sealed")).await?;
    let delivery = take(&mut member, 1).await?.remove(0);
    assert_eq!(payload(&delivery), "sealed");
    delivery.ack().await?;
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_passwords_work() -> Result<()> {
    let Some(login) = server().values.get("KAFKA_LOGIN").map(String::as_str) else {
        return no_control("it has no listeners for TLS and SASL that we know of");
    };
    for (listener, login, parameters) in [
        ("KAFKA_TLS", None, "security=ssl&ca=CA"),
        ("KAFKA_SASL", Some(login), ""),
        ("KAFKA_SASL", Some(login), "sasl=scram-sha-256"),
        ("KAFKA_SASL_TLS", Some(login), "security=ssl&ca=CA&sasl=plain"),
        ("KAFKA_SASL_TLS", Some(login), "security=ssl&ca=CA&sasl=scram-sha-512"),
    ] {
        let url = url(listener, login, parameters).expect("a server of ours has every listener");
        works(&url).await.map_err(|error| error.context(format_args!("{listener} {parameters}")))?;
    }
    Ok(())
}

/// How a broker of this URL fails, by what it does first; no more than a minute is waited for it.
async fn failures(url: &str) -> Result<Vec<(&'static str, broker_core::Error)>> {
    let whats = ["connect", "publish", "subscribe", "create a group", "publish in a transaction"];
    let failures = whats.map(|what| async move { failure(url, what).await.map(|error| (what, error)) });
    futures_util::future::try_join_all(failures).await
}

async fn failure(url: &str, what: &str) -> Result<broker_core::Error> {
    let transactions = if what.ends_with("transaction") { "&transactional_id=refused" } else { "" };
    let (broker, topic) = (open(&format!("{url}{transactions}"))?, topic("refused")?);
    let group: Group = format!("refused@{topic}").parse()?;
    let failing = async {
        match what {
            "connect" => broker.connect().await,
            "subscribe" => broker.subscribe(&(&topic).into(), Subscribe::new()).await.map(drop),
            "create a group" => broker.create_group(&group, GroupOptions::new()).await.map(drop),
            _ => broker.publish(&topic, Message::new("1")).await.map(drop),
        }
    };
    let failed = tokio::time::timeout(Duration::from_secs(60), failing).await;
    let error = failed.unwrap_or_else(|_| panic!("{what}: it waits")).unwrap_err();
    let status = broker.status().await?;
    assert_eq!(status.state, broker_core::State::Connecting, "{what}");
    let last = status.last_error.expect("an error");
    assert!(!last.contains("hunter2") && !last.contains("AllBrokersDown"), "{what}: {last}");
    broker.close(Duration::from_secs(1)).await;
    Ok(error)
}

/// Who is not let in is told so, and why, long before a connection is given up; no password is repeated.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_is_told_why_without_waiting() -> Result<()> {
    let Some(login) = server().values.get("KAFKA_LOGIN").map(String::as_str) else {
        return no_control("it has no listeners for TLS and SASL that we know of");
    };
    let password = "check the user and the password";
    for (listener, login, parameters, why) in [
        ("KAFKA_SASL", Some("suite:hunter2"), "", password),
        ("KAFKA_SASL", Some("suite:hunter2"), "sasl=scram-sha-256", password),
        // Signed by nobody we trust.
        ("KAFKA_TLS", None, "security=ssl", "ca="),
        ("KAFKA_SASL_TLS", Some(login), "security=ssl", "ca="),
    ] {
        let url = url(listener, login, &format!("{parameters}&publish_timeout=300s")).expect("a server of ours");
        for (what, error) in failures(&url.replace("connect_timeout=5s", "connect_timeout=300s")).await? {
            let error = error.context(format_args!("{listener} {parameters} {what}"));
            assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
            assert!(error.message().contains(why), "{error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }
    Ok(())
}

/// Where nobody is refused but nobody answers either, the error says what is the matter with the connection.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_answer_is_an_error_that_says_why() -> Result<()> {
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let nowhere = nowhere.expect("a port that nobody has");
    let mut wrong = vec![(format!("kafka://{nowhere}?"), "Connection refused; check that a server listens there")];
    if let Some(login) = server().values.get("KAFKA_LOGIN").map(String::as_str) {
        let closed = "Disconnected: connection closed by peer; the server may want TLS or a password, or neither";
        for (listener, login, parameters, why) in [
            // No password where one is wanted, no TLS where it is, TLS where it is not.
            ("KAFKA_SASL", None, "", closed),
            ("KAFKA_TLS", None, "", closed),
            ("KAFKA_SASL_TLS", Some(login), "", closed),
            ("KAFKA_SASL", None, "security=ssl", "may not speak TLS"),
        ] {
            wrong.push((url(listener, login, parameters).expect("a server of ours has every listener"), why));
        }
    } else {
        no_control("it has no listeners for TLS and SASL that we know of")?;
    }
    for (url, why) in wrong {
        let url = format!("{}&connect_timeout=2s&publish_timeout=2s", url.replace("connect_timeout=5s&", ""));
        for (what, error) in failures(&url).await? {
            let error = error.context(format_args!("{url} {what}"));
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            assert!(error.message().contains(why) && !error.message().contains("AllBrokersDown"), "{error}");
        }
    }
    Ok(())
}

/// A server that breaks off in the middle of letting us in has refused nobody: when it goes on, we are in.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_cut_off_while_a_password_is_asked_for_is_not_refused() -> Result<()> {
    let Some(login) = server().values.get("KAFKA_LOGIN").map(String::as_str) else {
        return no_control("it has no listeners for TLS and SASL that we know of");
    };
    let sasl = server().values.get("KAFKA_SASL").expect("a server of ours has every listener");
    let proxy = Proxy::start(sasl.clone()).await.expect("a proxy");
    let quick = "connect_timeout=60s&librdkafka.reconnect.backoff.max.ms=50";
    let broker = Arc::new(open(&format!("kafka://{login}@{}?{quick}", proxy.address()))?);
    proxy.set(Fault::CutAnswer(0));
    let connecting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.connect().await }
    });
    // The answers to which versions it speaks, a few hundred bytes, to how a password is told, and to the password.
    for answered in (450..950).step_by(20) {
        proxy.set(Fault::CutAnswer(answered));
        proxy.cut();
        tokio::time::sleep(Duration::from_millis(700)).await;
        if connecting.is_finished() {
            // All that is asked before one is in was answered; or we were refused.
            break;
        }
    }
    proxy.set(Fault::None);
    connecting.await.expect("a task")?;
    assert_eq!(broker.status().await?.state, broker_core::State::Active);
    close(&broker).await;
    Ok(())
}

/// The state follows the connection: none has stood yet, one does, it is lost, and stands again.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_active_while_the_server_answers() -> Result<()> {
    use broker_core::State;
    let Some((told, listening)) = server().links.lock().pop() else {
        return no_control("it has no listener that a proxy stands before");
    };
    let proxy = Proxy::start_at(&told, listening.clone()).await.expect("a proxy");
    proxy.set(Fault::Refuse);
    let broker = open(&format!("kafka://{told}?partitions=1&connect_timeout=2s"))?;
    let topic = topic("state")?;
    let group: Group = format!("state@{topic}").parse()?;
    assert_eq!(broker.status().await?.state, State::Connecting);
    proxy.set(Fault::None);
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    broker.publish(&topic, Message::new("1")).await?;
    let status = broker.status().await?;
    assert_eq!((status.state, &status.last_error), (State::Active, &None));
    assert_eq!(status.groups[0].lag, Some(1));
    proxy.set(Fault::Refuse);
    proxy.cut();
    let mut status = broker.status().await?;
    for _ in 0..100 {
        if status.state == State::Connecting {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        status = broker.status().await?;
    }
    assert_eq!((status.state, status.groups[0].state), (State::Connecting, State::Connecting));
    assert!(status.last_error.is_some() && status.groups[0].lag.is_none(), "{status:?}");
    proxy.set(Fault::None);
    take(&mut member, 1).await?.remove(0).ack().await?;
    let mut status = broker.status().await?;
    for _ in 0..300 {
        if status.state == State::Active {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        status = broker.status().await?;
    }
    assert_eq!((status.state, status.groups[0].state), (State::Active, State::Active), "{status:?}");
    close(&broker).await;
    drop(proxy);
    server().links.lock().insert(0, (told, listening));
    Ok(())
}
