//! What the adapter and raw lapin do on one server, interleaved: messages a second, and client CPU.
//!
//! `cargo run --release -p broker-amqp --example throughput -- amqp://guest:guest@127.0.0.1:5672`

use std::time::{Duration, Instant};

use broker_amqp::lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use broker_amqp::lapin::types::{AMQPValue, FieldTable};
use broker_amqp::lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use broker_core::{Broker, Connectors, Group, Message, PublisherOptions, Subscribe, Topic};
use futures_util::StreamExt;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const SIZE: usize = 100;

/// Seconds of CPU this process has used.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap_or("").split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // utime and stime, fields 14 and 15 of the whole; the state letter does not parse.
    fields.get(10).zip(fields.get(11)).map_or(0.0, |(user, system)| (user + system) as f64 / 100.0)
}

struct Row {
    rate: f64,
    micros: f64,
}

async fn measured(count: usize, work: impl Future<Output = Outcome>) -> Outcome<Row> {
    let (begin, before) = (Instant::now(), cpu());
    work.await?;
    let (elapsed, used) = (begin.elapsed(), cpu() - before);
    Ok(Row { rate: count as f64 / elapsed.as_secs_f64(), micros: used * 1e6 / count as f64 })
}

fn properties() -> BasicProperties {
    // What the adapter writes for the same message.
    let mut headers = FieldTable::default();
    headers.insert("x-broker-timestamp".into(), AMQPValue::LongLongInt(1_700_000_000_000));
    BasicProperties::default()
        .with_message_id("0190a5e0-7a3b-7000-8000-000000000001".into())
        .with_delivery_mode(1)
        .with_timestamp(1_700_000_000)
        .with_headers(headers)
}

async fn raw_channel(url: &str) -> Outcome<(Connection, Channel)> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

async fn raw_publish(channel: &Channel, count: usize, window: usize) -> Outcome {
    let payload = vec![b'x'; SIZE];
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let mut confirms = std::collections::VecDeque::new();
    for _ in 0..count {
        confirms
            .push_back(channel.basic_publish("ratio".into(), "ratio".into(), options, &payload, properties()).await?);
        if confirms.len() >= window
            && let Some(confirm) = confirms.pop_front()
        {
            confirm.await?;
        }
    }
    for confirm in confirms {
        confirm.await?;
    }
    Ok(())
}

async fn our_publish(broker: &dyn Broker, topic: &Topic, count: usize, window: usize) -> Outcome {
    let publisher = broker.publisher(topic, PublisherOptions::new())?;
    let payload = bytes::Bytes::from(vec![b'x'; SIZE]);
    let mut publishes = std::collections::VecDeque::new();
    for _ in 0..count {
        publishes.push_back(publisher.publish(Message::new(payload.clone())));
        if publishes.len() >= window
            && let Some(publish) = publishes.pop_front()
        {
            publish.await?;
        }
    }
    for publish in publishes {
        publish.await?;
    }
    Ok(())
}

async fn raw_consume(channel: &Channel, queue: &str, count: usize, every: usize) -> Outcome {
    channel.basic_qos(256, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    for number in 1..=count {
        let delivery = consumer.next().await.ok_or("the consumer ended")??;
        if number % every == 0 || number == count {
            channel.basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: every > 1 }).await?;
        }
    }
    Ok(())
}

async fn our_consume(member: &mut broker_core::Subscription, count: usize) -> Outcome {
    let mut batch = Vec::new();
    let mut done = 0;
    while done < count {
        done += member.receive(&mut batch, 256).await?;
        for delivery in batch.drain(..) {
            delivery.ack().await?;
        }
    }
    Ok(())
}

fn show(name: &str, rows: &mut [Row]) {
    rows.sort_by(|one, other| one.rate.total_cmp(&other.rate));
    if let Some(middle) = rows.get(rows.len() / 2) {
        println!("{name:<44} {:>8.0} messages/s {:>6.1} µs CPU", middle.rate, middle.micros);
    }
}

#[tokio::main]
async fn main() -> Outcome {
    let url = std::env::args().nth(1).ok_or("which server? amqp://user:password@host:port")?;
    // In spawned tasks: a runtime's first thread counts double.
    tokio::spawn(compare(url)).await?
}

async fn compare(url: String) -> Outcome {
    let count: usize = std::env::var("COUNT").ok().and_then(|count| count.parse().ok()).unwrap_or(20_000);
    let mut connectors = Connectors::new();
    connectors.add(["amqp"], broker_amqp::connector());
    let broker = connectors.open(&format!("{url}?exchange=ratio&queue_type=classic&persistent=false"))?;
    let topic = Topic::new("ratio")?;
    let group: Group = "ratio@ratio".parse()?;
    broker.create_group(&group, broker_core::GroupOptions::new()).await?;
    let (_connection, channel) = raw_channel(&format!("{url}/%2f")).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare("ratio".into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    channel.queue_declare("ratio.raw".into(), QueueDeclareOptions::durable(), FieldTable::default()).await?;
    let purge = async || -> Outcome {
        broker.purge_group(&group).await?;
        Ok(())
    };
    for window in [1, 64, 1000] {
        let count = if window == 1 { count / 8 } else { count };
        let (mut raw, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            raw.push(measured(count, raw_publish(&channel, count, window)).await?);
            purge().await?;
            ours.push(measured(count, our_publish(&*broker, &topic, count, window)).await?);
            purge().await?;
        }
        show(&format!("publish, {window} in flight: raw lapin"), &mut raw);
        show(&format!("publish, {window} in flight: broker-amqp"), &mut ours);
    }
    channel
        .queue_bind(
            "ratio.raw".into(),
            "ratio".into(),
            "ratio".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    let (mut single, mut multiple, mut ours) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..5 {
        // The raw queue gets as many as both raw ways take.
        our_publish(&*broker, &topic, count, 1000).await?;
        let mut member = broker.subscribe(&group.filter, Subscribe::group(group.name.clone())).await?;
        ours.push(measured(count, our_consume(&mut member, count)).await?);
        member.close().await?;
        for (every, rows) in [(1, &mut single), (64, &mut multiple)] {
            if every == 64 {
                our_publish(&*broker, &topic, count, 1000).await?;
                purge().await?;
            }
            let (connection, channel) = raw_channel(&format!("{url}/%2f")).await?;
            rows.push(measured(count, raw_consume(&channel, "ratio.raw", count, every)).await?);
            connection.close(200, "OK".into()).await?;
        }
    }
    show("consume, each acked: raw lapin", &mut single);
    show("consume, every 64th with multiple: raw lapin", &mut multiple);
    show("consume, each acked: broker-amqp", &mut ours);
    channel.queue_delete("ratio.raw".into(), Default::default()).await?;
    broker.delete_group(&group).await?;
    broker.close(Duration::from_secs(10)).await;
    Ok(())
}
