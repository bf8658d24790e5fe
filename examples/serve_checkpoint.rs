//! How do I answer lookups from a checkpoint? Open the file, load a layer once, and share it among threads.
//!
//! ```text
//! cargo run --release --example serve_checkpoint                            # a checkpoint that it makes itself
//! cargo run --release --example serve_checkpoint -- model.safetensors       # the first layer of your own
//! ```
//!
//! A server for a whole model, with batches, limits and reloads, is in examples/recommender.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag, Checkpoint, HashedEmbeddingBag,
};
use candle_nn::{VarBuilder, VarMap};

const THREADS: u64 = 4;
const REQUESTS: u64 = 1_000;
const BAG_LEN: u64 = 20;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => path.into(),
        None => {
            let path = folder.path().join("model.safetensors");
            save_a_model(&path)?;
            path
        }
    };

    // Opening maps the file and checks its description; values are only read when a layer is loaded.
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&path)?;
    let (name, spec) = checkpoint.layers().next().context("no layer in the file")?;
    let layer = checkpoint.hashed_embedding_bag(name, DType::F32, &Device::Cpu)?;
    println!("opened in {:.1?}: {name:?}, {spec:?}", start.elapsed());

    // A layer is immutable and `Sync`: threads need neither a lock nor a copy.
    let start = Instant::now();
    thread::scope(|scope| {
        let answer = |thread| {
            let layer = &layer;
            move || (0..REQUESTS).try_for_each(|i| lookup(layer, thread * REQUESTS + i).map(drop))
        };
        let workers: Vec<_> = (0..THREADS).map(|t| scope.spawn(answer(t))).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("no lookup panics"))
    })?;
    println!(
        "{} requests of {BAG_LEN} rows from {THREADS} threads in {:.1?}",
        THREADS * REQUESTS,
        start.elapsed()
    );

    // Requests are checked: a wrong row is an error that you can return, not a crash or the values of another row.
    let outside = layer.num_embeddings() as i64;
    let indices = Tensor::new(vec![0, outside], &Device::Cpu)?;
    let offsets = Tensor::new(&[0u32, 2], &Device::Cpu)?;
    if let Err(error) = layer.forward_with_offsets(&indices, &offsets) {
        println!("a wrong request: {error}");
    }
    Ok(())
}

/// The pooled vector of one bag.
fn lookup(layer: &HashedEmbeddingBag, request: u64) -> Result<Vec<f32>> {
    let rows = layer.num_embeddings() as u64;
    let indices: Vec<i64> = (0..BAG_LEN)
        .map(|i| ((request * BAG_LEN + i).wrapping_mul(0x9E37_79B9_7F4A_7C15) % rows) as i64)
        .collect();
    let indices = Tensor::from_vec(indices, (1, BAG_LEN as usize), &Device::Cpu)?;
    Ok(candle_nn::Module::forward(layer, &indices)?
        .squeeze(0)?
        .to_vec1()?)
}

/// Saves what training would: a million rows of 64 columns in a million values.
fn save_a_model(path: &Path) -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layer = hashed_embedding_bag(1_000_000, 64, 1.0 / 64.0, Default::default(), vb)?;
    Ok(checkpoint::save(path, [], [("items", &layer)])?)
}
