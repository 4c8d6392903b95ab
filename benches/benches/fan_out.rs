//! Deliveries to 1, 10, 100 and 1,000 subscribers, ours beside tokio's channels, and to 2 and 16 members
//! of one group, ours beside channels whose receiver is shared. One element is one message received by
//! one subscriber.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]
#![allow(clippy::expect_used, reason = "a bench that cannot run has nothing better to do than stop")]

use std::time::Duration;

use broker_benches::Result;
use broker_benches::in_process::fan_out::{self, LOADS};
use broker_benches::in_process::{Load, Run, group};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;

fn fan_out(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    for payload in [64, 1024] {
        let mut group = criterion.benchmark_group(format!("fan_out/{payload}B"));
        group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(5));
        for load in LOADS {
            // Criterion repeats the whole, so a tenth of what `ratios` publishes is enough.
            let load = Load { payload, messages: load.messages / 10, ..load };
            let due = fan_out::due(load);
            group.throughput(Throughput::Elements(due));
            group.bench_function(BenchmarkId::new("ours", load.receivers), |bencher| {
                bencher.iter_custom(|times| timed(&runtime, load, due, times, async |load| fan_out::ours(load).await));
            });
            group.bench_function(BenchmarkId::new("tokio_mpsc", load.receivers), |bencher| {
                bencher.iter_custom(|times| timed(&runtime, load, due, times, async |load| fan_out::mpsc(load).await));
            });
            group.bench_function(BenchmarkId::new("tokio_broadcast", load.receivers), |bencher| {
                bencher.iter_custom(|times| {
                    timed(&runtime, load, due, times, async |load| fan_out::broadcast(load).await)
                });
            });
        }
        group.finish();
    }
}

fn members(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let mut bench = criterion.benchmark_group("group/64B");
    bench.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(5));
    for load in group::LOADS {
        let load = Load { messages: load.messages / 10, ..load };
        let due = load.messages;
        bench.throughput(Throughput::Elements(due));
        bench.bench_function(BenchmarkId::new("ours", load.receivers), |bencher| {
            bencher.iter_custom(|times| timed(&runtime, load, due, times, async |load| group::ours(load).await));
        });
        bench.bench_function(BenchmarkId::new("flume", load.receivers), |bencher| {
            bencher.iter_custom(|times| timed(&runtime, load, due, times, async |load| group::flume(load).await));
        });
        bench.bench_function(BenchmarkId::new("async_channel", load.receivers), |bencher| {
            bencher
                .iter_custom(|times| timed(&runtime, load, due, times, async |load| group::async_channel(load).await));
        });
    }
    bench.finish();
}

/// Runs `work`, in which `due` messages are to be received, so many times, in a task: the thread that
/// blocks on a runtime is a slow place to work. A run that lost messages counts as long as receiving all
/// of them at its rate would have taken.
fn timed<F, Fut>(runtime: &Runtime, load: Load, due: u64, times: u64, work: F) -> Duration
where
    F: Fn(Load) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Run>> + Send + 'static,
{
    let all = async move {
        let mut elapsed = Duration::ZERO;
        for _ in 0..times {
            let run = work(load).await.expect("a run whose counts add up");
            elapsed += Duration::from_secs_f64(due as f64 / run.rate());
        }
        elapsed
    };
    runtime.block_on(async { tokio::spawn(all).await.expect("the work does not panic") })
}

criterion_group!(benches, fan_out, members);
criterion_main!(benches);
