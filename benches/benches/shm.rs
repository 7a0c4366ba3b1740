//! Times of the shared-memory primitives.
//!
//! `ring` moves messages within one thread, so that everything stays in the first-level cache: the
//! cost of the instructions. `two threads` has a second core take them off: what crosses between
//! the caches.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rdsock_benches::{Ends, Stream, bell, request};
use rdsock_shm::layout::want;
use rdsock_shm::{bell as bells, wake};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

const SIZES: [usize; 3] = [64, 4096, 65536];

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    for size in SIZES {
        let (stream, ends) = (Stream::new(1 << 20), Ends::new(1 << 20));
        let (from, mut to) = (vec![7; size], vec![0; size]);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("send+receive", size), &size, |bench, _| {
            bench.iter(|| {
                black_box(stream.send(black_box(&from)));
                black_box(stream.receive(black_box(&mut to)));
            });
        });
        group.bench_with_input(
            BenchmarkId::new("send+receive, ends", size),
            &size,
            |bench, _| {
                bench.iter(|| {
                    black_box(ends.send(black_box(&from)));
                    black_box(ends.receive(black_box(&mut to)));
                });
            },
        );
    }
    group.finish();
}

fn two_threads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("two threads");
    group.sample_size(10);
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("one way", size), &size, |bench, _| {
            bench.iter_custom(|rounds| {
                let stream = Stream::new(1 << 20);
                let (stop, got) = (AtomicBool::new(false), AtomicU64::new(0));
                let total = rounds * size as u64;
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut to = vec![0; size];
                        while !stop.load(Ordering::Relaxed) {
                            let len = stream.receive(&mut to) as u64;
                            got.store(got.load(Ordering::Relaxed) + len, Ordering::Relaxed);
                            if len == 0 {
                                std::hint::spin_loop();
                            }
                        }
                    });
                    let from = vec![7; size];
                    let start = Instant::now();
                    for _ in 0..rounds {
                        let mut sent = 0;
                        while sent < size {
                            let len = stream.send(&from[sent..]);
                            sent += len;
                            if len == 0 {
                                std::hint::spin_loop();
                            }
                        }
                    }
                    while got.load(Ordering::Relaxed) < total {
                        std::hint::spin_loop();
                    }
                    let passed = start.elapsed();
                    stop.store(true, Ordering::Relaxed);
                    passed
                })
            });
        });
    }
    group.finish();
}

fn sleep_and_wake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wake");
    let ask = request();
    group.bench_function("look, nobody asks", |bench| {
        bench.iter(|| black_box(wake::asked(black_box(&ask))));
    });
    group.bench_function("ask and take back", |bench| {
        bench.iter(|| {
            wake::ask(black_box(&ask.want), want::WAKE);
            black_box(wake::unask(&ask.want, want::WAKE));
        });
    });
    group.bench_function("ask, take and answer", |bench| {
        bench.iter(|| {
            wake::ask(black_box(&ask.want), want::WAKE);
            black_box(wake::take(&ask.want));
            wake::rung(&ask.want);
        });
    });
    group.finish();
}

fn bells_of_streams(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bell");
    let bell = bell();
    group.bench_function("ring", |bench| {
        bench.iter(|| black_box(bells::ring(black_box(&bell), 1234)));
    });
    bells::take(&bell, |_, _| {});
    for ready in [0, 1, 64, 4096_usize] {
        group.bench_with_input(BenchmarkId::new("take", ready), &ready, |bench, _| {
            bench.iter_batched(
                || {
                    (0..ready).for_each(|n| {
                        bells::ring(&bell, n * (4096 / ready));
                    });
                },
                |()| {
                    let mut found = 0;
                    bells::take(black_box(&bell), |_, bits| found += bits.count_ones());
                    assert_eq!(found as usize, ready);
                },
                criterion::BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, ring, two_threads, sleep_and_wake, bells_of_streams);
criterion_main!(benches);
