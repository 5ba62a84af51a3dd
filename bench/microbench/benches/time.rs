//! Time of the pump's rounds, without what driver and model kernel do in between.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mpassthru_datapath::microbench::Scene;
use mpassthru_microbench::{plans, words};

fn rounds(criterion: &mut Criterion) {
    let clock = clock_cost();
    for plan in plans() {
        let ((way, path), size, burst) = (words(plan), plan.frame_bytes, plan.burst);
        let mut scene = Scene::new(plan);
        let mut group = criterion.benchmark_group("pump");
        group.throughput(Throughput::Elements(plan.burst.into()));
        group.bench_function(format!("{way} {path}, {size} bytes, burst {burst}"), |bencher| {
            bencher.iter_custom(|count| {
                let mut spent = Duration::ZERO;
                for _ in 0..count {
                    scene.prepare();
                    let start = Instant::now();
                    scene.round();
                    spent += start.elapsed();
                }
                spent.saturating_sub(clock * count as u32)
            });
        });
    }
}

/// What two looks at the clock cost: at a burst of one frame, more than the round between them.
fn clock_cost() -> Duration {
    const LOOKS: u32 = 10_000;
    let mut spent = Duration::ZERO;
    for _ in 0..LOOKS {
        spent += Instant::now().elapsed();
    }
    spent / LOOKS
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = rounds
}
criterion_main!(benches);
