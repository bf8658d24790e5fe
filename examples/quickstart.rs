//! How do I start? Everything on one page: build a hashed embedding bag, look up ragged bags, train a step, save, open to
//! look up again, and train on.
//!
//! ```text
//! cargo run --release --example quickstart
//! cargo run --release --example quickstart --features cuda    # on the first GPU, if there is one
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::optim::AdamW;
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding_bag, Checkpoint, HashedEmbeddingBagConfig, Mode,
};
use candle_nn::{Optimizer, VarBuilder, VarMap};

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;

    // 1000 categories of 16 columns: a table of 16,000 values, folded into 1,600.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let config = HashedEmbeddingBagConfig {
        mode: Mode::Sum,
        ..Default::default()
    };
    let layer = hashed_embedding_bag(1000, 16, 0.1, config, vb.pp("categories"))?;
    println!(
        "{} rows of {} columns in {} values, {:?}, on {:?}",
        layer.num_embeddings(),
        layer.embedding_dim(),
        layer.hashed_weight().elem_count(),
        layer.hash(),
        device.location(),
    );

    // 18 bags of 0 to 5 categories: all indices one after the other, and the start of each bag.
    let lengths: Vec<u32> = (0..18).map(|bag| bag % 6).collect();
    let nnz: u32 = lengths.iter().sum();
    let offsets: Vec<u32> = lengths
        .iter()
        .scan(0, |next, len| Some(std::mem::replace(next, *next + len)))
        .collect();
    let indices: Vec<u32> = (0..nnz).map(|i| i * 389 % 1000).collect();
    let (indices, offsets) = (
        Tensor::new(indices, &device)?,
        Tensor::new(offsets, &device)?,
    );
    let out = layer.forward_with_offsets(&indices, &offsets)?;
    println!("18 bags of {nnz} indices -> {:?}", out.dims());

    // A training step: the gradient is as small as the parameter.
    let target = Tensor::ones(out.shape(), DType::F32, &device)?;
    let loss = |out: &Tensor| (out - &target)?.sqr()?.mean_all();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
    let before = loss(&out)?;
    optimizer.backward_step(&before)?;
    let out = layer.forward_with_offsets(&indices, &offsets)?;
    let after = loss(&out)?;
    let (before, after) = (before.to_scalar::<f32>()?, after.to_scalar::<f32>()?);
    println!("loss {before:.4} -> {after:.4}");

    // The checkpoint describes the layer, so the file alone is enough to rebuild it.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("quickstart.safetensors");
    checkpoint::save(
        &path,
        checkpoint::variables(&vars),
        [("categories", &layer)],
    )?;
    let opened = Checkpoint::open(&path)?;
    for (name, spec) in opened.layers() {
        println!(
            "{} bytes hold {name}: {spec:?}",
            std::fs::metadata(&path)?.len()
        );
    }
    let served = opened.hashed_embedding_bag("categories", DType::F32, &device)?;
    let again = served.forward_with_offsets(&indices, &offsets)?;
    ensure!(again.to_vec2::<f32>()? == out.to_vec2::<f32>()?);
    println!("the opened layer gives the same output");

    // What is opened for lookups does not train. To train on, build the layer on a variable, here of a new VarMap.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let layer = opened.trainable_hashed_embedding_bag("categories", vb.pp("categories"))?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?;
    optimizer.backward_step(&loss(&layer.forward_with_offsets(&indices, &offsets)?)?)?;
    let out = layer.forward_with_offsets(&indices, &offsets)?;
    println!("loss {after:.4} -> {:.4}", loss(&out)?.to_scalar::<f32>()?);
    Ok(())
}
