//! TLS and SASL, on the listeners of the test's own server that want them.

use broker_core::Broker as _;

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

/// Who is not let in is told so within the connect timeout, and no password is repeated.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_passwords_and_strange_certificates_are_errors() -> Result<()> {
    let Some(login) = server().values.get("KAFKA_LOGIN").map(String::as_str) else {
        return no_control("it has no listeners for TLS and SASL that we know of");
    };
    for (listener, login, parameters, kinds) in [
        ("KAFKA_SASL", Some("suite:hunter2"), "", [ErrorKind::Unauthorized; 2]),
        ("KAFKA_SASL", Some("suite:hunter2"), "sasl=scram-sha-256", [ErrorKind::Unauthorized; 2]),
        // Signed by nobody we trust.
        ("KAFKA_TLS", None, "security=ssl", [ErrorKind::Unavailable, ErrorKind::Unauthorized]),
        // No password where one is wanted, no TLS where it is.
        ("KAFKA_SASL", None, "", [ErrorKind::Unavailable; 2]),
        ("KAFKA_SASL_TLS", Some(login), "", [ErrorKind::Unavailable; 2]),
    ] {
        let url = url(listener, login, parameters).expect("a server of ours has every listener");
        let began = std::time::Instant::now();
        let error = open(&url)?.connect().await.unwrap_err();
        assert!(kinds.contains(&error.kind()), "{listener} {parameters}: {:?} {error}", error.kind());
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    }
    Ok(())
}
