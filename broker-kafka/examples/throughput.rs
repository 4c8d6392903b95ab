//! How fast this adapter is beside the raw client, on one server:
//!
//! ```text
//! cargo run --release -p broker-kafka --example throughput -- kafka://127.0.0.1:9092 [MESSAGES]
//! ```
//!
//! Records of 100 B with the same headers on both sides, rounds interleaved, the best of three shown. A first look;
//! the comparisons that count are the names `kafka/…` of `ratios`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use broker_core::{Broker, BrokerUrl, GroupOptions, Message, PublisherOptions, Result, StartAt, Subscribe, Topic};
use broker_kafka::rdkafka::client::ClientContext;
use broker_kafka::rdkafka::config::FromClientConfigAndContext;
use broker_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use broker_kafka::rdkafka::message::{Header, OwnedHeaders};
use broker_kafka::rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use broker_kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use broker_kafka::{KafkaBroker, KafkaConfig};

const ID: &str = "0190a5e0-7a3b-7000-8000-000000000001";

#[derive(Default)]
struct Counting(Arc<AtomicUsize>);

impl ClientContext for Counting {}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn rate(count: usize, begin: Instant) -> f64 {
    count as f64 / begin.elapsed().as_secs_f64()
}

fn raw_settings(servers: &str) -> ClientConfig {
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", servers).set("message.max.bytes", "2097152");
    settings
}

fn raw_publish(servers: &str, topic: &Topic, count: usize, lone: bool) -> f64 {
    let mut settings = raw_settings(servers);
    settings.set("enable.idempotence", "true").set("acks", "all");
    if lone {
        settings.set("linger.ms", "0");
    }
    let done = Arc::new(AtomicUsize::new(0));
    let counting = Counting(Arc::clone(&done));
    let Ok(producer) = ThreadedProducer::from_config_and_context(&settings, counting) else { return 0.0 };
    let payload = [b'x'; 100];
    let begin = Instant::now();
    for number in 0..count {
        loop {
            let headers = OwnedHeaders::new_with_capacity(3).insert(Header { key: "broker-id", value: Some(ID) });
            let record = BaseRecord::<[u8], [u8]>::to(topic.as_str()).payload(&payload).headers(headers);
            if producer.send(record).is_ok() {
                break;
            }
            std::thread::yield_now();
        }
        while lone && done.load(Ordering::Relaxed) <= number {
            std::thread::yield_now();
        }
    }
    let _ = producer.flush(Duration::from_secs(60));
    while done.load(Ordering::Relaxed) < count {
        std::thread::yield_now();
    }
    rate(count, begin)
}

async fn our_publish(broker: &KafkaBroker, topic: &Topic, count: usize, lone: bool) -> Result<f64> {
    let publisher = broker.publisher(topic, PublisherOptions::new())?;
    publisher.publish(Message::new("warm")).await?;
    let begin = Instant::now();
    let publishing = tokio::spawn(async move {
        let payload = bytes::Bytes::from_static(&[b'x'; 100]);
        let mut window = std::collections::VecDeque::new();
        for _ in 0..count {
            let publish = publisher.publish(Message::new(payload.clone()));
            if lone {
                publish.await?;
                continue;
            }
            window.push_back(publish);
            if window.len() >= 50_000
                && let Some(oldest) = window.pop_front()
            {
                oldest.await?;
            }
        }
        for publish in window {
            publish.await?;
        }
        Result::Ok(())
    });
    publishing.await.map_err(|error| broker_core::Error::backend("a task").with_source(error))??;
    Ok(rate(count, begin))
}

fn raw_consume(servers: &str, topic: &Topic, count: usize) -> f64 {
    let mut settings = raw_settings(servers);
    settings
        .set("group.id", "throughput-raw")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("fetch.queue.backoff.ms", "10");
    let Ok(consumer) = settings.create::<BaseConsumer>() else { return 0.0 };
    let mut list = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let _ = list.add_partition_offset(topic.as_str(), partition, Offset::Beginning);
    }
    let _ = consumer.assign(&list);
    // From the first record on, on both sides.
    let (mut seen, mut begin) = (0, None);
    while seen < count {
        if let Some(Ok(record)) = consumer.poll(Duration::from_millis(100)) {
            begin.get_or_insert_with(Instant::now);
            let _ = consumer.store_offset_from_message(&record);
            seen += 1;
        }
    }
    rate(count, begin.unwrap_or_else(Instant::now))
}

async fn our_consume(broker: &KafkaBroker, topic: &Topic, count: usize) -> Result<f64> {
    let group =
        format!("throughput-{:x}@{topic}", Instant::now().elapsed().as_nanos() as usize + std::process::id() as usize);
    let group: broker_core::Group = group.parse()?;
    let options = GroupOptions::new().with_start(StartAt::Earliest);
    broker.create_group(&group, options).await?;
    let options = Subscribe::group(group.name.clone()).with_max_in_flight(4096)?;
    let mut subscription = broker.subscribe(&group.filter, options).await?;
    let receiving = tokio::spawn(async move {
        let (mut seen, mut batch) = (0, Vec::new());
        let mut first = None;
        while seen < count {
            seen += subscription.receive(&mut batch, 1024).await?;
            first.get_or_insert_with(Instant::now);
            for delivery in batch.drain(..) {
                delivery.ack().await?;
            }
        }
        let rate = rate(count, first.unwrap_or_else(Instant::now));
        subscription.close().await?;
        Result::Ok(rate)
    });
    let rate = receiving.await.map_err(|error| broker_core::Error::backend("a task").with_source(error))??;
    broker.delete_group(&group).await?;
    Ok(rate)
}

const PARTITIONS: i32 = 12;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or_else(|| "kafka://127.0.0.1:9092".to_owned());
    let count: usize = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(300_000);
    let config = KafkaConfig::from_url(BrokerUrl::parse(&format!("{url}?partitions={PARTITIONS}"))?)?;
    let servers = config.bootstrap_servers();
    let broker = KafkaBroker::new(config);
    let topic = Topic::new(format!("throughput.{}", std::process::id()))?;
    our_publish(&broker, &topic, 1, true).await?;
    let mut best = [[0.0_f64; 2]; 3];
    for _ in 0..3 {
        let (servers, topic) = (servers.as_str(), &topic);
        let round = [
            [our_publish(&broker, topic, 2_000, true).await?, raw_publish(servers, topic, 2_000, true)],
            [our_publish(&broker, topic, count, false).await?, raw_publish(servers, topic, count, false)],
            [our_consume(&broker, topic, count).await?, raw_consume(servers, topic, count)],
        ];
        for (best, round) in best.iter_mut().flatten().zip(round.iter().flatten()) {
            *best = best.max(*round);
        }
    }
    for (name, [ours, raw]) in
        ["publish, one awaited after another", "publish, pipelined", "consume, acked"].iter().zip(best)
    {
        println!("{name:36} ours {ours:>10.0}/s  raw {raw:>10.0}/s  {:.2}", ours / raw);
    }
    broker.close(Duration::from_secs(10)).await;
    Ok(())
}
