//! Measures optimiser steps on this machine's GPU: time, and bandwidth relative to a device copy measured in the same run.
//!
//! ```text
//! cargo run --release -p benches --bin gpu_optim --features cuda
//! ```
//!
//! The bandwidth counts parameter, gradient and state as read once, and parameter and state as written once. A time is the median
//! of 9 timings of 50 steps, each ended by a synchronisation.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::optim::{Adagrad, AdamW, ParamsAdamW, ParamsSgd, Sgd};
use candle_nn::Optimizer;
use std::time::Instant;

fn median_us(device: &Device, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        run()?;
    }
    device.synchronize()?;
    let steps = 50;
    let mut times = vec![];
    for _ in 0..9 {
        let start = Instant::now();
        for _ in 0..steps {
            run()?;
        }
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(steps));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// GB read plus written per second by a copy within the device, without an allocation.
fn copy_gb_per_s(device: &Device) -> Result<f64> {
    let values = 1 << 28;
    let from = Tensor::ones(values, DType::F32, device)?;
    let to = Var::zeros(values, DType::F32, device)?;
    let us = median_us(device, || to.set(&from))?;
    Ok((2 * 4 * values) as f64 / us / 1e3)
}

struct Bench<'a> {
    device: &'a Device,
    copy: f64,
}

impl Bench<'_> {
    /// `arrays` is the number of state arrays, whose values have at least 4 bytes.
    fn run<O: Optimizer>(
        &self,
        name: &str,
        n: usize,
        dtype: DType,
        arrays: usize,
        config: O::Config,
    ) -> Result<()> {
        let var = Var::zeros(n, dtype, self.device)?;
        let mut grads = var.sum_all()?.backward()?;
        grads.insert(&var, Tensor::ones(n, dtype, self.device)?);
        let mut optimizer = O::new(vec![var], config)?;
        let us = median_us(self.device, || optimizer.step(&grads))?;
        let size = dtype.size_in_bytes();
        let gb_per_s = (n * (3 * size + 2 * arrays * size.max(4))) as f64 / us / 1e3;
        println!(
            "| {name} | {} | {n} | {us:.1} | {gb_per_s:.0} | {:.0} % |",
            dtype.as_str(),
            gb_per_s / self.copy * 1e2
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let copy = copy_gb_per_s(&device)?;
    println!("copy: {copy:.0} GB/s, read and written\n");
    println!("| optimiser | dtype | values | us | GB/s | of copy |");
    println!("|---|---|---:|---:|---:|---:|");
    let bench = Bench {
        device: &device,
        copy,
    };
    let adamw = ParamsAdamW::default;
    for n in [1_280_000, 100_000_000] {
        bench.run::<candle_nn::AdamW>("candle-nn adamw", n, DType::F32, 2, adamw())?;
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            bench.run::<AdamW>("adamw", n, dtype, 2, adamw())?;
        }
        bench.run::<Adagrad>("adagrad", n, DType::F32, 1, Default::default())?;
        bench.run::<Sgd>("sgd", n, DType::F32, 0, Default::default())?;
        let momentum = ParamsSgd {
            momentum: 0.9,
            ..Default::default()
        };
        bench.run::<Sgd>("sgd with momentum", n, DType::F32, 1, momentum)?;
    }
    Ok(())
}
