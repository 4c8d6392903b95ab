//! All four brokers side by side, with criterion: what each step up costs. `adapters` in `ratios` is the same.

#![allow(missing_docs, reason = "criterion_group! makes public functions without")]
#![allow(clippy::expect_used, reason = "a bench that cannot run has nothing better to do than stop")]

use std::sync::Arc;
use std::time::Duration;

use broker_benches::adapters::{Adapter, Scene, Workload};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;

fn adapters(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    for workload in Workload::ALL {
        let mut group = criterion.benchmark_group(format!("adapters/{}", workload.name()));
        group.throughput(Throughput::Elements(1));
        // A round makes a topic and a group: few, long ones.
        group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(5));
        for adapter in Adapter::ALL {
            let scene = Arc::new(runtime.block_on(Scene::open(adapter)).expect("a broker"));
            group.bench_function(BenchmarkId::from_parameter(adapter.name()), |bencher| {
                bencher.iter_custom(|messages| {
                    let scene = Arc::clone(&scene);
                    let round = async move { scene.run(workload, messages).await };
                    // In a task: the thread that blocks on a runtime is a slow place to work.
                    let sample = runtime.block_on(async { tokio::spawn(round).await }).expect("no panic");
                    let value = sample.expect("every message comes").value;
                    match workload {
                        // Of each message the microseconds that 99 of 100 took at most.
                        Workload::Latency => Duration::from_secs_f64(value * messages as f64 / 1e6),
                        _ => Duration::from_secs_f64(messages as f64 / value),
                    }
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, adapters);
criterion_main!(benches);
