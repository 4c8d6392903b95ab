//! Records as they lie in the log: ours read by others, others' read by us.

use broker_core::Timestamp;
use broker_kafka::rdkafka::Message as _;
use broker_kafka::rdkafka::message::{Header, Headers as _, OwnedHeaders, OwnedMessage};
use broker_kafka::rdkafka::producer::BaseRecord;

use super::*;

/// A record that this crate did not write.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_others_are_read() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("foreign")?);
    let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
    let headers = OwnedHeaders::new()
        .insert(Header { key: "content-type", value: Some("application/json") })
        .insert(Header { key: "x", value: Some("1") })
        .insert(Header::<&str> { key: "none", value: None });
    let record = BaseRecord::with_opaque_to(topic.as_str(), usize::MAX).key(&b"k"[..]).payload(&b"{}"[..]);
    produce(&broker, record.headers(headers)).await;
    let delivery = take(&mut inbox, 1).await?.remove(0);
    let message = delivery.message();
    assert_eq!((message.content_type(), message.payload().as_ref()), (Some("application/json"), &b"{}"[..]));
    assert_eq!(message.headers().get_str("x"), Some("1"));
    assert_eq!(message.id().to_string(), format!("{topic}-0-0"), "its id is its place");
    delivery.ack().await?;
    close(&broker).await;
    Ok(())
}

/// A server takes none from further ahead than an hour, unless its topic says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_the_server_does_not_take_is_told_with_its_settings() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("ahead")?);
    let ahead =
        |hours: u64| Message::new("x").with_timestamp(Timestamp::now().after(Duration::from_secs(hours * 3_600)));
    let error = broker.publish(&topic, ahead(3)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.message().contains("message.timestamp.after.max.ms"), "{error}");
    broker.publish(&topic, ahead(0)).await?;
    close(&broker).await;
    Ok(())
}

/// More than librdkafka's queue holds: publishes wait in the order of the calls, and none fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_waits_in_order() -> Result<()> {
    let (broker, topic) = (Arc::new(broker("&librdkafka.queue.buffering.max.messages=100")?), topic("full")?);
    let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new().with_max_in_flight(5_000)?).await?;
    let messages: Vec<_> = (0..3_000).map(|n| Message::new(n.to_string()).with_key("one")).collect();
    for result in broker.publish_batch(&topic, messages).await? {
        result?;
    }
    let mut received = Vec::new();
    while received.len() < 3_000 {
        for delivery in take(&mut inbox, 100).await? {
            received.push(payload(&delivery));
            delivery.ack().await?;
        }
    }
    assert!(received.iter().map(|text| text.parse::<u32>().unwrap()).is_sorted(), "out of order");
    close(&broker).await;
    Ok(())
}

fn fields(record: &OwnedMessage) -> Vec<(&str, &[u8])> {
    let headers = record.headers().into_iter().flat_map(|headers| headers.iter());
    headers.map(|header| (header.key, header.value.unwrap_or(b"null"))).collect()
}

/// Byte for byte: keys and payloads that are absent or empty, headers that repeat or are no text, the time.
#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_is_what_others_read() -> Result<()> {
    let (broker, topic) = (broker("")?, topic("wire")?);
    let time = Timestamp::from_millis(1_795_348_800_250);
    let id = "order-42".parse::<broker_core::MessageId>()?;
    let full = Message::new(vec![0, 0xff])
        .with_id(id)
        .with_key(vec![0xfe, 0])
        .with_timestamp(time)
        .with_content_type("application/octet-stream")?
        .with_header("via", "a")?
        .with_header("via", vec![0xff, 0])?
        .with_header("Via", "")?;
    let messages = [full, Message::new("").with_key(""), Message::tombstone().with_key("k"), Message::new("x")];
    for (offset, message) in (0..).zip(&messages) {
        let receipt = broker.publish(&topic, message.clone()).await?;
        assert_eq!((receipt.partition, receipt.offset), (Some(0), Some(offset)));
    }
    let records = raw_records(&topic, messages.len()).await;
    let seen: Vec<_> = records.iter().map(|record| (record.key(), record.payload())).collect();
    let expected: [(Option<&[u8]>, Option<&[u8]>); 4] =
        [(Some(&[0xfe, 0]), Some(&[0, 0xff])), (Some(b""), Some(b"")), (Some(b"k"), None), (None, Some(b"x"))];
    assert_eq!(seen, expected);
    assert_eq!(records[0].timestamp().to_millis(), Some(time.as_millis()));
    let headers: [(&str, &[u8]); 5] = [
        ("content-type", b"application/octet-stream"),
        ("broker-id", b"order-42"),
        ("via", b"a"),
        ("via", &[0xff, 0]),
        ("Via", b""),
    ];
    assert_eq!(fields(&records[0]), headers);
    close(&broker).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_is_read_again() -> Result<()> {
    for name in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let (broker, topic) = (broker(&format!("&compression={name}"))?, topic("compressed")?);
        let mut inbox = broker.subscribe(&(&topic).into(), Subscribe::new()).await?;
        let payload = "again and ".repeat(1_000);
        broker.publish(&topic, Message::new(payload.clone())).await?;
        let delivery = take(&mut inbox, 1).await?.remove(0);
        assert_eq!(delivery.message().payload(), &payload, "{name}");
        delivery.ack().await?;
        close(&broker).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cloudevents_are_written_and_read() -> Result<()> {
    let (broker, topic) = (broker("&format=cloudevents")?, topic("events")?);
    let group: Group = format!("events@{topic}").parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let message = Message::new("{}").with_content_type("application/json")?.with_key("customer-7");
    let message = message.with_header("ce-type", "com.acme.sold")?.with_header("x", "1")?;
    broker.publish(&topic, message.clone()).await?;
    let record = raw_records(&topic, 1).await.remove(0);
    let id = message.id().to_string();
    for (name, value) in [
        ("content-type", "application/json"),
        ("ce_specversion", "1.0"),
        ("ce_id", id.as_str()),
        ("ce_type", "com.acme.sold"),
        ("ce_source", &format!("/topics/{topic}")),
        ("ce_time", &message.timestamp().to_string()),
        ("ce_partitionkey", "customer-7"),
        ("x", "1"),
    ] {
        assert!(fields(&record).contains(&(name, value.as_bytes())), "{name}: {value} in {:?}", fields(&record));
    }
    assert_eq!((record.key(), record.payload()), (Some(&b"customer-7"[..]), Some(&b"{}"[..])));
    let delivery = take(&mut member, 1).await?.remove(0);
    assert_eq!(delivery.message(), &message, "and we read what we wrote");
    delivery.ack().await?;

    // Others' events: binary, structured, and one that is none.
    let put = |name, value| Header { key: name, value: Some(value) };
    let binary = OwnedHeaders::new()
        .insert(put("ce_specversion", "1.0"))
        .insert(put("ce_id", "b-1"))
        .insert(put("ce_source", "/shop"))
        .insert(put("ce_type", "sold"))
        .insert(put("content-type", "text/plain"));
    let structured = OwnedHeaders::new().insert(put("content-type", "application/cloudevents+json; charset=UTF-8"));
    let broken = OwnedHeaders::new().insert(put("ce_specversion", "1.0")).insert(put("ce_id", "b-2"));
    let json = r#"{"specversion":"1.0","id":"s-1","source":"/shop","type":"sold","data":{"n":1}}"#;
    for (headers, payload) in [(binary, "42"), (broken, "raw"), (structured, json)] {
        let record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic.as_str(), usize::MAX);
        produce(&broker, record.payload(payload.as_bytes()).headers(headers)).await;
    }
    let received = take(&mut member, 2).await?;
    let read: Vec<_> = received
        .iter()
        .map(|delivery| {
            (delivery.message().id().to_string(), payload(delivery), delivery.message().headers().get_str("ce-source"))
        })
        .collect();
    assert_eq!(
        read,
        [
            ("b-1".to_owned(), "42".to_owned(), Some("/shop")),
            ("s-1".to_owned(), r#"{"n":1}"#.to_owned(), Some("/shop"))
        ]
    );
    for delivery in received {
        delivery.ack().await?;
    }
    let letters = wait_for_letters(&broker, &group, 1).await?;
    assert_eq!(letters[0].message.payload(), "raw");
    assert!(letters[0].failure.reason().contains("source"), "{}", letters[0].failure.reason());
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}

/// What was recorded from Go Micro's Kafka plugin, v5 on Kafka 4.3.
const GO_MICRO: &[u8] = br#"{"Header":{"Content-Type":"application/json","x-trace":"abc"},"Body":"eyJpZCI6MX0="}"#;

#[tokio::test(flavor = "multi_thread")]
async fn go_micros_format_is_written_and_read() -> Result<()> {
    let (broker, topic) = (broker("&preset=go-micro")?, topic("micro")?);
    // The queue of Go Micro is the consumer group.
    let group: Group = format!("queue-{:x}@{topic}", fastrand::u64(..)).parse()?;
    let mut member = join(&broker, &group, GroupOptions::new()).await?;
    let message = Message::new(r#"{"id":1}"#).with_content_type("application/json")?.with_header("x-trace", "abc")?;
    broker.publish(&topic, message).await?;
    let record = raw_records(&topic, 1).await.remove(0);
    assert_eq!((record.key(), record.payload()), (None, Some(GO_MICRO)));
    assert!(record.headers().is_none_or(|headers| headers.count() == 0), "{:?}", fields(&record));

    // What a Go service writes: the recording, one with record headers, and what is not its format.
    let record = || BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic.as_str(), usize::MAX);
    produce(&broker, record().payload(GO_MICRO)).await;
    let over = OwnedHeaders::new().insert(Header { key: "x-trace", value: Some("def") });
    produce(&broker, record().payload(GO_MICRO).headers(over)).await;
    produce(&broker, record().payload(b"plain")).await;
    let mut traces = Vec::new();
    for delivery in take(&mut member, 3).await? {
        let message = delivery.message();
        assert_eq!((payload(&delivery).as_str(), message.content_type()), (r#"{"id":1}"#, Some("application/json")));
        traces.push(message.headers().get_str("x-trace").map(str::to_owned));
        delivery.ack().await?;
    }
    assert_eq!(traces, ["abc", "abc", "def"].map(|trace| Some(trace.to_owned())));
    let letters = wait_for_letters(&broker, &group, 1).await?;
    assert_eq!(letters[0].message.payload(), "plain");
    let keyed = broker.publish(&topic, Message::new("1").with_key("k")).await.unwrap_err();
    assert_eq!(keyed.kind(), ErrorKind::Unsupported, "{keyed}");
    assert!(group_names().contains(&group.name.to_string()), "the group is called as the queue");
    broker.delete_group(&group).await?;
    close(&broker).await;
    Ok(())
}
