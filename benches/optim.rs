//! Measures optimiser steps on the CPU, in updated values per second: `cargo bench -p benches --bench optim`.
//!
//! Names read `adamw f32/1000000`: optimiser, dtype, number of values in the only parameter. `candle-nn adamw` is
//! `candle_nn::AdamW` on the same values in the same run. `CANDLE_NUM_THREADS=1` measures one thread. Memory comes from mimalloc,
//! as in benches/cpu.rs.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::optim::{Adagrad, AdamW, ParamsAdamW, ParamsSgd, Sgd};
use candle_nn::Optimizer;
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A parameter and its gradient.
fn parameter(n: usize, dtype: DType) -> Result<(Var, GradStore)> {
    let random = || Tensor::randn(0f32, 1f32, n, &Device::Cpu)?.to_dtype(dtype);
    let var = Var::from_tensor(&random()?)?;
    let mut grads = var.sum_all()?.backward()?;
    grads.insert(&var, random()?);
    Ok((var, grads))
}

fn bench<O: Optimizer>(c: &mut Criterion, name: &str, dtype: DType, config: fn() -> O::Config) {
    let mut group = c.benchmark_group(format!("{name} {}", dtype.as_str()));
    for n in [1_000_000, 2_600_000] {
        let (var, grads) = parameter(n, dtype).unwrap();
        let mut optimizer = O::new(vec![var], config()).unwrap();
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(BenchmarkId::from_parameter(n), |b| {
            b.iter(|| optimizer.step(&grads).unwrap())
        });
    }
    group.finish();
}

fn steps(c: &mut Criterion) {
    let momentum = || ParamsSgd {
        momentum: 0.9,
        ..Default::default()
    };
    bench::<candle_nn::AdamW>(c, "candle-nn adamw", DType::F32, ParamsAdamW::default);
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        bench::<AdamW>(c, "adamw", dtype, ParamsAdamW::default);
    }
    bench::<Adagrad>(c, "adagrad", DType::F32, Default::default);
    bench::<Sgd>(c, "sgd", DType::F32, Default::default);
    bench::<Sgd>(c, "sgd with momentum", DType::F32, momentum);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = steps
}
criterion_main!(benches);
