//! Measures the first forward and backward of a process on a GPU whose driver cache is empty, as in a fresh container.
//!
//! ```text
//! cargo run --release -p benches --bin first_call --features cuda
//! ```
//!
//! The driver translates candle's own kernels at their first use. So they are used first, on a plain tensor, and all later times
//! are this crate's. The second call shows how much of the first is not loading.

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_hashed_embedding_bag::{Gradient, HashedEmbeddingBag, HashedEmbeddingBagConfig};
use std::time::Instant;

const NUM_BAGS: usize = 1024;
const BAG_LEN: usize = 20;
const DIM: usize = 64;

fn main() -> Result<()> {
    let cache = tempfile::tempdir()?;
    // The driver reads the variable when it is initialised.
    std::env::set_var("CUDA_CACHE_PATH", cache.path());

    let device = timed("device", || Ok(Device::new_cuda(0)?))?;
    let weight = Var::from_tensor(&Tensor::zeros(1 << 20, DType::F32, &device)?)?;
    let rows: Vec<u32> = (0..NUM_BAGS * BAG_LEN)
        .map(|i| (i * 389 % 100_000) as u32)
        .collect();
    let indices = Tensor::from_vec(rows, (NUM_BAGS, BAG_LEN), &device)?;

    // A graph with the same candle ops, but a slice of the weight in place of a lookup.
    timed("candle's own kernels, forward and backward", || {
        let out = weight.narrow(0, 0, NUM_BAGS * DIM)?;
        out.reshape((NUM_BAGS, DIM))?.sum_all()?.backward()?;
        Ok(device.synchronize()?)
    })?;
    for gradient in [Gradient::Fastest, Gradient::Deterministic] {
        let config = HashedEmbeddingBagConfig {
            gradient,
            ..Default::default()
        };
        let layer = HashedEmbeddingBag::new(weight.as_tensor().clone(), 100_000, DIM, config)?;
        for call in ["first", "second"] {
            let name = format!("{gradient:?} gradient, {call}");
            let out = timed(&format!("{name} forward"), || {
                let out = layer.forward(&indices)?;
                device.synchronize()?;
                Ok(out)
            })?;
            timed(&format!("{name} backward"), || {
                out.sum_all()?.backward()?;
                Ok(device.synchronize()?)
            })?;
        }
    }
    Ok(())
}

/// Prints how long `f` takes.
fn timed<R>(what: &str, f: impl FnOnce() -> Result<R>) -> Result<R> {
    let start = Instant::now();
    let result = f()?;
    println!("{:9.1} ms  {what}", start.elapsed().as_secs_f64() * 1e3);
    Ok(result)
}
