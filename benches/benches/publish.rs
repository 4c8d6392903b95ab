//! What a publish costs, taking the message off and acking it included, with channels beside it.
//! Publisher and subscriber are one task, so that no wake-up is in it; `fan_out` has those.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]
#![allow(clippy::expect_used, reason = "a bench that cannot run has nothing better to do than stop")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker_benches::in_process::publish::Loop;
use broker_benches::in_process::{BATCH, CAPACITY, Load};
use broker_core::Message;
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;
use tokio::sync::{broadcast, mpsc};

fn publish(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let mut group = criterion.benchmark_group("publish");
    for payload in [64, 1024] {
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("ours", payload), |bencher| {
            bencher.iter_custom(|messages| {
                timed(&runtime, ours(Load { receivers: 1, payload, messages, capacity: CAPACITY }, false))
            });
        });
        group.bench_function(BenchmarkId::new("ours_by_name", payload), |bencher| {
            bencher.iter_custom(|messages| {
                timed(&runtime, ours(Load { receivers: 1, payload, messages, capacity: CAPACITY }, true))
            });
        });
        group.bench_function(BenchmarkId::new("tokio_mpsc", payload), |bencher| {
            bencher.iter_custom(|messages| timed(&runtime, mpsc(payload, messages)));
        });
        group.bench_function(BenchmarkId::new("tokio_broadcast", payload), |bencher| {
            bencher.iter_custom(|messages| timed(&runtime, broadcast(payload, messages)));
        });
    }
    group.finish();
}

/// The same by the topic's name, with so many other topics that have a subscription each.
fn other_topics(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let mut group = criterion.benchmark_group("other_topics");
    group.throughput(Throughput::Elements(1));
    for others in [10, 100_000] {
        let it = Arc::new(Mutex::new(runtime.block_on(Loop::new(others)).expect("a broker")));
        group.bench_function(BenchmarkId::from_parameter(others), |bencher| {
            bencher.iter_custom(|messages| {
                let it = Arc::clone(&it);
                let load = Load { receivers: 1, payload: 64, messages, capacity: CAPACITY };
                let work = async move { it.lock().await.publish_by_name(load).await };
                timed(&runtime, async { work.await.expect("every message comes back").elapsed })
            });
        });
    }
    group.finish();
}

/// Runs in a task: the thread that blocks on a runtime is a slow place to work.
fn timed(runtime: &Runtime, work: impl Future<Output = Duration> + Send + 'static) -> Duration {
    runtime.block_on(async { tokio::spawn(work).await.expect("the work does not panic") })
}

async fn ours(load: Load, by_name: bool) -> Duration {
    let mut it = Loop::new(0).await.expect("a broker");
    let run = if by_name { it.publish_by_name(load).await } else { it.publish(load).await };
    run.expect("every message comes back").elapsed
}

async fn mpsc(payload: usize, messages: u64) -> Duration {
    let payload = Bytes::from(vec![b'x'; payload]);
    let (sender, mut receiver) = mpsc::channel::<Message>(CAPACITY);
    let mut batch = Vec::with_capacity(BATCH);
    let began = Instant::now();
    let mut left = messages;
    while left > 0 {
        let burst = left.min(BATCH as u64);
        for _ in 0..burst {
            sender.send(Message::new(Bytes::clone(&payload))).await.expect("the receiver is there");
        }
        let mut due = burst;
        while due > 0 {
            due -= receiver.recv_many(&mut batch, BATCH).await as u64;
            for message in batch.drain(..) {
                black_box(message.payload().len());
            }
        }
        left -= burst;
    }
    began.elapsed()
}

async fn broadcast(payload: usize, messages: u64) -> Duration {
    let payload = Bytes::from(vec![b'x'; payload]);
    let (sender, mut receiver) = broadcast::channel::<Message>(CAPACITY);
    let began = Instant::now();
    let mut left = messages;
    while left > 0 {
        let burst = left.min(BATCH as u64);
        for _ in 0..burst {
            sender.send(Message::new(Bytes::clone(&payload))).expect("the receiver is there");
        }
        for _ in 0..burst {
            black_box(receiver.try_recv().expect("nothing is lost below the capacity").payload().len());
        }
        left -= burst;
    }
    began.elapsed()
}

criterion_group!(benches, publish, other_topics);
criterion_main!(benches);
