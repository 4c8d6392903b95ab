//! A. Publish and receive.

use std::collections::BTreeSet;

use broker_core::{Broker, BrokerExt, ErrorKind, Message, MessageId, PublisherOptions, Received, Subscribe, Timestamp};
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};

use crate::{Attempt, Inbox, PASSED, Scene, Verdict, ensure, numbered, refused, same_message, same_set, sent};

/// Publishes `messages`, receives as many, and compares each with what was sent.
async fn round_trip(broker: &dyn Broker, scene: &Scene, messages: &[Message]) -> Attempt<Vec<Received>> {
    let topic = scene.topic("whole").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let receipts = scene.publish(broker, &topic, messages).await?;
    for (message, receipt) in messages.iter().zip(&receipts) {
        ensure!(receipt.id == *message.id(), "the receipt of {} names {}", message.id(), receipt.id);
        ensure!(receipt.matched.is_none_or(|matched| matched == 1), "one subscriber, matched {:?}", receipt.matched);
        ensure!(!receipt.duplicate, "a message without deduplication key was called a duplicate");
    }
    let received = inbox.expect(messages).await?;
    for one in &received {
        same_message(sent(messages, one.message().id())?, one.message())?;
        ensure!(*one.topic() == topic, "published to {topic}, delivered as of {}", one.topic());
        ensure!(one.attempt() == 1, "the first delivery is attempt {}", one.attempt());
    }
    Ok(received)
}

pub(super) async fn messages_arrive_whole(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let mut messages = Vec::new();
    for number in 0..100_u32 {
        let mut message = Message::new(format!("payload {number}"));
        if number % 2 == 0 {
            message = message.with_key(format!("key-{}", number % 10));
        }
        if number % 3 == 0 {
            message = message.with_header("number", number.to_string())?.with_header("constant", "yes")?;
        }
        if number % 4 == 0 {
            message = message.with_content_type("text/plain; charset=utf-8")?;
        }
        if number % 5 == 0 {
            message = message.with_id(format!("own id {number} ü").parse::<MessageId>()?);
        }
        if number % 7 == 0 {
            message = message.with_timestamp(Timestamp::from_millis(1_700_000_000_001 + i64::from(number)));
        }
        messages.push(message);
    }
    round_trip(broker, scene, &messages).await?;
    PASSED
}

pub(super) async fn payloads_byte_for_byte(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let every_byte: Vec<u8> = (0..=255).collect();
    let json = Bytes::from_static(br#"{ "a" : 1.0, "b":[null,true,"\u00fc"],  "a": 2 }"#);
    let plain = [
        Bytes::new(),
        Bytes::from(every_byte),
        json.clone(),
        Bytes::from_static(b"\xff\xfe\x00\x80"),
        Bytes::from_static(b"\xef\xbb\xbf with a mark\r\n\r\n"),
        Bytes::from_static(b"null"),
        Bytes::from(vec![0; 10_000]),
    ];
    let mut messages: Vec<Message> = plain.iter().cloned().map(Message::new).collect();
    // Who says it is JSON, or text, still gets the bytes and not a value that equals them.
    for payload in [json, Bytes::from_static(b"{\"not json"), Bytes::new(), Bytes::from_static(b"1.50")] {
        messages.push(Message::new(payload.clone()).with_content_type("application/json")?);
        messages.push(Message::new(payload).with_content_type("application/vnd.acme+json; charset=utf-8")?);
    }
    messages.push(Message::new(Bytes::from_static(b"\xc3\x28")).with_content_type("text/plain")?);
    round_trip(broker, scene, &messages).await?;
    PASSED
}

pub(super) async fn odd_headers(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("headers").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;

    let every_byte: Vec<u8> = (0..=255).collect();
    let many = (0..64).try_fold(Message::new("many"), |message, n| message.with_header(format!("n{n}"), vec![n; 9]))?;
    let names = [
        "UPPER",
        "lower",
        "MiXed-Case",
        "with space",
        " edges ",
        "a:b",
        "x=y&z;w",
        "percent%41",
        "\"quoted\"",
        "Größe",
        "日本語",
        "🦀",
        "content-type",
        "Host",
        "id",
        "key",
        "ce-id",
        "ce-type",
        "webhook-id",
        "x-death",
        "x-cause-of-death",
        "__",
    ];
    let long = "n".repeat(255);
    let mut odd = vec![
        Message::new("repeats")
            .with_header("via", "a")?
            .with_header("x", "1")?
            .with_header("via", "b")?
            .with_header("via", "a")?,
        Message::new("case").with_header("Name", "1")?.with_header("name", "2")?.with_header("NAME", "3")?,
        Message::new("values")
            .with_header("binary", every_byte)?
            .with_header("empty", "")?
            .with_header("lines", "a\r\nb: c\n")?
            .with_header("spaces", "  two  ")?
            .with_header("unicode", "ü€🦀")?
            .with_header("percent", "%41%zz+")?,
        Message::new("long").with_header(&long, vec![b'v'; 20_000])?,
        many,
    ];
    for name in names {
        odd.push(Message::new(name).with_header(name, "value")?);
    }
    // A plain header is nothing a broker may refuse.
    odd.push(Message::new("plain").with_header("plain", "value")?);

    let mut carried = Vec::new();
    for message in odd {
        match scene.within("publishing", publisher.publish(message.clone())).await? {
            Ok(_) => carried.push(message),
            Err(error) => {
                refused(
                    "publishing an odd header",
                    Err::<(), _>(error),
                    &[ErrorKind::Unsupported, ErrorKind::Invalid],
                )?;
                ensure!(message.payload() != "plain", "a plain header was refused");
            }
        }
    }
    for one in inbox.expect(&carried).await? {
        same_message(sent(&carried, one.message().id())?, one.message())?;
    }
    PASSED
}

pub(super) async fn largest_payload(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let max = broker.capabilities().max_message_bytes;
    let topic = scene.topic("large").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;

    let largest = Message::new(vec![b'x'; max]);
    let shared = Message::new(vec![b'y'; max - 10]).with_key("12345").with_header("name", "v")?;
    let messages = [largest, shared];
    for message in &messages {
        scene.publish_one(&publisher, message.clone()).await?;
    }
    for one in inbox.expect(&messages).await? {
        same_message(sent(&messages, one.message().id())?, one.message())?;
    }

    let too_large = [
        Message::new(vec![b'x'; max + 1]),
        // The key and the headers count.
        Message::new(vec![b'x'; max]).with_key("k"),
        Message::new(vec![b'x'; max]).with_header("h", "")?,
    ];
    for message in too_large {
        let result = scene.within("publishing", publisher.publish(message)).await?;
        refused("publishing one byte more than the largest message", result, &[ErrorKind::TooLarge])?;
    }
    inbox.quiet().await?;
    PASSED
}

pub(super) async fn no_cross_talk(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // Names that a prefix match, a wildcard or a careless separator would confuse.
    let mut topics = Vec::new();
    let mut inboxes = Vec::new();
    for name in ["a", "ab", "a.b", "A", "a-b", "x.a"] {
        let topic = scene.topic(name).await?;
        inboxes.push(scene.listen(broker, &topic).await?);
        topics.push(topic);
    }
    let mut sent = Vec::new();
    for topic in &topics {
        let messages: Vec<_> = (0..5).map(|n| Message::new(format!("{topic} {n}"))).collect();
        scene.publish(broker, topic, &messages).await?;
        sent.push(messages);
    }
    for ((topic, inbox), messages) in topics.iter().zip(&mut inboxes).zip(&sent) {
        let received = inbox.take_acked(messages.len()).await?;
        same_set(messages, &received)?;
        ensure!(received.iter().all(|one| one.topic() == topic), "a delivery names another topic than {topic}");
    }
    try_join_all(inboxes.iter_mut().map(Inbox::quiet)).await?;
    PASSED
}

pub(super) async fn twenty_topics(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let one_topic = async |number: usize| -> Attempt {
        let topic = scene.topic(&format!("t{number}")).await?;
        let mut inbox = scene.listen(broker, &topic).await?;
        let messages = numbered(20);
        scene.publish(broker, &topic, &messages).await?;
        inbox.expect(&messages).await.map(drop).map_err(|failed| failed.context(&topic))
    };
    try_join_all((0..20).map(one_topic)).await?;
    PASSED
}

pub(super) async fn fifty_by_fifty(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("many").await?;
    let mut inboxes = try_join_all((0..50).map(|_| scene.listen(broker, &topic))).await?;
    let messages: Vec<Vec<Message>> = (0..50).map(|_| numbered(4)).collect();
    let all: Vec<Message> = messages.iter().flatten().cloned().collect();

    let publish = try_join_all(messages.iter().map(|own| scene.publish(broker, &topic, own)));
    let receive = try_join_all(inboxes.iter_mut().enumerate().map(async |(number, inbox)| {
        inbox.expect(&all).await.map_err(|failed| failed.context(format!("subscriber {number}")))
    }));
    let (published, received) = join_two(publish, receive).await;
    published?;
    received?;
    PASSED
}

/// Both to their end: an error of one must not hide what the other found.
async fn join_two<A, B>(one: impl Future<Output = A>, two: impl Future<Output = B>) -> (A, B) {
    futures_util::future::join(one, two).await
}

pub(super) async fn id_and_timestamp(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("ids").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let before = Timestamp::now();
    let mut ids = BTreeSet::new();
    for number in 0..10 {
        let publish = broker.publish(&topic, Message::new(number.to_string()));
        let receipt = scene.done("publishing", publish).await?;
        let after = Timestamp::now();
        let received = inbox.acked().await?;
        let message = received.message();
        ensure!(receipt.id == *message.id(), "the receipt names {}, the delivery {}", receipt.id, message.id());
        ensure!(is_uuid_v7(&message.id().to_string()), "id {} is no UUIDv7", message.id());
        let time = message.timestamp();
        ensure!(before <= time && time <= after, "timestamp {time} is not between {before} and {after}");
        ensure!(ids.insert(message.id().to_string()), "id {} was given twice", message.id());
    }
    PASSED
}

fn is_uuid_v7(text: &str) -> bool {
    let mut groups = text.split('-');
    let lengths = text.split('-').map(str::len);
    lengths.eq([8, 4, 4, 4, 12])
        && text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit())
        && groups.nth(2).is_some_and(|version| version.starts_with('7'))
}

pub(super) async fn batches(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("batch").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let publisher = broker.publisher(&topic, PublisherOptions::new())?;

    let messages: Vec<_> = (0..100).map(|n| Message::new(n.to_string()).with_key("one")).collect();
    let results = scene.done("publishing a batch", publisher.publish_batch(messages.clone())).await?;
    ensure!(results.len() == messages.len(), "{} results for {} messages", results.len(), messages.len());
    for (result, message) in results.into_iter().zip(&messages) {
        let receipt = result?;
        ensure!(receipt.id == *message.id(), "the results are not in the order of the messages");
    }
    let received = inbox.take_acked(messages.len()).await?;
    let in_order = received.iter().map(|one| one.message().id()).eq(messages.iter().map(Message::id));
    ensure!(in_order, "messages of one key and one batch arrived out of order");

    let too_large = Message::new(vec![0; broker.capabilities().max_message_bytes + 1]);
    let mixed = vec![Message::new("first"), too_large.clone(), Message::new("third"), too_large, Message::new("fifth")];
    let results = scene.done("publishing a batch", publisher.publish_batch(mixed.clone())).await?;
    ensure!(results.len() == 5, "{} results for 5 messages", results.len());
    for (number, (result, message)) in results.into_iter().zip(&mixed).enumerate() {
        if number % 2 == 1 {
            refused("the too large message of a batch", result, &[ErrorKind::TooLarge])?;
        } else {
            ensure!(result?.id == *message.id(), "result {number} of a batch names another message");
        }
    }
    let good: Vec<_> = mixed.into_iter().step_by(2).collect();
    inbox.expect(&good).await?;

    let empty = scene.done("publishing an empty batch", publisher.publish_batch(Vec::new())).await?;
    ensure!(empty.is_empty(), "an empty batch has {} results", empty.len());
    PASSED
}

pub(super) async fn patterns(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // (pattern, of the topics below those it matches)
    let wanted: [(&str, &[&str]); 5] = [
        ("p.*", &["p.a", "p.b"]),
        ("p.>", &["p.a", "p.b", "p.a.eu", "p.a.us", "p.a.eu.x"]),
        ("p.*.eu", &["p.a.eu"]),
        ("p.a.*", &["p.a.eu", "p.a.us"]),
        ("p.*.*.>", &["p.a.eu.x"]),
    ];
    let early = ["p", "p.a", "p.a.eu"];
    let later = ["p.b", "p.a.us", "p.a.eu.x", "px.a", "p-.a"];

    for name in early {
        scene.topic(name).await?;
    }
    let mut inboxes = Vec::new();
    for (pattern, _) in wanted {
        inboxes.push(scene.listen(broker, scene.filter(pattern)?).await?);
    }
    let mut messages = Vec::new();
    for name in early.into_iter().chain(later) {
        let topic = scene.topic(name).await?;
        let message = Message::new(name);
        scene.publish(broker, &topic, std::slice::from_ref(&message)).await?;
        messages.push((name, message));
    }
    let expectations = inboxes.iter_mut().zip(wanted).map(async |(inbox, (pattern, names))| {
        let own: Vec<Message> =
            messages.iter().filter(|(name, _)| names.contains(name)).map(|(_, message)| message.clone()).collect();
        inbox.expect(&own).await.map_err(|failed| failed.context(format!("filter {pattern}")))
    });
    for expected in join_all(expectations).await {
        expected?;
    }

    // A group's pattern works alike.
    let group = scene.group("pattern", scene.filter("p.*")?)?;
    let mut member = scene.join(broker, &group).await?;
    let own = numbered(3);
    scene.publish(broker, &scene.topic("p.c").await?, &own).await?;
    member.expect(&own).await?;
    PASSED
}

pub(super) async fn absent_and_empty_keys(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let messages = [
        Message::new("absent"),
        Message::new("empty").with_key(""),
        Message::new("text").with_key("a key"),
        Message::new("bytes").with_key(&b"\x00\xff\xfe"[..]),
        Message::new("unicode").with_key("schlüssel"),
    ];
    round_trip(broker, scene, &messages).await?;
    PASSED
}

pub(super) async fn publishing_changes_nothing(broker: &dyn Broker, scene: &Scene) -> Verdict {
    let topic = scene.topic("same").await?;
    let mut inbox = scene.listen(broker, &topic).await?;
    let payload = Bytes::from_static(b"payload");
    let message = Message::new(payload.clone()).with_key("key").with_header("name", "value")?;
    let (copy, headers) = (message.clone(), message.headers().clone());
    // The same message twice, and once more in a batch: a broker that writes into it shows.
    for _ in 0..2 {
        scene.done("publishing", broker.publish(&topic, message.clone())).await?;
    }
    for result in scene.done("publishing", broker.publish_batch(&topic, vec![message.clone()])).await? {
        result?;
    }
    ensure!(message == copy, "publishing changed the publisher's message");
    for _ in 0..3 {
        let received = inbox.acked().await?;
        same_message(&message, received.message())?;
        ensure!(*received.message().headers() == headers, "the headers came back in another order");
    }
    inbox.quiet().await?;
    ensure!(message == copy, "delivering changed the publisher's message");
    PASSED
}

pub(super) async fn publishing_in_a_handler(broker: &dyn Broker, scene: &Scene) -> Verdict {
    // Each of 20 messages is published by the handler of the one before it, and the answer waited
    // for while that one is in flight.
    let topic = scene.topic("chain").await?;
    let end = scene.topic("end").await?;
    let mut inbox = scene.listen(broker, &end).await?;
    let next = broker.publisher(&topic, PublisherOptions::new())?;
    let last = broker.publisher(&end, PublisherOptions::new())?;
    let options = Subscribe::new().with_options(scene.quick()?).with_max_in_flight(1)?;
    let filter = (&topic).into();
    let handling = broker.handle(&filter, options, move |received| {
        let (next, last) = (next.clone(), last.clone());
        async move {
            let number: u32 = String::from_utf8_lossy(received.message().payload()).parse().unwrap_or(0);
            let publisher = if number < 20 { next } else { last };
            publisher.publish(Message::new((number + 1).to_string())).await.map(drop)
        }
    });
    let handling = scene.done("subscribing", handling).await?;
    scene.done("publishing", broker.publish(&topic, Message::new("1"))).await?;
    let received = inbox.acked().await?;
    ensure!(received.message().payload() == "21", "the chain ended with {:?}", received.message().payload());
    scene.done("stopping the handler", handling.stop()).await?;
    PASSED
}
